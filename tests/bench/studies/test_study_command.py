"""Options that don't belong together are refused before anything long begins."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.bench.studies.bundles import layered_bundle
from tests.bench.studies.command import study
from tests.toys import toy_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return layered_bundle(tmp_path / "a.bundle").path


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("profile", ["--thresholds", "0.8"], "--thresholds is an option of study thresholds"),
        ("profile", ["--metric", "entropy"], "--metric is an option of study thresholds and class"),
        ("profile", ["--part", "1/2"], "--part says nothing without --data"),
        ("profile", ["--rounds", "3"], "--rounds: got 3, expected >= 20"),
        ("profile", ["--image-size", "9x9"], "size of the images: got 9x9, expected 5x5"),
        ("classes", ["--warmup", "3"], "--warmup is an option of study profile"),
        ("thresholds", ["--operating-point", "a"], "--operating-point is an option of study cla"),
        ("thresholds", [], "study thresholds needs labelled images. Give --data PATH"),
        ("classes", [], "study classes needs labelled images"),
        ("profile", ["--mode", "split"], "--mode"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    bundle: Path, capsys, kind: str, more: list[str], message: str
) -> None:
    study(kind, bundle, *more, code=2)
    assert message in capsys.readouterr().err


def test_out_must_be_a_folder_or_become_one(bundle: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("mine")
    for out, message in (
        (tmp_path / "file", "got a file, expected a folder, new or not"),
        (tmp_path / "missing" / "out", "missing does not exist. Create it first"),
    ):
        study("profile", bundle, "--out", out, code=2)
        assert message in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_without_matplotlib_the_extra_is_named(
    bundle: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    study("profile", bundle, "--out", tmp_path / "out", code=3)
    assert "edge-runtime[bench]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["thresholds", "classes"])
def test_a_bundle_without_early_exits_is_refused(tmp_path: Path, capsys, kind: str) -> None:
    bundle = layered_bundle(tmp_path / "one.bundle", exits=()).path
    study(kind, bundle, "--data", "data.npz", code=2)
    assert "has no early exit: got one exit, final, expected two or more" in capsys.readouterr().err


def test_a_bundle_for_any_size_of_images_needs_one(tmp_path: Path, capsys) -> None:
    bundle = toy_bundle(tmp_path / "toy.bundle").path
    study("profile", bundle, code=2)
    assert "give --image-size HEIGHTxWIDTH" in capsys.readouterr().err.replace("or --", "give --")
    study("profile", bundle, "--image-size", "5x7", "--rounds", "20", "--warmup", "0")


def test_a_wrong_description_is_refused_on_one_line(tmp_path: Path, capsys) -> None:
    bundle = layered_bundle(tmp_path / "a.bundle", model={**MODEL, "layers": 0}).path
    study("profile", bundle, code=1)
    error = capsys.readouterr().err
    assert "provenance.model.layers: got 0, expected a whole number >= 1" in error
    assert error.count("\n") == 1


MODEL = {"layers": 1, "segments": {}, "exits": {}}
