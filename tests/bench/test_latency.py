"""The bench command on a small bundle: it measures what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import OperatingPoint, cli
from tests.toys import toy_bundle, toy_images


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder: Path = tmp_path_factory.mktemp("bench")
    bundle = toy_bundle(folder / "toy.bundle")
    bundle.write_operating_point(
        OperatingPoint("zero_loss", thresholds={"saver": 0.49}, bundle=bundle.hash)
    )
    np.savez(folder / "data.npz", images=toy_images(40), labels=np.arange(40) % 4)
    arguments = ["bench", str(bundle.path), "--data", str(folder / "data.npz")]
    target = folder / "result.json"
    assert cli.main([*arguments, "--duration", "0.5", "--json", str(target)]) == 0
    result: dict = json.loads(target.read_text())
    return result


def test_three_subjects_are_measured_equally_often(found: dict) -> None:
    assert list(found["subjects"]) == ["cascade", "base", "base as one session"]
    counts = {subject["latency"]["count"] for subject in found["subjects"].values()}
    assert counts == {40 * found["passes"]}


def test_the_cascade_s_ratio_to_itself_is_one(found: dict) -> None:
    ratio = found["subjects"]["cascade"]["mean_time_over_cascade"]
    assert ratio == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_the_verdict_agrees_with_the_ratio(found: dict) -> None:
    evaluation = found["evaluation"]
    assert evaluation["pays"] == (evaluation["time_ratio"]["high"] < 1)
    base = found["subjects"]["base"]["mean_time_over_cascade"]["value"]
    assert base == pytest.approx(1 / evaluation["time_ratio"]["value"], rel=1e-6)


def test_the_device_is_stamped(found: dict) -> None:
    assert found["device"]["packages"]["onnxruntime"]
