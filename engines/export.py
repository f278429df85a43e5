"""Exports torch modules, given as a list of stages, into a bundle.

A Python API: a configuration file that named Python code to run would be code itself.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.cascade import Cascade, Exit, Stage, StageKind
from edge_runtime.errors import ConfigError, EngineBuildError, missing_package
from edge_runtime.files import check_target
from edge_runtime.manifest import Bundle
from edge_runtime.tensors import BATCH, TensorSpec
from engines.bundle import BuiltStage, write_bundle
from engines.eval_mode import evaluating
from engines.preprocess import PreprocessSpec, camera_image, preprocess_stage
from engines.torch_exporter import MODULE_ERRORS, to_onnx, torch_error
from engines.verify import TOLERANCE, run_model, verify

if TYPE_CHECKING:
    import torch

#: Two samples are traced (one would be folded into the graph) and three are verified, so that
#: whatever took the traced batch for a constant shows.
_TRACED, _VERIFIED = 2, 3


@dataclass(frozen=True)
class TorchStage:
    """A torch module as a stage.

    Attributes:
        name: Name of the stage.
        kind: "saver", "segment" or "head"; `export_stages` adds preprocessing.
        module: Called with one positional tensor per input; returns a tensor, or a tuple or list
            of as many as there are outputs. The first axis of each is the batch.
        inputs: Names of the tensors it reads: the image, or outputs of earlier stages.
        outputs: Names of the tensors it writes.
    """

    name: str
    kind: StageKind
    module: torch.nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def export_stages(
    stages: Sequence[TorchStage],
    exits: Sequence[Exit],
    *,
    example: NDArray[Any] | torch.Tensor,
    classes: Sequence[str],
    out: Path,
    name: str,
    preprocess: PreprocessSpec | None = None,
    image_size: tuple[int, int] | None = None,
    opset: int = 20,
    tolerance: float = TOLERANCE,
    one_piece_check: bool = True,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Export torch modules as a bundle, verified before it is moved in place.

    The chain is run in torch to learn shapes and dtypes, each module is exported with a dynamic
    batch, and the ONNX stages are compared with torch and with the model in one piece. Modules are
    run in eval mode and get their mode back. Not for several threads at a time: warnings, logging
    and standard streams are silenced while torch exports.

    Args:
        stages: In order of execution. Exactly one tensor is read that no stage writes: the input.
        exits: In order of evaluation.
        example: Samples of the cascade's input, any batch size: camera images, shape
            (batch, height, width, channels) uint8, where `preprocess` is given; else the input
            tensor itself.
        classes: Class names in the order of the logits.
        out: The bundle's folder.
        name: Name of the bundle.
        preprocess: What the modules expect of their input; puts a stage "preprocess" in front.
        image_size: Height and width of the camera image, None for any; only with `preprocess`.
        opset: ONNX operator set, 18 or later.
        tolerance: Largest relative error to accept, relative to a tensor's largest magnitude.
        one_piece_check: Whether to compare with the model in one piece too.
        provenance: Added to the manifest's provenance, as plain JSON data.
        overwrite: Whether a bundle at `out` may be replaced.

    Returns:
        The bundle; its provenance has the worst relative error per stage.

    Raises:
        ConfigError: The stages and exits don't fit together, or the example does not fit them.
        EngineBuildError: A module failed, could not be exported, or its ONNX differs from torch.
        BackendUnavailable: torch, onnx, onnxscript or onnxruntime is missing.
    """
    check_target(out, overwrite=overwrite)
    _check_packages()
    if image_size is not None and preprocess is None:
        raise ConfigError(
            "image_size without preprocess", remedy="The example gives the shape of the input"
        )
    root = _root(stages)
    samples = _samples(_to_numpy(example))
    front: list[BuiltStage] = []
    image = TensorSpec(root, (BATCH, *samples.shape[1:]), samples.dtype.name)
    if preprocess is not None:
        image = camera_image(preprocess.channels, image_size)
        image.check(samples)
        front = [preprocess_stage(preprocess, image, name="preprocess", output=root, opset=opset)]
        samples_in = run_model(front[0].default, {image.name: samples}, [root])[root]
    else:
        samples_in = samples
    with evaluating(*(stage.module for stage in stages)):
        traced = _run(stages, root, samples_in[:_TRACED])
        reference = _run(stages, root, samples_in)
        specs = _specs(stages, traced, reference)
        cascade = Cascade(
            tuple(classes),
            image,
            (*(built.stage for built in front), *(_stage(stage, specs) for stage in stages)),
            tuple(exits),
        )
        built = [
            BuiltStage(_stage(stage, specs), {"fp32": _to_onnx(stage, traced, opset)})
            for stage in stages
        ]
    everything = [*front, *built]
    report = verify(
        cascade,
        {part.stage.name: part.default for part in everything},
        samples,
        {spec.name: reference[spec.name] for part in built for spec in part.stage.outputs},
        tolerance=tolerance,
        with_one_piece=one_piece_check,
    )
    return write_bundle(
        out,
        name=name,
        classes=classes,
        image=image,
        stages=everything,
        exits=exits,
        provenance={
            **(provenance or {}),
            "made_by": "engines.export",
            "versions": _versions("torch", "onnx", "onnxscript", "onnxruntime"),
            "verification": report.provenance(),
        },
        overwrite=overwrite,
    )


