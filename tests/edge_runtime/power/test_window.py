"""Energy of a block: what is integrated, and what is said where it can't be."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.power.base import PowerSource, opened
from edge_runtime.power.ina3221 import find_source
from edge_runtime.power.rapl import Rapl
from edge_runtime.power.window import EnergyWindow, WindowEnergy
from edge_runtime.timing import FakeClock
from tests.edge_runtime.power.machines import ORIN_NX, RYZEN, hwmon_of, jetson, rapl, write
from tests.edge_runtime.power.sources import Joules, Watts

#: The thread sleeps through a test that takes its samples itself.
ASLEEP = 3600.0


def measured(
    source: PowerSource,
    clock: FakeClock,
    *,
    steps: int,
    step_s: float,
    at: Callable[[int], object] = lambda step: None,
) -> WindowEnergy:
    """A window in which `step_s` passes `steps` times, with a sample after each but the last."""
    with opened([source]), EnergyWindow([source], interval_s=ASLEEP, clock=clock) as window:
        for step in range(steps):
            clock.advance(step_s)
            at(step)
            if step < steps - 1:
                window.sample()
    (energy,) = window.results
    return energy


def test_power_is_integrated_by_straight_lines() -> None:
    clock = FakeClock()
    energy = measured(Watts(lambda: 10 * clock()), clock, steps=4, step_s=0.5)
    assert energy == WindowEnergy(
        source="watts", joules=pytest.approx(20.0), seconds=2.0, samples=5, hertz=2.0, rejected=0
    )


def test_begin_and_end_suffice_for_a_steady_power() -> None:
    energy = measured(Watts(lambda: 7.5), FakeClock(), steps=1, step_s=0.4)
    assert (energy.joules, energy.samples) == (pytest.approx(3.0), 2)


def test_a_sensor_that_takes_long_is_cut_to_the_block() -> None:
    clock = FakeClock()

    def slow() -> float:
        clock.advance(0.1)
        return 10.0

    energy = measured(Watts(slow), clock, steps=2, step_s=1.0)
    assert energy.seconds == pytest.approx(2.1)  # one sample was taken within the block
    assert energy.joules == pytest.approx(21.0)


def test_a_counter_is_read_around_the_block() -> None:
    clock = FakeClock()
    energy = measured(Joules(lambda: 100 + 30 * clock(), clock), clock, steps=2, step_s=0.5)
    assert (energy.joules, energy.seconds) == (pytest.approx(30.0), 1.0)
    assert energy.hertz is None
    assert energy.problem == ""


def test_a_counter_that_wraps_in_a_long_block_is_followed(tmp_path: Path) -> None:
    rapl(tmp_path, RYZEN)
    clock, folder = FakeClock(), tmp_path / "sys/class/powercap/intel-rapl:0"
    joules, wraps = 65_532.0, 65_532.610987

    def grow(step: int) -> None:
        raw = (joules + 1000.0 * (step + 1) * 5) % wraps
        write(folder, {"energy_uj": round(raw * 1e6)})

    energy = measured(Rapl("package-0", folder, clock=clock), clock, steps=40, step_s=5.0, at=grow)
    assert energy.joules == pytest.approx(200_000, abs=0.01)  # three times round


def test_a_counter_that_does_not_move_has_no_energy() -> None:
    clock = FakeClock()
    energy = measured(Joules(lambda: 100.0, clock), clock, steps=1, step_s=0.003)
    assert energy.joules is None
    assert energy.problem.startswith("the counter did not move in 0.003 s")


def test_a_sensor_that_vanishes_in_the_block_has_no_energy(tmp_path: Path) -> None:
    jetson(tmp_path, ORIN_NX, "NVIDIA Jetson Orin NX")

    def vanish(step: int) -> None:
        if step == 5:
            (hwmon_of(tmp_path) / "curr1_input").unlink()

    energy = measured(find_source(tmp_path), FakeClock(), steps=10, step_s=0.1, at=vanish)
    assert (energy.joules, energy.samples, energy.rejected) == (None, 6, 0)
    assert energy.problem.startswith("the sensor was lost while it measured: ")
    assert "curr1_input can't be read: No such file" in energy.problem


def test_a_sensor_that_comes_back_stays_lost(tmp_path: Path) -> None:
    jetson(tmp_path, ORIN_NX, "NVIDIA Jetson Orin NX")
    file = hwmon_of(tmp_path) / "curr1_input"

    def away(step: int) -> None:
        if step == 5:
            file.unlink()
        if step == 6:
            file.write_text("1000\n", encoding="utf-8")

    energy = measured(find_source(tmp_path), FakeClock(), steps=10, step_s=0.1, at=away)
    assert (energy.joules, energy.samples) == (None, 6)


@pytest.mark.parametrize(("bad", "joules"), [(1, 10.0), (2, 10.0), (3, None)])
def test_nonsense_is_dropped_until_it_is_a_twentieth(bad: int, joules: float | None) -> None:
    readings = iter([10.0] * 8 + [-1.0] * bad + [10.0] * (34 - bad))
    energy = measured(Watts(lambda: next(readings)), FakeClock(), steps=40, step_s=0.025)
    assert (energy.samples, energy.rejected) == (41 - bad, bad)
    if joules is None:
        assert energy.joules is None
        assert energy.problem.startswith("3 of 41 readings can't be believed, the last: the power")
    else:
        assert energy.joules == pytest.approx(joules)


def test_a_counter_that_is_set_back_has_no_energy() -> None:
    clock = FakeClock()
    source = Joules(lambda: 500.0 if clock() < 1 else 3.0, clock, wraps_at=262_143.0)
    energy = measured(source, clock, steps=2, step_s=0.5)
    assert energy.joules is None
    assert "could not be read at the window's begin or end: the energy counter" in energy.problem


def test_a_slow_sensor_is_sampled_as_often_as_it_takes_new_values() -> None:
    clock = FakeClock()
    source = Watts(lambda: 6.0, update_s=0.5)
    with opened([source]), EnergyWindow([source], interval_s=ASLEEP, clock=clock) as window:
        for _ in range(20):
            clock.advance(0.1)
            window.sample()
    (energy,) = window.results
    assert energy.joules == pytest.approx(12.0)
    assert (energy.samples, energy.hertz) == (6, 2.0)  # 0, 0.5, 1, 1.5, 2 and the end


def test_a_block_shorter_than_the_sensor_s_update_has_no_energy() -> None:
    energy = measured(Watts(lambda: 6.0, update_s=0.5), FakeClock(), steps=3, step_s=0.1)
    assert energy.joules is None
    assert energy.problem.startswith("the window of 0.3 s is shorter than the 0.5 s")


def test_an_empty_block_has_no_energy() -> None:
    energy = measured(Watts(lambda: 6.0), FakeClock(), steps=0, step_s=0.0)
    assert (energy.joules, energy.hertz) == (None, None)
    assert energy.problem == "2 good readings in 0 s: at least 2 are needed"


def test_a_source_that_is_not_open_says_so() -> None:
    with EnergyWindow([Watts(lambda: 1.0)]) as window:
        pass
    assert "watts is not open" in window.results[0].problem


def test_each_source_has_its_result_in_order() -> None:
    clock = FakeClock()
    sources = [Joules(lambda: clock(), clock), Watts(lambda: 3.0), Joules(lambda: 0.0, clock)]
    with opened(sources), EnergyWindow(sources, interval_s=ASLEEP, clock=clock) as window:
        clock.advance(2)
    assert [one.joules for one in window.results] == [pytest.approx(2), pytest.approx(6), None]


def test_without_sources_there_are_no_results() -> None:
    with EnergyWindow([]) as window:
        pass
    assert window.results == ()


def threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("energy-window")]


def test_the_thread_samples_at_the_interval() -> None:
    source = Watts(lambda: 4.0)
    with opened([source]), EnergyWindow([source], interval_s=0.01) as window:
        assert threads()
        time.sleep(0.2)
    (energy,) = window.results
    assert energy.joules == pytest.approx(4 * energy.seconds)
    assert energy.seconds >= 0.2
    assert energy.hertz is not None
    assert 5 <= energy.samples <= 2 + energy.seconds / 0.01
    assert energy.hertz == pytest.approx((energy.samples - 1) / energy.seconds, rel=0.2)
    assert not threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_in_the_block_stops_the_thread(error: type[BaseException]) -> None:
    source = Watts(lambda: 4.0)
    window = EnergyWindow([source], interval_s=0.001)
    with opened([source]), pytest.raises(error), window:
        raise error
    assert not threads()
    assert len(window.results) == 1


def test_a_fault_in_the_thread_is_not_swallowed() -> None:
    main = threading.current_thread()

    def faulty() -> float:
        if threading.current_thread() is main:
            return 4.0
        raise ZeroDivisionError("a fault of the reader")

    source = Watts(faulty)
    window = EnergyWindow([source], interval_s=0.001)
    with opened([source]), pytest.raises(ZeroDivisionError, match="a fault of the reader"), window:
        time.sleep(0.05)
    assert not threads()


def test_results_are_there_at_the_end_and_a_window_is_for_one_block() -> None:
    window = EnergyWindow([])
    with pytest.raises(RuntimeError, match="the window has not ended"):
        _ = window.results
    with window:
        pass
    with pytest.raises(RuntimeError, match="a window is for one block"):
        window.__enter__()


@pytest.mark.parametrize("interval_s", [0.0, -1.0, math.nan, math.inf])
def test_the_interval_is_a_positive_number(interval_s: float) -> None:
    with pytest.raises(ConfigError, match=r"interval_s: got .*, expected a positive number"):
        EnergyWindow([], interval_s=interval_s)
