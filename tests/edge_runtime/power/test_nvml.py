"""GPUs by NVML: answers as pynvml gives them on a desktop, an older GPU, a Jetson, and two GPUs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType

import pytest

from edge_runtime.errors import BackendUnavailable, BadReading, PowerError
from edge_runtime.power.nvml import find_source

NOT_SUPPORTED, NOT_FOUND, DRIVER_NOT_LOADED, GPU_IS_LOST = 3, 6, 9, 15
TEXTS = {3: "Not Supported", 6: "Not Found", 9: "Driver Not Loaded", 15: "GPU is lost"}


class NVMLError(Exception):
    """As in pynvml."""

    def __init__(self, value: int) -> None:
        super().__init__(TEXTS[value])
        self.value = value


class Gpu:
    """A GPU with what NVML tells of it: a number, or the code of an error."""

    def __init__(self, name: str | bytes, energy: int, power: int, uuid: str = "GPU-1") -> None:
        self.name = name
        self.uuid = uuid
        self.energy, self.energy_error = energy, 0
        self.power, self.power_error = power, 0


class Nvml(ModuleType):
    """The part of pynvml that is used."""

    NVMLError = NVMLError
    NVML_ERROR_NOT_SUPPORTED = NOT_SUPPORTED
    NVML_ERROR_FUNCTION_NOT_FOUND = 13

    def __init__(self, *gpus: Gpu) -> None:
        super().__init__("pynvml")
        self.gpus = gpus
        self.users = 0
        self.broken = 0

    def nvmlInit(self) -> None:  # noqa: N802
        if self.broken:
            raise NVMLError(self.broken)
        self.users += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.users -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:  # noqa: N802
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Gpu:  # noqa: N802
        for gpu in self.gpus:
            if gpu.uuid == uuid:
                return gpu
        raise NVMLError(NOT_FOUND)

    def nvmlDeviceGetName(self, gpu: Gpu) -> str | bytes:  # noqa: N802
        return gpu.name

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: Gpu) -> int:  # noqa: N802
        if gpu.energy_error:
            raise NVMLError(gpu.energy_error)
        return gpu.energy

    def nvmlDeviceGetPowerUsage(self, gpu: Gpu) -> int:  # noqa: N802
        if gpu.power_error:
            raise NVMLError(gpu.power_error)
        return gpu.power


def installed(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu) -> Nvml:
    nvml = Nvml(*gpus)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def test_the_energy_counter_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("NVIDIA H100 80GB HBM3", energy=8_123_456_789, power=70_123)
    nvml = installed(monkeypatch, gpu)
    with find_source(0, {}) as source:
        assert (source.name, source.counts) == ("NVIDIA H100 80GB HBM3 (NVML)", True)
        gpu.energy += 2500
        assert source.read() == pytest.approx(2.5)
        assert nvml.users == 1
    assert nvml.users == 0


def test_the_power_of_a_gpu_without_a_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(b"NVIDIA TITAN X (Pascal)", energy=0, power=55_250)
    gpu.energy_error = NOT_SUPPORTED
    nvml = installed(monkeypatch, gpu)
    with find_source(0, {}) as source:
        assert (source.name, source.counts) == ("NVIDIA TITAN X (Pascal) (NVML)", False)
        assert source.read() == pytest.approx(55.25)
    assert nvml.users == 0


def test_a_jetson_s_gpu_tells_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("Orin (nvgpu)", energy=0, power=0)
    gpu.energy_error = gpu.power_error = NOT_SUPPORTED
    nvml = installed(monkeypatch, gpu)
    with pytest.raises(PowerError, match=r"Orin \(nvgpu\) .* tells neither .* in the INA3221"):
        find_source(0, {})
    assert nvml.users == 0


@pytest.mark.parametrize(
    ("environ", "index"),
    [
        ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, 1),
        ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1, 0"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "GPU-2,GPU-1"}, 0),
    ],
)
def test_the_gpu_is_the_one_that_cuda_means(
    monkeypatch: pytest.MonkeyPatch, environ: Mapping[str, str], index: int
) -> None:
    gpus = [Gpu("RTX 4090", 1000, 1, "GPU-1"), Gpu("RTX A400", 5000, 1, "GPU-2")]
    installed(monkeypatch, *gpus)
    with find_source(1, environ) as source:
        gpus[index].energy += 1000
        assert source.name == f"GPU 1, {gpus[index].name!s} (NVML)"
        assert source.read() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("gpu", "environ", "message"),
    [
        (0, {}, "which of 2 different GPUs is GPU 0 .* Set CUDA_DEVICE_ORDER=PCI_BUS_ID"),
        (2, {}, "there is no GPU 2: got 2 in NVML"),
        (1, {"CUDA_VISIBLE_DEVICES": "1"}, "there is no GPU 1: CUDA_VISIBLE_DEVICES='1'"),
        (0, {"CUDA_VISIBLE_DEVICES": ""}, "there is no GPU 0: CUDA_VISIBLE_DEVICES=''"),
        (0, {"CUDA_VISIBLE_DEVICES": "GPU-9"}, "Not Found. Check the GPU with nvidia-smi"),
    ],
)
def test_a_gpu_that_can_not_be_told_is_refused(
    monkeypatch: pytest.MonkeyPatch, gpu: int, environ: Mapping[str, str], message: str
) -> None:
    nvml = installed(monkeypatch, Gpu("RTX 4090", 1, 1), Gpu("RTX A400", 1, 1))
    with pytest.raises(PowerError, match=message):
        find_source(gpu, environ)
    assert nvml.users == 0


def test_a_gpu_that_falls_off_the_bus_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("RTX 4090", energy=1000, power=1)
    installed(monkeypatch, gpu)
    with find_source(0, {}) as source:
        gpu.energy_error = GPU_IS_LOST
        with pytest.raises(PowerError, match=r"GPU is lost. Check the GPU with nvidia-smi"):
            source.read()


def test_a_counter_that_the_driver_starts_anew_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("RTX 4090", energy=1_000_000, power=1)
    installed(monkeypatch, gpu)
    with find_source(0, {}) as source:
        gpu.energy = 10
        with pytest.raises(BadReading, match=r"set back or jumped: got 0.01 J after 1000 J"):
            source.read()


def test_without_the_driver_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch).broken = DRIVER_NOT_LOADED
    with pytest.raises(PowerError, match=r"can't be started: Driver Not Loaded.*nvidia-smi"):
        find_source(0, {})


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(BackendUnavailable, match=r"nvidia-ml-py.*edge-runtime\[bench\]"):
        find_source(0, {})
