"""A study of classes adds up, ranks what it should, and shows what they look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_runtime as er
from bench.studies.classes import ClassFigures, ends, wilson
from tests.bench.studies.bundles import layered_bundle, layered_images
from tests.bench.studies.command import interrupt_after, names, result, rows, study
from tests.meta.repository import ROOT

DIGITS = ROOT / "examples" / "digits"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("classes") / "out"
    data = ["--data", DIGITS / "test.npz"]
    study("classes", DIGITS / "digits.bundle", *data, "--operating-point", "drop_1", "--out", out)
    return out


@pytest.fixture(scope="module")
def found(out: Path) -> dict[str, Any]:
    return result(out, "classes")


def test_figures_are_those_of_the_cascade(found: dict) -> None:
    data = np.load(DIGITS / "test.npz")
    images, labels = data["images"], data["labels"]
    with er.load(DIGITS / "digits.bundle", operating_point="drop_1") as cascade:
        answers = [cascade(image.reshape(8, 8, 1)) for image in images]
    assert len(found["classes"]) == 10
    for one in found["classes"]:
        own = [a for a, label in zip(answers, labels, strict=True) if label == one["index"]]
        assert one["samples"] == len(own)
        assert one["accuracy"] == np.mean([a.label == one["index"] for a in own])
        shares = [np.mean([a.exit == name for a in own]) for name in found["exits"]]
        assert one["shares"] == pytest.approx(shares)
        assert one["most_common_exit"] == found["exits"][int(np.argmax(shares))]


def test_the_ends_are_ranked(found: dict) -> None:
    by_name = {one["name"]: one for one in found["classes"]}
    top, bottom = (
        [by_name[name]["accuracy"] for name in found["ends"]["accuracy"][end]]
        for end in ("top", "bottom")
    )
    assert len(top) == len(bottom) == 5
    assert sorted(top + bottom, reverse=True) == top + bottom
    fastest, slowest = (
        [by_name[name]["mean"] for name in found["ends"]["latency"][end]]
        for end in ("top", "bottom")
    )
    assert sorted(fastest + slowest) == fastest + slowest


def test_files_are_written(out: Path, found: dict) -> None:
    assert names(out) == {
        "classes.json",
        "classes.csv",
        "classes.png",
        "classes_all.png",
        "classes_samples_accuracy.png",
        "classes_samples_latency.png",
    }
    table = rows(out / "classes.csv")
    assert [row["class"] for row in table] == [one["name"] for one in found["classes"]]
    for row in table:
        shares = [float(row[f"{name}_share_percent"]) for name in found["exits"]]
        assert sum(shares) == pytest.approx(100, abs=1e-3)


@pytest.fixture
def layered(tmp_path: Path) -> Path:
    """A bundle, and data of three of its four classes, class by class."""
    layered_bundle(tmp_path / "a.bundle")
    images, labels = layered_images(90)
    keep = np.flatnonzero(labels != 2)
    keep = keep[np.argsort(labels[keep], kind="stable")]
    np.savez(tmp_path / "data.npz", images=images[keep], labels=labels[keep])
    return tmp_path


def arguments(layered: Path) -> list[str | Path]:
    return ["classes", layered / "a.bundle", "--data", layered / "data.npz"]


def test_classes_that_the_data_lacks_are_named(layered: Path, capsys) -> None:
    study(*arguments(layered), "--threshold", "0.8")
    text = capsys.readouterr().out
    assert "The data has no image of 1 of the bundle's classes: class 2" in text
    assert "the 1 most and the 1 least accurate" in text


def test_an_interrupted_study_still_has_all_classes(
    layered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("bench.studies.turns.warm_up", lambda work, clock: work())
    with monkeypatch.context() as context:
        interrupt_after(1 + 30, context)
        more = ["--threshold", "0.8", "--out", layered / "out"]
        study(*arguments(layered), *more, code=130)
    found = result(layered / "out", "classes")
    assert found["interrupted"] and found["measured"] == 30
    # The order is random: the first thirty images are not of the first class alone.
    assert [one["name"] for one in found["classes"]] == ["class 0", "class 1", "class 3"]


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--threshold", "1.5"], 2, "--threshold: got 1.5, expected > 0 and <= 1 for max_softmax"),
        (["--threshold", "high"], 2, "argument --threshold: got 'high', expected a number"),
        (["--threshold", "0.8", "--operating-point", "zero_loss"], 2, "expected one of them"),
        (["--metric", "entropy"], 2, "--metric says nothing without --threshold"),
        (["--operating-point", "zerro"], 1, "has no operating point 'zerro'"),
    ],
)
def test_bad_points_are_refused(
    layered: Path, capsys, more: list[str], code: int, message: str
) -> None:
    study(*arguments(layered), *more, code=code)
    assert message in capsys.readouterr().err


def test_names_that_look_like_formulas_and_many_classes_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.studies.classes_plot import plot_all, plot_ends

    exits = [f"exit_{k}" for k in range(3)]
    classes = [figures(f"a$\\frac{k}", k, exits) for k in range(104)]
    plot_all(tmp_path / "many.png", title="$1", classes=classes, exits=exits)
    plot_ends(tmp_path / "one.png", title="one class", classes=classes[:1], exits=exits)


def figures(name: str, k: int, exits: list[str], mean: float = 1.0) -> ClassFigures:
    shares = np.eye(len(exits))[k % len(exits)]
    middle = 0.5 + k / 400
    return ClassFigures(
        name, k, 9, middle, middle - 0.1, middle + 0.1, mean, mean, exits[0], tuple(shares)
    )


def test_no_class_is_at_both_ends_and_the_faster_wins_a_tie() -> None:
    classes = [figures("a", 0, ["x"], 3.0), figures("b", 0, ["x"], 1.0), figures("c", 9, ["x"])]
    top, bottom = ends(classes, "accuracy")
    assert [one.name for one in top] == ["c"]
    assert [one.name for one in bottom] == ["a"]
    assert [one.name for one in ends(classes, "latency")[0]] == ["c"]


def test_the_interval_is_wilson_s() -> None:
    # Newcombe, Statistics in Medicine 1998, Table I: 81 of 263 and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
