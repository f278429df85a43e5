"""Stages as live torch modules: for a model that is not exported yet, and as a reference.

Each stage is a module that takes its inputs in order and returns its output, or a tuple of them. On
a CUDA device the modules run eagerly, and every exit is read back before it is decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime import confidence
from edge_runtime.backends.base import Backend
from edge_runtime.cascade import Plan, Stage
from edge_runtime.confidence import Decision, Metric
from edge_runtime.errors import BackendError, BackendUnavailable, ConfigError, missing_package
from edge_runtime.schema import nearest

if TYPE_CHECKING:
    import torch

#: The one precision of a live module, as traces name it.
_PRECISION = "fp32"


class TorchBackend(Backend):
    """Runs the stages of a cascade as torch modules.

    Modules are run in eval mode, without gradients; they are not copied, so whoever trains them
    further must not do so while the backend is open. Each is put back into its mode by `close`.

    Args:
        modules: Stage name -> module.
        device: "cpu", "cuda" or any other torch device; the modules are moved there by `open`.
    """

    name = "torch"
    mode = "host"

    def __init__(self, modules: Mapping[str, torch.nn.Module], *, device: str = "cpu") -> None:
        self._modules = dict(modules)
        self._device = device
        self._stages: dict[str, Stage] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._training: dict[torch.nn.Module, bool] = {}
        self._image = ""
        self._alone = False

    def _open(self, plan: Plan, axes: Mapping[str, int], variants: Mapping[str, str]) -> None:
        self._torch = _import_torch(self._device)
        for stage in plan.stages:
            if stage.name not in self._modules:
                raise ConfigError(
                    f"stage {stage.name!r} has no module",
                    remedy=nearest(stage.name, self._modules),
                )
            chosen = variants.get(stage.name, _PRECISION)
            if chosen != _PRECISION:
                raise ConfigError(
                    f"stage {stage.name!r}: variant",
                    got=repr(chosen),
                    expected=f"{_PRECISION}: a live module has no other",
                )
            for spec in (*stage.inputs, *stage.outputs):
                spec.resolve(axes).sample_shape()
            self._stages[stage.name] = Stage(
                stage.name,
                stage.kind,
                stage.inputs,
                tuple(spec.resolve(axes) for spec in stage.outputs),
            )
            module = self._modules[stage.name].to(self._device)
            # Two stages may share a module, which the first of them has put into eval mode.
            self._training = {p: p.training for p in module.modules()} | self._training
            module.eval()
        self._image = plan.image.name

    def close(self) -> None:
        """Forget the tensors; the modules get their mode back."""
        for part, training in self._training.items():
            part.training = training
        self._training = {}
        self._stages = {}
        self._tensors = {}

    def feed(self, image: NDArray[Any]) -> None:
        """Copy the batch to the device."""
        if not self._stages:
            raise BackendError(f"the backend {self.name!r} is not open")
        self._alone = len(image) == 1
        # from_numpy shares the caller's memory, which the caller may change.
        self._tensors = {
            self._image: self._torch.from_numpy(np.array(image)).to(self._device),
        }

    def run(self, stage: str) -> None:
        """Call the stage's module."""
        known = self._stages.get(stage)
        if known is None:
            raise BackendError(f"stage {stage!r} was not opened", stage=stage)
        inputs = [self._tensors[spec.name] for spec in known.inputs]
        single = known.inputs[0].shape[0] == 1
        rows = [slice(i, i + 1) for i in range(len(inputs[0]))] if single else [slice(None)]
        with self._torch.inference_mode():
            runs = [self._call(known, [value[row] for value in inputs]) for row in rows]
            outputs = [self._torch.cat(parts) for parts in zip(*runs, strict=True)]
        for spec, output in zip(known.outputs, outputs, strict=True):
            self._tensors[spec.name] = output

    def _call(self, stage: Stage, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Call a module and check what it returns against the cascade."""
        try:
            result = self._modules[stage.name](*inputs)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise BackendError(
                f"stage {stage.name!r} failed: torch says: {type(error).__name__}: {first}",
                stage=stage.name,
            ) from error
        outputs = list(result) if isinstance(result, tuple | list) else [result]
        if len(outputs) != len(stage.outputs):
            raise BackendError(
                f"stage {stage.name!r}: its module returns",
                stage=stage.name,
                got=f"{len(outputs)} tensors",
                expected=f"{len(stage.outputs)}: {', '.join(s.name for s in stage.outputs)}",
            )
        for spec, output in zip(stage.outputs, outputs, strict=True):
            dtype = str(output.dtype).removeprefix("torch.")
            if tuple(output.shape[1:]) != spec.shape[1:] or dtype != spec.dtype:
                raise BackendError(
                    f"stage {stage.name!r}: output {spec.name!r} of its module",
                    stage=stage.name,
                    got=f"{tuple(output.shape)} {dtype}",
                    expected=str(spec),
                )
        return outputs

    def decide(self, logits: str, metric: Metric, temperature: float) -> Decision:
        """Judge the logits with numpy, on the host."""
        values = self._tensors[logits].cpu().numpy()
        return confidence.decide(values[0] if self._alone else values, metric, temperature)

    def keep(self, rows: NDArray[np.intp], tensors: Sequence[str]) -> None:
        """Select the rows that stay."""
        index = self._torch.from_numpy(np.asarray(rows, np.int64)).to(self._device)
        self._tensors = {name: self._tensors[name].index_select(0, index) for name in tensors}

    def read(self, tensor: str) -> NDArray[Any]:
        """A copy of a tensor, on the host."""
        return np.array(self._tensors[tensor].cpu().numpy())

    def precision(self, stage: str) -> str:
        """Always "fp32", whatever the module computes in."""
        return _PRECISION


def _import_torch(device: str) -> Any:
    """The torch module, with the device checked.

    Raises:
        BackendUnavailable: torch is not installed, or does not have the device.
    """
    try:
        import torch
    except ImportError as error:
        raise missing_package("torch", "export") from error
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise BackendUnavailable(
            f"torch has no device {device!r} here: {first}", remedy="Use device='cpu'"
        ) from error
    return torch
