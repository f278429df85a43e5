"""timm, imported where it is needed and in one place.

timm imports torchvision, whose compiled half fits one build of torch: a torch for the CPU beside a
torchvision for CUDA can't load it. Classifiers need nothing of it, but its Python half registers
shapes for two of its operators (box suppression, of detectors) and stops when they don't exist.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from edge_runtime.errors import missing_package

#: Holds the stand-ins for as long as the process lives; without it torch takes them back.
_declared: list[Any] = []


def timm() -> ModuleType:
    """The package.

    Raises:
        BackendUnavailable: It is not installed, or its torchvision does not fit torch.
    """
    try:
        _fit_torchvision()
        import timm as package
    except (ImportError, RuntimeError) as error:
        raise missing_package("timm", "train") from error
    return package


def _fit_torchvision() -> None:
    """Declare the operators that torchvision's compiled half would have brought."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        import torch

        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        import torchvision  # noqa: F401
