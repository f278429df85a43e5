"""Show, check or remove a bundle's TensorRT engines in the cache.

list    what is there: for this device, for others, and what is broken
verify  read every engine and check its hash; exit code 1 where one is broken
prune   remove engines of other devices, of models that the bundle no longer has, and broken ones

The cache is $EDGE_RUNTIME_CACHE, else edge-runtime in $XDG_CACHE_HOME or ~/.cache.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from edge_runtime.console import Console
from edge_runtime.engine_cache import CachedEngine, EngineCache, EngineDevice, EngineKey, Pruned
from edge_runtime.errors import BackendUnavailable, ConfigError, CudaError, EdgeRuntimeError
from edge_runtime.manifest import Bundle
from edge_runtime.schema import plain


class EnginesBroken(EdgeRuntimeError):
    """Engines of the cache are not whole, or can't be removed."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime engines``."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder of the bundle")
    parser.add_argument("action", choices=("list", "verify", "prune"))
    group = parser.add_argument_group("prune")
    group.add_argument("--all", action="store_true", help="remove this bundle's good ones too")
    group.add_argument(
        "--other-bundles", action="store_true", help="remove all engines of other bundles too"
    )
    group.add_argument("--dry-run", action="store_true", help="say what would be removed")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """List, verify or prune.

    Raises:
        ConfigError: An option is of another action.
        ManifestError: The bundle is not whole, or the cache can't be read.
        EnginesBroken: An engine is broken, or can't be removed; the JSON is written all the same.
    """
    for option in ("all", "other_bundles", "dry_run"):
        if getattr(args, option) and args.action != "prune":
            raise ConfigError(f"--{option.replace('_', '-')} is an option of prune")
    bundle = Bundle.open(args.bundle)
    cache = EngineCache()
    found = {"bundle": str(bundle.path), "hash": bundle.hash, "cache": str(cache.root)}
    if args.action == "list":
        return found | _list(bundle, cache, console)
    if args.action == "verify":
        more, error = _verify(bundle, cache, console)
    else:
        more, error = _prune(args, bundle, cache, console)
    if error is not None:
        console.finish(found | more)
        raise error
    return found | more


@dataclass(frozen=True)
class _Here:
    """This device, or why it can't be told."""

    device: EngineDevice | None
    reason: str = ""

    def foreign(self, key: EngineKey) -> str:
        """How an engine's device differs from this one; "" where it doesn't, or can't be told."""
        if self.device is None:
            return ""
        return ", ".join(key.device.differences(self.device)).replace("_", " ")

    def note(self, what: str) -> str:
        """A line that says that this device is not known, and what follows from that."""
        return f"TensorRT is not available here, {what}: {self.reason}"


def _here() -> _Here:
    from edge_runtime.backends.tensorrt.api import this_device

    try:
        return _Here(this_device())
    except (BackendUnavailable, CudaError) as error:
        return _Here(None, str(error))


def _list(bundle: Bundle, cache: EngineCache, console: Console) -> dict[str, Any]:
    entries = cache.entries(bundle.hash)
    here = _here()
    whole = [entry for entry in entries if not entry.problem]
    if whole:
        columns = ["stage", "precision", "shapes", "size", "built (UTC)", "TensorRT", "GPU"]
        console.table(
            f"Engines of {bundle.manifest.name} in {cache.root}",
            [*columns, "device"] if here.device else columns,
            [_row(entry, bundle, here) for entry in whole],
        )
    else:
        console.line(f"{bundle.manifest.name} has no engines in {cache.root}")
    for entry in entries:
        if entry.problem:
            console.line(f"broken: {entry.problem}")
    if here.device is None:
        console.line(here.note("so which engines are of this device can't be told"))
    return {
        "device": plain(here.device),
        "device_problem": here.reason,
        "engines": [_plain(entry, bundle, here) for entry in entries],
    }


def _row(entry: CachedEngine, bundle: Bundle, here: _Here) -> Sequence[str]:
    key = entry.key
    assert key is not None
    row = [
        key.stage if _is_current(key, bundle) else f"{key.stage} (stale)",
        key.precision,
        _shapes(key),
        _bytes(entry.size),
        f"{datetime.fromisoformat(entry.created).astimezone(timezone.utc):%Y-%m-%d %H:%M}",
        key.device.tensorrt or "-",
        key.device.gpu or "-",
    ]
    if here.device is not None:
        other = here.foreign(key)
        row.append(f"foreign: {other}" if other else "this")
    return row


