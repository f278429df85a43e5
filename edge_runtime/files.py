"""Files that are whole or absent: atomic JSON, hashes, and folders that replace each other."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_runtime.errors import ConfigError, ManifestError

#: A manifest with thousands of classes stays below this; a larger file is not ours.
MAX_JSON_BYTES = 64 * 2**20


def sha256(data: bytes) -> str:
    """Hex digest of `data`."""
    return hashlib.sha256(data).hexdigest()


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file that may come from anywhere.

    Raises:
        ManifestError: The file is missing, unreadable, too large, truncated or has a key twice.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ManifestError(f"{what} {path}", got="a file over 64 MiB", expected="JSON")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ManifestError(f"{what} {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{what} {path} can't be read: {error}") from error
    try:
        return json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ManifestError(
            f"{what} {path} is not whole: {error}", remedy="Restore it or export it again"
        ) from error


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON so that a reader sees the old file or the new one, never a part."""
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def replacing_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Build a folder beside `target` and move it there only when it is complete.

    Args:
        target: The folder to create.
        overwrite: Whether a folder that is already there may be replaced.

    Yields:
        An empty folder on the same file system, to be filled.

    Raises:
        ConfigError: `target` exists and `overwrite` is False, or its parent does not exist.
    """
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists", remedy="Choose another --out, or give --force")
    if not target.parent.is_dir():
        raise ConfigError(f"the folder {target.parent} does not exist", remedy="Create it first")
    building = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield building
        building.chmod(0o755)
        for path in sorted(building.rglob("*")):
            if path.is_file():
                _fsync(path)
        _fsync(building)
        _swap(building, target)
        _fsync(target.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _swap(building: Path, target: Path) -> None:
    """Put `building` where `target` is; on any failure the old folder is back in its place."""
    if not target.exists():
        os.rename(building, target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
    os.rename(target, old)
    try:
        os.rename(building, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} appears twice")
    return data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
