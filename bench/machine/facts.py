"""Facts about a machine, from the files that its system has; nothing here sets anything."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from edge_runtime import device

#: Packages that take part on a GPU.
_PACKAGES = (
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-runtime",
    "nvidia-cuda-runtime-cu12",
    "nvidia-cuda-runtime-cu13",
    "onnxruntime-gpu",
    "pycuda",
    "tensorrt",
    "tensorrt-rtx",
    "tensorrt_cu12",
    "tensorrt_cu13",
    "nvidia-ml-py",
)
#: Names under which TensorRT is installed: Python packages, then packages of Debian.
_TENSORRT = ("tensorrt", "tensorrt_cu13", "tensorrt_cu12", "tensorrt-rtx")
_TENSORRT_DEBS = ("tensorrt", "libnvinfer11", "libnvinfer10", "libnvinfer8")
_DEBS = ("nvidia-jetpack", *_TENSORRT_DEBS)
#: The clock of a Jetson's GPU in devfreq: 17000000.gpu or .ga10b on Orin, gpu-gpc-0 on Thor.
_JETSON_GPU = re.compile(r"\.(gpu|ga10b|gv11b|gp10b)$|^gpu-gpc-\d+$")
#: What a kernel is told that keeps others off a core.
_ISOLATION = ("isolcpus", "nohz_full", "rcu_nocbs")


def read(root: Path, file: str) -> str:
    """Text of a small file; empty where it is missing or can't be read."""
    try:
        return (root / file).read_text(encoding="utf-8", errors="replace").strip("\0\n\r\t ")
    except (OSError, ValueError):
        return ""


def number(root: Path, file: str) -> int | None:
    """A file that holds one number; None where it does not."""
    text = read(root, file)
    return int(text) if re.fullmatch(r"-?\d{1,18}", text) else None


def is_jetson(root: Path = Path("/")) -> bool:
    """Whether this is a Jetson, inside a container too."""
    compatible = read(root, "proc/device-tree/compatible")
    return bool(read(root, "etc/nv_tegra_release")) or "nvidia,tegra" in compatible


def board(root: Path = Path("/")) -> str | None:
    """Name of the board as its device tree tells it; a PC has none."""
    return read(root, "proc/device-tree/model") or None


def computer(root: Path = Path("/")) -> str | None:
    """What a PC is sold as, by its firmware, or what its virtual machine calls itself."""
    told = [read(root, f"sys/class/dmi/id/{name}") for name in ("sys_vendor", "product_name")]
    return " ".join(filter(None, told)) or None


def releases(root: Path = Path("/")) -> dict[str, str]:
    """Releases of what NVIDIA brings: l4t and jetpack on a Jetson, driver, cuda, tensorrt.

    What isn't there is absent; what a reader would ask for begins with "unknown: ".
    """
    debs = _debian_packages(root)
    found = {"driver": device.gpu_driver(root), "cuda": _cuda_toolkit(root)}
    told = re.search(r"R(\d+) .*REVISION: ([\d.]+)", read(root, "etc/nv_tegra_release"))
    if is_jetson(root):
        found["l4t"] = f"R{told[1]}.{told[2]}" if told else "unknown: /etc/nv_tegra_release is none"
        found["jetpack"] = debs.get(
            "nvidia-jetpack", "unknown: the package nvidia-jetpack is not installed"
        )
    python = [_version(name) for name in _TENSORRT]
    found["tensorrt"] = next(filter(None, [*python, *map(debs.get, _TENSORRT_DEBS)]), "")
    return {name: release for name, release in found.items() if release}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _debian_packages(root: Path) -> dict[str, str]:
    """Versions of installed packages that matter here."""
    found: dict[str, str] = {}
    name, installed = "", False
    try:
        with (root / "var/lib/dpkg/status").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(": ")
                if key == "Package":
                    name, installed = value.strip(), False
                elif key == "Status":
                    installed = value.strip().endswith(" installed")
                elif key == "Version" and installed and name in _DEBS:
                    found[name] = value.strip()
    except OSError:
        return {}
    return found


