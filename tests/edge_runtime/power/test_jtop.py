"""The jtop service: what is taken from its dictionaries, and what it says where it fails.

The dictionaries are those of `machines`; the client's behaviour is that of jtop/jtop.py in
jetson-stats 4, the messages are its own.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from edge_runtime.errors import BackendUnavailable, BadReading, PowerError
from edge_runtime.power.jtop import Jtop, total_of
from tests.edge_runtime.power.machines import JTOP_AGX_ORIN, JTOP_ORIN_NANO, JTOP_ORIN_NX

OFF = "The jtop.service is not active. Please run:\nsudo systemctl restart jtop.service"
OLDER = (
    "Mismatch version jtop service: [4.2.7] and client: [4.3.2]. Please run:\n\n"
    "sudo systemctl restart jtop.service"
)
FORBIDDEN = "I can't access jtop.service.\nPlease logout or reboot this board."


class JtopException(Exception):
    """As in jetson-stats."""


class Client:
    """The client of jetson-stats with a service that a test drives."""

    interval = 0.5
    power: Any = JTOP_ORIN_NX
    refuses: Exception | None = None
    lost: Exception | None = None
    running = True
    closed = 0

    def start(self) -> None:
        if self.refuses is not None:
            raise self.refuses

    def ok(self, spin: bool = False) -> bool:
        assert spin  # without it jtop waits for the next value
        if self.lost is not None:
            raise self.lost
        return self.running

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    package, client = ModuleType("jtop"), Client()
    package.jtop = lambda: client  # type: ignore[attr-defined]
    package.JtopException = JtopException  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jtop", package)
    return client


@pytest.mark.parametrize(
    ("power", "rails", "watts"),
    [
        (JTOP_ORIN_NANO, "VDD_IN", 4.172),
        (JTOP_ORIN_NX, "VDD_IN", 5.133),
        # Not jtop's own 11.607 W: that holds a rail twice, and the grant of a USB-C port.
        (JTOP_AGX_ORIN, "VDD_CPU_CV + VDD_GPU_SOC + VIN_SYS_5V0", 8.710),
    ],
)
def test_the_power_of_a_whole_module(power: object, rails: str, watts: float) -> None:
    assert total_of(power) == (rails, pytest.approx(watts))


@pytest.mark.parametrize(
    ("power", "message"),
    [
        (({"cur": 5133, "avg": 4800}, {}), "unknown form: got tuple.*Update jetson-stats"),
        ({"rail": {}}, "unknown form: got dict"),
        ({"rail": [], "tot": {}}, "rail and tot of jtop"),
        ({"rail": {}, "tot": {"power": 0, "avg": 0}}, "jtop finds no power rail"),
        ({"rail": {}, "tot": {"name": "VDD_IN"}}, "power of VDD_IN in jtop: got None"),
        ({"rail": {"GPU": {"power": "1 W"}}, "tot": {}}, "power of GPU in jtop: got '1 W'"),
        ({"rail": {"GPU": {"power": True}}, "tot": {}}, "power of GPU in jtop: got True"),
    ],
)
def test_an_answer_of_another_form_is_refused(power: object, message: str) -> None:
    with pytest.raises(PowerError, match=message):
        total_of(power)


def test_the_service_is_read(client: Client) -> None:
    with Jtop() as source:
        assert (source.name, source.counts, source.update_s) == ("VDD_IN (jtop)", False, 0.5)
        assert source.read() == pytest.approx(5.133)
    assert client.closed == 1


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jtop", None)
    with pytest.raises(BackendUnavailable, match=r"edge-runtime\[jtop\]"):
        Jtop().open()


@pytest.mark.parametrize(
    ("refuses", "message"),
    [
        (JtopException(OFF), "not active. Please run: sudo systemctl restart jtop.service$"),
        (JtopException(OLDER), "Mismatch version.*Install the service's version"),
        (JtopException(FORBIDDEN), "access jtop.service.*usermod -aG jtop"),
        (ConnectionResetError(104, "Connection reset"), "Connection reset.*systemctl restart"),
        (EOFError(), "EOFError. Restart it"),
    ],
)
def test_a_service_that_refuses_says_why(client: Client, refuses: Exception, message: str) -> None:
    client.refuses = refuses
    with pytest.raises(PowerError, match=f"the service of jtop can't be used: .*{message}"):
        Jtop().open()
    assert client.closed == 1


def test_a_service_that_ends_is_lost(client: Client) -> None:
    with Jtop() as source:
        client.lost = JtopException("Lost connection with jtop server")
        with pytest.raises(PowerError, match=r"was lost: Lost connection.*systemctl restart"):
            source.read()
        client.lost, client.running = None, False
        with pytest.raises(PowerError, match="the service of jtop was lost"):
            source.read()


def test_nonsense_of_the_service_is_refused(client: Client) -> None:
    with Jtop() as source:
        client.power = {"rail": {}, "tot": {"power": -5, "name": "VDD_IN"}}
        with pytest.raises(BadReading, match=r"the power of VDD_IN .jtop.: got -0.005 W"):
            source.read()
        client.power = {"rail": {}, "tot": {"power": 5, "name": "POM_5V_IN"}}
        with pytest.raises(BadReading, match="rails in jtop: got POM_5V_IN, expected VDD_IN"):
            source.read()
