"""How long a piece of work will still take."""

from __future__ import annotations

import pytest

from calib.time_left import TimeLeft, duration
from edge_runtime.timing import FakeClock


def test_the_time_left_follows_the_pace() -> None:
    shown: list[str] = []
    clock = FakeClock()
    left = TimeLeft(shown.append, 10, "models", clock)
    clock.advance(2)
    left.step()
    clock.advance(1)
    left.step(5)
    assert shown == ["1/10 models, 18 s left", "6/10 models, 2 s left"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations_as_people_read_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
