"""What a layer costs without an exit and with each kind of neck, on this device.

Every stage is timed in the scheduler's own trace, one image at a time, with all exits evaluated and
nobody leaving. Where the bundle says which layers its stages hold, a layer of a segment costs the
segment's time over its number of layers; one with an exit costs its head besides. The stem is part
of the first segment and the classifier of the last, so their layers carry a share of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.studies.files import StudyResult, Table
from bench.studies.layers import Layers, layers_of, span
from calib.tables import durations
from edge_runtime import options
from edge_runtime.console import Console, milliseconds
from edge_runtime.dataset import parse_size
from edge_runtime.errors import ConfigError
from edge_runtime.load import load
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.scheduler import Scheduler
from edge_runtime.schema import plain
from edge_runtime.timing import Ratio, ratio

#: Fewer rounds show neither a drift nor outliers.
LEAST_ROUNDS = 20
#: Images that are profiled on, in turn.
_IMAGES = 64
#: What makes a series unstable: its halves, its quartiles or its outliers apart by more than this.
_DRIFT, _SPREAD, _OUTLIERS = 0.10, 0.25, 0.05
#: A round that takes more than this many medians is an outlier.
_FAR = 2.0


@dataclass(frozen=True)
class Rounds:
    """Durations of every stage, round by round, in seconds.

    Attributes:
        stages: Names, in order of execution.
        seconds: Shape (warm-up + rounds, stages), float64.
        calls: Of the whole call, shape (warm-up + rounds,).
        warm_up: How many of the first rounds count for nothing.
        interrupted: Whether somebody stopped it before the last round.
    """

    stages: tuple[str, ...]
    seconds: NDArray[np.float64]
    calls: NDArray[np.float64]
    warm_up: int
    interrupted: bool

    def of(self, stage: str, *, warm: bool = False) -> NDArray[np.float64]:
        """Durations of a stage, shape (rounds,); with the warm-up before them where `warm`."""
        column = self.seconds[:, self.stages.index(stage)]
        return column if warm else column[self.warm_up :]


@dataclass(frozen=True)
class Spread:
    """How long something takes, in seconds, over all its rounds.

    Attributes:
        count: Number of durations.
        median: Robust against outliers; what comparisons use.
        mean: Arithmetic mean.
        std: Standard deviation.
        min: Smallest.
        max: Largest.
        outliers: Share of durations above twice the median.
        unstable: Why these figures are not to be trusted; "" where they are.
    """

    count: int
    median: float
    mean: float
    std: float
    min: float
    max: float
    outliers: float
    unstable: str

    @classmethod
    def of(cls, seconds: NDArray[np.float64]) -> Spread:
        """Sum up durations, shape (rounds,) or (members, rounds) of a group."""
        median = float(np.median(seconds))
        far = float((seconds > _FAR * median).mean())
        return cls(
            count=seconds.size,
            median=median,
            mean=float(seconds.mean()),
            std=float(seconds.std(ddof=1)) if seconds.size > 1 else 0.0,
            min=float(seconds.min()),
            max=float(seconds.max()),
            outliers=far,
            unstable=_unstable(np.atleast_2d(seconds), median, far),
        )


@dataclass(frozen=True)
class Group:
    """Layers, or stages, of one kind.

    Attributes:
        name: "none", a neck, or a kind of stage.
        members: What is in it, for people.
        seconds: Of each member, warm-up included, shape (members, warm-up + rounds).
        warm_up: How many of the first rounds count for nothing.
    """

    name: str
    members: str
    seconds: NDArray[np.float64]
    warm_up: int

    @property
    def rounds(self) -> NDArray[np.float64]:
        """Without the warm-up, shape (members, rounds)."""
        return self.seconds[:, self.warm_up :]


def run(args: argparse.Namespace, bundle: Bundle, console: Console) -> StudyResult:
    """Measure, group, show."""
    rounds = 200 if args.rounds is None else args.rounds
    if rounds < LEAST_ROUNDS:
        raise ConfigError("--rounds", got=rounds, expected=f">= {LEAST_ROUNDS}")
    warm_up = 200 if args.warmup is None else args.warmup
    layers = layers_of(bundle)
    data = None if args.data is None else options.open_data(args, bundle)
    with ExitStack() as stack:
        first = None if data is None else data.image(0)
        scheduler = stack.enter_context(_open(args, bundle, first))
        if data is None:
            images = _noise(scheduler, args.seed)
        else:
            chosen = data.balanced(_IMAGES, args.seed)
            images = [chosen.image(i) for i in range(len(chosen))]
        found = measure(scheduler, images, console, rounds=rounds, warm_up=warm_up)
    groups = kind_groups(bundle, found) if layers is None else layer_groups(layers, found)
    _show(bundle, found, groups, layers, console)
    pictures = {}
    if args.out is not None:
        from bench.studies.profile_plot import plot_profile

        title = f"{bundle.manifest.name}: every stage with all exits evaluated, batch 1"
        pictures["profile"] = partial(
            plot_profile, title=title, rounds=found, groups=groups, kinds=_kinds(bundle)
        )
    measured = len(found.calls) - found.warm_up
    result = {
        "data": None if data is None else data.hash,
        "images": "noise" if data is None else f"{len(images)} of {len(data)}",
        "rounds": measured,
        "warm_up": found.warm_up,
        "grouped_by": "stage kind" if layers is None else "layers",
        "groups": [
            {
                "group": group.name,
                "members": group.members,
                "seconds": plain(Spread.of(group.rounds)),
                "over_none": plain(over),
            }
            for group, over in zip(groups, _over_first(groups, layers), strict=True)
        ],
        "stages": [
            {
                "stage": name,
                "kind": _kinds(bundle)[name],
                "layers": list(_layers(layers, name) or ()),
                "seconds": plain(Spread.of(found.of(name))),
            }
            for name in found.stages
        ],
        "frame_seconds": plain(Spread.of(found.calls[found.warm_up :])),
        "interrupted": found.interrupted,
    }
    return StudyResult(result, _tables(bundle, found, groups, layers), pictures, found.interrupted)


def measure(
    scheduler: Scheduler,
    images: Sequence[NDArray[Any]],
    console: Console,
    *,
    rounds: int,
    warm_up: int,
) -> Rounds:
    """Run all stages on one image after the other.

    Args:
        scheduler: Opened at `OperatingPoint.all_exits`.
        images: Given in turn.
        console: Shows progress.
        rounds: Rounds that count.
        warm_up: Rounds before them, recorded too.

    Raises:
        KeyboardInterrupt: Fewer than 20 rounds were finished.
        BackendError: The backend does not tell how long a stage took.
    """
    stages = tuple(stage.name for stage in scheduler.plan.stages)
    total = warm_up + rounds
    seconds, calls = np.empty((total, len(stages))), np.empty(total)
    done = 0
    try:
        for i in console.progress(range(total), f"profiling after {warm_up} rounds of warm-up"):
            image = images[i % len(images)][None]
            begin = time.perf_counter()
            (prediction,) = scheduler.classify(image)
            calls[i] = time.perf_counter() - begin
            taken = durations(prediction.trace)
            seconds[i] = [taken[name] for name in stages]
            done = i + 1
    except KeyboardInterrupt:
        if done < warm_up + LEAST_ROUNDS:
            raise
        console.note(f"interrupted: {done - warm_up} of {rounds} rounds were measured")
    return Rounds(stages, seconds[:done], calls[:done], warm_up, done < total)


def layer_groups(layers: Layers, rounds: Rounds) -> list[Group]:
    """One group of the layers without an exit, and one per neck, in order of evaluation."""
    share = {
        name: rounds.of(name, warm=True) / len(inside)
        for name, inside in layers.segments.items()
        if inside
    }
    found = []
    plain_layers = [(name, layers.plain(name)) for name in share]
    if any(count for _, count in plain_layers):
        series = [share[name] for name, count in plain_layers for _ in range(count)]
        exits = {one.layer for one in layers.exits}
        without = tuple(
            layer for inside in layers.segments.values() for layer in inside if layer not in exits
        )
        title = f"layers {span(without)}"
        found.append(Group("none", title, np.stack(series), rounds.warm_up))
    for neck in dict.fromkeys(one.neck for one in layers.exits):
        members = [one for one in layers.exits if one.neck == neck]
        series = [
            share[one.segment] + (rounds.of(one.head, warm=True) if one.head else 0.0)
            for one in members
        ]
        title = f"layers {span(tuple(one.layer for one in members))}"
        found.append(Group(neck, title, np.stack(series), rounds.warm_up))
    return found


def kind_groups(bundle: Bundle, rounds: Rounds) -> list[Group]:
    """One group per kind of stage, for a bundle that says nothing of layers."""
    kinds = _kinds(bundle)
    found = []
    for kind in dict.fromkeys(kinds[name] for name in rounds.stages):
        members = [name for name in rounds.stages if kinds[name] == kind]
        series = [rounds.of(name, warm=True) for name in members]
        found.append(Group(kind, ", ".join(members), np.stack(series), rounds.warm_up))
    return found


def _unstable(seconds: NDArray[np.float64], median: float, far: float) -> str:
    """What is wrong with a series, shape (members, rounds); "" where nothing is."""
    if not median > 0:
        return "too short for the clock"
    reasons = []
    # Members differ by nature, rounds should not: what is judged is each over its own median.
    own = seconds / np.maximum(np.median(seconds, axis=1, keepdims=True), 1e-12)
    half = own.shape[1] // 2
    drift = float(np.median(own[:, half:]) / np.median(own[:, :half])) - 1 if half else 0.0
    if abs(drift) > _DRIFT:
        reasons.append(f"drift {drift:+.0%}")
    low, high = np.percentile(own, [25, 75])
    if high - low > _SPREAD:
        reasons.append(f"spread {high - low:.0%}")
    if far > _OUTLIERS and float((own > _FAR).mean()) > _OUTLIERS:
        reasons.append("outliers")
    return ", ".join(reasons)


def _over_first(groups: Sequence[Group], layers: Layers | None) -> list[Ratio | None]:
    """Median layer of each group over that of "none", round by round; None where there is none."""
    if layers is None or not groups or groups[0].name != "none":
        return [None] * len(groups)
    first = groups[0].rounds.mean(axis=0)
    return [None, *(ratio(group.rounds.mean(axis=0), first) for group in groups[1:])]


def _open(args: argparse.Namespace, bundle: Bundle, image: NDArray[Any] | None) -> Scheduler:
    """All exits, for the size of the data's images, or that of --image-size."""
    size = parse_size(args.image_size) if args.image_size else None
    if image is not None:
        size = (image.shape[0], image.shape[1])
    return load(
        bundle,
        backend=args.backend,
        operating_point=OperatingPoint.all_exits(bundle.cascade),
        image_size=size,
        options=options.backend_options(args, time_stages=True),
    )


