"""Writes QuantizeLinear and DequantizeLinear into a graph, once it is known where they go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.onnx_graph import reads, strip_debug_info, subgraphs
from engines.onnx_package import onnx
from engines.qdq_graph import Wiring, all_nodes

#: The largest number of symmetric INT8.
LIMIT = 127


class Operand(NamedTuple):
    """An input that is quantised: a weight, perhaps with an axis, or an activation."""

    place: int
    tensor: str
    weight: bool = False
    axis: int | None = None


class Target(NamedTuple):
    """A node that is quantised; `dtype` is that of its tensors."""

    position: int
    operands: tuple[Operand, ...]
    dtype: type[np.floating[Any]]


@dataclass
class Writer:
    """Writes Q/DQ into a copy of a model.

    Attributes:
        model: The float model.
        wiring: Of its graph.
        targets: What to quantise, in the order of its nodes.
        scales: Scale of each activation among the operands.
        nodes: Those of the copy.
        constants: Those that are new in it.
    """

    model: onnx.ModelProto
    wiring: Wiring
    targets: Sequence[Target]
    scales: Mapping[str, float]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    _done: dict[tuple[str, int | None], str] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    def write(self) -> bytes:
        """The quantised model's bytes."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        graph = model.graph
        self._taken = _all_names(graph)
        targets = {target.position: target for target in self.targets}
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

    def _pair(self, tensor: str, target: Target | None) -> str:
        """Name of a tensor behind its pair, which is made for its first reader."""
        assert target is not None
        key = (tensor, None)
        if key not in self._done:
            scale = self._constant(_representable(self.scales[tensor], target.dtype), tensor)
            zero = self._zero_point(np.zeros((), np.int8))
            middle = self._node("QuantizeLinear", tensor, tensor, scale, zero)
            self._done[key] = self._node("DequantizeLinear", middle, tensor, scale, zero)
        return self._done[key]

    def _weight(self, operand: Operand) -> str:
        """Name of a weight behind its DequantizeLinear."""
        key = (operand.tensor, -1 if operand.axis is None else operand.axis)
        if key not in self._done:
            values = self.wiring.value(operand.tensor)
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
    scale = _representable(np.where(largest > 0, largest / LIMIT, 1.0), values.dtype.type)
    shape = [1] * values.ndim
    if axis is not None:
        shape[axis] = -1
    steps = values.astype(np.float32) / scale.astype(np.float32).reshape(shape)
    return scale, np.clip(np.rint(steps), -LIMIT, LIMIT).astype(np.int8)


def _representable(wanted: Any, dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """Scales as an array of a dtype, none of them 0 or so small that the largest value is cut off.

    Half precision may need its subnormal numbers; those of float32 are flushed to 0 on a GPU.
    """
    wanted = np.asarray(wanted, np.float64)
    info = np.finfo(dtype)
    smallest = info.smallest_subnormal if dtype is np.float16 else info.tiny
    scale = np.maximum(wanted.astype(dtype), smallest)
    cuts = wanted * LIMIT > scale.astype(np.float64) * (LIMIT + 0.5)
    return np.asarray(np.where(cuts, np.nextafter(scale, dtype(np.inf)), scale), dtype)


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
