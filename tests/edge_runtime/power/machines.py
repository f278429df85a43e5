"""Files of machines that are not here, written under a folder as the kernel shows them.

INA3221: names and meaning of the files from the kernel's Documentation/hwmon/ina3221.rst; rails and
addresses of the Orin modules from the kernel's tegra234-p3701.dtsi and tegra234-p3767.dtsi; the
readings of AGX Orin as its users publish them, those of Orin Nano and NX from the dictionaries of
jetson-stats below. RAPL: names as posted to the kernel's mailing list from an Intel laptop (mmio's
second package-0 included); ranges are 2^32 steps of 61 uJ (Intel) and of 15.3 uJ (AMD, README of
its driver amd_energy).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

#: Channel -> label, mV, mA.
Chip = Mapping[int, tuple[str, int, int]]

ORIN_NANO = {
    "1-0040": {
        1: ("VDD_IN", 5064, 824),
        2: ("VDD_CPU_GPU_CV", 5056, 112),
        3: ("VDD_SOC", 5064, 272),
    }
}
ORIN_NX = {
    "1-0040": {
        1: ("VDD_IN", 4936, 1040),
        2: ("VDD_CPU_GPU_CV", 4928, 216),
        3: ("VDD_SOC", 4936, 312),
    }
}
AGX_ORIN = {
    "1-0040": {
        1: ("VDD_GPU_SOC", 12008, 280),
        2: ("VDD_CPU_CV", 12008, 40),
        3: ("VIN_SYS_5V0", 4968, 980),
    },
    "1-0041": {1: ("NC", 0, 0), 2: ("VDDQ_VDD2_1V8AO", 4968, 80), 3: ("NC", 0, 0)},
}
#: jetson-stats 4 on an Orin Nano, on an Orin NX, and on an AGX Orin whose total it adds up itself,
#: a USB-C port included (its core/power.py; numbers of AGX Orin from the readings above).
JTOP_ORIN_NANO = {
    "rail": {
        "VDD_CPU_GPU_CV": {"volt": 5056, "curr": 112, "power": 566, "online": True, "avg": 566},
        "VDD_SOC": {"volt": 5064, "curr": 272, "power": 1377, "online": True, "avg": 1377},
    },
    "tot": {
        "volt": 5064,
        "curr": 824,
        "power": 4172,
        "online": True,
        "avg": 4172,
        "name": "VDD_IN",
    },
}
JTOP_ORIN_NX = {
    "rail": {
        "VDD_CPU_GPU_CV": {"type": "INA3221", "volt": 4928, "curr": 216, "power": 1064},
        "VDD_SOC": {"type": "INA3221", "volt": 4936, "curr": 312, "power": 1540},
    },
    "tot": {"volt": 4936, "curr": 1040, "warn": 5232, "power": 5133, "avg": 4800, "name": "VDD_IN"},
}
JTOP_AGX_ORIN = {
    "rail": {
        "VDDQ_VDD2_1V8AO": {"type": "INA3221", "volt": 4968, "curr": 80, "power": 397},
        "VDD_CPU_CV": {"type": "INA3221", "volt": 12008, "curr": 40, "power": 480},
        "VDD_GPU_SOC": {"type": "INA3221", "volt": 12008, "curr": 280, "power": 3362},
        "VIN_SYS_5V0": {"type": "INA3221", "volt": 4968, "curr": 980, "power": 4868},
        "ucsi_source_psy_2_00081": {"type": "USB", "online": True, "volt": 5000, "power": 2500},
    },
    "tot": {"power": 11607, "avg": 11607},
}


def write(root: Path, files: Mapping[str, object]) -> None:
    """Write files with one value each, ended as the kernel ends them."""
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{value}\n", encoding="utf-8")


def jetson(root: Path, chips: Mapping[str, Chip], model: str) -> None:
    """A Jetson with JetPack 5 or newer; driver and bus link to the folder of the device."""
    write(root, {"proc/device-tree/model": f"{model}\0"})
    for number, (address, channels) in enumerate(chips.items(), 3):
        device = root / "sys/devices/platform/bus@0/c240000.i2c/i2c-1" / address
        hwmon = hwmon_of(root, address, number)
        write(hwmon, {"name": "ina3221", "in7_label": "sum of shunt voltages", "in7_input": 760})
        for k, (label, millivolts, milliamperes) in channels.items():
            write(
                hwmon,
                {
                    f"in{k}_label": label,
                    f"in{k}_enable": 1,
                    f"in{k}_input": millivolts,
                    f"curr{k}_input": milliamperes,
                },
            )
        write(hwmon, {"curr4_input": 360})
        for link in ("drivers/ina3221", "devices"):
            folder = root / "sys/bus/i2c" / link
            folder.mkdir(parents=True, exist_ok=True)
            (folder / address).symlink_to(device)


def hwmon_of(root: Path, address: str = "1-0040", number: int = 3) -> Path:
    """The folder with a chip's channels."""
    i2c = root / "sys/devices/platform/bus@0/c240000.i2c/i2c-1"
    return i2c / address / f"hwmon/hwmon{number}"


def rapl(root: Path, domains: Mapping[str, tuple[str, int, int]]) -> None:
    """Domains of RAPL.

    Args:
        root: Where they are written.
        domains: Folder -> name, uJ, range in uJ.
    """
    for folder, (name, energy, most) in domains.items():
        write(
            root / "sys/class/powercap" / folder,
            {"name": name, "energy_uj": energy, "max_energy_range_uj": most, "enabled": 1},
        )


INTEL_SERVER = {
    "intel-rapl:0": ("package-0", 130_000_000, 262_143_328_850),
    "intel-rapl:0:0": ("core", 90_000_000, 262_143_328_850),
    "intel-rapl:0:1": ("dram", 20_000_000, 65_712_999_613),
    "intel-rapl:1": ("package-1", 250_000_000, 262_143_328_850),
    "intel-rapl:1:0": ("dram", 20_000_000, 65_712_999_613),
    "intel-rapl:2": ("psys", 400_000_000, 262_143_328_850),
    "intel-rapl-mmio:0": ("package-0", 130_000_000, 262_143_328_850),
}
RYZEN = {
    "intel-rapl:0": ("package-0", 65_532_000_000, 65_532_610_987),
    "intel-rapl:0:0": ("core", 20_000_000_000, 65_532_610_987),
}
