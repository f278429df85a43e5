"""Tables and verdicts say what the results say, and nothing where they say nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.compare.tables import comparison_tables
from bench.compare.verdict import verdicts
from bench.report.table import Table
from bench.result import ExitFigures, Result
from tests.bench.results import made_up_energy, made_up_result


def _named(tables: list[Table], begin: str) -> Table:
    (found,) = (table for table in tables if table.title.startswith(begin))
    return found


def _column(table: Table, name: str) -> list[str]:
    return [row[table.columns.index(name)] for row in table.rows]


def _bare() -> Result:
    """A result that knows next to nothing."""
    made = made_up_result("bare", 0.5)
    return Result(
        kind="bench",
        name="bare",
        command=made.command,
        created=made.created,
        method=made.method,
        bundle=made.bundle,
        bundle_name=made.bundle_name,
        end_to_end=replace(made.end_to_end, p50=None, p99=None),
        exits=(ExitFigures(name="only", evaluated=True, count=9, share=1.0),),
    )


def test_two_results_stand_side_by_side() -> None:
    tables = comparison_tables([made_up_result(), made_up_result("desktop", 0.2)])
    latency = _named(tables, "latency of the frames that leave at each exit, ms")
    assert latency.columns[:4] == ("exit", "mean Orin NX", "mean desktop", "ratio")
    assert _column(latency, "exit") == ["saver", "middle", "final"]
    assert _column(latency, "ratio") == ["0.200", "0.200", "0.200"]
    assert _column(latency, "p99 desktop")[2] == "-", "of 100 frames p99 is not known"
    forced = _named(tables, "latency when every frame is made to leave at one exit, ms")
    assert "-" not in _column(forced, "p99 desktop")
    stages = _named(tables, "stages")
    assert _column(stages, "stage")[:2] == ["preprocess", "saver"]
    assert _column(_named(tables, "what differs"), "Orin NX")[-1] == "Orin NX"


def test_three_results_have_a_column_each_and_a_table_per_figure() -> None:
    results = [made_up_result(), made_up_result("desktop", 0.2), made_up_result("AGX", 0.5)]
    tables = comparison_tables(results)
    title = "latency of the frames that leave at each exit: "
    assert _named(tables, f"{title}mean, ms").columns == ("exit", "Orin NX", "desktop", "AGX")
    ratio = _named(tables, f"{title}ratio to Orin NX")
    assert ratio.columns == ("exit", "desktop", "AGX")
    assert ratio.rows[0] == ("saver", "0.200", "0.500")


@pytest.mark.parametrize("others", [1, 2])
def test_what_is_not_known_is_a_dash_and_never_zero(others: int) -> None:
    more = [made_up_result("AGX", 0.5)][: others - 1]
    tables = comparison_tables([made_up_result(), _bare(), *more])
    (row,) = (row for row in tables[0].rows if row[0] == "bare")
    assert row[1:3] == ("-", "-")
    assert row[4:7] == ("-", "-", "-")
    cells = [
        row[i]
        for table in tables[1:]
        for row in table.rows
        for i, column in enumerate(table.columns)
        if i and column.endswith("bare")
    ]
    assert cells
    assert set(cells) <= {"-", "none", "100.0", made_up_result().created}


def test_results_that_know_next_to_nothing_have_an_overview_and_no_empty_table() -> None:
    tables = comparison_tables([_bare(), replace(_bare(), name="other")])
    titles = [table.title for table in tables[1:]]
    assert titles == ["frames that leave at each exit, %"]


def test_exits_are_matched_by_name() -> None:
    other = made_up_result("desktop", 0.2)
    renamed = tuple(
        replace(exit_, name="late" if exit_.name == "middle" else exit_.name)
        for exit_ in other.exits
    )
    tables = comparison_tables([made_up_result(), replace(other, exits=renamed)])
    latency = _named(tables, "latency of the frames that leave at each exit, ms")
    ratios = dict(zip(_column(latency, "exit"), _column(latency, "ratio"), strict=True))
    assert ratios == {"saver": "0.200", "middle": "-", "final": "0.200", "late": "-"}


def test_a_ratio_of_energies_is_made_of_one_reader_only() -> None:
    first, other = made_up_result(), made_up_result("desktop", 0.2)
    energy = _named(comparison_tables([first, other]), "energy of one frame, and mean power")
    assert "0.200" in _column(energy, "ratio")
    rapl = replace(made_up_energy(0.2), reader="package (RAPL)")
    tables = comparison_tables([first, replace(other, energy=(rapl,))])
    energy = _named(tables, "energy of one frame, and mean power")
    assert "ratio" not in energy.columns
    assert any("different readers" in note for note in tables[0].notes)
    assert "energy" not in verdicts([first, replace(other, energy=(rapl,))])[0]


def test_why_something_is_missing_stands_under_the_table() -> None:
    without = made_up_result("desktop", 0.2, energy=(), no_energy="no sensor")
    tables = comparison_tables([made_up_result(), without])
    assert "desktop: no energy: no sensor" in _named(tables, "energy of one frame, and").notes
    baselines = _named(tables, "mean time over the cascade's")
    assert "desktop: PyTorch eager was not measured: the package torch is not installed" in (
        baselines.notes
    )


def test_an_unstable_run_is_marked_with_its_reason() -> None:
    shaky = made_up_result("desktop", 0.2, unstable=("block medians vary by 7 %",))
    overview = comparison_tables([made_up_result(), shaky])[0]
    assert _column(overview, "unstable") == ["no", "yes"]
    assert "desktop was unstable: block medians vary by 7 %." in overview.notes


def test_the_verdict_says_how_much_at_what_accuracy_and_where() -> None:
    first = made_up_result()
    other = made_up_result("desktop", 0.3)
    faster = made_up_result("desktop", 0.15).exit("saver")
    mixed = replace(other, exits=(faster, *other.exits[1:]), energy=())
    (said,) = verdicts([first, mixed])
    assert said.startswith("desktop takes 0.30 [0.2")
    assert "of Orin NX's time per frame, at the same accuracy (95.9 %)" in said
    assert said.endswith("it saves more at exit saver (0.15) than at exit final (0.30).")


def test_the_verdict_says_when_a_machine_is_slower_worse_or_alike() -> None:
    first = made_up_result()
    (slower,) = verdicts([first, made_up_result("Nano", 2.0, accuracy=0.9)])
    assert slower.startswith("Nano takes 2.00 [1.")
    assert "times as long per frame as Orin NX, at an accuracy of 90.0 % against 95.9 %" in slower
    (alike,) = verdicts([first, made_up_result("twin", 1.001)])
    assert alike.startswith("twin and Orin NX take the same time per frame, as far as can be told")
    (unknown,) = verdicts([first, made_up_result("b", 0.5, accuracy=None)])
    assert "what accuracy it has beside that is not known" in unknown


def test_control_characters_of_a_file_do_not_reach_the_terminal() -> None:
    tables = comparison_tables([made_up_result(), made_up_result("\x1b[31mred")])
    texts = [text for table in tables for text in (table.title, *table.columns, *table.notes)]
    assert not any("\x1b" in text for text in texts)
    assert any("\\x1b[31mred" in text for text in texts)
