"""Cuts the graph that torch.export makes of a model at tensors that carry everything.

The graph is functional, so that no operation writes into a tensor that another one reads, and of
its sizes only the batch is symbolic.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from edge_runtime.errors import EngineBuildError
from edge_runtime.tensors import BATCH
from engines.needed_tokens import Shape, compute_needed_only

_ATEN = torch.ops.aten
#: What a view of one layout of memory becomes, so that a segment takes tensors of any layout.
_ANY_LAYOUT: dict[Any, Any] = {_ATEN.view.default: _ATEN.reshape.default}
_ANY_LAYOUT[_ATEN._unsafe_view.default] = _ATEN.reshape.default


class CutGraph:
    """The graph of a module of one image tensor and several outputs.

    Args:
        module: In eval mode; called with a batch, it returns a tuple of tensors.
        samples: The batch to trace it with, at least two samples.

    Attributes:
        outputs: The node of each output.
        image: The node of the input.
    """

    def __init__(self, module: nn.Module, samples: Tensor) -> None:
        self._graph = _export(module, samples)
        self._nodes = list(self._graph.graph.nodes)
        self._position = {node: i for i, node in enumerate(self._nodes)}
        (self.image,) = (node for node in self._nodes if node.op == "placeholder")
        self._batch = self.image.meta["val"].shape[0].node.expr
        self.outputs: tuple[fx.Node, ...] = tuple(self._nodes[-1].args[0])
        self._separators = self._find_separators(self.outputs[-1])

    def position(self, node: fx.Node) -> int:
        """Place in the order of execution."""
        return self._position[node]

    def separates(self, node: fx.Node) -> bool:
        """Whether the last output depends on the image through this node alone."""
        return node in self._separators

    def is_batch(self, node: fx.Node) -> bool:
        """Whether it is a tensor whose first axis is the batch, and all others are fixed."""
        value = node.meta.get("val")
        return (
            isinstance(value, Tensor)
            and value.ndim > 0
            and self._times_batch(value.shape[0]) == (1, 0)
            and all(isinstance(axis, int) for axis in value.shape[1:])
        )

    def segment(self, start: fx.Node, end: fx.Node, *, needed_only: bool = False) -> fx.GraphModule:
        """What computes `end` from `start`.

        Args:
            start: The image or a separator.
            end: A later node.
            needed_only: Whether to leave out what is computed for tokens that nothing reads.

        Returns:
            A module in eval mode, tensor -> tensor, with the parameters and buffers themselves.
        """
        graph = fx.Graph()
        known = {start: graph.placeholder("x")}
        for node in self._needed(start, end):
            known[node] = self._copy(node, graph, known, known[start])
        graph.output(known[end])
        if needed_only:
            values = {copied: node.meta.get("val") for node, copied in known.items()}
            tensors = {node: v for node, v in values.items() if isinstance(v, Tensor)}
            compute_needed_only(graph, {node: _shape(v) for node, v in tensors.items()})
        segment = fx.GraphModule(self._graph, graph, "Segment")
        segment.eval()
        return segment

    def _needed(self, start: fx.Node, end: fx.Node) -> list[fx.Node]:
        needed = {end}
        for node in reversed(self._nodes[: self._position[end] + 1]):
            if node in needed and node is not start:
                needed.update(self._inputs(node))
        return [node for node in self._nodes if node in needed and node is not start]

    def _copy(
        self, node: fx.Node, graph: fx.Graph, known: dict[fx.Node, fx.Node], start: fx.Node
    ) -> fx.Node:
        size = self._size(node)
        if size is None:
            copied = graph.node_copy(node, known.__getitem__)
            copied.meta = {}
            copied.target = _ANY_LAYOUT.get(copied.target, copied.target)
            return copied
        factor, more = size
        copied = graph.call_function(_ATEN.sym_size.int, (start, 0))
        if factor != 1:
            copied = graph.call_function(operator.mul, (copied, factor))
        return graph.call_function(operator.add, (copied, more)) if more else copied

    def _size(self, node: fx.Node) -> tuple[int, int] | None:
        """Factor and summand of a size that the batch gives; None for all other nodes."""
        if node.target is not _ATEN.sym_size.int:
            return None
        return self._times_batch(node.meta.get("val"))

    def _times_batch(self, size: Any) -> tuple[int, int] | None:
        if not isinstance(size, torch.SymInt):
            return None
        expression = size.node.expr
        factor = expression.coeff(self._batch, 1)
        more = expression - factor * self._batch
        return (int(factor), int(more)) if factor.is_Integer and more.is_Integer else None

    def _inputs(self, node: fx.Node) -> Sequence[fx.Node]:
        """What a node reads; of the tensor that has the batch as its size it reads no value."""
        return () if self._size(node) is not None else node.all_input_nodes

    def _find_separators(self, final: fx.Node) -> set[fx.Node]:
        moving = {self.image}
        for node in self._nodes:
            if not moving.isdisjoint(self._inputs(node)):
                moving.add(node)
        last_read = {final: self._position[final]}
        for node in reversed(self._nodes):
            if node in last_read:
                for source in moving.intersection(self._inputs(node)):
                    last_read.setdefault(source, self._position[node])
        separators = set()
        farthest = 0
        for node in self._nodes:
            if node in last_read and node in moving:
                if farthest <= self._position[node]:
                    separators.add(node)
                farthest = max(farthest, last_read[node])
        return separators


def _shape(tensor: Tensor) -> Shape:
    """The batch as torch's symbol for it."""
    sizes: Sequence[Any] = tensor.shape
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)


def _export(module: nn.Module, samples: Tensor) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes: Any = ({0: torch.export.Dim(BATCH)},)
        program = torch.export.export(module, (samples,), dynamic_shapes=axes)
        if not all(map(_is_functional, program.graph.nodes)):
            program = program.run_decompositions({})
            _check_stateless(program)
        graph = program.module()
    assert isinstance(graph, fx.GraphModule)
    return graph


def _is_functional(node: fx.Node) -> bool:
    """Whether it writes into no input and holds no graph of its own."""
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    return not isinstance(node.target, torch._ops.HigherOrderOperator)


def _check_stateless(program: torch.export.ExportedProgram) -> None:
    written = sorted(program.graph_signature.buffers_to_mutate.values())
    if written:
        raise EngineBuildError(
            f"the model writes into its buffer {written[0].removeprefix('model.')!r} when it runs",
            expected="a model that keeps nothing from one image to the next, in eval mode",
        )
