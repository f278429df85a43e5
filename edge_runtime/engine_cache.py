"""TensorRT's engines of this device on disk: found by all that they depend on, read when whole.

Several processes may read, build, store and prune at the same time. Engines are machine code: the
cache's folders are its owner's alone, and no byte of a plan is handed out before its size, its
hash and everything it depends on are checked.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edge_runtime.engine_entry import (
    SCHEMA_VERSION,
    CachedEngine,
    Sidecar,
    engine_folder,
    file_size,
    leftovers,
    message,
    read_entry,
    read_plan,
    refuse_link,
    reread,
    scan,
)
from edge_runtime.engine_key import EngineDevice, EngineKey, digest
from edge_runtime.errors import BackendError, ConfigError, EdgeRuntimeError, ManifestError
from edge_runtime.file_lock import file_lock
from edge_runtime.files import json_text, sha256, write_bytes
from edge_runtime.schema import plain

__all__ = ["CachedEngine", "EngineCache", "EngineDevice", "EngineKey", "Pruned", "Sidecar"]

#: The environment variable that names another folder.
VARIABLE = "EDGE_RUNTIME_CACHE"

_REMEDY = f"Make room there or make it writable, or set {VARIABLE} to another folder"


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """Something that `EngineCache.prune` removed, or would remove.

    Attributes:
        entry: What it was.
        reason: Why.
        size: Bytes that were freed.
        problem: "", or why it could not be removed.
    """

    entry: CachedEngine
    reason: str
    size: int
    problem: str = ""


class EngineCache:
    """A folder of engines.

    Args:
        root: The folder, made when something is stored. None: what the environment variable
            EDGE_RUNTIME_CACHE names, else `edge-runtime` in $XDG_CACHE_HOME or in ~/.cache.

    Raises:
        ConfigError: `root` is None and there is no home folder.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = (_default_root() if root is None else root).absolute()

    def find(self, key: EngineKey) -> CachedEngine | None:
        """The engine of exactly this key, of which nothing but the sidecar is read.

        Returns:
            None where there is none, or where its sidecar or its size show that it is broken.
        """
        try:
            entry = read_entry(engine_folder(self.root, key), key.name)
        except ManifestError:
            return None
        return entry if _is_whole(entry, key) else None

    def newest(self, key: EngineKey) -> EngineKey:
        """The key of the newest whole engine that differs from `key` in its options at most.

        Newest is what was stored, or preferred, last. No plan is read: whole is what has a sidecar
        and a plan of its size.

        Returns:
            `key` itself where there is none.
        """
        try:
            entries = self.entries(key.bundle)
        except ManifestError:
            return key  # To load it says why nothing can be read.
        fitting = [
            entry
            for entry in entries
            if entry.key is not None
            and not entry.problem
            and replace(entry.key, options=key.options).matches(key)
        ]
        newest = max(fitting, key=_preferred, default=None)
        return key if newest is None or newest.key is None else newest.key

    def prefer(self, entry: CachedEngine) -> None:
        """Make an engine the newest, as if it had been stored now.

        Raises:
            EdgeRuntimeError: The cache can't be written.
        """
        with self._writing():
            os.utime(entry.files[0])

    def load(self, key: EngineKey, bundle: str | os.PathLike[str]) -> tuple[bytes, Sidecar]:
        """Read the engine of exactly this key.

        Args:
            key: What it must depend on.
            bundle: Path of the bundle, for the command that mends an error.

        Returns:
            The plan, whose size and hash are those of its sidecar, and the sidecar, whose key is
            `key`.

        Raises:
            BackendError: There is no such engine (the message says how the nearest one differs),
                or it is broken or unreadable.
        """
        remedy = f"Build it with: edge-runtime build {shlex.quote(os.fspath(bundle))}"
        try:
            return self._load(key)
        except ManifestError as error:
            raise BackendError(
                error.what,
                stage=key.stage,
                got=error.got,
                expected=error.expected,
                remedy=remedy,
            ) from error

    def store(self, key: EngineKey, plan: bytes, about: Mapping[str, Any]) -> Path:
        """Write an engine; one of the same key is replaced, and who reads sees either whole.

        Args:
            key: What it depends on.
            plan: The serialized engine.
            about: JSON data that its builder has to say: build time, layers, lines of the log.

        Returns:
            The plan's file.

        Raises:
            EdgeRuntimeError: It can't be written; what was there is still there.
            ValueError: `about` has a number that is not finite.
        """
        sidecar = Sidecar(
            schema_version=SCHEMA_VERSION,
            key=key,
            sha256=sha256(plan),
            size=len(plan),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            about=about,
        )
        text = json_text(plain(sidecar))
        folder = engine_folder(self.root, key)
        with self._writing(), self._changing():
            self._make(folder)
            try:
                write_bytes(folder / sidecar.plan_name, plan, remedy=_REMEDY)
                write_bytes(folder / f"{key.name}.json", text, remedy=_REMEDY)
            finally:
                for path in leftovers(folder, key.name):
                    path.unlink(missing_ok=True)
        return folder / sidecar.plan_name

    def timing_cache(self, device: EngineDevice) -> Path:
        """The file for TensorRT's timing cache of a device, in a folder that exists.

        Raises:
            EdgeRuntimeError: The folder can't be made.
        """
        folder = self.root / "timing"
        with self._writing():
            self._make(folder)
        return folder / f"{device.digest}.timing"

    @contextlib.contextmanager
    def building(
        self, key: EngineKey, on_wait: Callable[[], None] | None = None
    ) -> Iterator[CachedEngine | None]:
        """Be the only one to build an engine, over all processes.

        Args:
            key: Of the engine.
            on_wait: Called before waiting for another process that builds it.

        Yields:
            The engine, plan checked, where there is one already: made by the process that was
            waited for, or earlier. None where it is to be built, and then stored.

        Raises:
            EdgeRuntimeError: The cache can't be written.
        """
        with contextlib.ExitStack() as stack:
            with self._writing():
                stack.enter_context(self._lock(f"build-{digest(key)}", on_wait))
            found = self.find(key)
            yield None if found is None or self.verify(found) else found

    def entries(self, bundle: str | None = None) -> list[CachedEngine]:
        """All engines, and all that is broken: sidecars, plans and folders with their problem.

        Args:
            bundle: Hash of the bundle to look at; None for all.

        Raises:
            ManifestError: The cache's folder can't be read.
        """
        with contextlib.ExitStack() as stack:
            # Another process's half-stored engine is no problem; a cache that can only be read is.
            with contextlib.suppress(OSError):
                if self.root.is_dir():
                    stack.enter_context(self._changing())
            return list(scan(self.root, bundle))

    def verify(self, entry: CachedEngine) -> str:
        """Read an engine's plan: "", or what is wrong with it."""
        try:
            self._read(entry)
        except ManifestError as error:
            return message(error)
        return ""

    def prune(
        self, doomed: Callable[[CachedEngine], str], *, dry_run: bool = False
    ) -> list[Pruned]:
        """Remove engines, and folders that are empty then; nothing is stored meanwhile.

        Args:
            doomed: Why an entry is to be removed; "" where it stays.
            dry_run: Whether to remove nothing and only say what would be.

        Raises:
            EdgeRuntimeError: The cache can't be written or read.
        """
        if dry_run or not self.root.is_dir():
            return [
                Pruned(entry=entry, reason=reason, size=sum(map(file_size, entry.files)))
                for entry in self.entries()
                if (reason := doomed(entry))
            ]
        with self._writing(), self._changing():
            return [
                _remove(self.root, entry, reason)
                for entry in list(scan(self.root))
                if (reason := doomed(entry))
            ]

    def _load(self, key: EngineKey) -> tuple[bytes, Sidecar]:
        folder = engine_folder(self.root, key)
        file = folder / f"{key.name}.json"
        try:
            file.lstat()
        except FileNotFoundError as error:
            raise self._absent(key) from error
        except OSError as error:
            raise ManifestError(f"{file} can't be read: {error.strerror}") from error
        entry = read_entry(folder, key.name)
        _check_key(entry, key)
        return self._read(entry)

    def _read(self, entry: CachedEngine) -> tuple[bytes, Sidecar]:
        """Read a plan; where another process replaces the engine meanwhile, the new one."""
        while True:
            try:
                if entry.problem or entry.sidecar is None:
                    raise ManifestError(entry.problem)
                return read_plan(entry.path, entry.sidecar), entry.sidecar
            except ManifestError:
                again = reread(entry)
                if again.sidecar == entry.sidecar:
                    raise
                entry = again

    def _absent(self, key: EngineKey) -> ManifestError:
        """The error for a key without an engine, with the nearest engine of the same stage."""
        what = f"stage {key.stage!r} has no TensorRT engine ({key.precision})"
        near = [
            entry.sidecar
            for entry in scan(self.root, key.bundle)
            if entry.sidecar is not None
            and not entry.problem
            and (entry.sidecar.key.stage, entry.sidecar.key.precision) == (key.stage, key.precision)
        ]
        if not near:
            return ManifestError(f"{what} in {self.root}")
        nearest = min(near, key=lambda sidecar: len(sidecar.key.differences(key)))
        return _other(
            f"{what} that fits; one in {self.root} was built for something else", nearest, key
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            name = error.filename or self.root
            raise EdgeRuntimeError(
                f"the cache of engines {self.root} can't be written: "
                f"{name}: {error.strerror or error}",
                remedy=_REMEDY,
            ) from error

    def _make(self, folder: Path) -> None:
        """Make a folder of the cache and those above it that are missing, for their owner alone."""
        missing = []
        for path in (folder, *folder.parents):
            if path.is_relative_to(self.root) and path != self.root:
                refuse_link(path)
            if not path.exists():
                missing.append(path)
        for path in reversed(missing):
            path.mkdir(mode=0o700, exist_ok=True)

    def _changing(self) -> contextlib.AbstractContextManager[None]:
        """Only one process at a time stores or removes; readers need no lock."""
        return self._lock("store")

    @contextlib.contextmanager
    def _lock(self, name: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        folder = self.root / "locks"
        self._make(folder)
        with file_lock(folder / name, on_wait):
            yield


def _default_root() -> Path:
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    # A relative path is invalid there and to be ignored, says the specification.
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():
        try:
            caches = Path.home() / ".cache"
        except RuntimeError as error:
            raise ConfigError(
                "there is no home folder for the cache of engines",
                remedy=f"Set {VARIABLE} to a folder",
            ) from error
    return caches / "edge-runtime"


def _preferred(entry: CachedEngine) -> int:
    """When an engine was stored or preferred last, in ns: the time of its sidecar."""
    try:
        return entry.files[0].lstat().st_mtime_ns
    except OSError:
        return 0


def _is_whole(entry: CachedEngine, key: EngineKey) -> bool:
    return entry.key is not None and entry.key.matches(key) and not entry.problem


def _check_key(entry: CachedEngine, key: EngineKey) -> None:
    if entry.sidecar is not None and not entry.sidecar.key.matches(key):
        what = f"the engine {entry.path} was built for something else"
        raise _other(what, entry.sidecar, key)


def _other(what: str, found: Sidecar, expected: EngineKey) -> ManifestError:
    differences = found.key.differences(expected)
    got = ", ".join(f"{name} {have}" for name, (have, _) in differences.items())
    want = ", ".join(f"{name} {want}" for name, (_, want) in differences.items())
    return ManifestError(what, got=got, expected=want)


def _remove(root: Path, entry: CachedEngine, reason: str) -> Pruned:
    freed, problem = 0, ""
    try:
        for path in entry.files:
            size = file_size(path)
            path.unlink(missing_ok=True)
            freed += size
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}"
    # Not empty, or not ours: it stays.
    with contextlib.suppress(OSError):
        for folder in entry.files[0].parents:
            if folder == root:
                break
            folder.rmdir()
    return Pruned(entry=entry, reason=reason, size=freed, problem=problem)
