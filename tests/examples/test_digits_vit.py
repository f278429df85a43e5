"""The committed early-exit transformer: its figures, and its training in a shortened form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import edge_runtime as er
from edge_runtime import Bundle, OperatingPoint, cli
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset
from tests.meta.repository import ROOT

EXAMPLE = ROOT / "examples" / "digits_vit"
BUNDLE = EXAMPLE / "digits_vit.bundle"
TEST = ROOT / "examples" / "digits" / "test.npz"


def test_the_point_of_no_loss_is_within_a_point_of_the_full_model_and_half_as_fast_again(
    tmp_path: Path,
) -> None:
    """Measured in turn with its base, so that a busy machine slows both."""
    target = tmp_path / "evaluation.json"
    arguments = ["evaluate", str(BUNDLE), "--data", str(TEST)]
    assert cli.main([*arguments, "--json", str(target)]) == 0
    evaluation = json.loads(target.read_text())["evaluation"]
    assert evaluation["accuracy"] >= evaluation["base_accuracy"] - 0.01
    assert evaluation["base_accuracy"] > 0.93
    assert 1 / evaluation["time_ratio"]["value"] >= 1.5


def test_it_knows_its_layers_and_necks() -> None:
    model = Bundle.open(BUNDLE).manifest.provenance["model"]
    assert model["layers"] == 6
    assert {name: exit_["neck"] for name, exit_ in model["exits"].items()} == {
        "exit_0": "pool",
        "exit_1": "lph",
        "exit_3": "gah",
    }


@pytest.mark.torch
def test_its_training_in_a_shortened_form(tmp_path: Path) -> None:
    """It learns, and its stages say what the trained model says."""
    torch = pytest.importorskip("torch")
    from engines.training.config import load_training
    from engines.training.job import JobOptions, train

    recipe = load_training(EXAMPLE / "digits_vit.yaml", ["phases.0.epochs=10", "phases.1.epochs=1"])
    trained = train(recipe, tmp_path / "out", JobOptions(), Console())
    made = trained.bundle
    assert made is not None
    committed = Bundle.open(BUNDLE)
    assert [s.name for s in made.manifest.stages] == [s.name for s in committed.manifest.stages]
    data = ImageDataset.open(TEST, made.cascade.classes, channels=1)
    images, labels = next(data.batches(len(data)))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        want = trained.model((pixels - 0.5) / 0.5)
    with er.load(made, operating_point=OperatingPoint.all_exits(made.cascade)) as cascade:
        have = cascade.logits(images)
    for name, logits in want.items():
        assert np.abs(have[name] - logits.numpy()).max() <= 1e-4 * logits.abs().max()
    assert (have["exit_1"].argmax(1) == labels).mean() > 0.5
