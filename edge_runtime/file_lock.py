"""A lock between processes, which the system lets go when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def file_lock(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock that `path` stands for; threads of one process exclude each other too.

    The file exists only while somebody holds the lock or waits for it. After a crash it stays,
    and locks nothing.

    Args:
        path: The lock's file, in a folder that exists.
        on_wait: Called before each wait.

    Raises:
        OSError: The file can't be made, or its file system has no locks.
    """
    handle = _acquire(path, on_wait)
    try:
        yield
    finally:
        # While it is still held: who waits finds that the name is gone, and begins anew.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def _acquire(path: Path, on_wait: Callable[[], None] | None) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            _lock(handle, on_wait)
            if _is_file_of(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, on_wait: Callable[[], None] | None) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if on_wait is not None:
            on_wait()
        fcntl.flock(handle, fcntl.LOCK_EX)


def _is_file_of(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False
