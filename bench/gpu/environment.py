"""On what a check was made, and how much memory it holds; reads, and sets nothing."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.gpu.lab import Lab
from edge_runtime import device
from edge_runtime.schema import plain

_PACKAGES = (
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "pycuda",
    "tensorrt",
    "tensorrt-rtx",
    "tensorrt_cu12",
    "tensorrt_cu13",
    "nvidia-ml-py",
)
#: Files in which a system says what it is.
_RELEASES = {"l4t": "/etc/nv_tegra_release", "driver_module": "/proc/driver/nvidia/version"}


def environment(lab: Lab) -> dict[str, Any]:
    """What the numbers of this run are for."""
    facts = lab.cuda.facts
    state = gpu_state(lab)
    driver = state.get("driver", "unknown")
    return {
        "ok": True,
        "summary": f"{facts.name}, driver {driver} for CUDA {facts.driver[0]}.{facts.driver[1]}",
        "gpu": {**plain(facts), "index": lab.device},
        "package": lab.cuda.package,
        "packages": versions(),
        "host": device.fingerprint(),
        "releases": _releases(),
        "power_mode": _power_mode(),
        "clocks": "unknown" if "sm_mhz" not in state else "floating or locked: NVML tells no more",
        "load_average": list(os.getloadavg()),
        "state": state,
    }


def versions() -> dict[str, str]:
    """Installed versions of what takes part on a GPU."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if importlib.util.find_spec("torch") is not None:
        try:
            torch: Any = importlib.import_module("torch")
            found["torch's CUDA"] = str(torch.version.cuda)
        except (ImportError, OSError, RuntimeError) as error:
            found["torch's CUDA"] = f"torch can't be imported: {_first_line(error)}"
    return found


def gpu_state(lab: Lab) -> dict[str, Any]:
    """Clocks, temperature and what slows the GPU down, as far as NVML and sysfs tell."""
    state: dict[str, Any] = {}
    temperatures = _zones() if lab.cuda.facts.integrated else {}
    if temperatures:
        state["zones_celsius"] = temperatures
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return {**state, "nvml": "unknown: the package nvidia-ml-py is not installed"}
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return {**state, "nvml": f"unknown: {error}"}
    try:
        return {**state, **_nvml_state(nvml, lab)}
    finally:
        nvml.nvmlShutdown()


def _nvml_state(nvml: Any, lab: Lab) -> dict[str, Any]:
    def asked(name: str, *arguments: Any) -> Any:
        """What NVML answers; None where it, or this version of it, does not."""
        try:
            answer = getattr(nvml, name)(*arguments)
        except (nvml.NVMLError, AttributeError, TypeError):
            return None
        return answer.decode(errors="replace") if isinstance(answer, bytes) else answer

    state = {"driver": asked("nvmlSystemGetDriverVersion")}
    handle = _nvml_handle(asked, lab)
    if handle is None:
        state["nvml"] = "unknown: NVML has several GPUs, or none, of this name"
    else:
        state |= {
            "sm_mhz": asked("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
            "sm_most_mhz": asked("nvmlDeviceGetMaxClockInfo", handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": asked("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_MEM),
            "celsius": asked("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
            "slowed_by": asked("nvmlDeviceGetCurrentClocksThrottleReasons", handle),
        }
    return {name: value for name, value in state.items() if value is not None}


def _nvml_handle(asked: Callable[..., Any], lab: Lab) -> Any:
    """The GPU in NVML, which counts devices that CUDA_VISIBLE_DEVICES hides: found by its name."""
    handles = [
        asked("nvmlDeviceGetHandleByIndex", i) for i in range(asked("nvmlDeviceGetCount") or 0)
    ]
    named = [h for h in handles if h is not None and asked("nvmlDeviceGetName", h) == _name(lab)]
    return named[0] if len(named) == 1 else None


def _name(lab: Lab) -> str:
    return lab.cuda.facts.name


def _zones() -> dict[str, float]:
    """Temperatures of a Jetson's thermal zones."""
    found = {}
    for zone in sorted(Path("/sys/class/thermal").glob("thermal_zone*")):
        try:
            kind = (zone / "type").read_text(encoding="utf-8").strip()
            found[kind] = int((zone / "temp").read_text(encoding="utf-8")) / 1000
        except (OSError, ValueError):
            continue
    return found


def _releases() -> dict[str, str]:
    found = {}
    for name, file in _RELEASES.items():
        try:
            found[name] = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()[0]
        except (OSError, IndexError):
            continue
    return found


def _power_mode() -> str:
    """What a Jetson's nvpmodel says."""
    program = shutil.which("nvpmodel")
    if program is None:
        return "unknown: there is no nvpmodel"
    try:
        done = subprocess.run([program, "-q"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {_first_line(error)}"
    return " ".join(done.stdout.split()) or f"unknown: {' '.join(done.stderr.split())}"


def memory_readers(lab: Lab) -> Mapping[str, Callable[[], int]]:
    """What can be counted of the memory that this process and the device hold, in bytes or pieces.

    The device's memory is that of all programs on it, and on a Jetson that of the whole system.
    """
    readers: dict[str, Callable[[], int]] = {}
    used = _device_memory(lab)
    if used is not None:
        readers["device_bytes"] = used
    if platform.system() == "Linux":
        readers["process_bytes"] = _resident
    readers["python_blocks"] = sys.getallocatedblocks
    readers["python_objects"] = lambda: len(gc.get_objects())
    return readers


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _device_memory(lab: Lab) -> Callable[[], int] | None:
    """Memory of the device that is in use, by the package that reaches the driver."""
    if lab.cuda.package == "cuda-core":
        driver: Any = importlib.import_module("cuda.bindings.driver")

        def used() -> int:
            _, free, total = driver.cuMemGetInfo()
            return int(total) - int(free)

        return used
    if lab.cuda.package == "pycuda":
        pycuda: Any = importlib.import_module("pycuda.driver")

        def used_by_pycuda() -> int:
            free, total = pycuda.mem_get_info()
            return int(total) - int(free)

        return used_by_pycuda
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
