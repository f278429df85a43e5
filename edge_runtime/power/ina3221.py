"""INA3221, the power monitor of Jetson modules, as the kernel's driver shows it in sysfs.

JetPack 5 and newer: hwmon, `in<k>_label`, `in<k>_input` in mV, `curr<k>_input` in mA, k from 1 to 3
(kernel, Documentation/hwmon/ina3221.rst). JetPack 4: iio, `rail_name_<k>`, `in_voltage<k>_input`,
`in_current<k>_input`, k from 0 to 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import BadReading, PowerError
from edge_runtime.power.base import PowerMeter
from edge_runtime.power.rails import total_rails
from edge_runtime.power.sysfs import number_in, read_int, read_text

_BUS = "sys/bus/i2c"
#: An idle rail may read a little below zero: one step of the converter, 40 uV at 2 mOhm and 20 V.
_NOISE_W = 0.5
#: Seconds above which `update_interval` is not believed.
_LONGEST_UPDATE_S = 10.0


@dataclass(frozen=True)
class Rail:
    """One channel of a monitor.

    Attributes:
        label: "VDD_IN".
        millivolts: File with the voltage in mV.
        milliamperes: File with the current in mA.
        update_s: Seconds in which the monitor takes new values; 0 where the driver doesn't tell.
    """

    label: str
    millivolts: Path
    milliamperes: Path
    update_s: float = 0.0

    def watts(self) -> float:
        """Power now.

        Raises:
            BadReading: It can't be believed.
            PowerError: The monitor is gone.
        """
        watts = read_int(self.millivolts) * read_int(self.milliamperes) * 1e-6
        if watts < -_NOISE_W:
            raise BadReading(
                f"the power of {self.label} (INA3221)",
                got=f"{watts:g} W",
                expected="a power that is not negative",
            )
        return watts


class Ina3221(PowerMeter):
    """The sum of some rails.

    Args:
        rails: At least one.
    """

    def __init__(self, rails: tuple[Rail, ...]) -> None:
        super().__init__(f"{' + '.join(rail.label for rail in rails)} (INA3221)")
        self.rails = rails
        self.update_s = max(rail.update_s for rail in rails)

    def _watts(self) -> float:
        return max(0.0, sum(rail.watts() for rail in self.rails))


def find_source(root: Path = Path("/")) -> Ina3221:
    """The reader of the module's whole power.

    Args:
        root: Where the system's files are.

    Raises:
        PowerError: There is no INA3221 whose rails are named and can be read.
    """
    rails = find_rails(root)
    if not rails:
        raise PowerError(
            f"no INA3221 with named rails under {root / _BUS}",
            remedy="On a Jetson the driver comes with JetPack; in a container, mount /sys",
        )
    wanted = total_rails(rail.label for rail in rails)
    return Ina3221(tuple(rail for rail in rails if rail.label in wanted))


def find_rails(root: Path = Path("/")) -> tuple[Rail, ...]:
    """All rails that have a name, a voltage and a current, in the order of chips and channels.

    Channels that are not connected ("NC"), switched off, or have no current are left out.
    """
    rails: list[Rail] = []
    for chip in _chips(root):
        rails += _hwmon_rails(chip) if chip.name.startswith("hwmon") else _iio_rails(chip)
    return tuple(rails)


def _chips(root: Path) -> list[Path]:
    """Folders with the channels of each chip, once each: drivers and devices link to the same."""
    bus = root / _BUS
    found = {
        folder.resolve()
        for pattern in (
            "drivers/ina3221*/*/hwmon/hwmon*",
            "devices/*/hwmon/hwmon*",
            "drivers/ina3221*/*/iio:device*",
        )
        for folder in bus.glob(pattern)
        if folder.is_dir() and _is_ina3221(folder)
    }
    return sorted(found, key=str)


def _is_ina3221(folder: Path) -> bool:
    try:
        return read_text(folder / "name").startswith("ina3221")
    except PowerError:
        return False


def _hwmon_rails(chip: Path) -> list[Rail]:
    try:
        update_s = read_int(chip / "update_interval") / 1000
    except PowerError:
        update_s = 0.0
    if not 0 <= update_s <= _LONGEST_UPDATE_S:
        update_s = 0.0
    # in4 to in6 are shunt voltages, in7 and curr4 sums.
    channels = [k for k in (1, 2, 3) if not _switched_off(chip / f"in{k}_enable")]
    files = [
        (chip / f"in{k}_label", chip / f"in{k}_input", chip / f"curr{k}_input") for k in channels
    ]
    return _named(files, update_s)


def _iio_rails(chip: Path) -> list[Rail]:
    labels = sorted(chip.glob("rail_name_*"), key=lambda file: number_in(file.name))
    channels = [number_in(label.name) for label in labels]
    files = [
        (label, chip / f"in_voltage{k}_input", chip / f"in_current{k}_input")
        for label, k in zip(labels, channels, strict=True)
    ]
    return _named(files, 0.0)


def _named(files: list[tuple[Path, Path, Path]], update_s: float) -> list[Rail]:
    rails = []
    for label, voltage, current in files:
        try:
            name = read_text(label)
        except PowerError:
            continue
        if name not in ("", "NC") and voltage.exists() and current.exists():
            rails.append(Rail(name, voltage, current, update_s))
    return rails


def _switched_off(file: Path) -> bool:
    try:
        return read_int(file) == 0
    except PowerError:
        return False
