"""Compares what a backend computes with ONNX Runtime, stage by stage and from image to answer.

Every stage is compared on the inputs that the backend itself has made, so an error is told where it
arises and not again behind it. From image to logits errors add up, and what counts there is whether
samples leave at the same exits with the same labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends.base import Backend
from edge_runtime.backends.onnxrt import native_error, native_exceptions, new_session
from edge_runtime.cascade import Plan, Stage
from edge_runtime.manifest import Bundle
from edge_runtime.prediction import Prediction
from edge_runtime.scheduler import Scheduler

#: Largest relative error of a stage by its precision. TensorRT multiplies FP32 with the 10 bits of
#: TF32 where the GPU has it; FP16 has 11 bits and sums in FP16 or FP32; an INT8 value that lies
#: between two steps may be rounded the other way, one step in 127, and several meet in a sum.
TOLERANCES = {"fp32": 5e-3, "fp16": 2e-2, "int8": 5e-2}
#: Of any other precision.
_OTHER_TOLERANCE = 5e-2
#: Share of samples that leave elsewhere, or with another label, up to which thresholds still hold.
_REFIT_ABOVE = 0.01


def tolerance_of(precision: str) -> float:
    """Largest relative error that a stage of this precision may have."""
    known = (value for name, value in TOLERANCES.items() if precision.startswith(name))
    return next(known, _OTHER_TOLERANCE)


@dataclass
class StageParity:
    """How far the outputs of one stage are from ONNX Runtime's, on the same inputs.

    Attributes:
        stage: Its name.
        precision: At which both ran.
        tolerance: Largest relative error that is accepted.
        worst: Largest relative error of a sample's tensor: max |a - b| / max |reference|.
        mean: Mean of these errors over samples and outputs.
        finite: Whether all values were finite.
        count: Tensors that were compared; 0 where its inputs were never finite.
    """

    stage: str
    precision: str
    tolerance: float
    worst: float = 0.0
    mean: float = 0.0
    finite: bool = True
    count: int = 0

    @property
    def ok(self) -> bool:
        """Whether it is within the tolerance."""
        return self.finite and self.worst <= self.tolerance

    def add(self, have: NDArray[Any], want: NDArray[Any]) -> None:
        """Take in one sample's tensor, shape (1, ...)."""
        self.count += 1
        a, b = have.astype(np.float64), want.astype(np.float64)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            self.finite = False
            return
        size = np.abs(b).max(initial=0.0)
        error = float(np.abs(a - b).max(initial=0.0) / (size or 1.0))
        self.worst = max(self.worst, error)
        self.mean += (error - self.mean) / self.count


@dataclass(frozen=True)
class AnswerParity:
    """Whether a cascade answers as it does on ONNX Runtime, at the same thresholds.

    Attributes:
        samples: How many were compared.
        same: Share that leaves at the same exit with the same label.
        same_label: Share that gets the same label, wherever it leaves.
        rates: Exit -> share of samples that leave there, on the backend and on ONNX Runtime.
        accuracy: On the backend.
        reference_accuracy: On ONNX Runtime.
    """

    samples: int
    same: float
    same_label: float
    rates: Mapping[str, tuple[float, float]]
    accuracy: float
    reference_accuracy: float

    @property
    def refit(self) -> bool:
        """Whether thresholds should be chosen anew on this device."""
        return 1 - self.same > _REFIT_ABOVE


class References:
    """ONNX Runtime sessions of single stages, made when they are first needed.

    Args:
        bundle: The bundle.
        axes: Lengths of the image's named axes.
    """

    def __init__(self, bundle: Bundle, axes: Mapping[str, int]) -> None:
        self._bundle = bundle
        self._axes = axes
        self._sessions: dict[tuple[str, str], Any] = {}

    def run(
        self, stage: Stage, precision: str, inputs: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        """Outputs of a stage by name.

        Raises:
            BackendError: ONNX Runtime refuses the stage or the inputs.
        """
        key = (stage.name, precision)
        if key not in self._sessions:
            model = self._bundle.stage_model(stage.name, precision)
            self._sessions[key] = new_session(model, axes=self._axes)
        names = [spec.name for spec in stage.outputs]
        try:
            outputs = self._sessions[key].run(names, dict(inputs))
        except native_exceptions() as error:
            raise native_error(error, f"stage {stage.name!r} failed", stage.name) from error
        return dict(zip(names, outputs, strict=True))


def stage_parity(
    bundle: Bundle, scheduler: Scheduler, images: Iterable[NDArray[Any]]
) -> dict[str, StageParity]:
    """Compare every stage that a cascade has loaded; see `backend_parity`.

    Args:
        bundle: Where its stages come from.
        scheduler: Open, on a backend whose stages can be run one by one.
        images: Each of shape (1, height, width, channels), uint8.
    """
    height, width = (int(axis) for axis in scheduler.image.shape[1:3])
    axes = {"height": height, "width": width}
    return backend_parity(bundle, scheduler.backend, scheduler.plan, axes, images)


def backend_parity(
    bundle: Bundle,
    backend: Backend,
    plan: Plan,
    axes: Mapping[str, int],
    images: Iterable[NDArray[Any]],
) -> dict[str, StageParity]:
    """Compare every stage that a backend has loaded.

    No exit is judged, so a stage whose outputs are not finite is found, and not stopped at.

    Args:
        bundle: Where the stages come from.
        backend: Open; its stages can be run one by one.
        plan: What it was opened with.
        axes: Lengths of the image's named axes.
        images: Each of shape (1, height, width, channels), uint8.

    Returns:
        Stage name -> its errors, in order of execution.

    Raises:
        BackendError: A stage failed on either side.
    """
    references = References(bundle, axes)
    found = {}
    for stage in plan.stages:
        precision = backend.precision(stage.name)
        found[stage.name] = StageParity(stage.name, precision, tolerance_of(precision))
    for image in images:
        known: dict[str, NDArray[Any]] = {plan.image.name: image}
        backend.feed(image)
        for stage in plan.stages:
            backend.run(stage.name)
            known |= {spec.name: backend.read(spec.name) for spec in stage.outputs}
            inputs = {spec.name: known[spec.name] for spec in stage.inputs}
            if not all(np.isfinite(values).all() for values in inputs.values()):
                continue  # That is the fault of a stage before.
            want = references.run(stage, found[stage.name].precision, inputs)
            for spec in stage.outputs:
                found[stage.name].add(known[spec.name], want[spec.name])
        backend.done()
    return found


def answer_parity(
    answers: Sequence[Prediction],
    references: Sequence[Prediction],
    labels: NDArray[np.int64],
    exits: Sequence[str],
) -> AnswerParity:
    """Compare what two cascades have answered on the same samples.

    Args:
        answers: Of the backend.
        references: Of ONNX Runtime.
        labels: True classes, shape (samples,).
        exits: Names of the exits at which samples may leave, in order.
    """
    pairs = list(zip(answers, references, strict=True))
    count = len(pairs)

    def rate(predictions: Sequence[Prediction], exit_: str) -> float:
        return sum(one.exit == exit_ for one in predictions) / count

    def accuracy(predictions: Sequence[Prediction]) -> float:
        right = [one.label == label for one, label in zip(predictions, labels, strict=True)]
        return float(np.mean(right))

    return AnswerParity(
        samples=count,
        same=sum((a.exit, a.label) == (b.exit, b.label) for a, b in pairs) / count,
        same_label=sum(a.label == b.label for a, b in pairs) / count,
        rates={name: (rate(answers, name), rate(references, name)) for name in exits},
        accuracy=accuracy(answers),
        reference_accuracy=accuracy(references),
    )
