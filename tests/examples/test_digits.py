"""The committed example: its data, its bundle, its operating points, its figures."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edge_runtime as er
from edge_runtime import Bundle, OperatingPoint, cli
from edge_runtime.dataset import ImageDataset, overlap
from tests.meta.repository import ROOT

DIGITS = ROOT / "examples" / "digits"
BUNDLE = DIGITS / "digits.bundle"


def data(name: str) -> ImageDataset:
    return ImageDataset.open(DIGITS / f"{name}.npz", [str(i) for i in range(10)], channels=1)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(BUNDLE)


@pytest.mark.torch
def test_training_thresholds_and_test_data_are_disjoint_and_everything() -> None:
    """The split of the training script is the one that was committed, and shares no image."""
    pytest.importorskip("torch")
    specification = importlib.util.spec_from_file_location("train", DIGITS / "train.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    train, thresholds, test = module.split()
    for made, name in ((thresholds, "thresholds"), (test, "test")):
        committed = data(name)
        np.testing.assert_array_equal(committed.labels, made.labels)
        assert overlap(committed, made) == len(made)
    assert overlap(train, thresholds) == overlap(train, test) == overlap(thresholds, test) == 0
    assert len(train) + len(thresholds) + len(test) == 1797


def test_bundle_and_data_are_small() -> None:
    files = [path for path in DIGITS.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) < 3e6


def test_points_were_chosen_on_this_bundle_and_the_committed_data(bundle: Bundle) -> None:
    thresholds = data("thresholds")
    for name in bundle.operating_points():
        point = bundle.operating_point(name)
        assert point.bundle == bundle.hash
        assert point.chosen_on["data"] == thresholds.hash
        assert point.chosen_on["samples"] == len(thresholds)


def test_zero_loss_is_as_accurate_as_the_base_within_half_a_point(bundle: Bundle) -> None:
    test = data("test")
    images, labels = next(test.batches(len(test)))
    accuracy = {}
    base = OperatingPoint("base", policy="never")
    for name, point in (("cascade", bundle.operating_point("zero_loss")), ("base", base)):
        with er.load(bundle, operating_point=point) as cascade:
            correct = [p.label == y for p, y in zip(cascade(images), labels, strict=True)]
        accuracy[name] = np.mean(correct)
    assert accuracy["base"] > 0.95
    assert accuracy["cascade"] >= accuracy["base"] - 0.005


def test_every_exit_is_used(bundle: Bundle) -> None:
    images, _ = next(data("test").batches(1000))
    with er.load(bundle) as cascade:
        exits = {prediction.exit for prediction in cascade(images)}
    assert exits == {"saver", "middle", "final"}


def test_batch_1_and_batch_64_leave_at_the_same_exits(bundle: Bundle) -> None:
    """But for samples within 1e-6 of a threshold, which are counted."""
    thresholds = bundle.operating_point("zero_loss").thresholds
    near = 0
    with er.load(bundle) as cascade:
        for images, _ in data("test").batches(64):
            for one, together in zip(images, cascade.classify(images), strict=True):
                (alone,) = cascade.classify(one[None])
                if any(
                    abs(run.signal - (thresholds.get(run.exit) or 9)) < 1e-6
                    for run in alone.trace.exits
                ):
                    near += 1
                else:
                    assert (alone.exit, alone.label) == (together.exit, together.label)
    assert near <= 4


def test_the_cascade_is_at_least_one_and_a_half_times_faster(tmp_path: Path) -> None:
    """Measured in turn with its base, so that a busy machine slows both."""
    target = tmp_path / "evaluation.json"
    arguments = ["evaluate", str(BUNDLE), "--data", str(DIGITS / "test.npz")]
    assert cli.main([*arguments, "--json", str(target)]) == 0
    evaluation = json.loads(target.read_text())["evaluation"]
    assert 1 / evaluation["time_ratio"]["value"] >= 1.5
    assert evaluation["pays"]


@pytest.mark.torch
@pytest.mark.slow
def test_the_training_script_makes_such_a_bundle(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, DIGITS / "train.py", "--out", tmp_path], check=True, cwd=ROOT, timeout=600
    )
    made = Bundle.open(tmp_path / "digits.bundle")
    assert [stage.name for stage in made.manifest.stages] == [
        stage.name for stage in Bundle.open(BUNDLE).manifest.stages
    ]
    for name in ("thresholds", "test"):
        path = tmp_path / f"{name}.npz"
        classes = [str(i) for i in range(10)]
        assert ImageDataset.open(path, classes, channels=1).hash == data(name).hash
    test = data("test")
    images, labels = next(test.batches(len(test)))
    with er.load(made, operating_point=OperatingPoint("base", policy="never")) as cascade:
        correct = [p.label == y for p, y in zip(cascade(images), labels, strict=True)]
    assert np.mean(correct) > 0.95
