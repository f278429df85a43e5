"""TensorRT as this project uses it: which module, which versions, and errors in its own words.

NVIDIA ships one interface under two names: `tensorrt` (JetPack, servers) and `tensorrt_rtx`
(TensorRT for RTX, desktops). TensorRT 10.3 and later and 11.x are supported; all of them take
strongly typed networks, so precision is in the ONNX graph and nowhere else. Native calls answer a
failure with None or False and a line in the log: `Log.check` makes one error of both.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import platform
import re
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from edge_runtime.device import gpu_driver
from edge_runtime.errors import BackendError, BackendUnavailable, EdgeRuntimeError

if TYPE_CHECKING:
    from edge_runtime.backends.cuda.base import DeviceFacts
    from edge_runtime.engine_cache import EngineDevice

T = TypeVar("T")

#: Modules with TensorRT's interface, the one to prefer first, and the oldest version of each.
OLDEST: dict[str, tuple[int, ...]] = {"tensorrt": (10, 3), "tensorrt_rtx": (1, 0)}

#: What not every version has: name -> per module, the first version that has it and the first
#: that has it no more (None: none so far). A module that is not named lacks it.
CAPABILITIES: dict[str, dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]]] = {
    # From 11 on every network is strongly typed, and the flag says nothing.
    "strongly typed by a flag": {"tensorrt": ((10, 0), (11, 0)), "tensorrt_rtx": ((1, 0), None)},
    # TensorRT for RTX times nothing ahead of time.
    "timing cache": {"tensorrt": ((8, 0), None)},
}

#: Lines of the log that are kept for an error or a report.
_KEPT_LINES = 200


def import_tensorrt() -> Any:
    """TensorRT, or TensorRT for RTX, which has the same interface.

    Raises:
        BackendUnavailable: Neither can be imported, or it is too old.
    """
    reasons = []
    for name, oldest in OLDEST.items():
        try:
            module: ModuleType = importlib.import_module(name)
        except (ImportError, OSError) as error:
            reasons.append(f"{name}: {(str(error).splitlines() or [''])[0]}")
            continue
        if version(module) < oldest:
            raise BackendUnavailable(
                f"{name} is too old",
                got=module.__version__,
                expected=f"{'.'.join(map(str, oldest))} or later",
                remedy="On a Jetson it comes with JetPack: 6.1 has TensorRT 10.3",
            )
        return module
    raise BackendUnavailable(
        f"TensorRT can't be imported: {'; '.join(reasons)}",
        remedy="On a Jetson: apt install python3-libnvinfer, in a virtual environment made with "
        "--system-site-packages. Elsewhere: pip install 'edge-runtime[tensorrt]'",
    )


def is_installed() -> bool:
    """Whether a module with TensorRT's interface can be found; it is not imported."""
    return any(importlib.util.find_spec(name) for name in OLDEST)


def version(trt: Any) -> tuple[int, ...]:
    """TensorRT's version as numbers: (10, 3, 0, 30)."""
    return tuple(int(part) for part in re.findall(r"\d+", trt.__version__))


def has(trt: Any, capability: str) -> bool:
    """Whether this module, in this version, has one of `CAPABILITIES`."""
    first, ended = CAPABILITIES[capability].get(module_name(trt), ((10**6,), None))
    return first <= version(trt) and (ended is None or version(trt) < ended)


def module_name(trt: Any) -> str:
    """Name of the module, one of `OLDEST`."""
    return str(trt.__name__)


class Log:
    """What TensorRT has said.

    Attributes:
        native: The logger to hand to TensorRT.
        lines: Warnings and errors, the last ones, as "WARNING: text".
        details: The last text of each kind that `watch` asked for.

    Args:
        trt: The module.
        watch: Beginnings of verbose messages to keep in `details`.
    """

    def __init__(self, trt: Any, watch: tuple[str, ...] = ()) -> None:
        self.lines: list[str] = []
        self.details: dict[str, str] = {}
        # What was said since a call was checked last: it belongs to the next one.
        self._recent: list[str] = []
        lines, recent, details = self.lines, self._recent, self.details

        class Native(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                # TensorRT may hold a lock meanwhile. If the collector ran here and found one of
                # TensorRT's objects, its destructor would wait for that lock for ever.
                collects = gc.isenabled()
                gc.disable()
                try:
                    self._take(severity, message)
                finally:
                    if collects:
                        gc.enable()

            def _take(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.WARNING:
                    for some in (lines, recent):
                        some.append(f"{severity.name}: {message}")
                        del some[:-_KEPT_LINES]
                    return
                for beginning in watch:
                    if message.startswith(beginning):
                        details[beginning] = message

        self.native: Any = Native()

    def check(
        self,
        value: T | None,
        what: str,
        *,
        error: type[EdgeRuntimeError] = BackendError,
        remedy: str | None = None,
    ) -> T:
        """Return what a native call answered, unless that is None or False.

        Args:
            value: The answer.
            what: What failed, if it did: "TensorRT refused the network".
            error: The kind of error.
            remedy: How to mend it.

        Raises:
            EdgeRuntimeError: Of the given kind, with what TensorRT said last.
        """
        recent = list(self._recent)
        self._recent.clear()
        if value is None or value is False:
            said = [line for line in recent if not line.startswith("WARNING")] or recent
            text = "; ".join(said[-3:]) or "nothing in its log"
            raise error(f"{what}. TensorRT says: {text}", remedy=remedy)
        return value

    def checked_call(
        self,
        call: Callable[[], T | None],
        what: str,
        *,
        error: type[EdgeRuntimeError] = BackendError,
        remedy: str | None = None,
    ) -> T:
        """Make a native call and check what it answers; see `check`.

        A constructor of TensorRT's that fails raises a TypeError, and some methods a RuntimeError:
        those count as None.
        """
        try:
            value = call()
        except (TypeError, RuntimeError):
            value = None
        return self.check(value, what, error=error, remedy=remedy)


def engine_device(trt: Any, facts: DeviceFacts | None) -> EngineDevice:
    """What an engine that is built here depends on.

    Args:
        trt: TensorRT.
        facts: The GPU; None where there is none, and engines are built ahead of time.
    """
    from edge_runtime.engine_cache import EngineDevice

    def dotted(numbers: tuple[int, int]) -> str:
        return ".".join(map(str, numbers))

    return EngineDevice(
        gpu="" if facts is None else facts.name,
        compute_capability="" if facts is None else dotted(facts.compute_capability),
        driver="" if facts is None else gpu_driver(),
        cuda="" if facts is None else dotted(facts.driver),
        module=module_name(trt),
        tensorrt=trt.__version__,
        system=platform.system(),
        machine=platform.machine(),
    )


def this_device() -> EngineDevice:
    """What engines of this device depend on.

    Raises:
        BackendUnavailable: There is no TensorRT, or no GPU.
    """
    from edge_runtime.backends.cuda.backend import open_cuda

    trt = import_tensorrt()
    cuda = open_cuda("any", 0)
    cuda.open()
    try:
        return engine_device(trt, cuda.facts)
    finally:
        cuda.close()
