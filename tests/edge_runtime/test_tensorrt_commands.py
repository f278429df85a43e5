"""Commands with `--backend tensorrt`, from build to bench, on a stand-in for TensorRT."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import edge_runtime as er
from edge_runtime import OperatingPoint, cli
from edge_runtime.backends.cuda import backend
from edge_runtime.engine_cache import EngineCache, EngineKey
from engines import build_command
from engines.bundle import with_variants
from engines.tensorrt_build import BuildOptions, BuiltEngine
from tests.edge_runtime.gated_toys import VARIANTS, gate_model, gate_point, gated_bundle
from tests.tensorrt_on_fake_device import FakeTensorRT, make_plan
from tests.toys import DENSE, toy_bundle, toy_images

COUNT = 40
MODES = ("graph", "polling", "sync", "run_all")
COMMANDS = ("evaluate", "thresholds", "verify", "bench")


class Robot:
    """A bundle with an operating point, data, and a device with a cache of engines.

    Args:
        folder: Where everything is written.
        fake: TensorRT and its devices.
    """

    def __init__(self, folder: Path, fake: FakeTensorRT) -> None:
        self.folder, self.fake = folder, fake
        self.bundle = toy_bundle(folder / "toy.bundle")
        self.images = toy_images(COUNT)
        with er.load(
            self.bundle,
            operating_point=OperatingPoint.forced(self.bundle.cascade, "saver"),
            image_size=(5, 7),
        ) as cascade:
            answers = [cascade(image) for image in self.images]
        labels = [one.label for one in answers]
        np.savez(folder / "data.npz", images=self.images, labels=labels)
        #: What the saver says of each image.
        self.signals = sorted(one.confidence for one in answers)
        self.write_point(self.signals[COUNT // 2])
        self.cache = EngineCache()

    def write_point(self, threshold: float) -> None:
        """Write the point that is taken by default."""
        self.bundle.write_operating_point(
            OperatingPoint(
                "zero_loss",
                thresholds={"saver": threshold, "middle": 0.9},
                bundle=self.bundle.hash,
            )
        )

    def run(self, command: str, *more: str) -> int:
        """The exit code of a command on the bundle."""
        data = [] if command == "build" else ["--data", str(self.folder / "data.npz")]
        own = ["--image-size", "5x7"] if command == "build" else []
        if command not in ("build", "verify"):
            own = ["--backend", "tensorrt"]
        own += ["--duration", "0.1"] if command == "bench" else []
        own += ["--repeats", "1"] if command == "thresholds" else []
        return cli.main([command, str(self.bundle.path), *data, *own, *more])

    def result(self, command: str, *more: str, code: int = 0) -> dict[str, Any]:
        """What a command writes as JSON."""
        target = self.folder / "result.json"
        assert self.run(command, *more, "--json", str(target)) == code
        self.fake.check_all_is_closed()
        found: dict[str, Any] = json.loads(target.read_text())
        return found

    def built_keys(self) -> list[EngineKey]:
        return [entry.key for entry in self.cache.entries() if entry.key is not None]

    def change_engine(self, stage: str, initializer: str, factor: float) -> None:
        """Multiply a constant of a stage's engine."""
        (key,) = (key for key in self.built_keys() if key.stage == stage)
        model = onnx.load_from_string(self.bundle.stage_model(stage, key.precision))
        (tensor,) = (one for one in model.graph.initializer if one.name == initializer)
        changed = (numpy_helper.to_array(tensor) * factor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(changed, initializer))
        self.cache.store(key, make_plan(model.SerializeToString(), key.shapes), {})


@pytest.fixture
def robot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Robot]:
    """No engine is built yet."""
    fake = FakeTensorRT()
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module)
    monkeypatch.setattr(backend, "open_cuda", fake.open_cuda)
    monkeypatch.setattr(build_command, "open_cuda", fake.open_cuda)
    monkeypatch.setattr(build_command, "build_engine", build_for_the_fake)
    yield Robot(tmp_path, fake)
    fake.check_all_is_closed()


@pytest.fixture
def built(robot: Robot) -> Robot:
    assert robot.run("build") == 0
    return robot


