"""jtop, the service of jetson-stats (AGPL, an optional extra), as a reader of a Jetson's power.

Its service reads the INA3221 for all its clients, every half a second unless told otherwise, and
every client of another minor version is turned away.
"""

from __future__ import annotations

import importlib
import multiprocessing
import queue
from collections.abc import Mapping
from multiprocessing.managers import RemoteError
from typing import Any, NamedTuple

from edge_runtime.errors import BadReading, PowerError, missing_package
from edge_runtime.power.base import PowerMeter
from edge_runtime.power.rails import total_rails

_RESTART = "Restart it: sudo systemctl restart jtop.service"


class Total(NamedTuple):
    """Power of the whole module.

    Attributes:
        rails: Which rails it is of, "VDD_IN".
        watts: Power now.
    """

    rails: str
    watts: float


def total_of(power: object) -> Total:
    """The whole power in what `jtop.power` gives.

    Where the board has a rail for its total, jtop names it in "tot". Elsewhere jtop adds all it
    finds, also a rail that another one holds and what a USB-C port was granted; here the rails of
    the INA3221 are added by `total_rails`.

    Args:
        power: {"rail": {label: {"power": mW, "type": "INA3221", "online": True, ...}}, "tot":
            {"power": mW, "name": label}}.

    Raises:
        BadReading: A number is missing or isn't one.
        PowerError: It is not the form of jtop 4, or no rail is in it.
    """
    if not isinstance(power, Mapping) or not {"rail", "tot"} <= power.keys():
        raise PowerError(
            "what jtop tells of power has an unknown form",
            got=type(power).__name__,
            expected="a dictionary with rail and tot, as jetson-stats 4 gives it",
            remedy="Update jetson-stats: sudo pip3 install -U jetson-stats",
        )
    rails, total = power["rail"], power["tot"]
    if not isinstance(rails, Mapping) or not isinstance(total, Mapping):
        raise BadReading("rail and tot of jtop", got=repr(power)[:80], expected="dictionaries")
    name = total.get("name")
    if isinstance(name, str) and name:
        return Total(name, _watts(name, total))
    read = {
        str(label): rail
        for label, rail in rails.items()
        if isinstance(rail, Mapping)
        and rail.get("type", "INA3221") == "INA3221"
        and rail.get("online", True) is not False
    }
    if not read:
        raise PowerError(
            "jtop finds no power rail on this board",
            remedy="It needs the INA3221 of a Jetson and its driver",
        )
    wanted = total_rails(read)
    return Total(" + ".join(wanted), sum(_watts(label, read[label]) for label in wanted))


def _watts(label: str, rail: Mapping[str, object]) -> float:
    milliwatts = rail.get("power")
    if isinstance(milliwatts, bool) or not isinstance(milliwatts, int | float):
        raise BadReading(f"power of {label} in jtop", got=repr(milliwatts), expected="a number")
    return milliwatts * 1e-3


class Jtop(PowerMeter):
    """The total power that the jtop service reads."""

    def __init__(self) -> None:
        super().__init__("jtop")
        self._client: Any = None
        self._rails = ""
        #: All that the client of jetson-stats raises where the service is off or goes away.
        self._failures: tuple[type[Exception], ...] = ()

    def _open(self) -> None:
        try:
            package = importlib.import_module("jtop")
        except (ImportError, OSError) as error:
            raise missing_package("jetson-stats", "jtop") from error
        self._failures = (
            package.JtopException,
            multiprocessing.ProcessError,
            RemoteError,
            OSError,
            EOFError,
            queue.Empty,
            LookupError,
            ValueError,
            TypeError,
            AttributeError,
        )
        try:
            self._client = package.jtop()
            self._client.start()
            self.update_s = max(0.0, float(getattr(self._client, "interval", 0.5)))
            power = self._client.power
        except self._failures as error:
            raise PowerError(
                f"the service of jtop can't be used: {_one_line(error)}", remedy=_remedy(error)
            ) from error
        self._rails = total_of(power).rails
        self.name = f"{self._rails} (jtop)"

    def _close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            try:
                client.close()
            except self._failures:
                return  # the service is gone, and with it the connection

    def _watts(self) -> float:
        try:
            alive = self._client.ok(spin=True)
            power = self._client.power
        except self._failures as error:
            raise PowerError(
                f"the service of jtop was lost: {_one_line(error)}", remedy=_remedy(error)
            ) from error
        if not alive:
            raise PowerError("the service of jtop was lost", remedy=_RESTART)
        total = total_of(power)
        if total.rails != self._rails:
            raise BadReading("rails in jtop", got=total.rails, expected=self._rails)
        return total.watts


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _remedy(error: Exception) -> str | None:
    """What the message of jetson-stats itself does not say."""
    text = str(error)
    if "ersion" in text:
        return (
            "Install the service's version of jetson-stats in this environment, for the same "
            "Python: pip install jetson-stats==<version of the service>"
        )
    if "access" in text:
        return "Add yourself to its group, and log in again: sudo usermod -aG jtop $USER"
    return None if "systemctl" in text else _RESTART
