"""Which of a Jetson's power rails make its total."""

from __future__ import annotations

from collections.abc import Iterable

#: Rails that measure the whole module (POM_5V_IN on the first Nano).
_WHOLE = ("VDD_IN", "POM_5V_IN")
#: Rails that another rail already holds.
_PART_OF = {"VDDQ_VDD2_1V8AO": "VIN_SYS_5V0"}


def total_rails(labels: Iterable[str]) -> tuple[str, ...]:
    """The rails whose sum is the power of the module.

    Orin Nano, Orin NX and Xavier NX measure it at one rail, VDD_IN. AGX Orin and AGX Xavier don't:
    there the rails are added, save VDDQ_VDD2_1V8AO, which VIN_SYS_5V0 holds (Jetson Linux Developer
    Guide r36.4, "Jetson AGX Orin Series", software-based power consumption modeling). jetson-stats
    adds it twice.

    Args:
        labels: Labels of the rails that can be read.

    Returns:
        Those to add, in the order given; ("VDD_IN",) for ("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC").
    """
    there = tuple(labels)
    for label in _WHOLE:
        if label in there:
            return (label,)
    return tuple(label for label in there if _PART_OF.get(label) not in there)
