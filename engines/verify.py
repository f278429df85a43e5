"""Compares, tensor by tensor: the original model, its stages one after another, and one piece.

Errors are relative to the tensor's largest magnitude: max |a - b| / max |reference|.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends.onnxrt import native_error, native_exceptions, new_session
from edge_runtime.cascade import Cascade, Stage
from edge_runtime.errors import BackendError, EngineBuildError
from edge_runtime.manifest import Bundle
from edge_runtime.tensors import TensorSpec
from engines.one_piece import merge

#: What float32 stages are held to.
TOLERANCE = 1e-4

Against = Literal["the original", "one piece"]


@dataclass(frozen=True, slots=True)
class TensorError:
    """How far one tensor of the staged chain is off.

    Attributes:
        tensor: Its name.
        stage: The stage that writes it.
        against: What it was compared with.
        absolute: Largest absolute difference.
        relative: The same divided by the largest magnitude of the other side.
    """

    tensor: str
    stage: str
    against: Against
    absolute: float
    relative: float


@dataclass(frozen=True)
class Report:
    """What a verification found; every error is within the tolerance.

    Attributes:
        samples: Number of samples that were compared.
        tolerance: Largest relative error that was accepted.
        errors: One per compared tensor, in order of execution.
    """

    samples: int
    tolerance: float
    errors: tuple[TensorError, ...]

    @property
    def worst(self) -> float:
        """The largest relative error."""
        return max((error.relative for error in self.errors), default=0.0)

    def worst_by_stage(self) -> dict[str, float]:
        """Stage name -> largest relative error of its tensors."""
        worst: dict[str, float] = {}
        for error in self.errors:
            worst[error.stage] = max(worst.get(error.stage, 0.0), error.relative)
        return worst

    def provenance(self) -> dict[str, Any]:
        """What a manifest keeps of it."""
        return {
            "samples": self.samples,
            "tolerance": self.tolerance,
            "worst_relative_error": self.worst_by_stage(),
        }


def verify_bundle(
    bundle: Bundle,
    image: NDArray[Any],
    *,
    reference: Mapping[str, NDArray[Any]] | None = None,
    variants: Mapping[str, str] | None = None,
    tolerance: float = TOLERANCE,
    with_one_piece: bool = True,
) -> Report:
    """Verify a bundle; see `verify`.

    Args:
        bundle: The bundle.
        image: Samples for its input, first axis the batch.
        reference: Tensor name -> what the original computed for the same samples.
        variants: Stage name -> precision, for stages that don't run at their first variant.
        tolerance: Largest relative error to accept.
        with_one_piece: Whether to compare each exit with its model in one piece.
    """
    models = {
        record.name: bundle.stage_model(record.name, bundle.precision(record.name, variants or {}))
        for record in bundle.manifest.stages
    }
    return verify(
        bundle.cascade,
        models,
        image,
        reference or {},
        tolerance=tolerance,
        with_one_piece=with_one_piece,
    )


def verify(
    cascade: Cascade,
    models: Mapping[str, bytes],
    image: NDArray[Any],
    reference: Mapping[str, NDArray[Any]],
    *,
    tolerance: float = TOLERANCE,
    with_one_piece: bool = True,
) -> Report:
    """Compare the staged chain with the original and with the model in one piece.

    Args:
        cascade: The dataflow.
        models: Stage name -> ONNX model.
        image: Samples for the cascade's input, first axis the batch.
        reference: Tensor name -> what the original computed for the same samples.
        tolerance: Largest relative error to accept.
        with_one_piece: Whether to compare each exit with its model in one piece.

    Raises:
        EngineBuildError: A tensor is not finite, has another shape than its spec, or differs by
            more than the tolerance; the first one in order of execution is named.
        BackendError: ONNX Runtime refuses a stage.
    """
    chain = run_stages(cascade, models, image)
    producers = {spec.name: stage.name for stage in cascade.stages for spec in stage.outputs}
    errors = [
        _compare(name, stage, "the original", chain[name], reference[name], tolerance)
        for name, stage in producers.items()
        if name in reference
    ]
    if with_one_piece:
        for logits, values in _one_piece_logits(cascade, models, image):
            stage = producers[logits]
            errors.append(_compare(logits, stage, "one piece", chain[logits], values, tolerance))
    return Report(len(image), tolerance, tuple(errors))


def run_stages(
    cascade: Cascade, models: Mapping[str, bytes], image: NDArray[Any]
) -> dict[str, NDArray[Any]]:
    """Run every stage in a plain ONNX Runtime session.

    Args:
        cascade: The dataflow.
        models: Stage name -> ONNX model.
        image: Samples for the cascade's input, first axis the batch.

    Returns:
        Tensor name -> values, of every tensor.

    Raises:
        EngineBuildError: A stage writes a tensor that does not fit its spec.
        BackendError: ONNX Runtime refuses a stage.
    """
    known: dict[str, NDArray[Any]] = {cascade.image.name: image}
    for stage in cascade.stages:
        feeds = {spec.name: known[spec.name] for spec in stage.inputs}
        names = [spec.name for spec in stage.outputs]
        single = any(spec.shape[0] == 1 for spec in stage.inputs)
        outputs = run_model(models[stage.name], feeds, names, single=single, stage=stage.name)
        for spec in stage.outputs:
            _check_spec(stage, spec, outputs[spec.name], len(image))
            known[spec.name] = outputs[spec.name]
    return known


def run_model(
    model: bytes,
    feeds: Mapping[str, NDArray[Any]],
    outputs: list[str],
    *,
    single: bool = False,
    stage: str | None = None,
) -> dict[str, NDArray[Any]]:
    """Run an ONNX model once.

    Args:
        model: Its bytes.
        feeds: Input name -> batch.
        outputs: Names of the outputs.
        single: Whether to run one sample at a time.
        stage: Name of the stage, for messages.

    Raises:
        BackendError: ONNX Runtime refuses the model or the input.
    """
    try:
        session = new_session(model)
    except BackendError as error:
        raise BackendError(f"stage {stage!r}: {error}" if stage else str(error)) from error
    size = len(next(iter(feeds.values())))
    rows = [slice(i, i + 1) for i in range(size)] if single else [slice(None)]
    try:
        runs = [session.run(outputs, {k: v[r] for k, v in feeds.items()}) for r in rows]
    except native_exceptions() as error:
        what = f"stage {stage!r} failed" if stage else "the model failed"
        raise native_error(error, what, stage) from error
    if not single:
        return dict(zip(outputs, runs[0], strict=True))
    return {
        name: np.concatenate([np.atleast_1d(run[i]) for run in runs])
        for i, name in enumerate(outputs)
    }


def _one_piece_logits(
    cascade: Cascade, models: Mapping[str, bytes], image: NDArray[Any]
) -> Iterator[tuple[str, NDArray[Any]]]:
    for position, exit_ in enumerate(cascade.exits):
        stages = cascade.plan([position]).stages
        whole = merge(cascade.image, [(s, models[s.name]) for s in stages], exit_.logits)
        single = any(spec.shape[0] == 1 for stage in stages for spec in stage.inputs)
        feeds = {cascade.image.name: image}
        yield exit_.logits, run_model(whole, feeds, [exit_.logits], single=single)[exit_.logits]


def _check_spec(stage: Stage, spec: TensorSpec, values: NDArray[Any], samples: int) -> None:
    fits = values.dtype.name == spec.dtype and values.ndim == len(spec.shape)
    fits = fits and values.shape[0] == samples
    if not fits or any(
        isinstance(want, int) and want != have
        for have, want in zip(values.shape[1:], spec.shape[1:], strict=True)
    ):
        raise EngineBuildError(
            f"stage {stage.name!r}: output {spec.name!r} for {samples} samples",
            got=f"{values.shape} {values.dtype}",
            expected=f"({', '.join(map(str, (samples, *spec.shape[1:])))}) {spec.dtype}",
        )


def _compare(
    tensor: str,
    stage: str,
    against: Against,
    have: NDArray[Any],
    want: NDArray[Any],
    tolerance: float,
) -> TensorError:
    if have.shape != want.shape:
        raise EngineBuildError(
            f"tensor {tensor!r} of stage {stage!r} against {against}: shape",
            got=have.shape,
            expected=want.shape,
        )
    with np.errstate(invalid="ignore"):  # infinities give NaN, which no tolerance accepts
        difference = np.abs(have.astype(np.float64) - want.astype(np.float64))
    absolute = float(difference.max(initial=0.0))
    magnitude = float(np.abs(want.astype(np.float64)).max(initial=0.0))
    relative = absolute / magnitude if magnitude else (0.0 if absolute == 0 else math.inf)
    if not relative <= tolerance:
        raise EngineBuildError(
            f"tensor {tensor!r} of stage {stage!r} differs from {against}: relative error",
            got=f"{relative:.3g}",
            expected=f"<= {tolerance:g}",
        )
    return TensorError(tensor, stage, against, absolute, relative)
