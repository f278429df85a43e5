"""What lies in the cache of engines, read with suspicion: sidecars, plans, and what is broken.

<root>/<bundle hash>/<device digest>/
    <stage>.<precision>.<digest>.json             the sidecar: full key, hash and size of the plan
    <stage>.<precision>.<digest>.<hash>.engine    the plan that the sidecar names

A plan's name has its own hash, so that a new plan never takes the place of the old one: writing
the sidecar is the one step in which the engine changes.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from edge_runtime import schema
from edge_runtime.engine_key import EngineKey
from edge_runtime.errors import ConfigError, EdgeRuntimeError, ManifestError
from edge_runtime.files import read_json, sha256
from edge_runtime.manifest import HASH

SCHEMA_VERSION = 1

_DIGEST = re.compile(r"[0-9a-f]{16}")
_NAME = r"(?P<name>[A-Za-z0-9_][A-Za-z0-9_.-]*\.[a-z0-9_]+\.[0-9a-f]{16})"
_SIDECAR = re.compile(rf"{_NAME}\.json")
_PLAN = re.compile(rf"{_NAME}\.[0-9a-f]{{16}}\.engine")
#: What a write that was cut off leaves behind, see `files.write_bytes`.
_UNFINISHED = re.compile(rf"\.{_NAME}\.(json|[0-9a-f]{{16}}\.engine)\.[0-9a-f]{{16}}")


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The JSON file beside a plan.

    Attributes:
        schema_version: Version of this format; others are refused.
        key: What the plan depends on.
        sha256: Hash of the plan, 64 hex digits.
        size: Length of the plan in bytes.
        created: When it was stored: ISO 8601 with the offset of UTC.
        about: Anything that its builder had to say: build time, layers, lines of the log.
    """

    schema_version: int
    key: EngineKey
    sha256: str
    size: int
    created: str
    about: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Refuse what no plan could have."""
        if not HASH.fullmatch(self.sha256):
            raise ConfigError("sha256", got=repr(self.sha256)[:80], expected="64 hex digits")
        try:
            datetime.fromisoformat(self.created)
        except ValueError as error:
            raise ConfigError(
                "created", got=repr(self.created)[:80], expected="a date and time of ISO 8601"
            ) from error

    @property
    def plan_name(self) -> str:
        """Name of the plan's file."""
        return f"{self.key.name}.{self.sha256[:16]}.engine"


@dataclass(frozen=True, kw_only=True)
class CachedEngine:
    """One engine of the cache, its plan not read, or one thing in it that is no whole engine.

    Attributes:
        path: The plan, or the file or folder that is at fault.
        bundle: Hash of the bundle in whose folder it lies.
        files: All that belongs to it, in the order in which it may be removed.
        sidecar: What the sidecar says; None where it can't be read.
        problem: "", or what is wrong with it.
    """

    path: Path
    bundle: str
    files: tuple[Path, ...]
    sidecar: Sidecar | None = None
    problem: str = ""

    @property
    def key(self) -> EngineKey | None:
        """What it depends on; None where that can't be read."""
        return self.sidecar.key if self.sidecar else None

    @property
    def size(self) -> int:
        """Bytes of the plan, or of the file at fault; 0 where there is none."""
        return file_size(self.path)

    @property
    def created(self) -> str:
        """When it was stored, ISO 8601; "" where that can't be read."""
        return self.sidecar.created if self.sidecar else ""

    @property
    def about(self) -> Mapping[str, Any]:
        """What its builder had to say; empty where that can't be read."""
        return self.sidecar.about if self.sidecar else {}


@dataclass
class _Listing:
    """The names in a device's folder that are the cache's."""

    sidecars: list[str] = field(default_factory=list)
    plans: list[Path] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)


def file_size(path: Path) -> int:
    """Bytes of a plain file; 0 where there is none."""
    try:
        info = path.lstat()
    except OSError:
        return 0
    return info.st_size if stat.S_ISREG(info.st_mode) else 0


def message(error: EdgeRuntimeError) -> str:
    """An error's message without its remedy, which is for other files than those of the cache."""
    return str(EdgeRuntimeError(error.what, got=error.got, expected=error.expected))


def refuse_link(path: Path) -> None:
    """Refuse what could lead out of the cache.

    Raises:
        ManifestError: `path` is a symbolic link.
    """
    if os.path.islink(path):
        raise ManifestError(
            f"{path} is a symbolic link", expected="a file or folder of the cache itself"
        )


def engine_folder(root: Path, key: EngineKey) -> Path:
    """The folder of a key's engine.

    Raises:
        ManifestError: It, or the one above, is a symbolic link, which could lead anywhere.
    """
    folder = root
    for part in (key.bundle, key.device.digest):
        folder = folder / part
        refuse_link(folder)
    return folder


def read_entry(folder: Path, name: str) -> CachedEngine:
    """The engine whose sidecar is `<folder>/<name>.json`; its plan is not read."""
    file = folder / f"{name}.json"
    bundle = folder.parent.name
    try:
        sidecar = _read_sidecar(file)
    except (ManifestError, ConfigError) as error:
        return CachedEngine(path=file, bundle=bundle, files=(file,), problem=message(error))
    plan = folder / sidecar.plan_name
    problem = ""
    try:
        if (bundle, folder.name, name) != _place(sidecar.key):
            raise ManifestError(
                f"the sidecar {file} is of another engine",
                got="/".join(_place(sidecar.key)),
                expected="/".join((bundle, folder.name, name)),
            )
        os.close(_open_plan(plan, sidecar))
    except ManifestError as error:
        problem = message(error)
    # A plan of the name that the sidecar gives may belong to another sidecar.
    files = (file, plan) if sidecar.key.name == name else (file,)
    return CachedEngine(path=plan, bundle=bundle, files=files, sidecar=sidecar, problem=problem)


