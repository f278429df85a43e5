"""The check measures and simulates the same runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.simulate import check
from edge_runtime import OperatingPoint
from edge_runtime.cli import run_command
from tests.toys import toy_bundle, toy_images


def test_simulated_and_measured_means_are_of_one_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = toy_bundle(tmp_path / "toy.bundle")
    thresholds: dict[str, float | None] = {"saver": 0.5, "middle": 0.4}
    bundle.write_operating_point(
        OperatingPoint("zero_loss", thresholds=thresholds, bundle=bundle.hash)
    )
    np.savez(tmp_path / "data.npz", images=toy_images(40), labels=np.arange(40) % 4)
    words = [str(bundle.path), "--data", str(tmp_path / "data.npz")]
    words += ["--seconds", "0.5", "--json", str(tmp_path / "found.json")]
    program = "python -m bench.simulate.check"
    assert run_command(program, check, [*words, "--runs", "1"]) == 2
    assert "--runs: got 1, expected >= 2" in capsys.readouterr().err
    assert run_command(program, check, [*words, "--runs", "2"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    runs = found["runs"]
    assert len(runs) == 2 and min(run["rounds"] for run in runs) >= 299
    for run in runs:
        assert run["own_ratio"] == pytest.approx(
            run["own"]["latency"]["mean"] / run["measured"]["mean"]
        )
    # Half to double: a stage that is forgotten or counted twice shows, a busy machine does not.
    assert 0.5 < np.median([run["own_ratio"] for run in runs]) < 2
    low, high = found["p99_interval"]
    assert [low, high] == sorted(run["measured"]["p99"] for run in runs)
