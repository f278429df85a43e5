"""How long a cascade search takes: on generated tables as large as the paper's, and a naive one.

A table of 27 models, 50,000 samples and 1,000 classes (5.4 GB) is written to a temporary folder.
Signals are computed from it, then all pairs and all triples are searched. A naive search, which
tries one threshold after the other, runs beside on a few models and samples of the same table; both
must find the same front. Times are of this machine, peak memory of this process.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.cascade_search.exits import Alone, Exits
from calib.cascade_search.methods import Method, exits_of
from calib.cascade_search.search import SearchResult, cascades_of, in_order, search
from calib.cascade_search.signals import JudgedModels, judge
from calib.model_table import ModelTable
from calib.time_left import time_left
from edge_runtime import device, options
from edge_runtime.cli import run_command
from edge_runtime.console import Console
from edge_runtime.errors import ConfigError

#: Sizes of the naive search beside ours: it takes minutes on more.
_NAIVE_MODELS, _NAIVE_SAMPLES = 5, 600
#: Limits of the project for the default sizes on two cores: seconds, and bytes.
_PAIRS_S, _TRIPLES_S, _PEAK = 10.0, 20 * 60.0, 6e9

#: Correct answers and summed cost of each point of a front.
Outcomes = list[tuple[int, float]]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``python -m bench.search``."""
    parser.add_argument("--models", type=options.count, default=27, help="default 27")
    parser.add_argument("--samples", type=options.count, default=50_000, help="default 50,000")
    parser.add_argument("--classes", type=options.count, default=1000, help="default 1,000")
    parser.add_argument("--stride", type=options.count, default=10, help="of triples (default 10)")
    parser.add_argument(
        "--folder", type=Path, help="where the table is written and removed again (default: temp)"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Generate, search, compare, print."""
    if args.models < 3 or args.samples < 100 or args.classes < 2:
        raise ConfigError(
            "sizes of a benchmark",
            got=f"{args.models} models, {args.samples} samples, {args.classes} classes",
            expected=">= 3 models, 100 samples, 2 classes",
        )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "table.npz"
        _check_space(path, args)
        with time_left(console, "writing a table", args.models, "models") as done:
            write_table(path, args.models, args.samples, args.classes, done)
        seconds, fronts = _measure(ModelTable.open(path), args.stride, console)
        naive = _naive_beside(ModelTable.open(path), args.stride, console)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    _show(args, seconds, naive, peak, console)
    return {
        "models": args.models,
        "samples": args.samples,
        "classes": args.classes,
        "stride": args.stride,
        "seconds": seconds,
        "front_points": fronts,
        "naive": naive,
        "peak_bytes": peak,
        "environment": {**device.fingerprint(), "load_average": os.getloadavg()},
    }


def write_table(
    path: Path,
    models: int,
    samples: int,
    classes: int,
    written: Callable[[], None] = lambda: None,
) -> None:
    """Write a table whose models agree on what is hard, as real ones do.

    Args:
        path: The npz, written a block at a time.
        models: Number of models; the later ones are better.
        samples: N.
        classes: K.
        written: Called after each model.
    """
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, samples)
    labels[:2] = (0, 1)
    # How far the true class stands out: the largest of K noises has to be beaten.
    ease = np.sqrt(2 * np.log(classes)) + 1.2 * generator.standard_normal(samples)
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("labels.npy", "w") as stream:
            np.lib.format.write_array(stream, labels)
        for i, skill in enumerate(np.linspace(0.5, 2.5, models)):
            with archive.open(f"model{i:02}.npy", "w", force_zip64=True) as stream:
                header = {"descr": "<f4", "fortran_order": False, "shape": (samples, classes)}
                np.lib.format.write_array_header_1_0(stream, header)
                for begin in range(0, samples, 1000):
                    rows = slice(begin, min(begin + 1000, samples))
                    count = rows.stop - begin
                    # The same for all models: it can't be averaged away.
                    common = np.random.default_rng((1, begin))
                    block = 0.8 * common.standard_normal((count, classes), np.float32)
                    block += 0.6 * generator.standard_normal((count, classes), np.float32)
                    block[np.arange(count), labels[rows]] += ease[rows] + skill
                    stream.write(block.astype("<f4", copy=False).data)
            written()


def naive_search(exits: Exits, costs: Mapping[str, float], longest: int, stride: int) -> Outcomes:
    """What `search` finds, by trying one combination of thresholds after the other.

    Args:
        exits: What the exits of all cascades say; of cascades without ensembling.
        costs: Model -> cost of a sample.
        longest: As of `search`.
        stride: As of `search`.

    Returns:
        The front, by ascending accuracy and cost.
    """
    order = in_order(exits.models, costs)
    samples = len(exits.models[order[0]].correct)
    outcomes = {(int(exits.models[m].correct.sum()), samples * costs[m]) for m in order}
    for cascade in cascades_of(order, longest):
        signals = [exits.models[name].signal for name in cascade[:-1]]
        right = [exits.models[name].correct for name in cascade]
        cost = [costs[name] for name in cascade]
        first = np.unique(signals[0])[::-1]
        if len(cascade) == 3:
            first = np.unique(np.sort(signals[0])[::-1][stride - 1 :: stride])[::-1]
        for t in first:
            leaves = signals[0] >= t
            if len(cascade) == 2:
                outcomes.add(_outcome(right, cost, leaves))
                continue
            for u in np.unique(signals[1][~leaves]):
                outcomes.add(_outcome(right, cost, leaves, ~leaves & (signals[1] >= u)))
    front: Outcomes = []
    for correct, paid in sorted(outcomes, key=lambda one: (one[1], -one[0])):
        if not front or correct > front[-1][0]:
            front.append((correct, paid))
    return front


def same_front(result: SearchResult, naive: Outcomes) -> bool:
    """Whether a search has found what the naive one has, but for the last bits of costs."""
    ours = [(point.correct, point.cost * sum(point.counts)) for point in result.front]
    return len(ours) == len(naive) and bool(np.allclose(ours, naive, rtol=1e-9, atol=0))


def _outcome(
    right: list[NDArray[np.bool_]], cost: list[float], *leaves: NDArray[np.bool_]
) -> tuple[int, float]:
    """Right answers and summed cost, given which samples leave at each exit but the last."""
    staying = np.ones(len(right[0]), bool)
    correct, paid = 0, 0.0
    for k, price in enumerate(cost):
        paid += np.count_nonzero(staying) * price
        leaving = staying & leaves[k] if k < len(leaves) else staying
        correct += np.count_nonzero(right[k] & leaving)
        staying = staying & ~leaving
    return correct, paid


def _measure(
    table: ModelTable, stride: int, console: Console
) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds of each part, and points on each front."""
    costs = _costs(table)
    seconds: dict[str, float] = {}
    fronts = {}
    begin = time.perf_counter()
    with time_left(console, "computing signals", len(table.names), "models") as done:
        judged = judge(table, [Method().signal], judged=done)
    seconds["signals"] = time.perf_counter() - begin
    order = in_order(judged.of(Method().signal), costs)
    pairs = cascades_of(order, 2)
    for ensemble in ("none", "comparison", "mean_logits", "mean_softmax"):
        method = Method(ensemble=ensemble)
        exits, seconds[f"averaging, {ensemble}"] = _exits(method, table, judged, pairs, console)
        begin = time.perf_counter()
        found = search(exits, costs)
        seconds[f"pairs, {ensemble}"] = time.perf_counter() - begin
        fronts[f"pairs, {ensemble}"] = len(found.front)
        if not method.means:
            del seconds[f"averaging, {ensemble}"]
    begin = time.perf_counter()
    alone = Alone(judged.of(Method().signal))
    count = len(cascades_of(order, 3))
    with time_left(console, "searching triples", count, "cascades") as done:
        found = search(alone, costs, longest=3, stride=stride, solved=done)
    seconds["triples, none"] = time.perf_counter() - begin
    fronts["triples, none"] = len(found.front)
    return seconds, fronts


def _exits(
    method: Method,
    table: ModelTable,
    judged: JudgedModels,
    cascades: list[tuple[str, ...]],
    console: Console,
) -> tuple[Exits, float]:
    begin = time.perf_counter()
    with time_left(console, f"averaging, {method.ensemble}", len(table), "samples") as done:
        exits = exits_of(method, table, judged, cascades, averaged=done)
    return exits, time.perf_counter() - begin


def _naive_beside(table: ModelTable, stride: int, console: Console) -> dict[str, Any]:
    """Both searches on some models and samples of the table."""
    costs = _costs(table)
    count = min(_NAIVE_MODELS, len(table.names))
    chosen = [table.names[i] for i in np.linspace(0, len(table.names) - 1, count).astype(int)]
    models = judge(table, [Method().signal]).of(Method().signal)
    rows = np.arange(min(_NAIVE_SAMPLES, len(table)))
    exits = Alone({name: models[name] for name in chosen}).rows(rows)
    found: dict[str, Any] = {"models": count, "samples": len(rows)}
    for longest, what in ((2, "pairs"), (3, "triples")):
        console.note(f"naive search of {what}")
        begin = time.perf_counter()
        naive = naive_search(exits, costs, longest, stride)
        between = time.perf_counter()
        ours = search(exits, costs, longest=longest, stride=stride)
        end = time.perf_counter()
        found[what] = {
            "cascades": len(list(combinations(chosen, longest))),
            "naive_s": between - begin,
            "ours_s": end - between,
            "same_front": same_front(ours, naive),
        }
    return found


def _costs(table: ModelTable) -> dict[str, float]:
    """Costs over three and a half orders of magnitude, as MACs of the paper's models."""
    costs = np.geomspace(0.05, 180, len(table.names)).tolist()
    return dict(zip(table.names, costs, strict=True))


def _check_space(path: Path, args: argparse.Namespace) -> None:
    need = 4 * args.models * args.samples * args.classes
    free = shutil.disk_usage(path.parent).free
    if free < 1.1 * need:
        raise ConfigError(
            f"free space in {path.parent}",
            got=f"{free / 1e9:.1f} GB",
            expected=f">= {1.1 * need / 1e9:.1f} GB",
            remedy="Give another --folder, or smaller sizes",
        )


def _show(
    args: argparse.Namespace,
    seconds: Mapping[str, float],
    naive: Mapping[str, Any],
    peak: float,
    console: Console,
) -> None:
    limits = {"pairs, none": _PAIRS_S, "pairs, comparison": _PAIRS_S, "triples, none": _TRIPLES_S}
    console.table(
        f"{args.models} models, {args.samples} samples, {args.classes} classes, "
        f"triples at stride {args.stride}",
        ("part", "seconds", "limit for the default sizes"),
        [(name, f"{value:.2f}", limits.get(name, "-")) for name, value in seconds.items()],
    )
    console.table(
        f"beside a naive search, on {naive['models']} models and {naive['samples']} samples",
        ("part", "naive, s", "ours, s", "same front"),
        [
            (
                f"{naive[what]['cascades']} {what}",
                f"{naive[what]['naive_s']:.3f}",
                f"{naive[what]['ours_s']:.3f}",
                "yes" if naive[what]["same_front"] else "NO",
            )
            for what in ("pairs", "triples")
        ],
    )
    console.line(f"peak memory: {peak / 1e9:.2f} GB (limit {_PEAK / 1e9:.0f} GB)")


if __name__ == "__main__":
    sys.exit(run_command("python -m bench.search", sys.modules[__name__], sys.argv[1:]))
