"""TensorRT engines as stages, on a stand-in for TensorRT that executes on the fake CUDA device."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_runtime as er
from edge_runtime import Bundle, ConfigError, OperatingPoint, Prediction, Scheduler
from edge_runtime.backends.cuda.backend import CudaBackend, CudaOptions
from edge_runtime.backends.cuda.fake import FakeCuda, Fault
from edge_runtime.backends.tensorrt import api
from edge_runtime.backends.tensorrt.stages import Scratch, TensorRTStages
from edge_runtime.cli import main
from edge_runtime.engine_cache import EngineCache, EngineKey
from edge_runtime.errors import BackendError, BackendUnavailable, CudaError
from tests.meta.repository import ROOT
from tests.tensorrt_on_fake_device import FakeTensorRT, Misuse, make_plan, store_engines
from tests.toys import dense_model, toy_bundle, toy_images

DIGITS = ROOT / "examples" / "digits"
BUNDLE = Bundle.open(DIGITS / "digits.bundle")
MODES = ("graph", "polling", "sync", "run_all")
#: Every way to run one image at a time.
WAYS: dict[str, dict[str, Any]] = {
    f"{mode}{'+overlap' if overlap else ''}{'+nested' if nested else ''}": {
        "mode": mode,
        "overlap": overlap,
        "nested": nested,
    }
    for mode, overlap, nested in itertools.product(MODES, (False, True), (False, True))
    if mode == "graph" or not nested
}
way_ = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
#: Of the toy bundle: the segment needs most, and the preprocessing, which runs ahead, some.
SCRATCH = {
    "preprocess": 700,
    "saver": 100,
    "segment1": 5000,
    "head1": 0,
    "segment2": 4000,
    "head2": 300,
}
SIZE = (5, 7)
EVERYTHING = OperatingPoint("point", thresholds={"saver": 0.9, "middle": 0.9})


@dataclass
class Robot:
    """A bundle, and the engines of its device.

    Attributes:
        bundle: The bundle.
        cache: Its engines.
        keys: Stage -> what its engine is found by.
        image_size: Of its camera, where the bundle leaves it open.
    """

    bundle: Bundle
    cache: EngineCache
    keys: dict[str, EngineKey]
    image_size: tuple[int, int] | None = None

    def cascade(
        self, fake: FakeTensorRT, point: OperatingPoint = EVERYTHING, **options: Any
    ) -> Scheduler:
        """The cascade on TensorRT; not opened."""
        stages = TensorRTStages(self.bundle, self.cache, module=fake.module)
        backend = CudaBackend(stages, CudaOptions(**options), cuda=fake.open_cuda())
        return Scheduler(self.bundle.cascade, backend, point, image_size=self.image_size)

    def replace_plan(self, stage: str, plan: bytes) -> None:
        """Put another plan where a stage's engine is."""
        self.cache.store(self.keys[stage], plan, {})

    def refusal(self, point: OperatingPoint = EVERYTHING, **options: Any) -> BackendError:
        """The error of opening it, which must leave nothing behind."""
        fake = FakeTensorRT()
        with pytest.raises(BackendError) as caught:
            self.cascade(fake, point, **options).open()
        fake.check_all_is_closed()
        assert str(caught.value).isprintable()
        return caught.value


def robot_of(bundle: Bundle, folder: Path, **options: Any) -> Robot:
    cache = EngineCache(folder / "cache")
    keys = store_engines(FakeTensorRT(), cache, bundle, **options)
    return Robot(bundle, cache, keys, options.get("image_size"))


