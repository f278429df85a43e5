"""How long variants take is measured in turn."""

from __future__ import annotations

from pathlib import Path

import pytest

from calib.variant_times import variant_times
from edge_runtime import BackendError
from edge_runtime.backends.onnxrt import OnnxRuntimeBackend
from tests.calib.precision_toys import (
    FASTER,
    SLOWER,
    UNSURE,
    opener,
    quiet,
    slow,
    times_of,
    toy_data,
    trained_models,
    write_toy,
)


class TestTimes:
    """Both precisions are timed in turn."""

    def test_fast_and_slow_variants_are_told_apart(self, tmp_path: Path) -> None:
        models = trained_models()
        bundle = write_toy(
            tmp_path / "b",
            {"segment1": models["segment1"], "head2": slow(models["head2"])},
            defaults={"segment1": slow(models["segment1"])},
        )
        times = variant_times(bundle, "int8", toy_data(), quiet(), opener(bundle), rounds=60)
        assert times.faster == ("segment1",)
        assert list(times.not_faster) == ["head2"]
        assert times.not_faster["head2"].startswith("slower here: ")
        assert list(times.seconds) == [stage.name for stage in bundle.cascade.stages]
        assert list(times.seconds["head1"]) == ["fp32"]
        own = times.seconds["segment1"]
        assert times.ratios["segment1"].value == pytest.approx(own["int8"] / own["fp32"])
        assert times.saved("segment1") == own["fp32"] - own["int8"] > 0
        assert times.stage_seconds({"segment1": "int8"})["segment1"] == own["int8"]
        assert times.stage_seconds({})["segment1"] == own["fp32"]

    def test_a_backend_that_does_not_know_is_refused(self, tmp_path: Path, monkeypatch) -> None:
        bundle = write_toy(tmp_path / "b", {"head1": trained_models()["head1"]})
        monkeypatch.setattr(OnnxRuntimeBackend, "asynchronous", True)
        with pytest.raises(BackendError, match="does not tell how long"):
            variant_times(bundle, "int8", toy_data(), quiet(), opener(bundle), rounds=2)

    def test_an_interval_decides_not_its_middle(self, tmp_path: Path) -> None:
        bundle = write_toy(tmp_path / "b", {})
        times = times_of(bundle, {"saver": UNSURE, "head1": FASTER, "head2": SLOWER})
        assert times.faster == ("head1",)
        assert times.not_faster == {
            "saver": "not clearly faster here: 0.950 [0.850, 1.020] of its time",
            "head2": "slower here: 1.400 [1.300, 1.500] of its time",
        }
