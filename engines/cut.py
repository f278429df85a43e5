"""Cuts an ONNX graph at named tensors into segments and heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_runtime.errors import ConfigError
from engines.onnx_graph import reads, subgraphs, varying
from engines.onnx_package import onnx


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a graph between two tensors.

    Attributes:
        source: The tensor it reads.
        target: The tensor it writes.
        exit: Whether the target is an exit.
        head: Whether it is a head beside the backbone.
    """

    source: str
    target: str
    exit: bool
    head: bool


def cut(
    model: onnx.ModelProto, source: str, cuts: Sequence[str], exits: Sequence[str], where: str
) -> list[Piece]:
    """Plan the pieces of a graph.

    Args:
        model: The graph.
        source: Name of its input.
        cuts: Tensors of it at which it is cut, in order of execution.
        exits: Tensors of it that are exits; the last one ends the backbone, the others become
            heads on the nearest cut before them.
        where: The model, for messages.

    Returns:
        Pieces in order of execution: each segment is followed by the heads that hang on its end.

    Raises:
        ConfigError: The cuts are out of order, or a cut does not separate the graph; the message
            names the tensor that crosses it.
    """
    if cuts:
        _check_cuts(model, source, cuts, exits, where)
    flow = _Flow(model, source)
    anchors = [source, *cuts]
    early, last = exits[:-1], exits[-1]
    hanging = {name: _anchor(flow, anchors[1:], name, where) for name in early}
    pieces = []
    for start, end in zip(anchors, (*cuts, last), strict=True):
        if start != source and start not in flow.before(end):
            raise ConfigError(
                f"{where}: cut_at: {end!r} does not depend on {start!r}",
                remedy="List the tensors in order of execution",
            )
        flow.check_separate(start, end, where)
        pieces.append(Piece(start, end, exit=end == last, head=False))
        pieces += [Piece(end, name, exit=True, head=True) for name in early if hanging[name] == end]
    return pieces


class _Flow:
    """Which tensor of a graph depends on which, without those that depend on constants alone."""

    def __init__(self, model: onnx.ModelProto, source: str) -> None:
        self._source = source
        moving = varying(model, source)
        self._inputs: dict[str, set[str]] = {
            name: reads(node) & moving
            for node in model.graph.node
            for name in node.output
            if name in moving
        }

    def before(self, tensor: str) -> set[str]:
        """The tensors that `tensor` depends on, itself not included."""
        found: set[str] = set()
        queue = [tensor]
        while queue:
            for name in self._inputs.get(queue.pop(), ()):
                if name not in found:
                    found.add(name)
                    queue.append(name)
        return found

    def crossing(self, start: str, end: str) -> str | None:
        """A tensor from before `start` that `end` needs beside `start`; None if there is none."""
        earlier = self.before(start)
        found = {end}
        queue = [end]
        while queue:
            for name in sorted(self._inputs.get(queue.pop(), ())):
                if name in earlier:
                    return name
                if name != start and name not in found:
                    found.add(name)
                    queue.append(name)
        return None

    def check_separate(self, start: str, end: str, where: str) -> None:
        """Refuse a cut at `start` that `end` reaches around."""
        crossing = self.crossing(start, end)
        if crossing is not None:
            raise ConfigError(
                f"{where}: the cut at {start!r} does not separate {end!r} from the graph before: "
                f"{crossing!r} crosses it",
                remedy="Cut where one tensor carries everything, for instance after a residual Add",
            )


def _check_cuts(
    model: onnx.ModelProto, source: str, cuts: Sequence[str], exits: Sequence[str], where: str
) -> None:
    for name in cuts:
        if name == source or name in exits:
            raise ConfigError(f"{where}: cut_at: {name!r} is the model's input or an exit")
    if any(subgraphs(node) for node in model.graph.node):
        raise ConfigError(
            f"{where}: a graph with If, Loop or Scan can't be cut",
            remedy="Remove cut_at, or export its stages one by one",
        )


def _anchor(flow: _Flow, cuts: Sequence[str], exit_name: str, where: str) -> str:
    """The cut that a head hangs on: the last one that its exit depends on."""
    needed = flow.before(exit_name)
    for name in reversed(cuts):
        if name in needed:
            flow.check_separate(name, exit_name, where)
            return name
    raise ConfigError(
        f"{where}: the exit {exit_name!r} depends on no tensor of cut_at",
        remedy="Name in cut_at the tensor at which it branches off",
    )
