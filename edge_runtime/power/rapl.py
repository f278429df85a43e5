"""RAPL, the energy counters of x86 processors, as the kernel shows them under powercap.

Top domains only, one for each package: what lies inside a package (core, uncore, dram) and psys,
which holds the packages, would count energy twice. AMD's processors use the same driver and names.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from edge_runtime.errors import PowerError
from edge_runtime.power.base import EnergyCounter
from edge_runtime.power.sysfs import number_in, read_int, read_text
from edge_runtime.timing import Clock

_POWERCAP = "sys/class/powercap"


class Rapl(EnergyCounter):
    """The energy counter of one package. It grows about every millisecond.

    Args:
        name: Name of the domain, "package-0".
        folder: Folder of the domain.
        clock: As in `EnergyCounter`.
    """

    def __init__(self, name: str, folder: Path, *, clock: Clock = time.monotonic) -> None:
        super().__init__(f"{name} (RAPL)", clock=clock)
        self._file = folder / "energy_uj"
        self._range = folder / "max_energy_range_uj"

    def _open(self) -> None:
        # Some older processors tell 0: there a wrap can't be undone, and is refused as nonsense.
        most = read_int(self._range)
        self.wraps_at = most * 1e-6 if most > 0 else None

    def _joules(self) -> float:
        refused = (
            f"Since 2020 it is for root only: run as root, or have it made readable with: "
            f"sudo chmod a+r {self._file}"
        )
        return read_int(self._file, refused=refused) * 1e-6


class Packages(NamedTuple):
    """What RAPL offers here.

    Attributes:
        sources: A counter for each package.
        broken: Folder of a domain -> why it can't be told what it is.
    """

    sources: tuple[Rapl, ...]
    broken: Mapping[str, str] = MappingProxyType({})


def find_sources(root: Path = Path("/")) -> Packages:
    """The counters of all packages; they are not opened.

    Args:
        root: Where the system's files are.

    Raises:
        PowerError: There are none.
    """
    powercap = root / _POWERCAP
    # intel-rapl-mmio:0 is the same package by another way.
    folders = [f for f in powercap.glob("intel-rapl:*") if re.fullmatch(r"intel-rapl:\d+", f.name)]
    sources, broken = [], {}
    for folder in sorted(folders, key=lambda folder: number_in(folder.name)):
        try:
            name = read_text(folder / "name")
        except PowerError as error:
            broken[folder.name] = str(error)
            continue
        if name.startswith("package-"):
            sources.append(Rapl(name, folder))
    if not sources and not broken:
        raise PowerError(
            f"no package with an energy counter under {powercap}",
            remedy="Virtual machines and other processors than x86 have none; on a PC, load the "
            "driver: sudo modprobe intel_rapl_msr",
        )
    return Packages(tuple(sources), broken)
