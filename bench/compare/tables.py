"""The tables of a comparison.

With two results what is compared stands side by side in one table; with more there is a table per
figure, with a column per result. What is not known is "-".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.compare.ratios import quotient, ratio_of_means, ratio_of_runs
from bench.compare.verdict import common_reader, frame_energy, verdicts
from bench.report.table import Table
from bench.result import Distribution, ExitFigures, Result, StageFigures, SubjectEnergy
from edge_runtime.timing import Ratio

UNKNOWN = "-"


def comparison_tables(results: Sequence[Result]) -> list[Table]:
    """All tables; those of which no result knows anything are left out.

    Args:
        results: Two or more with different names; the first is what the others are compared with.
    """
    tables = [
        _overview(results),
        *_exits(results),
        *_stages(results),
        *_baselines(results),
        *_energy(results),
        *_environments(results),
        *_expectations(results),
        *_throughput(results),
        *_deadlines(results),
    ]
    return [_printable(table) for table in tables]


@dataclass(frozen=True)
class _Figure:
    """One figure of a row, told by every result.

    Attributes:
        name: As the head of a column shows it.
        unit: Of the figure; empty for ratios and text.
        cell: The figure's text for a result and a row.
        relative: Whether it compares a result with the first, which then has none itself.
    """

    name: str
    unit: str
    cell: Callable[[Result, str], str]
    relative: bool = False


def _grid(
    title: str,
    head: str,
    rows: Iterable[str],
    figures: Sequence[_Figure],
    results: Sequence[Result],
    notes: tuple[str, ...] = (),
) -> list[Table]:
    """Rows by figures by results: one table for two results, else one per figure.

    Figures, and then rows, of which nothing is known are left out.
    """
    rows = list(dict.fromkeys(rows))
    found = []
    for figure in figures:
        told = results[1:] if figure.relative else results
        cells = {row: tuple(figure.cell(result, row) for result in told) for row in rows}
        if any(cell != UNKNOWN for row in cells.values() for cell in row):
            found.append((figure, told, cells))
    if not found:
        return []
    if len(figures) == 1:
        (figure, told, cells), *_ = found
        lines = [(row, *cells[row]) for row in rows]
        columns = [result.name for result in told]
        return [_table(f"{title}{_comma(figure.unit)}", (head, *columns), lines, notes)]
    if len(results) == 2:
        columns = [_head(figure, result) for figure, told, _ in found for result in told]
        lines = [(row, *(cell for *_, cells in found for cell in cells[row])) for row in rows]
        units = dict.fromkeys(figure.unit for figure, *_ in found if figure.unit)
        return [_table(f"{title}{_comma(' and '.join(units))}", (head, *columns), lines, notes)]
    tables = []
    for figure, told, cells in found:
        columns = [result.name for result in told]
        of = f" to {results[0].name}" if figure.relative else ""
        name = f"{title}: {figure.name}{of}{_comma(figure.unit)}"
        lines = [(row, *cells[row]) for row in rows]
        tables.append(_table(name, (head, *columns), lines))
    return [*tables[:-1], replace(tables[-1], notes=notes)]


def _table(
    title: str,
    columns: Sequence[str],
    lines: Iterable[tuple[str, ...]],
    notes: tuple[str, ...] = (),
) -> Table:
    """A table without the rows of which nothing is known."""
    kept = tuple(line for line in lines if any(cell != UNKNOWN for cell in line[1:]))
    return Table(title, tuple(columns), kept, notes)


def _head(figure: _Figure, result: Result) -> str:
    return figure.name if figure.relative else f"{figure.name} {result.name}"


def _comma(unit: str) -> str:
    return f", {unit}" if unit else ""


def _overview(results: Sequence[Result]) -> Table:
    first = results[0]
    reader = common_reader(results)
    rows = []
    readers = {}
    for result in results:
        energy = frame_energy(result, reader)
        if energy is not None:
            readers[result.name] = energy[0]
        times = result.end_to_end
        rows.append(
            (
                result.name,
                " ".join(filter(None, (result.backend, result.mode))) or UNKNOWN,
                _percent(result.accuracy),
                *(_milli(seconds) for seconds in (times.mean, times.p50, times.p99)),
                _milli(energy[1] if energy else None),
                _unstable(result),
                "1" if result is first else _ratio(ratio_of_runs(result, first)),
            )
        )
    columns = ("result", "backend", "accuracy %", "mean ms", "p50 ms", "p99 ms", "mJ", "unstable")
    return Table(
        f"overview: latency end to end, energy of a frame; ratio of means to {first.name}",
        (*columns, "ratio"),
        tuple(rows),
        (
            *verdicts(results),
            "Runs were made apart: intervals hold within these runs, not for another day or start.",
            *_reader_notes(readers),
            *_own_notes(results),
        ),
    )


def _own_notes(results: Sequence[Result]) -> tuple[str, ...]:
    """What readers of each result must know; what several say is said once."""
    names: dict[str, list[str]] = {}
    for result in results:
        for note in result.notes:
            names.setdefault(note, []).append(result.name)
    few_first = sorted(names.items(), key=lambda item: len(item[1]))
    return tuple(f"{', '.join(who)}: {note}" for note, who in few_first)


def _unstable(result: Result) -> str:
    if result.kind == "reference":
        return UNKNOWN
    return "yes" if result.unstable else "no"


def _reader_notes(readers: Mapping[str, str]) -> tuple[str, ...]:
    if not readers:
        return ()
    if len(set(readers.values())) == 1:
        return (f"Energy by {next(iter(readers.values()))}.",)
    told = ", ".join(f"{name} by {reader}" for name, reader in readers.items())
    return (f"Energies are of different readers and no ratio is made of them: {told}.",)


def _exits(results: Sequence[Result]) -> list[Table]:
    first = results[0]
    names = [exit_.name for result in results for exit_ in result.exits]
    if not names:
        return []

    def of(text: Callable[[ExitFigures], str]) -> Callable[[Result, str], str]:
        def cell(result: Result, name: str) -> str:
            found = _exit(result, name)
            return text(found) if found else UNKNOWN

        return cell

    def latency(result: Result, name: str) -> Distribution | None:
        found = _exit(result, name)
        return found.latency if found else None

    def forced(result: Result, name: str) -> Distribution | None:
        found = _exit(result, name)
        return found.forced if found else None

    def joules(result: Result, name: str) -> str:
        found = _exit(result, name)
        return _milli(found.joules if found else None)

    return [
        *_grid(
            "frames that leave at each exit",
            "exit",
            names,
            (
                _Figure("share", "%", of(lambda exit_: _percent(exit_.share))),
                _Figure("accuracy", "%", of(lambda exit_: _percent(exit_.accuracy))),
            ),
            results,
        ),
        *_grid(
            "latency of the frames that leave at each exit",
            "exit",
            names,
            _times(latency, first),
            results,
        ),
        *_grid(
            "latency when every frame is made to leave at one exit",
            "exit",
            names,
            _times(forced, first),
            results,
        ),
        *_grid(
            "energy of one frame by the exit where it leaves",
            "exit",
            names,
            (_Figure("energy", "mJ", joules),),
            results,
            _different_readers(results),
        ),
    ]


def _different_readers(results: Sequence[Result]) -> tuple[str, ...]:
    """A warning where energies have no reader in common."""
    told = [result for result in results if frame_energy(result)]
    if len(told) < 2 or common_reader(told):
        return ()
    return ("By different readers.",)


def _times(of: Callable[[Result, str], Distribution | None], first: Result) -> tuple[_Figure, ...]:
    """Mean, p50, p99 and the ratio of means of a distribution."""

    def mean(result: Result, row: str) -> str:
        found = of(result, row)
        return _milli(found.mean if found else None)

    def p50(result: Result, row: str) -> str:
        found = of(result, row)
        return _milli(found.p50 if found else None)

    def p99(result: Result, row: str) -> str:
        found = of(result, row)
        return _milli(found.p99 if found else None)

    def ratio(result: Result, row: str) -> str:
        return _ratio(ratio_of_means(of(result, row), of(first, row)))

    return (
        _Figure("mean", "ms", mean),
        _Figure("ratio", "", ratio, relative=True),
        _Figure("p50", "ms", p50),
        _Figure("p99", "ms", p99),
    )


def _stages(results: Sequence[Result]) -> list[Table]:
    """Stages that the first and another result have; one that a device does not time is "-"."""
    first = results[0]
    others = {stage.name for result in results[1:] for stage in result.stages}
    names = [stage.name for stage in first.stages if stage.name in others]

    def share(result: Result, name: str) -> str:
        found = _stage(result, name)
        return _percent(found.share if found else None)

    def precision(result: Result, name: str) -> str:
        found = _stage(result, name)
        return found.precision if found else UNKNOWN

    def latency(result: Result, name: str) -> Distribution | None:
        found = _stage(result, name)
        return found.latency if found else None

    mean, ratio, *_ = _times(latency, first)
    figures = [_Figure("frames", "%", share), mean, ratio]
    if any(len({precision(result, name) for result in results}) > 1 for name in names):
        figures.insert(0, _Figure("precision", "", precision))
    return _grid(
        "stages: frames that run each, and its own latency", "stage", names, figures, results
    )


def _baselines(results: Sequence[Result]) -> list[Table]:
    names = [
        subject.name
        for result in results
        for subject in result.subjects
        if subject.name != "cascade"
    ]

    def cell(result: Result, name: str) -> str:
        found = result.subject(name)
        return _ratio(found.over_cascade if found else None)

    return _grid(
        "mean time over the cascade's, measured in turn in the same run",
        "subject",
        names,
        (_Figure("ratio", "", cell),),
        results,
        tuple(
            f"{result.name}: {name} was not measured: {why}"
            for result in results
            for name, why in result.not_measured.items()
        ),
    )


def _energy(results: Sequence[Result]) -> list[Table]:
    """Per reader and subject; a ratio only of the same reader."""
    first = results[0]
    keys = {
        f"{energy.reader}: {one.subject}": (energy.reader, one.subject)
        for result in results
        for energy in result.energy
        for one in energy.subjects
    }

    def find(result: Result, row: str) -> SubjectEnergy | None:
        reader, subject = keys[row]
        told = (energy.of(subject) for energy in result.energy if energy.reader == reader)
        return next((one for one in told if one is not None), None)

    def joules(result: Result, row: str) -> float | None:
        found = find(result, row)
        return found.joules_per_frame if found else None

    def watts(result: Result, row: str) -> str:
        found = find(result, row)
        return f"{found.watts:.2f}" if found else UNKNOWN

    def ratio(result: Result, row: str) -> str:
        return _ratio(quotient(joules(result, row), joules(first, row)))

    notes = [
        f"{result.name}: {why}"
        for result in results
        for why in (
            *(f"{energy.reader}: {energy.problem}" for energy in result.energy if energy.problem),
            *((f"no energy: {result.no_energy}",) if result.no_energy else ()),
        )
    ]
    return _grid(
        "energy of one frame, and mean power, by reader",
        "reader: subject",
        keys,
        (
            _Figure("energy", "mJ", lambda result, row: _milli(joules(result, row))),
            _Figure("ratio", "", ratio, relative=True),
            _Figure("power", "W", watts),
        ),
        results,
        tuple(notes),
    )


def _environments(results: Sequence[Result]) -> list[Table]:
    from bench.machine.environment import differences

    own = [
        (what, texts)
        for what, texts in (
            ("backend", tuple(result.backend or UNKNOWN for result in results)),
            ("execution mode", tuple(result.mode or UNKNOWN for result in results)),
            ("measured", tuple(result.created or UNKNOWN for result in results)),
        )
        if len(set(texts)) > 1
    ]
    known = any(result.environment for result in results)
    told = differences([result.environment for result in results]) if known else []
    rows = tuple((what, *texts) for what, texts in (*own, *told))
    columns = ("what", *(result.name for result in results))
    return [Table("what differs between the machines and runs", columns, rows)] if rows else []


def _expectations(results: Sequence[Result]) -> list[Table]:
    lines = []
    for result in results:
        found = result.expectation
        if found is not None:
            cells = (_milli(found.seconds), _milli(found.measured), _ratio(found.ratio))
            lines.append((result.name, *cells))
    if not lines:
        return []
    return [
        Table(
            "mean latency that exit shares and forced exits predict, and measured, ms",
            ("result", "expected", "measured", "measured over expected"),
            tuple(lines),
        )
    ]


def _throughput(results: Sequence[Result]) -> list[Table]:
    first = results[0]
    batches = sorted({one.batch for result in results for one in result.throughput})
    names = {f"{batch}": batch for batch in batches}

    def number(result: Result, row: str, field: str) -> float | None:
        found = next((one for one in result.throughput if one.batch == names[row]), None)
        value: float | None = getattr(found, field, None)
        return value

    def per_second(field: str) -> Callable[[Result, str], str]:
        def cell(result: Result, row: str) -> str:
            value = number(result, row, field)
            return UNKNOWN if value is None else f"{value:.1f}"

        return cell

    def ratio(result: Result, row: str) -> str:
        return _ratio(quotient(number(result, row, "cascade"), number(first, row, "cascade")))

    def speed_up(result: Result, row: str) -> str:
        found = next((one for one in result.throughput if one.batch == names[row]), None)
        return _ratio(found.speed_up if found else None)

    return _grid(
        "throughput in batches",
        "batch",
        names,
        (
            _Figure("cascade", "images per second", per_second("cascade")),
            _Figure("ratio", "", ratio, relative=True),
            _Figure("base", "images per second", per_second("base")),
            _Figure("cascade over base", "", speed_up),
        ),
        results,
    )


def _deadlines(results: Sequence[Result]) -> list[Table]:
    lines = []
    for result in results:
        found = result.deadline
        if found is not None:
            counts = (found.missed, found.cut_short, found.frames)
            lines.append((result.name, _milli(found.seconds), *map(str, counts)))
    if not lines:
        return []
    columns = ("result", "deadline ms", "missed", "cut short", "frames")
    return [Table("frames under the deadline", columns, tuple(lines))]


def _exit(result: Result, name: str) -> ExitFigures | None:
    return next((one for one in result.exits if one.name == name), None)


def _stage(result: Result, name: str) -> StageFigures | None:
    return next((one for one in result.stages if one.name == name), None)


def _milli(value: float | None) -> str:
    """Seconds in ms, or joules in mJ, with the digits of `edge_runtime.console.milliseconds`."""
    if value is None:
        return UNKNOWN
    return f"{value * 1e3:.3f}" if value < 0.01 else f"{value * 1e3:.1f}"


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share * 100:.1f}"


def _ratio(ratio: Ratio | float | None) -> str:
    if ratio is None:
        return UNKNOWN
    return str(ratio) if isinstance(ratio, Ratio) else f"{ratio:.3f}"


def _printable(table: Table) -> Table:
    """Without control characters, which names in a file from elsewhere may have."""

    def clean(text: str) -> str:
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

    return Table(
        clean(table.title),
        tuple(map(clean, table.columns)),
        tuple(tuple(map(clean, row)) for row in table.rows),
        tuple(map(clean, table.notes)),
    )
