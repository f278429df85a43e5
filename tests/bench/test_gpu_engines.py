"""The check of TensorRT engines, whole, on a stand-in for TensorRT's runtime."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.gpu import engines
from bench.gpu.lab import Lab, NotRun, SharedCuda
from bench.gpu.precisions import digits
from edge_runtime.backends.tensorrt import api
from edge_runtime.console import Console
from engines.tensorrt_build import BuiltEngine
from tests.tensorrt_on_fake_device import FakeTensorRT, make_plan


def few_digits() -> Any:
    bundle, images = digits()
    return bundle, images[:12]


def run(folder: Path, wrong: str = "") -> dict[str, Any]:
    """The check's result; the engine of stage and precision `wrong` computes something else."""
    trt = FakeTensorRT()

    def build(model: bytes, shapes: Mapping[str, tuple[int, ...]], stage: str) -> BuiltEngine:
        if stage == wrong:
            model = doubled(model)
        return BuiltEngine(make_plan(model, shapes, scratch_bytes=512), None, 512, 0.1, ())

    cuda = SharedCuda(trt.open_cuda())
    lab = Lab(cuda.open(), trt.open_cuda, scale=0.003)
    lab.begin(60.0)
    console = Console(stdout=io.StringIO(), stderr=io.StringIO())
    makers = {"digits": few_digits}
    found = engines.measure(lab, trt.module, makers, folder, 0.01, console, build)
    cuda.close_device()
    trt.check_all_is_closed()
    return found


def doubled(model: bytes) -> bytes:
    """The same with all weights of its last layer twice as large."""
    import onnx
    from onnx import numpy_helper

    made = onnx.load_from_string(model)
    weight = max(made.graph.initializer, key=lambda one: int(np.prod(one.dims)))
    weight.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(weight), weight.name))
    return bytes(made.SerializeToString())


def test_every_precision_in_every_mode(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert found["ok"], found["summary"]
    by_precision = found["models"]["digits"]
    assert set(by_precision) == {"not_run", "fp32", "fp16", "int8"}
    for precision in ("fp32", "fp16", "int8"):
        figures = by_precision[precision]
        assert figures["modes_agree"]
        assert figures["same_as_onnxruntime"] == 1.0
        assert figures["stages"]["head1"]["worst"] == 0.0
        assert figures["scratch_bytes"] == {"allocated": 512, "separate": 5 * 512}
        for place in ("first exit", "last exit"):
            times = figures[place]["us"]
            assert set(times) == {
                "graph", "polling", "sync", "one engine", "one engine with If",
            }  # fmt: skip
            assert all(value > 0 for value in times.values())
    assert found["summary"].startswith("graph at the last exit over the base as one engine: digits")


def test_an_engine_that_computes_something_else_is_found(tmp_path: Path) -> None:
    found = run(tmp_path, wrong="segment2 fp16")
    assert not found["ok"]
    assert found["too_far"] == ["digits fp16 segment2"]
    assert "too far from ONNX Runtime: digits fp16 segment2" in found["summary"]


def test_without_tensorrt_it_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = FakeTensorRT()
    monkeypatch.setattr(api, "OLDEST", {"no_such_tensorrt": (1, 0)})
    lab = Lab(SharedCuda(trt.open_cuda()).open(), trt.open_cuda)
    with pytest.raises(NotRun, match="neither"):
        engines.check(lab)