def _noise(scheduler: Scheduler, seed: int) -> list[NDArray[Any]]:
    """Random images of the size and dtype that the cascade was opened for."""
    rng = np.random.default_rng(seed)
    shape, dtype = scheduler.image.sample_shape(), np.dtype(scheduler.image.dtype)
    if dtype.kind == "f":
        return [rng.standard_normal(shape).astype(dtype) for _ in range(8)]
    return [rng.integers(0, 256, shape, np.int64).astype(dtype) for _ in range(8)]


def _kinds(bundle: Bundle) -> dict[str, str]:
    return {stage.name: stage.kind for stage in bundle.cascade.stages}


def _layers(layers: Layers | None, stage: str) -> tuple[int, ...] | None:
    return None if layers is None else layers.segments.get(stage)


def _show(
    bundle: Bundle,
    rounds: Rounds,
    groups: Sequence[Group],
    layers: Layers | None,
    console: Console,
) -> None:
    kinds = _kinds(bundle)
    rows: list[tuple[str, ...]] = []
    for name in rounds.stages:
        inside = _layers(layers, name)
        what = kinds[name] if inside is None else f"layers {span(inside)}"
        rows.append((name, what, *_figures(Spread.of(rounds.of(name)))))
    columns = ("median", "mean", "std", "min", "max", "outliers", "unstable")
    measured = len(rounds.calls) - rounds.warm_up
    console.table(
        f"stages, ms, {measured} rounds after {rounds.warm_up} of warm-up",
        ("stage", "what", *columns),
        rows,
    )
    if layers is None:
        console.line(
            "The bundle says nothing of its layers and necks (provenance.model of its manifest): "
            "stages are grouped by their kind."
        )
    rows = [(one.name, one.members, *_figures(Spread.of(one.rounds))) for one in groups]
    if layers is None:
        console.table("stages by kind, ms", ("kind", "members", *columns), rows)
    else:
        over = ["-" if one is None else _more(one) for one in _over_first(groups, layers)]
        rows = [(*row, more) for row, more in zip(rows, over, strict=True)]
        title = "a layer, with its exit's head, by the neck behind it, ms"
        console.table(title, ("neck", "behind", *columns, "over none"), rows)
    frame = Spread.of(rounds.calls[rounds.warm_up :])
    inside_stages = float(np.median(rounds.seconds[rounds.warm_up :].sum(axis=1)))
    console.line(
        f"A frame with all exits takes {milliseconds(frame.median)} ms (median), of it "
        f"{milliseconds(inside_stages)} ms in stages."
    )
    if rounds.warm_up:
        first = float(rounds.calls[0] / frame.median)
        console.line(f"The first round of the warm-up took {first:.1f} times the median.")
    if any(Spread.of(group.rounds).unstable for group in groups):
        console.line(
            "Unstable figures are marked: stop what else runs, raise --warmup and --rounds, or "
            "fix the clocks of the device."
        )


