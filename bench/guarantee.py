"""How often a guarantee is broken: calibrate on random parts of a table, look at all the rest.

Each draw takes some samples, certifies thresholds on them, and counts as broken where the drop of
accuracy on the samples that were not drawn is larger than promised. What was drawn is missing from
the rest, and a lucky draw leaves an unlucky rest: the smaller the part, the nearer the rest is to
the population that the promise is about. Thresholds that lose nothing on the drawn samples, which
promise nothing, stand beside. Costs are multiply-accumulate operations.

    edge-runtime collect BUNDLE --data DIR --out T.npz
    python -m bench.guarantee BUNDLE --logits T.npz T2.npz --samples 500 1000
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.exit_table import CostModel, ExitTable
from calib.guarantee import Promise, certify
from calib.model_table import ModelTable
from calib.tables import JudgedTable, PredictionTable, judge
from calib.thresholds import ByExit, ZeroLoss, choose
from edge_runtime import device, options
from edge_runtime.cli import run_command
from edge_runtime.confidence import METRICS
from edge_runtime.console import Console, percent
from edge_runtime.dataset import parse_size
from edge_runtime.errors import ConfigError
from edge_runtime.manifest import Bundle
from engines.macs import stage_macs


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``python -m bench.guarantee``."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder of the bundle")
    parser.add_argument(
        "--logits", nargs="+", required=True, metavar="T.npz", help="tables of its exits"
    )
    parser.add_argument("--image-size", metavar="HEIGHTxWIDTH", help="size of the camera")
    parser.add_argument("--metric", choices=METRICS, default="max_softmax")
    parser.add_argument(
        "--samples", nargs="+", type=options.count, default=[500, 1000], help="drawn each time"
    )
    parser.add_argument("--epsilon", nargs="+", type=float, default=[0.01, 0.02])
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--draws", type=options.count, default=1000)
    parser.add_argument("--seed", type=options.whole, default=0)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Draw, certify, count, show.

    Raises:
        ConfigError: The tables are not of this bundle's exits, or too small.
    """
    bundle = Bundle.open(args.bundle)
    judged = _judged(bundle, [ModelTable.open(path) for path in args.logits], args)
    size = parse_size(args.image_size) if args.image_size else None
    macs = stage_macs(bundle, size)
    costs = CostModel.from_stages(
        bundle.cascade, {name: float(count) for name, count in macs.items()}
    )
    total = len(judged.truth)
    if max(args.samples) >= total:
        raise ConfigError("--samples", got=max(args.samples), expected=f"fewer than {total}")
    cases = [(n, epsilon) for n in args.samples for epsilon in args.epsilon]
    found = []
    for n, epsilon in cases:
        promise = Promise(epsilon, args.delta)
        draws = console.progress(range(args.draws), f"{n} samples, epsilon {epsilon:g}")
        found.append(_case(judged, costs, promise, n, draws, args.seed))
    console.table(
        f"{total} images, {args.draws} draws, delta {args.delta:g}: broken on the rest",
        ("drawn", "epsilon", "certified", "broken", "saves", "zero loss: broken", "saves"),
        [
            (
                n,
                f"{epsilon:g}",
                *(percent(one[name]) for name in ("certified", "broken", "saved")),
                *(percent(one[name]) for name in ("zero_loss_broken", "zero_loss_saved")),
            )
            for (n, epsilon), one in zip(cases, found, strict=True)
        ],
    )
    return {
        "bundle": bundle.hash,
        "tables": args.logits,
        "draws": args.draws,
        "delta": args.delta,
        "cases": [
            {"samples": n, "epsilon": epsilon, **one}
            for (n, epsilon), one in zip(cases, found, strict=True)
        ],
        "device": device.fingerprint(),
    }


def _judged(bundle: Bundle, tables: Sequence[ModelTable], args: argparse.Namespace) -> JudgedTable:
    """What the exits say about all samples of all tables."""
    names = [exit_.name for exit_ in bundle.cascade.exits]
    for table in tables:
        missing = [name for name in names if name not in table.with_logits]
        if missing:
            raise ConfigError(
                f"table {Path(table.path)} has no logits of {', '.join(missing)}",
                remedy=f"Make it with: edge-runtime collect {bundle.path} --data DIR --out T.npz",
            )
    logits = {
        name: np.concatenate([block for table in tables for block in table.logits(name)])
        for name in names
    }
    labels = np.concatenate([table.labels for table in tables])
    return judge(PredictionTable(bundle.cascade, logits, labels), args.metric)


def _case(
    judged: JudgedTable,
    costs: CostModel,
    promise: Promise,
    samples: int,
    draws: Any,
    seed: int,
) -> dict[str, float]:
    """Shares of draws, and mean savings."""
    everything, total = judged.exit_table, len(judged.truth)
    rows = []
    for draw in draws:
        order = np.random.default_rng([seed, draw]).permutation(total)
        drawn, rest = order[:samples], order[samples:]
        part = ExitTable(everything.signals[drawn], everything.correct[drawn], everything.bounds)
        certificate = certify(part, costs, promise, seed=draw)
        plain = choose(part, costs, ZeroLoss(), repeats=0)
        rows.append(
            (
                certificate.certified,
                _drop(judged, certificate, rest) > promise.epsilon,
                _saved(certificate),
                _drop(judged, plain, rest) > promise.epsilon,
                _saved(plain),
            )
        )
    names = ("certified", "broken", "saved", "zero_loss_broken", "zero_loss_saved")
    means = np.mean(np.array(rows, np.float64), axis=0)
    return dict(zip(names, means.tolist(), strict=True))


def _drop(judged: JudgedTable, choice: ByExit, rest: NDArray[np.intp]) -> float:
    """Accuracy lost on samples against the last exit alone."""
    at = judged.exit_table.leave_at(choice.point.thresholds)[rest]
    correct = judged.correct[rest]
    return float(correct[:, -1].mean() - correct[np.arange(len(rest)), at].mean())


def _saved(choice: ByExit) -> float:
    return 1 - choice.point.cost / choice.base.cost


if __name__ == "__main__":
    sys.exit(run_command("python -m bench.guarantee", sys.modules[__name__], sys.argv[1:]))
