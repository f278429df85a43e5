"""Find the best cascades of two or three models in a table of their predictions.

All pairs, and with --models 3 all triples, are tried at all thresholds; no model is run or trained.
What comes out is the front of accuracy against mean cost, by which factor it is cheaper than single
models of equal accuracy, and operating points. The table is an npz: labels (N,), and per model its
logits (N, K) under its name, or <model>.pred (N,) and <model>.conf (N,). The costs are a CSV with
the columns model and cost, or others.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from calib.cascade_search.exits import ENSEMBLES
from calib.cascade_search.methods import COMPARED, Method
from calib.cascade_search.plot import plot_comparison, plot_outcome
from calib.cascade_search.report import (
    models_json,
    outcome_json,
    show_comparison,
    show_outcome,
    show_peaks,
)
from calib.cascade_search.signals import METRICS
from calib.cascade_search.study import Settings, Study
from calib.model_costs import add_costs, costs_of, read_costs
from calib.model_table import ModelTable
from edge_runtime import options
from edge_runtime.console import Console
from edge_runtime.errors import ConfigError
from engines.plot_file import check_plot

#: Times a search is repeated for its cross-validation by default, by the longest cascade.
_REPEATS = {2: 10, 3: 1}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime search``."""
    parser.add_argument("--logits", required=True, metavar="T.npz", help="the table")
    add_costs(parser)
    parser.add_argument(
        "--shift", metavar="T2.npz", help="a table of other samples, to evaluate what was found"
    )
    group = parser.add_argument_group("search")
    group.add_argument(
        "--models", type=int, choices=(2, 3), default=2, help="length of the longest cascades"
    )
    group.add_argument("--metric", choices=METRICS, help="the signal (default max_softmax)")
    group.add_argument(
        "--ensemble", choices=ENSEMBLES, help="how an exit uses the models before it (default none)"
    )
    group.add_argument(
        "--temperature", action="store_true", help="scale logits by a temperature per model"
    )
    group.add_argument(
        "--compare-methods",
        action="store_true",
        help="the twelve methods of the paper, instead of one metric and ensemble",
    )
    group.add_argument(
        "--top", type=int, choices=(1, 5), default=1, help="right is a label among the top 1 or 5"
    )
    group.add_argument(
        "--stride",
        type=options.count,
        default=10,
        metavar="S",
        help="of three models, try every S-th value as first threshold (default 10; 1 is exact)",
    )
    group = parser.add_argument_group("results")
    group.add_argument(
        "--budget",
        type=options.positive,
        action="append",
        default=[],
        metavar="COST",
        help="also the most accurate point of this mean cost; repeatable",
    )
    group.add_argument(
        "--range",
        type=float,
        nargs=2,
        action="append",
        default=[],
        metavar=("FROM", "TO"),
        help="also the mean improvement over this range of accuracy, in percent; repeatable",
    )
    group.add_argument(
        "--folds", type=options.count, default=5, help="folds of the cross-validation (default 5)"
    )
    group.add_argument(
        "--repeats",
        type=options.whole,
        help="times it is repeated (default 10, with --models 3 once; 0 for none)",
    )
    group.add_argument("--seed", type=options.whole, default=0, help="its seed (default 0)")
    group.add_argument("--plot", type=Path, metavar="OUT.png", help="draw fronts and improvement")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Read, search, show, draw."""
    check_plot(args.plot)
    methods = _methods(args)
    table = ModelTable.open(args.logits)
    costs = costs_of(table.names, read_costs(args.costs, args.cost_column), args.costs)
    settings = _settings(args, dict(zip(table.names, costs, strict=True)))
    shift = None if args.shift is None else ModelTable.open(args.shift)
    study = Study(table, methods, settings, console, shift)
    study.prepare()
    outcomes = [study.run(method) for method in methods]
    found = {
        "table": str(table.path),
        "table_hash": table.hash,
        "samples": len(table),
        "classes": table.classes,
        "costs": args.costs,
        "cost_column": args.cost_column,
        "longest": settings.longest,
        "stride": settings.stride if settings.longest == 3 else None,
        "top": settings.top,
        "models": models_json(outcomes[0].result.singles),
    }
    if args.compare_methods:
        show_comparison(study, outcomes, console)
        if args.plot is not None:
            plot_comparison(args.plot, outcomes)
        found["methods"] = {
            str(one.method): outcome_json(study, one, front=False) for one in outcomes
        }
    else:
        (outcome,) = outcomes
        show_outcome(study, outcome, console)
        show_peaks(outcome, console)
        if args.plot is not None:
            plot_outcome(args.plot, outcome, args.cost_column)
        found |= outcome_json(study, outcome)
    if args.plot is not None:
        console.note(f"wrote {args.plot}")
    return found


def _methods(args: argparse.Namespace) -> tuple[Method, ...]:
    if not args.compare_methods:
        return (Method(args.metric or "max_softmax", args.ensemble or "none", args.temperature),)
    for name in ("metric", "ensemble", "temperature"):
        if getattr(args, name):
            raise ConfigError(
                f"--{name} has no use beside --compare-methods, which tries all",
                remedy="Leave out one of them",
            )
    return COMPARED


def _settings(args: argparse.Namespace, costs: dict[str, float]) -> Settings:
    for low, high in args.range:
        if not 0 <= low < high <= 100:
            raise ConfigError(
                "--range", got=f"{low:g} {high:g}", expected="0 <= FROM < TO <= 100, in percent"
            )
    if args.folds < 2:
        raise ConfigError("--folds", got=args.folds, expected=">= 2")
    # Twelve searches are compared in sample, as in the paper; one is then cross-validated.
    default = 0 if args.compare_methods else _REPEATS[args.models]
    return Settings(
        costs=costs,
        top=args.top,
        longest=args.models,
        stride=args.stride,
        budgets=args.budget,
        ranges=[(low / 100, high / 100) for low, high in args.range],
        repeats=default if args.repeats is None else args.repeats,
        folds=args.folds,
        seed=args.seed,
    )
