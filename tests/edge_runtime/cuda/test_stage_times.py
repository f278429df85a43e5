"""With `time_stages` traces have each stage's time on the device, and nothing else changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from edge_runtime import ConfigError, CudaError, OperatingPoint
from edge_runtime.backends.cuda.backend import CudaOptions
from edge_runtime.backends.cuda.base import Stream
from edge_runtime.backends.cuda.fake import TICK_NS, FakeCuda
from edge_runtime.backends.cuda.fake_stages import FakeStages
from edge_runtime.timing import FakeClock
from tests.edge_runtime.cuda.populations import (
    cascade,
    functions,
    images,
    on_device,
    on_host,
    said,
)

CASCADE = cascade(classes=5)
NAMES = [stage.name for stage in CASCADE.stages]
POINT = OperatingPoint("point", thresholds={"exit0": 0.8, "exit1": 0.7, "exit2": 0.6})
ALL = OperatingPoint.all_exits(CASCADE)
#: No two stages, and no two sums of neighbours, are the same.
SECONDS: Mapping[str, float] = {name: 2**k * 10e-6 for k, name in enumerate(NAMES)}
#: What the host spends on a stage before the device gets it.
LAUNCH_S = 0.5

timed_mode = pytest.mark.parametrize("mode", ["polling", "sync"])


def timed_stages(**options: Any) -> FakeStages:
    return FakeStages(functions(CASCADE), seconds=SECONDS, **options)


@timed_mode
@pytest.mark.parametrize("batch", [1, 8])
def test_each_stage_has_its_own_time(mode: str, batch: int) -> None:
    frames = images(CASCADE, batch)
    for seed in range(10):
        options = {"mode": mode, "batch": batch, "device": {"seed": seed}}
        with on_device(CASCADE, ALL, stages=timed_stages(), time_stages=True, **options) as device:
            for prediction in device(frames):
                runs = prediction.trace.stages
                assert [run.stage for run in runs] == NAMES
                took = {run.stage: run.duration_s for run in runs}
                assert took == pytest.approx(SECONDS)


@timed_mode
def test_the_hosts_clock_says_when_and_the_device_how_long(mode: str) -> None:
    clock = FakeClock()

    def launching(stage: str, stream: Stream) -> None:
        clock.advance(LAUNCH_S)

    stages = timed_stages(around=launching)
    with on_device(CASCADE, ALL, stages=stages, clock=clock, mode=mode, time_stages=True) as device:
        prediction = device(images(CASCADE, 1)[0])
    runs = prediction.trace.stages
    assert {run.stage: run.duration_s for run in runs} == pytest.approx(SECONDS)
    ends = [run.start_s + run.duration_s for run in runs]
    assert ends == pytest.approx([LAUNCH_S * (k + 1) for k in range(len(NAMES))])
    assert prediction.latency_s == pytest.approx(LAUNCH_S * len(NAMES))


@timed_mode
@pytest.mark.parametrize("integrated", [False, True])
def test_beside_the_stages_are_the_images_copy_and_the_decisions(
    mode: str, integrated: bool
) -> None:
    facts = FakeCuda().facts.__class__(
        name="a device",
        compute_capability=(8, 7),
        driver=(13, 0),
        integrated=integrated,
        memory_bytes=1 << 30,
    )
    cuda = FakeCuda(facts=facts)
    with on_device(
        CASCADE, ALL, stages=timed_stages(), cuda=cuda, mode=mode, time_stages=True
    ) as d:
        before = cuda.now_ns
        runs = d(images(CASCADE, 1)[0]).trace.stages
        spent = (cuda.now_ns - before) * 1e-9
    per_exit = 1 if mode == "polling" else 2  # It copies the verdict.
    others = (not integrated) + per_exit * len(CASCADE.exits)
    assert sum(run.duration_s for run in runs) == pytest.approx(spent - others * TICK_NS * 1e-9)


@timed_mode
def test_samples_that_leave_have_the_times_of_the_stages_they_saw(mode: str) -> None:
    frames = images(CASCADE, 8, seed=5)
    options: dict[str, Any] = {"mode": mode, "batch": 8}
    with (
        on_host(CASCADE, POINT) as host,
        on_device(CASCADE, POINT, stages=timed_stages(), time_stages=True, **options) as timed,
        on_device(CASCADE, POINT, stages=timed_stages(), **options) as untimed,
    ):
        got = timed(frames)
        assert list(map(said, got)) == list(map(said, untimed(frames)))
        assert list(map(said, got)) == list(map(said, host(frames)))
    assert len({prediction.exit for prediction in got}) > 2
    for prediction in got:
        for run in prediction.trace.stages:
            assert run.duration_s == pytest.approx(SECONDS[run.stage])


def test_a_deadline_between_two_stages_keeps_the_times_of_those_that_ran() -> None:
    clock, slow = FakeClock(), [False]

    def launching(stage: str, stream: Stream) -> None:
        if slow[0]:
            clock.advance(LAUNCH_S)

    stages = timed_stages(around=launching)
    with on_device(CASCADE, ALL, stages=stages, clock=clock, time_stages=True) as device:
        slow[0] = True
        prediction = device(images(CASCADE, 1)[0], deadline_s=3.5 * LAUNCH_S)
    assert (prediction.exit, prediction.trace.ended) == ("exit0", "deadline")
    took = {run.stage: run.duration_s for run in prediction.trace.stages}
    assert took == pytest.approx({name: SECONDS[name] for name in NAMES[:4]})


@timed_mode
def test_without_it_nobody_knows_and_nobody_waits(mode: str) -> None:
    with on_device(CASCADE, ALL, stages=timed_stages(), mode=mode) as device:
        before = device.backend.waits
        runs = device(images(CASCADE, 1)[0]).trace.stages
        assert device.backend.waits - before == len(CASCADE.exits)
    assert np.isnan([(run.start_s, run.duration_s) for run in runs]).all()


@timed_mode
def test_its_events_are_made_once_and_every_stage_is_waited_for(mode: str) -> None:
    with on_device(CASCADE, ALL, stages=timed_stages(), mode=mode, time_stages=True) as device:
        log = device.backend.cuda.log
        before, waits = len(log), device.backend.waits
        device(images(CASCADE, 1)[0])
        calls = log[before:]
        assert calls.count("seconds_between") == len(NAMES)
        assert calls.count("record") == 2 * len(NAMES)
        assert "event" not in calls
        assert device.backend.waits - waits == len(NAMES) + len(CASCADE.exits)


@timed_mode
def test_a_stage_that_fails_on_the_device_is_named(mode: str) -> None:
    made, fails = functions(CASCADE), [False]

    def failing(inputs: Any) -> Any:
        if fails[0]:
            raise CudaError("a launch that the driver refused")
        return made["segment1"](inputs)

    stages = FakeStages({**made, "segment1": failing})
    with on_device(CASCADE, ALL, stages=stages, mode=mode, time_stages=True) as device:
        fails[0] = True
        with pytest.raises(CudaError, match=r"^stage 'segment1': a launch") as caught:
            device(images(CASCADE, 1)[0])
        assert caught.value.stage == "segment1"


class TestModes:
    """Stages are timed where the host drives them one by one."""

    def test_the_best_mode_is_the_best_that_is_no_graph(self) -> None:
        with on_device(CASCADE, POINT, time_stages=True) as device:
            assert device.backend.mode == "polling"
            assert device.backend.passed_over["graph"].startswith("its stages can't be timed")
            assert device(images(CASCADE, 1)[0]).trace.mode == "polling"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "graph"}, "the mode 'graph': its stages can't be timed: the device runs"),
            ({"mode": "run_all"}, "the mode 'run_all': its stages can't be timed: all are on"),
            ({"overlap": True}, "with overlap: another frame's work .* not both"),
        ],
    )
    def test_what_times_no_stage_is_refused(self, options: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            CudaOptions(time_stages=True, **options)
