"""Turns are fair, what is recorded is what happened, and Ctrl-C keeps what was finished."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest

from bench.latency.forced import always
from bench.latency.frames import Frames
from bench.latency.rounds import LEAST_ROUNDS, Measurement, StageRecording
from bench.latency.subjects import Answer, Staged
from edge_runtime import OperatingPoint, Scheduler
from edge_runtime.backends.fake import FakeBackend
from edge_runtime.console import Console
from edge_runtime.timing import FakeClock
from tests.toys import toy_cascade, toy_images

EXITS = ("saver", "middle", "final")


class Scripted:
    """A subject that takes a fixed time of a fake clock."""

    apart = False

    def __init__(self, name: str, seconds: float, clock: FakeClock, log: list[str]) -> None:
        self.name, self.what = name, ""
        self._seconds, self._clock, self._log = seconds, clock, log
        self.before: Callable[[], None] = lambda: None

    def prepare(self, turn: int) -> None:
        self.before()

    def classify(self, image: np.ndarray) -> Answer:
        self._log.append(self.name)
        self._clock.advance(self._seconds)
        return Answer(self._seconds, EXITS[int(image[0, 0, 0]) % 3], int(image[0, 0, 0]))


def frames(count: int = 7) -> Frames:
    images = np.zeros((count, 1, 1, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return Frames(images, np.arange(count), None)


def quiet() -> Console:
    return Console(stdout=io.StringIO(), stderr=io.StringIO())


def test_every_subject_sees_every_frame_and_comes_first_about_as_often() -> None:
    clock, log = FakeClock(), []
    subjects = [Scripted(name, 0.001, clock, log) for name in "abc"]
    found = Measurement(frames(), subjects, EXITS, clock=clock).measure(1.2, quiet())
    rounds = len(found)
    turns = np.array(log).reshape(rounds, 3)
    assert {len(set(turn)) for turn in turns.tolist()} == {3}
    assert all(0.25 < (turns[:, 0] == name).mean() < 0.42 for name in "abc")
    for recording in found.recordings.values():
        assert recording.labels.tolist() == found.rows.tolist()
        assert recording.exits.tolist() == (found.rows % 3).tolist()


def test_who_lives_apart_sees_the_same_frames_in_blocks() -> None:
    clock, log = FakeClock(), []
    here, apart = (Scripted(name, 0.001, clock, log) for name in "ab")
    apart.apart = True
    measurement = Measurement(frames(), [here, apart], EXITS, clock=clock)
    measurement.warm_up(40, quiet())
    log.clear()
    found = measurement.measure(1.0, quiet())
    # One frame more wakes the threads that slept meanwhile.
    assert log[:42] == ["a"] * 20 + ["b"] * 20 + ["a"] * 2
    labels = [one.labels.tolist() for one in found.recordings.values()]
    assert labels[0] == labels[1] == found.rows.tolist()


def test_it_goes_on_for_the_asked_time() -> None:
    clock = FakeClock()
    subject = Scripted("a", 0.01, clock, [])
    found = Measurement(frames(), [subject], EXITS, clock=clock).measure(2.0, quiet())
    assert len(found) == pytest.approx(200, abs=1)
    assert found.measured_s == pytest.approx(2.0, abs=0.02)


def test_a_short_time_still_gives_the_least_number_of_rounds() -> None:
    clock = FakeClock()
    subject = Scripted("a", 1.0, clock, [])
    found = Measurement(frames(), [subject], EXITS, clock=clock).measure(0.5, quiet())
    assert len(found) == LEAST_ROUNDS


def interrupted_after(frames_: int, clock: FakeClock) -> tuple[Scripted, Scripted]:
    log: list[str] = []
    first, second = (Scripted(name, 0.01, clock, log) for name in "ab")

    def stop() -> None:
        if log.count("b") >= frames_:
            raise KeyboardInterrupt

    second.before = stop
    return first, second


def test_ctrl_c_keeps_the_rounds_that_all_have_finished() -> None:
    clock = FakeClock()
    subjects = interrupted_after(25, clock)
    found = Measurement(frames(), subjects, EXITS, clock=clock).measure(10, quiet())
    assert found.interrupted
    assert {len(one.seconds) for one in found.recordings.values()} == {25}
    assert len(found.rows) == 25


def test_ctrl_c_at_the_beginning_ends_it() -> None:
    clock = FakeClock()
    with pytest.raises(KeyboardInterrupt):
        Measurement(frames(), interrupted_after(3, clock), EXITS, clock=clock).measure(10, quiet())


def test_warming_up_takes_both_its_rounds_and_its_time() -> None:
    clock = FakeClock()
    log: list[str] = []
    measurement = Measurement(frames(), [Scripted("a", 0.01, clock, log)], EXITS, clock=clock)
    assert measurement.warm_up(5, quiet()) == pytest.approx(0.01)
    assert len(log) == 20
    measurement.warm_up(50, quiet())
    assert len(log) == 70


@pytest.mark.parametrize("exit_name", EXITS)
def test_a_forced_frame_leaves_there_after_the_exits_before_it(exit_name: str) -> None:
    cascade = toy_cascade()
    point = OperatingPoint("p", thresholds={"saver": 0.5, "middle": 0.5})
    with Scheduler(cascade, FakeBackend(), point, image_size=(5, 7)) as scheduler:
        subject = Staged("forced", "", scheduler, [always(scheduler, exit_name)])
        recording = StageRecording(scheduler.plan)
        for image in toy_images(5):
            subject.prepare(0)
            answer = subject.classify(image)
            assert answer.exit == exit_name
            assert answer.prediction is not None
            recording.add(answer.prediction)
    evaluated = np.isfinite(recording.decided).sum(axis=1).tolist()
    assert evaluated == [EXITS.index(exit_name) + 1] * 5


def test_a_cascade_that_is_cut_off_at_an_exit_can_be_forced_to_it() -> None:
    cascade = toy_cascade()
    point = OperatingPoint("p", thresholds={"saver": 0.5, "middle": 0.0})
    with Scheduler(cascade, FakeBackend(), point, image_size=(5, 7)) as scheduler:
        assert scheduler.exits == ("saver", "middle")
        for name in scheduler.exits:
            scheduler.switch(always(scheduler, name))
            assert scheduler(toy_images(1)[0]).exit == name


def test_stages_that_were_not_run_have_no_time() -> None:
    cascade = toy_cascade()
    point = OperatingPoint("p", thresholds={"saver": 0.5, "middle": 0.5})
    with Scheduler(cascade, FakeBackend(), point, image_size=(5, 7)) as scheduler:
        scheduler.switch(always(scheduler, "middle"))
        recording = StageRecording(scheduler.plan)
        recording.add(scheduler(toy_images(1)[0]))
    ran = dict(zip(recording.stages, recording.ran[0].tolist(), strict=True))
    assert [name for name, was in ran.items() if was] == [
        "preprocess",
        "saver",
        "segment1",
        "head1",
    ]
    assert np.isfinite(recording.durations[0]).tolist() == list(ran.values())