def build_for_the_fake(
    trt: Any,
    model: bytes,
    shapes: dict[str, tuple[int, ...]],
    *,
    stage: str,
    options: BuildOptions,
    **_: Any,
) -> BuiltEngine:
    """Takes the place of `engines.tensorrt_build.build_engine`."""
    plan = make_plan(model, shapes, scratch_bytes=1000, version=trt.__version__)
    return BuiltEngine(plan, None, 1000, 0.1, ())


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line of an error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


class TestWithEngines:
    """What was built is found by every other command."""

    @pytest.mark.parametrize("mode", [None, *MODES])
    def test_evaluate(self, built: Robot, mode: str | None) -> None:
        found = built.result("evaluate", *(["--mode", mode] if mode else []))
        exits = {one["exit"]: one["share"] for one in found["evaluation"]["exits"]}
        on_host = built.result("evaluate", "--backend", "onnxrt")
        assert exits == {one["exit"]: one["share"] for one in on_host["evaluation"]["exits"]}
        assert exits["saver"] == pytest.approx(0.5)
        assert found["evaluation"]["accuracy"] == on_host["evaluation"]["accuracy"]

    @pytest.mark.parametrize("mode", [None, "polling", "sync"])
    def test_thresholds(self, built: Robot, mode: str | None) -> None:
        found = built.result("thresholds", *(["--mode", mode] if mode else []))
        assert {point["name"] for point in found["operating_points"]} >= {"zero_loss", "drop_1"}
        for point in found["operating_points"]:
            # By the device's clock: an engine is two kernels of a microsecond.
            seconds = point["chosen_on"]["stage_seconds"]
            assert set(seconds) == {stage.name for stage in built.bundle.cascade.stages}
            assert list(seconds.values()) == pytest.approx([2e-6] * len(seconds))
            assert point["chosen_on"]["backend"] == "tensorrt"
        assert built.run("evaluate") == 0

    @pytest.mark.parametrize("mode", ["graph", "run_all"])
    def test_thresholds_need_a_mode_that_times_stages(
        self, built: Robot, mode: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert built.run("thresholds", "--mode", mode) == 2
        assert "stages can't be timed" in one_line(capsys)

    @pytest.mark.parametrize("mode", MODES)
    def test_bench(self, built: Robot, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
        found = built.result("bench", "--mode", mode)
        forced = [f"exit {name} always" for name in ("saver", "middle", "final")]
        names = [subject["name"] for subject in found["subjects"]]
        assert names == ["cascade", "base", *forced, "all exits in turn"]
        assert found["mode"] == mode
        # Also where the device decides by itself, the time of every stage is known.
        assert all(stage["latency"]["mean"] > 0 for stage in found["stages"])
        assert (found["enqueue_share"] is None) == (mode != "graph")
        assert "base as one session: not measured: beside TensorRT it is measured by" in (
            capsys.readouterr().out
        )

    def test_options_of_another_backend_are_refused(
        self, built: Robot, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert built.run("evaluate", "--threads", "1") == 2
        assert "--threads is no option of --backend tensorrt" in one_line(capsys)

    def test_what_was_built_with_options_is_run(self, robot: Robot) -> None:
        assert robot.run("build", "--workspace-mb", "512") == 0
        assert [key.options for key in robot.built_keys()] == [{"workspace_mb": 512}] * 6
        for command in COMMANDS:
            assert robot.run(command) == 0


class TestVerify:
    @pytest.mark.parametrize("mode", [None, *MODES])
    def test_equal_engines_pass(
        self, built: Robot, mode: str | None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = built.result("verify", *(["--mode", mode] if mode else []), "--samples", "8")
        assert list(found["stages"]) == [stage.name for stage in built.bundle.cascade.stages]
        assert {(one["ok"], one["worst"]) for one in found["stages"].values()} == {(True, 0.0)}
        answers = found["answers"]
        assert (answers["samples"], answers["same"], answers["refit"]) == (COUNT, 1.0, False)
        assert list(answers["rates"]) == ["saver", "middle", "final"]
        assert answers["rates"]["saver"] == [0.5, 0.5]
        out = capsys.readouterr().out
        assert "The thresholds hold on this device." in out
        assert "MiB of scratch memory for all engines instead of" in out

    def test_wrong_weights_fail_at_their_stage_alone(
        self, built: Robot, capsys: pytest.CaptureFixture[str]
    ) -> None:
        built.change_engine("segment1", "weights", 1.1)
        found = built.result("verify", code=1)
        assert [name for name, one in found["stages"].items() if not one["ok"]] == ["segment1"]
        assert "answers" not in found
        captured = capsys.readouterr()
        assert captured.out.count("TOO FAR") == 1
        (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert line.startswith("error: segment1: outputs are further from ONNX Runtime's than")
        assert f"edge-runtime build {built.bundle.path} --force" in line

    def test_an_engine_that_overflows_fails_at_its_stage(
        self, built: Robot, capsys: pytest.CaptureFixture[str]
    ) -> None:
        built.change_engine("segment1", "three", np.inf)
        found = built.result("verify", code=1)
        assert not found["stages"]["segment1"]["finite"]
        assert found["stages"]["head1"]["count"] == 0
        captured = capsys.readouterr()
        assert "error: segment1: outputs are further" in captured.err
        assert captured.out.count("not compared") == 3

    def test_where_samples_leave_elsewhere_thresholds_are_to_be_chosen_anew(
        self, built: Robot, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A change within the tolerance, and a threshold at which an image stands."""
        built.change_engine("saver", "three", 0.999)
        found = built.result("verify")
        assert found["stages"]["saver"]["ok"]
        assert 0 < found["stages"]["saver"]["worst"] < 2e-3
        answers = found["answers"]
        assert answers["refit"] and answers["same"] < 0.99
        assert answers["rates"]["saver"][0] < answers["rates"]["saver"][1] == 0.5
        advice = "Thresholds should be chosen anew on this device: edge-runtime thresholds "
        assert f"{advice}{built.bundle.path} --backend tensorrt --data DIR" in (
            capsys.readouterr().out
        )


class TestWithout:
    """What is missing is said on one line, with what to do."""

    @pytest.mark.parametrize("command", COMMANDS)
    def test_tensorrt(
        self,
        robot: Robot,
        command: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        for name in ("tensorrt", "tensorrt_rtx"):
            monkeypatch.setitem(sys.modules, name, None)
        assert robot.run(command) == 3
        line = one_line(capsys)
        assert line.startswith("error: TensorRT can't be imported: tensorrt: ")
        assert "apt install python3-libnvinfer" in line
        assert robot.fake.devices == []

    @pytest.mark.parametrize("command", COMMANDS)
    def test_engines(self, robot: Robot, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert robot.run(command) == 1
        what, _, remedy = one_line(capsys).partition(" Build it with: ")
        assert what == (
            f"error: stage 'preprocess' has no TensorRT engine (fp32) in {robot.cache.root}."
        )
        program, *arguments = shlex.split(remedy)
        assert program == "edge-runtime"
        assert cli.main(arguments) == 0
        assert robot.run(command) == 0

    @pytest.mark.parametrize("command", COMMANDS)
    def test_a_gpu(
        self,
        built: Robot,
        command: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def no_gpu(package: str, device: int) -> Any:
            raise er.BackendUnavailable("no GPU is found", remedy="Install one")

        monkeypatch.setattr(backend, "open_cuda", no_gpu)
        assert built.run(command) == 3
        assert one_line(capsys) == "error: no GPU is found. Install one"


class TestGate:
    """A point whose gate chooses precisions: all that it can choose is built, found and run."""

    @pytest.fixture
    def gated(self, robot: Robot) -> Robot:
        robot.bundle = gated_bundle(robot.folder / "gated")
        gate_point(robot.bundle, gate_model(robot.bundle), cost="latency", trade_off=0.1)
        return robot

    def test_build_makes_every_variant_that_a_path_can_take(self, gated: Robot) -> None:
        rows = gated.result("build")["engines"]
        found = {(row["stage"], row["precision"]) for row in rows}
        assert found == {(stage, "fp32") for stage in ("preprocess", "saver", *DENSE)} | {
            (stage, level) for stage, levels in VARIANTS.items() for level in levels
        }
        assert {(key.stage, key.precision) for key in gated.built_keys()} == found

    @pytest.mark.parametrize(
        ("mode", "way"),
        [
            ("polling", {}),
            ("sync", {}),
            ("best", {}),
            ("polling", {"overlap": True}),
            ("sync", {"time_stages": True}),
        ],
    )
    def test_it_answers_as_on_onnxruntime(
        self, gated: Robot, mode: Any, way: dict[str, bool]
    ) -> None:
        assert gated.run("build") == 0
        options = {"operating_point": "gate", "image_size": (5, 7)}
        with er.load(gated.bundle, **options) as host:
            want = [host(image) for image in gated.images]
        assert len({ran(one) for one in want}) > 2
        device = er.load(
            gated.bundle,
            backend="tensorrt",
            options=backend.CudaOptions(mode=mode, **way),
            **options,
        )
        with device:
            held = len(device.backend.cuda.live)
            for image, one in zip(gated.images, want, strict=True):
                got = device(image)
                assert (got.label, got.exit, ran(got)) == (one.label, one.exit, ran(one))
            assert [ran(one) for one in device.each(gated.images)] == [ran(one) for one in want]
            assert device.backend.mode == ("polling" if mode == "best" else mode)
            assert len(device.backend.cuda.live) == held
            one = device(gated.images[0])
            assert 0 < device.gate_s < one.latency_s

    @pytest.mark.parametrize(
        ("mode", "why"), [("graph", "decided on the device"), ("run_all", "before the first exit")]
    )
    def test_modes_in_which_nobody_asks_the_gate_are_refused(
        self, gated: Robot, mode: str, why: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert gated.run("build") == 0
        words = ("--operating-point", "gate", "--mode", mode)
        assert gated.run("evaluate", *words) == 3
        line = one_line(capsys)
        assert f"the mode {mode!r} is not available here: a gate can't run in it" in line
        assert why in line
        assert "Modes that are: polling, sync" in line

    def test_preprocessing_is_said_to_run_as_it_does(self, robot: Robot) -> None:
        """TensorRT takes a variant of its own, which nobody has chosen."""
        plain = gated_bundle(robot.folder / "gated")
        cast_first = {"preprocess": {"fp32_cast_first": plain.stage_model("preprocess", "fp32")}}
        robot.bundle = with_variants(plain, cast_first, robot.folder / "cast.bundle", provenance={})
        gate_point(robot.bundle, gate_model(robot.bundle))
        assert robot.run("build") == 0
        with er.load(
            robot.bundle, backend="tensorrt", operating_point="gate", image_size=(5, 7)
        ) as device:
            first = device(robot.images[0]).trace.stages[0]
            assert (first.stage, first.precision) == ("preprocess", "fp32_cast_first")
            assert device.precisions["preprocess"] == ("fp32_cast_first",)

    def test_a_missing_engine_names_what_builds_it(
        self, gated: Robot, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert gated.run("build", "--precision", "fp32") == 0
        assert gated.run("evaluate", "--operating-point", "gate") == 1
        what, _, remedy = one_line(capsys).partition(" Build it with: ")
        assert "stage 'segment1' has no TensorRT engine (fp16)" in what
        assert cli.main(shlex.split(remedy)[1:]) == 0
        assert gated.run("evaluate", "--operating-point", "gate") == 0

    def test_a_gate_outside_the_bundle_s_points_is_not_built_by_default(
        self, gated: Robot, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The remedy names the precision then."""
        inside = gated.bundle.path / "operating_points" / "gate.json"
        outside = inside.rename(gated.folder / "gate.json")
        assert gated.run("build") == 0
        assert gated.run("evaluate", "--operating-point", str(outside)) == 1
        line = one_line(capsys)
        assert "--precision fp16" in line

    def test_an_altered_gate_is_not_built_for(
        self, gated: Robot, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (gated.bundle.path / "operating_points" / "gate.npz").write_bytes(b"")
        assert gated.run("build") == 1
        assert "gate.npz was altered" in one_line(capsys)


def ran(prediction: Any) -> tuple[tuple[str, str], ...]:
    return tuple((run.stage, run.precision) for run in prediction.trace.stages)
