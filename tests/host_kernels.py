"""CUDA kernels compiled for the CPU, so that their very source is run where there is no GPU.

`cuda_on_host.h` makes a C++ compiler take a .cu; it says nothing of a GPU's speed or of how its
threads interleave, only that what the source computes is right.
"""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HEADER = Path(__file__).with_name("cuda_on_host.h")
# Without contraction a product and a sum are rounded one by one, on every CPU alike.
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off")


def compile_host(
    sources: Sequence[Path | str], names: Sequence[str], *, conditionals: bool = True
) -> ctypes.CDLL:
    """Compile CUDA sources for this CPU, once, and load them.

    Args:
        sources: Files as `Path`, or texts; all go into one unit, in this order.
        names: The kernels to export, `extern "C"` ones.
        conditionals: Whether GRAPH_CONDITIONALS is defined.

    Returns:
        The library. For each kernel it has `host_NAME(params, grid, block)`, where params points
        at each argument as for cuLaunchKernel; it returns when the kernel has ended.
        `host_on_conditional(handler)` sets who is called, `handler(uint64 handle, uint32 value)`,
        for each `cudaGraphSetConditional`, on the calling thread, after the kernel.
    """
    texts = [source if isinstance(source, str) else source.read_text() for source in sources]
    exports = [f"HOST_KERNEL({name})" for name in names]
    unit = "\n".join(['#include "cuda_on_host.h"', *texts, *exports, ""])
    flags = [*FLAGS, *(["-DGRAPH_CONDITIONALS"] if conditionals else [])]
    library = ctypes.CDLL(str(_compile(unit, flags)))
    for name in names:
        function = getattr(library, f"host_{name}")
        function.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint, ctypes.c_uint]
        function.restype = None
    return library


def find_compiler() -> list[str]:
    """The C++ compiler of this machine, as the begin of a command."""
    if chosen := os.environ.get("CXX"):
        return chosen.split()
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++"]
    raise RuntimeError(
        "no C++ compiler to run CUDA kernels on the CPU: install g++, or: pip install ziglang"
    )


def _compile(unit: str, flags: list[str]) -> Path:
    """Path of the shared library made of `unit`; several processes may ask at the same time."""
    compiler = find_compiler()
    recipe = "\n".join([*compiler, _version(compiler), *flags, HEADER.read_text(), unit])
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(root) / "edge-runtime-tests" / "host-kernels"
    library = cache / f"{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.so"
    if library.is_file():
        return library

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        source, made = Path(temporary) / "unit.cpp", Path(temporary) / "made.so"
        source.write_text(unit)
        command = [*compiler, *flags, f"-I{HEADER.parent}", str(source), "-o", str(made)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"the C++ compiler refused the kernels:\n{result.stderr}")
        made.replace(library)
    return library


def _version(compiler: list[str]) -> str:
    result = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"the C++ compiler does not run: {' '.join(compiler)}: {result.stderr}")
    return result.stdout
