"""Compiling, loading and controlling the emulated driver."""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.host_kernels import find_compiler

SUPPORTED = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")

FOLDER = Path(__file__).parent
SOURCES = ("libcuda.cpp", "machine.h", "abi.h")  # the first includes the others
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")
# How the loader knows it: whoever asks for libcuda.so.1 later gets this one.
SONAME = "-Wl,-soname,libcuda.so.1"
# What a real driver makes, on a desktop and on a Jetson.
DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu")

#: Codes of CUresult to order failures with.
OUT_OF_MEMORY = 2
NO_DEVICE = 100
INVALID_IMAGE = 200
NOT_READY = 600
ILLEGAL_ADDRESS = 700
UNKNOWN = 999


class Emulated:
    """Controls of the emulated driver, which is one for the process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("live_objects", "log", "problems"):
            getattr(library, f"emulated_{name}").restype = ctypes.c_char_p
        library.emulated_live_bytes.restype = ctypes.c_size_t

    def reset(self) -> None:
        """Forget what is alive, the log and ordered failures; one device, CUDA 13.0.

        No context is current on the calling thread afterwards. The primary context stays, since
        cuda-core keeps it for the life of the process.
        """
        self._library.emulated_reset()

    def register(self, kernels: ctypes.CDLL, names: Sequence[str]) -> None:
        """Let `kernels`, made by `host_kernels.compile_host`, run when these are launched."""
        setter = ctypes.cast(kernels.host_on_conditional, ctypes.c_void_p)
        for name in names:
            code = ctypes.cast(getattr(kernels, f"host_{name}"), ctypes.c_void_p)
            self._library.emulated_register_kernel(name.encode(), code, setter)

    def fail(self, function: str, nth: int = 1, code: int = OUT_OF_MEMORY) -> None:
        """Refuse the nth call of a function from now on; "*" is any function.

        What destroys does so before it fails, as CUDA reports the errors of earlier work there.
        """
        self._library.emulated_fail(function.encode(), ctypes.c_long(nth), code)

    def failures_left(self) -> int:
        """How many ordered failures have not happened yet."""
        return int(self._library.emulated_faults_left())

    def forget_failures(self) -> None:
        """Order no failures any more."""
        self._library.emulated_forget_faults()

    def set_driver_version(self, major: int, minor: int) -> None:
        """Be a driver for another CUDA version; its functions stay the same."""
        self._library.emulated_set_driver_version(1000 * major + 10 * minor)

    def set_device_count(self, count: int) -> None:
        """Have so many devices, from the next cuInit on."""
        self._library.emulated_set_device_count(count)

    def set_integrated(self, integrated: bool) -> None:
        """Say that the devices share the host's memory, as a Jetson's does."""
        self._library.emulated_set_integrated(int(integrated))

    def live_bytes(self) -> int:
        """Device and pinned memory that was allocated since the reset and not freed."""
        return int(self._library.emulated_live_bytes())

    def live_objects(self) -> Counter[str]:
        """Kinds of objects that were made since the reset and not destroyed."""
        return Counter(_lines(self._library.emulated_live_objects()))

    def primary_references(self, device: int = 0) -> int:
        """How often the primary context was retained and not released."""
        return int(self._library.emulated_primary_references(device))

    def log(self) -> list[str]:
        """Names of the functions called since the reset or the last `clear_log`, in order."""
        return _lines(self._library.emulated_log())

    def clear_log(self) -> None:
        """Forget the calls."""
        self._library.emulated_clear_log()

    def problems(self) -> list[str]:
        """What no program may do, though a driver does not notice it."""
        return _lines(self._library.emulated_problems())


class NotEmulatedError(Exception):
    """The emulated driver can't be used in this process; the message says why."""


@functools.cache
def load() -> Emulated:
    """Compile the driver, once, and load it before anyone else loads a driver.

    Raises:
        NotEmulatedError: There is a GPU, or another driver was loaded before.
    """
    if present := [name for name in DEVICE_FILES if Path(name).exists()]:
        raise NotEmulatedError(f"this machine has a GPU: {present[0]}")
    library = ctypes.CDLL(str(_compile()), mode=ctypes.RTLD_GLOBAL)
    if not hasattr(ctypes.CDLL("libcuda.so.1"), "emulated_marker"):
        raise NotEmulatedError("another libcuda.so.1 was loaded into this process before")
    return Emulated(library)


def _compile() -> Path:
    """Path of the library; several processes may ask at the same time."""
    compiler = find_compiler()
    texts = [(FOLDER / name).read_text() for name in SOURCES]
    recipe = "\n".join([*compiler, *FLAGS, SONAME, platform.machine(), *texts])
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "edge-runtime-tests" / "cuda"
    library = folder / hashlib.sha256(recipe.encode()).hexdigest()[:16] / "libcuda.so.1"
    if library.is_file():
        return library

    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / "libcuda.so.1"
        command = [*compiler, *FLAGS, SONAME, str(FOLDER / SOURCES[0]), "-o", str(made), "-ldl"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"the C++ compiler refused the driver:\n{result.stderr}")
        made.replace(library)
    return library


def _lines(text: bytes | None) -> list[str]:
    return (text or b"").decode().splitlines()
