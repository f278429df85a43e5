"""Where a graph can be cut, and what crosses."""

import numpy as np
import onnx
import pytest

from edge_runtime.errors import ConfigError
from engines.cut import Piece, cut
from tests.engines.classifiers import Net


def graph(*edges: str, constants: tuple[str, ...] = ()) -> onnx.ModelProto:
    """A graph of sums: "a b -> c" adds a and b; one name in front is taken as it is."""
    net = Net()
    for name in constants:
        net.constant(np.float32(1), name)
    last = ""
    for edge in edges:
        sources, last = edge.split(" -> ")
        net.add("Sum", *sources.split(), out=last)
    return net.model({last: ["N", 1]}, image=["N", 1])


LINE = graph("image -> a", "a -> b", "b -> c", "c -> d")


def test_segments_follow_each_other() -> None:
    assert cut(LINE, "image", ["a", "c"], ["d"], "m") == [
        Piece("image", "a", exit=False, head=False),
        Piece("a", "c", exit=False, head=False),
        Piece("c", "d", exit=True, head=False),
    ]


def test_without_cuts_it_is_one_piece() -> None:
    assert cut(LINE, "image", [], ["d"], "m") == [Piece("image", "d", exit=True, head=False)]


def test_heads_hang_on_the_last_cut_that_they_need() -> None:
    model = graph("image -> a", "a -> e1", "a -> b", "b -> e2", "b a -> e3", "b -> c", "c -> d")
    pieces = cut(model, "image", ["a", "b", "c"], ["e1", "e2", "d"], "m")
    assert [(p.source, p.target) for p in pieces if p.head] == [("a", "e1"), ("b", "e2")]
    assert [p.target for p in pieces] == ["a", "e1", "b", "e2", "c", "d"]
    with pytest.raises(ConfigError, match=r"'b' does not separate 'e3' .*: 'a' crosses it"):
        cut(model, "image", ["a", "b"], ["e3", "d"], "m")


@pytest.mark.parametrize(
    ("edges", "cuts", "crossing"),
    [
        (["image -> a", "a -> b", "b a -> c"], ["b"], "a"),
        (["image -> a", "a -> b", "b image -> c"], ["b"], "image"),
        (["image -> a", "image -> side", "a -> b", "b side -> c"], ["b"], "image"),
        (["image -> a", "a -> s", "s -> t", "a -> b", "b t -> c"], ["a", "b"], "a"),
        (["image -> a", "a -> b", "b -> c", "c a -> d", "d -> e"], ["b", "c"], "a"),
    ],
)
def test_what_crosses_a_cut_is_named(edges: list[str], cuts: list[str], crossing: str) -> None:
    model = graph(*edges)
    target = model.graph.output[0].name
    with pytest.raises(ConfigError, match=f"does not separate .*: '{crossing}' crosses it"):
        cut(model, "image", cuts, [target], "m")


def test_constants_cross_freely() -> None:
    """What no input reaches is copied to both sides: weights, and nodes on weights."""
    model = graph("one -> w", "image w -> a", "a -> b", "b w one -> c", constants=("one",))
    assert [p.target for p in cut(model, "image", ["b"], ["c"], "m")] == ["b", "c"]


def test_a_side_branch_before_a_cut_is_not_in_the_way() -> None:
    model = graph("image -> a", "image -> side", "side a -> b", "b -> c")
    assert [p.target for p in cut(model, "image", ["b"], ["c"], "m")] == ["b", "c"]


@pytest.mark.parametrize(
    ("cuts", "exits", "message"),
    [
        (["c", "a"], ["d"], "m: cut_at: 'a' does not depend on 'c'. List the tensors in order"),
        (["image"], ["d"], "m: cut_at: 'image' is the model's input or an exit"),
        (["d"], ["d"], "m: cut_at: 'd' is the model's input or an exit"),
        (["b"], ["a", "d"], "m: the exit 'a' depends on no tensor of cut_at"),
    ],
)
def test_refuses(cuts: list[str], exits: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        cut(LINE, "image", cuts, exits, "m")
    assert str(error.value).startswith(message)
