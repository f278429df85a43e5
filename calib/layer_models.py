"""Models of a stage in which single layers are INT8, taken apart from its INT8 variant.

An INT8 variant is the float model with QuantizeLinear and DequantizeLinear before the inputs of
some nodes: its layers. Whatever scales and rounded weights it has are taken over one layer at a
time, so no calibration data is needed, and it does not matter who made it, by which rules.

```
models = LayerModels(float_model, int8_model)
models.layers                             # (Layer("node_Conv_88", "Conv"), ...)
models.build(["node_Conv_88"])            # the float model, with this one layer in INT8
```

With all layers it computes what the INT8 variant computes; anything else is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NoReturn

from edge_runtime.errors import ConfigError
from engines.onnx_graph import opsets, strip_debug_info
from engines.onnx_package import DecodeError, onnx
from engines.qdq_graph import Wiring, varying_from
from engines.quantize import node_names

_PAIR = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True, slots=True)
class Layer:
    """A node that reads quantised values.

    Attributes:
        node: Its name, as `--exclude-nodes` of ``edge-runtime quantize`` sees it.
        operator: Its type; Add stands for the skip input of a residual one.
    """

    node: str
    operator: str


class LayerModels:
    """What a stage becomes when some of its layers are INT8.

    Args:
        base: The float variant, an ONNX file.
        int8: The INT8 variant, an ONNX file.

    Attributes:
        layers: All layers, in order of execution.

    Raises:
        ConfigError: From the constructor: the INT8 variant is not the float one with pairs of
            QuantizeLinear and DequantizeLinear before inputs of some nodes.
    """

    def __init__(self, base: bytes, int8: bytes) -> None:
        self._base, self._int8 = _parse(base, "fp32"), _parse(int8, "int8")
        if opsets(self._base) != opsets(self._int8):
            _refuse(f"it uses other operator sets: {opsets(self._int8)}, not {opsets(self._base)}")
        self._float, self._pairs = Wiring(self._base.graph), Wiring(self._int8.graph)
        self._check_constants()
        #: Position of a node -> the input -> the tensor behind the pair.
        self._reads = self._match()
        if not self._reads:
            _refuse("nothing in it is quantised")
        self._names = node_names(self._base.graph)
        nodes = self._base.graph.node
        self.layers = tuple(Layer(self._names[i], nodes[i].op_type) for i in self._reads)

    def build(self, nodes: Collection[str]) -> bytes:
        """The float model with some layers in INT8.

        Args:
            nodes: Names of these layers; others are ignored.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self._base)
        graph = model.graph
        written: list[onnx.NodeProto] = []
        pairs: dict[str, onnx.NodeProto] = {}
        for position, node in enumerate(graph.node):
            chosen = self._names[position] in nodes
            for place, tensor in self._reads.get(position, {}).items() if chosen else ():
                node.input[place] = tensor
                new = [pair for pair in self._pair(tensor) if pair.output[0] not in pairs]
                pairs.update((pair.output[0], pair) for pair in new)
                written += new
            written.append(node)
        wanted = {name for pair in pairs.values() for name in pair.input}
        for name in sorted(wanted & self._pairs.constants.keys() - self._float.constants.keys()):
            constant = graph.initializer.add()
            constant.CopyFrom(self._pairs.constants[name])
            constant.name = name
        del graph.node[:]
        graph.node.extend(written)
        data: bytes = model.SerializeToString(deterministic=True)
        return data

    def _check_constants(self) -> None:
        for name, tensor in self._pairs.constants.items():
            own = self._float.constants.get(name)
            if own is not None and not _equal(own, tensor):
                _refuse(f"its constant {name!r} is not that of fp32")

    def _match(self) -> dict[int, Mapping[int, str]]:
        """Find each float node in the INT8 variant, and which of its inputs are quantised."""
        twins = {_first(n): n for n in self._int8.graph.node if n.op_type not in _PAIR}
        graph = self._base.graph
        varying = varying_from(graph, {value.name for value in graph.input})
        found: dict[int, Mapping[int, str]] = {}
        for position, node in enumerate(graph.node):
            twin = twins.pop(_first(node), None)
            if twin is not None:
                reads = self._quantized_inputs(node, twin)
                if reads:
                    found[position] = reads
            elif _first(node) in varying:
                _refuse(f"no node of it computes {_first(node)!r}")
        for tensor, node in twins.items():
            if node.op_type != "Constant":
                _refuse(f"no node of fp32 computes {tensor!r}")
        return found

    def _quantized_inputs(self, node: onnx.NodeProto, twin: onnx.NodeProto) -> dict[int, str]:
        """Input of a float node -> what its twin reads instead."""
        name = _first(node)
        same = (
            (node.op_type, node.domain) == (twin.op_type, twin.domain)
            and len(node.input) == len(twin.input)
            and list(node.output) == list(twin.output)
            and _attributes(node) == _attributes(twin)
        )
        if not same:
            _refuse(f"what computes {name!r} is not the {node.op_type} of fp32")
        found = {}
        for place, (mine, other) in enumerate(zip(node.input, twin.input, strict=True)):
            if mine != other:
                self._check_source(name, mine, other)
                found[place] = other
        return found

    def _check_source(self, name: str, mine: str, other: str) -> None:
        """Check that one tensor is the other behind a pair, or the same weight, dequantised."""
        pair = self._pair(other)
        if not all(n in self._pairs.constants for node in pair for n in node.input[1:] if n):
            _refuse(f"a scale or zero point of {other!r} is no constant")
        source = pair[0].input[0] if pair else None
        weight = source in self._pairs.constants and self._float.constant_source(mine) is not None
        if source != mine and not weight:
            _refuse(f"what computes {name!r} reads {other!r}, which is not {mine!r} of fp32")

    def _pair(self, tensor: str) -> tuple[onnx.NodeProto, ...]:
        """The nodes between a float tensor, or an integer constant, and what a layer reads."""
        last = self._pairs.producers.get(tensor)
        if last is None or last.op_type != "DequantizeLinear":
            return ()
        first = self._pairs.producers.get(last.input[0])
        if first is not None and first.op_type == "QuantizeLinear":
            return (first, last)
        return (last,)


def _parse(data: bytes, variant: str) -> onnx.ModelProto:
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise ConfigError(f"its {variant} variant is no ONNX file") from error
    strip_debug_info(model)
    return model


def _refuse(why: str) -> NoReturn:
    raise ConfigError(
        f"its int8 variant can't be split into layers: {why}",
        remedy="Make it from the fp32 variant with: edge-runtime quantize",
    )


def _first(node: onnx.NodeProto) -> str:
    """Name of the first tensor that a node writes."""
    return next(filter(None, node.output), "")


def _attributes(node: onnx.NodeProto) -> list[bytes]:
    return sorted(item.SerializeToString(deterministic=True) for item in node.attribute)


def _equal(a: onnx.TensorProto, b: onnx.TensorProto) -> bool:
    left, right = (onnx.numpy_helper.to_array(tensor) for tensor in (a, b))
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and bool(left.tobytes() == right.tobytes())
    )
