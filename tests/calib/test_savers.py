"""Savers against a brute force over all thresholds, sample by sample, and the command."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.cascade_search.signals import Judgement
from calib.saver_crossval import Repeats, cross_validate_pair
from calib.saver_selection import PairCurve, operating_points, rank_savers, replay
from calib.side_by_side import Stopped, side_by_side
from edge_runtime import cli
from tests.calib.model_tables import Arrays, logits_table, write_costs, write_table

LOWEST = -1.0
#: Drops in points, as TinySaver's Table 5 has them; None is the highest accuracy.
WANTED = {
    "drop_1.0": 1.0,
    "drop_0.5": 0.5,
    "drop_0.1": 0.1,
    "drop_0.01": 0.01,
    "zero_loss": 0.0,
    "max_accuracy": None,
}

Models = dict[str, Judgement]


def random_models(draw: st.DrawFn, samples: int) -> Models:
    """Four models whose signals have few values, so that ties are common."""
    values = st.lists(
        st.sampled_from([-1.0, 0.1, 0.25, 0.5, 0.7]), min_size=samples, max_size=samples
    )
    right = st.lists(st.booleans(), min_size=samples, max_size=samples)
    return {
        name: Judgement(np.array(draw(values), np.float32), np.array(draw(right)))
        for name in ("a", "b", "c", "d")
    }


def leave(models: Models, saver: str, threshold: float | None) -> list[bool]:
    return [
        threshold is not None and value >= np.float32(threshold) for value in models[saver].signal
    ]


def plain_rows(models: Models, pair: tuple[str, str], costs: dict[str, float]) -> list[Any]:
    """(leaving, saver right, base right, correct, cost) of each threshold."""
    saver, base = models[pair[0]], models[pair[1]]
    samples = len(saver.signal)
    rows = []
    for threshold in [None, *sorted(set(saver.signal.tolist()), reverse=True)]:
        gone = leave(models, pair[0], threshold)
        saver_right = sum(bool(g and s) for g, s in zip(gone, saver.correct, strict=True))
        base_right = sum(bool(g and b) for g, b in zip(gone, base.correct, strict=True))
        correct = saver_right + sum(
            bool(not g and b) for g, b in zip(gone, base.correct, strict=True)
        )
        paid = sum(costs[pair[0]] + (0 if g else costs[pair[1]]) for g in gone)
        rows.append((sum(gone), saver_right, base_right, correct, paid / samples))
    return rows


def plain_point(models: Models, pair: tuple[str, str], costs: dict[str, float], name: str) -> Any:
    """(leaving, correct, cost) of an operating point."""
    rows = plain_rows(models, pair, costs)
    base = int(models[pair[1]].correct.sum())
    samples = len(models[pair[0]].signal)
    drop = WANTED[name]
    most = max(row[3] for row in rows)
    # Points of accuracy as whole hundredths of a point: nothing is rounded.
    good = [
        row
        for row in rows
        if (
            row[3] == most
            if drop is None
            else (base - row[3]) * 10000 <= round(drop * 100) * samples
        )
    ]
    best = min(good, key=lambda row: row[4])
    return best[0], best[3], pytest.approx(best[4], rel=1e-12)


COSTS = {"a": 1.0, "b": 2.0, "c": 2.0, "d": 7.0}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ranking_equals_brute_force_and_the_matched_threshold_does_what_it_says(
    data: st.DataObject,
) -> None:
    models = random_models(data.draw, data.draw(st.integers(1, 12)))
    samples = len(models["a"].signal)
    for base, cheaper in {"d": "abc", "c": "a", "b": "a", "a": ""}.items():
        ranking = rank_savers(models, COSTS, base, LOWEST)
        assert {one.saver for one in ranking} == set(cheaper)
        deltas = [one.delta for one in ranking]
        assert deltas == sorted(deltas)
        for one in ranking:
            rows = plain_rows(models, (one.saver, base), COSTS)
            ratio = max(row[0] for row in rows if row[1] >= row[2]) / samples
            assert one.exit_ratio == ratio
            assert one.delta == pytest.approx(COSTS[one.saver] / COSTS[base] - ratio)
            assert np.mean(leave(models, one.saver, one.threshold)) == ratio
            if one.threshold is not None:
                assert float(np.float32(one.threshold)) == one.threshold


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_operating_points_equal_brute_force_and_their_thresholds_replay(
    data: st.DataObject,
) -> None:
    models = random_models(data.draw, data.draw(st.integers(1, 12)))
    # Repeated, so that 1 and 0.5 points are whole samples.
    models = {
        name: Judgement(np.tile(one.signal, 100), np.tile(one.correct, 100))
        for name, one in models.items()
    }
    models["d"].correct[: data.draw(st.integers(0, 7))] = True
    pair = ("a", "d")
    points = operating_points(PairCurve.of(models, pair, COSTS, LOWEST))
    assert set(points) == set(WANTED)
    for name, point in points.items():
        want = plain_point(models, pair, COSTS, name)
        assert (point.counts[0], point.correct, point.cost) == want
        again, worse, better = replay(models, pair, (1.0, 7.0), point.thresholds[0])
        assert (again.counts, again.correct, again.cost) == (point.counts, *want[1:])
        assert better - worse == point.correct - models["d"].correct.sum()


def test_what_can_not_be_reached_is_a_loss_of_the_whole_saver() -> None:
    signal = np.linspace(0, 1, 10, dtype=np.float32)
    wrong = Judgement(signal, np.zeros(10, bool))
    models = {"saver": wrong, "base": Judgement(signal, np.ones(10, bool))}
    costs = {"saver": 1.0, "base": 4.0}
    (candidate,) = rank_savers(models, costs, "base", 0.0)
    assert (candidate.exit_ratio, candidate.threshold, candidate.delta) == (0, None, 0.25)
    points = operating_points(PairCurve.of(models, ("saver", "base"), costs, 0.0))
    assert {point.cost for point in points.values()} == {5.0}
    assert {point.accuracy for point in points.values()} == {1.0}


def test_a_saver_that_is_never_worse_answers_everything_at_the_lowest_signal() -> None:
    signal = np.array([0.2, 0.4, 0.4, 0.9], np.float32)
    right = np.array([True, False, True, True])
    models = {"saver": Judgement(signal, right), "base": Judgement(signal, right)}
    (candidate,) = rank_savers(models, {"saver": 1.0, "base": 4.0}, "base", 0.125)
    assert (candidate.exit_ratio, candidate.threshold, candidate.delta) == (1, 0.125, -0.75)


def test_held_out_figures_equal_a_plain_loop_over_the_folds() -> None:
    generator = np.random.default_rng(3)
    models = {
        name: Judgement(
            (generator.integers(0, 30, 203) / 30).astype(np.float32), generator.random(203) < share
        )
        for name, share in (("a", 0.6), ("d", 0.7))
    }
    found = cross_validate_pair(models, ("a", "d"), COSTS, LOWEST, Repeats(2, 3, seed=5))
    again = np.random.default_rng(5)
    drops = dict.fromkeys(WANTED, 0)
    paid = dict.fromkeys(WANTED, 0.0)
    for _ in range(2):
        fold_of = again.permutation(np.arange(203) % 3)
        for fold in range(3):
            seen, unseen = (
                {n: Judgement(one.signal[rows], one.correct[rows]) for n, one in models.items()}
                for rows in (fold_of != fold, fold_of == fold)
            )
            for name, point in operating_points(PairCurve.of(seen, ("a", "d"), COSTS, -1)).items():
                gone = np.array(leave(unseen, "a", point.thresholds[0]))
                answers = np.where(gone, unseen["a"].correct, unseen["d"].correct)
                drops[name] += int(unseen["d"].correct.sum()) - int(answers.sum())
                paid[name] += len(gone) * 1.0 + (~gone).sum() * 7.0
    for name, one in found.items():
        assert one.drop == pytest.approx(drops[name] / 406)
        assert one.cost == pytest.approx(paid[name] / 406)
        assert one.interval[0] <= one.drop <= one.interval[1]


def test_work_side_by_side_keeps_its_order_and_stops_when_some_of_it_fails() -> None:
    stop = threading.Event()

    def slow_first(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0)
        return item * item

    assert side_by_side(slow_first, range(5), stop) == [0, 1, 4, 9, 16]
    assert not stop.is_set()

    def fail_or_wait(item: int) -> None:
        if item == 0:
            raise ValueError("the first")
        if stop.wait(30):
            raise Stopped

    begin = time.monotonic()
    with pytest.raises(ValueError, match="the first"):
        side_by_side(fail_or_wait, range(2), stop)
    assert time.monotonic() - begin < 10


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Tables of the same four models on other samples, and what they cost."""
    for name, samples, seed in (("train", 300, 0), ("test", 400, 1)):
        write_table(tmp_path / f"{name}.npz", logits_table(samples, 4, seed=seed))
    costs = {"net.0": 1.0, "net.1": 2.0, "net.2": 5.0, "net.3": 30.0}
    write_costs(tmp_path / "costs.csv", costs)
    return tmp_path


