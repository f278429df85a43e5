"""How long a piece of work will still take, from how much of it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edge_runtime.console import Console


class TimeLeft:
    """Counts what is done and tells it, with the time that is left at this pace.

    Args:
        show: Takes the text, such as what `Console.status` yields.
        total: All of the work, in any unit; > 0.
        unit: Plural of what is counted, for the text.
        clock: Tells seconds.
    """

    def __init__(
        self,
        show: Callable[[str], None],
        total: int,
        unit: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._show = show
        self._total = total
        self._unit = unit
        self._clock = clock
        self._begin = clock()
        self._done = 0

    def step(self, count: int = 1) -> None:
        """Tell that `count` more are done."""
        self._done += count
        elapsed = self._clock() - self._begin
        left = elapsed / self._done * (self._total - self._done)
        self._show(f"{self._done}/{self._total} {self._unit}, {duration(left)} left")


@contextmanager
def time_left(console: Console, title: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    """Show how far a piece of work is and how long it will still take.

    Args:
        console: Where it is shown.
        title: What is done; begins the line.
        total: As of `TimeLeft`.
        unit: As of `TimeLeft`.

    Yields:
        `TimeLeft.step`: call it whenever one more, or some more, are done.
    """
    with console.status(title) as show:
        yield TimeLeft(show, total, unit).step


def duration(seconds: float) -> str:
    """Seconds as people read them: "8 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
