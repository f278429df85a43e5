"""Energy per frame from windows in which one subject runs alone."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest

from bench.latency.energy import measure_energy, with_energy
from bench.latency.frames import Frames
from bench.latency.subjects import Answer
from bench.result import Energy, SubjectEnergy
from edge_runtime.console import Console
from edge_runtime.errors import PowerError
from edge_runtime.power.base import EnergyCounter
from tests.bench.results import made_up_result

IDLE_W = 2.0
JOULES_PER_FRAME = 0.05


class Meter(EnergyCounter):
    """Two watts, and a twentieth of a joule per frame."""

    def __init__(self, fails_after: int | None = None) -> None:
        super().__init__("meter")
        self.frames = 0
        self._reads = 0
        self._fails_after = fails_after

    def _joules(self) -> float:
        self._reads += 1
        if self._fails_after is not None and self._reads > self._fails_after:
            raise PowerError("meter is gone", remedy="Plug it in")
        return IDLE_W * time.perf_counter() + JOULES_PER_FRAME * self.frames


class Sleeper:
    """A subject that takes a millisecond."""

    name, what, apart = "cascade", "", False

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def prepare(self, turn: int) -> None:
        pass

    def classify(self, image: np.ndarray) -> Answer:
        time.sleep(0.001)
        self._meter.frames += 1
        return Answer(0.001)


def measured(meter: Meter) -> Energy:
    frames = Frames(np.zeros((2, 1, 1, 3), np.uint8), None, None)
    console = Console(stdout=io.StringIO(), stderr=io.StringIO())
    with meter:
        (found,) = measure_energy([Sleeper(meter)], frames, [meter], 0.1, console)
    return found


def test_energy_per_frame_is_that_of_its_window() -> None:
    found = measured(Meter())
    cascade, idle = found.of("cascade"), found.of("idle")
    assert cascade is not None
    assert idle is not None
    frame_s = cascade.seconds / cascade.frames
    assert cascade.joules_per_frame == pytest.approx(JOULES_PER_FRAME + IDLE_W * frame_s, rel=0.05)
    assert idle.watts == pytest.approx(IDLE_W, rel=0.05)
    assert idle.joules_per_frame is None
    assert found.problem == ""


def test_a_meter_that_vanishes_keeps_the_windows_before_and_says_so() -> None:
    found = measured(Meter(fails_after=7))
    assert "of 6 windows" in found.problem
    assert "meter is gone" in found.problem
    assert found.of("idle") is not None


def test_a_meter_that_vanishes_at_once_measures_nothing() -> None:
    found = measured(Meter(fails_after=1))
    assert found.subjects == ()
    assert found.problem.startswith("6 of 6 windows")


def forced(exit_name: str, seconds: float, joules: float) -> SubjectEnergy:
    return SubjectEnergy(
        subject=f"exit {exit_name} always",
        seconds=100 * seconds,
        frames=100,
        joules=100 * joules,
        watts=joules / seconds,
        joules_per_frame=joules,
    )


def test_power_between_two_exits_is_what_their_frames_differ_by() -> None:
    energy = Energy(
        reader="meter",
        hertz=None,
        subjects=(
            forced("saver", 0.001, 0.004),
            forced("middle", 0.003, 0.024),
            forced("final", 0.00305, 0.0244),
        ),
    )
    steps = {
        "saver": ["preprocess", "saver"],
        "middle": ["segment1", "head1"],
        "final": ["segment2"],
    }
    result = with_energy(made_up_result(), (energy,), steps)
    assert [one.joules for one in result.exits] == [0.004, 0.024, 0.0244]
    assert result.latency_table is not None
    watts = result.latency_table.watts
    assert watts["saver"] == pytest.approx(4.0)
    assert watts["head1"] == pytest.approx(10.0)
    # Two exits that hardly differ: the power of the whole frame.
    assert watts["segment2"] == pytest.approx(8.0)


def test_without_energy_nothing_is_made_up() -> None:
    bare = Energy(reader="meter", hertz=None, problem="gone")
    result = with_energy(made_up_result(energy=()), (bare,), {})
    assert result.energy == (bare,)
