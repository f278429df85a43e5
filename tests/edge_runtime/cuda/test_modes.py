"""All execution modes give the answers of the host, whatever the order in which streams advance."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edge_runtime import (
    BackendError,
    BackendUnavailable,
    ConfigError,
    CudaError,
    InputError,
    OperatingPoint,
    Prediction,
    Scheduler,
)
from edge_runtime.backends.cuda.backend import CudaOptions
from edge_runtime.backends.cuda.base import Stream
from edge_runtime.backends.cuda.fake import FakeCuda, FakeEvent, FakeStream
from edge_runtime.backends.cuda.fake_stages import FakeStages
from edge_runtime.confidence import METRICS, decide
from edge_runtime.timing import FakeClock
from tests.edge_runtime.cuda.populations import (
    NAN,
    cascade,
    functions,
    images,
    on_device,
    on_host,
    said,
)

CASCADE = cascade(classes=5)
POINT = OperatingPoint("point", thresholds={"exit0": 0.8, "exit1": 0.7, "exit2": 0.6})
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
} | {f"{mode}+timed": {"mode": mode, "time_stages": True} for mode in ("polling", "sync")}
way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
mode_ = pytest.mark.parametrize("mode", MODES)

POLICIES = {
    "threshold": POINT,
    "one exit pruned": OperatingPoint("p", thresholds={"exit0": 0.8, "exit2": 0.6}),
    "patience": OperatingPoint("p", policy="patience", patience=1),
    "patience 2": OperatingPoint("p", policy="patience", patience=2),
    "patient and confident": OperatingPoint(
        "p",
        policy="patient_and_confident",
        thresholds={"exit0": 0.5, "exit1": 0.5, "exit2": 0.5},
        patience=2,
    ),
    "never": OperatingPoint("p", policy="never"),
    "first exit always": OperatingPoint.forced(CASCADE, "exit0"),
    "all exits, none taken": OperatingPoint.all_exits(CASCADE),
    "temperatures": OperatingPoint(
        "p", thresholds={"exit0": 0.5, "exit1": 0.5}, temperatures={"exit0": 2.5, "exit1": 0.3}
    ),
}


def _raise(error: BaseException) -> Callable[..., Any]:
    def raising(*_: Any) -> Any:
        raise error

    return raising


@way
@pytest.mark.parametrize("point", POLICIES.values(), ids=POLICIES)
def test_every_mode_answers_as_the_host_does(way: dict, point: OperatingPoint) -> None:
    frames = images(CASCADE, 25)
    with on_host(CASCADE, point) as host, on_device(CASCADE, point, **way) as device:
        want = [said(host(frame)) for frame in frames]
        assert [said(device(frame)) for frame in frames] == want
        assert [said(one) for one in device.each(frames)] == want
        assert device(frames[0]).trace.mode == way["mode"]
    assert point.policy == "never" or point is not POINT or len({one[2] for one in want}) == 4


@mode_
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_metric_and_dtype_of_logits(mode: str, metric: Any, dtype: str) -> None:
    of = cascade(exits=3, dtype=dtype)
    frames = images(of, 20, seed=3)
    first = decide(frames[:, 0].astype(dtype), metric).signal
    point = OperatingPoint("p", metric=metric, thresholds={"exit0": float(np.median(first))})
    with on_host(of, point) as host, on_device(of, point, mode=mode) as device:
        assert [said(device(f)) for f in frames] == [said(host(f)) for f in frames]


@mode_
def test_a_signal_equal_to_the_threshold_leaves(mode: str) -> None:
    frame = images(CASCADE, 1)[0]
    signal = float(decide(frame[0], "max_softmax").signal)
    above = float(np.nextafter(np.float32(signal), np.float32(2)))
    for threshold, want in ((signal, "exit0"), (above, "exit3"), (0.0, "exit0"), (1.0, "exit3")):
        point = OperatingPoint("p", thresholds={"exit0": threshold})
        with on_device(CASCADE, point, mode=mode) as device:
            assert device(frame).exit == want


@mode_
def test_certainty_reaches_a_threshold_of_one(mode: str) -> None:
    frame = images(CASCADE, 1)[0]
    frame[0] = [200, 0, 0, 0, 0]
    with on_device(CASCADE, OperatingPoint("p", thresholds={"exit0": 1.0}), mode=mode) as device:
        assert device(frame).exit == "exit0"


@way
@pytest.mark.parametrize("at", range(4))
def test_logits_that_are_no_numbers_are_an_error_of_that_exit_and_frame(way: dict, at: int) -> None:
    frames = images(CASCADE, 3)
    frames[1, at, 2] = NAN
    point = OperatingPoint.all_exits(CASCADE)
    with on_device(CASCADE, point, **way) as device, on_host(CASCADE, point) as host:
        want = [said(host(frames[i])) for i in (0, 2)]
        with pytest.raises(BackendError, match=f"^exit 'exit{at}': .* NaN, infinite") as caught:
            for frame in frames:
                device(frame)
        assert not isinstance(caught.value, CudaError)
        assert caught.value.stage == f"head{at}"
        assert [said(device(frames[i])) for i in (0, 2)] == want

        pending = [device.submit(frame) for frame in frames]
        assert said(pending[0].result()) == want[0]
        with pytest.raises(BackendError, match=f"exit{at}"):
            pending[1].result()
        assert said(pending[2].result()) == want[1]


@way
def test_an_exit_taken_before_it_hides_what_is_no_number(way: dict) -> None:
    frame = images(CASCADE, 1)[0]
    frame[2:] = NAN
    point = OperatingPoint.forced(CASCADE, "exit1")
    with on_device(CASCADE, point, **way) as device:
        assert device(frame).exit == "exit1"


class TestBatches:
    """One fixed batch; samples that left are computed all the same, and not spoken of."""

    @pytest.mark.parametrize("mode", ["polling", "sync", "run_all"])
    @pytest.mark.parametrize("overlap", [False, True])
    def test_a_batch_gives_what_its_images_give(self, mode: str, overlap: bool) -> None:
        frames = images(CASCADE, 24, seed=5)
        with (
            on_host(CASCADE, POINT) as host,
            on_device(CASCADE, POINT, mode=mode, batch=8, overlap=overlap) as device,
        ):
            for size in (8, 1, 3, 8, 5):
                want, got = host(frames[:size]), device(frames[:size])
                assert list(map(said, got)) == list(map(said, want))
            together = list(device.each([frames[:8], frames[8:16], frames[16:]]))
        assert [p.label for part in together for p in part] == [p.label for p in host_all(frames)]

    def test_more_than_the_cascade_was_opened_for_are_refused(self) -> None:
        with (
            on_device(CASCADE, POINT, mode="sync", batch=2) as device,
            pytest.raises(InputError, match="images per call: got 3, expected at most 2"),
        ):
            device(images(CASCADE, 3))

    def test_a_graph_takes_one_image(self) -> None:
        with pytest.raises(BackendUnavailable, match="takes one image per frame, the batch is 2"):
            on_device(CASCADE, POINT, mode="graph", batch=2).open()

    def test_one_bad_sample_fails_its_batch_unless_it_has_left(self) -> None:
        frames = images(CASCADE, 4)
        frames[2, 1] = NAN
        frames[2, 0] = [50, 0, 0, 0, 0]
        with on_device(CASCADE, POINT, mode="sync", batch=4) as device:
            assert device(frames)[2].exit == "exit0"
            frames[2, 0] = 0
            with pytest.raises(BackendError, match="exit 'exit1'"):
                device(frames)


def host_all(frames: np.ndarray) -> list[Prediction]:
    with on_host(CASCADE, POINT) as host:
        return host(frames)


class TestTheBestMode:
    """The best one that works here is taken, and what was passed over is known."""

    def test_with_everything_it_is_the_graph(self) -> None:
        with on_device(CASCADE, POINT) as device:
            assert device.backend.mode == "graph"
            assert device.backend.passed_over == {}

    def test_without_graphs_it_polls(self) -> None:
        with on_device(CASCADE, POINT, device={"graphs": "too old"}) as device:
            assert device.backend.mode == "polling"
            assert device.backend.passed_over == {"graph": "too old"}
            assert device(images(CASCADE, 1)[0]).trace.mode == "polling"

    def test_a_batch_polls(self) -> None:
        with on_device(CASCADE, POINT, batch=2) as device:
            assert device.backend.mode == "polling"

    def test_where_mapped_memory_stays_unseen_it_waits(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from edge_runtime.backends.cuda import probe

        reason = "the host does not see what the device writes to mapped memory"
        monkeypatch.setattr(probe, "_PATIENCE_S", 0.01)
        monkeypatch.setattr(probe.Slot, "bring", lambda self, to: None)
        cuda = FakeCuda()
        assert probe.why_not(cuda, 1)["polling"] == reason
        assert probe.why_not(cuda, 1)["sync"] == ""
        assert not cuda.live

    def test_a_graph_that_takes_wrong_branches_is_found_out(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(FakeCuda, "set_condition", lambda self, handle, value: None)
        with on_device(CASCADE, POINT) as device:
            assert device.backend.mode == "polling"
            assert "ended at exit None instead of 1" in device.backend.passed_over["graph"]

    def test_a_mode_that_is_not_there_is_refused_with_those_that_are(self) -> None:
        cuda = FakeCuda(graphs="the driver is for CUDA 12.2")
        with pytest.raises(BackendUnavailable, match=r"CUDA 12\.2") as caught:
            on_device(CASCADE, POINT, cuda=cuda, mode="graph").open()
        assert "Modes that are: polling, sync, run_all" in str(caught.value)
        assert not cuda.live

    def test_options_that_mean_nothing_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="mode: got 'fast'"):
            CudaOptions(mode="fast")
        with pytest.raises(ConfigError, match="batch"):
            CudaOptions(batch=0)

    def test_a_policy_that_only_the_host_knows_is_refused_by_the_graph(self) -> None:
        class Mine:
            def evaluated(self, exits: int) -> tuple[int, ...]:
                return tuple(range(exits))

            def leaves(self, position: int, decision: Any, streak: Any) -> Any:
                return np.bool_(position == 1)

        class Point(OperatingPoint):
            def policy_for(self, cascade: Any) -> Any:
                return Mine()

        with on_device(CASCADE, Point("mine"), mode="polling") as device:
            assert device(images(CASCADE, 1)[0]).exit == "exit1"
        with pytest.raises(ConfigError, match=r"Mine can't be decided.*mode='polling'"):
            on_device(CASCADE, Point("mine"), mode="graph").open()


class TestWhatAFrameCosts:
    """Counted on the fake device's own log."""

    @staticmethod
    def calls(device: Scheduler, frame: np.ndarray) -> list[str]:
        log = device.backend.cuda.log
        before = len(log)
        device(frame)
        return log[before:]

    def frames(self) -> np.ndarray:
        """One that leaves at each exit."""
        frames = np.zeros((4, *CASCADE.image.sample_shape()), np.float32)
        for k in range(4):
            frames[k, k, 0] = 20
        return frames

    @pytest.mark.parametrize("nested", [False, True])
    def test_a_graph_is_one_launch_and_one_wait_at_any_depth(self, nested: bool) -> None:
        with on_device(CASCADE, POINT, mode="graph", nested=nested) as device:
            for k, frame in enumerate(self.frames()):
                before = device.backend.waits
                calls = self.calls(device, frame)
                assert [c for c in calls if c != "is_done"] == ["graph launch"]
                assert device.backend.waits - before == 1
                assert device(frame).exit == f"exit{k}"

    @pytest.mark.parametrize("mode", ["polling", "sync"])
    def test_the_host_waits_once_per_evaluated_exit(self, mode: str) -> None:
        with on_device(CASCADE, POINT, mode=mode) as device:
            for k, frame in enumerate(self.frames()):
                before = device.backend.waits
                calls = self.calls(device, frame)
                assert device.backend.waits - before == k + 1
                # Per exit: a segment, a head and a decision; preprocessing is one more.
                assert calls.count("launch") == 3 * (k + 1) + 1
                assert calls.count("copy") == (1 if mode == "polling" else k + 2)
                assert calls.count("synchronize") == (0 if mode == "polling" else k + 1)

    def test_the_reference_runs_everything_and_waits_once(self) -> None:
        with on_device(CASCADE, POINT, mode="run_all") as device:
            calls = self.calls(device, self.frames()[0])
        assert calls.count("launch") == 13
        assert calls.count("synchronize") == 1

    def test_behind_the_answering_exit_nothing_runs_on_the_device(self) -> None:
        ran: list[str] = []
        made = functions(CASCADE)

        def noting(name: str) -> Any:
            return lambda inputs: ran.append(name) or made[name](inputs)

        stages = FakeStages({stage.name: noting(stage.name) for stage in CASCADE.stages})
        with on_device(CASCADE, POINT, mode="graph", stages=stages) as device:
            for k, frame in enumerate(self.frames()):
                ran.clear()
                device(frame)
                device(frame)  # The first one has run to its end before this one begins.
                assert set(ran) == {s.name for s in CASCADE.stages[: 1 + 2 * (k + 1)]}

    def test_on_a_jetson_no_image_is_copied(self) -> None:
        facts = FakeCuda().facts.__class__(
            name="Orin",
            compute_capability=(8, 7),
            driver=(12, 6),
            integrated=True,
            memory_bytes=1 << 33,
        )
        with on_device(CASCADE, POINT, mode="polling", device={"facts": facts}) as device:
            frame = images(CASCADE, 1)[0]
            assert "copy" not in self.calls(device, frame)
            with on_host(CASCADE, POINT) as host:
                assert said(device(frame)) == said(host(frame))

    def test_a_hundred_frames_leave_nothing_behind(self) -> None:
        for options in WAYS.values():
            with on_device(CASCADE, POINT, **options) as device:
                cuda = device.backend.cuda
                live = len(cuda.live)
                for frame in images(CASCADE, 100):
                    device(frame)
                assert len(cuda.live) == live
            assert not cuda.live


