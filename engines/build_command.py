"""Build TensorRT engines of a bundle's stages, for this device.

Every stage becomes one engine per precision and image size. Without further options these are the
variants that the bundle's operating points run. Engines are kept in the cache of this device, never
in the bundle: another device, TensorRT or driver needs its own, and builds them with the same
command. What is in the cache already is kept. A first build takes minutes on a Jetson; what it
measured makes the next one shorter.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from edge_runtime import options, schema
from edge_runtime.backends.cuda.backend import open_cuda
from edge_runtime.backends.tensorrt import api
from edge_runtime.backends.tensorrt.keys import engine_key, precision_of
from edge_runtime.blocks import variants_of
from edge_runtime.cascade import Stage
from edge_runtime.console import Console
from edge_runtime.dataset import parse_size
from edge_runtime.engine_cache import CachedEngine, EngineCache, EngineDevice, EngineKey
from edge_runtime.errors import BackendUnavailable, ConfigError, CudaError
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.scheduler import image_axes
from edge_runtime.schema import plain
from engines.tensorrt_build import BuildOptions, BuiltEngine, build_engine


@dataclass(frozen=True)
class _Row:
    """What became of one engine.

    Attributes:
        key: Which one.
        state: "built", "kept" or "to build".
        nbytes: Size of the plan; 0 where it is not built.
        about: How it was built, as the cache keeps it; empty where it is not built.
    """

    key: EngineKey
    state: str
    nbytes: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime build``."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder of the bundle")
    parser.add_argument(
        "--operating-point",
        metavar="A,B",
        help="build what these points run (default: all points of the bundle)",
    )
    parser.add_argument(
        "--precision",
        metavar="A,B",
        help="build every stage that has such a variant at it, instead: fp32, fp16, int8",
    )
    parser.add_argument("--batch", type=options.count, default=1, help="images per run (default 1)")
    parser.add_argument(
        "--image-size", metavar="HEIGHTxWIDTH", help="size of the camera, where the bundle needs it"
    )
    parser.add_argument(
        "--workspace-mb",
        type=options.count,
        metavar="N",
        help="device memory that one layer may use for itself (default: no limit)",
    )
    parser.add_argument(
        "--optimization-level",
        type=options.whole,
        default=3,
        metavar="0-5",
        help="how long TensorRT searches (default 3)",
    )
    parser.add_argument("--device", type=options.whole, default=0, help="index of the GPU")
    parser.add_argument("--force", action="store_true", help="build anew what is there already")
    parser.add_argument("--dry-run", action="store_true", help="show what would be built")
    parser.add_argument(
        "--without-gpu",
        action="store_true",
        help="build on a machine without one, to see that TensorRT takes the stages: no device "
        "uses these engines",
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Build what is missing, and show what the engines consist of.

    Raises:
        ConfigError: The options don't fit the bundle.
        BackendUnavailable: There is no TensorRT, or no GPU.
        EngineBuildError: TensorRT refused a stage.
        EdgeRuntimeError: The cache can't be written.
    """
    bundle = Bundle.open(args.bundle)
    how = BuildOptions(workspace_mb=args.workspace_mb, optimization_level=args.optimization_level)
    wanted = list(_wanted(args, bundle))
    trt = api.import_tensorrt()
    cache = EngineCache()
    with _device(args, trt) as device:
        keys = [
            engine_key(
                bundle, stage, precision, batch=args.batch, device=device, options=how.plain()
            )
            for stage, precision in wanted
        ]
        rows = []
        for number, key in enumerate(keys, 1):
            title = f"{number}/{len(keys)} {key.stage} {key.precision}"
            rows.append(_row(args, bundle, cache, trt, key, how, title, console))
    _show(rows, device, trt, console)
    console.note(f"the engines are in {cache.root}")
    return {
        "bundle": bundle.hash,
        "device": plain(device),
        "options": plain(how),
        "engines": [
            {
                "stage": row.key.stage,
                "precision": row.key.precision,
                "shapes": plain(row.key.shapes),
                "state": row.state,
                "bytes": row.nbytes,
                **row.about,
            }
            for row in rows
        ],
    }


def _wanted(args: argparse.Namespace, bundle: Bundle) -> Iterator[tuple[Stage, str]]:
    """Stages and precisions to build, in order of execution, each once."""
    cascade = bundle.cascade
    size = parse_size(args.image_size) if args.image_size else None
    plan = cascade.plan(range(len(cascade.exits)))
    axes = image_axes(plan, size)
    choices = list(_variants(args, bundle))
    for stage in plan.stages:
        resolved = Stage(
            stage.name,
            stage.kind,
            tuple(spec.resolve(axes) for spec in stage.inputs),
            tuple(spec.resolve(axes) for spec in stage.outputs),
        )
        for precision in dict.fromkeys(precision_of(bundle, stage, some) for some in choices):
            yield resolved, precision


