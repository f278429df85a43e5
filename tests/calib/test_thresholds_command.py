"""Choosing operating points through the command line, and what ends up in the bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import edge_runtime as er
from calib.guarantee import learning_part
from edge_runtime import Bundle, OperatingPoint, cli
from tests.toys import toy_bundle, toy_images


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A bundle, and images labelled by its own last exit, with every tenth label wrong."""
    bundle = toy_bundle(tmp_path / "toy.bundle")
    images = toy_images(300)
    point = OperatingPoint("base", policy="never")
    with er.load(bundle, operating_point=point, image_size=(5, 7)) as cascade:
        labels = np.array([p.label for p in cascade(images)])
    labels[::10] = (labels[::10] + 1) % 4
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    return tmp_path


@pytest.fixture
def easy(toy: Path) -> Path:
    """The same, with labels by the first exit for all but the 30 images it is least sure of."""
    data = np.load(toy / "data.npz")
    images, labels = data["images"], data["labels"]
    point = OperatingPoint("all", thresholds={"saver": 0.0})
    with er.load(toy / "toy.bundle", operating_point=point, image_size=(5, 7)) as cascade:
        predictions = cascade(images)
    sure = np.argsort([p.confidence for p in predictions])[30:]
    labels[sure] = np.array([p.label for p in predictions])[sure]
    np.savez(toy / "data.npz", images=images, labels=labels)
    return toy


def thresholds(toy: Path, *more: str) -> dict:
    target = toy / "result.json"
    arguments = ["thresholds", str(toy / "toy.bundle"), "--data", str(toy / "data.npz")]
    assert cli.main([*arguments, "--repeats", "2", "--json", str(target), *more]) == 0
    found: dict = json.loads(target.read_text())
    return found


def test_points_are_written_and_run_as_expected(toy: Path) -> None:
    found = thresholds(toy, "--drop", "5", "--latency-budget-ms", "1000")
    bundle = Bundle.open(toy / "toy.bundle")
    assert list(bundle.operating_points()) == ["budget_1000ms", "drop_5", "zero_loss"]
    data = np.load(toy / "data.npz")
    for written in found["operating_points"]:
        point = bundle.operating_point(written["name"])
        assert point.bundle == bundle.hash
        assert point.chosen_on["samples"] == 300
        assert set(point.expected["cross_validation"]) >= {"drop", "interval", "below"}
        with er.load(bundle, operating_point=point, image_size=(5, 7)) as cascade:
            predictions = cascade(data["images"])
        in_sample = point.expected["in_sample"]
        correct = np.mean([p.label == y for p, y in zip(predictions, data["labels"], strict=True)])
        assert correct == pytest.approx(in_sample["accuracy"])
        for name, rate in in_sample["exit_rates"].items():
            assert np.mean([p.exit == name for p in predictions]) == pytest.approx(rate)


def test_zero_loss_loses_nothing_in_sample(toy: Path) -> None:
    (point, *_) = thresholds(toy)["operating_points"]
    in_sample = point["expected"]["in_sample"]
    assert in_sample["accuracy"] >= in_sample["base_accuracy"] == pytest.approx(0.9)


def test_a_dry_run_writes_nothing(toy: Path) -> None:
    found = thresholds(toy, "--dry-run")
    assert found["files"] == []
    assert Bundle.open(toy / "toy.bundle").operating_points() == {}


@pytest.mark.parametrize("metric", ["max_softmax", "entropy", "softmax_margin", "logits_margin"])
def test_every_metric_can_be_chosen(toy: Path, metric: str) -> None:
    found = thresholds(toy, "--metric", metric, "--dry-run")
    assert {point["metric"] for point in found["operating_points"]} == {metric}


def test_cross_validated_figures_come_first(toy: Path, capsys) -> None:
    thresholds(toy, "--dry-run")
    out = capsys.readouterr().out
    assert out.index("cross-validated") < out.index("they were chosen on")


def test_a_budget_that_nothing_meets(toy: Path, capsys) -> None:
    arguments = ["thresholds", str(toy / "toy.bundle"), "--data", str(toy / "data.npz")]
    code = cli.main([*arguments, "--latency-budget-ms", "1e-6"])
    err = capsys.readouterr().err
    assert code == 1
    assert "cheapest choice costs" in err
    assert Bundle.open(toy / "toy.bundle").operating_points() == {}


