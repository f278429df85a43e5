"""Run models on labelled data and write what they say as a table, for search and savers.

Of a bundle every exit becomes a model of the table; the data is a folder of class folders or an npz
with images and labels. Plain ONNX files, each a model named as its file, take an npz with labels
and an array named as each of their inputs. A run that was interrupted or killed goes on when the
same command is given again. --costs also measures the seconds for one sample on this device, and
counts multiply-accumulate operations: of an exit, those of all stages that it needs, as if it were
alone.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib import collect_costs as costs
from calib.collect import DTYPES, Source, check_names, check_out, collect
from calib.collect_costs import Costs
from calib.collect_sources import BATCH, InputArrays, ModelFile, bundle_source, digest
from calib.model_table import ModelTable
from edge_runtime import device, options
from edge_runtime.console import Console, milliseconds, percent
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import ConfigError
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.scheduler import Scheduler
from edge_runtime.tensors import TensorSpec

#: Options of the backends that logits depend on, however little.
_BACKEND = ("backend", "provider", "optimization", "mode", "device")
_CHUNK = 2**20


@dataclass(frozen=True)
class _Job:
    """What is collected, and how its costs are told.

    Attributes:
        sources: Bundles or ONNX files.
        labels: Shape (samples,).
        data: Identity of the data.
        seconds: Measures the models.
        macs: Counts the models' operations.
    """

    sources: Sequence[Source]
    labels: NDArray[np.int64]
    data: Mapping[str, Any]
    seconds: Callable[[], Costs]
    macs: Callable[[], Costs]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime collect``."""
    options.add_bundle(parser)
    parser.add_argument(
        "more", nargs="*", metavar="MORE", help="further bundles; or all are plain .onnx files"
    )
    options.add_data(parser)
    group = parser.add_argument_group("table")
    group.add_argument(
        "--out", type=Path, required=True, metavar="T.npz", help="the table to write"
    )
    group.add_argument(
        "--costs", type=Path, metavar="C.csv", help="write model,seconds,macs here as well"
    )
    group.add_argument(
        "--batch",
        type=options.count,
        metavar="N",
        help=f"samples per call (default {BATCH}, or as many as the engines take)",
    )
    group.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help=f"of the logits (default {DTYPES[0]})"
    )
    group.add_argument("--overwrite", action="store_true", help="replace what is at --out, --costs")
    group.add_argument(
        "--anew", action="store_true", help="forget what an interrupted run has left"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure, collect, write, show.

    Raises:
        ConfigError: Sources, data and options don't fit, or a file exists.
        CalibrationError: A logit is not finite.
    """
    check_out(args.out, overwrite=args.overwrite)
    costs.check_costs(args.costs, overwrite=args.overwrite)
    paths = [Path(path) for path in (args.bundle, *args.more)]
    files = [path for path in paths if path.suffix == ".onnx" and not path.is_dir()]
    if files and len(files) < len(paths):
        raise ConfigError(
            "bundles and plain ONNX files together",
            got=", ".join(map(str, paths)),
            remedy="Make bundles of the files with edge-runtime export",
        )
    job = _files(args, files, console) if files else _bundles(args, paths, console)
    seconds: Costs | None = None
    macs: Costs | None = None
    if args.costs is not None:
        # Before the long part: it is short, and what it finds missing is told at once.
        macs, seconds = job.macs(), job.seconds()
    made = collect(
        job.sources,
        job.labels,
        args.out,
        console,
        data=job.data,
        dtype=args.dtype,
        overwrite=args.overwrite,
        anew=args.anew,
    )
    console.note(f"wrote {made.path}")
    if seconds is not None and macs is not None:
        costs.write_costs(args.costs, seconds, macs)
        console.note(f"wrote {args.costs}")
    accuracy = _accuracy(made.path)
    _show(made.samples, made.classes, accuracy, seconds, macs, console)
    return {
        "table": str(made.path),
        "table_hash": made.hash,
        "samples": made.samples,
        "classes": made.classes,
        "dtype": args.dtype,
        "models": {name: {"accuracy": value} for name, value in accuracy.items()},
        "seconds": seconds,
        "macs": macs,
        "backend": args.backend,
        "device": device.fingerprint(),
    }


def _bundles(args: argparse.Namespace, paths: Sequence[Path], console: Console) -> _Job:
    bundles = [Bundle.open(path) for path in paths]
    names = _exit_names(bundles)
    images = _images(args, bundles)

    def opener(
        bundle: Bundle, data: ImageDataset, *, timed: bool = False
    ) -> Callable[[], Scheduler]:
        point = OperatingPoint.all_exits(bundle.cascade)
        return lambda: options.open_cascade(args, bundle, data, point, time_stages=timed)

    def seconds() -> Costs:
        found: Costs = {}
        for bundle, own, data in zip(bundles, names, images, strict=True):
            with opener(bundle, data, timed=True)() as scheduler:
                found |= costs.bundle_seconds(scheduler, own, data, console)
        return found

    def macs() -> Costs:
        found: Costs = {}
        for bundle, own, data in zip(bundles, names, images, strict=True):
            found |= costs.bundle_macs(bundle, own, data.image_shape[:2], console)
        return found

    origin = _origin(args)
    sources = [
        bundle_source(bundle, own, data, opener(bundle, data), origin, args.batch)
        for bundle, own, data in zip(bundles, names, images, strict=True)
    ]
    return _Job(sources, images[0].labels, _identity(args, images[0], console), seconds, macs)


def _images(args: argparse.Namespace, bundles: Sequence[Bundle]) -> list[ImageDataset]:
    """The same samples as each bundle takes them; opened once for those that take the same."""
    first = bundles[0]
    opened: dict[TensorSpec, ImageDataset] = {}
    for bundle in bundles:
        if bundle.cascade.classes != first.cascade.classes:
            raise ConfigError(f"the classes of {bundle.path} are others than those of {first.path}")
        image = bundle.cascade.image
        if image not in opened:
            opened[image] = options.open_data(args, bundle)
    return [opened[bundle.cascade.image] for bundle in bundles]


def _exit_names(bundles: Sequence[Bundle]) -> list[list[str]]:
    """What the exits of each bundle are called in the table: with the bundle if exits collide."""
    plain = [[exit_.name for exit_ in bundle.cascade.exits] for bundle in bundles]
    together = [name for names in plain for name in names]
    if len(set(together)) < len(together):
        plain = [
            [f"{bundle.manifest.name}.{name}" for name in names]
            for bundle, names in zip(bundles, plain, strict=True)
        ]
    check_names([name for names in plain for name in names])
    return plain


def _files(args: argparse.Namespace, paths: Sequence[Path], console: Console) -> _Job:
    if args.part or args.image_size:
        raise ConfigError("--part and --image-size are for bundles", got=", ".join(map(str, paths)))
    if args.backend != "onnxrt":
        raise ConfigError("plain ONNX files run on --backend onnxrt only", got=args.backend)
    options.backend_options(args)  # refuses those of other backends
    check_names([path.stem for path in paths])
    data = InputArrays.open(Path(args.data))
    files = [ModelFile.open(path, data, options.onnxrt_options(args)) for path in paths]
    arrays = {name: array for file in files for name, array in file.arrays.items()}
    return _Job(
        [file.source(_origin(args), args.batch) for file in files],
        data.labels,
        {"arrays": digest(arrays)},
        lambda: {file.path.stem: costs.file_seconds(file, console) for file in files},
        lambda: {file.path.stem: costs.file_macs(file, console) for file in files},
    )


def _origin(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _BACKEND}


def _identity(args: argparse.Namespace, images: ImageDataset, console: Console) -> dict[str, Any]:
    """What tells the data from others, in the order in which it is read."""
    path = Path(args.data)
    console.note(f"reading {path} once, to know it again")
    return {
        # Images of a folder are read by name; the hash of an npz's images leaves out their order.
        "content": _file_hash(path) if path.is_file() else images.hash,
        "shape": list(images.image_shape),
        "part": args.part,
        "seed": args.seed if args.part else None,
    }


def _file_hash(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _accuracy(path: Path) -> dict[str, float]:
    table = ModelTable.open(path)
    return {
        name: sum(
            int((logits.argmax(axis=1) == labels).sum()) for logits, labels in table.labelled(name)
        )
        / len(table)
        for name in table.names
    }


def _show(
    samples: int,
    classes: int,
    accuracy: Mapping[str, float],
    seconds: Costs | None,
    macs: Costs | None,
    console: Console,
) -> None:
    columns = ["model", "accuracy"]
    rows = [[name, percent(value)] for name, value in accuracy.items()]
    if seconds is not None and macs is not None:
        columns += ["ms", "MMACs"]
        for row in rows:
            time_s, count = seconds[row[0]], macs[row[0]]
            row.append("-" if time_s is None else milliseconds(time_s))
            row.append("-" if count is None else f"{count / 1e6:.4g}")
    console.table(f"{samples} samples of {classes} classes", columns, rows)
