"""On what a check was made, and how much memory it holds; reads, and sets nothing."""

from __future__ import annotations

import gc
import importlib
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.gpu.lab import Lab
from bench.machine import clock_state, facts, nvidia, programs
from edge_runtime import device
from edge_runtime.power.thermal import temperatures
from edge_runtime.schema import plain


def environment(lab: Lab) -> dict[str, Any]:
    """What the numbers of this run are for."""
    gpu = lab.cuda.facts
    state = gpu_state(lab)
    driver = state.get("driver", "unknown")
    return {
        "ok": True,
        "summary": f"{gpu.name}, driver {driver} for CUDA {gpu.driver[0]}.{gpu.driver[1]}",
        "gpu": {**plain(gpu), "index": lab.device},
        "package": lab.cuda.package,
        "packages": facts.versions(),
        "host": device.fingerprint(),
        "releases": facts.releases(),
        "power_mode": clock_state.power_mode(programs.run),
        "clocks": "unknown" if "sm_mhz" not in state else "floating or locked: NVML tells no more",
        "load_average": list(os.getloadavg()),
        "state": state,
    }


def gpu_state(lab: Lab) -> dict[str, Any]:
    """Clocks, temperature and what slows the GPU down, as far as NVML and sysfs tell."""
    state: dict[str, Any] = {}
    zones = temperatures() if lab.cuda.facts.integrated else {}
    if zones:
        state["zones_celsius"] = zones
    gpus = nvidia.by_nvml()
    if gpus.why_not:
        return {**state, "nvml": f"unknown: {gpus.why_not}"}
    if gpus.driver:
        state["driver"] = gpus.driver
    # NVML counts devices that CUDA_VISIBLE_DEVICES hides: the GPU is found by its name.
    named = [gpu for gpu in gpus.each if gpu.get("name") == lab.cuda.facts.name]
    if len(named) != 1:
        return {**state, "nvml": "unknown: NVML has several GPUs, or none, of this name"}
    return state | {name: value for name, value in named[0].items() if name != "name"}


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