@pytest.fixture
def toy(tmp_path: Path) -> Robot:
    """Small stages, of which one takes a single sample at a time."""
    bundle = toy_bundle(tmp_path / "toy.bundle")
    return robot_of(bundle, tmp_path, scratch=SCRATCH, image_size=SIZE)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Robot:
    folder = tmp_path_factory.mktemp("digits")
    robot = robot_of(BUNDLE, folder)
    store_engines(FakeTensorRT(), robot.cache, BUNDLE, batch=4)
    return robot


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Robot, OperatingPoint]:
    """Digits with INT8 and FP16, and a point that runs both beside FP32."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("mixed")
    images = np.rint(load_digits().images[:40] * (255 / 16)).astype(np.uint8)
    np.savez(folder / "train.npz", images=images, labels=load_digits().target[:40])
    int8, everything = folder / "int8.bundle", folder / "all.bundle"
    data = ["--data", str(folder / "train.npz")]
    stages = ["--stages", "saver,segment1"]
    assert main(["quantize", str(BUNDLE.path), *data, *stages, "--out", str(int8)]) == 0
    stages = ["--stages", "head1,segment2", "--precision", "fp16"]
    assert main(["convert", str(int8), *stages, "--out", str(everything)]) == 0
    variants = {"saver": "int8", "segment1": "int8", "head1": "fp16"}
    point = replace(EVERYTHING, variants=variants)
    return robot_of(Bundle.open(everything), folder, variants=variants), point


def digit_images(count: int) -> np.ndarray:
    return np.load(DIGITS / "test.npz")["images"][:count]


def said(prediction: Prediction) -> tuple[Any, ...]:
    """All that must not depend on what runs the stages, except the precision of preprocessing."""
    trace = prediction.trace
    return (
        prediction.label,
        prediction.exit,
        prediction.confidence,
        trace.ended,
        [run[:4] for run in trace.exits],
        [(r.stage, r.precision, r.batch) for r in trace.stages if r.stage != "preprocess"],
    )


def on_onnxrt(robot: Robot, point: OperatingPoint, frames: Any) -> list[Any]:
    with er.load(robot.bundle, operating_point=point, image_size=robot.image_size) as host:
        return list(host.each(frames))


class TestAnswers:
    """They are those of ONNX Runtime, whatever the mode."""

    @way_
    def test_one_image_at_a_time(self, digits: Robot, way: dict) -> None:
        frames = digit_images(14)
        point = BUNDLE.operating_point("zero_loss")
        want = [said(one) for one in on_onnxrt(digits, point, frames)]
        assert {one[1] for one in want} == {"saver", "middle", "final"}
        fake = FakeTensorRT(seed=len(way))
        with digits.cascade(fake, point, **way) as cascade:
            assert [said(cascade(frame)) for frame in frames] == want
            assert [said(one) for one in cascade.each(frames)] == want
            trace = cascade(frames[0]).trace
            assert (trace.backend, trace.mode) == ("tensorrt", way["mode"])
            assert trace.stages[0][:2] == ("preprocess", "fp32_cast_first")
        fake.check_all_is_closed()

    @pytest.mark.parametrize("mode", ["polling", "sync", "run_all"])
    @pytest.mark.parametrize("overlap", [False, True])
    def test_a_batch(self, digits: Robot, mode: str, overlap: bool) -> None:
        images = digit_images(14)
        batches = [images[:4], images[4:8], images[8:12], images[12:]]
        point = BUNDLE.operating_point("zero_loss")
        want = [one for batch in on_onnxrt(digits, point, batches) for one in batch]
        fake = FakeTensorRT()
        with digits.cascade(fake, point, mode=mode, overlap=overlap, batch=4) as cascade:
            got = [one for batch in cascade.each(batches) for one in batch]
        fake.check_all_is_closed()
        assert [(p.label, p.exit) for p in got] == [(p.label, p.exit) for p in want]
        # ONNX Runtime multiplies the rows that have not left, the engine always four.
        np.testing.assert_allclose(
            [p.confidence for p in got], [p.confidence for p in want], rtol=1e-5
        )

    @way_
    def test_mixed_precisions(self, mixed: tuple[Robot, OperatingPoint], way: dict) -> None:
        robot, point = mixed
        frames = digit_images(8)
        want = [said(one) for one in on_onnxrt(robot, point, frames)]
        fake = FakeTensorRT()
        with robot.cascade(fake, point, **way) as cascade:
            assert [said(one) for one in cascade.each(frames)] == want
            precisions = {r.stage: r.precision for r in cascade(frames[0]).trace.stages}
        fake.check_all_is_closed()
        assert (
            precisions.items()
            <= {
                "preprocess": "fp32_cast_first",
                "saver": "int8",
                "segment1": "int8",
                "head1": "fp16",
                "segment2": "fp32",
            }.items()
        )

    def test_stages_that_fix_the_batch_at_one(self, toy: Robot) -> None:
        frames = toy_images(10)
        want = [said(one) for one in on_onnxrt(toy, EVERYTHING, frames)]
        with toy.cascade(FakeTensorRT()) as cascade:
            assert [said(one) for one in cascade.each(frames)] == want

    def test_after_it_was_closed_and_opened_anew(self, toy: Robot) -> None:
        fake, frames = FakeTensorRT(), toy_images(4)
        cascade = toy.cascade(fake, overlap=True)
        answers = []
        for _ in range(2):
            with cascade.open():
                answers.append([said(one) for one in cascade.each(frames)])
                assert len(fake.objects) > 2 * len(SCRATCH)
            fake.check_all_is_closed()
            assert not fake.objects
        assert answers[0] == answers[1]


def test_the_best_mode_is_taken_and_what_was_passed_over_is_told(digits: Robot) -> None:
    with digits.cascade(FakeTensorRT()) as cascade:
        assert (cascade.backend.mode, cascade.backend.passed_over) == ("graph", {})
    with digits.cascade(FakeTensorRT(graphs="the driver is for CUDA 12.2")) as cascade:
        assert cascade.backend.mode == "polling"
        assert cascade.backend.passed_over == {"graph": "the driver is for CUDA 12.2"}
    with digits.cascade(FakeTensorRT(), batch=4) as cascade:
        assert cascade.backend.mode == "polling"
        assert "takes one image per frame" in cascade.backend.passed_over["graph"]


def test_stages_are_timed_where_that_is_asked_for(toy: Robot) -> None:
    with toy.cascade(FakeTensorRT(), time_stages=True) as cascade:
        runs = cascade(toy_images(1)[0]).trace.stages
    # Each engine is two kernels of a microsecond.
    assert [run.duration_s for run in runs] == pytest.approx([2e-6] * len(runs))


class TestScratch:
    """Stages run one after another, and share the memory that they need meanwhile."""

    @staticmethod
    def opened(toy: Robot, **options: Any) -> tuple[Scratch, list[int]]:
        """What the stages say, and the sizes of the device's allocations."""
        fake = FakeTensorRT()
        with toy.cascade(fake, **options) as cascade:
            sizes = [getattr(one, "nbytes", 0) for one in fake.devices[0].live]
            return cascade.backend.stages.scratch, sizes

    def test_there_is_one_of_the_largest_need(self, toy: Robot) -> None:
        scratch, sizes = self.opened(toy)
        assert scratch == Scratch(allocated=5000, separate=sum(SCRATCH.values()))
        assert sizes.count(5000) == 1
        assert not set(sizes) & (set(SCRATCH.values()) - {0, 5000})

    def test_what_runs_ahead_has_its_own(self, toy: Robot) -> None:
        """Two frames are under way: stages that read or write what exists twice count twice."""
        scratch, sizes = self.opened(toy, overlap=True)
        twice = SCRATCH["preprocess"] + SCRATCH["saver"] + SCRATCH["segment1"]
        assert scratch == Scratch(allocated=5700, separate=sum(SCRATCH.values()) + twice)
        assert (sizes.count(5000), sizes.count(700)) == (1, 1)

    def test_without_a_need_nothing_is_allocated(self, tmp_path: Path) -> None:
        none = dict.fromkeys(SCRATCH, 0)
        bundle = toy_bundle(tmp_path / "toy.bundle")
        robot = robot_of(bundle, tmp_path, scratch=none, image_size=SIZE)
        assert self.opened(robot)[0] == Scratch(0, 0)

    def test_people_read_it(self) -> None:
        text = str(Scratch(3 * 2**20, 10 * 2**20))
        assert text == "3.0 MiB of scratch memory for all engines instead of 10.0 MiB"

    @pytest.mark.parametrize("mode", MODES)
    def test_no_order_of_the_streams_lets_two_engines_meet_in_it(
        self, toy: Robot, mode: str
    ) -> None:
        frames = toy_images(6)
        want = [said(one) for one in on_onnxrt(toy, EVERYTHING, frames)]
        for seed in range(8):
            fake = FakeTensorRT(seed=seed)
            with toy.cascade(fake, mode=mode, overlap=True) as cascade:
                assert [said(one) for one in cascade.each(frames)] == want

    @pytest.mark.parametrize("mode", MODES)
    def test_with_one_for_all_they_would_meet(
        self, toy: Robot, mode: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Otherwise the test above could not fail."""

        def one_for_all(self: TensorRTStages, needs: Mapping[str, int]) -> dict[str, int]:
            memory = self._stack.enter_context(self._cuda.memory(max(needs.values())))
            return dict.fromkeys(needs, memory.address)

        monkeypatch.setattr(TensorRTStages, "_allocate_scratch", one_for_all)
        frames = toy_images(6)

        def goes_wrong(seed: int) -> bool:
            try:
                fake = FakeTensorRT(seed=seed)
                with toy.cascade(fake, mode=mode, overlap=True) as cascade:
                    list(cascade.each(frames))
            except Misuse as error:
                assert "'scratch memory' was written to by another" in str(error)
                return True
            return False

        assert any(map(goes_wrong, range(8)))


class TestRefused:
    """An engine that does not fit, with what to do about it; nothing is left on the device."""

    def test_no_engine(self, toy: Robot) -> None:
        toy.cache = EngineCache(toy.cache.root / "other")
        error = toy.refusal()
        assert str(error) == (
            f"stage 'preprocess' has no TensorRT engine (fp32) in {toy.cache.root}. Build it "
            f"with: edge-runtime build {toy.bundle.path} --image-size 5x7"
        )
        assert error.stage == "preprocess"

    def test_the_command_has_what_the_engine_needs(self, digits: Robot, mixed: Any) -> None:
        error = digits.refusal(mode="sync", batch=2)
        assert str(error).endswith(f"Build it with: edge-runtime build {BUNDLE.path} --batch 2")
        robot, point = mixed
        error = robot.refusal(replace(point, variants={"segment2": "fp16"}))
        assert error.stage == "saver"  # Its engine is INT8, since no point of the bundle is FP32.
        assert "(fp32)" in str(error) and "option" not in str(error)
        command = f"edge-runtime build {robot.bundle.path}"
        assert str(error).endswith(f"Build it with: {command}")
        error = robot.refusal(replace(point, variants={**point.variants, "segment2": "fp16"}))
        assert str(error).endswith(f"Build it with: {command} --precision fp16")

    def test_an_engine_of_another_device(self, toy: Robot) -> None:
        key = toy.keys["preprocess"]
        other = replace(key, device=replace(key.device, gpu="Orin", tensorrt="8.6.2"))
        plan, _ = toy.cache.load(key, "")
        cache = EngineCache(toy.cache.root / "other")
        cache.store(other, plan, {})
        toy.cache = cache
        error = str(toy.refusal())
        assert "stage 'preprocess' has no TensorRT engine (fp32) that fits" in error
        assert "got gpu Orin, tensorrt 8.6.2" in error
        assert "expected gpu a device made of numpy, tensorrt 10.3.0" in error

    def test_a_plan_that_was_altered(self, toy: Robot) -> None:
        file = toy.cache.find(toy.keys["head1"]).path
        plan = file.read_bytes()
        file.write_bytes(plan[:-1] + bytes([plan[-1] ^ 1]))
        error = toy.refusal()
        assert error.stage == "head1"
        assert f"the engine {file} was altered: sha256" in str(error)
        assert "Build it with: edge-runtime build" in str(error)

    @pytest.mark.parametrize("plan", [b"", b"no plan", None], ids=["empty", "other", "half"])
    def test_what_is_no_plan(self, toy: Robot, plan: bytes | None) -> None:
        if plan is None:
            plan = toy.cache.load(toy.keys["head1"], "")[0]
            plan = plan[: len(plan) // 2]
        toy.replace_plan("head1", plan)
        error = toy.refusal()
        assert error.stage == "head1"
        assert "stage 'head1': TensorRT can't load its engine. TensorRT says: ERROR: " in str(error)
        assert str(error).endswith("--image-size 5x7 --force")

    @pytest.mark.parametrize(
        ("source", "target", "columns", "shape", "parts"),
        [
            ("features", "logits", 4, (1, 6), ("got 'features' (input float32), 'logits' (", ")")),
            ("features", "middle/logits", 5, (1, 6), ("got (1, 5), expected (1, 4)", "shape of")),
            ("features", "middle/logits", 4, (2, 6), ("refused the shape (1, 6)", "has (2, 6)")),
        ],
        ids=["name", "shape", "batch"],
    )
    def test_an_engine_of_something_else(
        self,
        toy: Robot,
        source: str,
        target: str,
        columns: int,
        shape: tuple[int, ...],
        parts: tuple[str, ...],
    ) -> None:
        model = dense_model(source, target, 6, columns, seed=0)
        toy.replace_plan("head1", make_plan(model, {source: shape}))
        error = toy.refusal()
        assert error.stage == "head1"
        for part in (*parts, "stage 'head1'", "Build it anew: edge-runtime build"):
            assert part in str(error)

    def test_an_engine_of_another_dtype(self, toy: Robot) -> None:
        from tests.edge_runtime.bundles import linear

        model = linear("features", "middle/logits", 6, 4, "float16")
        toy.replace_plan("head1", make_plan(model, {"features": (1, 6)}))
        error = str(toy.refusal())
        assert "got 'features' (input float16), 'middle/logits' (output float16)" in error
        assert "expected 'features' (input float32), 'middle/logits' (output float32)" in error

    def test_a_stage_of_one_sample_in_a_batch(self, toy: Robot) -> None:
        fake = FakeTensorRT()
        with pytest.raises(ConfigError, match="'segment2' takes one sample at a time: got batch 4"):
            store_engines(fake, toy.cache, toy.bundle, batch=4, image_size=SIZE)
        with pytest.raises(ConfigError, match="'segment2' takes one sample at a time: got batch 4"):
            toy.cascade(fake, mode="sync", batch=4).open()
        fake.check_all_is_closed()

    def test_the_scratch_memory(self, toy: Robot) -> None:
        """TensorRT says so in its log alone; the first run fails then, and quotes it."""
        call = calls_of(toy).index("set_device_memory")
        error = refused_call(toy, call)
        assert "stage 'preprocess': TensorRT did not run" in str(error)
        assert "set_device_memory: the refusal that a test asked for" in str(error)
        assert "device memory is not set" in str(error)


def calls_of(robot: Robot, **options: Any) -> list[str]:
    """What TensorRT is asked for while the cascade is opened and classifies one image."""
    fake = FakeTensorRT()
    with robot.cascade(fake, **options) as cascade:
        cascade(toy_images(1)[0])
    return fake.calls


def refused_call(robot: Robot, call: int, **options: Any) -> BackendError:
    """The error that comes of one call that is refused."""
    fake = FakeTensorRT(refuse=call)
    with pytest.raises(BackendError) as caught, robot.cascade(fake, **options) as cascade:
        cascade(toy_images(1)[0])
    fake.check_all_is_closed()
    return caught.value


@pytest.mark.parametrize("mode", ["graph", "sync"])
def test_whatever_tensorrt_refuses_is_one_error_that_quotes_it(toy: Robot, mode: str) -> None:
    calls = calls_of(toy, mode=mode, overlap=True)
    assert set(calls) == {
        "Runtime",
        "deserialize_cuda_engine",
        "create_execution_context",
        "set_device_memory",
        "set_input_shape",
        "infer_shapes",
        "set_tensor_address",
        "execute_async_v3",
    }
    # Every kind of call, its first and its last time, and some between.
    first = {name: calls.index(name) for name in calls}
    last = {name: call for call, name in enumerate(calls)}
    for call in sorted({*first.values(), *last.values(), *range(0, len(calls), 9)}):
        name = calls[call]
        error = refused_call(toy, call, mode=mode, overlap=True)
        text = str(error)
        assert f"{name}: the refusal that a test asked for" in text, text
        assert "TensorRT says: ERROR: " in text
        assert text.isprintable()
        if name == "Runtime":
            assert text.startswith("TensorRT made no runtime")
        else:
            assert f"stage {error.stage!r}" in text
            assert error.stage in SCRATCH


@pytest.mark.parametrize("mode", ["graph", "polling"])
def test_a_fault_of_the_device_is_one_error_and_frees_everything(toy: Robot, mode: str) -> None:
    def use(fake: FakeTensorRT) -> FakeCuda:
        with toy.cascade(fake, mode=mode, overlap=True) as cascade:
            list(cascade.each(toy_images(2)))
        return fake.devices[0]

    log = use(FakeTensorRT()).log
    seen = set()
    for call, name in list(enumerate(log))[::5]:
        if name.startswith("close"):
            continue
        fake = FakeTensorRT(fault=Fault(call, "OUT_OF_MEMORY"))
        try:
            use(fake)
        except (BackendError, BackendUnavailable) as error:
            assert "OUT_OF_MEMORY" in str(error)
            seen.add(name)
        fake.check_all_is_closed()
    assert {"memory", "launch", "synchronize"} <= seen


def test_a_device_that_is_lost_while_an_engine_runs(toy: Robot) -> None:
    fake = FakeTensorRT(lose_device_after=60)
    with pytest.raises(CudaError, match="LAUNCH_FAILED"), toy.cascade(fake, mode="sync") as cascade:
        for image in itertools.cycle(toy_images(2)):
            cascade(image)
    fake.check_all_is_closed()


class TestOptionsOfTheBuilder:
    """An engine that was built with some is used without naming them again."""

    def test_the_newest_engine_runs(self, toy: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
        loaded: list[EngineKey] = []
        load = EngineCache.load

        def noting(self: EngineCache, key: EngineKey, bundle: Any) -> Any:
            loaded.append(key)
            return load(self, key, bundle)

        monkeypatch.setattr(EngineCache, "load", noting)
        options = {"workspace_mb": 512}
        fake = FakeTensorRT()
        keys = store_engines(fake, toy.cache, toy.bundle, image_size=SIZE, options=options)
        with toy.cascade(fake) as cascade:
            cascade(toy_images(1)[0])
        assert loaded == list(keys.values())

    def test_one_that_is_broken_gives_way_to_the_one_before(self, toy: Robot) -> None:
        fake = FakeTensorRT()
        options = {"workspace_mb": 512}
        keys = store_engines(fake, toy.cache, toy.bundle, image_size=SIZE, options=options)
        toy.cache.find(keys["saver"]).path.write_bytes(b"")
        with toy.cascade(fake) as cascade:
            cascade(toy_images(1)[0])


def test_the_scratch_memory_is_logged(toy: Robot, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), toy.cascade(FakeTensorRT()):
        pass
    assert "of scratch memory for all engines instead of" in caplog.text


@pytest.mark.parametrize("name", api.OLDEST)
def test_both_modules_and_majors_are_served(toy: Robot, name: str) -> None:
    fake = FakeTensorRT(name=name, version="11.4.0.106")
    store_engines(fake, toy.cache, toy.bundle, image_size=SIZE)
    with toy.cascade(fake) as cascade:
        assert cascade(toy_images(1)[0]).trace.backend == "tensorrt"
    sidecars = [json.loads(file.read_text()) for file in toy.cache.root.rglob("*.json")]
    assert name in {sidecar["key"]["device"]["module"] for sidecar in sidecars}
