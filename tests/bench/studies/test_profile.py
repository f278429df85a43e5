"""A profile adds up: what layers cost follows from what stages took, round by round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.studies.profile import Spread
from tests.bench.studies.bundles import layered_bundle, layered_images
from tests.bench.studies.command import interrupt_after, names, result, rows, study
from tests.meta.repository import ROOT

DIGITS = ROOT / "examples" / "digits"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("profile")
    bundle = layered_bundle(folder / "a.bundle")
    study("profile", bundle.path, "--rounds", "40", "--warmup", "10", "--out", folder / "out")
    return folder / "out"


def test_files_are_written_and_stamped(out: Path) -> None:
    assert names(out) == {"profile.json", "profile.csv", "profile_rounds.csv", "profile.png"}
    found = result(out, "profile")
    assert found["rounds"] == 40 and found["warm_up"] == 10 and not found["interrupted"]
    assert found["environment"]["packages"]["onnxruntime"]
    assert found["command"].startswith("edge-runtime study profile /")
    assert "--rounds 40" in found["command"]


def test_a_layer_costs_its_share_of_the_segment_and_its_head(out: Path) -> None:
    every = rows(out / "profile_rounds.csv")
    assert [row["warm_up"] for row in every] == ["1"] * 10 + ["0"] * 40
    ms = {
        name: np.array([float(row[f"{name}_ms"]) for row in every[10:]])
        for name in ("segment1", "segment2", "segment3", "segment4", "head_1", "head_2", "head_4")
    }
    expected = {
        "none": [ms["segment1"] / 2, ms["segment3"] / 2, ms["segment4"]],
        "lph": [ms["segment1"] / 2 + ms["head_1"], ms["segment2"] + ms["head_2"]],
        "gah": [ms["segment3"] / 2 + ms["head_4"]],
    }
    groups = {group["group"]: group for group in result(out, "profile")["groups"]}
    assert list(groups) == list(expected)
    for name, series in expected.items():
        found = groups[name]["seconds"]
        assert found["count"] == 40 * len(series)
        for key, statistic in (("median", np.median), ("mean", np.mean), ("max", np.max)):
            assert found[key] * 1e3 == pytest.approx(statistic(series), rel=1e-4)
        assert found["std"] * 1e3 == pytest.approx(np.std(series, ddof=1), rel=1e-3)
    over = groups["gah"]["over_none"]
    ratio = np.median(expected["gah"]) / np.median(np.mean(expected["none"], axis=0))
    assert over["value"] == pytest.approx(ratio, rel=1e-4)
    assert groups["none"]["members"] == "layers 0, 3, 5"


def test_without_provenance_stages_are_grouped_by_kind(capsys) -> None:
    study("profile", DIGITS / "digits.bundle", "--rounds", "20", "--warmup", "0")
    text = capsys.readouterr().out
    assert "says nothing of its layers and necks" in text
    assert "stages by kind" in text


def test_data_is_profiled_on_where_it_is_given(tmp_path: Path) -> None:
    bundle = layered_bundle(tmp_path / "a.bundle")
    images, labels = layered_images(100)
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    more = ["--data", tmp_path / "data.npz", "--json", tmp_path / "found.json"]
    study("profile", bundle.path, "--rounds", "20", "--warmup", "0", *more)
    assert '"64 of 100"' in (tmp_path / "found.json").read_text()


def test_ctrl_c_keeps_the_rounds_that_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    bundle = layered_bundle(tmp_path / "a.bundle")
    arguments = ["profile", bundle.path, "--rounds", "200", "--warmup", "5", "--out"]
    with monkeypatch.context() as context:
        # Three frames of noise are run when a cascade is opened, not by classify.
        interrupt_after(30, context)
        study(*arguments, tmp_path / "some", code=130)
        interrupt_after(10, context)
        study(*arguments, tmp_path / "few", code=130)
    found = result(tmp_path / "some", "profile")
    assert found["interrupted"] and found["rounds"] == 25
    assert len(rows(tmp_path / "some" / "profile_rounds.csv")) == 30
    assert names(tmp_path / "few") == set()


STEADY = np.full(100, 1e-3)


@pytest.mark.parametrize(
    ("seconds", "reason"),
    [
        (STEADY, ""),
        (np.stack([STEADY, 5 * STEADY]), ""),
        (np.concatenate([STEADY, 1.3 * STEADY]), "drift +30%"),
        (np.tile([0.8e-3, 1.2e-3], 50), "spread 40%"),
        (np.tile([1e-3] * 9 + [9e-3], 10), "outliers"),
        (np.zeros(100), "too short for the clock"),
    ],
    ids=["steady", "members that differ", "drift", "spread", "outliers", "nothing"],
)
def test_unstable_rounds_are_marked(seconds: np.ndarray, reason: str) -> None:
    found = Spread.of(seconds).unstable
    assert found == reason if not reason else reason in found
