"""What this device is, from the files that the system has."""

from pathlib import Path

import pytest

from edge_runtime.device import gpu_driver

DESKTOP = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
JETSON = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"


@pytest.mark.parametrize(
    ("file", "text", "release"),
    [
        ("proc/driver/nvidia/version", DESKTOP, "580.65.06"),
        ("etc/nv_tegra_release", JETSON, "36.4.3"),
        ("etc/nv_tegra_release", "something else", ""),
    ],
)
def test_the_gpu_s_driver(tmp_path: Path, file: str, text: str, release: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    assert gpu_driver(tmp_path) == release


def test_without_a_driver_its_release_is_unknown(tmp_path: Path) -> None:
    assert gpu_driver(tmp_path) == ""
