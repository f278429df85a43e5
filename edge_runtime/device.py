"""What this device is: the stamp that every measured number carries."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

#: Packages whose versions change a number.
_PACKAGES = ("edge-runtime", "numpy", "onnxruntime", "onnx", "torch", "tensorrt")


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's or board's name as the system gives it."""
    for file, key in (("/proc/device-tree/model", None), ("/proc/cpuinfo", "model name")):
        try:
            text = Path(file).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if key is None:
            return text.strip("\0\n ")
        for line in text.splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu_driver(root: Path = Path("/")) -> str:
    """Release of NVIDIA's kernel driver: "580.65.06", on a Jetson that of L4T; "" where unknown.

    Args:
        root: Where the system's files are.
    """
    for file, pattern in (
        ("proc/driver/nvidia/version", r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s"),
        ("etc/nv_tegra_release", r"R(\d+) .*REVISION: ([\d.]+)"),
    ):
        try:
            found = re.search(pattern, (root / file).read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
        if found:
            return ".".join(found.groups())
    return ""


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that change a number."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def fingerprint() -> dict[str, Any]:
    """What must be equal for two latencies to be comparable, as plain JSON."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": package_versions(),
    }
