"""What a reader of power or energy is, and which readings are believed."""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from edge_runtime.errors import BadReading, PowerError
from edge_runtime.timing import Clock

#: No machine that runs one cascade draws more; a reading above it is nonsense.
MAX_WATTS = 5000.0
#: Joules of this many seconds at `MAX_WATTS` may come at once, as counters grow in steps.
_STEP_S = 1.0

Source = TypeVar("Source", bound="PowerSource")


class PowerSource(ABC):
    """One sensor, or the sum of several. A context manager that opens and closes it.

    Attributes:
        name: For people: the rail or device, and the reader in brackets. Final once opened.
        counts: True where `read` gives joules since it was opened, False where it gives watts now.
        update_s: Seconds in which the sensor takes a new value; 0 where that is unknown.
    """

    name: str
    counts: bool
    update_s: float = 0.0

    def __init__(self, name: str) -> None:
        self.name = name
        self._is_open = False

    def open(self) -> None:
        """Reach the sensor and read it once.

        Raises:
            PowerError: It is missing, may not be read, or gives nonsense.
            BackendUnavailable: A package is missing.
        """
        try:
            self._open()
            self._is_open = True
            self._first()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the sensor. A second call does nothing."""
        self._is_open = False
        self._close()

    @abstractmethod
    def read(self) -> float:
        """Watts now, or joules since the source was opened (see `counts`).

        Raises:
            BadReading: This reading can't be believed; the next may be good.
            PowerError: The sensor was lost, or is not open.
        """

    def __enter__(self: Source) -> Source:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _need_open(self) -> None:
        if not self._is_open:
            raise PowerError(f"{self.name} is not open", remedy="Open it before it is read")

    def _open(self) -> None:  # noqa: B027 - a file needs no opening
        """Reach the sensor."""

    def _close(self) -> None:  # noqa: B027
        """Let go of it, from any state."""

    @abstractmethod
    def _first(self) -> None:
        """Take the reading that shows that the sensor works."""


class PowerMeter(PowerSource):
    """A source that tells watts; a subclass gives them with `_watts`."""

    counts = False

    def read(self) -> float:
        """Watts now."""
        self._need_open()
        watts = self._watts()
        if not 0 <= watts <= MAX_WATTS:  # NaN as well
            raise BadReading(
                f"the power of {self.name}",
                got=f"{watts:g} W",
                expected=f"0 to {MAX_WATTS:g} W",
            )
        return watts

    def _first(self) -> None:
        self.read()

    @abstractmethod
    def _watts(self) -> float:
        """What the sensor says, unchecked."""


class EnergyCounter(PowerSource):
    """A source that counts joules; a subclass gives the counter with `_joules`.

    Args:
        name: As in `PowerSource`.
        clock: Monotonic seconds, to tell a counter that wrapped from one that was set back.
    """

    counts = True
    #: Joules at which the counter starts again from zero; None where it never does.
    wraps_at: float | None = None

    def __init__(self, name: str, *, clock: Clock = time.monotonic) -> None:
        super().__init__(name)
        self._clock = clock
        self._total = self._last = self._then = 0.0

    def read(self) -> float:
        """Joules since the source was opened.

        A counter that wraps must be read before it wraps twice.
        """
        self._need_open()
        now, raw = self._clock(), self._believed()
        grown = raw - self._last
        if grown < 0 and self.wraps_at is not None:
            grown += self.wraps_at
        most = MAX_WATTS * (now - self._then + _STEP_S)
        if not 0 <= grown <= most:
            raise BadReading(
                f"the energy counter of {self.name} was set back or jumped",
                got=f"{raw:g} J after {self._last:g} J",
                expected=f"a growth of 0 to {most:g} J",
            )
        self._then, self._last = now, raw
        self._total += grown
        return self._total

    def _first(self) -> None:
        self._total, self._then, self._last = 0.0, self._clock(), self._believed()

    def _believed(self) -> float:
        raw = self._joules()
        most = math.inf if self.wraps_at is None else self.wraps_at
        if not (0 <= raw <= most and math.isfinite(raw)):
            raise BadReading(
                f"the energy counter of {self.name}",
                got=f"{raw:g} J",
                expected="a number of joules that is not negative"
                if math.isinf(most)
                else f"0 to {most:g} J",
            )
        return raw

    @abstractmethod
    def _joules(self) -> float:
        """What the counter says, unchecked."""


@contextlib.contextmanager
def opened(sources: Iterable[PowerSource]) -> Iterator[None]:
    """Open all sources, and close them at the end or where one can't be opened.

    Raises:
        PowerError: See `PowerSource.open`.
        BackendUnavailable: See `PowerSource.open`.
    """
    with contextlib.ExitStack() as stack:
        for source in sources:
            stack.enter_context(source)
        yield
