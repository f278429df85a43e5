"""The search benchmark: the table that it writes, its naive reference, and one short real run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from bench import search as bench
from calib.cascade_search.exits import Alone
from calib.cascade_search.search import search
from calib.cascade_search.signals import Judgement
from calib.model_table import ModelTable
from edge_runtime.cli import run_command


def test_a_short_run_measures_everything(tmp_path: Path) -> None:
    target = tmp_path / "search.json"
    sizes = ["--models", "4", "--samples", "300", "--classes", "8", "--folder", str(tmp_path)]
    assert run_command("bench", bench, [*sizes, "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert set(found["seconds"]) == {
        "signals",
        "pairs, none",
        "pairs, comparison",
        "averaging, mean_logits",
        "pairs, mean_logits",
        "averaging, mean_softmax",
        "pairs, mean_softmax",
        "triples, none",
    }
    assert min(found["front_points"].values()) > 4
    assert found["naive"]["pairs"]["same_front"] is True
    assert found["naive"]["triples"]["same_front"] is True
    assert found["naive"]["triples"]["cascades"] == 4
    assert 2e7 < found["peak_bytes"] < 6e9
    assert list(tmp_path.iterdir()) == [target]


def test_later_models_of_the_table_are_better_and_none_is_perfect(tmp_path: Path) -> None:
    bench.write_table(tmp_path / "t.npz", models=3, samples=2500, classes=20)
    table = ModelTable.open(tmp_path / "t.npz")
    assert (len(table), table.classes) == (2500, 20)
    accuracy = []
    for name in table.names:
        (logits,) = table.logits(name, rows=2500)
        accuracy.append(np.mean(logits.argmax(axis=1) == table.labels))
    assert 0.3 < accuracy[0] < accuracy[1] < accuracy[2] < 0.99


def test_fronts_that_differ_are_told_apart() -> None:
    signal = np.array([0.9, 0.8, 0.3, 0.2], np.float32)
    exits = Alone(
        {
            "a": Judgement(signal, np.array([True, True, False, False])),
            "b": Judgement(signal, np.array([True, False, True, True])),
        }
    )
    costs = {"a": 1.0, "b": 4.0}
    result, naive = search(exits, costs), bench.naive_search(exits, costs, 2, 1)
    assert naive == [(2, 4.0), (3, 8.0), (4, 12.0)]
    assert bench.same_front(result, naive)
    assert not bench.same_front(result, naive[1:])
    assert not bench.same_front(result, [(2, 4.0), (3, 7.0), (4, 12.0)])


def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, capsys) -> None:
    sizes = ["--samples", "1000000000", "--folder", str(tmp_path)]
    assert run_command("bench", bench, sizes) == 2
    assert "free space in" in capsys.readouterr().err
    assert run_command("bench", bench, ["--models", "2"]) == 2
    assert list(tmp_path.iterdir()) == []
