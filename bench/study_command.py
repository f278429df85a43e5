"""Study a bundle of an early-exit model on this device.

profile     what a layer costs without an exit and with each kind of neck
thresholds  accuracy, exits and speed-up at one threshold for all exits, told and measured
classes     accuracy, time and exits of each class, and pictures of those at both ends

Each prints tables; with --out it also writes JSON, CSV and pictures. Ctrl-C ends a measurement
early: what was measured until then is shown and written.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import shlex
from typing import Any

from bench.studies.files import open_folder, write_study
from edge_runtime import device, options
from edge_runtime.confidence import METRICS
from edge_runtime.console import Console
from edge_runtime.errors import ConfigError
from edge_runtime.manifest import Bundle

#: Options by the study that has them.
_OWN = {
    "profile": ("rounds", "warmup"),
    "thresholds": ("thresholds", "metric", "timed"),
    "classes": ("operating_point", "threshold", "metric", "samples"),
}
#: Those that say nothing of what is studied.
_NOT_SHOWN = ("kind", "bundle", "json", "verbose")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime study``."""
    parser.add_argument("kind", choices=tuple(_OWN))
    options.add_bundle(parser)
    options.add_data(parser, without="a profile takes noise")
    parser.add_argument(
        "--out", metavar="DIR", help="folder for JSON, CSV and pictures (default: none are written)"
    )
    group = parser.add_argument_group("profile")
    group.add_argument("--rounds", type=options.count, help="rounds that count (default 200)")
    group.add_argument("--warmup", type=options.whole, help="rounds before them (default 200)")
    group = parser.add_argument_group("thresholds")
    group.add_argument(
        "--thresholds", metavar="T[,T..]", help="ascending numbers (default 0.8,0.9,0.99)"
    )
    group.add_argument(
        "--timed", type=options.count, metavar="N", help="images that are timed (default 1000)"
    )
    group.add_argument(
        "--metric", choices=METRICS, help="the signal (default max_softmax); for classes too"
    )
    group = parser.add_argument_group("classes")
    group.add_argument(
        "--operating-point",
        metavar="NAME",
        help="a point of the bundle, or a .json file (default: zero_loss)",
    )
    group.add_argument(
        "--threshold", type=_finite, metavar="T", help="instead, one threshold at all exits"
    )
    group.add_argument(
        "--samples", type=options.count, metavar="N", help="pictures per class (default 15)"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Do a study, show it, write it.

    Raises:
        ConfigError: An option is of another study, or does not fit the bundle or the data.
        ManifestError: The bundle is not whole, or describes its layers wrongly.
        BackendUnavailable: A package is missing.
        KeyboardInterrupt: It was stopped early; what was measured has been written.
    """
    _check(args)
    bundle = Bundle.open(args.bundle)
    folder = open_folder(args.out)
    result = importlib.import_module(f"bench.studies.{args.kind}").run(args, bundle, console)
    stamp = {
        "study": args.kind,
        "command": _command(args),
        "bundle": bundle.hash,
        "bundle_name": bundle.manifest.name,
        "backend": args.backend,
        "environment": {**device.fingerprint(), "load_average": os.getloadavg()},
    }
    found: dict[str, Any] = {**stamp, **result.found}
    if folder is not None:
        files = write_study(
            folder, args.kind, result.with_stamp(stamp), lambda path: console.note(f"wrote {path}")
        )
        found["files"] = [str(file) for file in files]
    if result.interrupted:
        console.finish(found)
        raise KeyboardInterrupt
    return found


def _check(args: argparse.Namespace) -> None:
    """Refuse options of another study, and studies without what they need."""
    own = _OWN[args.kind]
    for name in {option for options_ in _OWN.values() for option in options_} - set(own):
        if getattr(args, name) is not None:
            whose = " and ".join(kind for kind, options_ in _OWN.items() if name in options_)
            raise ConfigError(f"--{name.replace('_', '-')} is an option of study {whose}")
    if args.data is None:
        if args.kind != "profile":
            raise ConfigError(f"study {args.kind} needs labelled images", remedy="Give --data PATH")
        if args.part is not None:
            raise ConfigError("--part says nothing without --data")


def _command(args: argparse.Namespace) -> str:
    """The call, with every option that was given."""
    words = ["edge-runtime", "study", args.kind, args.bundle]
    for name, value in sorted(vars(args).items()):
        if name not in _NOT_SHOWN and value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _finite(text: str) -> float:
    """The type of an option that is a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number")
    return value
