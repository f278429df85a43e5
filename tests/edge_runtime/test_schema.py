"""Plain data to frozen dataclasses, strictly, and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError, EdgeRuntimeError
from edge_runtime.schema import nearest, plain, read
from tests.edge_runtime.bundles import refused


@dataclass(frozen=True)
class Leaf:
    rate: float
    kind: Literal["slow", "fast"] = "slow"
    label: str | None = None

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ConfigError("rate", got=self.rate, expected=">= 0")


@dataclass(frozen=True)
class Tree:
    name: str
    count: int = 1
    flag: bool = False
    size: tuple[int, int] = (1, 1)
    leaf: Leaf = Leaf(1.0)
    leaves: tuple[Leaf, ...] = ()
    named: Mapping[str, Leaf] = field(default_factory=dict)
    axis: int | str = "batch"
    either: int | tuple[str, ...] | Leaf = 1
    anything: Any = None


def test_reads_everything():
    data = {
        "name": "oak",
        "count": 2,
        "flag": True,
        "size": [3, 4],
        "leaf": {"rate": 1, "kind": "fast", "label": "x"},
        "leaves": [{"rate": 0.5}, {"rate": 2, "label": None}],
        "named": {"a": {"rate": 3}},
        "axis": 7,
        "either": {"rate": 1},
        "anything": {"deep": [1, None]},
    }
    tree = read(Tree, data, "tree.yaml")
    assert tree.leaf == Leaf(1.0, "fast", "x")
    assert isinstance(tree.leaf.rate, float)
    assert tree.leaves == (Leaf(0.5), Leaf(2.0))
    assert tree.named == {"a": Leaf(3.0)}
    assert (tree.axis, tree.either, tree.size) == (7, Leaf(1.0), (3, 4))
    assert read(Tree, plain(tree), "again") == tree


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "tree: got null, expected a mapping"),
        ([1], "tree: got list [1], expected a mapping"),
        ({}, "tree: the key 'name' is missing"),
        ({"name": "a", "cout": 1}, "tree: unknown key 'cout'. Did you mean 'count'? Valid: "),
        ({"name": "a", "zzz": 1}, "tree: unknown key 'zzz'. Valid: anything, axis, count"),
        ({"name": "a", 3: 1}, "tree: unknown key 3"),
        ({"name": 1}, "tree: name: got int 1, expected str"),
        ({"name": None}, "tree: name: got null, expected str"),
        ({"name": "a", "count": True}, "tree: count: got bool True, expected int"),
        ({"name": "a", "count": 1.0}, "tree: count: got float 1.0, expected int"),
        ({"name": "a", "count": "1"}, "tree: count: got str '1', expected int"),
        ({"name": "a", "flag": 1}, "tree: flag: got int 1, expected bool"),
        ({"name": "a", "size": [1]}, "tree: size: got 1 values, expected 2"),
        ({"name": "a", "size": "12"}, "tree: size: got str '12', expected a list"),
        ({"name": "a", "size": [1, "2"]}, "tree: size[1]: got str '2', expected int"),
        ({"name": "a", "leaf": {"rate": "1"}}, "tree: leaf: rate: got str '1', expected float"),
        ({"name": "a", "leaf": {"rate": True}}, "tree: leaf: rate: got bool True"),
        ({"name": "a", "leaf": {"rate": float("nan")}}, "leaf: rate: got nan, expected a finite"),
        ({"name": "a", "leaf": {"rate": float("inf")}}, "leaf: rate: got inf, expected a finite"),
        ({"name": "a", "leaf": {"rate": 10**400}}, "leaf: rate: got int 1000"),
        ({"name": "a", "leaf": {"rate": -1}}, "tree: leaf: rate: got -1.0, expected >= 0"),
        (
            {"name": "a", "leaf": {"rate": 1, "kind": "fats"}},
            "leaf: kind: got 'fats', expected 'slow' or 'fast'. Did you mean 'fast'?",
        ),
        ({"name": "a", "leaf": {"rate": 1, "kind": ["fast"]}}, "leaf: kind: got ['fast']"),
        (
            {"name": "a", "leaves": {"rate": 1}},
            "leaves: got a mapping {'rate': 1}, expected a list",
        ),
        ({"name": "a", "leaves": [{"rate": 1}, {}]}, "leaves[1]: the key 'rate' is missing"),
        ({"name": "a", "named": [1]}, "named: got list [1], expected a mapping"),
        ({"name": "a", "named": {1: {"rate": 1}}}, "named: a key: got int 1, expected str"),
        ({"name": "a", "named": {"b\nc": 1}}, "named: 'b\\nc': got int 1"),
        ({"name": "a", "axis": 1.5}, "axis: got float 1.5, expected int or str"),
        ({"name": "a", "axis": True}, "axis: got bool True, expected int or str"),
        ({"name": "a", "either": "b"}, "either: got str 'b', expected int or tuple"),
    ],
)
def test_refuses_what_does_not_fit(data, message):
    with refused(ConfigError, message):
        read(Tree, data, "tree")


def test_a_long_value_is_cut():
    with pytest.raises(ConfigError) as caught:
        read(Tree, {"name": list(range(1000))}, "tree")
    assert len(str(caught.value)) < 150


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["oak", "fast", "rate", 1, 2.0]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "leaf", "rate", "leaves", "named", "size", "\n"]), inner
        )
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(json_like)
def test_any_data_is_read_or_refused_on_one_line(data):
    try:
        tree = read(Tree, data, "tree")
    except EdgeRuntimeError as error:
        assert type(error) is ConfigError
        assert str(error).isprintable()
    else:
        assert read(Tree, plain(tree), "again") == tree


class Located(dict):
    origins = {"leaf": "tree.yaml:2", "lef": "tree.yaml:3"}  # noqa: RUF012


def test_errors_name_the_origin_of_a_value_where_it_is_known():
    with refused(ConfigError, "tree.yaml:2: leaf: rate: got str"):
        read(Tree, Located(name="a", leaf={"rate": "x"}), "tree.yaml")
    with refused(ConfigError, "tree.yaml:3: unknown key 'lef'. Did you mean 'leaf'?"):
        read(Tree, Located(name="a", lef=1), "tree.yaml")


def test_nearest_lists_a_few_of_many_names():
    names = [f"class{i:04}" for i in range(1000)]
    message = nearest("klass0500", names)
    assert message.startswith("Did you mean 'class0500'? Valid: class0000, class0001")
    assert message.endswith("and 980 more")
    assert nearest("x", []) == "Valid: none"
    assert nearest("ab", ["a\nb"]).isprintable()
