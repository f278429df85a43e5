"""Sources of power and energy that a test drives."""

from __future__ import annotations

from collections.abc import Callable

from edge_runtime.power.base import EnergyCounter, PowerMeter
from edge_runtime.timing import Clock


class Watts(PowerMeter):
    """Power that a function tells."""

    def __init__(self, told: Callable[[], float], update_s: float = 0.0) -> None:
        super().__init__("watts")
        self._told = told
        self.update_s = update_s

    def _watts(self) -> float:
        return self._told()


class Joules(EnergyCounter):
    """A counter that a function tells."""

    def __init__(
        self, told: Callable[[], float], clock: Clock, wraps_at: float | None = None
    ) -> None:
        super().__init__("joules", clock=clock)
        self._told = told
        self.wraps_at = wraps_at

    def _joules(self) -> float:
        return self._told()
