"""Stages as live torch modules: for a model that is not exported yet, and as a reference.

Each stage is a module that takes its inputs in order and returns its output, or a tuple of them. On
a CUDA device the modules run eagerly here, and every exit is read back before it is decided, as
plain PyTorch would do it; `torch_cuda.TorchStages` captures them instead.
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
PRECISION = "fp32"


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
        self._torch = import_torch(self._device)
        for stage in plan.stages:
            module = module_of(stage, self._modules, variants)
            for spec in (*stage.inputs, *stage.outputs):
                spec.resolve(axes).sample_shape()
            self._stages[stage.name] = Stage(
                stage.name,
                stage.kind,
                stage.inputs,
                tuple(spec.resolve(axes) for spec in stage.outputs),
            )
            freeze(module, self._device, self._training)
        self._image = plan.image.name

    def close(self) -> None:
        """Forget the tensors; the modules get their mode back."""
        restore(self._training)
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
        outputs = run_module(self._torch, known, self._modules[stage], inputs)
        for spec, output in zip(known.outputs, outputs, strict=True):
            self._tensors[spec.name] = output

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
        return PRECISION


def module_of(
    stage: Stage, modules: Mapping[str, torch.nn.Module], variants: Mapping[str, str]
) -> torch.nn.Module:
    """The module of a stage.

    Raises:
        ConfigError: There is none, or another precision is asked for.
    """
    if stage.name not in modules:
        raise ConfigError(
            f"stage {stage.name!r} has no module", remedy=nearest(stage.name, modules)
        )
    chosen = variants.get(stage.name, PRECISION)
    if chosen != PRECISION:
        raise ConfigError(
            f"stage {stage.name!r}: variant",
            got=repr(chosen),
            expected=f"{PRECISION}: a live module has no other",
        )
    return modules[stage.name]


def freeze(module: torch.nn.Module, device: str, training: dict[torch.nn.Module, bool]) -> None:
    """Move a module and put it into eval mode; its parts' modes are added to `training`."""
    module.to(device)
    for part in module.modules():
        # Two stages may share a module, which the first of them has put into eval mode.
        training.setdefault(part, part.training)
    module.eval()


def restore(training: dict[torch.nn.Module, bool]) -> None:
    """Give modules back the modes that `freeze` noted, and forget them."""
    while training:
        part, mode = training.popitem()
        part.training = mode


def run_module(
    torch_: Any, stage: Stage, module: torch.nn.Module, inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Run a stage's module on a batch, one sample at a time where it takes one.

    Args:
        torch_: The torch module.
        stage: Every axis but the batch known.
        module: In eval mode.
        inputs: In the stage's order, each shape (batch, ...).

    Returns:
        Its outputs in the stage's order.

    Raises:
        BackendError: The module raised, or returned other tensors than the stage promises.
    """
    single = stage.inputs[0].shape[0] == 1
    rows = [slice(i, i + 1) for i in range(len(inputs[0]))] if single else [slice(None)]
    with torch_.inference_mode():
        runs = [_call(stage, module, [value[row] for value in inputs]) for row in rows]
        return (
            runs[0] if len(runs) == 1 else [torch_.cat(parts) for parts in zip(*runs, strict=True)]
        )


def _call(
    stage: Stage, module: torch.nn.Module, inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Call a module and check what it returns against the cascade."""
    try:
        result = module(*inputs)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise torch_error(error, f"stage {stage.name!r} failed", stage.name) from error
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


def torch_error(error: BaseException, what: str, stage: str | None = None) -> BackendError:
    """What torch raised as one line; raise it from `error`."""
    first = (str(error).strip().splitlines() or [""])[0]
    return BackendError(f"{what}: torch says: {type(error).__name__}: {first}", stage=stage)


def import_torch(device: str) -> Any:
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
