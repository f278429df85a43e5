"""Leaves out of a graph what it computes for tokens that nothing reads.

Of the last block of a vision transformer the classifier reads the class token alone: queries, the
output of attention and the whole MLP are needed for that one, keys and values for all. What each
operation has to give is found from the end of the graph back to its start; an operation that gives
a few tokens is then run on a few, as far back as operations are known that treat tokens alone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import fx

#: Sizes of a tensor, each an int or an expression of the batch.
Shape = tuple[Any, ...]

_ATEN = torch.ops.aten
#: What works on each value alone and has no tag that says so.
_UNTAGGED = {
    _ATEN.alias.default,
    _ATEN.contiguous.default,
    _ATEN.detach.default,
    _ATEN.hardswish.default,
    _ATEN.log_sigmoid.default,
    _ATEN._to_copy.default,
    _ATEN.to.dtype,
}
#: Where each of these has the sizes of its output.
_SIZES = {
    _ATEN.expand.default: "size",
    _ATEN.reshape.default: "shape",
    _ATEN.view.default: "size",
    _ATEN._unsafe_view.default: "size",
}


@dataclass(frozen=True)
class Part:
    """A range of positions on one axis of a tensor, and all of the others.

    Attributes:
        axis: The axis, from 0.
        start: First position.
        stop: Position after the last.
    """

    axis: int
    start: int
    stop: int

    def on(self, axis: int) -> Part:
        """The same positions on another axis."""
        return Part(axis, self.start, self.stop)


#: Argument of an operation -> what is read of it; all of those that are not listed.
_Reading = dict[str, Part]


def compute_needed_only(graph: fx.Graph, shapes: Mapping[fx.Node, Shape]) -> None:
    """Rewrite a graph to compute a range of tokens where no more than that is read.

    Changed are operations of whose output at most half is read, as one range of an axis. Others
    read all of what they read before, and a graph without such operations is left as it is. A
    projection that gives queries, keys and values is divided where the queries are needed for a
    few tokens, by slices of its weights.

    Args:
        graph: Functional, of aten operations; parameters are read by `get_attr`.
        shapes: Node -> shape of its tensor; what is missing here is left as it is.
    """
    known = dict(shapes)
    found = _Needs(graph, known)
    divided = [node for node in list(graph.nodes) if _divide(node, found.parts, known)]
    if divided:
        found = _Needs(graph, known)
    found.rewrite()


class _Operation:
    """A call of an aten operation that gives one tensor.

    Attributes:
        target: The operation.
        arguments: Name -> argument.
        shape: Of its output.
    """

    def __init__(self, node: fx.Node, shapes: Mapping[fx.Node, Shape]) -> None:
        assert isinstance(node.target, torch._ops.OpOverload)
        self._node, self._shapes = node, shapes
        self.target = node.target
        self.shape = shapes[node]
        self._places = {a.name: i for i, a in enumerate(self.target._schema.arguments)}
        given = dict(zip(self._places, node.args, strict=False)) | node.kwargs
        defaults = {a.name: a.default_value for a in self.target._schema.arguments}
        self.arguments: dict[str, Any] = defaults | given

    @classmethod
    def of(cls, node: fx.Node, shapes: Mapping[fx.Node, Shape]) -> _Operation | None:
        """None for what is no such call."""
        known = isinstance(node.target, torch._ops.OpOverload) and node in shapes
        return cls(node, shapes) if known else None

    def is_tensor(self, name: str) -> bool:
        """Whether an argument is a tensor of known shape."""
        value = self.arguments[name]
        return isinstance(value, fx.Node) and value in self._shapes

    def shape_of(self, name: str) -> Shape:
        """Shape of an argument; () where it has none that is known."""
        value = self.arguments[name]
        return self._shapes.get(value, ()) if isinstance(value, fx.Node) else ()

    def axis(self, name: str, rank: int) -> int:
        """An argument that is an axis, counted from 0."""
        return int(self.arguments[name]) % rank

    def put(self, name: str, value: Any) -> None:
        """Replace an argument."""
        self.arguments[name] = value
        if self._places[name] < len(self._node.args):
            self._node.update_arg(self._places[name], value)
        else:
            self._node.update_kwarg(name, value)

    def reads(self, part: Part) -> _Reading | None:
        """What has to be read to give a part; None where not known."""
        if self.target in _RULES:
            return _RULES[self.target](self, part)
        tags = self.target.tags
        alone = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
        return _aligned(self, self.arguments, part) if alone or self.target in _UNTAGGED else None

    def crop(self) -> Part | None:
        """What a selection reads of its input."""
        if self.target not in (_ATEN.select.int, _ATEN.slice.Tensor) or not self.is_tensor("self"):
            return None
        before = self.shape_of("self")
        axis = self.axis("dim", len(before))
        size = before[axis]
        if self.target is _ATEN.select.int:
            at = self.arguments["index"]
            fixed = _is_int(size) and _is_int(at)
            return Part(axis, at % size, at % size + 1) if fixed else None
        ends = (self.arguments["start"] or 0, self.arguments["end"])
        stop = size if ends[1] is None else ends[1]
        if self.arguments["step"] != 1 or not all(map(_is_int, (size, ends[0], stop))):
            return None
        start, stop, _ = slice(ends[0], stop).indices(size)
        return Part(axis, start, stop) if start < stop else None

    def move(self, part: Part) -> None:
        """Have a selection take another part of its input, of the same size."""
        if self.target is _ATEN.select.int:
            self.put("index", part.start)
        else:
            self.put("start", part.start)
            self.put("end", part.stop)

    def resize(self, part: Part) -> None:
        """Give only a part, where the sizes of the output are an argument."""
        name = _SIZES.get(self.target)
        if name is not None:
            sizes = list(self.arguments[name])
            if sizes[part.axis] != -1:
                sizes[part.axis] = part.stop - part.start
            self.put(name, sizes)


class _Needs:
    """What is needed of each node.

    Attributes:
        parts: Node -> the part that is read; others are read in full.
    """

    def __init__(self, graph: fx.Graph, shapes: Mapping[fx.Node, Shape]) -> None:
        self._graph, self._shapes = graph, shapes
        self.parts: dict[fx.Node, Part] = {}
        self._readings: dict[fx.Node, _Reading] = {}
        wanted: dict[fx.Node, list[Part | None]] = {}
        for node in reversed(graph.nodes):
            part = _union(wanted.get(node, []), shapes.get(node, ()))
            if part is not None:
                self.parts[node] = part
            for source, read in self._reads(node):
                wanted.setdefault(source, []).append(read)

    def _reads(self, node: fx.Node) -> Iterable[tuple[fx.Node, Part | None]]:
        operation = _Operation.of(node, self._shapes)
        if operation is None:
            return [(source, None) for source in node.all_input_nodes]
        part = self.parts.get(node)
        reading = None if part is None else operation.reads(part)
        if reading is not None:
            self._readings[node] = reading
        else:
            crop = operation.crop()
            reading = {} if crop is None else {"self": crop}
        found: list[tuple[fx.Node, Part | None]] = []
        for name, value in operation.arguments.items():
            if isinstance(value, fx.Node):
                found.append((value, reading.get(name)))
            else:
                fx.map_arg(value, lambda inner: found.append((inner, None)))
        return found

    def rewrite(self) -> None:
        """Change every node of which a part is enough and can be computed alone."""
        slices: dict[tuple[fx.Node, Part], fx.Node] = {}
        for node in list(self._graph.nodes):
            operation = _Operation.of(node, self._shapes)
            if operation is None:
                continue
            crop = operation.crop()
            if node in self._readings:
                for name, part in self._readings[node].items():
                    operation.put(name, self._take(operation.arguments[name], part, slices))
                if crop is not None and crop.axis == self._readings[node]["self"].axis:
                    length = self.parts[node].stop - self.parts[node].start
                    operation.move(Part(crop.axis, 0, length))
                operation.resize(self.parts[node])
            elif crop is not None and operation.arguments["self"] in self._readings:
                first = self.parts[operation.arguments["self"]].start
                operation.move(Part(crop.axis, crop.start - first, crop.stop - first))

    def _take(
        self, source: fx.Node, part: Part, slices: dict[tuple[fx.Node, Part], fx.Node]
    ) -> fx.Node:
        """A node that gives the part of another, which may give a part itself by now."""
        first = 0
        if source in self._readings:
            if self.parts[source] == part:
                return source
            first = self.parts[source].start
        if (source, part) not in slices:
            with self._graph.inserting_after(source):
                slices[source, part] = self._graph.call_function(
                    _ATEN.slice.Tensor, (source, part.axis, part.start - first, part.stop - first)
                )
        return slices[source, part]


def _union(parts: Iterable[Part | None], shape: Shape) -> Part | None:
    """The range around all of them; None where more than half of the axis would be in it."""
    parts = list(parts)
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts) or len({part.axis for part in known}) > 1:
        return None
    axis = known[0].axis
    start, stop = min(part.start for part in known), max(part.stop for part in known)
    worthwhile = axis < len(shape) and _is_int(shape[axis]) and 2 * (stop - start) <= shape[axis]
    return Part(axis, start, stop) if worthwhile else None


def _is_int(size: Any) -> TypeGuard[int]:
    return isinstance(size, int)


def _aligned(operation: _Operation, names: Iterable[str], part: Part) -> _Reading | None:
    """Of inputs that are broadcast to the output."""
    reading = {}
    for name in names:
        if not isinstance(operation.arguments[name], fx.Node):
            continue
        if not operation.is_tensor(name):
            return None
        shape = operation.shape_of(name)
        axis = part.axis - len(operation.shape) + len(shape)
        if axis >= 0 and shape[axis] != 1:
            reading[name] = part.on(axis)
    return reading


def _dropout(operation: _Operation, part: Part) -> _Reading | None:
    return None if operation.arguments["train"] else {"input": part}


def _norm(operation: _Operation, part: Part) -> _Reading | None:
    kept = len(operation.shape) - len(operation.arguments["normalized_shape"])
    return {"input": part} if part.axis < kept else None


def _softmax(operation: _Operation, part: Part) -> _Reading | None:
    inside = operation.axis("dim", len(operation.shape)) == part.axis
    return None if inside else {"self": part}


def _linear(operation: _Operation, part: Part) -> _Reading | None:
    return {"input": part} if part.axis < len(operation.shape) - 1 else None


def _matmul(operation: _Operation, part: Part) -> _Reading | None:
    """Rows of the first matrix."""
    rank = len(operation.shape)
    rows = part.axis == rank - 2 and len(operation.shape_of("self")) == rank
    return {"self": part} if rows else None


def _attention(operation: _Operation, part: Part) -> _Reading | None:
    """Queries, and their rows of the mask."""
    rank = len(operation.shape)
    other = operation.arguments["dropout_p"] or operation.arguments["is_causal"]
    if other or part.axis != rank - 2 or len(operation.shape_of("query")) != rank:
        return None
    mask = _aligned(operation, ["attn_mask"], part)
    return None if mask is None else {"query": part, **mask}


def _transpose(operation: _Operation, part: Part) -> _Reading | None:
    axes = [operation.axis(name, len(operation.shape)) for name in ("dim0", "dim1")]
    return {"self": part.on(sum(axes) - part.axis) if part.axis in axes else part}


def _permute(operation: _Operation, part: Part) -> _Reading | None:
    return {"self": part.on(operation.arguments["dims"][part.axis] % len(operation.shape))}


def _reshape(operation: _Operation, part: Part) -> _Reading | None:
    """An axis that is there before and after."""
    after, before = operation.shape, operation.shape_of("self")
    for axis, size in enumerate(before):
        if size == after[part.axis] and math.prod(before[:axis]) == math.prod(after[: part.axis]):
            return {"self": part.on(axis)}
    return None


def _expand(operation: _Operation, part: Part) -> _Reading | None:
    return _aligned(operation, ["self"], part)


def _select(operation: _Operation, part: Part) -> _Reading | None:
    axis = operation.axis("dim", len(operation.shape) + 1)
    return {"self": part.on(part.axis + (part.axis >= axis))}


def _slice(operation: _Operation, part: Part) -> _Reading | None:
    if part.axis != operation.axis("dim", len(operation.shape)):
        return {"self": part}
    crop = operation.crop()
    if crop is None:
        return None
    return {"self": Part(part.axis, crop.start + part.start, crop.start + part.stop)}


_RULES: dict[Any, Callable[[_Operation, Part], _Reading | None]] = {
    _ATEN.dropout.default: _dropout,
    _ATEN.layer_norm.default: _norm,
    _ATEN.rms_norm.default: _norm,
    _ATEN.softmax.int: _softmax,
    _ATEN._softmax.default: _softmax,
    _ATEN.linear.default: _linear,
    _ATEN.matmul.default: _matmul,
    _ATEN.scaled_dot_product_attention.default: _attention,
    _ATEN.transpose.int: _transpose,
    _ATEN.permute.default: _permute,
    _ATEN.reshape.default: _reshape,
    _ATEN.view.default: _reshape,
    _ATEN._unsafe_view.default: _reshape,
    _ATEN.flatten.using_ints: _reshape,
    _ATEN.unsqueeze.default: _reshape,
    _ATEN.expand.default: _expand,
    _ATEN.select.int: _select,
    _ATEN.slice.Tensor: _slice,
}


def _divide(unbind: fx.Node, parts: Mapping[fx.Node, Part], shapes: dict[fx.Node, Shape]) -> bool:
    """Divide a projection that gives several tensors, where some are read in part.

    Args:
        unbind: Perhaps the last of linear, reshape, permute and unbind.
        parts: Node -> what is read of it.
        shapes: Node -> shape; those of new nodes are added.

    Returns:
        Whether it was divided.
    """
    items = list(unbind.users)
    few = {item for item in items if item in parts}
    if unbind.target is not _ATEN.unbind.int or not few or len(few) == len(items):
        return False
    fused = _Fused.of(unbind, shapes)
    if fused is None:
        return False
    taken = {int(item.args[1]): item for item in items}  # type: ignore[arg-type]
    if len(taken) < len(items):
        return False
    groups: list[list[int]] = []
    for index in sorted(taken):
        joins = groups and index == groups[-1][-1] + 1
        if joins and few.isdisjoint((taken[index], taken[groups[-1][-1]])):
            groups[-1].append(index)
        else:
            groups.append([index])
    for group in groups:
        fused.give([taken[index] for index in group], group[0], shapes)
    for node in (*items, unbind, fused.permute, fused.reshape, fused.linear):
        unbind.graph.erase_node(node)
    return True


@dataclass(frozen=True)
class _Fused:
    """A projection whose output is divided among tensors by reshape, permute and unbind.

    Attributes:
        linear, reshape, permute, unbind: Its nodes; none is read by others.
        axis: The axis of the reshaped output that counts the tensors.
    """

    linear: fx.Node
    reshape: fx.Node
    permute: fx.Node
    unbind: fx.Node
    axis: int

    @classmethod
    def of(cls, unbind: fx.Node, shapes: Mapping[fx.Node, Shape]) -> _Fused | None:
        """None where it is none."""
        nodes = [unbind]
        for target in (_ATEN.permute.default, _ATEN.reshape.default, _ATEN.linear.default):
            source: Any = nodes[-1].args[0]
            if source.target is not target or len(source.users) > 1 or source not in shapes:
                return None
            nodes.append(source)
        _, permute, reshape, linear = nodes
        rank = len(shapes[permute])
        across = unbind.args[1] if len(unbind.args) > 1 else 0
        axis = int(permute.args[1][across]) % rank  # type: ignore[index, arg-type]
        inside = math.prod(shapes[reshape][:axis]) == math.prod(shapes[linear][:-1])
        return cls(linear, reshape, permute, unbind, axis) if inside else None

    def give(self, items: list[fx.Node], first: int, shapes: dict[fx.Node, Shape]) -> None:
        """Compute some of the tensors alone.

        Args:
            items: Their nodes, which are replaced.
            first: Number of the first of them.
            shapes: Node -> shape; those of new nodes are added.
        """
        graph, count = self.unbind.graph, len(items)
        width = shapes[self.linear][-1] // shapes[self.reshape][self.axis]
        across = self.unbind.args[1] if len(self.unbind.args) > 1 else 0
        source, *weights = self.linear.args
        with graph.inserting_before(self.unbind):
            rows = [
                None
                if weight is None
                else graph.call_function(
                    _ATEN.slice.Tensor, (weight, 0, first * width, (first + count) * width)
                )
                for weight in weights
            ]
            linear = graph.call_function(self.linear.target, (source, *rows))  # type: ignore[arg-type]
            shapes[linear] = (*shapes[self.linear][:-1], count * width)
            sizes = list(self.reshape.args[1])  # type: ignore[arg-type]
            sizes[self.axis] = count
            reshape = graph.call_function(_ATEN.reshape.default, (linear, sizes))
            shape = list(shapes[self.reshape])
            shape[self.axis] = count
            shapes[reshape] = tuple(shape)
            permute = graph.call_function(_ATEN.permute.default, (reshape, self.permute.args[1]))
            shapes[permute] = tuple(shape[axis] for axis in self.permute.args[1])  # type: ignore
            if count == 1:
                made = [graph.call_function(_ATEN.select.int, (permute, across, 0))]
            else:
                several = graph.call_function(_ATEN.unbind.int, (permute, across))
                made = [graph.call_function(operator.getitem, (several, i)) for i in range(count)]
        for item, alone in zip(items, made, strict=True):
            shapes[alone] = shapes[item]
            item.replace_all_uses_with(alone)