def reread(entry: CachedEngine) -> CachedEngine:
    """The same entry as it is now."""
    file = entry.files[0]
    return read_entry(file.parent, file.stem) if file.suffix == ".json" else entry


def read_plan(path: Path, sidecar: Sidecar) -> bytes:
    """All of a plan, its size and hash checked.

    Raises:
        ManifestError: It is missing, unreadable, or not what its sidecar says.
    """
    handle = _open_plan(path, sidecar)
    try:
        with open(handle, "rb") as file:
            plan = file.read()
    except OSError as error:
        raise ManifestError(f"the engine {path} can't be read: {error.strerror}") from error
    found = sha256(plan)
    if found != sidecar.sha256:
        raise ManifestError(
            f"the engine {path} was altered: sha256", got=found, expected=sidecar.sha256
        )
    return plan


def scan(root: Path, bundle: str | None = None) -> Iterator[CachedEngine]:
    """Everything in the cache, sorted by path; names that are not the cache's are left out.

    Args:
        root: Folder of the cache.
        bundle: Hash of the bundle to look at; None for all.

    Raises:
        ManifestError: `root` can't be read.
    """
    try:
        tops = _children(root, HASH)
    except OSError as error:
        raise ManifestError(
            f"the cache of engines {root} can't be read: {error.strerror}"
        ) from error
    for top in tops:
        if bundle in (None, top.name):
            yield from _scan_folder(top, top.name, _scan_bundle)


def leftovers(folder: Path, name: str) -> list[Path]:
    """Files of a name that its sidecar doesn't name: replaced plans, and writes that were cut off.

    Raises:
        OSError: The folder can't be read.
    """
    listing = _listing(folder)
    found = [path for path in listing.unfinished if _name_of(path) == name]
    plans = [path for path in listing.plans if _name_of(path) == name]
    if not os.path.lexists(folder / f"{name}.json"):
        return found + plans
    try:
        named = _read_sidecar(folder / f"{name}.json").plan_name
    except (ManifestError, ConfigError):
        return found
    return found + [plan for plan in plans if plan.name != named]


def _scan_bundle(top: Path, bundle: str) -> Iterator[CachedEngine]:
    for folder in _children(top, _DIGEST):
        yield from _scan_folder(folder, bundle, _scan_device)


def _scan_device(folder: Path, bundle: str) -> Iterator[CachedEngine]:
    listing = _listing(folder)
    named: set[Path] = set()
    for name in listing.sidecars:
        entry = read_entry(folder, name)
        named.update(entry.files)
        yield entry
    for paths, problem in (
        ([plan for plan in listing.plans if plan not in named], "no sidecar names it"),
        (listing.unfinished, "it was not written to its end"),
    ):
        for path in paths:
            yield CachedEngine(
                path=path, bundle=bundle, files=(path,), problem=f"{path}: {problem}"
            )


def _scan_folder(
    folder: Path, bundle: str, inner: Callable[[Path, str], Iterator[CachedEngine]]
) -> Iterator[CachedEngine]:
    """What `inner` finds in a folder, or the folder as an entry where it can't be looked into."""
    try:
        refuse_link(folder)
        yield from inner(folder, bundle)
    except (ManifestError, OSError) as error:
        problem = (
            message(error) if isinstance(error, ManifestError) else f"{folder}: {error.strerror}"
        )
        yield CachedEngine(path=folder, bundle=bundle, files=(folder,), problem=problem)


def _children(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Folders, and links, of the names that the cache gives."""
    return [
        path
        for path in _sorted(folder)
        if pattern.fullmatch(path.name) and (path.is_symlink() or path.is_dir())
    ]


def _sorted(folder: Path) -> list[Path]:
    """What is in a folder; nothing where it is absent, or was removed a moment ago."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _listing(folder: Path) -> _Listing:
    listing = _Listing()
    for path in _sorted(folder):
        if match := _SIDECAR.fullmatch(path.name):
            listing.sidecars.append(match["name"])
        elif _PLAN.fullmatch(path.name):
            listing.plans.append(path)
        elif _UNFINISHED.fullmatch(path.name):
            listing.unfinished.append(path)
    return listing


def _name_of(path: Path) -> str:
    """Name of a plan, or of a file that was not written to its end."""
    match = _PLAN.fullmatch(path.name) or _UNFINISHED.fullmatch(path.name)
    return match["name"] if match else ""


def _place(key: EngineKey) -> tuple[str, str, str]:
    return key.bundle, key.device.digest, key.name


def _read_sidecar(path: Path) -> Sidecar:
    refuse_link(path)
    data = read_json(path, "the sidecar")
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise ManifestError(
            f"the sidecar {path}: schema version",
            got=repr(version)[:80],
            expected=SCHEMA_VERSION,
        )
    return schema.read(Sidecar, data, f"the sidecar {path}")


def _open_plan(path: Path, sidecar: Sidecar) -> int:
    """A file descriptor of a plan that is a plain file of the right size, to be closed."""
    refuse_link(path)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise ManifestError(f"the engine {path} is missing") from error
    except OSError as error:
        raise ManifestError(f"the engine {path} can't be read: {error.strerror}") from error
    info = os.fstat(handle)
    if stat.S_ISREG(info.st_mode) and info.st_size == sidecar.size:
        return handle
    os.close(handle)
    if not stat.S_ISREG(info.st_mode):
        raise ManifestError(f"the engine {path} is not a plain file")
    raise ManifestError(
        f"the engine {path} was altered: size", got=info.st_size, expected=sidecar.size
    )
