"""From a bundle on disk to a cascade that runs, in one call."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

from edge_runtime.backends.base import Backend
from edge_runtime.errors import ConfigError
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.scheduler import Scheduler
from edge_runtime.schema import nearest

if TYPE_CHECKING:
    from edge_runtime.backends.cuda.backend import CudaOptions
    from edge_runtime.backends.onnxrt import OnnxRuntimeOptions

BACKENDS = ("onnxrt", "tensorrt", "fake")

T = TypeVar("T")

#: The point that is run when none is named: as accurate as the last exit, as cheap as possible.
DEFAULT_POINT = "zero_loss"


def load(
    path: str | os.PathLike[str] | Bundle,
    *,
    backend: str | Backend = "onnxrt",
    operating_point: str | OperatingPoint | None = None,
    image_size: tuple[int, int] | None = None,
    options: OnnxRuntimeOptions | CudaOptions | None = None,
) -> Scheduler:
    """Open a bundle, ready to classify.

    Args:
        path: The bundle's folder, or a bundle that is already open.
        backend: "onnxrt", "tensorrt" (engines that edge-runtime build has made for this device),
            "fake", or a backend of your own.
        operating_point: Name of a point in the bundle, a file that ends in .json, or a point made
            by hand; the bundle's "zero_loss" where None.
        image_size: (height, width) of the camera, for bundles that leave it open.
        options: `OnnxRuntimeOptions` for "onnxrt", `CudaOptions` for "tensorrt".

    Returns:
        An opened scheduler; call it with an image, close it or use it in a with statement.

    Raises:
        ManifestError: The bundle or the operating point is not whole.
        ConfigError: Backend, point or image size don't fit.
        BackendError: A stage can't be loaded.
        BackendUnavailable: The backend's package is missing.
    """
    bundle = path if isinstance(path, Bundle) else Bundle.open(path)
    if not isinstance(operating_point, OperatingPoint):
        operating_point = bundle.operating_point(operating_point or DEFAULT_POINT)
    if isinstance(backend, str):
        backend = new_backend(backend, bundle, options)
    if operating_point.policy == "gate":
        from edge_runtime.gated import GatedScheduler

        return GatedScheduler(bundle, backend, operating_point, image_size=image_size).open()
    return Scheduler(bundle.cascade, backend, operating_point, image_size=image_size).open()


def new_backend(
    name: str, bundle: Bundle, options: OnnxRuntimeOptions | CudaOptions | None = None
) -> Backend:
    """A backend by its name, not opened.

    Raises:
        ConfigError: There is no such backend, or it takes other options.
        BackendUnavailable: Its package is missing.
    """
    if name == "onnxrt":
        from edge_runtime.backends.onnxrt import OnnxRuntimeBackend, OnnxRuntimeOptions

        return OnnxRuntimeBackend(bundle, _of(OnnxRuntimeOptions, options, name))
    if name == "tensorrt":
        from edge_runtime.backends.cuda.backend import CudaBackend, CudaOptions
        from edge_runtime.backends.tensorrt.api import import_tensorrt
        from edge_runtime.backends.tensorrt.stages import TensorRTStages

        stages = TensorRTStages(bundle, module=import_tensorrt())
        return CudaBackend(stages, _of(CudaOptions, options, name))
    if name == "fake":
        from edge_runtime.backends.fake import FakeBackend

        return FakeBackend()
    raise ConfigError(f"there is no backend {name!r}", remedy=nearest(name, BACKENDS))


def _of(kind: type[T], options: object, backend: str) -> T | None:
    """Options of the kind that a backend takes."""
    if options is None or isinstance(options, kind):
        return options
    raise ConfigError(
        f"options of the backend {backend!r}", got=type(options).__name__, expected=kind.__name__
    )