def arguments(files: Path, *more: str, base: str = "all") -> list[str]:
    tables = ["--logits", str(files / "train.npz"), "--test", str(files / "test.npz")]
    return ["savers", *tables, "--costs", str(files / "costs.csv"), "--base", base, *more]


def test_the_command_gives_ranking_columns_and_picture(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = files / "out.json", files / "out.png"
    more = ["--json", str(out), "--plot", str(picture), "--repeats", "1", "--best", "2"]
    assert cli.main(arguments(files, *more)) == 0
    found = json.loads(out.read_text())
    assert list(found["bases"]) == ["net.3", "net.2", "net.1", "net.0"]
    assert found["bases"]["net.0"] == {"saver": None, "ranking": [], "pairs": []}
    base = found["bases"]["net.3"]
    assert base["saver"] == base["ranking"][0]["saver"]
    assert [pair["saver"] for pair in base["pairs"]] == [one["saver"] for one in base["ranking"]][
        :2
    ]
    for pair in base["pairs"]:
        assert pair["deployable"]
        assert set(pair["trained"]) == set(pair["oracle"]) == set(WANTED)
        matched = pair["trained"]["zero_loss"]["train"]
        (ranked,) = [one for one in base["ranking"] if one["saver"] == pair["saver"]]
        assert matched["threshold"] == ranked["threshold"]
        assert matched["exit_ratio"] == ranked["exit_ratio"] == pair["train"]["exit_ratio"]
        for name, oracle in pair["oracle"].items():
            trained = pair["trained"][name]
            assert trained["cross_validation"]["samples"] == 300
            measured = trained["test"]
            assert measured["threshold"] == trained["train"]["threshold"]
            low, high = measured["interval"]
            assert low <= measured["drop"] <= high
            if WANTED[name] is not None:
                limit = WANTED[name] / 100 + 1e-9
                assert max(oracle["drop"], trained["train"]["drop"]) <= limit
                assert measured["drop"] > limit or oracle["cost"] <= measured["cost"] + 1e-9
            else:
                assert oracle["accuracy"] >= measured["accuracy"]
            assert measured["percent_of_base"] == pytest.approx(measured["cost"] / 30 * 100)
    text = capsys.readouterr().out
    assert "oracle:" in text
    assert "net.0: no model is cheaper, so it has no saver" in text
    assert "a cost above 100 % of the base's is a loss" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_predictor_without_logits_can_be_ranked_but_not_deployed(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, samples in (("train", 300), ("test", 400)):
        arrays: Arrays = dict(np.load(files / f"{name}.npz"))
        logits = arrays.pop("net.2")
        arrays |= {"net.2.pred": logits.argmax(1), "net.2.conf": logits.max(1)}
        write_table(files / f"{name}.npz", arrays)
        assert len(logits) == samples
    assert cli.main(arguments(files, "--metric", "conf", "--repeats", "0", base="net.3")) == 0
    text = capsys.readouterr().out
    assert "net.3 - net.2 can't be deployed: the runtime judges logits, and the table has" in text
    assert cli.main(arguments(files, base="net.3")) == 2
    assert "'net.2' has no logits. It can only be searched with --metric conf" in (
        capsys.readouterr().err
    )


def test_one_table_for_both_is_told(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "test.npz").write_bytes((files / "train.npz").read_bytes())
    assert cli.main(arguments(files, "--repeats", "0", base="net.1,net.2")) == 0
    assert "what is said of the test table is in sample" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--base", "net.9"], 2, "--base: the tables have no model 'net.9'. Did you mean 'net."),
        (["--base", "net.3,net.3"], 2, "--base names a model twice: got net.3,net.3"),
        (
            ["--base", "net.0"],
            2,
            "--base net.0: no model is cheaper, so it has no saver. Give a dearer",
        ),
        (["--folds", "1"], 2, "--folds: got 1, expected >= 2"),
        (["--folds", "200"], 1, "cross-validation in 200 folds: got 300, expected >= 400"),
        (["--cost-column", "joules"], 2, "there is no column 'joules'"),
        (["--plot", "out.gif"], 2, "--plot out.gif: expected a file .pdf, .png, .svg in"),
    ],
)
def test_what_is_asked_wrongly(
    files: Path, more: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(files, *more)) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def spoil(files: Path, what: str) -> None:
    arrays: Arrays = dict(np.load(files / "test.npz"))
    if what == "nan":
        arrays["net.2"][17, 4] = np.nan
    elif what == "models":
        arrays["net.x"] = arrays.pop("net.1")
    elif what == "classes":
        arrays = logits_table(400, 4, classes=7)
    elif what == "length":
        arrays["net.1"] = arrays["net.1"][:-1]
    write_table(files / "test.npz", arrays)
    if what == "one":
        for name in ("train", "test"):
            arrays = {"labels": arrays["labels"], "net.0": arrays["net.0"]}
            write_table(files / f"{name}.npz", arrays)
        write_costs(files / "costs.csv", {"net.0": 1.0})
    if what == "cost":
        (files / "costs.csv").write_text("model,cost\nnet.0,1\nnet.1,2\nnet.2,5\n")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", "test.npz: array 'net.2', row 17, class 4: got nan, expected a finite"),
        ("models", "the tables differ: "),
        ("classes", "classes of the array 'net.0': got 7, expected 6 as in"),
        ("length", "samples of the array 'net.1': got 399, expected 400 as in 'labels'"),
        ("one", "train.npz: models: got one, 'net.0', expected at least 2"),
        ("cost", "there is no cost for the model 'net.3'"),
    ],
)
def test_bad_tables_are_one_line_that_names_what_is_wrong(
    files: Path, what: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(files, what)
    assert cli.main(arguments(files)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", [name for name in WANTED if name != "max_accuracy"])
def test_a_search_of_two_models_finds_the_same_points(files: Path, name: str) -> None:
    arrays: Arrays = dict(np.load(files / "train.npz"))
    pair = {key: arrays[key] for key in ("labels", "net.2", "net.3")}
    write_table(files / "train.npz", pair)
    write_table(files / "test.npz", pair)
    write_costs(files / "costs.csv", {"net.2": 5.0, "net.3": 30.0})
    out = files / "out.json"
    more = ["--repeats", "0", "--json", str(out)]
    assert cli.main(arguments(files, *more, base="net.3")) == 0
    ours = json.loads(out.read_text())["bases"]["net.3"]["pairs"][0]["oracle"][name]
    logits, costs = str(files / "train.npz"), str(files / "costs.csv")
    assert cli.main(["search", "--logits", logits, "--costs", costs, *more]) == 0
    found = json.loads(out.read_text())["operating_points"][name]
    assert found["models"] == ["net.2", "net.3"]
    assert found["thresholds"] == [ours["threshold"]]
    assert found["cost"] == pytest.approx(ours["cost"], rel=1e-12)
    assert found["accuracy"] == ours["accuracy"]
    assert found["exit_rates"][0] == ours["exit_ratio"]
