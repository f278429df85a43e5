"""torch's own ONNX exporter, called the one way that gives a stage: quiet, whole, without paths."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.errors import EngineBuildError
from edge_runtime.tensors import BATCH
from engines.onnx_graph import reads, strip_debug_info

if TYPE_CHECKING:
    import onnx
    import torch

logger = logging.getLogger(__name__)

#: What user code in a module's forward, and the exporter that traces it, may raise.
MODULE_ERRORS = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
)


def to_onnx(
    stage: str,
    module: torch.nn.Module,
    arguments: Sequence[torch.Tensor],
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int,
) -> bytes:
    """Export a module with a dynamic batch.

    Args:
        stage: Name of the stage, for messages.
        module: In eval mode, called with one positional tensor per input.
        arguments: Samples to trace it with, first axis the batch, at least 2 samples.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        opset: ONNX operator set, 18 or later.

    Returns:
        The ONNX file, without external data.

    Raises:
        EngineBuildError: torch can't export it; the message has torch's.
    """
    exporter = _Exporter(module, tuple(arguments), tuple(inputs), tuple(outputs), opset)
    try:
        with silenced(stage):
            model = exporter.export()
            if not _any_batch(model):
                # `len(x)` and the like: the default capture takes the batch for a constant, the
                # capture of Python's bytecode does not.
                model = exporter.export_strictly()
            strip_debug_info(model)
            _cut_weights(model.graph)
            _name_batch(model)
            data: bytes = model.SerializeToString()
    except MODULE_ERRORS as error:
        raise torch_error(f"stage {stage!r} can't be exported", error.__cause__ or error) from error
    if not _any_batch(model):
        raise EngineBuildError(
            f"stage {stage!r} can't be exported: its module fixes the batch",
            got=[axis.dim_value for axis in _batch_axes(model)],
            expected="a batch of any size",
            remedy="Take the batch from tensor.shape[0], and turn no tensor into Python values",
        )
    return data


class _Exporter:
    def __init__(
        self,
        module: torch.nn.Module,
        arguments: tuple[torch.Tensor, ...],
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        opset: int,
    ) -> None:
        self._module = module
        self._arguments = arguments
        self._options: dict[str, Any] = {
            "dynamo": True,
            "input_names": inputs,
            "output_names": outputs,
            "opset_version": opset,
            "external_data": False,
            "verbose": False,
        }

    def export(self) -> onnx.ModelProto:
        import torch

        program = torch.onnx.export(
            self._module, self._arguments, dynamic_shapes=self._dynamic_shapes(), **self._options
        )
        assert program is not None  # what dynamo=True promises
        return program.model_proto

    def export_strictly(self) -> onnx.ModelProto:
        import torch

        captured = torch.export.export(
            self._module, self._arguments, dynamic_shapes=self._dynamic_shapes(), strict=True
        )
        program = torch.onnx.export(captured, **self._options)
        assert program is not None  # what dynamo=True promises
        return program.model_proto

    def _dynamic_shapes(self) -> tuple[Any, ...]:
        """The batch axis of every argument, nested as the module's `forward` takes them."""
        import torch

        axes: list[Any] = [{0: torch.export.Dim(BATCH)}] * len(self._arguments)
        parameters = list(inspect.signature(self._module.forward).parameters.values())
        for i, parameter in enumerate(parameters):
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                return (*axes[:i], tuple(axes[i:]))
        return tuple(axes)


def torch_error(what: str, error: BaseException, remedy: str | None = None) -> EngineBuildError:
    """What torch raised as one line; raise it from `error`."""
    first = (str(error).strip().splitlines() or [""])[0]
    said = f"{what}: torch says: {type(error).__name__}: {first}"
    return EngineBuildError(said, remedy=remedy)


def _batch_axes(model: onnx.ModelProto) -> list[Any]:
    values = (*model.graph.input, *model.graph.output)
    return [value.type.tensor_type.shape.dim[0] for value in values]


def _any_batch(model: onnx.ModelProto) -> bool:
    return all(axis.dim_param for axis in _batch_axes(model))


def _cut_weights(graph: onnx.GraphProto) -> None:
    """Make constants of the slices of weights; torch does so with small ones only.

    A runtime would make them when it loads the model, but quantisation looks for constants.
    """
    import onnx

    constants = {tensor.name: tensor for tensor in graph.initializer}
    cut: set[str] = set()
    for node in list(graph.node):
        if node.op_type == "Slice" and all(name in constants for name in node.input):
            values = {name: onnx.numpy_helper.to_array(constants[name]) for name in node.input}
            (part,) = onnx.reference.ReferenceEvaluator(node).run(None, values)
            graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(part), node.output[0]))
            graph.node.remove(node)
            cut.update(node.input)
    cut.difference_update(*map(reads, graph.node), (value.name for value in graph.output))
    for name in cut:
        graph.initializer.remove(constants[name])


def _name_batch(model: onnx.ModelProto) -> None:
    """Give the batch its name, which torch does not always keep; inner shapes can be inferred."""
    del model.graph.value_info[:]
    for axis in _batch_axes(model):
        if axis.dim_param:
            axis.dim_param = BATCH


@contextlib.contextmanager
def silenced(stage: str) -> Iterator[None]:
    """Keep what torch's exporter says for our own log at DEBUG; exceptions pass."""
    said = io.StringIO()
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if said.getvalue():
            logger.debug("torch while exporting %s: %s", stage, said.getvalue())
