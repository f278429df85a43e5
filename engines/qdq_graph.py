"""Questions to a graph that is quantised, or is to be: who writes, who reads, which are weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

from engines.onnx_graph import reads, subgraphs
from engines.onnx_package import onnx

#: Operators with weights, or with two activations, that can be quantised.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
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
#: The first whose QuantizeLinear and DequantizeLinear take FP16 scales.
FP16_SCALE_OPSET = 19

#: What a constant may go through and still be one.
_CONSTANT_CHAIN = ("Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Transpose")


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

    def value(self, tensor: str) -> NDArray[Any]:
        """A constant, as `constant_source` understands it."""
        if tensor in self.constants:
            values: NDArray[Any] = onnx.numpy_helper.to_array(self.constants[tensor])
            return values
        node = self.producers[tensor]
        values = self.value(node.input[0])
        if node.op_type == "Transpose":
            values = values.transpose(attribute(node, "perm", None))
        elif node.op_type == "Cast":
            values = values.astype(onnx.helper.tensor_dtype_to_np_dtype(attribute(node, "to", 0)))
        return values


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


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of subgraphs too."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from all_nodes(inner)


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
