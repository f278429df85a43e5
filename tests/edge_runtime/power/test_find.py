"""Which readers a machine gets, and the reasons for those it doesn't."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edge_runtime.power import sysfs
from edge_runtime.power.find import find, is_jetson
from tests.edge_runtime.power.machines import (
    AGX_ORIN,
    INTEL_SERVER,
    ORIN_NANO,
    hwmon_of,
    jetson,
    rapl,
    write,
)
from tests.edge_runtime.power.test_jtop import Client, client  # noqa: F401 - a fixture
from tests.edge_runtime.power.test_nvml import Gpu, installed


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jtop", None)
    monkeypatch.setitem(sys.modules, "pynvml", None)


@pytest.mark.usefixtures("client")
def test_a_jetson_with_jtop_has_that_one_source(tmp_path: Path) -> None:
    jetson(tmp_path, ORIN_NANO, "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit")
    found = find(tmp_path, gpu=0)
    assert [source.name for source in found.sources] == ["VDD_IN (jtop)"]
    assert found.missing == {}


@pytest.mark.usefixtures("no_packages")
def test_a_jetson_without_jtop_has_its_power_monitor(tmp_path: Path) -> None:
    jetson(tmp_path, AGX_ORIN, "NVIDIA Jetson AGX Orin Developer Kit")
    found = find(tmp_path, gpu=0)
    assert [source.name for source in found.sources] == [
        "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0 (INA3221)"
    ]
    assert found.missing.keys() == {"jtop"}
    assert "edge-runtime[jtop]" in found.missing["jtop"]
    with found.sources[0] as source:
        assert source.read() == pytest.approx(8.711, abs=1e-3)


@pytest.mark.usefixtures("no_packages")
def test_a_jetson_whose_monitor_tells_nonsense_has_no_source(tmp_path: Path) -> None:
    jetson(tmp_path, ORIN_NANO, "NVIDIA Jetson Orin Nano")
    write(hwmon_of(tmp_path), {"curr1_input": "?"})
    found = find(tmp_path)
    assert found.sources == ()
    assert "got '?', expected a whole number" in found.missing["INA3221"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/device-tree/model": "NVIDIA Jetson Orin NX Developer Kit\0"}, True),
        ({"proc/device-tree/compatible": "maker,board\0nvidia,p3767-0000\0nvidia,tegra234"}, True),
        ({"sys/firmware/devicetree/base/model": "NVIDIA Jetson AGX Orin\0"}, True),
        ({"proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"}, False),
        ({}, False),
    ],
)
def test_a_jetson_is_known_by_its_device_tree(
    tmp_path: Path, files: dict[str, str], expected: bool
) -> None:
    write(tmp_path, files)
    assert is_jetson(tmp_path) is expected


def test_a_desktop_has_its_gpu_and_its_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, Gpu("NVIDIA GeForce RTX 4090", energy=1, power=1))
    rapl(tmp_path, INTEL_SERVER)
    names = ["NVIDIA GeForce RTX 4090 (NVML)", "package-0 (RAPL)", "package-1 (RAPL)"]
    found = find(tmp_path, gpu=0)
    assert [source.name for source in found.sources] == names
    assert found.missing == {}
    assert [source.name for source in find(tmp_path).sources] == names[1:]


@pytest.mark.usefixtures("no_packages")
def test_each_reader_that_fails_has_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rapl(tmp_path, INTEL_SERVER)
    read = sysfs._bytes

    def guarded(path: Path) -> bytes:
        if path.name == "energy_uj" and path.parent.name == "intel-rapl:1":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(sysfs, "_bytes", guarded)
    found = find(tmp_path, gpu=0)
    assert [source.name for source in found.sources] == ["package-0 (RAPL)"]
    assert found.missing.keys() == {"NVML", "package-1 (RAPL)"}
    assert "run as root" in found.missing["package-1 (RAPL)"]
    assert "edge-runtime[bench]" in found.missing["NVML"]


@pytest.mark.usefixtures("no_packages")
def test_an_empty_tree_gives_reasons(tmp_path: Path) -> None:
    found = find(tmp_path, gpu=0)
    assert found.sources == ()
    assert found.missing.keys() == {"NVML", "RAPL"}


def test_this_machine_gives_sources_or_reasons() -> None:
    found = find(gpu=0)
    assert found.sources or found.missing
    assert all(found.missing.values())
    for source in found.sources:
        with source:
            assert source.read() >= 0
