"""Temperatures of the thermal zones that the kernel shows."""

from __future__ import annotations

from pathlib import Path

from edge_runtime.errors import PowerError
from edge_runtime.power.sysfs import number_in, read_int, read_text

#: Degrees Celsius outside which a sensor does not measure: a Jetson says -256 for a block that is
#: switched off.
_COLDEST, _HOTTEST = -60.0, 150.0


def temperatures(root: Path = Path("/")) -> dict[str, float]:
    """Temperatures now, by type of zone; zones that tell none or nonsense are left out.

    Args:
        root: Where the system's files are.

    Returns:
        Type of zone -> degrees Celsius, {"cpu-thermal": 46.1, "tj-thermal": 47.9}. Where several
        zones have one type, each name ends with the number of its zone: "acpitz (1)".
    """
    found: list[tuple[int, str, float]] = []
    for zone in (root / "sys/class/thermal").glob("thermal_zone*"):
        try:
            kind, celsius = read_text(zone / "type"), read_int(zone / "temp") / 1000
        except PowerError:
            continue
        if kind and _COLDEST <= celsius <= _HOTTEST:
            found.append((number_in(zone.name), kind, celsius))
    kinds = [kind for _, kind, _ in found]
    return {
        kind if kinds.count(kind) == 1 else f"{kind} ({number})": celsius
        for number, kind, celsius in sorted(found)
    }
