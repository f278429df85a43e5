"""Learned gates: at each exit leave, or go on at a chosen precision (QuEE).

fit    learn how probable it is that each path through the exits is wrong; writes a gate into the
       bundle, and an operating point that runs it
sweep  accuracy against cost for a range of lambda, beside threshold exits and fixed precisions,
       then some of them measured on this device
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from calib.quee import fit_command, sweep_command
from edge_runtime import options
from edge_runtime.console import Console
from edge_runtime.errors import ConfigError

#: Options by the kind that needs them, and those that it may have.
_NEEDS = {"fit": ("train", "val"), "sweep": ("data", "val")}
_OWN = {
    "fit": ("levels", "clusters", "hidden", "most_paths", "name", "cost", "trade_off"),
    "sweep": ("operating_point", "lambdas", "mixed", "plot", "timed"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime gate``."""
    parser.add_argument("kind", choices=tuple(_OWN))
    options.add_bundle(parser)
    group = parser.add_argument_group("data", "folders of class folders, or npz files")
    group.add_argument("--train", metavar="PATH", help="fit: what predictors are trained on")
    group.add_argument("--val", metavar="PATH", help="where targets and thresholds come from")
    group.add_argument("--data", metavar="PATH", help="sweep: the test images")
    group.add_argument(
        "--seed", type=options.whole, default=0, help="seed of everything random (default 0)"
    )
    group.add_argument("--image-size", metavar="HEIGHTxWIDTH", help="size of the camera")
    group = parser.add_argument_group("fit")
    group.add_argument(
        "--levels",
        metavar="NAME,...",
        help="precisions, the highest first; by default the paper's rule: the highest is the "
        "lowest that keeps the last exit's accuracy, lower ones follow within 5 points",
    )
    group.add_argument("--clusters", type=options.count, metavar="K", help="default 20")
    group.add_argument("--hidden", type=options.count, metavar="N", help="units (default 32)")
    group.add_argument("--most-paths", type=options.count, metavar="N", help="default 50")
    group.add_argument("--name", help="of the gate and its operating point (default gate)")
    group.add_argument("--cost", help="what the point weighs (default latency)")
    group.add_argument(
        "--trade-off", type=_lambda, metavar="LAMBDA", help="of the point (default 0.1)"
    )
    group = parser.add_argument_group("sweep")
    group.add_argument("--operating-point", metavar="NAME", help="the gate's (default gate)")
    group.add_argument("--lambdas", metavar="L[,L..]", help="values of lambda (default 20)")
    group.add_argument(
        "--mixed", metavar="NAME", help="an operating point whose stages run at their own precision"
    )
    group.add_argument("--plot", type=Path, metavar="PATH", help="a .png, .pdf or .svg")
    group.add_argument(
        "--timed", type=options.whole, metavar="N", help="images that are measured (default 1000)"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Fit a gate, or draw its curves."""
    for name in _NEEDS[args.kind]:
        if getattr(args, name) is None:
            raise ConfigError(f"gate {args.kind} needs --{name}")
    for kind, names in _OWN.items():
        for name in names:
            if kind != args.kind and getattr(args, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} is an option of gate {kind}")
    if args.kind == "fit":
        return fit_command.run(args, console)
    return sweep_command.run(args, console)


def _lambda(text: str) -> float:
    """The type of lambda: a finite number >= 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a finite number >= 0")
    return value
