"""What programs printed on boards that people have, and machines made of files.

The outputs are from public notes of the boards' owners. `jetson_clocks --show` and `nvpmodel -q`:
Orin Nano Super (JetPack 6.2, floating; 6.2.2, locked, where five of six equal cores are filled in
here), Orin NX (L4T R36.4.4), AGX Orin (JetPack 6, before and after jetson_clocks; L4T R39, locked),
and a Jetson Nano's nvpmodel (JetPack 4). nvidia-smi: the values of an RTX PRO 6000 with driver 595,
in the order that is asked for here, and what drivers reply to --lock-gpu-clocks with root, without,
and on a K80, which can't.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

NOT_ROOT = "Error: Run this script(/usr/bin/jetson_clocks) as a root user\n"


def cpus(least: int, most: int, now: Sequence[int], *, idle: int = 1, first: int = 0) -> str:
    """Lines of cores that are online, up to JetPack 6; kHz."""
    return "".join(
        f"{f'cpu{first + i}:':<6} Online=1 Governor=schedutil MinFreq={least} MaxFreq={most} "
        f"CurrentFreq={khz} IdleStates: WFI={idle} c7={idle} \n"
        for i, khz in enumerate(now)
    )


NANO_FLOATING = (
    "SOC family:tegra234  Machine:NVIDIA Jetson Orin Nano Engineering Reference Developer Kit "
    "Super\nOnline CPUs: 0-5\n"
    + cpus(729600, 1344000, (729600, 729600, 1190400, 729600, 1190400, 1190400))
    + "GPU MinFreq=306000000 MaxFreq=918000000 CurrentFreq=306000000\n"
    "Active GPU TPCs: 4\n"
    "EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=2133000000 FreqOverride=0\n"
    "FAN Dynamic Speed Control=nvfancontrol hwmon0_pwm1=69\n"
    "NV Power Mode: 25W\n"
)
NANO_LOCKED = (
    cpus(1728000, 1728000, [1728000] * 6, idle=0)
    + "GPU MinFreq=1020000000 MaxFreq=1020000000 CurrentFreq=1020000000\n"
    "EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=3199000000 FreqOverride=1\n"
    "FAN Dynamic Speed Control=disabled hwmon0_pwm1=255\n"
    "NV Power Mode: MAXN_SUPER\n"
)
NX_FLOATING = (
    "SOC family:tegra234  Machine:NVIDIA Jetson Orin NX Engineering Reference Developer Kit\n"
    "Online CPUs: 0-5\n"
    + cpus(729600, 1510400, (1510400, 1497600, 1190400, 1113600, 729600, 883200))
    + "GPU MinFreq=306000000 MaxFreq=624750000 CurrentFreq=306000000\n"
    "Active GPU TPCs: 2\n"
    "EMC MinFreq=204000000 MaxFreq=2133000000 CurrentFreq=2133000000 FreqOverride=0\n"
    "FAN Dynamic Speed Control=nvfancontrol hwmon0_pwm1=65\n"
    "NV Power Mode: MAXN_SUPER\n"
)


def _agx(cores: str, gpu: str, override: int, idle: int) -> str:
    off = cpus(729600, 2201600, [729600] * 4, idle=idle, first=8).replace("Online=1", "Online=0")
    return (
        "SOC family:tegra234  Machine:NVIDIA Jetson AGX Orin Developer Kit\n"
        f"Online CPUs: 0-7\n{cores}{off}{gpu}\n"
        "Active GPU TPCs: 4\n"
        "EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=3199000000 "
        f"FreqOverride={override}\n"
        "DLA0_CORE:   Online=1 MinFreq=0 MaxFreq=1369600000 CurrentFreq=1369600000\n"
        "DLA0_FALCON: Online=1 MinFreq=0 MaxFreq=729600000 CurrentFreq=729600000\n"
        "PVA0_VPS0: Online=1 MinFreq=0 MaxFreq=512000000 CurrentFreq=512000000\n"
        "FAN Dynamic Speed Control=nvfancontrol hwmon0_pwm1=48\n"
        "NV Power Mode: MODE_30W\n"
    )


AGX_FLOATING = _agx(
    cpus(729600, 1728000, (1420800, 729600, 1420800, 729600, 1497600, 729600, 1497600, 729600)),
    "GPU MinFreq=306000000 MaxFreq=612000000 CurrentFreq=306000000",
    override=0,
    idle=1,
)
AGX_LOCKED = _agx(
    cpus(1728000, 1728000, [1728000] * 8, idle=0),
    "GPU MinFreq=612000000 MaxFreq=612000000 CurrentFreq=612000000",
    override=1,
    idle=0,
)
#: Without Online= and FreqOverride=.
AGX_R39_LOCKED = (
    "SOC family:tegra234  Machine:NVIDIA Jetson AGX Orin Developer Kit\n"
    "Online CPUs: 0-11, Offline CPUs: \n"
    + cpus(2201600, 2201600, [2201600] * 12, idle=0).replace("Online=1 ", "")
    + "GPU MinFreq=1300500000 MaxFreq=1300500000 CurrentFreq=1300500000\n"
    "Active GPU TPCs: 8\n"
    "EMC MinFreq=3199000000 MaxFreq=3199000000 CurrentFreq=3199000000\n"
    "DLA0_CORE:   Online=1 MinFreq=0 MaxFreq=1600000000 CurrentFreq=1600000000\n"
    "PVA0_AXI:  Online=1 MinFreq=0 MaxFreq=985600000 CurrentFreq=985600000\n"
    "FAN Dynamic Speed Control=nvfancontrol hwmon2_pwm1=66\n"
    "FAN Dynamic Speed Control=nvfancontrol hwmon2_pwm1_enable=1\n"
    "NV Power Mode: MAXN\n"
)

#: The fields that `bench.machine.nvidia` asks for.
SMI_ROW = (
    "595.71.05, 180, 180, 405, 3090, 3090, [Requested functionality has been deprecated], 600.00, "
    "Enabled, 30, P8, 0x0000000000000001, NVIDIA RTX PRO 6000 Blackwell Workstation Edition\n"
)
SMI_LOCKED = (
    'GPU clocks set to "(gpuClkMin 3090, gpuClkMax 3090)" for GPU 00000000:01:00.0\nAll done.\n'
)
SMI_NOT_ROOT = (
    "The current user does not have permission to change clocks for GPU 00000000:01:00.0.\n"
    "Terminating early due to previous errors.\n"
)
#: With exit code 0.
SMI_NOT_SUPPORTED = (
    "Setting locked GPU clocks is not supported for GPU 00000000:05:00.0.\n"
    "Treating as warning and moving on.\nAll done.\n"
)

JETSON_FILES = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic, "
    "EABI: aarch64, DATE: Mon Jun 16 16:07:13 UTC 2025\n# KERNEL_VARIANT: oot\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0001\0nvidia,tegra234\0",
    "var/lib/dpkg/status": "Package: nvidia-jetpack\nStatus: install ok installed\n"
    "Architecture: arm64\nVersion: 6.2.1+b38\n\n"
    "Package: libnvinfer8\nStatus: deinstall ok config-files\nVersion: 8.6.2.3-1+cuda12.2\n\n"
    "Package: libnvinfer10\nStatus: install ok installed\nVersion: 10.3.0.30-1+cuda12.5\n",
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}',
    "proc/meminfo": "MemTotal:       16057432 kB\nMemFree:         9000000 kB\n",
    "proc/cmdline": "root=/dev/mmcblk0p1 rw isolcpus=4,5 quiet",
    "proc/loadavg": "0.52 0.58 0.59 1/467 3251\n",
    "proc/stat": "cpu  100 0 50 800 10 0 5 35 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "46125\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "624750000\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
    "sys/class/devfreq/15340000.vic/cur_freq": "729600000\n",
}
DESKTOP_FILES = {
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  "
    "595.71.05  Release Build\n",
    "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA GeForce RTX 4090\n"
    "IRQ:   \t\t 180\n",
    "sys/class/dmi/id/sys_vendor": "LENOVO\n",
    "sys/class/dmi/id/product_name": "30E1S2CN00\n",
    "sys/devices/system/cpu/smt/control": "on\n",
    "sys/devices/system/cpu/cpufreq/boost": "1\n",
}


def files(root: Path, contents: Mapping[str, str]) -> Path:
    """Write files below a folder that stands for a machine's root."""
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def policy(index: int, least: int, most: int, now: int, governor: str) -> dict[str, str]:
    """Files of cpufreq for a group of cores, in kHz."""
    values = {"min_freq": least, "max_freq": most, "cur_freq": now, "governor": governor}
    folder = f"sys/devices/system/cpu/cpufreq/policy{index}"
    return {f"{folder}/scaling_{name}": f"{value}\n" for name, value in values.items()}


def program(folder: Path, name: str, body: str) -> Path:
    """A shell script that stands for a program."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    file.chmod(0o755)
    return file


def prints(folder: Path, name: str, output: str, code: int = 0) -> Path:
    """A program that prints something and ends."""
    text = folder / f"{name}.txt"
    folder.mkdir(exist_ok=True)
    text.write_text(output, encoding="utf-8")
    return program(folder, name, f'/bin/cat "{text}"\nexit {code}')
