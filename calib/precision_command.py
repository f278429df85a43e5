"""Decide which stages of a bundle run at another precision, and write the operating point.

Every stage is timed at both precisions in turn, and its effect on every exit is measured on
labelled data. Stages whose variant is not clearly faster on this device keep the precision that
they have. With the others at the new precision, thresholds are chosen anew: rounding moves the
signals, so the old ones would let other samples leave. While the cascade loses more accuracy than
the budget allows, stages go back one by one. Where a stage loses much, --layers finds the layers
that do it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from calib.precision_plot import plot
from calib.precision_report import layer_advice, show, verdict
from calib.precision_work import Work, measure_and_choose
from calib.thresholds import pays
from edge_runtime import device, options
from edge_runtime.confidence import METRICS
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import ConfigError
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.schema import plain
from engines.plot_file import check_plot

_PRECISIONS = ("int8", "fp16")
#: Which variants are chosen, without and with --at-any-speed.
_THAT = ("that are clearly faster here", "of any speed")
_FP16_ON_CPU = (
    "ONNX Runtime's CPU provider computes FP16 graphs in FP32, so these figures are not "
    "an FP16 device's: choose on the device; `edge-runtime convert` tells how far FP16 rounds."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime precision``."""
    options.add_bundle(parser)
    options.add_data(parser)
    parser.add_argument("--precision", choices=_PRECISIONS, default="int8")
    parser.add_argument("--stages", metavar="A,B", help="consider these stages only (default: all)")
    parser.add_argument(
        "--layers",
        metavar="A,B",
        help="also look at single layers of the INT8 variants of these stages, or of all: each is "
        "run on all the data",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="accuracy that the cascade may lose by it, in percentage points (default 1)",
    )
    parser.add_argument(
        "--goal-drop",
        type=float,
        metavar="POINTS",
        help="thresholds may lose this much accuracy against the last exit alone (default 0, or "
        "what the operating point was chosen for)",
    )
    parser.add_argument(
        "--operating-point",
        metavar="NAME",
        help="compare with this point of the bundle (default: one is chosen on the data)",
    )
    parser.add_argument(
        "--at-any-speed",
        action="store_true",
        help="choose by accuracy alone: for a device that is not this one",
    )
    parser.add_argument("--metric", choices=METRICS, help="the signal (default max_softmax)")
    parser.add_argument(
        "--name", help="name of the operating point to write (default: the precision)"
    )
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw signals and exit rates")
    parser.add_argument(
        "--folds", type=options.count, default=5, help="folds of the cross-validation"
    )
    parser.add_argument("--repeats", type=options.whole, default=10, help="times it is repeated")
    parser.add_argument("--dry-run", action="store_true", help="show the choice, write no point")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Time, collect, choose, compare, show, write.

    Raises:
        ConfigError: The options don't fit the bundle, or it has no such variants.
        CalibrationError: There is too little data.
        BackendUnavailable: A package is missing.
    """
    name = args.name or args.precision
    OperatingPoint(name=name)  # refuses a name that is none, before anything long begins
    check_plot(args.plot)
    if not args.budget >= 0:
        raise ConfigError("--budget", got=args.budget, expected="points >= 0")
    bundle = Bundle.open(args.bundle)
    data = options.open_data(args, bundle)
    work = measure_and_choose(args, bundle, data, console)
    show(work, bundle, console)
    point = _point(name, work, args, bundle, data) if work.found.variants else None
    lines = verdict(work, bundle)
    if (args.precision, args.backend) == ("fp16", "onnxrt"):
        lines.append(_FP16_ON_CPU)
    advice = [] if work.layers is None else layer_advice(work.layers)
    for line in (*lines, *advice):
        console.line(line)
    files = []
    if args.plot is not None:
        plot(args.plot, work)
        files.append(args.plot)
    if point is not None and not args.dry_run:
        files.append(bundle.write_operating_point(point))
    for file in files:
        console.note(f"wrote {file}")
    if point is not None and not args.dry_run:
        console.line(
            "Evaluate it on images that nothing was chosen on: "
            f"edge-runtime evaluate {bundle.path} --operating-point {name} --data OTHER"
        )
    return {
        "bundle": bundle.hash,
        "data": data.hash,
        "precision": args.precision,
        "times": plain(work.times),
        "effects": plain(work.effects),
        "layers": None if work.layers is None else {**plain(work.layers), "advice": advice},
        "variants": dict(work.found.variants),
        "left": dict(work.found.left),
        "budget": work.found.budget,
        "goal": str(work.goal),
        "before": {"operating_point": plain(work.start), **work.found.before.plain()},
        "old_thresholds": work.found.forgotten.plain(),
        "after": work.found.after.plain(),
        "rival": None if work.found.rival is None else work.found.rival.plain(),
        "loss": {"value": work.found.loss, "interval": list(work.found.interval)},
        "measured_time_ratios": plain(work.measured),
        "verdict": lines,
        "operating_point": plain(point),
        "files": [str(file) for file in files],
        "device": device.fingerprint(),
    }


def _point(
    name: str, work: Work, args: argparse.Namespace, bundle: Bundle, data: ImageDataset
) -> OperatingPoint:
    """The point to write."""
    found, start = work.found, work.start
    choice = found.choice
    assert choice is not None
    judged = pays(choice)
    return OperatingPoint(
        name=name,
        policy="never" if choice.base_alone else "threshold",
        metric=start.metric,
        thresholds=choice.thresholds,
        temperatures=start.temperatures,
        variants={**start.variants, **found.variants},
        bundle=bundle.hash,
        chosen_on={
            "goal": str(work.goal),
            "method": f"variants {_THAT[args.at_any_speed]}, as {args.precision}, within "
            f"{args.budget:g} points of {start.name!r}; thresholds chosen anew",
            "budget": found.budget,
            "left": dict(found.left),
            "data": data.hash,
            "samples": len(data),
            "part": args.part,
            "seed": args.seed,
            "backend": args.backend,
            "stage_seconds": work.times.stage_seconds(found.variants),
            "decide_seconds": work.times.decide_s,
            "frame_seconds": work.times.frame_s,
            "stage_time_ratios": plain(work.times.ratios),
            "device": device.fingerprint(),
        },
        expected={
            "cross_validation": plain(choice.cross_validation),
            "in_sample": choice.in_sample,
            "pays": judged.pays,
            "before": {"operating_point": start.name, **found.before.plain()},
            "old_thresholds": found.forgotten.plain(),
            "loss": {"value": found.loss, "interval": list(found.interval)},
            "measured_time_ratios": plain(work.measured),
        },
    )
