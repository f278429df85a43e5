"""What makes two results not comparable.

Another bundle, operating point, data, method, batch or deadline makes another experiment. Another
machine, backend or execution mode does not: that is what people compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.compare.sources import Run
from bench.report.table import Table
from bench.result import Result, StageFigures
from edge_runtime.console import milliseconds
from edge_runtime.errors import ConfigError
from edge_runtime.operating_point import OperatingPoint

#: Characters of a hash that are shown.
_HASH = 12


@dataclass(frozen=True)
class Hindrance:
    """One way in which a result is of another experiment than the first.

    Attributes:
        run: Which result: its file.
        name: What tables call it.
        what: In what it differs.
        got: What it has.
        expected: What the first result has.
    """

    run: str
    name: str
    what: str
    got: str
    expected: str

    def __str__(self) -> str:
        """As an error lists it."""
        return f"{self.run}: {self.what}: got {self.got}, expected {self.expected}"


def hindrances(runs: Sequence[Run]) -> tuple[Hindrance, ...]:
    """Everything in which results are of another experiment than the first."""
    found = []
    first = runs[0].result
    for run in runs[1:]:
        for what, got, expected in _differences(run.result, first):
            found.append(Hindrance(run.file, run.result.name, what, got, expected))
    return tuple(found)


def check_comparable(runs: Sequence[Run], *, anyway: bool) -> tuple[Hindrance, ...]:
    """Refuse results of different experiments.

    Args:
        runs: Two or more; the first is what the others are compared with.
        anyway: Whether they are wanted side by side nevertheless.

    Returns:
        What hinders; empty without `anyway`.

    Raises:
        ConfigError: Something hinders, and `anyway` is False; the message lists everything.
    """
    found = hindrances(runs)
    if found and not anyway:
        raise ConfigError(
            f"not comparable with {runs[0].file}: {'; '.join(map(str, found))}",
            remedy="Give --anyway to see them side by side nevertheless",
        )
    return found


def hindrance_table(found: Sequence[Hindrance]) -> Table:
    """Hindrances for readers of tables that were made nevertheless."""
    return Table(
        "NOT COMPARABLE: results of different experiments, side by side because of --anyway",
        ("result", "what", "got", "expected"),
        tuple((one.name, one.what, one.got, one.expected) for one in found),
        ("Differences below may come from these, not from the machines.",),
    )


def _differences(one: Result, first: Result) -> list[tuple[str, str, str]]:
    """What differs, with the texts of both; the first result's last."""
    aspects: tuple[tuple[str, Callable[[Result], str]], ...] = (
        ("bundle", _bundle),
        ("data", _data),
        ("method", lambda result: result.method),
        ("batch", lambda result: str(result.batch)),
        ("deadline", _deadline),
    )
    texts = [(what, text(one), text(first)) for what, text in aspects]
    texts += _of_points(one.operating_point, first.operating_point)
    texts += _of_precisions(one, first)
    return [(what, got, expected) for what, got, expected in texts if got != expected]


def _bundle(result: Result) -> str:
    if result.kind == "reference":
        return result.bundle
    return f"{result.bundle_name} {result.bundle[:_HASH]}"


def _data(result: Result) -> str:
    # A slower machine gets through fewer of the same images, in the same order: no hindrance.
    if not result.data:
        return "noise"
    return result.data if result.kind == "reference" else result.data[:_HASH]


def _deadline(result: Result) -> str:
    return f"{milliseconds(result.deadline.seconds)} ms" if result.deadline else "none"


def _of_points(
    one: OperatingPoint | None, first: OperatingPoint | None
) -> list[tuple[str, str, str]]:
    if one is None or first is None:
        names = [point.name if point else "not told" for point in (one, first)]
        return [("operating point", names[0], names[1])]
    aspects: tuple[tuple[str, Callable[[OperatingPoint], str]], ...] = (
        ("policy", lambda point: point.policy),
        ("metric", lambda point: point.metric),
        ("thresholds", lambda point: _numbers(point.thresholds)),
        ("temperatures", _temperatures),
        ("patience", lambda point: str(point.patience)),
    )
    return [(what, text(one), text(first)) for what, text in aspects]


def _temperatures(point: OperatingPoint) -> str:
    """Without those of 1, which change nothing."""
    return _numbers({name: value for name, value in point.temperatures.items() if value != 1})


def _numbers(values: Mapping[str, float | None]) -> str:
    """Names and numbers by name; one that is null says as much as one that is absent."""
    known = [f"{name} {value!r}" for name, value in sorted(values.items()) if value is not None]
    return ", ".join(known) or "none"


def _of_precisions(one: Result, first: Result) -> list[tuple[str, str, str]]:
    """Stages of both that ran at different precisions; the points' variants without stages."""
    if one.stages and first.stages:
        mine, theirs = _precisions(one.stages), _precisions(first.stages)
        names = [name for name in theirs if name in mine]
    else:
        mine, theirs = _variants(one), _variants(first)
        names = sorted({**mine, **theirs})
    other = [name for name in names if mine.get(name) != theirs.get(name)]
    if not other:
        return []
    got, expected = (
        ", ".join(f"{name} {have.get(name, 'as it comes')}" for name in other)
        for have in (mine, theirs)
    )
    return [("precision of stages", got, expected)]


def _precisions(stages: Sequence[StageFigures]) -> dict[str, str]:
    return {stage.name: stage.precision for stage in stages}


def _variants(result: Result) -> dict[str, str]:
    return dict(result.operating_point.variants) if result.operating_point else {}
