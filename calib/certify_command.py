"""Give a promise for a cascade of models in a table, as `thresholds --guarantee` does for a bundle.

The models are run in the given order, cheapest first, until one is confident enough; the last one
always answers. With confidence 1 - delta over the samples of the table, the cascade is at most
epsilon less accurate than the last model on all samples that come from where these came.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from calib.cascade_search.signals import METRICS, Signal, judge
from calib.exit_table import CostModel, ExitTable
from calib.guarantee import Promise, certify, explain
from calib.model_costs import add_costs, costs_of, read_costs
from calib.model_table import ModelTable
from calib.thresholds import ZeroLoss, choose
from edge_runtime import options
from edge_runtime.console import Console, percent
from edge_runtime.errors import ConfigError
from edge_runtime.schema import nearest, plain


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime certify``."""
    parser.add_argument("--logits", required=True, metavar="T.npz", help="the table")
    add_costs(parser)
    parser.add_argument(
        "--models", required=True, metavar="A,B[,C..]", help="the cascade, in the order of running"
    )
    parser.add_argument(
        "--metric", choices=METRICS, default="max_softmax", help="signal (default max_softmax)"
    )
    parser.add_argument(
        "--epsilon", type=float, default=0.01, help="largest drop, a fraction (default 0.01)"
    )
    parser.add_argument(
        "--delta", type=float, default=0.05, help="1 - confidence, a fraction (default 0.05)"
    )
    parser.add_argument("--seed", type=options.whole, default=0, help="its seed (default 0)")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Certify, show beside what promises nothing.

    Raises:
        ConfigError: A model is unknown or named twice, the table or the costs don't fit.
    """
    promise = Promise(args.epsilon, args.delta)
    names = args.models.split(",")
    table = ModelTable.open(args.logits)
    for name in names:
        if name not in table.names:
            raise ConfigError(
                f"table {table.path} has no model {name!r}", remedy=nearest(name, table.names)
            )
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError("--models", got=args.models, expected="two or more, each once")
    costs = read_costs(args.costs, args.cost_column)
    cost = dict(zip(table.names, costs_of(table.names, costs, args.costs), strict=True))
    signal = Signal(args.metric, scaled=False)
    judged = judge(table, [signal])
    models = judged.of(signal)
    exits = ExitTable(
        np.stack([models[name].signal for name in names[:-1]], axis=1),
        np.stack([models[name].correct for name in names], axis=1),
        judged.bounds(args.metric),
    )
    model = CostModel.from_models({name: cost[name] for name in names})
    found = certify(exits, model, promise, seed=args.seed)
    plainly = choose(exits, model, ZeroLoss(), repeats=0)
    console.table(
        f"{' -> '.join(names)} on {len(table)} samples",
        ("point", "accuracy", f"mean {args.cost_column}", "of the last model's", "leaving at"),
        [
            (
                name,
                percent(one.point.accuracy),
                f"{one.point.cost:.4g}",
                percent(one.point.cost / one.base.cost),
                ", ".join(f"{exit_} {percent(rate)}" for exit_, rate in one.exit_rates.items()),
            )
            for name, one in (("zero_loss, promises nothing", plainly), ("guaranteed", found))
        ],
    )
    text = explain(found)
    for line in text.splitlines():
        console.line(line)
    return {
        "table": str(table.path),
        "models": names,
        "metric": args.metric,
        "thresholds": found.thresholds,
        "guarantee": plain(found.record),
        "exit_rates": dict(found.exit_rates),
        "accuracy": found.point.accuracy,
        "cost": found.point.cost,
        "base_cost": found.base.cost,
        "text": text,
    }
