"""The tools that choose from tables agree with each other and with the cascade that then runs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from calib.cascade_search.methods import Method
from calib.cascade_search.study import Settings, Study
from calib.model_table import ModelTable
from edge_runtime import cli
from edge_runtime.console import Console
from edge_runtime.load import load
from edge_runtime.operating_point import OperatingPoint

DIGITS = Path(__file__).parents[2] / "examples/digits"
BUNDLE = DIGITS / "digits.bundle"
NAMES = ("saver", "middle", "final")
#: MACs of each exit's path.
COSTS = {"saver": 2240.0, "middle": 88_704_640.0, "final": 265_651_840.0}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predictions on the images for thresholds and for the test."""
    folder = tmp_path_factory.mktemp("tables")
    for name in ("thresholds", "test"):
        command = ["collect", str(BUNDLE), "--data", str(DIGITS / f"{name}.npz")]
        assert cli.main([*command, "--out", str(folder / f"{name}.npz")]) == 0
    (folder / "costs.csv").write_text(
        "model,cost\n" + "".join(f"{name},{cost}\n" for name, cost in COSTS.items())
    )
    return folder


def images(name: str) -> np.ndarray:
    with np.load(DIGITS / f"{name}.npz") as file:
        return np.asarray(file["images"]).reshape(-1, 8, 8, 1)


def result(command: list[str], folder: Path) -> dict:
    assert cli.main([*command, "--json", str(folder / "result.json")]) == 0
    found: dict = json.loads((folder / "result.json").read_text())
    return found


def test_what_search_and_savers_promise_is_what_runs(tables: Path, tmp_path: Path) -> None:
    table = ["--logits", str(tables / "thresholds.npz"), "--costs", str(tables / "costs.csv")]
    found = result(["search", *table, "--repeats", "0"], tmp_path)
    point = found["operating_points"]["zero_loss"]
    assert point["models"] == ["saver", "middle"] and point["deployable"]
    savers = result(
        [
            "savers",
            *table,
            "--test",
            str(tables / "test.npz"),
            "--base",
            "middle",
            "--repeats",
            "0",
        ],
        tmp_path,
    )
    best = savers["bases"]["middle"]["ranking"][0]
    assert best["saver"] == "saver"
    for threshold, rate in (
        (point["thresholds"][0], point["exit_rates"][0]),
        (best["threshold"], best["exit_ratio"]),
    ):
        # A cascade of the first two exits: the second one always answers.
        ran = OperatingPoint("searched", thresholds={"saver": threshold, "middle": 0.0})
        with load(BUNDLE, operating_point=ran, image_size=(8, 8)) as cascade:
            answers = [cascade(image) for image in images("thresholds")]
        # Batches of other sizes round the last bits differently: count who stands that near.
        signals = np.array([answer.trace.exits[0].signal for answer in answers])
        near = int(np.sum(np.abs(signals - threshold) <= 1e-6))
        left = sum(answer.exit == "saver" for answer in answers)
        assert abs(left - rate * len(answers)) <= near + 1e-6
        assert near == 0


def test_what_thresholds_promises_is_what_runs(tmp_path: Path) -> None:
    data = ["--data", str(DIGITS / "thresholds.npz")]
    found = result(["thresholds", str(BUNDLE), *data, "--repeats", "0", "--dry-run"], tmp_path)
    (point,) = [one for one in found["operating_points"] if one["name"] == "zero_loss"]
    ran = OperatingPoint("again", thresholds=point["thresholds"])
    with load(BUNDLE, operating_point=ran, image_size=(8, 8)) as cascade:
        answers = [cascade(image) for image in images("thresholds")]
    for name, rate in point["expected"]["in_sample"]["exit_rates"].items():
        measured = sum(answer.exit == name for answer in answers) / len(answers)
        assert measured == pytest.approx(rate, abs=1 / len(answers))


def test_the_search_s_cross_validated_interval_covers_the_other_half(
    tables: Path, tmp_path: Path
) -> None:
    """50 halves of digits: the drop on the half that the search has not seen."""
    parts = [np.load(tables / f"{name}.npz") for name in ("thresholds", "test")]
    full = {name: np.concatenate([part[name] for part in parts]) for name in (*NAMES, "labels")}
    console = Console(stdout=io.StringIO(), stderr=io.StringIO())
    covered: dict[str, list[bool]] = {}
    for seed in range(50):
        order = np.random.default_rng(seed).permutation(len(full["labels"]))
        seen, unseen = order[: len(order) // 2], order[len(order) // 2 :]
        np.savez(tmp_path / "half.npz", **{name: values[seen] for name, values in full.items()})
        table = ModelTable.open(tmp_path / "half.npz")
        study = Study(table, [Method()], Settings(COSTS, repeats=10), console)
        study.prepare()
        outcome = study.run(Method())
        other = {name: values[unseen] for name, values in full.items()}
        reference = right(other, outcome.result.reference.models, ())
        for name, figures in outcome.held_out.items():
            point = outcome.points.points[name]
            assert point is not None
            drop = reference.mean() - right(other, point.models, point.thresholds).mean()
            low, high = figures.interval_on(len(unseen))
            covered.setdefault(name, []).append(bool(low <= drop <= high))
    shares = {name: float(np.mean(hits)) for name, hits in covered.items()}
    assert set(shares) >= {"zero_loss", "drop_0.5", "drop_1.0", "max_accuracy"}
    assert min(shares.values()) >= 0.9, shares


def right(
    table: dict[str, np.ndarray], models: tuple[str, ...], thresholds: tuple[float | None, ...]
) -> np.ndarray:
    """Whether a cascade is right on each sample, the plain way."""
    found = table[models[-1]].argmax(1) == table["labels"]
    for name, threshold in reversed(list(zip(models[:-1], thresholds, strict=False))):
        logits = table[name].astype(np.float64)
        powers = np.exp(logits - logits.max(1, keepdims=True))
        signal = (powers / powers.sum(1, keepdims=True)).max(1)
        if threshold is not None:
            correct = table[name].argmax(1) == table["labels"]
            found = np.where(signal >= threshold, correct, found)
    return found
