"""Numbers and names from sysfs, where a file can vanish or refuse at any moment."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from edge_runtime.errors import BadReading, PowerError

#: What a busy bus or a sleeping block says; the next reading may be good.
_PASSING = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ETIMEDOUT, getattr(errno, "EREMOTEIO", -1)}
)
#: Bytes that are read of a file; a number has less.
_MOST = 256


def read_int(path: Path, *, refused: str = "Ask an administrator to make it readable") -> int:
    """The whole number in a file.

    Args:
        path: The file.
        refused: Remedy where this user may not read it.

    Raises:
        BadReading: No number is in it, or the bus was busy.
        PowerError: The file or its device is gone, or may not be read.
    """
    text = read_text(path, refused=refused)
    if not re.fullmatch(r"-?[0-9]{1,20}", text):
        raise BadReading(f"{path}", got=repr(text[:40]), expected="a whole number")
    return int(text)


def read_text(path: Path, *, refused: str = "Ask an administrator to make it readable") -> str:
    """The first line of a file, without spaces around it; arguments and errors of `read_int`."""
    try:
        data = _bytes(path)
    except PermissionError as error:
        raise PowerError(f"{path} may not be read by this user", remedy=refused) from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        if error.errno in _PASSING:
            raise BadReading(f"{path} could not be read: {reason}") from error
        raise PowerError(
            f"{path} can't be read: {reason}",
            remedy="The sensor or its driver is gone: see dmesg, and load the driver again",
        ) from error
    return data.decode("utf-8", "replace").strip("\0 \t\r\n").partition("\n")[0].rstrip()


def number_in(name: str) -> int:
    """The first number in a file's name, for sorting; 0 where there is none."""
    found = re.search(r"[0-9]+", name)
    return int(found[0]) if found else 0


def _bytes(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        return file.read(_MOST) or b""