class TestSwitch:
    """Another operating point between two frames."""

    @way
    def test_only_numbers_are_written(self, way: dict) -> None:
        frames = images(CASCADE, 10)
        other = OperatingPoint(
            "other",
            metric="entropy",
            thresholds={"exit0": -0.4, "exit1": -0.9, "exit2": -1.0},
            temperatures={"exit1": 2.0},
        )
        patient = OperatingPoint(
            "patient", policy="patient_and_confident", thresholds=POINT.thresholds, patience=2
        )
        with on_device(CASCADE, POINT, **way) as device:
            log = device.backend.cuda.log
            for point in (other, patient, POINT):
                before = len(log)
                device.switch(point)
                assert set(log[before:]) <= {"copy", "synchronize"}
                with on_host(CASCADE, point) as host:
                    assert [said(device(f)) for f in frames] == [said(host(f)) for f in frames]

    def test_frames_in_flight_keep_their_point(self) -> None:
        never = OperatingPoint.all_exits(CASCADE)
        with on_device(CASCADE, OperatingPoint.all_exits(CASCADE), overlap=True) as device:
            pending = [device.submit(frame) for frame in images(CASCADE, 2)]
            always = OperatingPoint("p", thresholds={f"exit{k}": 0.01 for k in range(3)})
            device.switch(always)
            assert [p.result().exit for p in pending] == ["exit3", "exit3"]
            assert device(images(CASCADE, 1)[0]).exit == "exit0"
            device.switch(never)
            assert device(images(CASCADE, 1)[0]).exit == "exit3"

    def test_other_exits_or_variants_are_refused(self) -> None:
        with on_device(CASCADE, POINT) as device:
            with pytest.raises(ConfigError, match=r"evaluates other exits.*got exit3, expected"):
                device.switch(OperatingPoint("p", policy="never"))
            other = OperatingPoint("p", thresholds=POINT.thresholds, variants={"head1": "int8"})
            with pytest.raises(ConfigError, match="variant of stage 'head1': got int8, expected"):
                device.switch(other)
            same = OperatingPoint("p", thresholds=POINT.thresholds, variants={"head1": "fp32"})
            device.switch(same)

    def test_on_the_host_too(self) -> None:
        frame = images(CASCADE, 1)[0]
        with on_host(CASCADE, POINT) as host:
            host.switch(OperatingPoint("p", thresholds={f"exit{k}": 0.01 for k in range(3)}))
            assert host(frame).exit == "exit0"
            assert host.point.name == "p"