def _figures(spread: Spread) -> tuple[str, ...]:
    times = (spread.median, spread.mean, spread.std, spread.min, spread.max)
    return (
        *(milliseconds(value) for value in times),
        f"{spread.outliers:.1%}",
        spread.unstable or "-",
    )


def _more(over: Ratio) -> str:
    return f"{over.value - 1:+.0%} [{over.low - 1:+.0%}, {over.high - 1:+.0%}]"


def _tables(
    bundle: Bundle, rounds: Rounds, groups: Sequence[Group], layers: Layers | None
) -> Mapping[str, Table]:
    """The figures, and every round."""
    kinds = _kinds(bundle)

    def row(level: str, name: str, what: str, spread: Spread) -> list[object]:
        times = (spread.median, spread.mean, spread.std, spread.min, spread.max)
        ms = [value * 1e3 for value in times]
        return [level, name, what, spread.count, *ms, spread.outliers * 100, spread.unstable]

    rows = [row("group", one.name, one.members, Spread.of(one.rounds)) for one in groups]
    for name in rounds.stages:
        inside = _layers(layers, name)
        what = kinds[name] if inside is None else f"layers {span(inside)}"
        rows.append(row("stage", name, what, Spread.of(rounds.of(name))))
    columns = ["level", "name", "what", "count", "median_ms", "mean_ms", "std_ms", "min_ms"]
    columns += ["max_ms", "outliers_percent", "unstable"]
    every = [
        [i, int(i < rounds.warm_up), call * 1e3, *(rounds.seconds[i] * 1e3).tolist()]
        for i, call in enumerate(rounds.calls.tolist())
    ]
    header = ["round", "warm_up", "frame_ms", *(f"{name}_ms" for name in rounds.stages)]
    return {"profile": Table(columns, rows), "profile_rounds": Table(header, every)}
