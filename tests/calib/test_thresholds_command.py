"""Choosing operating points through the command line, and what ends up in the bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import edge_runtime as er
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
