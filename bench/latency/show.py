"""A result in words and tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.latency.lineup import APART
from bench.report.table import Table
from bench.result import Distribution, Result, frames_for
from edge_runtime.console import milliseconds, percent
from edge_runtime.evaluate import payoff
from edge_runtime.timing import Ratio

_TAIL = ("p50", "p90", "p99", "p999", "max")
_PERCENTILES = ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"), (0.999, "p99.9"))


def tables(result: Result) -> list[Table]:
    """All that was measured, as tables."""
    found = [exits_table(result)]
    if result.inference is not None:
        found.append(inference_table(result))
    found.append(subjects_table(result))
    if result.stages:
        found.append(stages_table(result))
    if result.throughput:
        found.append(throughput_table(result))
    found += [energy_table(result, i) for i, one in enumerate(result.energy) if one.subjects]
    return found


def sentences(result: Result) -> list[str]:
    """What the tables come to."""
    return [*_verdict(result), *_findings(result)]


def exits_table(result: Result) -> Table:
    """What left where, and what it took from image to answer."""
    energy = any(one.joules is not None for one in result.exits)
    rows = []
    for one in result.exits:
        if not one.evaluated:
            rows.append((one.name, "pruned", *["-"] * (8 + energy)))
            continue
        rows.append(
            (
                one.name,
                str(one.count),
                percent(one.share),
                _percent(one.accuracy),
                *_cells(one.latency, "mean", *_TAIL),
                *([_millijoules(one.joules)] if energy else []),
            )
        )
    total = result.end_to_end
    rows.append(
        (
            "all",
            str(total.count),
            percent(1.0),
            _percent(result.accuracy),
            *_cells(total, "mean", *_TAIL),
            *(["-"] if energy else []),
        )
    )
    columns = ["exit", "frames", "share", "accuracy", "mean", "p50", "p90", "p99", "p99.9", "max"]
    point = result.operating_point
    return Table(
        f"{point.name if point else 'the cascade'} on {result.images} images, ms end to end",
        (*columns, *(["mJ always here"] if energy else [])),
        tuple(rows),
    )


def inference_table(result: Result) -> Table:
    """The same without preprocessing."""
    rows = [
        (name, str(one.count), *_cells(one, "mean", *_TAIL))
        for name, one in [
            *((exit_.name, exit_.inference) for exit_ in result.exits),
            ("all", result.inference),
        ]
        if one is not None
    ]
    return Table(
        "inference alone, without preprocessing, ms",
        ("exit", "frames", "mean", "p50", "p90", "p99", "p99.9", "max"),
        tuple(rows),
    )


def subjects_table(result: Result) -> Table:
    """Everything that took turns."""
    rows = [
        (
            one.name,
            *_cells(one.latency, "mean", *_TAIL, "jitter"),
            str(one.over_cascade) if one.name != "cascade" and one.over_cascade else "1",
        )
        for one in result.subjects
    ]
    notes = [f"{name}: not measured: {why}" for name, why in result.not_measured.items()]
    missing = missing_frames(result.end_to_end.count)
    if result.subject(APART) is not None:
        missing.append(f"subjects below it are compared with the {APART}, as warm as they are")
    return Table(
        f"time per frame, ms, {result.end_to_end.count} frames each, in turn",
        ("subject", "mean", "p50", "p90", "p99", "p99.9", "max", "jitter", "over the cascade"),
        tuple(rows),
        (*missing, *notes),
    )


def missing_frames(count: int) -> list[str]:
    """Which percentiles a number of frames can't tell, and how many frames they lack."""
    return [
        f"{name} needs {frames_for(q)} frames: {frames_for(q) - count} are missing"
        for q, name in _PERCENTILES
        if count < frames_for(q)
    ]


def stages_table(result: Result) -> Table:
    """Every stage of the cascade."""
    rows = [
        (
            one.name,
            one.precision,
            percent(one.share),
            *_cells(one.latency, "mean", *_TAIL),
        )
        for one in result.stages
    ]
    notes = []
    if result.pruned:
        notes.append(f"pruned stages: {', '.join(result.pruned)}")
    if result.host_gap is not None:
        gap = result.host_gap
        notes.append(
            f"host gap, what no stage accounts for: {milliseconds(gap.mean)} ms of "
            f"{milliseconds(result.end_to_end.mean)} ms per frame"
        )
    return Table(
        "stages of the cascade, ms",
        ("stage", "precision", "frames", "mean", "p50", "p90", "p99", "p99.9", "max"),
        tuple(rows),
        tuple(notes),
    )


def throughput_table(result: Result) -> Table:
    """Batches."""
    rows = [
        (
            str(one.batch),
            f"{one.cascade:.1f}",
            f"{one.base:.1f}",
            str(one.speed_up),
            str(one.calls),
        )
        for one in result.throughput
    ]
    return Table(
        "images per second in batches, in turn",
        ("batch", "cascade", "base", "cascade over base", "calls"),
        tuple(rows),
    )


def energy_table(result: Result, index: int) -> Table:
    """What one reader of energy told."""
    energy = result.energy[index]
    rows = [
        (
            one.subject,
            f"{one.watts:.2f}",
            "-" if one.joules_per_frame is None else _millijoules(one.joules_per_frame),
            "-" if one.spread is None else percent(one.spread),
            str(one.frames),
            f"{one.seconds:.1f}",
        )
        for one in energy.subjects
    ]
    how = (
        "a counter of energy" if energy.hertz is None else f"{energy.hertz:.0f} samples per second"
    )
    return Table(
        f"energy by {energy.reader}, {how}",
        ("subject", "watts", "mJ per frame", "spread", "frames", "seconds"),
        tuple(rows),
        (energy.problem,) if energy.problem else (),
    )


def _verdict(result: Result) -> Iterator[str]:
    base = result.subject("base")
    exits = [one for one in result.exits if one.evaluated]
    if base is None or base.over_cascade is None:
        return
    if len(exits) == 1 and exits[0] is result.exits[-1]:
        yield "No early exit is active at this operating point: it is the base model itself."
    elif result.accuracy is not None and result.base_accuracy is not None:
        times = base.over_cascade
        inverse = Ratio(1 / times.value, 1 / times.high, 1 / times.low)
        yield payoff(
            result.accuracy,
            result.base_accuracy,
            result.end_to_end.mean,
            base.latency.mean,
            inverse,
        )


def _findings(result: Result) -> Iterator[str]:
    expected = result.expectation
    if expected is not None:
        yield (
            f"Exit shares times forced runs predict {milliseconds(expected.seconds)} ms, measured "
            f"were {milliseconds(expected.measured)} ms: {expected.ratio} of it."
        )
    if result.deadline is not None:
        late = result.deadline
        yield (
            f"Deadline {milliseconds(late.seconds)} ms: {late.missed} of {late.frames} frames were "
            f"late, {late.cut_short} were cut short to meet it."
        )
    yield from (f"UNSTABLE: {why}" for why in result.unstable)
    if result.no_energy:
        yield f"Energy: not measurable here: {result.no_energy}"
    yield from (
        f"Energy by {one.reader}: not measured: {one.problem}"
        for one in result.energy
        if not one.subjects
    )
    yield from result.notes


def _cells(latency: Distribution | None, *names: str) -> Sequence[str]:
    values = [getattr(latency, name) if latency else None for name in names]
    return ["-" if value is None else milliseconds(value) for value in values]


def _percent(share: float | None) -> str:
    return "-" if share is None else percent(share)


def _millijoules(joules: float | None) -> str:
    return "-" if joules is None else f"{joules * 1e3:.3g}"
