"""Engines are built by TensorRT's real builder, with progress, Ctrl-C and a cache."""

import gc
import os
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime import cli
from edge_runtime.backends.tensorrt import api
from edge_runtime.engine_cache import EngineCache
from edge_runtime.errors import EngineBuildError
from edge_runtime.manifest import Bundle
from engines.tensorrt_build import BuildOptions, build_engine

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples/digits/digits.bundle"
STAGES = ["preprocess", "saver", "segment1", "head1", "segment2"]


def deep(convolutions: int, dtype: int = TensorProto.FLOAT) -> bytes:
    """A row of convolutions, all of them named."""
    random = np.random.default_rng(0)
    nodes, weights, tensor = [], [], "features"
    for i in range(convolutions):
        values = random.standard_normal((16, 16, 3, 3)).astype(
            helper.tensor_dtype_to_np_dtype(dtype)
        )
        weights.append(numpy_helper.from_array(values, f"weight{i}"))
        nodes += [
            helper.make_node("Conv", [tensor, f"weight{i}"], [f"c{i}"], f"conv{i}", pads=[1] * 4),
            helper.make_node("Sigmoid", [f"c{i}"], [f"s{i}"], f"sigmoid{i}"),
        ]
        tensor = f"s{i}"
    shape = [1, 16, 8, 8]
    graph = helper.make_graph(
        nodes,
        "deep",
        [helper.make_tensor_value_info("features", dtype, shape)],
        [helper.make_tensor_value_info(tensor, dtype, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return bytes(model.SerializeToString())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCache:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    return EngineCache()


def plans(cache: EngineCache) -> list[Path]:
    return sorted(cache.root.rglob("*.engine"))


@pytest.mark.tensorrt
class TestBuilder:
    def test_precision_is_that_of_the_graph(self, tensorrt: ModuleType) -> None:
        wide = build_engine(tensorrt, deep(3), {}, stage="wide")
        narrow = build_engine(tensorrt, deep(3, TensorProto.FLOAT16), {}, stage="narrow")
        assert wide.layers is not None and set(wide.layers.dtypes) == {"float32"}
        assert narrow.layers is not None and set(narrow.layers.dtypes) == {"float16"}
        assert wide.scratch_bytes and wide.plan != narrow.plan

    def test_it_tells_how_far_it_is_and_ctrl_c_ends_it(self, tensorrt: ModuleType) -> None:
        texts = []

        def report(text: str) -> None:
            texts.append(text)
            if "Building engine" in text:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build_engine(tensorrt, deep(600), {}, stage="deep", report=report)
        assert "Building engine" in texts[-1]

    def test_an_operator_that_tensorrt_lacks_is_named(self, tensorrt: ModuleType) -> None:
        node = helper.make_node("StringNormalizer", ["text"], ["out"], "the_node")
        tensors = [
            helper.make_tensor_value_info(n, TensorProto.STRING, [1]) for n in ("text", "out")
        ]
        graph = helper.make_graph([node], "g", tensors[:1], tensors[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        with pytest.raises(EngineBuildError, match=r"stage 'strings': TensorRT's parser refused"):
            build_engine(tensorrt, model.SerializeToString(), {}, stage="strings")

    def test_too_small_a_workspace_is_told(self, tensorrt: ModuleType) -> None:
        with pytest.raises(EngineBuildError, match=r"more than --workspace-mb 1: allow more"):
            build_engine(tensorrt, deep(2), {}, stage="deep", options=BuildOptions(workspace_mb=1))

    @pytest.mark.parametrize("interrupted", [False, True])
    def test_a_build_that_fails_leaves_nothing_to_the_collector(
        self, tensorrt: ModuleType, interrupted: bool
    ) -> None:
        """A builder that it frees inside of another call of TensorRT waits for ever."""

        def report(text: str) -> None:
            if interrupted and "Building engine" in text:
                raise KeyboardInterrupt

        model = deep(600) if interrupted else b"no model"
        with pytest.raises((EngineBuildError, KeyboardInterrupt)) as caught:
            build_engine(tensorrt, model, {}, stage="x", report=report)
        build = caught.traceback[1].frame.f_locals["build"]
        frames = [frame for frame, _ in traceback.walk_tb(build.error.__traceback__)]
        (inner,) = [frame for frame in frames if frame.f_code.co_name == "_run"]
        assert inner.f_locals == {}

    def test_the_collector_rests_while_tensorrt_logs(self, tensorrt: ModuleType) -> None:
        states = []

        class Beginning(str):
            def __hash__(self) -> int:
                states.append(gc.isenabled())
                return super().__hash__()

        log = api.Log(tensorrt, watch=(Beginning("some"),))
        log.native.log(tensorrt.ILogger.VERBOSE, "something")
        assert set(states) == {False}
        assert gc.isenabled()
        assert log.details == {"some": "something"}

    def test_measured_times_are_kept_and_foreign_ones_replaced(
        self, tensorrt: ModuleType, tmp_path: Path
    ) -> None:
        file = tmp_path / "times"
        file.write_bytes(b"of another TensorRT")
        build_engine(tensorrt, deep(1), {}, stage="deep", timing_cache=file)
        kept = file.read_bytes()
        assert kept != b"of another TensorRT"
        build_engine(tensorrt, deep(1), {}, stage="deep", timing_cache=file)
        assert file.read_bytes() == kept


@pytest.mark.tensorrt
class TestCommand:
    def test_all_engines_of_the_example(
        self, tensorrt: ModuleType, cache: EngineCache, capsys: pytest.CaptureFixture[str]
    ) -> None:
        build = ["build", str(DIGITS), "--without-gpu"]
        assert cli.main([*build, "--dry-run"]) == 0
        assert plans(cache) == []
        assert cli.main(build) == 0
        first = {path: path.stat().st_mtime_ns for path in plans(cache)}
        assert sorted(path.name.split(".")[0] for path in first) == sorted(STAGES)
        assert "reformats" in capsys.readouterr().out
        assert cli.main(build) == 0
        assert {path: path.stat().st_mtime_ns for path in plans(cache)} == first
        assert capsys.readouterr().out.count("kept") == len(STAGES)
        assert cli.main([*build, "--workspace-mb", "512"]) == 0
        assert len(plans(cache)) == 2 * len(STAGES)

    def test_two_builds_at_once_build_once(self, tensorrt: ModuleType, cache: EngineCache) -> None:
        command = [sys.executable, "-m", "tests.tensorrt_without_gpu", "build", str(DIGITS)]
        both = [
            subprocess.Popen(
                [*command, "--without-gpu"],
                cwd=ROOT,
                env=dict(os.environ),
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        texts = [process.communicate()[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], texts
        assert sum(text.count(" built ") for text in texts) == len(STAGES)
        assert sum(text.count(" kept ") for text in texts) == len(STAGES)
        assert len(plans(cache)) == len(STAGES)

    def test_ctrl_c_leaves_nothing_half_written(
        self,
        tensorrt: ModuleType,
        cache: EngineCache,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        import engines.build_command

        real = engines.build_command.build_engine

        def interrupted(*args: object, stage: str, **options: object) -> object:
            if stage.startswith("segment1"):
                raise KeyboardInterrupt
            return real(*args, stage=stage, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(engines.build_command, "build_engine", interrupted)
        assert cli.main(["build", str(DIGITS), "--without-gpu"]) == 130
        assert [path.name.split(".")[0] for path in plans(cache)] == ["preprocess", "saver"]
        assert all(not cache.verify(entry) for entry in cache.entries())

    def test_a_stage_that_tensorrt_refuses_fails_with_its_name(
        self, tensorrt: ModuleType, cache: EngineCache, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["build", str(DIGITS), "--without-gpu", "--workspace-mb", "1"]
        assert cli.main(command) == 1
        assert "segment1 fp32" in capsys.readouterr().err

    def test_a_precision_that_no_stage_has(
        self, tensorrt: ModuleType, cache: EngineCache, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["build", str(DIGITS), "--without-gpu", "--precision", "int4"]
        assert cli.main(command) == 2
        assert "no stage of the bundle" in capsys.readouterr().err

    def test_a_cache_that_can_not_be_written(
        self,
        tensorrt: ModuleType,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "file/cache"))
        assert cli.main(["build", str(DIGITS), "--without-gpu"]) == 1
        assert "EDGE_RUNTIME_CACHE" in capsys.readouterr().err


def test_without_tensorrt_the_command_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert cli.main(["build", str(DIGITS), "--without-gpu"]) == 3
    error = capsys.readouterr().err
    assert "python3-libnvinfer" in error and "edge-runtime[tensorrt]" in error


def test_too_old_a_tensorrt_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As a string "10.10" would come before "10.3", and "8.6" behind it.
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.2"))
    assert cli.main(["build", str(DIGITS), "--without-gpu"]) == 3
    assert "got 8.6.2, expected 10.3 or later" in capsys.readouterr().err


@pytest.mark.tensorrt
def test_without_a_gpu_the_command_refuses_to_build(
    tensorrt: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["build", str(DIGITS)]) == 3
    assert "engines are built on the device that runs them" in capsys.readouterr().err


def test_the_digest_of_the_model_is_part_of_the_key() -> None:
    """What a bundle's engine depends on is its ONNX file, not the bundle's place."""
    from edge_runtime.backends.tensorrt.keys import engine_key, precision_of
    from edge_runtime.engine_cache import EngineDevice

    bundle = Bundle.open(DIGITS)
    device = EngineDevice(
        gpu="Orin",
        compute_capability="8.7",
        driver="36.4",
        cuda="12.6",
        module="tensorrt",
        tensorrt="10.3.0",
        system="Linux",
        machine="aarch64",
    )
    stage = bundle.cascade.stages[1]
    key = engine_key(bundle, stage, precision_of(bundle, stage, {}), batch=1, device=device)
    assert key.model == bundle.record(stage.name).variants["fp32"].sha256
