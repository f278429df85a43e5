"""What the driver tells of NVIDIA GPUs: by NVML, or by nvidia-smi where nvidia-ml-py is missing.

Nothing here sets anything. The clocks that somebody locked can't be asked for: neither NVML nor
nvidia-smi tells them.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

from bench.machine.programs import Run, first_line

#: What holds a GPU's clocks down: bit -> name, as of nvmlClocksEventReasons.
_REASONS = {
    0x1: "idle",
    0x2: "applications clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "too hot (software)",
    0x40: "too hot (hardware)",
    0x80: "power brake",
    0x100: "display clock",
}
#: Fields of nvidia-smi and what they are called here; a name may hold anything and stands last.
_FIELDS = {
    "driver_version": "driver",
    "clocks.current.graphics": "graphics_mhz",
    "clocks.current.sm": "sm_mhz",
    "clocks.current.memory": "memory_mhz",
    "clocks.max.graphics": "graphics_most_mhz",
    "clocks.max.sm": "sm_most_mhz",
    "clocks.applications.graphics": "applications_mhz",
    "power.limit": "power_limit_w",
    "persistence_mode": "persistent",
    "temperature.gpu": "celsius",
    "pstate": "state",
    "{reasons}": "slowed_by",
    "name": "name",
}
#: Newer drivers call it an event reason, older ones a throttle reason.
_REASONS_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
#: Fields of a GPU that are not numbers.
_TEXTS = ("driver", "state", "name")


@dataclass(frozen=True)
class Gpus:
    """The NVIDIA GPUs that the driver knows.

    Attributes:
        each: Per GPU what is known of name, graphics_mhz, sm_mhz, memory_mhz, graphics_most_mhz,
            sm_most_mhz, applications_mhz, power_limit_w, persistent, celsius, state (P0, the
            fastest, to P15) and slowed_by.
        driver: Its release.
        cuda: Newest CUDA release that the driver speaks.
        why_not: Why nothing is known; empty where the driver answered.
    """

    each: tuple[dict[str, Any], ...] = ()
    driver: str = ""
    cuda: str = ""
    why_not: str = ""


def gpus(run: Run) -> Gpus:
    """Ask NVML, else nvidia-smi."""
    found = by_nvml()
    if not found.why_not:
        return found
    other = by_nvidia_smi(run)
    if not other.why_not:
        return other
    return Gpus(why_not=f"{found.why_not}; {other.why_not}")


def by_nvml() -> Gpus:
    """Ask NVML, by the package nvidia-ml-py."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return Gpus(why_not="the package nvidia-ml-py is not installed")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Gpus(why_not=f"NVML: {error}")
    try:
        return _by_nvml(nvml)
    finally:
        nvml.nvmlShutdown()


def _by_nvml(nvml: Any) -> Gpus:
    def asked(name: str, *arguments: Any) -> Any:
        """What NVML answers; None where it, or this version of it, does not."""
        try:
            named = [getattr(nvml, a) if isinstance(a, str) else a for a in arguments]
            answer = getattr(nvml, name)(*named)
        except (nvml.NVMLError, AttributeError, TypeError):
            return None
        return answer.decode(errors="replace") if isinstance(answer, bytes) else answer

    def of(handle: Any) -> dict[str, Any]:
        reasons = asked("nvmlDeviceGetCurrentClocksEventReasons", handle)
        if reasons is None:
            reasons = asked("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        limit = asked("nvmlDeviceGetPowerManagementLimit", handle)
        persistent = asked("nvmlDeviceGetPersistenceMode", handle)
        state = asked("nvmlDeviceGetPerformanceState", handle)
        graphics = (handle, "NVML_CLOCK_GRAPHICS")
        found = {
            "name": asked("nvmlDeviceGetName", handle),
            "graphics_mhz": asked("nvmlDeviceGetClockInfo", *graphics),
            "sm_mhz": asked("nvmlDeviceGetClockInfo", handle, "NVML_CLOCK_SM"),
            "memory_mhz": asked("nvmlDeviceGetClockInfo", handle, "NVML_CLOCK_MEM"),
            "graphics_most_mhz": asked("nvmlDeviceGetMaxClockInfo", *graphics),
            "sm_most_mhz": asked("nvmlDeviceGetMaxClockInfo", handle, "NVML_CLOCK_SM"),
            "applications_mhz": asked("nvmlDeviceGetApplicationsClock", *graphics),
            "power_limit_w": None if limit is None else limit / 1000,
            "persistent": None if persistent is None else bool(persistent),
            "celsius": asked("nvmlDeviceGetTemperature", handle, "NVML_TEMPERATURE_GPU"),
            "state": None if state is None else f"P{state}",
            "slowed_by": None if reasons is None else reasons_of(reasons),
        }
        return {name: value for name, value in found.items() if value is not None}

    count = asked("nvmlDeviceGetCount") or 0
    handles = [asked("nvmlDeviceGetHandleByIndex", index) for index in range(count)]
    cuda = asked("nvmlSystemGetCudaDriverVersion_v2")
    return Gpus(
        tuple(of(handle) for handle in handles if handle is not None),
        asked("nvmlSystemGetDriverVersion") or "",
        f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else "",
    )


def by_nvidia_smi(run: Run) -> Gpus:
    """Ask nvidia-smi, which takes up to a second."""
    for reasons in _REASONS_FIELDS:
        fields = ",".join(_FIELDS).format(reasons=reasons)
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        answer = run(query)
        if "not a valid field" not in answer.why_not:
            break
    if answer.why_not:
        return Gpus(why_not=answer.why_not)
    each, driver = [], ""
    for line in filter(str.strip, answer.output.splitlines()):
        cells = [cell.strip() for cell in line.split(",", len(_FIELDS) - 1)]
        if len(cells) != len(_FIELDS):
            return Gpus(why_not=f"nvidia-smi: {first_line(answer.output)}")
        read = {name: _read(name, cell) for name, cell in zip(_FIELDS.values(), cells, strict=True)}
        driver = read.pop("driver") or driver
        each.append({name: value for name, value in read.items() if value is not None})
    return Gpus(tuple(each), driver)


def _read(name: str, cell: str) -> Any:
    """One cell; None where the driver does not tell, which nvidia-smi puts in brackets."""
    if not cell or cell.startswith("[") or cell == "N/A":
        return None
    if name in _TEXTS:
        return cell
    if name == "persistent":
        return cell == "Enabled"
    try:
        if name == "slowed_by":
            return reasons_of(int(cell, 16))
        value = float(cell)
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else value


def reasons_of(bits: int) -> list[str]:
    """What holds a GPU's clocks down, in words."""
    known = [name for bit, name in _REASONS.items() if bits & bit]
    rest = bits & ~sum(_REASONS)
    return [*known, *([f"reason {rest:#x}"] if rest else [])]
