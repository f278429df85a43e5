"""Reads a plain ONNX classifier and makes it fit a cascade: input, batch, names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import BackendError, ConfigError, EngineBuildError
from edge_runtime.tensors import BATCH, TensorSpec
from engines.onnx_graph import opset, strip_debug_info, varying, with_outputs
from engines.onnx_package import DecodeError, onnx
from engines.preprocess import MIN_OPSET, PreprocessSpec
from engines.verify import run_model

#: Batch and single runs may use other kernels; float32 results then agree to some 1e-6.
_BATCH_TOLERANCE = 1e-4
_PROBE = 3


@dataclass(frozen=True)
class Classifier:
    """A model that was read and understood.

    Attributes:
        model: With a symbolic batch where that works, else with the batch 1.
        input: Name of its input.
        specs: Tensor name -> spec, of the tensors that were asked for.
        single: Whether it takes one sample at a time.
        batch: What was found about its batch, for the provenance.
        original: The model as it was read, inlined and checked.
    """

    model: onnx.ModelProto
    input: str
    specs: Mapping[str, TensorSpec]
    single: bool
    batch: str
    original: onnx.ModelProto

    def run(self, pixels: NDArray[Any], names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """What the original computes for a batch of any size.

        Args:
            pixels: Its input, first axis the batch.
            names: Tensors of its graph.
        """
        single = self.single or _fixed_batch(self.original) is not None
        return _run(self.original, self.input, pixels, names, single)


def understand(
    original: onnx.ModelProto, spec: PreprocessSpec, names: Sequence[str], where: str
) -> Classifier:
    """Find out how a model takes its input, and check that by running it.

    Args:
        original: What `read_model` returned; open lengths of its input are filled in.
        spec: What the user says of its input.
        names: Tensors that will leave the model or cross a cut.
        where: The model, for messages.

    Raises:
        ConfigError: Its input is another than `spec` says, or a tensor's first axis is no batch.
        EngineBuildError: ONNX Runtime refuses the model.
    """
    source = _fit_input(original, spec, where)
    pixels = _probe(spec)
    fixed = _fixed_batch(original)
    if fixed not in (None, 1):
        raise ConfigError(
            f"{where}: its batch is fixed", got=fixed, expected="1, or a symbolic batch"
        )
    try:
        singles = _run(original, source, pixels, names, single=True)
    except BackendError as error:
        raise EngineBuildError(f"{where}: {error}") from error
    symbolic = _with_symbolic_batch(original, source)
    problem = _batch_problem(symbolic, source, pixels, names, singles)
    single = problem is not None
    if single:
        model, note = _with_batch(original, 1), f"1, because a batch of {_PROBE} {problem}"
    else:
        model = symbolic
        note = "symbolic" if fixed is None else "fixed 1 in the file, made symbolic and checked"
    return Classifier(model, source, _specs(singles, single, where), single, note, original)


def read_model(path: Path, where: str) -> onnx.ModelProto:
    """Read an ONNX file, with its external data if it has any, and check it.

    Args:
        path: The file.
        where: The model, for messages.

    Returns:
        The model without local functions, doc strings and initializers among its inputs.

    Raises:
        ConfigError: The file is missing.
        EngineBuildError: It is no valid ONNX file, or of an opset before 11.
    """
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: the file {path} does not exist") from error
    except (DecodeError, onnx.checker.ValidationError, ValueError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EngineBuildError(f"{where}: {path} is no valid ONNX file: {first}") from error
    if opset(model) < MIN_OPSET:
        raise EngineBuildError(
            f"{where}: opset of {path}",
            got=opset(model),
            expected=f"{MIN_OPSET} or later",
            remedy="Convert it with onnx.version_converter.convert_version",
        )
    model = onnx.inliner.inline_local_functions(model)
    strip_debug_info(model)
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in initializers]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return model


def _fit_input(model: onnx.ModelProto, spec: PreprocessSpec, where: str) -> str:
    """Check the model's input against what the user says of it; returns its name."""
    inputs = model.graph.input
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise ConfigError(f"{where}: inputs", got=names, expected="exactly one, the image")
    expected = spec.output(inputs[0].name)
    tensor = inputs[0].type.tensor_type
    shape = [axis.dim_value or axis.dim_param or "?" for axis in tensor.shape.dim]
    fits = len(shape) == 4 and all(
        not isinstance(have, int) or have == want
        for have, want in zip(shape[1:], expected.shape[1:], strict=False)
    )
    if not fits or tensor.elem_type != onnx.TensorProto.FLOAT:
        dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        raise ConfigError(
            f"{where}: its input {inputs[0].name!r} is not what the recipe says",
            got=f"({', '.join(map(str, shape))}) {dtype}",
            expected=str(expected),
            remedy="Mend size and layout in the recipe",
        )
    for axis, length in zip(tensor.shape.dim[1:], expected.sample_shape(), strict=True):
        axis.dim_value = length
    name: str = inputs[0].name
    return name