def _verify(
    bundle: Bundle, cache: EngineCache, console: Console
) -> tuple[dict[str, Any], EnginesBroken | None]:
    entries = cache.entries(bundle.hash)
    checked = []
    for entry in console.progress(entries, "checking"):
        problem = cache.verify(entry)
        checked.append({"path": str(entry.path), "problem": problem})
        console.line(f"broken: {problem}" if problem else f"whole: {_title(entry, bundle)}")
    if not entries:
        console.line(f"{bundle.manifest.name} has no engines in {cache.root}")
    broken = sum(bool(one["problem"]) for one in checked)
    if not broken:
        return {"engines": checked}, None
    path = shlex.quote(str(bundle.path))
    error = EnginesBroken(
        f"{broken} of {len(entries)} engines in {cache.root} are broken",
        remedy=f"Remove them with: edge-runtime engines {path} prune, and make them again with: "
        f"edge-runtime build {path}",
    )
    return {"engines": checked}, error


def _prune(
    args: argparse.Namespace, bundle: Bundle, cache: EngineCache, console: Console
) -> tuple[dict[str, Any], EnginesBroken | None]:
    here = _Here(None) if args.all else _here()

    def doomed(entry: CachedEngine) -> str:
        if entry.bundle != bundle.hash:
            return "of another bundle" if args.other_bundles else ""
        if args.all:
            return "all were asked for"
        if entry.key is None or entry.problem:
            return f"broken: {entry.problem}"
        if not _is_current(entry.key, bundle):
            return "stale: its model is not in the bundle"
        if other := here.foreign(entry.key):
            return f"foreign: {other}"
        problem = cache.verify(entry)
        return f"broken: {problem}" if problem else ""

    pruned = cache.prune(doomed, dry_run=args.dry_run)
    verb = "would remove" if args.dry_run else "removed"
    for one in pruned:
        begin = "could not remove" if one.problem else verb
        title = _title(one.entry, bundle)
        console.line(f"{begin} {title}, {_bytes(one.size)}: {one.problem or one.reason}")
    freed = sum(one.size for one in pruned)
    failed = sum(bool(one.problem) for one in pruned)
    count = len(pruned) - failed
    console.line(
        f"{'would free' if args.dry_run else 'freed'} {_bytes(freed)} in {cache.root}: "
        f"{count} {'entry' if count == 1 else 'entries'}"
    )
    if here.reason:
        console.line(here.note("so engines of other devices can't be told and are kept"))
    found = {
        "dry_run": args.dry_run,
        "device": plain(here.device),
        "device_problem": here.reason,
        "freed_bytes": freed,
        "removed": [_outcome(one) for one in pruned],
    }
    if not failed:
        return found, None
    error = EnginesBroken(
        f"{failed} of {len(pruned)} can't be removed from {cache.root}",
        remedy="Make its folders writable, or remove them yourself",
    )
    return found, error


def _is_current(key: EngineKey, bundle: Bundle) -> bool:
    """Whether the bundle still has the model that an engine was built of."""
    return any(
        record.name == key.stage
        and key.precision in record.variants
        and record.variants[key.precision].sha256 == key.model
        for record in bundle.manifest.stages
    )


def _title(entry: CachedEngine, bundle: Bundle) -> str:
    """What an entry is, on one line."""
    key = entry.key
    if key is None:
        return entry.path.name
    title = f"{key.stage} {key.precision} {_shapes(key)}"
    return title if entry.bundle == bundle.hash else f"{title} of bundle {entry.bundle[:12]}"


def _shapes(key: EngineKey) -> str:
    return ", ".join(
        f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in key.shapes.items()
    )


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _plain(entry: CachedEngine, bundle: Bundle, here: _Here) -> dict[str, Any]:
    key = entry.key
    return {
        "path": str(entry.path),
        "problem": entry.problem,
        "size": entry.size,
        "created": entry.created,
        "key": plain(key),
        "this_device": None if key is None or here.device is None else not here.foreign(key),
        "stale": None if key is None else not _is_current(key, bundle),
        "about": plain(entry.about),
    }


def _outcome(one: Pruned) -> dict[str, Any]:
    return {
        "path": str(one.entry.path),
        "key": plain(one.entry.key),
        "reason": one.reason,
        "bytes": one.size,
        "problem": one.problem,
    }