class TestDeadlines:
    """The graph is told the deepest exit beforehand; elsewhere the clock decides."""

    @pytest.mark.parametrize("mode", ["graph", "polling", "sync"])
    def test_the_deepest_exit_that_is_expected_in_time_answers(self, mode: str) -> None:
        clock = FakeClock()
        made = functions(CASCADE)

        def slow(name: str) -> Any:
            return lambda inputs: clock.advance(0.010) or made[name](inputs)

        stages = FakeStages({**made, **{f"segment{k}": slow(f"segment{k}") for k in range(4)}})
        point = OperatingPoint.all_exits(CASCADE)
        frame = images(CASCADE, 1)[0]
        for deadline, want in ((0.001, 0), (0.015, 0), (0.025, 1), (0.039, 2), (0.041, 3)):
            with on_device(CASCADE, point, mode=mode, clock=clock, stages=stages) as device:
                prediction = device(frame, deadline_s=deadline)
            assert prediction.exit == f"exit{want}"
            assert prediction.trace.ended == ("last" if want == 3 else "deadline")
            assert prediction.deadline_missed == (deadline < 0.01)
            assert len(prediction.trace.exits) == want + 1

    def test_a_confident_exit_comes_before_the_deadline(self) -> None:
        frame = np.zeros(CASCADE.image.sample_shape(), np.float32)
        frame[1, 0] = 20
        with on_device(CASCADE, POINT, mode="graph") as device:
            prediction = device(frame, deadline_s=100.0)
            assert (prediction.exit, prediction.trace.ended) == ("exit1", "confident")

    def test_what_was_believed_too_slow_is_tried_again(self) -> None:
        point = OperatingPoint.all_exits(CASCADE)
        with on_device(CASCADE, point, mode="graph") as device:
            frame = images(CASCADE, 1)[0]
            device._expected.observe(2, 1, 1e6)
            exits = [device(frame, deadline_s=1000.0).exit for _ in range(200)]
        assert exits[0] == "exit1"
        assert exits[-1] == "exit3"

    def test_the_time_between_exits_is_the_devices(self) -> None:
        with on_device(CASCADE, OperatingPoint.all_exits(CASCADE), mode="graph") as device:
            prediction = device(images(CASCADE, 1)[0])
        at = [run.at_s for run in prediction.trace.exits]
        # A branch node, a segment, a head and a decision: four ticks of the fake's clock.
        assert np.allclose(np.diff(at), 4e-6, atol=1.1e-6)
        assert at[-1] == pytest.approx(prediction.latency_s)
        assert all(np.isnan(run.duration_s) for run in prediction.trace.stages)