def test_a_guarantee_becomes_a_point_that_runs(easy: Path, capsys) -> None:
    found = thresholds(easy, "--guarantee", "--epsilon", "0.02", "--delta", "0.1")
    out = capsys.readouterr().out
    bundle = Bundle.open(easy / "toy.bundle")
    point = bundle.operating_point("guaranteed")
    promise = point.expected["guarantee"]
    assert found["guarantee"] == promise
    assert (promise["epsilon"], promise["delta"], promise["certified"]) == (0.02, 0.1, True)
    assert point.chosen_on["goal"] == "a drop of at most 2 points with 90 % confidence"
    assert "With 90 % confidence the cascade is at most 2 points less accurate" in out
    assert "zero_loss, which promises nothing, takes" in out
    data = np.load(easy / "data.npz")
    with er.load(bundle, operating_point=point, image_size=(5, 7)) as cascade:
        predictions = cascade(data["images"])
    right = np.array([p.label for p in predictions]) == data["labels"]
    in_sample = point.expected["in_sample"]
    assert right.mean() == pytest.approx(in_sample["accuracy"])
    assert in_sample["exit_rates"]["saver"] > 0.5
    # Whether some are kept to learn from depends on what the exits cost here.
    kept = learning_part(300, seed=0) if promise["learnt"] else []
    tested = np.setdiff1d(np.arange(300), kept)
    assert (promise["tested"], promise["learnt"]) == (len(tested), len(kept))
    base_alone = OperatingPoint("base", policy="never")
    with er.load(bundle, operating_point=base_alone, image_size=(5, 7)) as cascade:
        base = np.array([p.label for p in cascade(data["images"])]) == data["labels"]
    assert promise["lost"] == np.count_nonzero(base[tested] & ~right[tested])
    assert promise["won"] == np.count_nonzero(right[tested] & ~base[tested]) > 0


def test_where_nothing_can_be_promised_the_point_is_the_base(toy: Path, capsys) -> None:
    found = thresholds(toy, "--guarantee", "--part", "1/3", "--guarantee-name", "safe")
    point = Bundle.open(toy / "toy.bundle").operating_point("safe")
    assert (point.policy, point.expected["pays"]) == ("never", False)
    assert not found["guarantee"]["certified"]
    assert found["verdicts"]["safe"].startswith("Nothing can be promised here: 100 images do not")
    assert "It takes at least 299, even if none is lost." in capsys.readouterr().out


def test_temperatures_are_fitted_chosen_with_and_shown(toy: Path, capsys) -> None:
    found = thresholds(
        toy, "--temperature", "--plot", str(toy / "out.png"), "--guarantee", "--epsilon", "0.2"
    )
    bundle = Bundle.open(toy / "toy.bundle")
    free, guaranteed = (bundle.operating_point(name) for name in ("zero_loss", "guaranteed"))
    assert free.temperatures["final"] > 1.1  # one label in ten is wrong, and it knows nothing of it
    # Those of the promise have not seen the images that it was tested on.
    assert found["guarantee"]["learnt"] == 60
    assert guaranteed.temperatures != free.temperatures
    states = found["reliability"]["final"]
    assert states["after"]["nll"] < states["before"]["nll"]
    assert "confidence of each exit" in capsys.readouterr().out
    assert (toy / "out.png").read_bytes().startswith(b"\x89PNG")
    data = np.load(toy / "data.npz")
    with er.load(bundle, operating_point=free, image_size=(5, 7)) as cascade:
        predictions = cascade(data["images"])
    for name, rate in free.expected["in_sample"]["exit_rates"].items():
        assert np.mean([p.exit == name for p in predictions]) == pytest.approx(rate)


def test_without_cross_validation_it_says_so(toy: Path, capsys) -> None:
    thresholds(toy, "--repeats", "0", "--dry-run")
    assert "Not cross-validated" in capsys.readouterr().out


def test_exits_that_may_not_be_used_are_neither_run_nor_chosen(toy: Path, capsys) -> None:
    found = thresholds(toy, "--exits", "saver", "--suffix", "alone", "--drop", "5")
    assert list(Bundle.open(toy / "toy.bundle").operating_points()) == [
        "drop_5_alone",
        "zero_loss_alone",
    ]
    for point in found["operating_points"]:
        assert list(point["thresholds"]) == ["saver"]
        assert "head1" not in point["chosen_on"]["stage_seconds"]
    assert cli.main(["thresholds", str(toy / "toy.bundle"), "--data", "x", "--exits", "savr"]) == 2
    assert "the cascade has no exit 'savr'. Did you mean 'saver'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epsilon", "0.01"], "--epsilon says nothing without --guarantee"),
        (["--guarantee-name", "x"], "--guarantee-name says nothing without --guarantee"),
        (["--guarantee", "--epsilon", "1"], "epsilon of a guarantee: got 1.0"),
        (["--guarantee", "--delta", "0"], "delta of a guarantee: got 0.0"),
        (["--guarantee", "--guarantee-name", "a/b"], "name of an operating point: got 'a/b'"),
        (["--guarantee", "--guarantee-name", "zero_loss"], "is the name of another point"),
        (["--plot", "out.gif"], "--plot out.gif: expected a file .pdf, .png, .svg"),
    ],
)
def test_options_that_do_not_fit(options: list[str], message: str, capsys) -> None:
    """They are refused before the bundle is looked for."""
    assert cli.main(["thresholds", "none.bundle", "--data", "none", *options]) == 2
    assert message in capsys.readouterr().err