def _fixed_batch(model: onnx.ModelProto) -> int | None:
    """The batch size that the model is fixed to, None for any."""
    return model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or None


def _with_batch(model: onnx.ModelProto, batch: str | int) -> onnx.ModelProto:
    """A copy whose input has this batch; shapes inside are left to be inferred."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    axis = copy.graph.input[0].type.tensor_type.shape.dim[0]
    axis.Clear()
    if isinstance(batch, int):
        axis.dim_value = batch
    else:
        axis.dim_param = batch
    return copy


def _with_symbolic_batch(model: onnx.ModelProto, source: str) -> onnx.ModelProto:
    """A copy with a symbolic batch in which no Reshape insists on one sample."""
    copy = _with_batch(model, BATCH)
    graph = copy.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            constants[node.output[0]] = node.attribute[0].t
    moving = varying(copy, source)
    for i, node in enumerate(graph.node):
        if node.op_type != "Reshape" or node.input[0] not in moving:
            continue
        if node.input[1] not in constants:
            continue
        shape = onnx.numpy_helper.to_array(constants[node.input[1]]).tolist()
        if shape and shape[0] == 1:
            # 0 copies the axis, for a shape that has its one unknown length elsewhere.
            free = [0 if -1 in shape else -1, *shape[1:]]
            name = f"reshape_{i}_any_batch"
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(free, np.int64), name))
            node.input[1] = name
    return copy


def _batch_problem(
    model: onnx.ModelProto,
    source: str,
    pixels: NDArray[Any],
    names: Sequence[str],
    singles: Mapping[str, NDArray[Any]],
) -> str | None:
    """What goes wrong when all samples run at once; None if they give what single runs give."""
    try:
        together = _run(model, source, pixels, names, single=False)
    except BackendError:
        return "can't be run"
    for name, want in singles.items():
        have = together[name]
        if have.shape != want.shape:
            return f"gives {name!r} the shape {have.shape} instead of {want.shape}"
        difference = float(np.abs(have.astype(np.float64) - want).max(initial=0.0))
        if not difference <= _BATCH_TOLERANCE * float(np.abs(want).max(initial=0.0)):
            return f"gives other values of {name!r} than single runs"
    return None


def _run(
    model: onnx.ModelProto, source: str, pixels: NDArray[Any], names: Sequence[str], single: bool
) -> dict[str, NDArray[Any]]:
    data = with_outputs(model, names).SerializeToString()
    return run_model(data, {source: pixels}, list(names), single=single)


def _probe(spec: PreprocessSpec) -> NDArray[np.float32]:
    """Random samples as the preprocess stage would write them, shape (3, ...)."""
    shape = (_PROBE, *spec.output("pixels").sample_shape())
    scale, offset = spec.scale_and_offset()
    channel = (-1, 1, 1) if spec.layout == "NCHW" else (1, 1, -1)
    noise = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)
    pixels: NDArray[np.float32] = noise * scale.reshape(channel) + offset.reshape(channel)
    return pixels


def _specs(tensors: Mapping[str, NDArray[Any]], single: bool, where: str) -> dict[str, TensorSpec]:
    """Specs of tensors from what `_PROBE` samples gave."""
    specs = {}
    for name, values in tensors.items():
        if values.ndim < 1 or values.shape[0] != _PROBE:
            raise ConfigError(
                f"{where}: tensor {name!r}: its first axis is not the batch",
                got=f"shape {values.shape} for {_PROBE} samples",
            )
        shape = (1 if single else BATCH, *values.shape[1:])
        specs[name] = TensorSpec(name, shape, values.dtype.name)
    return specs
