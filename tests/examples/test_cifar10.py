"""The committed CIFAR-10 bundle: its size, its budgets, and its figures where the images are."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from edge_runtime import Bundle
from engines.macs import stage_macs
from tests.engines.test_mobilenets import DATA
from tests.meta.repository import ROOT, repository_files

BUNDLE = ROOT / "examples" / "cifar10" / "cifar10.bundle"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(BUNDLE)


def test_saver_and_base_keep_their_budgets(bundle: Bundle) -> None:
    macs = stage_macs(bundle)
    assert macs["saver"] <= 8e6
    assert sum(count for name, count in macs.items() if name.startswith("segment")) <= 80e6


def test_all_committed_bundles_together_are_small() -> None:
    files = [ROOT / name for name in repository_files("examples") if ".bundle/" in name]
    assert {path.relative_to(ROOT / "examples").parts[0] for path in files} == {
        "cifar10",
        "digits",
        "digits_vit",
    }
    assert sum(path.stat().st_size for path in files) < 10e6


@pytest.mark.parametrize("name", ["cifar10", "digits", "digits_vit"])
def test_stages_were_exported_as_they_are_in_torch(name: str) -> None:
    made = Bundle.open(ROOT / "examples" / name / f"{name}.bundle")
    errors = made.manifest.provenance["verification"]["worst_relative_error"]
    assert set(errors) == {s.name for s in made.manifest.stages if s.kind != "preprocess"}
    assert max(errors.values()) <= 1e-4


def test_the_saver_makes_it_faster_at_half_a_point(tmp_path: Path) -> None:
    """Measured in turn with the base; thresholds are of the training side."""
    archive = DATA / "cifar10_val.tar.gz"
    if not archive.is_file():
        pytest.skip(f"no images in {DATA}: EDGE_SHARED names the folder that has data/")
    with tarfile.open(archive) as tar:
        # Pythons before 3.11.4 have no filters and ignore this; later ones want one.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(tmp_path / "val")
    target = tmp_path / "evaluation.json"
    # One thread, as the thresholds were chosen for; a process has one pool, so in its own.
    arguments = ["evaluate", BUNDLE, "--data", tmp_path / "val", "--threads", "1", "--json", target]
    command = [sys.executable, "-m", "edge_runtime.cli", *map(str, arguments)]
    subprocess.run([*command, "--operating-point", "drop_0.5_saver"], check=True, cwd=ROOT)
    evaluation = json.loads(target.read_text())["evaluation"]
    assert evaluation["base_accuracy"] > 0.8
    assert evaluation["accuracy"] >= evaluation["base_accuracy"] - 0.005
    assert 1 / evaluation["time_ratio"]["value"] >= 1.7
