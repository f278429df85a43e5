"""NVIDIA GPUs by NVML: the energy counter of Volta and newer, or else the power now.

The counter holds the whole board, for all programs that use it. Drivers refresh it, and the power,
every 20 to 100 ms, and a single value may come from a quarter of that time (Yang et al., Part-time
power measurements, 2023): windows of a second or more are to be trusted, shorter ones are not.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping
from typing import Any

from edge_runtime.errors import BadReading, PowerError, missing_package
from edge_runtime.power.base import EnergyCounter, PowerMeter
from edge_runtime.timing import Clock

_UPDATE_S = 0.1


class _Device:
    """A GPU in NVML, between `open` and `close`.

    Args:
        gpu: Number of the GPU as this process counts it.
        environ: Environment of the process.
    """

    def __init__(self, gpu: int, environ: Mapping[str, str]) -> None:
        self.gpu = gpu
        self.name = f"GPU {gpu} (NVML)"
        self._environ = environ
        self._nvml: Any = None
        self._handle: Any = None

    def open(self) -> None:
        """Start NVML and find the GPU."""
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError as error:
            raise missing_package("nvidia-ml-py", "bench") from error
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            raise PowerError(
                f"NVML can't be started: {error}",
                remedy="It comes with NVIDIA's driver: check that nvidia-smi works",
            ) from error
        self._nvml = nvml
        try:
            count = self.ask("nvmlDeviceGetCount")
            self._handle = self._find(count)
            name = _text(self.ask("nvmlDeviceGetName", self._handle))
        except BaseException:
            self.close()
            raise
        self.name = f"{name if count == 1 else f'GPU {self.gpu}, {name}'} (NVML)"

    def close(self) -> None:
        """Stop NVML; a second call does nothing."""
        nvml, self._nvml, self._handle = self._nvml, None, None
        if nvml is not None:
            try:
                nvml.nvmlShutdown()
            except nvml.NVMLError:
                return  # it is down already

    def ask(self, name: str, *arguments: Any) -> Any:
        """What NVML answers."""
        nvml = self._nvml
        try:
            return getattr(nvml, name)(*arguments)
        except nvml.NVMLError as error:
            raise PowerError(
                f"{self.name}: {name} says {error}",
                remedy="Check the GPU with nvidia-smi",
            ) from error

    def number(self, name: str) -> float:
        """A number that NVML tells of the GPU."""
        value = self.ask(name, self._handle)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadReading(f"{self.name}: {name}", got=repr(value), expected="a number")
        return float(value)

    def supports(self, name: str) -> bool:
        """Whether this GPU and driver tell something."""
        nvml = self._nvml
        try:
            getattr(nvml, name)(self._handle)
        except AttributeError:  # an old version of the package
            return False
        except nvml.NVMLError as error:
            if getattr(error, "value", None) in (
                nvml.NVML_ERROR_NOT_SUPPORTED,
                nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            ):
                return False
            raise PowerError(f"{self.name}: {name} says {error}") from error
        return True

    def _find(self, count: int) -> Any:
        """The GPU that CUDA calls `gpu`: NVML counts hidden ones too, and in another order."""
        entry, visible = str(self.gpu), self._environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            entries = [part.strip() for part in visible.split(",") if part.strip()]
            if self.gpu >= len(entries):
                raise PowerError(f"there is no GPU {self.gpu}: CUDA_VISIBLE_DEVICES={visible!r}")
            entry = entries[self.gpu]
        if not entry.isdecimal():
            return self.ask("nvmlDeviceGetHandleByUUID", entry)
        if int(entry) >= count:
            raise PowerError(f"there is no GPU {entry}", got=f"{count} in NVML")
        handles = [self.ask("nvmlDeviceGetHandleByIndex", i) for i in range(count)]
        by_bus = self._environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        if not by_bus and len({_text(self.ask("nvmlDeviceGetName", h)) for h in handles}) > 1:
            raise PowerError(
                f"which of {count} different GPUs is GPU {self.gpu} can't be told: CUDA and NVML "
                "count them in different orders",
                remedy="Set CUDA_DEVICE_ORDER=PCI_BUS_ID",
            )
        return handles[int(entry)]


class NvmlEnergy(EnergyCounter):
    """The energy counter of a GPU.

    Args:
        device: Not yet opened.
        clock: As in `EnergyCounter`.
    """

    update_s = _UPDATE_S

    def __init__(self, device: _Device, *, clock: Clock = time.monotonic) -> None:
        super().__init__(device.name, clock=clock)
        self._device = device

    def _open(self) -> None:
        self._device.open()
        self.name = self._device.name

    def _close(self) -> None:
        self._device.close()

    def _joules(self) -> float:
        return self._device.number("nvmlDeviceGetTotalEnergyConsumption") * 1e-3


class NvmlPower(PowerMeter):
    """The power of a GPU, for those without a counter.

    Args:
        device: Not yet opened.
    """

    update_s = _UPDATE_S

    def __init__(self, device: _Device) -> None:
        super().__init__(device.name)
        self._device = device

    def _open(self) -> None:
        self._device.open()
        self.name = self._device.name

    def _close(self) -> None:
        self._device.close()

    def _watts(self) -> float:
        return self._device.number("nvmlDeviceGetPowerUsage") * 1e-3


def find_source(gpu: int, environ: Mapping[str, str] = os.environ) -> NvmlEnergy | NvmlPower:
    """The reader of one GPU; it is not opened.

    Args:
        gpu: Number of the GPU as CUDA counts it in this process.
        environ: Where CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER are looked up.

    Raises:
        PowerError: There is no such GPU, no driver, or it tells neither energy nor power.
        BackendUnavailable: The package nvidia-ml-py is not installed.
    """
    device = _Device(gpu, environ)
    device.open()
    try:
        if device.supports("nvmlDeviceGetTotalEnergyConsumption"):
            return NvmlEnergy(device)
        if device.supports("nvmlDeviceGetPowerUsage"):
            return NvmlPower(device)
    finally:
        device.close()
    raise PowerError(
        f"{device.name} tells neither its energy nor its power",
        remedy="A Jetson's GPU never does: its power is in the INA3221; some virtual GPUs don't",
    )


def _text(name: str | bytes) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