def _cuda_toolkit(root: Path) -> str:
    """Release of the CUDA toolkit where it is installed as it usually is."""
    try:
        known = json.loads(read(root, "usr/local/cuda/version.json"))
        return str(known["cuda"]["version"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def versions() -> dict[str, str]:
    """Installed versions of what takes part on a GPU."""
    found = {package: version for package in _PACKAGES if (version := _version(package))}
    cuda = _cuda_of_torch()
    return found | ({"torch's CUDA": cuda} if cuda else {})


def _cuda_of_torch() -> str:
    """The CUDA that torch was built for, read from its files: importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    text = read(Path(spec.origin).parent, "version.py")
    told = re.search(r"^cuda\b[^=\n]*= *(?:'([^']*)'|None)", text, re.MULTILINE)
    return (told[1] or "none") if told else "unknown"


def onnxruntime() -> dict[str, Any] | str:
    """Version and available providers of ONNX Runtime, or why there is none."""
    try:
        package: Any = importlib.import_module("onnxruntime")
    except ImportError as error:
        return f"none: {error}"
    return {"version": package.__version__, "providers": list(package.get_available_providers())}


def memory_bytes(root: Path = Path("/")) -> int | None:
    """The machine's memory."""
    told = re.search(r"^MemTotal: +(\d+) kB", read(root, "proc/meminfo"), re.MULTILINE)
    return int(told[1]) * 1024 if told else None


def virtual(root: Path = Path("/")) -> dict[str, str]:
    """Signs of a virtual machine and of a container; what shows none is absent."""
    flags = re.search(r"^flags\s*:.*\bhypervisor\b", read(root, "proc/cpuinfo"), re.MULTILINE)
    kind = read(root, "sys/hypervisor/type")
    named = computer(root) or ""
    if not re.search(r"KVM|QEMU|VMware|Virtual|HVM|Bochs|Compute Engine|Cloud|OpenStack", named):
        named = ""
    machine = named or kind or ("yes, by the processor's flags" if flags else "")
    groups = read(root, "proc/1/cgroup") + read(root, "proc/self/cgroup")
    told = re.search(r"docker|kubepods|containerd|libpod|lxc", groups)
    container = told[0] if told else ""
    for file, name in ((".dockerenv", "docker"), ("run/.containerenv", "podman")):
        if not container and (root / file).exists():
            container = name
    return {k: v for k, v in (("machine", machine), ("container", container)) if v}


def kernel_options(root: Path = Path("/")) -> dict[str, str]:
    """Cores that the kernel was told to keep others off."""
    words = (word.partition("=") for word in read(root, "proc/cmdline").split())
    return {name: value for name, _, value in words if name in _ISOLATION}


def smt(root: Path = Path("/")) -> str | None:
    """Whether a core runs two threads: on, off, forceoff, notsupported, ...; None if not told."""
    return read(root, "sys/devices/system/cpu/smt/control") or None


def cpu_policies(root: Path = Path("/")) -> Iterator[Path]:
    """Folders of cpufreq, one per group of cores with one clock."""
    folders = (root / "sys/devices/system/cpu/cpufreq").glob("policy*")
    yield from sorted(folders, key=lambda folder: (len(folder.name), folder.name))


def jetson_gpu_clocks(root: Path = Path("/")) -> Iterator[Path]:
    """Folders of devfreq with the clock of a Jetson's GPU, in Hz."""
    folders = sorted((root / "sys/class/devfreq").glob("*"))
    yield from (folder for folder in folders if _JETSON_GPU.search(folder.name))


def cpu_mhz(root: Path = Path("/")) -> dict[str, float] | None:
    """Mean, min and max of what the cores run at just now, in MHz; None where it isn't shown."""
    told = [number(policy, "scaling_cur_freq") for policy in cpu_policies(root)]
    values = [khz / 1000 for khz in told if khz is not None and khz > 0]
    if not values:
        shown = re.findall(r"^cpu MHz\s*: *(\d+(?:\.\d+)?)$", read(root, "proc/cpuinfo"), re.M)
        values = [float(mhz) for mhz in shown]
    if not values:
        return None
    mean = sum(values) / len(values)
    return {"mean": round(mean, 1), "min": round(min(values), 1), "max": round(max(values), 1)}


def load_average(root: Path = Path("/")) -> list[float] | None:
    """Programs that ran or wanted to, mean of 1, 5 and 15 minutes."""
    try:
        return [float(word) for word in read(root, "proc/loadavg").split()[:3]] or None
    except ValueError:
        return None


def jiffies(root: Path = Path("/")) -> dict[str, int] | None:
    """Time of all cores since the machine started, and what of it a hypervisor took away.

    Returns:
        "total" and "steal" in ticks of the kernel, usually 10 ms; None where it isn't told.
    """
    words = read(root, "proc/stat").partition("\n")[0].split()
    if len(words) < 9 or words[0] != "cpu" or not all(word.isdecimal() for word in words[1:9]):
        return None
    ticks = [int(word) for word in words[1:9]]  # what guests used is part of the first two
    return {"total": sum(ticks), "steal": ticks[7]}
