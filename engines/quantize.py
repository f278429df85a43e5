"""Writes INT8 into an ONNX graph: QuantizeLinear and DequantizeLinear where TensorRT wants them.

The rules, which `engines.qdq_lint` checks on any model and which hold here by construction:

- int8, symmetric, zero point 0; activations per tensor, weights per output channel;
- pairs on the inputs of Conv, ConvTranspose, Gemm and MatMul, and on the skip input of a residual
  Add; on an output only because one of these reads it, hence behind batch norm and activation;
- all quantised readers of a tensor share one pair, every other reader keeps the float tensor, so
  Softmax, LayerNorm and GELU stay float, and so do a graph's inputs and outputs;
- pairs around a Concat share a scale; no bias is quantised.

onnxruntime.quantization is not used. Its QDQQuantizer (1.31) makes *all* readers of a tensor read
the pair (`replace_input_of_all_nodes`): LayerNorm beside a MatMul, ReLU beside a Conv. Its Add
quantises both inputs, and so the branch that TensorRT would fuse. A weight that is read by rows and
by columns gets the scales of one of them. It skips a tensor of unknown type with no more than a
line in the log. Undoing that is longer than inserting the nodes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_runtime.errors import CalibrationError, ConfigError, EngineBuildError
from edge_runtime.schema import nearest
from engines.onnx_graph import opset, subgraphs
from engines.onnx_package import DecodeError, onnx
from engines.qdq_graph import (
    FP16_SCALE_OPSET,
    QUANTIZED,
    WEIGHTED,
    Wiring,
    all_nodes,
    varying_from,
    weight_axis,
)
from engines.qdq_write import LIMIT, Operand, Target, Writer

#: Operators that are quantised; Add stands for the skip input of a residual one.
OP_TYPES = (*WEIGHTED, "Add")
#: Heavy operators that this module can't quantise; they are listed as left.
UNSUPPORTED = ("Attention", "DeformConv", "Einsum", "GRU", "LSTM", "RNN")

_PER_AXIS_OPSET = 13
_FLOATS: dict[str, type[np.floating[Any]]] = {"float32": np.float32, "float16": np.float16}


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """What to quantise.

    Attributes:
        per_channel: Whether weights have a scale per output channel, not one for the tensor.
        exclude: Regular expression; nodes in whose name it is found stay float. "" excludes none.
        op_types: Operators to quantise, of `OP_TYPES`; "Add" stands for the skip inputs of
            residual Adds.
    """

    per_channel: bool = True
    exclude: str = ""
    op_types: tuple[str, ...] = OP_TYPES

    def __post_init__(self) -> None:
        """Check the expression and the operators."""
        try:
            re.compile(self.exclude)
        except re.error as error:
            raise ConfigError(f"exclude: {error}", got=self.exclude) from error
        for name in self.op_types:
            if name not in OP_TYPES:
                raise ConfigError(
                    f"op_types: {name!r} can't be quantised", remedy=nearest(name, OP_TYPES)
                )


@dataclass(frozen=True)
class Quantized:
    """A quantised model, and what became of its nodes.

    Attributes:
        model: The ONNX file; the bytes that were given where nothing is quantised.
        quantized: Names of the nodes that read quantised values, in order of execution.
        left: Node -> why it stays float, of all nodes that could have been expected to be
            quantised. A node without a name of its own goes by the name of its first output.
    """

    model: bytes
    quantized: tuple[str, ...]
    left: Mapping[str, str]


def activations(model: bytes, options: QuantizeOptions | None = None) -> tuple[str, ...]:
    """Names of the tensors whose ranges `quantize` needs, in order of their first use.

    Args:
        model: The ONNX file.
        options: What to quantise; everything where None.

    Raises:
        EngineBuildError: As for `quantize`.
    """
    return _Plan(_parse(model), options or QuantizeOptions()).activations()


def quantize(
    model: bytes, ranges: Mapping[str, float], options: QuantizeOptions | None = None
) -> Quantized:
    """Quantise the weights and activations of a float model.

    Inputs and outputs keep their names and dtypes.

    Args:
        model: The ONNX file, float32 or float16.
        ranges: Tensor -> its largest absolute value, > 0, of each of `activations`; others are
            ignored.
        options: What to quantise; everything where None.

    Returns:
        The quantised model; the same input gives the same bytes.

    Raises:
        CalibrationError: A range is missing, or is no positive number.
        EngineBuildError: The model is no ONNX file, is quantised already or has local functions;
            its opset is below 13, or below 19 for FP16; a weight is not finite.
    """
    plan = _Plan(_parse(model), options or QuantizeOptions())
    quantized = tuple(plan.names[target.position] for target in plan.targets)
    if not quantized:
        return Quantized(model, (), plan.left)
    writer = Writer(plan.model, plan.wiring, plan.targets, plan.scales(ranges))
    return Quantized(writer.write(), quantized, plan.left)


class _LeftError(Exception):
    """Why a node stays float."""


class _Plan:
    """Decides what is quantised; changes nothing.

    Attributes:
        model: The float model.
        options: What to quantise.
        names: Name of each node.
        wiring: Of the model's graph.
        targets: Nodes to quantise, in order.
        left: Node -> why it stays float.
    """

    def __init__(self, model: onnx.ModelProto, options: QuantizeOptions) -> None:
        self.model = model
        self.options = options
        self.names = node_names(model.graph)
        self.left: dict[str, str] = {}
        self.wiring = Wiring(model.graph)
        self._inputs = {value.name for value in model.graph.input}
        self._varying = varying_from(model.graph, self._inputs - set(self.wiring.constants))
        self._types = _types(model)
        weighted = {
            position: self._attempt(position, node)
            for position, node in enumerate(model.graph.node)
            if node.op_type != "Add"
        }
        found = {position: target for position, target in weighted.items() if target is not None}
        chosen = {model.graph.node[position].output[0] for position in found}
        written = {
            name: position for position, node in enumerate(model.graph.node) for name in node.output
        }
        for position, node in enumerate(model.graph.node):
            if node.op_type == "Add":
                skip = self._skip(node, chosen, written)
                target = None if skip is None else self._attempt(position, node, skip)
                if target is not None:
                    found[position] = target
        self.targets = [found[position] for position in sorted(found)]
        self._check_opset()
        self._check_weights()

    def activations(self) -> tuple[str, ...]:
        """Tensors that get a pair, in order of first use."""
        operands = (operand for target in self.targets for operand in target.operands)
        return tuple(dict.fromkeys(o.tensor for o in operands if not o.weight))

    def scales(self, ranges: Mapping[str, float]) -> dict[str, float]:
        """Scale of each of `activations`."""
        largest = {}
        for name in self.activations():
            if name not in ranges:
                raise CalibrationError(
                    f"there is no range of tensor {name!r}",
                    remedy="Measure the ranges of all tensors that engines.quantize.activations "
                    "lists for the same model and options",
                )
            value = float(ranges[name])
            if not (math.isfinite(value) and value > 0):
                raise CalibrationError(
                    f"range of tensor {name!r}",
                    got=value,
                    expected="its largest absolute value, > 0",
                    remedy="Measure on data on which the tensor is not all zero, or exclude the "
                    "nodes that read it",
                )
            largest[name] = value
        for group in self._concat_groups(set(largest)):
            shared = max(largest[name] for name in group)
            largest.update((name, shared) for name in group)
        return {name: value / LIMIT for name, value in largest.items()}

    def _attempt(
        self, position: int, node: onnx.NodeProto, skip: int | None = None
    ) -> Target | None:
        """The node as a target; None, and perhaps a reason in `left`, if it is none."""
        inside = [inner.op_type for graph in subgraphs(node) for inner in all_nodes(graph)]
        name = self.names[position]
        if any(op in WEIGHTED for op in inside):
            self.left[name] = "what is inside of If, Loop and Scan is not quantised"
        if node.op_type in UNSUPPORTED:
            self.left[name] = f"{node.op_type} is not supported"
        elif node.domain not in ("", "ai.onnx"):
            self.left[name] = f"{node.domain}.{node.op_type} is not supported"
        elif node.op_type in OP_TYPES:
            try:
                return self._target(position, node, skip)
            except _LeftError as reason:
                self.left[name] = str(reason)
        return None

    def _target(self, position: int, node: onnx.NodeProto, skip: int | None) -> Target:
        if node.op_type not in self.options.op_types:
            raise _LeftError(f"{node.op_type} is not among the op types to quantise")
        if self.options.exclude and re.search(self.options.exclude, self.names[position]):
            raise _LeftError("excluded")
        if skip is None:
            operands = tuple(self._operand(node, index) for index in (0, 1))
            if all(operand.weight for operand in operands):
                raise _LeftError("both of its inputs are constants")
        else:
            operands = (Operand(skip, node.input[skip]),)
        kinds = [self._types.get(name) for name in (*node.input[:2], *node.output)]
        kind = next((kind for kind in kinds if kind), "unknown")
        if kind not in _FLOATS:
            raise _LeftError(f"its tensors are {kind}, neither float32 nor float16")
        return Target(position, operands, _FLOATS[kind])

    def _operand(self, node: onnx.NodeProto, index: int) -> Operand:
        tensor = node.input[index]
        source = self.wiring.constant_source(tensor)
        if source is not None:
            if index == 0 and node.op_type != "MatMul":
                raise _LeftError("its first input is a constant")
            if source in self._inputs:
                raise _LeftError(f"its weight {source!r} is an input that a caller may replace")
            rank = len(self.wiring.constants[source].dims)
            axis = weight_axis(node, index, rank) if self.options.per_channel else None
            if node.op_type == "MatMul" and rank > 2 and axis is not None:
                # TensorRT takes it; ONNX Runtime 1.31 fails while it runs its fused MatMul.
                raise _LeftError(f"its weight {source!r} is a batch of matrices")
            return Operand(index, tensor, weight=True, axis=axis)
        if tensor not in self._varying:
            raise _LeftError(f"{tensor!r} is computed from constants: fold them first")
        if index == 1 and node.op_type in ("Conv", "ConvTranspose"):
            raise _LeftError("its weight is no constant")
        return Operand(index, tensor)

    def _skip(
        self, node: onnx.NodeProto, chosen: set[str], written: Mapping[str, int]
    ) -> int | None:
        """Which input of an Add is the skip of a residual connection; None if it is none."""
        first, second = node.input
        if first == second or not {first, second} <= self._varying:
            return None
        ends = [self.wiring.chain(name) for name in (first, second)]
        branches = [
            end is not None and end.output[0] in chosen and self.wiring.has_weight(end)
            for end in ends
        ]
        if not any(branches):
            return None
        if all(branches):
            # TensorRT fuses the Add with what runs last.
            return 0 if written[first] < written[second] else 1
        return branches.index(False)

    def _concat_groups(self, quantized: set[str]) -> Iterator[set[str]]:
        """Tensors around Concats that must share a scale, so that the Concat moves int8."""
        groups: list[set[str]] = []
        for node in self.model.graph.node:
            if node.op_type == "Concat" and node.output[0] in quantized:
                group = {node.output[0], *quantized.intersection(node.input)}
                for other in [other for other in groups if other & group]:
                    groups.remove(other)
                    group |= other
                groups.append(group)
        yield from groups

    def _check_opset(self) -> None:
        """Refuse operators that are too old for what the targets need."""
        version = opset(self.model)
        fp16 = any(target.dtype is np.float16 for target in self.targets)
        needed = FP16_SCALE_OPSET if fp16 else _PER_AXIS_OPSET
        if self.targets and version < needed:
            raise EngineBuildError(
                "the model's opset is too old for " + ("FP16 scales" if fp16 else "INT8"),
                got=version,
                expected=f"{needed} or later",
                remedy="Export it with a later opset, or convert it with "
                "onnx.version_converter.convert_version",
            )

    def _check_weights(self) -> None:
        for target in self.targets:
            for operand in target.operands:
                if operand.weight and not np.isfinite(self.wiring.value(operand.tensor)).all():
                    name = self.wiring.constant_source(operand.tensor)
                    raise EngineBuildError(
                        f"initializer {name!r} has values that are NaN or infinite",
                        remedy="Train or export the model again",
                    )


def _parse(data: bytes) -> onnx.ModelProto:
    """Read a float model."""
    try:
        model = onnx.load_from_string(data)
    except DecodeError as error:
        raise EngineBuildError("the model to quantise is no ONNX file") from error
    if model.functions:
        raise EngineBuildError(
            f"the model has local functions ({model.functions[0].name!r}, ...)",
            remedy="Inline them with onnx.inliner.inline_local_functions",
        )
    for node in all_nodes(model.graph):
        if QUANTIZED.search(node.op_type):
            raise EngineBuildError(
                f"the model is quantised already: it has {node.op_type} {node.name!r}",
                remedy="Quantise the float model it was made from",
            )
    return model


def node_names(graph: onnx.GraphProto) -> list[str]:
    """A name for each node: its own where that is one, else the tensor it writes."""
    counts = Counter(node.name for node in graph.node)
    return [
        node.name if node.name and counts[node.name] == 1 else next(filter(None, node.output), "")
        for node in graph.node
    ]


def _types(model: onnx.ModelProto) -> dict[str, str]:
    """Dtype of each tensor for which it can be inferred."""
    try:
        model = onnx.shape_inference.infer_shapes(model)
    except onnx.shape_inference.InferenceError as error:
        raise EngineBuildError(f"the model is no valid ONNX: {error}") from error
    graph = model.graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        kinds[value.name] = value.type.tensor_type.elem_type
    names = onnx.helper.tensor_dtype_to_np_dtype
    return {tensor: names(kind).name for tensor, kind in kinds.items() if kind}
