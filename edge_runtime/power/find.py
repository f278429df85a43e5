"""Which readers of power and energy work on this machine, and why the others don't."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import EdgeRuntimeError, PowerError
from edge_runtime.power import ina3221, nvml, rapl
from edge_runtime.power.base import PowerSource
from edge_runtime.power.jtop import Jtop
from edge_runtime.power.sysfs import read_text


@dataclass(frozen=True)
class Found:
    """Readers of this machine.

    Attributes:
        sources: Those that work: each was opened, read and closed again. No energy is in two.
        missing: Name of a reader that could be expected here -> why it can't be used.
    """

    sources: tuple[PowerSource, ...]
    missing: Mapping[str, str]


def find(root: Path = Path("/"), *, gpu: int | None = None) -> Found:
    """Find the readers that measure what inference uses here.

    A Jetson gets one reader, of its whole module: jtop where it works, or else the INA3221 itself.
    Another machine gets one for the GPU, where one is used, and one for each processor package.

    Args:
        root: Where the system's files are.
        gpu: Number of the GPU that the backend uses, as CUDA counts it; None where it uses none.

    Returns:
        What works, and reasons for the rest. This raises nothing: a machine without sensors is
        common.
    """
    missing: dict[str, str] = {}
    if is_jetson(root):
        source = _made("jtop", Jtop, missing)
        if source is None:
            source = _made("INA3221", lambda: ina3221.find_source(root), missing)
        return Found(() if source is None else (source,), missing)
    sources: list[PowerSource] = []
    if gpu is not None:
        source = _made("NVML", lambda: nvml.find_source(gpu), missing)
        sources += [] if source is None else [source]
    try:
        packages = rapl.find_sources(root)
    except PowerError as error:
        missing["RAPL"] = str(error)
    else:
        missing |= {f"{folder} (RAPL)": why for folder, why in packages.broken.items()}
        sources += [one for one in packages.sources if _works(one.name, one, missing)]
    return Found(tuple(sources), missing)


def is_jetson(root: Path = Path("/")) -> bool:
    """Whether a machine is a Jetson: its device tree says so, or it has an INA3221.

    Args:
        root: Where the system's files are.
    """
    for folder in ("proc/device-tree", "sys/firmware/devicetree/base"):
        for file, word in (("model", "jetson"), ("compatible", "nvidia,tegra")):
            try:
                text = read_text(root / folder / file)
            except PowerError:
                continue
            if word in text.lower():
                return True
    return bool(ina3221.find_rails(root))


def _made(
    name: str, make: Callable[[], PowerSource], missing: dict[str, str]
) -> PowerSource | None:
    """A source that works; None, with its reason noted, where there is none."""
    try:
        source = make()
    except EdgeRuntimeError as error:
        missing[name] = str(error)
        return None
    return source if _works(name, source, missing) else None


def _works(name: str, source: PowerSource, missing: dict[str, str]) -> bool:
    """Whether a source can be opened and read; notes the reason where it can't."""
    try:
        with source:
            return True
    except EdgeRuntimeError as error:
        missing[name] = str(error)
        return False
