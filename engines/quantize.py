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
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import CalibrationError, ConfigError, EngineBuildError
from edge_runtime.schema import nearest
from engines.onnx_graph import opset, reads, strip_debug_info, subgraphs
from engines.onnx_package import DecodeError, onnx

#: Operators with weights, or with two activations, that are quantised.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
#: And Add, for the skip input of a residual one.
OP_TYPES = (*WEIGHTED, "Add")
#: Heavy operators that this module can't quantise; they are listed as left.
UNSUPPORTED = ("Attention", "DeformConv", "Einsum", "GRU", "LSTM", "RNN")

#: Operators that move values without computing any.
MOVING = frozenset(
    {
        "Cast",
        "DepthToSpace",
        "Dropout",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
#: Activation functions that are fused into what stands before them.
ACTIVATIONS = frozenset(
    {
        "Celu",
        "Clip",
        "Elu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Mish",
        "PRelu",
        "Relu",
        "Selu",
        "Sigmoid",
        "Softplus",
        "Softsign",
        "Swish",
        "Tanh",
        "ThresholdedRelu",
    }
)
#: Operators of a model that is quantised already.
QUANTIZED = re.compile(r"QuantizeLinear|DequantizeLinear|DynamicQuantize|^Q[A-Z]|Integer|NBits")

_PER_AXIS_OPSET, FP16_SCALE_OPSET = 13, 19
_LIMIT = 127
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
    return Quantized(_Writer(plan, plan.scales(ranges)).write(), quantized, plan.left)


class Wiring:
    """Who writes and who reads each tensor of one graph.

    Attributes:
        producers: Tensor -> the node that writes it.
        readers: Tensor -> nodes that read it, one entry per input, those inside subgraphs by the
            node that has the subgraph.
        outputs: Names of the graph's outputs.
        constants: Initializers and values of Constant nodes.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.producers: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        self.outputs = {value.name for value in graph.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            self.producers.update((name, node) for name in node.output if name)
            inner = reads(node) - set(node.input)
            for name in (*filter(None, node.input), *sorted(inner)):
                self.readers.setdefault(name, []).append(node)
            if node.op_type == "Constant":
                self.constants.update(
                    (node.output[0], a.t) for a in node.attribute if a.name == "value"
                )

    def chain(self, tensor: str) -> onnx.NodeProto | None:
        """The node with weights whose result reaches a tensor and nothing else.

        On the way may be batch norm, a constant that is added or multiplied, an activation
        function, and what only moves values: everything that can be one kernel with an Add behind
        it. None where there is no such node.
        """
        while tensor not in self.outputs and len(self.readers.get(tensor, ())) == 1:
            node = self.producers.get(tensor)
            if node is None or node.op_type in WEIGHTED:
                return node
            if node.op_type in ("Add", "Mul"):
                moving = [name for name in node.input if self.constant_source(name) is None]
                if len(moving) != 1:
                    return None
                tensor = moving[0]
            elif node.op_type in MOVING | ACTIVATIONS | {"BatchNormalization"}:
                tensor = node.input[0]
            else:
                return None
        return None

    def has_weight(self, node: onnx.NodeProto) -> bool:
        """Whether one of `WEIGHTED` has a weight, and does not multiply two activations."""
        return any(self.constant_source(name) is not None for name in node.input[:2])

    def constant_source(self, tensor: str) -> str | None:
        """The constant that a tensor is, perhaps transposed or quantised; None if it is none."""
        while tensor not in self.constants:
            node = self.producers.get(tensor)
            if node is None or node.op_type not in _CONSTANT_CHAIN:
                return None
            tensor = node.input[0]
        return tensor


_CONSTANT_CHAIN = ("Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Transpose")


def weight_axis(node: onnx.NodeProto, index: int, rank: int) -> int | None:
    """Axis of the output channels in a constant input of a node.

    Args:
        node: One of `WEIGHTED`.
        index: Which of its inputs is the constant: 0 or 1.
        rank: Of the constant.

    Returns:
        The axis; None for a vector, which makes one output channel.
    """
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if rank < 2:
        return None
    if node.op_type == "Gemm":
        transposed = attribute(node, "transA" if index == 0 else "transB", 0) != 0
        return int(transposed) if index == 0 else int(not transposed)
    return rank - 2 if index == 0 else rank - 1


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Value of a node's attribute, or the default."""
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


class _Operand(NamedTuple):
    """An input that is quantised: a weight, perhaps with an axis, or an activation."""

    place: int
    tensor: str
    weight: bool = False
    axis: int | None = None


class _Target(NamedTuple):
    """A node that is quantised; `dtype` is that of its tensors."""

    position: int
    operands: tuple[_Operand, ...]
    dtype: type[np.floating[Any]]


class _LeftError(Exception):
    """Why a node stays float."""


class _Plan:
    """Decides what is quantised; changes nothing.

    Attributes:
        model: The float model.
        options: What to quantise.
        names: Name of each node.
        targets: Nodes to quantise, in order.
        left: Node -> why it stays float.
    """

    def __init__(self, model: onnx.ModelProto, options: QuantizeOptions) -> None:
        self.model = model
        self.options = options
        self.names = _names(model.graph)
        self.left: dict[str, str] = {}
        self._wiring = Wiring(model.graph)
        self._inputs = {value.name for value in model.graph.input}
        self._varying = varying_from(model.graph, self._inputs - set(self._wiring.constants))
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
        return {name: value / _LIMIT for name, value in largest.items()}

    def value(self, tensor: str) -> NDArray[Any]:
        """A constant, as `constant_source` understands it."""
        if tensor in self._wiring.constants:
            values: NDArray[Any] = onnx.numpy_helper.to_array(self._wiring.constants[tensor])
            return values
        node = self._wiring.producers[tensor]
        values = self.value(node.input[0])
        if node.op_type == "Transpose":
            values = values.transpose(attribute(node, "perm", None))
        elif node.op_type == "Cast":
            values = values.astype(onnx.helper.tensor_dtype_to_np_dtype(attribute(node, "to", 0)))
        return values

    def _attempt(
        self, position: int, node: onnx.NodeProto, skip: int | None = None
    ) -> _Target | None:
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

    def _target(self, position: int, node: onnx.NodeProto, skip: int | None) -> _Target:
        if node.op_type not in self.options.op_types:
            raise _LeftError(f"{node.op_type} is not among the op types to quantise")
        if self.options.exclude and re.search(self.options.exclude, self.names[position]):
            raise _LeftError("excluded")
        if skip is None:
            operands = tuple(self._operand(node, index) for index in (0, 1))
            if all(operand.weight for operand in operands):
                raise _LeftError("both of its inputs are constants")
        else:
            operands = (_Operand(skip, node.input[skip]),)
        kinds = [self._types.get(name) for name in (*node.input[:2], *node.output)]
        kind = next((kind for kind in kinds if kind), "unknown")
        if kind not in _FLOATS:
            raise _LeftError(f"its tensors are {kind}, neither float32 nor float16")
        return _Target(position, operands, _FLOATS[kind])

    def _operand(self, node: onnx.NodeProto, index: int) -> _Operand:
        tensor = node.input[index]
        source = self._wiring.constant_source(tensor)
        if source is not None:
            if index == 0 and node.op_type != "MatMul":
                raise _LeftError("its first input is a constant")
            if source in self._inputs:
                raise _LeftError(f"its weight {source!r} is an input that a caller may replace")
            rank = len(self._wiring.constants[source].dims)
            axis = weight_axis(node, index, rank) if self.options.per_channel else None
            if node.op_type == "MatMul" and rank > 2 and axis is not None:
                # TensorRT takes it; ONNX Runtime 1.31 fails while it runs its fused MatMul.
                raise _LeftError(f"its weight {source!r} is a batch of matrices")
            return _Operand(index, tensor, weight=True, axis=axis)
        if tensor not in self._varying:
            raise _LeftError(f"{tensor!r} is computed from constants: fold them first")
        if index == 1 and node.op_type in ("Conv", "ConvTranspose"):
            raise _LeftError("its weight is no constant")
        return _Operand(index, tensor)

    def _skip(
        self, node: onnx.NodeProto, chosen: set[str], written: Mapping[str, int]
    ) -> int | None:
        """Which input of an Add is the skip of a residual connection; None if it is none."""
        first, second = node.input
        if first == second or not {first, second} <= self._varying:
            return None
        ends = [self._wiring.chain(name) for name in (first, second)]
        branches = [
            end is not None and end.output[0] in chosen and self._wiring.has_weight(end)
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
                if operand.weight and not np.isfinite(self.value(operand.tensor)).all():
                    name = self._wiring.constant_source(operand.tensor)
                    raise EngineBuildError(
                        f"initializer {name!r} has values that are NaN or infinite",
                        remedy="Train or export the model again",
                    )


@dataclass
class _Writer:
    """Writes a plan into a copy of its model."""

    plan: _Plan
    scales: Mapping[str, float]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    _done: dict[tuple[str, int | None], str] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    def write(self) -> bytes:
        """The quantised model's bytes."""
        model = onnx.ModelProto()
        model.CopyFrom(self.plan.model)
        graph = model.graph
        self._taken = _all_names(graph)
        targets = {target.position: target for target in self.plan.targets}
        weights = set()
        for position, node in enumerate(graph.node):
            target = targets.get(position)
            for operand in target.operands if target else ():
                if operand.weight:
                    weights.add(operand.tensor)
                    node.input[operand.place] = self._weight(operand)
                else:
                    node.input[operand.place] = self._pair(operand.tensor, target)
            self.nodes.append(node)
        nodes = list(self.nodes)
        del graph.node[:]
        graph.node.extend(nodes)
        graph.initializer.extend(self.constants)
        _drop_unread(graph, weights)
        strip_debug_info(model)
        data: bytes = model.SerializeToString(deterministic=True)
        return data

    def _pair(self, tensor: str, target: _Target | None) -> str:
        """Name of a tensor behind its pair, which is made for its first reader."""
        assert target is not None
        key = (tensor, None)
        if key not in self._done:
            scale = self._constant(_representable(self.scales[tensor], target.dtype), tensor)
            zero = self._zero_point(np.zeros((), np.int8))
            middle = self._node("QuantizeLinear", tensor, tensor, scale, zero)
            self._done[key] = self._node("DequantizeLinear", middle, tensor, scale, zero)
        return self._done[key]

    def _weight(self, operand: _Operand) -> str:
        """Name of a weight behind its DequantizeLinear."""
        key = (operand.tensor, -1 if operand.axis is None else operand.axis)
        if key not in self._done:
            values = self.plan.value(operand.tensor)
            scale, quantized = quantize_weight(values, operand.axis)
            name = operand.tensor
            source = self._unique(f"{name}_quantized")
            self.constants.append(onnx.numpy_helper.from_array(quantized, source))
            scale_name = self._constant(scale, name)
            zero = self._zero_point(np.zeros(scale.shape, np.int8))
            self._done[key] = self._node("DequantizeLinear", source, name, scale_name, zero)
            if operand.axis is not None:
                axis = onnx.helper.make_attribute("axis", operand.axis)
                self.nodes[-1].attribute.append(axis)
        return self._done[key]

    def _node(self, operator: str, source: str, tensor: str, scale: str, zero: str) -> str:
        kind = "quantized" if operator == "QuantizeLinear" else "dequantized"
        out = self._unique(f"{tensor}_{kind}")
        self.nodes.append(onnx.helper.make_node(operator, [source, scale, zero], [out], name=out))
        return out

    def _constant(self, values: NDArray[Any], tensor: str) -> str:
        name = self._unique(f"{tensor}_scale")
        self.constants.append(onnx.numpy_helper.from_array(values, name))
        return name

    def _zero_point(self, zeros: NDArray[np.int8]) -> str:
        """One initializer for all zero points of a shape."""
        key = ("", zeros.size if zeros.ndim else None)
        if key not in self._done:
            name = self._unique(f"zero_point_{zeros.size}" if zeros.ndim else "zero_point")
            self.constants.append(onnx.numpy_helper.from_array(zeros, name))
            self._done[key] = name
        return self._done[key]

    def _unique(self, name: str) -> str:
        number, free = 1, name
        while free in self._taken:
            number += 1
            free = f"{name}_{number}"
        self._taken.add(free)
        return free


def quantize_weight(
    values: NDArray[Any], axis: int | None
) -> tuple[NDArray[Any], NDArray[np.int8]]:
    """Quantise a weight.

    Args:
        values: Float weights, any shape, such as (8, 3, 3, 3).
        axis: Of the output channels, such as 0; None for one scale.

    Returns:
        The scale, of shape (8,) or (), in the weights' dtype, 1 where all weights are zero; and
        round-half-even(weights / scale) clipped to [-127, 127].
    """
    other = None if axis is None else tuple(i for i in range(values.ndim) if i != axis)
    largest = np.abs(values.astype(np.float64)).max(axis=other, initial=0.0)
    scale = _representable(np.where(largest > 0, largest / _LIMIT, 1.0), values.dtype.type)
    shape = [1] * values.ndim
    if axis is not None:
        shape[axis] = -1
    steps = values.astype(np.float32) / scale.astype(np.float32).reshape(shape)
    return scale, np.clip(np.rint(steps), -_LIMIT, _LIMIT).astype(np.int8)


def _representable(wanted: Any, dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """Scales as an array of a dtype, none of them 0 or so small that the largest value is cut off.

    Half precision may need its subnormal numbers; those of float32 are flushed to 0 on a GPU.
    """
    wanted = np.asarray(wanted, np.float64)
    info = np.finfo(dtype)
    smallest = info.smallest_subnormal if dtype is np.float16 else info.tiny
    scale = np.maximum(wanted.astype(dtype), smallest)
    cuts = wanted * _LIMIT > scale.astype(np.float64) * (_LIMIT + 0.5)
    return np.asarray(np.where(cuts, np.nextafter(scale, dtype(np.inf)), scale), dtype)


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


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of subgraphs too."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from all_nodes(inner)


def _names(graph: onnx.GraphProto) -> list[str]:
    """A name for each node: its own where that is one, else the tensor it writes."""
    counts = Counter(node.name for node in graph.node)
    return [
        node.name if node.name and counts[node.name] == 1 else next(filter(None, node.output), "")
        for node in graph.node
    ]


def varying_from(graph: onnx.GraphProto, inputs: set[str]) -> set[str]:
    """Tensors of a graph that depend on one of these, in whatever order its nodes stand."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in reads(node):
            readers.setdefault(name, []).append(node)
    found = set(inputs)
    queue = list(inputs)
    while queue:
        for node in readers.get(queue.pop(), ()):
            new = {name for name in node.output if name} - found
            found |= new
            queue += new
    return found


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


def _all_names(graph: onnx.GraphProto) -> set[str]:
    """Names of all tensors and nodes, in subgraphs too."""
    names = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    for node in all_nodes(graph):
        names.update((node.name, *node.input, *node.output))
        for inner in subgraphs(node):
            names.update(value.name for value in (*inner.input, *inner.output, *inner.initializer))
    return names


def _drop_unread(graph: onnx.GraphProto, tensors: set[str]) -> None:
    """Remove constants that nothing reads any more, and what they are made of."""
    readers = Counter(name for node in graph.node for name in reads(node))
    readers.update(value.name for value in graph.output)
    producers = {name: node for node in graph.node for name in node.output}
    gone: set[str] = set()
    queue = list(tensors)
    while queue:
        name = queue.pop()
        if readers[name] or name in gone:
            continue
        gone.add(name)
        sources = reads(producers[name]) if name in producers else set()
        readers.subtract(sources)
        queue += sources
    for items in (graph.initializer, graph.value_info):
        for i in reversed(range(len(items))):
            if items[i].name in gone:
                del items[i]
    for i in reversed(range(len(graph.node))):
        if not gone.isdisjoint(graph.node[i].output):
            del graph.node[i]
