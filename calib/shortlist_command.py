"""Candidate models from public results: which single models are worth it, which savers might be.

Reads CSVs in the format of timm's results: accuracies (model, img_size, top1) and a benchmark
(model, infer_img_size, infer_samples_per_sec, infer_gmacs). Shows the Pareto front of single
models, and per base the cheaper models on it, with the share of samples that would have to leave
so that they pay off. What really leaves without a loss only predictions tell: collect those of the
candidates, and ask `edge-runtime savers`.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from calib.shortlist import PublicModel, PublicSaver, Shortlist, read_shortlist
from edge_runtime import options
from edge_runtime.console import Console, percent

#: Savers of a base that are printed where there are several bases; JSON has all.
_SHOWN = 3


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime shortlist``."""
    parser.add_argument("--accuracy", required=True, metavar="RESULTS.csv", help="accuracies")
    parser.add_argument("--costs", required=True, metavar="BENCHMARK.csv", help="costs")
    parser.add_argument(
        "--base",
        metavar="NAME[,NAME..]",
        help="models to save, with @SIZE where there are several (default: all on the front)",
    )
    parser.add_argument(
        "--accuracy-column", default="top1", metavar="NAME", help="in percent (default top1)"
    )
    parser.add_argument(
        "--cost-column",
        default="infer_samples_per_sec",
        metavar="NAME",
        help="samples per second become seconds, GMACs MACs (default infer_samples_per_sec)",
    )
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max-cost", type=options.positive, metavar="COST", help="in seconds or MACs per sample"
    )
    group.add_argument("--max-image-size", type=options.count, metavar="PIXELS")
    group.add_argument(
        "--max-params", type=options.positive, metavar="M", help="in millions of parameters"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Read, join, show."""
    found = read_shortlist(
        args.accuracy,
        args.costs,
        accuracy_column=args.accuracy_column,
        cost_column=args.cost_column,
        max_cost=args.max_cost or math.inf,
        max_image_size=args.max_image_size or math.inf,
        max_params=args.max_params or math.inf,
    )
    front = found.front()
    bases = list(front)
    if args.base is not None:
        bases = list(dict.fromkeys(found.find(name.strip()) for name in args.base.split(",")))
    savers = {base: found.savers(base) for base in bases}
    _show(found, front, savers, console, whole=args.base is not None)
    return {
        "accuracy": args.accuracy,
        "accuracy_column": args.accuracy_column,
        "costs": args.costs,
        "cost_column": args.cost_column,
        "unit": found.unit,
        "models": len(found.models),
        "dropped": found.dropped,
        "front": [_model_json(one) for one in front],
        "bases": {
            base.name: {
                **_model_json(base),
                "savers": [
                    {
                        **_model_json(one.saver),
                        "needed_exit_ratio": one.needed,
                        "possible_exit_ratio": one.possible,
                        "best_delta_c": one.best_delta,
                    }
                    for one in of_base
                ],
            }
            for base, of_base in savers.items()
        },
    }


def _model_json(one: PublicModel) -> dict[str, Any]:
    return {
        "model": one.model,
        "image_size": one.image_size,
        "accuracy": one.accuracy,
        "cost": one.cost,
    }


def _show(
    found: Shortlist,
    front: tuple[PublicModel, ...],
    savers: dict[PublicModel, tuple[PublicSaver, ...]],
    console: Console,
    *,
    whole: bool,
) -> None:
    left_out = ", ".join(f"{count} {reason}" for reason, count in found.dropped.items())
    console.facts(
        {
            "models": f"{len(found.models)} with accuracy and cost",
            "left out": left_out or "none",
            "cost": found.unit,
        }
    )
    console.table(
        f"single models that no other one beats, {len(front)} of {len(found.models)}",
        ("model", "image", "accuracy", "cost"),
        [(one.model, one.image_size, *_figures(one)) for one in front],
    )
    for base, of_base in savers.items():
        shown = of_base if whole else of_base[:_SHOWN]
        better = [one for one in front if one.cost < base.cost and one.accuracy >= base.accuracy]
        if better:
            console.line(f"{base.name} needs no saver: {better[0].name} is cheaper and as accurate")
        if not of_base:
            console.line(f"{base.name}: no saver on the front could pay off")
            continue
        console.table(
            f"candidate savers of {base.name}, {', '.join(_figures(base))}"
            + (f", {len(shown)} of {len(of_base)}" if len(shown) < len(of_base) else ""),
            ("saver", "accuracy", "cost", "needed", "possible", "best Delta C"),
            [
                (
                    one.saver.name,
                    *_figures(one.saver),
                    percent(one.needed),
                    percent(one.possible),
                    f"{one.best_delta:+.3f}",
                )
                for one in shown
            ],
        )
    if any(savers.values()):
        console.line(
            "A saver pays off if more samples than needed leave; if more than possible leave, "
            "accuracy is lost for certain."
        )


def _figures(one: PublicModel) -> tuple[str, str]:
    return f"{one.accuracy * 100:.2f} %", f"{one.cost:.4g}"
