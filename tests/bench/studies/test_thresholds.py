"""A study of thresholds says what a cascade at these thresholds does, image by image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_runtime as er
from bench.studies.turns import shuffled_rows
from edge_runtime.dataset import ImageDataset
from tests.bench.studies.bundles import layered_bundle, layered_images
from tests.bench.studies.command import interrupt_after, names, result, rows, study

THRESHOLDS = (0.6, 0.8, 0.95)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("thresholds")
    layered_bundle(folder / "a.bundle")
    images, labels = layered_images(120)
    np.savez(folder / "data.npz", images=images, labels=labels)
    more = ["--thresholds", "0.6,0.8,0.95", "--timed", "60"]
    study(*arguments(folder), *more, "--out", folder / "out")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return result(folder / "out", "thresholds")


def arguments(folder: Path) -> list[str | Path]:
    return ["thresholds", folder / "a.bundle", "--data", folder / "data.npz"]


def test_accuracy_and_exits_are_those_of_the_cascade(folder: Path, found: dict) -> None:
    images, labels = layered_images(120)
    left = set()
    for threshold, one in zip(THRESHOLDS, found["thresholds"], strict=True):
        names_ = ("exit_1", "exit_2", "exit_4")
        point = er.OperatingPoint("t", thresholds=dict.fromkeys(names_, threshold))
        with er.load(folder / "a.bundle", operating_point=point) as cascade:
            answers = [cascade(image) for image in images]
        right = np.array([a.label for a in answers]) == labels
        assert one["accuracy"] == right.mean()
        for at in one["exits"]:
            here = np.array([a.exit == at["exit"] for a in answers])
            assert at["count"] == here.sum()
            assert at["accuracy"] == (right[here].mean() if here.any() else None)
        left |= {at["exit"] for at in one["exits"] if at["count"]}
        assert one["same_exit"] == 1.0
    assert left == {"exit_1", "exit_2", "exit_4", "final"}


def test_formulas_count_layers_and_macs(found: dict) -> None:
    # A segment is 25 x 25, a head 25 x 4; the last segment makes logits itself.
    macs = np.array([725, 1450, 2175, 2275])
    for one in found["thresholds"]:
        counts = np.array([at["count"] for at in one["exits"]])
        assert one["layer_speed_up"] == pytest.approx(6 * 120 / (counts @ [2, 3, 5, 6]))
        assert one["mac_speed_up"] == pytest.approx(1975 * 120 / (counts @ macs))


def test_the_measured_speed_up_is_the_base_s_time_over_the_cascade_s(found: dict) -> None:
    assert found["timed"] == 60
    for one in found["thresholds"]:
        ratio = one["speed_up"]
        assert ratio["value"] == pytest.approx(found["base"]["seconds"] / one["seconds"])
        assert ratio["low"] <= ratio["value"] <= ratio["high"]


def test_the_table_has_every_exit_of_every_threshold(folder: Path, found: dict) -> None:
    assert names(folder / "out") == {"thresholds.json", "thresholds.csv", "thresholds.png"}
    table = rows(folder / "out" / "thresholds.csv")
    assert len(table) == 1 + 3 * 5
    assert float(table[0]["accuracy_percent"]) == pytest.approx(100 * found["base"]["accuracy"])
    for threshold in ("0.6", "0.8", "0.95"):
        shares = [row for row in table if row["threshold"] == threshold and row["exit"] != "all"]
        assert sum(float(row["share_percent"]) for row in shares) == pytest.approx(100, abs=1e-3)


def test_with_a_saver_the_formula_is_in_macs_alone(folder: Path, tmp_path: Path, capsys) -> None:
    layered_bundle(tmp_path / "a.bundle", saver=True)
    data = ["--data", folder / "data.npz", "--timed", "20", "--json", tmp_path / "f.json"]
    study("thresholds", tmp_path / "a.bundle", *data, "--thresholds", "0.9")
    assert "no layers: a saver comes first" in capsys.readouterr().out
    (one,) = er_json(tmp_path / "f.json")["thresholds"]
    counts = np.array([at["count"] for at in one["exits"]])
    assert one["layer_speed_up"] is None
    macs = counts @ np.array([100, 825, 1550, 2275, 2375])
    assert one["mac_speed_up"] == pytest.approx(1975 * 120 / macs)


def er_json(path: Path) -> dict[str, Any]:
    return result(path.parent, path.stem)


def test_ctrl_c_keeps_what_is_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A warm-up of 200 calls of each of two subjects, then 25 images and one subject more.
    more = ["--thresholds", "0.8", "--out"]
    monkeypatch.setattr("bench.studies.turns.warm_up", lambda work, clock: work())
    with monkeypatch.context() as context:
        interrupt_after(2 + 51, context)
        study(*arguments(folder), *more, tmp_path / "some", code=130)
        interrupt_after(2 + 8, context)
        study(*arguments(folder), *more, tmp_path / "none", code=130)
    found = result(tmp_path / "some", "thresholds")
    assert found["timed"] == 25 and found["interrupted"]
    without = result(tmp_path / "none", "thresholds")
    assert without["timed"] == 0 and without["base"]["seconds"] is None
    assert without["thresholds"][0]["accuracy"] == found["thresholds"][0]["accuracy"]
    assert "thresholds.png" in names(tmp_path / "none")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--thresholds", "0.8,high"], "got '0.8,high', expected numbers, such as 0.8,0.9,0.99"),
        (["--thresholds", ""], "got '', expected numbers"),
        (["--thresholds", "0.9,0.8"], "expected ascending numbers"),
        (["--thresholds", "0.9,0.9"], "expected ascending numbers"),
        (["--thresholds", "0"], "got 0, expected > 0 and <= 1 for max_softmax"),
        (["--thresholds", "0.5,1.5"], "got 1.5, expected > 0 and <= 1"),
        (["--thresholds", "nan"], "got nan, expected > 0"),
        (["--metric", "entropy"], "--thresholds: got 0.8, expected > -1.387 and <= 0 for entropy"),
        (["--thresholds", ",".join(f"0.{i:03}" for i in range(1, 60))], "59 numbers, expected <="),
        (["--data", "missing.npz"], "the data missing.npz does not exist"),
    ],
)
def test_bad_thresholds_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    study(*arguments(folder), *more, code=2)
    assert message in capsys.readouterr().err


def test_timed_images_are_random_and_of_all_classes() -> None:
    images, _ = layered_images(40)
    labels = np.repeat([0, 1, 2, 3], [25, 5, 5, 5])
    data = ImageDataset.from_arrays(images, labels, ["a", "b", "c", "d"])
    chosen = shuffled_rows(data, 16, 0)
    assert np.bincount(labels[chosen]).tolist() == [4, 4, 4, 4]
    assert len(set(chosen.tolist())) == 16
    assert chosen.tolist() != sorted(chosen.tolist())
    assert sorted(shuffled_rows(data, 1000, 0).tolist()) == list(range(40))
