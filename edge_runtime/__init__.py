"""Early-exit vision models on a robot: run a cascade and stop at the first confident exit.

    import edge_runtime as er

    with er.load("my.bundle") as cascade:
        prediction = cascade(image)

Importing this package costs numpy and the standard library, nothing else.
"""

from edge_runtime.cascade import Cascade, Exit, Stage
from edge_runtime.errors import (
    BackendError,
    BackendUnavailable,
    CalibrationError,
    ConfigError,
    CudaError,
    EdgeRuntimeError,
    EngineBuildError,
    InputError,
    ManifestError,
)
from edge_runtime.load import load
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.prediction import ExitRun, Prediction, StageRun, Trace
from edge_runtime.scheduler import Scheduler
from edge_runtime.tensors import TensorSpec

__all__ = [
    "BackendError",
    "BackendUnavailable",
    "Bundle",
    "CalibrationError",
    "Cascade",
    "ConfigError",
    "CudaError",
    "EdgeRuntimeError",
    "EngineBuildError",
    "Exit",
    "ExitRun",
    "InputError",
    "ManifestError",
    "OperatingPoint",
    "Prediction",
    "Scheduler",
    "Stage",
    "StageRun",
    "TensorSpec",
    "Trace",
    "load",
]
