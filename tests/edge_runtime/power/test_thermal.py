"""Temperatures of thermal zones, on trees of files.

Types and the -256000 of a block that is off as jetson-stats shows them on an Orin NX.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.power import sysfs
from edge_runtime.power.thermal import temperatures
from tests.edge_runtime.power.machines import write

ORIN = {
    0: ("cpu-thermal", 46062),
    1: ("gpu-thermal", 46406),
    2: ("cv0-thermal", -256000),
    5: ("soc0-thermal", 45875),
    10: ("tj-thermal", 47906),
}


def zones(root: Path, told: dict[int, tuple[str, object]]) -> None:
    for number, (kind, temp) in told.items():
        write(root / f"sys/class/thermal/thermal_zone{number}", {"type": kind, "temp": temp})


def test_zones_are_told_in_order_and_a_block_that_is_off_is_left_out(tmp_path: Path) -> None:
    zones(tmp_path, {**ORIN, 11: ("broken", "hot"), 12: ("silly", 999000)})
    assert list(temperatures(tmp_path).items()) == [
        ("cpu-thermal", 46.062),
        ("gpu-thermal", 46.406),
        ("soc0-thermal", 45.875),
        ("tj-thermal", 47.906),
    ]


def test_zones_of_one_type_are_told_apart(tmp_path: Path) -> None:
    zones(tmp_path, {0: ("acpitz", 27800), 1: ("acpitz", 29800), 2: ("x86_pkg_temp", 52000)})
    assert temperatures(tmp_path) == {"acpitz (0)": 27.8, "acpitz (1)": 29.8, "x86_pkg_temp": 52}


def test_a_zone_that_does_not_answer_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zones(tmp_path, ORIN)
    read = sysfs._bytes

    def asleep(path: Path) -> bytes:
        if path.parent.name == "thermal_zone1" and path.name == "temp":
            raise BlockingIOError(11, "Resource temporarily unavailable", str(path))
        return read(path)

    monkeypatch.setattr(sysfs, "_bytes", asleep)
    assert "gpu-thermal" not in temperatures(tmp_path)
    assert "tj-thermal" in temperatures(tmp_path)


def test_without_zones_there_are_no_temperatures(tmp_path: Path) -> None:
    assert temperatures(tmp_path) == {}
