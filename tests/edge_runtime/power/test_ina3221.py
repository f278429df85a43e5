"""A Jetson's power monitor, on trees of files (`machines` says where their layout comes from)."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from edge_runtime.errors import BadReading, PowerError
from edge_runtime.power import sysfs
from edge_runtime.power.ina3221 import find_rails, find_source
from tests.edge_runtime.power.machines import (
    AGX_ORIN,
    ORIN_NANO,
    ORIN_NX,
    Chip,
    hwmon_of,
    jetson,
    write,
)


@pytest.mark.parametrize(
    ("chips", "name", "watts"),
    [
        (ORIN_NANO, "VDD_IN (INA3221)", 5.064 * 0.824),
        (ORIN_NX, "VDD_IN (INA3221)", 4.936 * 1.040),
        # VDDQ_VDD2_1V8AO is inside VIN_SYS_5V0.
        (
            AGX_ORIN,
            "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0 (INA3221)",
            12.008 * 0.280 + 12.008 * 0.040 + 4.968 * 0.980,
        ),
    ],
)
def test_the_power_of_a_whole_module(
    tmp_path: Path, chips: dict[str, Chip], name: str, watts: float
) -> None:
    jetson(tmp_path, chips, "NVIDIA Jetson")
    with find_source(tmp_path) as source:
        assert source.name == name
        assert not source.counts
        assert source.read() == pytest.approx(watts)


def test_a_chip_that_driver_and_bus_link_to_counts_once(tmp_path: Path) -> None:
    jetson(tmp_path, AGX_ORIN, "NVIDIA Jetson AGX Orin")
    labels = [rail.label for rail in find_rails(tmp_path)]
    assert labels == ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"]


def test_a_channel_that_is_off_or_has_no_current_is_left_out(tmp_path: Path) -> None:
    jetson(tmp_path, AGX_ORIN, "NVIDIA Jetson AGX Orin")
    write(hwmon_of(tmp_path), {"in2_enable": 0})
    (hwmon_of(tmp_path) / "curr3_input").unlink()
    assert find_source(tmp_path).name == "VDD_GPU_SOC + VDDQ_VDD2_1V8AO (INA3221)"


def test_the_layout_of_jetpack_4(tmp_path: Path) -> None:
    """AGX Xavier as energymon's JetsonPowerRails.md lists it: two chips, no rail for the total."""
    rails = [("GPU", 1000), ("CPU", 700), ("SOC", 900), ("CV", 0), ("VDDRQ", 300), ("SYS5V", 1500)]
    for i, (label, milliamperes) in enumerate(rails):
        chip, k = divmod(i, 3)
        write(
            tmp_path / f"sys/bus/i2c/drivers/ina3221x/1-004{chip}/iio:device{chip}",
            {
                "name": "ina3221x",
                f"rail_name_{k}": label,
                f"in_voltage{k}_input": 5000,
                f"in_current{k}_input": milliamperes,
            },
        )
    with find_source(tmp_path) as source:
        assert source.name == "GPU + CPU + SOC + CV + VDDRQ + SYS5V (INA3221)"
        assert source.read() == pytest.approx(5 * 4.4)


@pytest.mark.parametrize(("told", "update_s"), [("35", 0.035), ("-1", 0.0), ("x", 0.0)])
def test_how_often_the_chip_takes_new_values(tmp_path: Path, told: str, update_s: float) -> None:
    jetson(tmp_path, ORIN_NX, "NVIDIA Jetson Orin NX")
    write(hwmon_of(tmp_path), {"update_interval": told})
    assert find_source(tmp_path).update_s == update_s


def test_an_idle_rail_may_read_a_little_below_zero(tmp_path: Path) -> None:
    jetson(tmp_path, AGX_ORIN, "NVIDIA Jetson AGX Orin")
    write(hwmon_of(tmp_path), {"curr2_input": -8})
    with find_source(tmp_path) as source:
        assert source.read() == pytest.approx(12.008 * 0.272 + 4.968 * 0.980)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("", "got '', expected a whole number"),
        ("many", "got 'many', expected a whole number"),
        ("1e3", "got '1e3', expected a whole number"),
        ("٣", "expected a whole number"),
        ("-4000", "the power of VDD_IN .INA3221.: got -19.744 W"),
        ("99999999", "expected 0 to 5000 W"),
    ],
)
def test_nonsense_is_refused_and_the_next_reading_may_be_good(
    tmp_path: Path, told: str, message: str
) -> None:
    jetson(tmp_path, ORIN_NX, "NVIDIA Jetson Orin NX")
    with find_source(tmp_path) as source:
        write(hwmon_of(tmp_path), {"curr1_input": told})
        with pytest.raises(BadReading, match=message):
            source.read()
        write(hwmon_of(tmp_path), {"curr1_input": 1000})
        assert source.read() == pytest.approx(4.936)


def test_a_monitor_that_vanishes_is_lost(tmp_path: Path) -> None:
    jetson(tmp_path, ORIN_NX, "NVIDIA Jetson Orin NX")
    with find_source(tmp_path) as source:
        (hwmon_of(tmp_path) / "in1_input").unlink()
        with pytest.raises(PowerError, match=r"in1_input can't be read: No such .* see dmesg") as e:
            source.read()
    assert not isinstance(e.value, BadReading)


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (errno.ENODEV, PowerError, "can't be read: No such device. The sensor or its driver"),
        (errno.EIO, PowerError, "can't be read: Input/output error"),
        (errno.EACCES, PowerError, "may not be read by this user. Ask an administrator"),
        (errno.EAGAIN, BadReading, "could not be read: Resource temporarily"),
        (errno.ETIMEDOUT, BadReading, "could not be read: Connection timed out"),
    ],
)
def test_what_the_kernel_answers_decides_whether_the_sensor_is_lost(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    kind: type[PowerError],
    message: str,
) -> None:
    jetson(tmp_path, ORIN_NX, "NVIDIA Jetson Orin NX")

    def refuse(path: Path) -> bytes:
        raise OSError(code, os.strerror(code), str(path))

    with find_source(tmp_path) as source:
        monkeypatch.setattr(sysfs, "_bytes", refuse)
        with pytest.raises(PowerError, match=message) as caught:
            source.read()
    assert type(caught.value) is kind


def test_without_a_monitor_the_reason_is_told(tmp_path: Path) -> None:
    with pytest.raises(PowerError, match=r"no INA3221 with named rails under .*in a container"):
        find_source(tmp_path)


def test_another_monitor_is_not_taken_for_an_ina3221(tmp_path: Path) -> None:
    jetson(tmp_path, ORIN_NX, "NVIDIA Jetson Orin NX")
    write(hwmon_of(tmp_path), {"name": "ina238"})
    assert find_rails(tmp_path) == ()