class TestOverlap:
    """The next frame is brought and preprocessed beside the one in flight."""

    @pytest.mark.parametrize("mode", MODES)
    def test_no_order_of_the_streams_changes_an_answer(self, mode: str) -> None:
        frames = images(CASCADE, 8, seed=1)
        want = [said(p) for p in map(host_one, frames)]
        for seed in range(40):
            with on_device(
                CASCADE, POINT, mode=mode, overlap=True, device={"seed": seed}
            ) as device:
                assert [said(p) for p in device.each(frames)] == want

    @pytest.mark.parametrize("mode", MODES)
    def test_a_forgotten_wait_would_be_noticed(
        self, mode: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Otherwise the test above could not fail."""
        monkeypatch.setattr(FakeStream, "wait", lambda self, event: None)
        frames = images(CASCADE, 8, seed=1)
        want = [said(p) for p in map(host_one, frames)]

        def goes_wrong(seed: int) -> bool:
            try:
                cuda = FakeCuda(seed=seed)
                with on_device(CASCADE, POINT, mode=mode, overlap=True, cuda=cuda) as device:
                    return [said(p) for p in device.each(frames)] != want
            except CudaError:  # Not even the frame's number had arrived.
                return True

        assert any(map(goes_wrong, range(10)))

    def test_preprocessing_runs_beside_inference(self) -> None:
        ran: list[tuple[str, float]] = []
        made = functions(CASCADE)

        def noting(name: str) -> Any:
            return lambda inputs: ran.append((name, float(inputs_id(inputs)))) or made[name](inputs)

        def inputs_id(inputs: Any) -> float:
            return next(iter(inputs.values()))[0, 0, 0]

        frames = images(CASCADE, 6)
        point = OperatingPoint.all_exits(CASCADE)
        found = False
        for seed in range(10):
            stages = FakeStages({stage.name: noting(stage.name) for stage in CASCADE.stages})
            with on_device(
                CASCADE, point, mode="graph", overlap=True, stages=stages, device={"seed": seed}
            ) as device:
                ran.clear()
                list(device.each(frames))
            order = [name for name, _ in ran]
            last = [i for i, name in enumerate(order) if name == "head3"]
            begun = [i for i, name in enumerate(order) if name == "preprocess"]
            found |= any(b < e for b, e in zip(begun[1:], last, strict=False))
        assert found

    @pytest.mark.parametrize("mode", MODES)
    def test_submitting_does_not_wait(self, mode: str) -> None:
        with on_device(CASCADE, POINT, mode=mode, overlap=True) as device:
            before = device.backend.waits
            pending = [device.submit(frame) for frame in images(CASCADE, 2)]
            assert device.backend.waits == before
            third = device.submit(images(CASCADE, 3)[2])  # Finishes the first one.
            assert device.backend.waits > before
            assert [p.result().label for p in (third, *pending)]

    def test_results_may_be_asked_for_in_any_order_and_twice(self) -> None:
        frames = images(CASCADE, 2)
        with on_device(CASCADE, POINT, overlap=True) as device:
            one, two = (device.submit(frame) for frame in frames)
            assert said(two.result()) == said(host_one(frames[1]))
            assert said(one.result()) == said(one.result()) == said(host_one(frames[0]))

    def test_a_frame_in_flight_when_the_cascade_is_closed_says_so(self) -> None:
        with on_device(CASCADE, POINT, overlap=True) as device:
            pending = device.submit(images(CASCADE, 1)[0])
        with pytest.raises(BackendError, match="was closed before"):
            pending.result()

    def test_without_overlap_frames_are_finished_one_by_one(self) -> None:
        frames = images(CASCADE, 5)
        with on_device(CASCADE, POINT) as device, on_host(CASCADE, POINT) as host:
            assert list(map(said, device.each(frames))) == list(map(said, host.each(frames)))
            with pytest.raises(BackendError, match="no frame can be fed ahead"):
                device.backend.feed_ahead(frames[:1])
            with pytest.raises(BackendError, match="takes one frame at a time"):
                host.backend.feed_ahead(frames[:1])


def host_one(frame: np.ndarray) -> Prediction:
    with on_host(CASCADE, POINT) as host:
        return host(frame)


class TestTrouble:
    """What goes wrong in the middle."""

    @mode_
    def test_frames_behind_a_failed_one_fail_too(self, mode: str) -> None:
        """Otherwise they would be given its answer."""
        made, fails = functions(CASCADE), [False]

        def failing(stage: str, stream: Stream) -> None:
            if fails[0] and stage == "segment1":
                raise CudaError("a launch that the driver refused")

        def slow(inputs: Any) -> Any:
            if fails[0]:
                raise CudaError("a launch that the driver refused")
            return made["segment1"](inputs)

        frames = images(CASCADE, 4)
        point = OperatingPoint.all_exits(CASCADE)
        with on_host(CASCADE, point) as host:
            want = [said(host(frame)) for frame in frames]
        stages = FakeStages({**made, "segment1": slow}, around=failing)
        with on_device(CASCADE, point, mode=mode, overlap=True, stages=stages) as device:
            first = device.submit(frames[0])
            assert said(first.result()) == want[0]
            one = two = None
            with pytest.raises(CudaError, match="driver refused"):
                fails[0] = mode != "run_all"
                one, two = device.submit(frames[1]), device.submit(frames[2])
                fails[0] = True
                one.result()
            fails[0] = False
            if two is not None:
                with pytest.raises(BackendError, match="frame before it failed"):
                    two.result()
            assert said(device(frames[3])) == want[3]

    @pytest.mark.parametrize("mode", ["graph", "polling", "sync"])
    def test_a_frame_that_was_interrupted_has_no_answer(self, mode: str) -> None:
        made, press = functions(CASCADE), [False]

        def interrupted(inputs: Any) -> Any:
            if press[0]:
                press[0] = False
                raise KeyboardInterrupt
            return made["segment1"](inputs)

        stages = FakeStages({**made, "segment1": interrupted})
        point = OperatingPoint.all_exits(CASCADE)
        with on_device(CASCADE, point, mode=mode, stages=stages) as device:
            pending = device.submit(images(CASCADE, 1)[0])
            press[0] = True
            with pytest.raises(KeyboardInterrupt):
                pending.result()
            with pytest.raises(BackendError, match="interrupted before its answer"):
                pending.result()

    def test_closing_frees_everything_though_the_context_can_t_be_entered(self) -> None:
        device = on_device(CASCADE, POINT).open()
        cuda = device.backend.cuda
        cuda.make_current = lambda: (_ for _ in ()).throw(CudaError("no context"))
        thread = threading.Thread(target=device.close)
        thread.start()
        thread.join()
        assert not cuda.live

    @mode_
    def test_ctrl_c_while_waiting_leaves_a_cascade_that_works(self, mode: str) -> None:
        made = functions(CASCADE)
        press = [False]

        def interrupted(inputs: Any) -> Any:
            if press[0]:
                press[0] = False
                raise KeyboardInterrupt
            return made["segment1"](inputs)

        frames = images(CASCADE, 6)
        point = OperatingPoint.all_exits(CASCADE)
        with on_host(CASCADE, point) as host:
            want = [said(host(frame)) for frame in frames]
        stages = FakeStages({**made, "segment1": interrupted})
        for overlap in (False, True):
            with on_device(CASCADE, point, mode=mode, stages=stages, overlap=overlap) as device:
                press[0] = True
                with pytest.raises(KeyboardInterrupt):
                    device(frames[0])
                assert [said(device(frame)) for frame in frames] == want
                assert [said(p) for p in device.each(frames)] == want

    @pytest.mark.parametrize("mode", ["graph", "polling"])
    def test_a_device_that_hangs_is_given_up(self, mode: str) -> None:
        hang = [False]
        never = FakeEvent(FakeCuda())
        never.recorded = 1

        def around(stage: str, stream: Stream) -> None:
            if hang[0] and stage == "segment1":
                stream.wait(never)

        stages = FakeStages(functions(CASCADE), around=around)
        point = OperatingPoint.all_exits(CASCADE)
        device = on_device(CASCADE, point, mode=mode, stages=stages, timeout_s=0.05).open()
        frame = images(CASCADE, 1)[0]
        if mode == "graph":
            device.backend._ready.main.wait(never)
        hang[0] = True
        with pytest.raises(CudaError, match=r"gave no answer within 0\.05 s"):
            device(frame)
        for call in (lambda: device(frame), lambda: device.switch(point)):
            with pytest.raises(CudaError, match="has not answered before"):
                call()
        log = device.backend.cuda.log
        before = len(log)
        watchdog = threading.Thread(target=device.close)
        watchdog.start()
        watchdog.join()
        # What asks the device does so with the context of the thread it is asked from.
        assert log[before] == "make_current"
        assert device.backend.cuda.live
        with pytest.raises(CudaError, match="has not answered before"):
            device.open()
        hang[0], never.reached = False, 1
        while device.backend._hung:
            device.close()
        with on_host(CASCADE, point) as host, device.open():
            assert said(device(frame)) == said(host(frame))
        assert not device.backend.cuda.live

    @pytest.mark.parametrize("overlap", [False, True])
    @mode_
    def test_an_interrupt_between_two_lines_mixes_no_answers_up(
        self, mode: str, overlap: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        frames, point = images(CASCADE, 3), OperatingPoint.all_exits(CASCADE)
        with on_host(CASCADE, point) as host:
            want = [said(host(frame)) for frame in frames]
        with on_device(CASCADE, point, mode=mode, overlap=overlap) as device:
            first = device.submit(frames[0])
            second = device.submit(frames[1]) if overlap else None
            with monkeypatch.context() as patched:
                patched.setattr(device, "_finish", _raise(KeyboardInterrupt()))
                with pytest.raises(KeyboardInterrupt):
                    first.result()
            for pending in filter(None, (first, second)):
                with pytest.raises(BackendError, match="interrupted"):
                    pending.result()
            assert said(device(frames[2])) == want[2]

    @pytest.mark.parametrize("error", [CudaError("refused"), KeyboardInterrupt()])
    @mode_
    def test_a_frame_that_can_t_begin_leaves_the_one_before_and_the_next(
        self, mode: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        frames, point = images(CASCADE, 3), OperatingPoint.all_exits(CASCADE)
        with on_host(CASCADE, point) as host:
            want = [said(host(frame)) for frame in frames]
        with on_device(CASCADE, point, mode=mode, overlap=True) as device:
            first = device.submit(frames[0])
            with monkeypatch.context() as patched:
                after = device.backend.feed_ahead

                def failing(image: Any) -> None:
                    after(image)
                    raise error

                patched.setattr(device.backend, "feed_ahead", failing)
                with pytest.raises(type(error)):
                    device.submit(frames[1])
            third = device.submit(frames[2])
            assert said(first.result()) == want[0]
            assert said(third.result()) == want[2]

    def test_a_stage_that_calls_the_host_can_t_be_in_a_branch(self) -> None:
        def around(stage: str, stream: Stream) -> None:
            if stage == "head1":
                stream.host_function(lambda: None)

        stages = FakeStages(functions(CASCADE), around=around)
        with on_device(CASCADE, POINT, mode="polling", stages=stages) as device:
            device(images(CASCADE, 1)[0])
        cuda = FakeCuda()
        with pytest.raises(CudaError, match="host node can't be in a branch"):
            on_device(CASCADE, POINT, mode="graph", stages=stages, cuda=cuda).open()
        assert not cuda.live

    @pytest.mark.parametrize("what", ["allocates", "waits"])
    def test_a_stage_that_can_t_be_captured_is_named(self, what: str) -> None:
        cuda = FakeCuda()

        def around(stage: str, stream: Stream) -> None:
            if stage == "head1" and cuda._capturing:
                stream.synchronize() if what == "waits" else cuda.memory(16)

        stages = FakeStages(functions(CASCADE), around=around)
        with pytest.raises(
            CudaError, match=r"stage 'head1' can't be captured.*allocates"
        ) as caught:
            on_device(CASCADE, POINT, mode="graph", stages=stages, cuda=cuda).open()
        assert caught.value.stage == "head1"
        assert not cuda.live

    def test_another_thread_makes_the_context_current_once(self) -> None:
        frames = images(CASCADE, 3)
        with on_device(CASCADE, POINT) as device:
            log = device.backend.cuda.log
            assert "make_current" not in log
            thread = threading.Thread(target=lambda: [device(frame) for frame in frames])
            thread.start()
            thread.join()
            assert log.count("make_current") == 1
            device.switch(POINT)
            assert log.count("make_current") == 1
            thread = threading.Thread(target=device.close)
            thread.start()
            thread.join()
            assert log.count("make_current") == 2

    def test_an_image_of_another_shape_is_refused_before_anything_runs(self) -> None:
        with on_device(CASCADE, POINT) as device:
            log = list(device.backend.cuda.log)
            with pytest.raises(
                InputError, match=r"shape: got \(1, 4, 6\), expected \(batch, 4, 5\)"
            ):
                device(np.zeros((4, 6), np.float32))
            assert device.backend.cuda.log == log

    def test_sequence_numbers_wrap_around_zero(self) -> None:
        frames = images(CASCADE, 4)
        for mode in MODES:
            with on_device(CASCADE, POINT, mode=mode) as device:
                device.backend._sequence = 2**32 - 3
                assert [said(device(f)) for f in frames] == [said(host_one(f)) for f in frames]
                assert device.backend._sequence == 2


@way
@pytest.mark.parametrize("code", ["OUT_OF_MEMORY", "ILLEGAL_ADDRESS"])
def test_a_fault_at_any_native_call_is_one_error_and_frees_everything(way: dict, code: str) -> None:
    """Fails every call in turn, from opening to the last of a few frames."""
    from edge_runtime.backends.cuda.fake import Fault

    frames = images(CASCADE, 3)
    frames[:, :2] = 0

    def use(cuda: FakeCuda) -> None:
        with on_device(CASCADE, POINT, cuda=cuda, **way) as device:
            for _ in device.each(frames):
                pass

    clean = FakeCuda()
    use(clean)
    step = 1 if code == "OUT_OF_MEMORY" else 7
    seen = set()
    for call, name in list(enumerate(clean.log))[::step]:
        if name.startswith("close"):
            continue
        cuda = FakeCuda(fault=Fault(call, code))
        try:
            use(cuda)
        except (CudaError, BackendUnavailable) as error:
            assert code in str(error)
            seen.add(name)
        assert not cuda.live, (call, name)
    assert {"memory", "mapped_memory", "stream", "kernels", "launch"} <= seen or step > 1


@mode_
def test_a_device_lost_at_any_moment_is_one_error(mode: str) -> None:
    frames = images(CASCADE, 2)
    for after in itertools.count():
        cuda = FakeCuda(lose_device_after=after)
        try:
            with on_device(CASCADE, POINT, cuda=cuda, mode=mode) as device:
                for frame in frames:
                    device(frame)
            break
        except CudaError as error:
            assert "LAUNCH_FAILED" in str(error) and "start it anew" in str(error)
        assert not cuda.live
    assert after > 30
