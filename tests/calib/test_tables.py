"""Tables of what exits say, and what stages take, on backends of the host and of a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from calib.exit_table import CostModel
from calib.tables import collect, deciding_seconds, durations, stage_seconds
from edge_runtime import BackendError, OperatingPoint, Scheduler
from edge_runtime.backends.base import Backend
from edge_runtime.backends.cuda import decide
from edge_runtime.backends.cuda.backend import CudaBackend, CudaOptions
from edge_runtime.backends.cuda.base import Stream
from edge_runtime.backends.cuda.fake import FakeCuda
from edge_runtime.backends.cuda.fake_stages import FakeStages
from edge_runtime.backends.fake import FakeBackend
from edge_runtime.cascade import Exit, Plan, Step
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset
from edge_runtime.prediction import ExitRun, StageRun, Trace
from edge_runtime.timing import FakeClock
from tests.toys import CLASSES, toy_cascade, toy_images

CASCADE = toy_cascade()
SECONDS: Mapping[str, float] = {s.name: 2**k * 1e-5 for k, s in enumerate(CASCADE.stages)}
LAUNCH_S, DECIDE_S, FEED_S = 0.5, 0.25, 64.0
KERNEL = decide.kernel_name("float32", False)


def data(samples: int) -> ImageDataset:
    return ImageDataset.from_arrays(toy_images(samples), np.arange(samples) % 4, CLASSES)


def opened(backend: Backend, **more: Any) -> Scheduler:
    point = OperatingPoint.all_exits(CASCADE)
    return Scheduler(CASCADE, backend, point, image_size=(5, 7), **more).open()


def on_a_gpu(cuda: FakeCuda | None = None, *, around: Any = None, **options: Any) -> CudaBackend:
    more = {"around": around} if around else {}
    stages = FakeStages(seconds=SECONDS, **more)
    return CudaBackend(stages, CudaOptions(**options), cuda=cuda or FakeCuda())


class Watched(FakeBackend):
    """Takes its time to take in images and to decide, and notes how many came."""

    def __init__(self, clock: FakeClock | None = None, **options: Any) -> None:
        super().__init__(clock=clock, **options)
        self.fed: list[int] = []

    def feed(self, image: np.ndarray) -> None:
        self.fed.append(len(image))
        super().feed(image)
        if self._clock:
            self._clock.advance(FEED_S)

    def decide(self, *arguments: Any) -> Any:
        if self._clock:
            self._clock.advance(DECIDE_S)
        return super().decide(*arguments)


class TestCollect:
    """Logits of all exits, in calls that the backend takes."""

    @pytest.mark.parametrize(
        ("largest", "calls"), [(None, [64, 6]), (32, [32, 32, 6]), (100, [64, 6])]
    )
    def test_no_call_is_larger_than_the_backend_takes(
        self, largest: int | None, calls: Sequence[int]
    ) -> None:
        backend = Watched()
        backend.largest_batch = largest
        with opened(backend) as cascade:
            warm = len(backend.fed)
            collect(cascade, data(70), Console())
        assert backend.fed[warm:] == calls

    @pytest.mark.parametrize("options", [{}, {"batch": 8}, {"time_stages": True}], ids=str)
    def test_a_gpu_says_what_the_host_says(self, options: dict[str, Any]) -> None:
        images = data(20)
        with opened(FakeBackend()) as host, opened(on_a_gpu(**options)) as device:
            want, got = (collect(one, images, Console()) for one in (host, device))
        assert list(got.logits) == ["saver", "middle", "final"]
        for name, logits in want.logits.items():
            np.testing.assert_allclose(got.logits[name], logits, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(got.labels, want.labels)


class TestStageSeconds:
    """What stages and decisions take."""

    @pytest.mark.parametrize("mode", ["best", "sync"])
    @pytest.mark.parametrize("batch", [1, 8])
    def test_on_a_gpu_they_are_the_devices_and_do_for_costs(self, mode: Any, batch: int) -> None:
        images = data(10)
        with opened(on_a_gpu(mode=mode, batch=batch, time_stages=True)) as cascade:
            table = collect(cascade, images, Console())
            seconds, decide_s, _ = stage_seconds(cascade, images, Console())
        assert table.logits["final"].shape == (10, 4)
        assert list(seconds) == list(SECONDS)
        assert seconds == pytest.approx(SECONDS)
        assert CostModel.from_stages(CASCADE, seconds, decide_s).base > sum(
            SECONDS[name] for name in ("preprocess", "segment1", "segment2", "head2")
        )

    def test_launching_a_stage_is_no_deciding(self) -> None:
        clock = FakeClock()

        def deciding(*arguments: Any) -> None:
            clock.advance(DECIDE_S)
            FakeCuda()._functions[KERNEL](*arguments)

        def launching(stage: str, stream: Stream) -> None:
            clock.advance(LAUNCH_S)

        backend = on_a_gpu(FakeCuda({KERNEL: deciding}), around=launching, time_stages=True)
        with opened(backend, clock=clock) as cascade:
            seconds, decide_s, _ = stage_seconds(cascade, data(4), Console())
        assert seconds == pytest.approx(SECONDS)
        assert decide_s == pytest.approx((DECIDE_S,) * 3)

    def test_taking_in_the_image_is_no_deciding(self) -> None:
        clock = FakeClock()
        backend = Watched(clock, seconds=SECONDS)
        with opened(backend, clock=clock) as cascade:
            seconds, decide_s, _ = stage_seconds(cascade, data(4), Console())
        assert seconds == pytest.approx(SECONDS)
        assert decide_s == pytest.approx((DECIDE_S,) * 3)

    @pytest.mark.parametrize("mode", ["graph", "polling", "sync", "run_all"])
    def test_a_backend_that_does_not_tell_is_refused_with_what_helps(self, mode: Any) -> None:
        with (
            opened(on_a_gpu(mode=mode)) as cascade,
            pytest.raises(
                BackendError,
                match=r"^the backend 'fake' does not tell how long a stage took\. "
                r"On a GPU open it with CudaOptions\(time_stages=True\)$",
            ),
        ):
            stage_seconds(cascade, data(4), Console())


def test_an_exit_without_stages_of_its_own_is_decided_after_the_one_before() -> None:
    saver = CASCADE.stages[1]
    steps = (Step(0, Exit("a", "x"), (saver,), ()), Step(1, Exit("b", "x"), (), ()))
    trace = Trace(
        "fake",
        "host",
        "last",
        (StageRun("saver", "fp32", 1.0, 2.0, 1),),
        (ExitRun("a", 0, 0.5, 0.5, 3.5), ExitRun("b", 0, 0.5, 0.5, 3.75)),
    )
    assert durations(trace) == {"saver": 2.0}
    assert deciding_seconds(Plan(CASCADE.image, steps, ()), trace) == pytest.approx([0.5, 0.25])
