"""Quantise the stages of a bundle, or one ONNX file, to INT8 with ranges from training images.

The FP32 stages run on some hundred class-balanced images; a histogram per activation gives its
range by the method asked for. INT8 is written into the graph as QuantizeLinear and
DequantizeLinear, by the rules that `edge-runtime lint-qdq` checks. A bundle gets "int8" variants in
a new bundle; which stage shall run at which precision is for `edge-runtime precision` to find out.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.histogram import METHODS
from calib.int8 import (
    LEAST_SAMPLES,
    Ranges,
    choose_images,
    histograms,
    ranges_of,
    refuse_noise,
)
from edge_runtime import options
from edge_runtime.console import Console, percent
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import CalibrationError, ConfigError, EngineBuildError
from edge_runtime.files import check_target, sha256
from edge_runtime.manifest import Bundle
from engines import parts
from engines.bundle import with_variants
from engines.parts import Arrays, Part
from engines.quantize import Quantized, QuantizeOptions, activations, quantize

PRECISION = "int8"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime quantize``."""
    parser.add_argument("source", metavar="BUNDLE", type=Path, help="a bundle, or one .onnx file")
    parser.add_argument(
        "--out", type=Path, required=True, help="the new bundle, or .onnx file, to write"
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="mse",
        help="how a range is chosen: the largest value, least divergence, 99.99 %% of the values, "
        "or least squared error (default mse)",
    )
    parser.add_argument(
        "--stages", metavar="A,B", help="quantise these stages only (default: all but preprocess)"
    )
    parser.add_argument(
        "--exclude-nodes",
        metavar="REGEX",
        default="",
        help="nodes in whose name this is found stay float",
    )
    parser.add_argument(
        "--per-tensor", action="store_true", help="one scale per weight, not one per channel"
    )
    parser.add_argument(
        "--ranges",
        type=Path,
        metavar="FILE",
        help="keep the ranges here; where the file exists and fits, they are taken from it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    options.add_data(parser)
    parser.add_argument(
        "--samples",
        type=options.count,
        default=parts.SAMPLES,
        metavar="N",
        help=f"images to calibrate on, of all classes alike (default {parts.SAMPLES})",
    )
    parser.add_argument(
        "--not-in",
        action="append",
        default=[],
        metavar="PATH",
        help="data of thresholds or tests: no calibration image may be in it; repeatable",
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Calibrate, quantise, show, write.

    Raises:
        CalibrationError: The data is too little, noise, or used elsewhere.
        ConfigError: The options don't fit, or the kept ranges are of something else.
        EngineBuildError: A stage can't be quantised.
    """
    if args.source.is_file():
        return _quantize_file(args, console)
    bundle = Bundle.open(args.source)
    check_target(args.out, overwrite=args.overwrite)
    chain = parts.bundle_parts(bundle, args.stages, PRECISION)
    images = _images(args, bundle)
    samples = _Samples(
        lambda: ({bundle.cascade.image.name: b} for b, _ in images.batches(parts.BATCH_SIZE)),
        len(images),
        {"bundle": bundle.hash, "data": images.hash},
    )
    work = _work(chain, samples, args, console)
    new = with_variants(
        bundle,
        {stage: {PRECISION: made.model} for stage, made in work.made.items()},
        args.out,
        provenance=work.provenance(args),
        overwrite=args.overwrite,
    )
    console.line(f"bundle  {new.path}")
    console.line(f"hash    {new.hash}")
    console.line(f"points  {', '.join(bundle.operating_points()) or 'none'} (they run FP32)")
    console.line(f"Which stages shall run in INT8: edge-runtime precision {new.path} --data DIR")
    return {"bundle": str(new.path), "hash": new.hash, "made_of": bundle.hash, **work.result()}


@dataclass(frozen=True)
class _Samples:
    """What is calibrated on: batches, how many samples, and their provenance."""

    batches: Any
    size: int
    origin: Mapping[str, Any]


@dataclass(frozen=True)
class _Work:
    """The ranges, and what each stage became."""

    ranges: Ranges
    made: Mapping[str, Quantized]
    float_bytes: Mapping[str, int]

    def result(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "precision": PRECISION,
            "method": self.ranges.method,
            "calibrated_on": dict(self.ranges.chosen_on),
            "stages": {
                stage: {
                    "quantized": list(made.quantized),
                    "left": dict(made.left),
                    "left_by_reason": dict(Counter(made.left.values())),
                    "bytes": len(made.model),
                    "fp32_bytes": self.float_bytes[stage],
                    "ranges": dict(self.ranges.stages[stage]),
                }
                for stage, made in self.made.items()
            },
        }

    def provenance(self, args: argparse.Namespace) -> dict[str, Any]:
        """What the new bundle keeps of it."""
        return {
            "made_by": "calib.quantize_command",
            "precision": PRECISION,
            "method": self.ranges.method,
            "calibrated_on": dict(self.ranges.chosen_on),
            "exclude_nodes": args.exclude_nodes,
            "per_tensor": args.per_tensor,
            "versions": {
                name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime")
            },
            "stages": {
                stage: {"quantized": len(made.quantized), "left": len(made.left)}
                for stage, made in self.made.items()
            },
        }


def _images(args: argparse.Namespace, bundle: Bundle) -> ImageDataset:
    """The calibration images, which nothing else was or will be chosen or measured on."""
    data = options.open_data(args, bundle, skip_unreadable=True)
    for name in bundle.operating_points():
        used = bundle.operating_point(name).chosen_on.get("data")
        if used == data.hash:
            raise CalibrationError(
                f"these are the images that the thresholds of {name!r} were chosen on",
                remedy="Calibrate on training data, or choose other parts with --part",
            )
    height, width, channels = data.image_shape
    others = [
        (
            path,
            ImageDataset.open(
                path, bundle.cascade.classes, image_size=(height, width), channels=channels
            ),
        )
        for path in args.not_in
    ]
    return choose_images(data, samples=args.samples, seed=args.seed, used=others)


def _work(
    chain: Sequence[Part], samples: _Samples, args: argparse.Namespace, console: Console
) -> _Work:
    settings = QuantizeOptions(per_channel=not args.per_tensor, exclude=args.exclude_nodes)
    wanted: dict[str, tuple[str, ...]] = {}
    for part in chain:
        if part.chosen:
            with parts.naming(part):
                wanted[part.stage] = activations(part.model, settings)
    if not any(wanted.values()):
        raise EngineBuildError(
            "there is nothing to quantise",
            got=", ".join(wanted),
            expected="Conv, ConvTranspose, Gemm or MatMul with constant weights",
        )
    ranges = _ranges(chain, samples, wanted, args, console)
    made, sizes = {}, {}
    for part in chain:
        if wanted.get(part.stage):
            with parts.naming(part):
                made[part.stage] = quantize(part.model, ranges.stages[part.stage], settings)
            sizes[part.stage] = len(part.model)
    work = _Work(ranges, made, sizes)
    _show(work, [stage for stage, names in wanted.items() if not names], console)
    return work


def _ranges(
    chain: Sequence[Part],
    samples: _Samples,
    wanted: Mapping[str, tuple[str, ...]],
    args: argparse.Namespace,
    console: Console,
) -> Ranges:
    """Ranges from the file that keeps them, else from the data."""
    names = "\n".join(f"{stage}/{name}" for stage, found in wanted.items() for name in found)
    origin = {
        **samples.origin,
        "samples": samples.size,
        "seed": args.seed,
        "tensors": hashlib.sha256(names.encode()).hexdigest(),
    }
    if args.ranges is not None and args.ranges.exists():
        console.note(f"ranges from {args.ranges}")
        return Ranges.read(args.ranges, origin, args.method)
    steps = -(-samples.size // parts.BATCH_SIZE)
    batches: Iterable[Arrays] = console.progress(samples.batches(), "calibrating", steps)
    found = ranges_of(histograms(chain, batches, wanted), args.method, origin)
    if args.ranges is not None:
        found.write(args.ranges)
        console.note(f"wrote {args.ranges}")
    return found


def _show(work: _Work, nothing: Sequence[str], console: Console) -> None:
    console.table(
        f"Stages in {PRECISION}, ranges by {work.ranges.method} from "
        f"{work.ranges.chosen_on['samples']} samples",
        ("stage", "nodes quantised", "left float", "kB", "of FP32"),
        [
            (
                stage,
                len(made.quantized),
                ", ".join(f"{n} {why}" for why, n in Counter(made.left.values()).items()) or "-",
                f"{len(made.model) / 1e3:.1f}",
                percent(len(made.model) / work.float_bytes[stage]),
            )
            for stage, made in work.made.items()
        ],
    )
    if nothing:
        console.line(f"nothing to quantise in: {', '.join(nothing)}")


def _quantize_file(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The same for one ONNX file."""
    if args.stages is not None or args.not_in or args.part:
        raise ConfigError("--stages, --not-in and --part are for bundles", got=str(args.source))
    parts.check_file(args.source, args.out, overwrite=args.overwrite)
    part, inputs, _ = parts.file_part(args.source)
    data = parts.open_samples(args, inputs, None)
    if data.size < LEAST_SAMPLES:
        raise CalibrationError(
            "samples for INT8 calibration", got=data.size, expected=f">= {LEAST_SAMPLES}"
        )
    for values in next(iter(data.batches())).values():
        if values.ndim == 4:
            refuse_noise(values)
    digest = sha256(args.source.read_bytes())
    origin = {"model": digest, "data": dict(data.data or {}).get("hash")}
    work = _work([part], _Samples(data.batches, data.size, origin), args, console)
    (made,) = work.made.values()
    parts.write_file(args.out, made.model)
    console.line(f"wrote   {args.out}")
    return {
        "file": str(args.out),
        "sha256": sha256(made.model),
        "made_of": digest,
        **work.result(),
    }
