"""Checks where INT8 stands in an ONNX graph, whoever put it there, against TensorRT's rules.

The rules are those by which `engines.quantize` writes. TensorRT's parser refuses a model for
"symmetric", "bias" and weights in uint8. For the others it builds an engine that is slower or less
exact than it could be, or wrong (activations in uint8 with a zero point of 0 are taken for int8),
and says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError
from engines.onnx_graph import opset, subgraphs
from engines.onnx_package import DecodeError, onnx
from engines.qdq_graph import (
    ACTIVATIONS,
    FP16_SCALE_OPSET,
    MOVING,
    QUANTIZED,
    WEIGHTED,
    Wiring,
    all_nodes,
    attribute,
    varying_from,
    weight_axis,
)

#: Rule -> what to do where it is violated.
RULES: dict[str, str] = {
    "qoperator": "Write Q/DQ instead (onnxruntime: quant_format=QDQ)",
    "signed": "Quantise to int8",
    "symmetric": "Quantise symmetrically, with a constant zero point of 0",
    "fp16-scale-opset": f"Export with opset {FP16_SCALE_OPSET} or later, or keep scales in float32",
    "pair": "Let a DequantizeLinear with the same scale follow each QuantizeLinear",
    "activations-per-tensor": "Give an activation one scale",
    "weights-per-channel": "Give each output channel of the weight a scale of its own",
    "inputs": "Quantise both the activation and the weight, or neither",
    "bias": "Leave the bias in floating point",
    "shared-pair": "Let all quantised readers of the tensor read one pair",
    "residual": "Put a pair on the skip input of the Add too",
    "concat": "Give the pairs around the Concat one scale, the largest",
    "float-ops": "Let it read the float tensor, beside the pair",
    "between-conv-and-relu": "Move the pair behind batch norm and activation",
    "output-only-for-consumer": "Remove the pair",
}

#: Operators that lose too much in int8.
FLOAT_OPS = frozenset(
    {
        "BiasGelu",
        "Erf",
        "FastGelu",
        "Gelu",
        "GroupNormalization",
        "LayerNormalization",
        "LogSoftmax",
        "QuickGelu",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "Softmax",
    }
)
#: Operators without weights that can run in int8 between a DequantizeLinear and a QuantizeLinear.
INT8_ABLE = ACTIVATIONS | {
    "Add",
    "AveragePool",
    "BatchNormalization",
    "Concat",
    "Div",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "Max",
    "MaxPool",
    "Min",
    "Mul",
    "Pad",
    "ReduceMax",
    "ReduceMean",
    "Resize",
    "Sub",
    "Sum",
}
_Q, _DQ = "QuantizeLinear", "DequantizeLinear"


@dataclass(frozen=True)
class Violation:
    """A rule that a node violates.

    Attributes:
        rule: Key of `RULES`.
        node: Name of the node, or of the first tensor it writes where it has none.
        why: What was found.
        remedy: What to do about it.
    """

    rule: str
    node: str
    why: str
    remedy: str


def lint(model: onnx.ModelProto | bytes) -> tuple[Violation, ...]:
    """Check a model.

    Args:
        model: Any ONNX model, or its bytes; one without Q/DQ violates nothing.

    Returns:
        Violations in the order of `RULES`, then of the nodes; empty if there are none.

    Raises:
        ConfigError: The bytes are no ONNX model.
    """
    if isinstance(model, bytes):
        model = _parsed(model, "the model")
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    foreign = [
        node
        for node in all_nodes(model.graph)
        if QUANTIZED.search(node.op_type) and node.op_type not in (_Q, _DQ)
    ]
    if foreign:
        more = f", and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        why = f"{foreign[0].op_type} computes with quantised tensors itself{more}"
        return (Violation("qoperator", _name(foreign[0]), why, RULES["qoperator"]),)
    found = [
        violation
        for graph, outer in _graphs(model.graph, {})
        for violation in _Graph(graph, outer, opset(model)).check()
    ]
    order = list(RULES)
    return tuple(sorted(dict.fromkeys(found), key=lambda violation: order.index(violation.rule)))


def quantized_nodes(model: onnx.ModelProto) -> int:
    """How many nodes of a model quantise, dequantise or compute with quantised tensors."""
    return sum(QUANTIZED.search(node.op_type) is not None for node in all_nodes(model.graph))


def read(path: Path) -> onnx.ModelProto:
    """Read an ONNX file, with its external data if it has any.

    Raises:
        ConfigError: It is missing or no ONNX model.
    """
    try:
        data = path.read_bytes()
        model = _parsed(data, str(path))
        onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} can't be read: {error}") from error
    return model


def _parsed(data: bytes, what: str) -> onnx.ModelProto:
    try:
        model = onnx.load_from_string(data)
    except DecodeError as error:
        raise ConfigError(f"{what} is no ONNX model") from error
    if not (model.ir_version and model.opset_import and model.HasField("graph")):
        raise ConfigError(f"{what} is no ONNX model", got="no graph, IR version or operator set")
    return model


def _graphs(
    graph: onnx.GraphProto, outer: Mapping[str, onnx.TensorProto]
) -> Iterator[tuple[onnx.GraphProto, Mapping[str, onnx.TensorProto]]]:
    """A graph and its subgraphs, each with the constants of the graphs around it."""
    yield graph, outer
    inside = {**outer, **Wiring(graph).constants}
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _graphs(inner, inside)


def _name(node: onnx.NodeProto) -> str:
    return node.name or next(filter(None, node.output), node.op_type)


class _Graph:
    """Checks one graph, without its subgraphs."""

    def __init__(
        self, graph: onnx.GraphProto, outer: Mapping[str, onnx.TensorProto], version: int
    ) -> None:
        self._graph = graph
        self._opset = version
        self._wiring = Wiring(graph)
        self._wiring.constants = {**outer, **self._wiring.constants}
        inputs = {value.name for value in graph.input}
        around = set(self._wiring.readers) - set(self._wiring.producers)
        self._varying = varying_from(graph, (inputs | around) - set(self._wiring.constants))
        self._useful: dict[str, bool] = {}

    def check(self) -> Iterator[Violation]:
        """All violations."""
        for node in self._graph.node:
            for check in _CHECKS.get(node.op_type, ()):
                for rule, where, why in check(self, node):
                    yield Violation(rule, _name(where), why, RULES[rule])

    def _numbers(self, node: onnx.NodeProto) -> Iterator[_Finding]:
        """Type, zero point and scale of a Q, or of a DQ that has no Q before it."""
        if node.op_type == _DQ and self._quantizer(node) is not None:
            return
        kind, zero = self._kind(node), self._value(node, 2)
        if kind == "int32":
            return  # a bias, which has a rule of its own
        if kind not in ("int8", ""):
            implied = "" if _input(node, 2) else ", which it is without a zero point"
            yield "signed", node, f"its values are {kind}, not int8{implied}"
        if _input(node, 2) and zero is None:
            yield "symmetric", node, "its zero point is no constant"
        elif zero is not None and np.any(zero != 0):
            yield "symmetric", node, f"its zero point is {_first(zero)}"
        scale = self._value(node, 1)
        if scale is not None and scale.dtype == np.float16 and self._opset < FP16_SCALE_OPSET:
            yield "fp16-scale-opset", node, f"its scale is FP16, the opset {self._opset}"
        if scale is not None and scale.size > 1 and node.output[0] in self._varying:
            yield "activations-per-tensor", node, f"it has {scale.size} scales"

    def _pairs(self, node: onnx.NodeProto) -> Iterator[_Finding]:
        """What follows a Q, and which other Q reads the same tensor."""
        followers = list(self._readers(node.output[0], MOVING - {"Cast"}))
        partners = [reader for reader, _ in followers if reader.op_type == _DQ]
        if len(partners) < len(followers) or not partners:
            yield "pair", node, "what it writes is read by something else than a DequantizeLinear"
        for partner in partners:
            if not (self._same(node, partner, 1) and self._same(node, partner, 2)):
                yield "pair", node, f"{_name(partner)!r} has another scale or zero point"
        tensor = node.input[0]
        if tensor not in self._varying:
            return
        rivals = [reader for reader in self._wiring.readers[tensor] if reader.op_type == _Q]
        if len(rivals) > 1 and rivals[0].output[0] == node.output[0]:
            yield "shared-pair", node, f"{len(rivals)} pairs read {tensor!r}"
        elif len(partners) > 1:
            yield "shared-pair", node, f"{len(partners)} DequantizeLinear follow it"

    def _places(self, node: onnx.NodeProto) -> Iterator[_Finding]:
        """Who reads a DQ of an activation."""
        tensor = node.output[0]
        if tensor not in self._varying:
            return
        readers = [reader for reader, _ in self._readers(tensor, MOVING)]
        delicate = [reader for reader in readers if reader.op_type in FLOAT_OPS]
        for reader in delicate:
            yield "float-ops", reader, f"it is a {reader.op_type} and reads quantised values"
        quantizer = self._quantizer(node)
        weighted = None if quantizer is None else self._weighted_before(quantizer.input[0])
        fused = [r for r in readers if r.op_type in ACTIVATIONS | {"BatchNormalization"}]
        if weighted is not None and fused:
            path = f"it stands between a {weighted.op_type} and its {fused[0].op_type}"
            yield "between-conv-and-relu", quantizer or node, path
        elif not delicate and not self._is_useful(tensor):
            yield "output-only-for-consumer", quantizer or node, "no quantised operator reads it"

    def _operands(self, node: onnx.NodeProto) -> Iterator[_Finding]:
        """Inputs of a Conv, ConvTranspose, Gemm or MatMul."""
        quantized = [self._is_quantized(name) for name in node.input[:2]]
        if any(quantized) and not all(quantized):
            missing = node.input[quantized.index(False)]
            yield "inputs", node, f"its input {missing!r} is not quantised, the other one is"
        for index, name in enumerate(node.input[:2]):
            source = self._dequantizer(name)
            if source is not None and name not in self._varying:
                why = self._channels(node, index, source)
                if why:
                    yield "weights-per-channel", node, why
        bias = _input(node, 2)
        if bias and self._dequantizer(bias) is not None:
            yield "bias", node, f"its bias {bias!r} is quantised"

    def _addends(self, node: onnx.NodeProto) -> Iterator[_Finding]:
        """Inputs of an Add: a residual one, or one that adds a bias."""
        first, second = node.input
        sources = [self._dequantizer(name) for name in (first, second)]
        if first != second and {first, second} <= self._varying:
            skipped = not any(self._is_quantized(name) for name in (first, second))
            if skipped and any(self._is_branch(name) for name in (first, second)):
                yield "residual", node, "the skip beside its quantised branch is in floating point"
            return
        for name, other, source in zip((first, second), (second, first), sources, strict=True):
            constant = source is not None and name not in self._varying
            if constant and self._weighted_before(other) is not None:
                yield "bias", node, f"the bias {name!r} that it adds is quantised"

    def _scales_around(self, node: onnx.NodeProto) -> Iterator[_Finding]:
        """Scales of the inputs and of the output of a Concat."""
        sources = [self._dequantizer(name) for name in node.input if name in self._varying]
        behind = self._quantizers(node.output[0])
        beside = [q for name in node.input if behind for q in self._quantizers(name)]
        values = (self._value(n, 1) for n in (*filter(None, sources), *behind, *beside))
        scales = {float(value) for value in values if value is not None and value.size == 1}
        if len(scales) > 1:
            listed = ", ".join(f"{scale:.4g}" for scale in sorted(scales))
            yield "concat", node, f"the scales of its inputs and output differ: {listed}"

    def _channels(self, node: onnx.NodeProto, index: int, source: onnx.NodeProto) -> str | None:
        """What is wrong with the scales of a weight."""
        scale = self._value(source, 1)
        origin = self._wiring.constant_source(node.input[index])
        if scale is None or origin is None:
            return None
        shape = list(self._wiring.constants[origin].dims)
        axis = weight_axis(node, index, len(shape))
        if axis is None or (len(shape) > 2 and node.op_type == "MatMul"):
            return None
        # The axis as it is where the scales apply: before what transposes the weight.
        name = node.input[index]
        while name != source.output[0]:
            mover = self._wiring.producers[name]
            if mover.op_type == "Transpose":
                axis = list(attribute(mover, "perm", range(len(shape))[::-1]))[axis]
            name = mover.input[0]
        shape = self._shape_at(source.input[0], shape)
        if scale.size == 1:
            channels = shape[axis]
            return f"its weight has one scale for {channels} channels" if channels > 1 else None
        stored = attribute(source, "axis", 1) % len(shape)
        if scale.ndim > 1:
            return "the scales of its weight are of blocks"
        if stored != axis:
            return f"the scales of its weight are along axis {stored}, not {axis}"
        return None

    def _shape_at(self, tensor: str, shape: list[int]) -> list[int]:
        """Shape of a constant that is `shape` at its origin, behind Transposes."""
        path = []
        while tensor not in self._wiring.constants:
            node = self._wiring.producers[tensor]
            path.append(node)
            tensor = node.input[0]
        for node in reversed(path):
            if node.op_type == "Transpose":
                shape = [shape[i] for i in attribute(node, "perm", range(len(shape))[::-1])]
        return shape

    def _is_branch(self, tensor: str) -> bool:
        """Whether a tensor comes from a quantised node with a weight, and only goes to its Add."""
        end = self._wiring.chain(tensor)
        return (
            end is not None
            and self._wiring.has_weight(end)
            and all(self._is_quantized(name) for name in end.input[:2])
        )

    def _is_quantized(self, tensor: str) -> bool:
        """Whether a tensor comes from DQs, through what computes no new values."""
        node = self._wiring.producers.get(tensor)
        while node is not None and node.op_type in MOVING | {"MaxPool"}:
            node = self._wiring.producers.get(node.input[0])
        if node is not None and node.op_type == "Concat":
            return all(self._is_quantized(name) for name in node.input)
        return node is not None and node.op_type == _DQ

    def _weighted_before(self, tensor: str) -> onnx.NodeProto | None:
        """The node with weights that a tensor comes from, through batch norm and bias only."""
        node = self._wiring.producers.get(tensor)
        while node is not None and node.op_type not in WEIGHTED:
            if node.op_type in ("Add", "Mul"):
                varying = [name for name in node.input if name in self._varying]
                if len(varying) != 1:
                    return None
                node = self._wiring.producers.get(varying[0])
            elif node.op_type in ("BatchNormalization", "Cast", "Identity"):
                node = self._wiring.producers.get(node.input[0])
            else:
                return None
        return node

    def _is_useful(self, tensor: str) -> bool:
        """Whether an operator in int8 reads a tensor, through others that can run in int8."""
        if tensor not in self._useful:
            self._useful[tensor] = any(
                self._is_quantized_reader(reader, tensor)
                for reader in self._wiring.readers.get(tensor, ())
            )
        return self._useful[tensor]

    def _is_quantized_reader(self, reader: onnx.NodeProto, tensor: str) -> bool:
        if reader.op_type in WEIGHTED:
            return tensor in reader.input[:2]
        if reader.op_type == "Add" and all(
            self._is_branch(name) or self._is_quantized(name) for name in reader.input
        ):
            return True
        if reader.op_type in INT8_ABLE and any(map(self._quantizers, reader.output)):
            return True
        if reader.op_type in INT8_ABLE | MOVING:
            return any(self._is_useful(name) for name in reader.output)
        return False

    def _readers(
        self, tensor: str, through: frozenset[str]
    ) -> Iterator[tuple[onnx.NodeProto, str]]:
        """Nodes that read a tensor, looking through some operators, and the tensor they read."""
        for node in self._wiring.readers.get(tensor, ()):
            if node.op_type in through:
                for name in node.output:
                    yield from self._readers(name, through)
            else:
                yield node, tensor

    def _quantizers(self, tensor: str) -> list[onnx.NodeProto]:
        """The Qs that read a tensor."""
        return [node for node in self._wiring.readers.get(tensor, ()) if node.op_type == _Q]

    def _quantizer(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The Q before a DQ."""
        return self._before(node.input[0], _Q, MOVING - {"Cast"})

    def _dequantizer(self, tensor: str) -> onnx.NodeProto | None:
        """The DQ that a tensor comes from, through what only moves values."""
        return self._before(tensor, _DQ, MOVING)

    def _before(self, tensor: str, operator: str, through: frozenset[str]) -> onnx.NodeProto | None:
        node = self._wiring.producers.get(tensor)
        while node is not None and node.op_type in through:
            node = self._wiring.producers.get(node.input[0])
        return node if node is not None and node.op_type == operator else None

    def _kind(self, node: onnx.NodeProto) -> str:
        """Dtype of the quantised values of a Q or DQ; "" if unknown."""
        origin = self._wiring.constant_source(_input(node, 2)) if _input(node, 2) else None
        if origin is None and node.op_type == _DQ:
            origin = self._wiring.constant_source(node.input[0])
        if origin is not None:
            return _dtype(self._wiring.constants[origin].data_type)
        if node.op_type == _DQ or _input(node, 2):
            return ""
        return _dtype(attribute(node, "output_dtype", 0) or onnx.TensorProto.UINT8)

    def _same(self, one: onnx.NodeProto, other: onnx.NodeProto, index: int) -> bool:
        """Whether two nodes have the same scale (1) or zero point (2)."""
        if _input(one, index) == _input(other, index):
            return True
        values = [self._value(node, index) for node in (one, other)]
        if index == 2:
            values = [np.zeros(()) if v is None else v for v in values]
        first, second = values
        return first is not None and second is not None and bool(np.all(first == second))

    def _value(self, node: onnx.NodeProto, index: int) -> NDArray[Any] | None:
        """A constant scale (1) or zero point (2) of a node; None if it has none."""
        origin = self._wiring.constant_source(_input(node, index))
        if origin is None:
            return None
        tensor = self._wiring.constants[origin]
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        values: NDArray[Any] = onnx.numpy_helper.to_array(tensor)
        return values


#: Rule, the node at fault, and why.
_Finding = tuple[str, onnx.NodeProto, str]
_Check = Callable[[_Graph, onnx.NodeProto], Iterator[_Finding]]

_CHECKS: dict[str, tuple[_Check, ...]] = {
    _Q: (_Graph._numbers, _Graph._pairs),
    _DQ: (_Graph._numbers, _Graph._places),
    "Add": (_Graph._addends,),
    "Concat": (_Graph._scales_around,),
    **dict.fromkeys(WEIGHTED, (_Graph._operands,)),
}


def _input(node: onnx.NodeProto, index: int) -> str:
    """Name of an input; "" if the node leaves it out."""
    return node.input[index] if index < len(node.input) else ""


def _dtype(kind: int) -> str:
    name: str = onnx.TensorProto.DataType.Name(kind).lower()
    return name


def _first(values: NDArray[Any]) -> str:
    """The value that is not 0, and whether there are several."""
    others = values[values != 0].ravel()
    return f"{others[0]}" if others.size == 1 else f"{others[0]} and others"
