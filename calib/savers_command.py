"""Choose the small model that saves a large one the most, from tables of predictions.

The saver runs on every sample and answers where it is sure, the base on the others. Savers are
ranked on the training table by Delta C = C_S / C_B - e, where e is the largest share of samples on
which the saver, by its confidence, is at least as accurate as the base. For the best of them
operating points follow, once with thresholds from the training table and once, as "oracle", with
the best thresholds of the test table, which nobody knows beforehand. Drops of accuracy are counted
from the base. Tables and costs are as for `edge-runtime search`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from calib.cascade_search.signals import METRICS
from calib.model_costs import add_costs, costs_of, read_costs
from calib.model_table import ModelTable
from calib.saver_crossval import Repeats
from calib.saver_study import SaverStudy
from calib.savers_plot import check_pairs, plot_pairs
from calib.savers_report import bases_json, show_bases
from edge_runtime import options
from edge_runtime.console import Console
from edge_runtime.errors import ConfigError
from engines.plot_file import check_plot

_ALL = "all"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime savers``."""
    parser.add_argument("--logits", required=True, metavar="TRAIN.npz", help="table to choose on")
    parser.add_argument("--test", required=True, metavar="TEST.npz", help="table of other samples")
    add_costs(parser)
    parser.add_argument(
        "--base",
        required=True,
        metavar="NAME[,NAME..]",
        help="models that are to be saved; all: each of the table",
    )
    parser.add_argument(
        "--metric", choices=METRICS, default="max_softmax", help="signal (default max_softmax)"
    )
    parser.add_argument(
        "--best",
        type=options.count,
        default=1,
        metavar="K",
        help="operating points of the K best savers of each base (default 1)",
    )
    group = parser.add_argument_group("results")
    group.add_argument(
        "--folds", type=options.count, default=5, help="folds of the cross-validation (default 5)"
    )
    group.add_argument(
        "--repeats",
        type=options.whole,
        default=10,
        help="times it is repeated (default 10; 0 for none)",
    )
    group.add_argument("--seed", type=options.whole, default=0, help="its seed (default 0)")
    group.add_argument(
        "--plot",
        type=Path,
        metavar="OUT.png",
        help="draw accuracy against the early-exit ratio of each pair",
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Read, rank, judge, show, draw."""
    check_plot(args.plot)
    if args.folds < 2:
        raise ConfigError("--folds", got=args.folds, expected=">= 2")
    train, test = ModelTable.open(args.logits), ModelTable.open(args.test)
    costs = costs_of(train.names, read_costs(args.costs, args.cost_column), args.costs)
    study = SaverStudy(
        train, test, dict(zip(train.names, costs, strict=True)), args.metric, console
    )
    bases = _bases(args.base, study)
    repeats = Repeats(args.repeats, args.folds, args.seed)
    study.check(bases, repeats)
    if args.plot is not None:
        check_pairs(study.pairs(bases, args.best))
    if train.hash == test.hash:
        console.note(
            "both tables hold the same numbers: what is said of the test table is in sample"
        )
    study.prepare()
    found = study.run(bases, args.best, repeats)
    show_bases(found, train, args.metric, console)
    if args.plot is not None:
        plot_pairs(args.plot, [pair for one in found for pair in one.pairs])
        console.note(f"wrote {args.plot}")
    return {
        "train": {"table": str(train.path), "table_hash": train.hash, "samples": len(train)},
        "test": {"table": str(test.path), "table_hash": test.hash, "samples": len(test)},
        "classes": train.classes,
        "costs": args.costs,
        "cost_column": args.cost_column,
        "metric": args.metric,
        "reference": "the base of each pair",
        "bases": bases_json(found, train, args.metric),
    }


def _bases(text: str, study: SaverStudy) -> list[str]:
    names = study.train.names
    if text == _ALL and _ALL not in names:
        return sorted(names, key=lambda name: -study.costs[name])
    # A name may hold commas, if it is the only one.
    given = [text] if text in names else [part.strip() for part in text.split(",")]
    if len(set(given)) < len(given):
        raise ConfigError("--base names a model twice", got=text)
    return given
