"""Show what is installed here and what is missing, with the command that mends each."""

from __future__ import annotations

import argparse
import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from edge_runtime import device
from edge_runtime.backends.cuda import probe
from edge_runtime.backends.cuda.backend import open_cuda
from edge_runtime.backends.onnxrt import shared_pool_available
from edge_runtime.backends.tensorrt import api
from edge_runtime.console import Console
from edge_runtime.engine_cache import EngineCache
from edge_runtime.errors import BackendUnavailable, CudaError
from edge_runtime.schema import plain

DISTRIBUTION = "edge-runtime"
#: Our four top-level packages; two of the names are common words.
PACKAGES = ("edge_runtime", "engines", "calib", "bench")


class _Need(NamedTuple):
    """An optional package: the name it is imported by, the extra that brings it, its use."""

    module: str
    extra: str
    purpose: str


_NEEDS = (
    _Need("onnxruntime", "cpu", "runs bundles on the CPU"),
    _Need("PIL", "cpu", "reads image files"),
    _Need("yaml", "cpu", "reads configurations"),
    _Need("rich", "cpu", "prints tables and progress"),
    _Need("onnx", "calib", "makes bundles from ONNX files"),
    _Need("torch", "export", "exports torch modules"),
    _Need("timm", "train", "backbones and augmentations to train with"),
    _Need("cuda.core", "tensorrt", "reaches an NVIDIA GPU, conditional graphs included"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """``edge-runtime doctor`` has no arguments of its own."""


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Print the device, the packages and every warning; works on a base install."""
    fingerprint = device.fingerprint()
    console.facts({k: v for k, v in fingerprint.items() if k != "packages"})
    console.line("\npackages")
    for name, version in fingerprint["packages"].items():
        console.line(f"  {name} {version}")
    console.line("\noptional parts")
    missing = {}
    for need in _NEEDS:
        if _installed(need.module):
            console.line(f"  ok       {need.module}: {need.purpose}")
        else:
            missing[need.module] = f"pip install 'edge-runtime[{need.extra}]'"
            console.line(f"  missing  {need.module}: {need.purpose}; {missing[need.module]}")
    gpu = _gpu()
    console.line("\nGPU")
    for name, value in gpu.items():
        for key, text in value.items() if isinstance(value, dict) else [("", value)]:
            console.line(f"  {f'{name} {key}'.strip()}: {text or 'available'}")
    engines = _tensorrt()
    console.line("\nTensorRT")
    for name, text in engines.items():
        console.line(f"  {name}: {text}")
    warnings = [*_shadowed(), *_onnxruntime()]
    console.line()
    for warning in warnings:
        console.line(f"warning: {warning}")
    if not warnings:
        console.line("no warnings")
    return {
        "device": fingerprint,
        "missing": missing,
        "gpu": gpu,
        "tensorrt": engines,
        "warnings": warnings,
    }


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it belongs to
        return False


def _gpu() -> dict[str, Any]:
    """What the first GPU is and which execution modes work there, or why there is none."""
    cuda = open_cuda("any", 0)
    try:
        cuda.open()
    except (BackendUnavailable, CudaError) as error:
        return {"none": str(error)}
    try:
        return {"device": plain(cuda.facts), "mode": probe.why_not(cuda, 1)}
    except (BackendUnavailable, CudaError) as error:
        return {"device": plain(cuda.facts), "failed": str(error)}
    finally:
        cuda.close()


def _tensorrt() -> dict[str, str]:
    """Which TensorRT there is and where its engines are kept, or why there is none."""
    try:
        trt = api.import_tensorrt()
    except BackendUnavailable as error:
        return {"none": str(error)}
    return {api.module_name(trt): trt.__version__, "engines in": str(EngineCache().root)}


def _shadowed() -> list[str]:
    """Warnings about other distributions or folders that own one of our package names."""
    warnings = []
    owners = metadata.packages_distributions()
    for package in PACKAGES:
        others = sorted({d for d in owners.get(package, []) if d != DISTRIBUTION})
        if others:
            warnings.append(
                f"the package {package} is also installed by {', '.join(others)}: whichever was "
                "installed last has overwritten files of the other. Keep them in two environments"
            )
        spec = importlib.util.find_spec(package)
        here = Path(__file__).resolve().parent.parent
        found = [Path(p).resolve() for p in (spec.submodule_search_locations or [])] if spec else []
        if here / package not in found:
            where = found[0] if found else "nowhere"
            warnings.append(
                f"'import {package}' does not find ours in {here} but {where}: something else of "
                "that name comes first on sys.path"
            )
    return warnings


def _onnxruntime() -> list[str]:
    """Warnings about an onnxruntime that can't share its threads."""
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    import onnxruntime

    if shared_pool_available(onnxruntime):
        return []
    return [
        f"onnxruntime {onnxruntime.__version__} can't share one thread pool between sessions: "
        "stages get a pool each, which does not spin. Newer ones run a cascade faster"
    ]
