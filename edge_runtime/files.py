"""Files that are whole or absent: atomic writes, hashes, and folders that replace each other."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_runtime.errors import ConfigError, EdgeRuntimeError, ManifestError

#: A manifest with thousands of classes stays below this; a larger file is not ours.
MAX_JSON_BYTES = 64 * 2**20

#: Our files are a handful of levels deep; far deeper ones exhaust Python's stack in later code.
_MAX_DEPTH = 64


def sha256(data: bytes) -> str:
    """Hex digest of `data`."""
    return hashlib.sha256(data).hexdigest()


def read_plain(path: Path, what: str) -> bytes:
    """Read a file that may come from anywhere: no pipe, no device, nothing endless.

    Raises:
        ManifestError: The file is missing, unreadable, not a plain file or over 64 MiB.
    """
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise ManifestError(f"{what} {path} is not a plain file")
        if info.st_size > MAX_JSON_BYTES:
            raise ManifestError(f"{what} {path}", got="a file over 64 MiB", expected="JSON")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ManifestError(f"{what} {path} does not exist") from error
    except (OSError, ValueError) as error:
        raise ManifestError(f"{what} {path} can't be read: {error}") from error


def parse_json(data: bytes, what: str) -> Any:
    """Read JSON text that may come from anywhere.

    Args:
        data: The text, UTF-8.
        what: What it is, for the message, with its path.

    Raises:
        ManifestError: It is truncated, has a key twice, a number that is not finite, or is nested
            deeper than 64 levels.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_distinct,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        raise ManifestError(
            f"{what} is not whole: {error}", remedy="Restore it, or make it again"
        ) from error
    return value


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file that may come from anywhere.

    Raises:
        ManifestError: As for `read_plain` and `parse_json`.
    """
    return parse_json(read_plain(path, what), f"{what} {path}")


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON so that a reader sees the old file or the new one, never a part.

    Raises:
        EdgeRuntimeError: The file can't be written; the old one is still there.
    """
    text = json_text(data)
    path = Path(os.path.realpath(path))
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            # A terminal, a pipe or /dev/null: to replace it would destroy it.
            path.write_bytes(text)
        else:
            _replace_file(path, text)
    except OSError as error:
        raise EdgeRuntimeError(f"{path} can't be written: {error.strerror or error}") from error


def json_text(data: Any) -> bytes:
    """Indented JSON, as `write_json` writes it.

    Raises:
        ValueError: A number is not finite.
    """
    return (json.dumps(data, indent=2, allow_nan=False) + "\n").encode()


def write_bytes(path: Path, data: bytes, *, remedy: str | None = None) -> None:
    """Write a file so that a reader sees the old one or the new one, after a power cut too.

    Args:
        path: The file. A symbolic link is replaced, not followed.
        data: All of its contents.
        remedy: What the reader of the error can do about it.

    Raises:
        EdgeRuntimeError: The file can't be written; the old one is still there, or the new one
            where only the last step, making its name outlast a power cut, failed.
    """
    try:
        _replace_file(path, data)
        _fsync(path.parent)
    except OSError as error:
        raise EdgeRuntimeError(
            f"{path} can't be written: {error.strerror or error}", remedy=remedy
        ) from error


@contextlib.contextmanager
def replacing_folder(
    target: Path, *, overwrite: bool, marker: str = "manifest.json"
) -> Iterator[Path]:
    """Build a folder beside `target` and move it there only when it is complete.

    Args:
        target: The folder to create; where it is a symbolic link, the folder it points to.
        overwrite: Whether a folder that is already there may be replaced.
        marker: A file that shows that the folder is one of ours. Replacing deletes what was
            there, so a folder that has something else in it and no such file is never replaced.

    Yields:
        An empty folder on the same file system, to be filled.

    Raises:
        ConfigError: `target` exists and may not be replaced, or its parent does not exist.
        EdgeRuntimeError: A file can't be read or written; what was there is still there.
    """
    target = Path(os.path.realpath(target))
    check_target(target, overwrite=overwrite, marker=marker)
    building, old = _beside(target), _beside(target)
    try:
        building.mkdir()
        yield building
        for path in sorted(building.rglob("*")):
            _fsync(path)
        _fsync(building)
        if overwrite and target.exists():
            target.rename(old)
        building.rename(target)
        _fsync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        if isinstance(error, OSError):
            raise EdgeRuntimeError(f"{target} was not written: {error}") from error
        raise


def _replace_file(path: Path, data: bytes) -> None:
    writing = _beside(path)
    try:
        with writing.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        writing.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            writing.unlink()
        raise


def _beside(path: Path) -> Path:
    """A free hidden name in the same folder."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def check_target(target: Path, *, overwrite: bool, marker: str = "manifest.json") -> None:
    """Refuse a folder to write that `replacing_folder` would refuse, before any long work.

    Args:
        target: The folder to write.
        overwrite: Whether a folder that is already there may be replaced.
        marker: See `replacing_folder`.

    Raises:
        ConfigError: It exists and may not be replaced, or its parent does not exist.
    """
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"the folder {target.parent} does not exist", remedy="Create it first")
    if not target.exists():
        return
    if not overwrite:
        raise ConfigError(f"{target} exists", remedy="Choose another --out, or give --force")
    if not target.is_dir() or (not (target / marker).is_file() and any(target.iterdir())):
        raise ConfigError(
            f"{target} is not replaced: it is no folder with a {marker}",
            remedy="Choose another --out, or remove it yourself",
        )


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network and FUSE file systems can't do it for folders.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(handle)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} appears twice")
    return data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is too large")
    return value


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for parent in level
            if isinstance(parent, dict | list)
            for item in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {_MAX_DEPTH} levels")
