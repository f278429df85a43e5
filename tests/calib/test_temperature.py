"""Temperatures, and how confidence is compared with accuracy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from calib.reliability_plot import plot
from calib.temperature import (
    fit_temperature,
    fit_temperatures,
    held_out_reliability,
    reliability,
)
from edge_runtime import confidence
from edge_runtime.errors import CalibrationError


def calibrated(samples: int, classes: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from their softmax."""
    generator = np.random.default_rng(seed)
    logits = (3 * generator.normal(size=(samples, classes))).astype(np.float32)
    below = np.exp(log_softmax(logits, axis=1)).cumsum(axis=1) < generator.random((samples, 1))
    return logits, below.sum(axis=1).clip(max=classes - 1)


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
def test_what_a_network_overstates_is_taken_back(factor: float) -> None:
    logits, labels = calibrated(20_000)
    scaled = (factor * logits).astype(np.float32)
    temperature = fit_temperature(scaled, labels)
    assert temperature == pytest.approx(factor, rel=0.03)
    before, after = reliability(scaled, labels), reliability(scaled, labels, temperature)
    assert after.ece < 0.015
    assert after.nll <= before.nll
    if factor != 1:
        assert before.ece > 0.05


@pytest.mark.parametrize("samples", [40, 5000])
def test_no_other_temperature_is_less_surprised(samples: int) -> None:
    logits, labels = calibrated(samples, seed=2)
    logits[:, 0] += 30  # far from zero, as some logits are
    logits[:, 1:] += 28

    def nll(temperature: float) -> float:
        return -float(log_softmax(logits / temperature, axis=1)[range(samples), labels].mean())

    best = minimize_scalar(nll, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-7})
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(best.x, rel=1e-4)
    assert fitted == float(np.float32(fitted))
    assert reliability(logits, labels, fitted).nll == pytest.approx(best.fun, rel=1e-5)


def test_no_temperature_where_the_data_determines_none() -> None:
    logits, labels = calibrated(300)
    right = logits.argmax(axis=1)
    assert fit_temperature(logits, right) is None
    assert fit_temperature(logits, logits.argmin(axis=1)) is None
    fitted = fit_temperatures({"unsure": logits, "sure": 2 * logits}, labels)
    assert fitted["sure"] == pytest.approx(2 * fitted["unsure"], rel=1e-5)
    assert fit_temperatures({"perfect": logits}, right) == {}


def test_figures_of_four_samples() -> None:
    """Confidences 0.9, 0.75, 0.75 and 0.55 of two classes; the second and the last are wrong."""
    sure = np.array([0.9, 0.75, 0.75, 0.55])
    logits = np.log(np.stack([sure, 1 - sure], axis=1)).astype(np.float32)
    found = reliability(logits, np.array([0, 1, 0, 1]), bins=5)
    assert found.counts.tolist() == [0, 0, 1, 2, 1]
    assert found.confidence[2:].tolist() == pytest.approx([0.55, 0.75, 0.9])
    assert found.accuracy[2:].tolist() == [0, 0.5, 1]
    assert np.isnan(found.accuracy[:2]).all()
    assert found.ece == pytest.approx((1 * 0.55 + 2 * 0.25 + 1 * 0.1) / 4)
    assert found.nll == pytest.approx(-np.log([0.9, 0.25, 0.75, 0.45]).mean())


def test_confidence_is_that_of_the_runtime() -> None:
    logits, labels = calibrated(500)
    found = reliability(logits, labels, temperature=1.7, bins=1)
    runtime = confidence.decide(logits, "entropy", 1.7)
    assert found.confidence[0] == pytest.approx(runtime.confidence.mean(dtype=np.float64))
    assert found.accuracy[0] == np.mean(runtime.labels == labels)


def test_held_out_figures_do_not_flatter() -> None:
    flattered = []
    for seed in range(30):
        logits, labels = calibrated(40, seed=seed)
        fitted = fit_temperature(logits, labels) or 1.0
        flattered.append(
            held_out_reliability(logits, labels, seed=seed).nll
            - reliability(logits, labels, fitted).nll
        )
    assert min(flattered) > 0
    logits, labels = calibrated(5000)
    held_out = held_out_reliability(4 * logits, labels)
    assert held_out.samples == held_out.counts.sum() == 5000
    assert held_out.nll == pytest.approx(reliability(logits, labels).nll, rel=0.01)
    with pytest.raises(CalibrationError, match="samples for 5 folds: got 4, expected >= 5"):
        held_out_reliability(logits[:4], labels[:4])


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((0, 3)), [], r"got \(0, 3\) and \(0,\), expected \(samples, classes\)"),
        (np.zeros(3), [0], r"got \(3,\) and \(1,\)"),
        (np.zeros((3, 2)), [0, 1], r"got \(3, 2\) and \(2,\)"),
        (np.zeros((2, 2)), [0, 2], "the label of sample 1: got 2, expected a class index from 0"),
        (np.array([[0, 1], [math.nan, 1]]), [0, 1], "a logit of sample 1 is NaN or infinite"),
        (np.array([[0, math.inf], [0, 1]]), [0, 1], "a logit of sample 0 is NaN or infinite"),
    ],
)
def test_what_nothing_can_be_fitted_to(logits: np.ndarray, labels: list[int], message: str) -> None:
    for function in (fit_temperature, reliability, held_out_reliability):
        with pytest.raises(CalibrationError, match=message):
            function(logits.astype(np.float32), np.array(labels, np.int64))


def test_diagrams_of_all_exits_in_one_file(tmp_path: Path) -> None:
    logits, labels = calibrated(200)
    states = {"before": reliability(2 * logits, labels), "after": reliability(logits, labels)}
    plot(tmp_path / "few.svg", "toy", {"one": {"before": states["before"]}})
    plot(tmp_path / "many.svg", "toy", {f"exit{k}": states for k in range(4)})
    few, many = ((tmp_path / name).read_text() for name in ("few.svg", "many.svg"))
    for figure, shown in ((few, "before"), (many, "after")):
        assert f"{shown}: ECE {100 * states[shown].ece:.1f} %" in figure
    assert "exit exit3" in many and "after" not in few
