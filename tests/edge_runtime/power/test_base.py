"""Which readings of power and energy are believed."""

from __future__ import annotations

import math

import pytest

from edge_runtime.errors import BadReading, PowerError
from edge_runtime.power.base import opened
from edge_runtime.timing import FakeClock
from tests.edge_runtime.power.sources import Joules, Watts


@pytest.mark.parametrize("watts", [-0.1, 5001.0, math.nan, math.inf])
def test_a_power_that_no_machine_draws_is_refused(watts: float) -> None:
    told = [12.5]
    with Watts(lambda: told[-1]) as source:
        assert source.read() == 12.5
        told.append(watts)
        with pytest.raises(BadReading, match=r"the power of watts: got .* expected 0 to 5000 W"):
            source.read()


@pytest.mark.parametrize("joules", [-1.0, math.nan, math.inf])
def test_a_counter_that_tells_nonsense_can_not_be_opened(joules: float) -> None:
    with pytest.raises(BadReading, match=r"the energy counter of joules: got"):
        Joules(lambda: joules, FakeClock()).open()


def test_a_counter_counts_from_its_opening() -> None:
    told = [100.0]
    with Joules(lambda: told[-1], FakeClock()) as source:
        assert source.read() == 0
        told.append(107.5)
        assert source.read() == 7.5


def test_a_counter_goes_on_where_it_wraps() -> None:
    clock, told = FakeClock(), [65_000.0]
    with Joules(lambda: told[-1], clock, wraps_at=65_532.0) as source:
        total = 0.0
        for raw, grown in ((65_500.0, 500.0), (468.0, 500.0), (60_000.0, 59_532.0), (500.0, 6032)):
            clock.advance(30)
            told.append(raw)
            total += grown
            assert source.read() == pytest.approx(total)


@pytest.mark.parametrize("wraps_at", [None, 262_143.0])
def test_a_counter_that_is_set_back_did_not_wrap(wraps_at: float | None) -> None:
    clock, told = FakeClock(), [1000.0]
    with Joules(lambda: told[-1], clock, wraps_at) as source:
        clock.advance(1)
        told.append(3.0)
        with pytest.raises(BadReading, match="was set back or jumped: got 3 J after 1000 J"):
            source.read()
        told.append(1010.0)  # one wrong reading is forgotten
        assert source.read() == 10


def test_a_counter_that_jumps_is_refused() -> None:
    clock, told = FakeClock(), [0.0]
    with Joules(lambda: told[-1], clock) as source:
        clock.advance(1)
        told.append(10_001.0)
        with pytest.raises(BadReading, match="expected a growth of 0 to 10000 J"):
            source.read()


def test_a_closed_source_is_not_read() -> None:
    source = Watts(lambda: 1.0)
    for again in range(2):
        with pytest.raises(PowerError, match=r"watts is not open. Open it before it is read"):
            source.read()
        with source:
            assert source.read() == 1, again


def test_sources_are_closed_where_another_can_not_be_opened() -> None:
    good, bad = Watts(lambda: 1.0), Watts(lambda: -1.0)
    with pytest.raises(BadReading), opened([good, bad]):
        pass
    with pytest.raises(PowerError, match="not open"):
        good.read()