def _check_packages() -> None:
    for package in ("torch", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise missing_package(package, "export") from error


def _versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


def _root(stages: Sequence[TorchStage]) -> str:
    """Name of the one tensor that is read and that no stage writes."""
    written = {name for stage in stages for name in stage.outputs}
    roots = sorted({name for stage in stages for name in stage.inputs} - written)
    if len(roots) != 1:
        raise ConfigError(
            "tensors that are read and that no stage writes",
            got=", ".join(roots) or "none",
            expected="exactly one, the cascade's input",
        )
    return roots[0]


def _to_numpy(example: Any) -> NDArray[Any]:
    array = np.asarray(example.detach().cpu() if hasattr(example, "detach") else example)
    if array.ndim < 2 or not array.shape[0]:
        raise ConfigError("example", got=f"shape {array.shape}", expected="a batch of samples")
    return array


def _samples(example: NDArray[Any]) -> NDArray[Any]:
    """At least `_VERIFIED` samples: those given, then others that have the values in new places."""
    missing = range(len(example), _VERIFIED)
    rng = np.random.default_rng(0)
    more = [rng.permutation(example[0].ravel()).reshape(example[0].shape) for _ in missing]
    return np.ascontiguousarray(np.concatenate([example, np.array(more)]) if more else example)


def _run(stages: Sequence[TorchStage], root: str, samples: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Run the chain in torch; returns every tensor."""
    import torch

    known: dict[str, torch.Tensor] = {root: torch.from_numpy(samples.copy())}
    for stage in stages:
        for name in stage.inputs:
            if name not in known:
                raise ConfigError(
                    f"stage {stage.name!r}: no earlier stage produces its input {name!r}",
                    remedy="List stages in order of execution",
                )
        try:
            with torch.no_grad():
                result = stage.module(*(known[n].to(_device(stage)) for n in stage.inputs))
        except MODULE_ERRORS as error:
            raise torch_error(f"stage {stage.name!r} failed", error) from error
        known.update(zip(stage.outputs, _outputs(stage, result), strict=True))
    return {name: tensor.detach().cpu().numpy() for name, tensor in known.items()}


def _outputs(stage: TorchStage, result: Any) -> list[torch.Tensor]:
    import torch

    outputs = list(result) if isinstance(result, tuple | list) else [result]
    if len(outputs) != len(stage.outputs) or not all(isinstance(o, torch.Tensor) for o in outputs):
        raise EngineBuildError(
            f"stage {stage.name!r}: the module returns",
            got=", ".join(type(output).__name__ for output in outputs),
            expected=f"{len(stage.outputs)} tensor(s): {', '.join(stage.outputs)}",
        )
    return outputs


def _device(stage: TorchStage) -> Any:
    tensors = (*stage.module.parameters(), *stage.module.buffers())
    return tensors[0].device if tensors else "cpu"


def _specs(
    stages: Sequence[TorchStage],
    traced: Mapping[str, NDArray[Any]],
    reference: Mapping[str, NDArray[Any]],
) -> dict[str, TensorSpec]:
    """Specs of all tensors, from runs with two batch sizes."""
    producers = {name: f"stage {stage.name!r}" for stage in stages for name in stage.outputs}
    specs = {}
    for name, values in traced.items():
        others = reference[name]
        batches = [array.shape[0] if array.ndim else None for array in (values, others)]
        samples = [len(next(iter(run.values()))) for run in (traced, reference)]
        if batches != samples or values.shape[1:] != others.shape[1:]:
            raise EngineBuildError(
                f"{producers.get(name, 'the input')}: tensor {name!r} for batches of {samples}",
                got=f"shapes {values.shape} and {others.shape}",
                expected="the batch as its first axis, all others fixed",
            )
        specs[name] = TensorSpec(name, (BATCH, *values.shape[1:]), values.dtype.name)
    return specs


def _stage(stage: TorchStage, specs: Mapping[str, TensorSpec]) -> Stage:
    return Stage(
        stage.name,
        stage.kind,
        tuple(specs[name] for name in stage.inputs),
        tuple(specs[name] for name in stage.outputs),
    )


def _to_onnx(stage: TorchStage, values: Mapping[str, NDArray[Any]], opset: int) -> bytes:
    import torch

    device = _device(stage)
    arguments = [torch.from_numpy(values[name].copy()).to(device) for name in stage.inputs]
    return to_onnx(stage.name, stage.module, arguments, stage.inputs, stage.outputs, opset)