def _variants(args: argparse.Namespace, bundle: Bundle) -> Iterator[Mapping[str, str]]:
    """Which variants are run together, one choice after another."""
    if args.precision:
        if args.operating_point:
            raise ConfigError("--precision and --operating-point", expected="one of them")
        for precision in args.precision.split(","):
            yield _at(bundle, precision)
        return
    names = args.operating_point.split(",") if args.operating_point else bundle.operating_points()
    for name in names:
        yield from variants_of(bundle, bundle.operating_point(name))
    if not names:
        yield OperatingPoint.all_exits(bundle.cascade).variants


def _at(bundle: Bundle, precision: str) -> Mapping[str, str]:
    """Every stage that has it at a precision."""
    found = {
        record.name: precision
        for record in bundle.manifest.stages
        if record.kind != "preprocess" and precision in record.variants
    }
    if not found:
        known = {name for record in bundle.manifest.stages for name in record.variants}
        raise ConfigError(
            f"no stage of the bundle {bundle.path} has a variant {precision!r}",
            remedy=f"{schema.nearest(precision, sorted(known))}; edge-runtime quantize and convert "
            "make others",
        )
    return found


@contextmanager
def _device(args: argparse.Namespace, trt: Any) -> Iterator[EngineDevice]:
    """What is built for; its context is current while it is."""
    if args.without_gpu:
        yield api.engine_device(trt, None)
        return
    cuda = open_cuda("any", args.device)
    try:
        cuda.open()
    except (BackendUnavailable, CudaError) as error:
        raise BackendUnavailable(
            f"engines are built on the device that runs them: {error}",
            remedy="Run this on the robot; --without-gpu only tells whether TensorRT takes the "
            "stages",
        ) from error
    try:
        yield api.engine_device(trt, cuda.facts)
    finally:
        cuda.close()


def _row(
    args: argparse.Namespace,
    bundle: Bundle,
    cache: EngineCache,
    trt: Any,
    key: EngineKey,
    how: BuildOptions,
    title: str,
    console: Console,
) -> _Row:
    """Build one engine, unless it is there."""
    if args.dry_run:
        found = None if args.force else cache.find(key)
        whole = found is not None and not cache.verify(found)
        return _kept(found, key) if found is not None and whole else _Row(key, "to build")
    with cache.building(key, lambda: console.note(f"{title}: waiting for who builds it")) as found:
        if found is not None and not args.force:
            # Asked for last, it is what runs, whatever was built with other options since.
            cache.prefer(found)
            return _kept(found, key)
        model = bundle.stage_model(key.stage, key.precision)
        with console.status(f"building {title}") as report:
            built = build_engine(
                trt,
                model,
                key.shapes,
                stage=f"{key.stage} {key.precision}",
                options=how,
                timing_cache=cache.timing_cache(key.device),
                report=report,
            )
        about = _about(built)
        cache.store(key, built.plan, about)
    console.note(f"built {title} in {built.seconds:.1f} s")
    return _Row(key, "built", len(built.plan), about)


def _kept(found: CachedEngine, key: EngineKey) -> _Row:
    return _Row(key, "kept", found.size, found.about)


def _about(built: BuiltEngine) -> dict[str, Any]:
    return {
        "seconds": built.seconds,
        "scratch_bytes": built.scratch_bytes,
        "layers": plain(built.layers),
        "log": list(built.log),
    }


def _show(rows: Sequence[_Row], device: EngineDevice, trt: Any, console: Console) -> None:
    where = device.gpu or "no device: a check, not for use"
    console.table(
        f"engines of {trt.__name__} {trt.__version__} for {where}",
        (
            "stage",
            "precision",
            "state",
            "s",
            "kB",
            "layers",
            "computing in",
            "casts",
            "reformats",
            "converting besides",
        ),
        [_cells(row) for row in rows],
    )


def _cells(row: _Row) -> tuple[str, ...]:
    begin = (row.key.stage, row.key.precision, row.state)
    if not row.about:
        return (*begin, *("",) * 7)
    layers = row.about.get("layers")
    sizes = (f"{row.about['seconds']:.1f}", f"{row.nbytes / 1000:.0f}")
    if layers is None:
        return (*begin, *sizes, *("not told",) * 5)
    return (
        *begin,
        *sizes,
        str(layers["layers"]),
        ", ".join(f"{dtype} {count}" for dtype, count in layers["dtypes"].items()),
        *(str(layers[name]) for name in ("casts", "reformats", "fused_conversions")),
    )
