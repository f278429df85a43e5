"""`edge-runtime search` from tables to JSON, text and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from calib.cascade_search.methods import COMPARED
from calib.time_left import TimeLeft
from edge_runtime import cli
from tests.calib.model_tables import doubling_costs, logits_table, write_costs, write_table

OPERATING_POINTS = [
    "zero_loss",
    "drop_0.01",
    "drop_0.1",
    "drop_0.5",
    "drop_1.0",
    "max_accuracy",
    "max_improvement",
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    arrays = logits_table(300, 3)
    write_table(tmp_path / "t.npz", arrays)
    write_table(tmp_path / "t2.npz", logits_table(200, 3, seed=1))
    write_costs(tmp_path / "c.csv", doubling_costs(arrays))
    return tmp_path


def arguments(data: Path, *more: str) -> list[str]:
    return ["search", "--logits", str(data / "t.npz"), "--costs", str(data / "c.csv"), *more]


def search(data: Path, *more: str) -> dict:
    target = data / "result.json"
    assert cli.main(arguments(data, "--json", str(target), *more)) == 0
    found: dict = json.loads(target.read_text())
    return found


def test_the_result_has_what_others_read(data: Path) -> None:
    found = search(data, "--repeats", "1")
    assert list(found["models"]) == ["net.0", "net.1", "net.2"]
    assert set(found["models"]["net.0"]) == {"accuracy", "cost"}
    assert found["single_front"] == ["net.0", "net.1", "net.2"]
    assert found["reference"] == {"model": "net.2", **found["models"]["net.2"]}
    for point in found["front"]:
        keys = {"models", "thresholds", "accuracy", "cost", "exit_rates", "deployable", "why_not"}
        assert set(point) == keys
        assert len(point["models"]) == len(point["exit_rates"]) == len(point["thresholds"]) + 1
        assert sum(point["exit_rates"]) == pytest.approx(1)
        assert (point["deployable"], point["why_not"]) == (True, None)
    accuracies = [point["accuracy"] for point in found["front"]]
    assert accuracies == sorted(set(accuracies))
    assert list(found["operating_points"]) == OPERATING_POINTS
    zero_loss = found["operating_points"]["zero_loss"]
    assert zero_loss["accuracy"] >= found["reference"]["accuracy"]
    assert zero_loss["cross_validation"]["repeats"] == 1
    assert found["unreached"] == {}
    assert set(found["improvement"]) == {"average", "max", "curve", "ranges"}
    assert found["improvement"]["max"] == max(factor for _, factor in found["improvement"]["curve"])


def test_three_models_cost_no_more_than_two(data: Path) -> None:
    two = search(data, "--repeats", "0")
    three = search(data, "--repeats", "0", "--models", "3", "--stride", "1")
    assert (two["stride"], three["stride"]) == (None, 1)
    assert three["improvement"]["average"] >= two["improvement"]["average"]
    assert three["operating_points"]["zero_loss"]["cross_validation"] is None
    assert max(len(point["models"]) for point in three["front"]) == 3


def test_what_can_not_be_deployed_says_why(data: Path, capsys) -> None:
    found = search(data, "--ensemble", "mean_softmax", "--temperature", "--repeats", "0")
    reasons = {p["why_not"] for p in found["front"] if len(p["models"]) == 2}
    assert reasons == {"the runtime does not ensemble: an exit answers with its own logits"}
    assert set(found["method"]["temperatures"]) == set(found["models"])
    assert "points can't be deployed: the runtime does not ensemble" in capsys.readouterr().out


def test_predictions_without_logits_are_searched_by_their_confidence(data: Path) -> None:
    arrays = logits_table(50, 2)
    logits = arrays.pop("net.1")
    arrays["net.1.pred"] = logits.argmax(axis=1)
    arrays["net.1.conf"] = logits.max(axis=1)
    write_table(data / "t.npz", arrays)
    write_costs(data / "c.csv", {"net.0": 1.0, "net.1": 5.0})
    found = search(data, "--metric", "conf", "--repeats", "0")
    assert found["models"]["net.1"]["accuracy"] == np.mean(logits.argmax(1) == arrays["labels"])
    assert {point["deployable"] for point in found["front"][1:]} == {False}


def test_a_shift_is_reported_beside(data: Path, capsys) -> None:
    found = search(data, "--shift", str(data / "t2.npz"), "--repeats", "0")
    shift = found["shift"]
    assert shift["samples"] == 200
    assert len(shift["front"]) == len(found["front"])
    for here, there in zip(found["front"], shift["front"], strict=True):
        assert there["thresholds"] == here["thresholds"]
        change = there["accuracy"] - here["accuracy"]
        assert there["change"]["accuracy"] == pytest.approx(change)
    assert list(shift["operating_points"]) == OPERATING_POINTS
    assert "the same on" in capsys.readouterr().out


def test_budgets_and_ranges(data: Path, capsys) -> None:
    found = search(
        data, "--budget", "2", "--budget", "0.5", "--range", "60", "65", "--repeats", "0"
    )
    assert found["operating_points"]["budget_2"]["cost"] <= 2
    assert found["operating_points"]["budget_0.5"] is None
    assert "nothing achieves a mean cost of at most 0.5" in found["unreached"]["budget_0.5"]
    assert "budget_0.5: not reached" in capsys.readouterr().out
    (part,) = found["improvement"]["ranges"]
    assert (part["from"], part["to"]) == (0.6, 0.65)


def test_the_twelve_methods_side_by_side(data: Path, capsys) -> None:
    found = search(data, "--compare-methods", "--plot", str(data / "figure3.png"))
    assert list(found["methods"]) == [str(method) for method in COMPARED]
    out = capsys.readouterr().out
    for method in COMPARED:
        alone = search(
            data,
            "--metric",
            method.metric,
            "--ensemble",
            method.ensemble,
            "--repeats",
            "0",
            *(["--temperature"] if method.scaled else []),
        )
        compared = found["methods"][str(method)]
        assert compared["improvement"] == alone["improvement"]
        assert compared["operating_points"] == alone["operating_points"]
        assert f"{compared['improvement']['average']:.3f}" in out
    assert "locally largest improvement" in out
    assert (data / "figure3.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_one_method(data: Path) -> None:
    search(data, "--shift", str(data / "t2.npz"), "--plot", str(data / "p.svg"), "--repeats", "0")
    assert "times cheaper" in (data / "p.svg").read_text()


def test_an_interrupted_search_leaves_nothing_behind(data: Path, capsys, monkeypatch) -> None:
    step = TimeLeft.step

    def interrupted(self: TimeLeft, count: int = 1) -> None:
        step(self, count)
        if self._done == 2:
            raise KeyboardInterrupt

    before = sorted(data.iterdir())
    monkeypatch.setattr(TimeLeft, "step", interrupted)
    plot, target = str(data / "p.png"), str(data / "r.json")
    assert cli.main(arguments(data, "--plot", plot, "--json", target)) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert sorted(data.iterdir()) == before


def bad_table(data: Path) -> None:
    arrays = logits_table(300, 3)
    arrays["net.1"][7, 2] = np.nan
    write_table(data / "t.npz", arrays)


def one_model(data: Path) -> None:
    write_table(data / "t.npz", logits_table(300, 1))
    write_costs(data / "c.csv", {"net.0": 1.0})


def other_models(data: Path) -> None:
    write_table(data / "t2.npz", logits_table(200, 2))


def other_classes(data: Path) -> None:
    write_table(data / "t2.npz", logits_table(200, 3, classes=7))


def no_cost(data: Path) -> None:
    write_costs(data / "c.csv", {"net.0": 1.0, "net.1": 2.0})


def unknown_cost(data: Path) -> None:
    names = ("net.0", "net.1", "net.2", "net.3")
    write_costs(data / "c.csv", dict.fromkeys(names, 1.0))


@pytest.mark.parametrize(
    ("prepare", "more", "message"),
    [
        (bad_table, [], "array 'net.1', row 7, class 2: got nan, expected a finite float32 number"),
        (one_model, [], "t.npz: models: got one, 'net.0', expected at least 2"),
        (other_models, ["--shift"], "t.npz has the model 'net.2', "),
        (other_classes, ["--shift"], "t2.npz: classes of the array 'net.0': got 7, expected 6"),
        (no_cost, [], "c.csv: there is no cost for the model 'net.2'"),
        (unknown_cost, [], "c.csv: the table has no model 'net.3'"),
        (None, ["--cost-column", "seconds"], "there is no column 'seconds'. Valid: cost, model"),
        (
            None,
            ["--compare-methods", "--metric", "entropy"],
            "--metric has no use beside --compare",
        ),
        (None, ["--compare-methods", "--temperature"], "--temperature has no use beside"),
        (None, ["--range", "90", "80"], "--range: got 90 80, expected 0 <= FROM < TO <= 100"),
        (None, ["--range", "0", "1"], "an accuracy range for the improvement: got "),
        (None, ["--folds", "1"], "--folds: got 1, expected >= 2"),
        (None, ["--plot", "p.gif"], "--plot p.gif: expected a file .pdf, .png, .svg"),
    ],
)
def test_bad_input_is_one_line(data: Path, capsys, prepare, more: list[str], message: str) -> None:
    if prepare is not None:
        prepare(data)
    if more == ["--shift"]:
        more = ["--shift", str(data / "t2.npz")]
    assert cli.main(arguments(data, *more)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert message in captured.err
