"""A model that is to become FP16, ready to be looked at, and what is refused right away."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import EngineBuildError
from edge_runtime.onnx_guard import refuse_external_data
from engines.onnx_graph import opset, strip_debug_info, subgraphs
from engines.onnx_package import DecodeError, onnx

#: Before it, Softmax flattens and the axes of reductions are attributes.
MIN_OPSET = 13
#: The first whose QuantizeLinear and DequantizeLinear take FP16 scales.
QUANTISED_OPSET = 19

#: What an operator that only moves values around computes: nothing.
MOVES = frozenset(
    {
        "Cast",
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Shape",
        "Size",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
#: Operators to which an infinite constant is a bound and no value.
_BOUNDS = frozenset({"Clip", "Max", "Min", "Pad", "Where"})

FLOAT, FLOAT16 = int(onnx.TensorProto.FLOAT), int(onnx.TensorProto.FLOAT16)
_HALF = (FLOAT16, int(onnx.TensorProto.BFLOAT16))


class Model:
    """A model ready to be looked at: nodes named, constants as initializers, types known."""

    def __init__(self, data: bytes) -> None:
        refuse_external_data(data, "the model")
        try:
            proto = onnx.load_model_from_string(data)
            onnx.checker.check_model(proto)
        except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
            raise EngineBuildError(f"no valid ONNX file: {first_line(error)}") from error
        version = opset(proto)
        if version < MIN_OPSET:
            raise EngineBuildError(
                "opset",
                got=version,
                expected=f"{MIN_OPSET} or later",
                remedy="Convert it with onnx.version_converter.convert_version",
            )
        proto = onnx.inliner.inline_local_functions(proto)
        strip_debug_info(proto)
        constants = {tensor.name for tensor in proto.graph.initializer}
        inputs = [value for value in proto.graph.input if value.name not in constants]
        del proto.graph.input[:]
        proto.graph.input.extend(inputs)
        _name_nodes(proto.graph)
        _constants_to_initializers(proto.graph)
        self.interface = interface(proto)
        self.opset = version
        self.proto = onnx.shape_inference.infer_shapes(proto)
        graph = self.proto.graph
        self.nodes = graph.node
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.types = tensor_types(graph)
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self.readers[name].append(node)

    def values(self, name: str) -> NDArray[Any] | None:
        """Values of a float constant; None for every other tensor."""
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_type != FLOAT:
            return None
        values: NDArray[Any] = onnx.numpy_helper.to_array(tensor)
        return values

    def is_float(self, name: str) -> bool:
        """Whether a tensor is FP32."""
        return self.types.get(name) == FLOAT

    def float_tensors(self) -> list[str]:
        """Inputs and computed tensors in FP32, in order."""
        names = [value.name for value in self.proto.graph.input]
        names += [name for node in self.nodes for name in node.output if name]
        return [name for name in names if self.is_float(name)]

    def check_convertible(self) -> None:
        """Refuse what can't be converted, or what nobody would want to be.

        Raises:
            EngineBuildError: With what to do.
        """
        for node in self.nodes:
            if subgraphs(node):
                raise EngineBuildError(
                    f"node {node.name!r} is a {node.op_type}: precision inside its branches can't "
                    "be converted",
                    remedy="Export the model without control flow; stages and exits replace it",
                )
            for name in node.output:
                if name and not self.types.get(name):
                    raise EngineBuildError(
                        f"node {node.name!r}: the type of what {node.domain or 'ai.onnx'}."
                        f"{node.op_type} computes is not known",
                        remedy="Use the model as it was before it was optimised for one runtime",
                    )
        halves = [n for n, kind in self.types.items() if kind in _HALF]
        if halves:
            raise EngineBuildError(
                f"the model has tensors in half precision already, such as {halves[0]!r}",
                remedy="Convert its FP32 original",
            )
        quantised = any(n.op_type in ("QuantizeLinear", "DequantizeLinear") for n in self.nodes)
        if quantised and self.opset < QUANTISED_OPSET:
            raise EngineBuildError(
                "the model is quantised, and its scales can't be FP16: opset",
                got=self.opset,
                expected=f"{QUANTISED_OPSET} or later",
                remedy="Convert its FP32 original with onnx.version_converter.convert_version and "
                "quantise it again",
            )
        work = [node for node in self.nodes if node.op_type not in MOVES]
        if not any(self.is_float(name) for node in work for name in node.input):
            raise EngineBuildError(
                "the model computes nothing in floating point: FP16 would add casts and save none",
                remedy="Leave it as it is",
            )
        for name in self.constants:
            self._check_finite(name)

    def _check_finite(self, name: str) -> None:
        values = self.values(name)
        if values is None or np.isfinite(values).all():
            return
        nan = bool(np.isnan(values).any())
        if nan or any(node.op_type not in _BOUNDS for node in self.readers[name]):
            raise EngineBuildError(
                f"initializer {name!r} has {'NaN' if nan else 'infinite values'}",
                remedy="The model is broken: train or export it again",
            )


def interface(model: onnx.ModelProto) -> list[bytes]:
    """Names, types and shapes of inputs and outputs, to be compared."""
    return [v.SerializeToString() for v in (*model.graph.input, *model.graph.output)]


def tensor_types(graph: onnx.GraphProto) -> dict[str, int]:
    """Tensor -> element type; 0 or absent where it is not known."""
    types = {
        value.name: int(value.type.tensor_type.elem_type)
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    return types | {tensor.name: int(tensor.data_type) for tensor in graph.initializer}


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Give a graph other nodes, which may be its own."""
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _name_nodes(graph: onnx.GraphProto) -> None:
    counts = Counter(node.name for node in graph.node)
    taken = set(counts)
    seen: set[str] = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            node.name = free_name(f"{node.name or node.op_type}_{index}", taken)
        seen.add(node.name)


def free_name(name: str, taken: set[str]) -> str:
    """A name that is not taken, and now is."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Make one of the ways to write a constant of the several: the converter misses some."""
    outputs = {value.name for value in graph.output}
    for node in list(graph.node):
        if node.op_type != "Constant" or node.domain or node.output[0] in outputs:
            continue
        (attribute,) = node.attribute
        if attribute.name == "value":
            values = onnx.numpy_helper.to_array(attribute.t)
        elif attribute.name in ("value_float", "value_floats"):
            values = np.array(onnx.helper.get_attribute_value(attribute), np.float32)
        elif attribute.name in ("value_int", "value_ints"):
            values = np.array(onnx.helper.get_attribute_value(attribute), np.int64)
        else:
            continue
        graph.initializer.append(onnx.numpy_helper.from_array(values, node.output[0]))
        graph.node.remove(node)


def first_line(error: BaseException) -> str:
    """An error's message in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
