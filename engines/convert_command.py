"""Convert the stages of a bundle, or one ONNX file, to FP16 that is typed in the graph.

With --data the FP32 stages run on the images first: what comes near the largest number of FP16
stays in FP32, and both precisions are compared, stage by stage and from image to logits. Without
it the comparison is on noise, which shows blunders and no more.

A bundle gets new variants in a new bundle with a hash of its own; its operating points come along
and still run the variants that they ran. Stages of kind "preprocess" are left as they are.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.console import Console, percent
from edge_runtime.errors import (
    ConfigError,
    EngineBuildError,
)
from edge_runtime.files import check_target, sha256
from edge_runtime.manifest import Bundle
from edge_runtime.options import count, positive
from engines.bundle import with_variants
from engines.parts import (
    SAMPLES,
    Part,
    Samples,
    bundle_parts,
    check_file,
    file_part,
    naming,
    open_samples,
    session,
    write_file,
)

if TYPE_CHECKING:
    from engines.fp16 import Converted

PRECISION = "fp16"

#: Largest relative error of a stage. Rounding to FP16 changes a number by up to 0.05 %; measured,
#: that adds up to 0.12 % over a ViT of 12 blocks and 0.05 % over a ResNet of 50 convolutions, both
#: with random weights, and to 1.4 % where small differences of large inputs are taken. An overflow
#: or a lost epsilon, which this is to catch, costs far more.
TOLERANCE = 0.02


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime convert``."""
    parser.add_argument("source", metavar="BUNDLE", type=Path, help="a bundle, or one .onnx file")
    parser.add_argument("--precision", choices=(PRECISION,), required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="the new bundle, or .onnx file, to write"
    )
    parser.add_argument(
        "--stages", metavar="A,B", help="convert these stages only (default: all but preprocess)"
    )
    parser.add_argument(
        "--tolerance",
        type=positive,
        default=TOLERANCE,
        help=f"largest relative error of a stage, of its largest output (default {TOLERANCE:g})",
    )
    parser.add_argument(
        "--overwrite", "--force", action="store_true", help="replace what is already at --out"
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="PATH",
        help="a folder of class folders, or an npz with images and labels; for a model that takes "
        "no camera images, an npz with an array named as each input",
    )
    group.add_argument(
        "--samples",
        type=count,
        default=SAMPLES,
        metavar="N",
        help=f"how many of them to use, of all classes alike (default {SAMPLES})",
    )
    group.add_argument(
        "--image-size",
        metavar="HEIGHTxWIDTH",
        help="size of the camera: images are scaled to cover it and cropped",
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Find ranges, convert, compare, show, write.

    Raises:
        ConfigError: The options don't fit the bundle or the file.
        EngineBuildError: A stage can't be converted, or differs by more than the tolerance.
        EdgeRuntimeError: The result can't be written; nothing is left behind.
    """
    if args.source.is_file():
        return _convert_file(args, console)
    bundle = Bundle.open(args.source)
    check_target(args.out, overwrite=args.overwrite)
    parts = bundle_parts(bundle, args.stages, PRECISION)
    samples = open_samples(args, [bundle.cascade.image], bundle.cascade.classes)
    exits = {exit_.name: exit_.logits for exit_ in bundle.cascade.exits}
    work = _work(parts, samples, exits, args, console)
    new = with_variants(
        bundle,
        {name: {PRECISION: converted.model} for name, converted in work.converted.items()},
        args.out,
        provenance=_provenance(work, args),
        overwrite=args.overwrite,
    )
    console.line(f"bundle  {new.path}")
    console.line(f"hash    {new.hash}")
    console.line(f"points  {', '.join(bundle.operating_points()) or 'none'} (carried over)")
    return {"bundle": str(new.path), "hash": new.hash, "made_of": bundle.hash, **work.result()}


class _Difference:
    """How far an output in FP16 is off, over all batches; NaN stays."""

    def __init__(self) -> None:
        self.absolute = self._largest = 0.0
        self._same = self._rows = 0

    def add(self, have: NDArray[Any], want: NDArray[Any]) -> None:
        with np.errstate(invalid="ignore"):  # infinities give NaN, which no tolerance accepts
            off = np.abs(have.astype(np.float64) - want.astype(np.float64)).max(initial=0.0)
        self.absolute = float(np.maximum(self.absolute, off))
        self._largest = max(self._largest, float(np.abs(want).max(initial=0.0)))

    def count_classes(self, have: NDArray[Any], want: NDArray[Any]) -> None:
        self._same += int((have.argmax(axis=-1) == want.argmax(axis=-1)).sum())
        self._rows += len(have)

    @property
    def relative(self) -> float:
        if not self._largest:
            return 0.0 if self.absolute == 0 else math.inf
        return self.absolute / self._largest

    @property
    def agreement(self) -> float:
        return self._same / self._rows


@dataclass(frozen=True)
class _Work:
    """All that was found.

    Attributes:
        samples: What it was found on.
        overflows: Stage -> tensor -> largest magnitude.
        converted: Stage -> its model in FP16.
        original_bytes: Stage -> size of its model in FP32.
        errors: Stage -> output -> difference, both precisions fed with FP32 inputs.
        exits: Exit -> difference of its logits, from the image on.
        tolerance: What errors are held to.
    """

    samples: Samples
    overflows: Mapping[str, Mapping[str, float]]
    converted: Mapping[str, Converted]
    original_bytes: Mapping[str, int]
    errors: Mapping[str, Mapping[str, _Difference]]
    exits: Mapping[str, _Difference]
    tolerance: float

    def error(self, stage: str) -> float:
        """Largest relative error of a stage's outputs; NaN where one is."""
        return float(np.max([one.relative for one in self.errors[stage].values()]))

    def result(self) -> dict[str, Any]:
        return {
            "precision": PRECISION,
            "data": self.samples.data,
            "samples": self.samples.size,
            "tolerance": self.tolerance,
            "stages": {
                stage: {
                    "kept": dict(one.kept),
                    "kept_by_reason": dict(Counter(one.kept.values())),
                    "casts": one.casts,
                    "bytes": len(one.model),
                    "fp32_bytes": self.original_bytes[stage],
                    "overflows": {
                        tensor: top if math.isfinite(top) else str(top)
                        for tensor, top in self.overflows.get(stage, {}).items()
                    },
                    "relative_error": self.error(stage),
                }
                for stage, one in self.converted.items()
            },
            "exits": {
                name: {
                    "same_class": one.agreement,
                    "largest_logit_difference": one.absolute,
                    "relative_error": one.relative,
                }
                for name, one in self.exits.items()
            },
        }


def _work(
    parts: Sequence[Part],
    samples: Samples,
    exits: Mapping[str, str],
    args: argparse.Namespace,
    console: Console,
) -> _Work:
    """Convert and compare; shows what was found before it judges it."""
    overflows = {} if samples.data is None else _ranges(parts, samples, console)
    chosen = [part for part in parts if part.chosen]
    converted = {
        part.stage: _converted(part, overflows.get(part.stage, {}))
        for part in console.progress(chosen, "converting")
    }
    errors, ends = _compare(parts, converted, samples, exits, console)
    sizes = {part.stage: len(part.model) for part in chosen}
    work = _Work(samples, overflows, converted, sizes, errors, ends, args.tolerance)
    _show(work, console)
    for part in chosen:
        if not work.error(part.stage) <= args.tolerance:
            raise _too_far(part, work)
    return work


def _ranges(
    parts: Sequence[Part], samples: Samples, console: Console
) -> dict[str, dict[str, float]]:
    """Stage -> tensors beyond FP16, from one pass of the data through the FP32 chain."""
    from engines.fp16_ranges import RangeFinder

    finders = {}
    for part in parts:
        if part.chosen:
            with naming(part):
                finders[part.stage] = RangeFinder(part.model)
    runs = {
        part.stage: finders[part.stage].run if part.chosen else session(part, part.model)
        for part in parts
    }
    for batch in samples.progress(console, "looking for values beyond FP16"):
        known = dict(batch)
        for part in parts:
            with naming(part):
                known |= part.apply(runs[part.stage], known)
    return {stage: finder.overflows() for stage, finder in finders.items()}


def _converted(part: Part, overflows: Mapping[str, float]) -> Converted:
    from engines.fp16 import convert
    from engines.fp16_ranges import nodes_to_keep

    with naming(part):
        return convert(part.model, keep=nodes_to_keep(part.model, overflows))


def _compare(
    parts: Sequence[Part],
    converted: Mapping[str, Converted],
    samples: Samples,
    exits: Mapping[str, str],
    console: Console,
) -> tuple[dict[str, dict[str, _Difference]], dict[str, _Difference]]:
    """Each stage fed with FP32 inputs, and the chain from end to end."""
    from engines.fp16_emulation import emulated

    full = {part.stage: session(part, part.model) for part in parts}
    half = full | {
        part.stage: session(part, emulated(converted[part.stage].model))
        for part in parts
        if part.chosen
    }
    errors = {p.stage: {name: _Difference() for name in p.outputs} for p in parts if p.chosen}
    ends = {name: _Difference() for name in exits}
    for batch in samples.progress(console, "comparing FP16 with FP32"):
        want, have = dict(batch), dict(batch)
        for part in parts:
            want |= part.apply(full[part.stage], want)
            chained = part.apply(half[part.stage], have)
            have |= chained
            if part.chosen:
                # The first stages are fed the same either way.
                same = all(have[name] is want[name] for name in part.inputs)
                alone = chained if same else part.apply(half[part.stage], want)
                for name, difference in errors[part.stage].items():
                    difference.add(alone[name], want[name])
        for name, logits in exits.items():
            ends[name].add(have[logits], want[logits])
            ends[name].count_classes(have[logits], want[logits])
    return errors, ends


def _too_far(part: Part, work: _Work) -> EngineBuildError:
    name, worst = next(
        (name, one)
        for name, one in work.errors[part.stage].items()
        if not one.relative <= work.tolerance
    )
    remedy = "Where the classes agree all the same, raise --tolerance"
    if work.samples.data is None:
        remedy = "Give --data: values beyond FP16 are found on it and stay in FP32"
    elif part.name != part.stage:
        remedy = f"Leave it in FP32 by naming the other stages with --stages. {remedy}"
    return EngineBuildError(
        f"{part.name} in {PRECISION}: relative error of its output {name!r}",
        got=f"{worst.relative:.3g}",
        expected=f"<= {work.tolerance:g}",
        remedy=remedy,
    )


def _show(work: _Work, console: Console) -> None:
    console.table(
        f"Stages in {PRECISION}",
        ("stage", "kept in FP32", "casts", "kB", "of FP32", "relative error"),
        [
            (
                stage,
                ", ".join(f"{n} {why}" for why, n in Counter(one.kept.values()).items()) or "-",
                one.casts,
                f"{len(one.model) / 1e3:.1f}",
                percent(len(one.model) / work.original_bytes[stage]),
                f"{work.error(stage):.1e}",
            )
            for stage, one in work.converted.items()
        ],
    )
    if work.exits:
        console.table(
            "From the input to the logits, FP16 against FP32",
            ("exit", "same class", "largest logit difference", "relative"),
            [
                (name, f"{one.agreement:.2%}", f"{one.absolute:.2g}", f"{one.relative:.1e}")
                for name, one in work.exits.items()
            ],
        )
    if work.samples.data is None:
        console.line(
            f"NOT CHECKED ON DATA: the figures are of {work.samples.size} samples of noise, and "
            "nobody looked for values beyond FP16. Give --data."
        )
    else:
        console.line(f"ranges and figures are of {work.samples.size} samples of the data")


def _provenance(work: _Work, args: argparse.Namespace) -> dict[str, Any]:
    stages = {
        stage: {
            "kept_by_reason": found["kept_by_reason"],
            "casts": found["casts"],
            "relative_error": found["relative_error"],
        }
        for stage, found in work.result()["stages"].items()
    }
    return {
        "made_by": "engines.convert_command",
        "precision": PRECISION,
        "versions": {p: importlib.metadata.version(p) for p in ("onnx", "onnxruntime")},
        "data": work.samples.data,
        "samples": work.samples.size,
        "tolerance": args.tolerance,
        "stages": stages,
        "exits": work.result()["exits"],
    }


def _convert_file(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The same for one ONNX file."""
    if args.stages is not None:
        raise ConfigError("--stages is for bundles", got=str(args.source))
    check_file(args.source, args.out, overwrite=args.overwrite)
    part, inputs, logits = file_part(args.source)
    work = _work([part], open_samples(args, inputs, None), logits, args, console)
    (converted,) = work.converted.values()
    write_file(args.out, converted.model)
    console.line(f"wrote   {args.out}")
    return {
        "file": str(args.out),
        "sha256": sha256(converted.model),
        "made_of": sha256(args.source.read_bytes()),
        **work.result(),
    }
