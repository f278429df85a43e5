"""Operations of models, against what is computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime import Bundle
from edge_runtime.errors import ConfigError, EngineBuildError
from engines.macs import macs, stage_macs
from tests.meta.repository import ROOT

FLOAT = TensorProto.FLOAT
Shape = Sequence[int | str | None]


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Shape],
    constants: dict[str, np.ndarray] | None = None,
    **more: Any,
) -> bytes:
    """A graph that hands out "y"; weights are zeros of the shapes that are given."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(v, name) for name, v in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("own", 1)]
    made: bytes = helper.make_model(graph, opset_imports=opsets, **more).SerializeToString()
    return made


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def one(operator: str, shapes: dict[str, tuple[int, ...]], **attributes: Any) -> int:
    """Operations of a single node whose inputs are all given; "" is one that is left out."""
    names = ["" if name.startswith("none") else name for name in shapes]
    node = helper.make_node(operator, names, ["y"], **attributes)
    given = {name: shape for name, shape in shapes.items() if name in names}
    return macs(model([node], given), given)


@pytest.mark.parametrize(
    ("operator", "shapes", "attributes", "expected"),
    [
        # 8 x 8 places after stride 2, 16 channels, each of 3 x 3 x 3.
        ("Conv", [(1, 3, 16, 16), (16, 3, 3, 3)], {"strides": [2, 2], "pads": [1] * 4}, 27648),
        # Depthwise: each channel sees itself only; without padding 14 x 14 places.
        ("Conv", [(2, 8, 16, 16), (8, 1, 3, 3)], {"group": 8}, 2 * 8 * 14 * 14 * 9),
        ("Conv", [(1, 4, 20), (6, 4, 5)], {"dilations": [2]}, 12 * 6 * 4 * 5),
        # Each of 4 x 5 x 5 numbers goes to 6 channels of 2 x 2.
        ("ConvTranspose", [(1, 4, 5, 5), (4, 6, 2, 2)], {"strides": [2, 2]}, 100 * 24),
        ("Gemm", [(2, 30), (30, 7)], {}, 2 * 30 * 7),
        ("Gemm", [(30, 2), (7, 30)], {"transA": 1, "transB": 1}, 2 * 30 * 7),
        ("MatMul", [(2, 3, 5, 7), (7, 11)], {}, 2 * 3 * 5 * 7 * 11),
        ("MatMul", [(7,), (7, 11)], {}, 7 * 11),
        ("Einsum", [(2, 3, 4), (2, 4, 5)], {"equation": "bij,bjk->bik"}, 2 * 3 * 4 * 5),
        # 2 heads of width 8 for queries and keys, 6 for values; 5 queries, 9 keys.
        ("Attention", [(1, 2, 5, 8), (1, 2, 9, 8), (1, 2, 9, 6)], {}, 2 * 5 * 9 * (8 + 6)),
        (
            "Attention",
            [(1, 5, 16), (1, 9, 16), (1, 9, 12)],
            {"q_num_heads": 2, "kv_num_heads": 2},
            2 * 5 * 9 * (8 + 6),
        ),
        # 10 steps of 3 sequences: four gates, from the input and from the state.
        ("LSTM", [(10, 3, 6), (1, 32, 6), (1, 32, 8)], {"hidden_size": 8}, 30 * (32 * 6 + 32 * 8)),
        ("MaxPool", [(1, 3, 16, 16)], {"kernel_shape": [2, 2]}, 0),
        ("Mul", [(1, 3, 16, 16), (1, 3, 16, 16)], {}, 0),
    ],
)
def test_an_operator_counts_what_it_multiplies(
    operator: str, shapes: Sequence[tuple[int, ...]], attributes: dict[str, Any], expected: int
) -> None:
    named = {f"x{i}": shape for i, shape in enumerate(shapes)}
    assert one(operator, named, **attributes) == expected


def test_earlier_keys_count() -> None:
    shapes = {
        "q": (1, 2, 5, 8),
        "k": (1, 2, 9, 8),
        "v": (1, 2, 9, 8),
        "none": (),
        "pk": (1, 2, 4, 8),
        "pv": (1, 2, 4, 8),
    }
    names = ["q", "k", "v", "", "pk", "pv"]
    node = helper.make_node("Attention", names, ["y", "keys", "values"])
    given = {name: shape for name, shape in shapes.items() if name in names}
    assert macs(model([node], given), given) == 2 * 5 * 13 * 16


def test_quantised_models_count_like_their_float_ones() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wf"]),
        helper.make_node("Conv", ["xf", "wf"], ["y"]),
    ]
    constants = {
        "w": np.zeros((16, 3, 3, 3), np.int8),
        "s": np.float32(1),
        "z": np.int8(0),
    }
    made = model(nodes, {"x": ["batch", 3, "height", "width"]}, constants)
    assert macs(made, {"x": (1, 3, 10, 12)}) == 8 * 10 * 16 * 27
    assert macs(made, {"x": (4, 3, 10, 12)}) == 4 * 8 * 10 * 16 * 27


def test_shapes_that_are_computed_are_followed() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["all"]),
        helper.make_node("Gather", ["all", "first"], ["batch"]),
        helper.make_node("Concat", ["batch", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["y"]),
    ]
    constants = {"first": np.array([0]), "rest": np.array([48]), "w": zeros(48, 5)}
    assert macs(model(nodes, {"x": ["n", 3, 4, 4]}, constants), {"x": (2, 3, 4, 4)}) == 2 * 48 * 5


def branch(name: str, width: int) -> onnx.GraphProto:
    return helper.make_graph(
        [
            helper.make_node("MatMul", ["x", f"{name}w"], [f"{name}h"]),
            helper.make_node("ReduceSum", [f"{name}h"], [f"{name}y"]),
        ],
        name,
        [],
        [helper.make_tensor_value_info(f"{name}y", FLOAT, None)],
        [numpy_helper.from_array(zeros(6, width), f"{name}w")],
    )


def test_the_dearer_branch_counts() -> None:
    node = helper.make_node(
        "If", ["c"], ["y"], then_branch=branch("a", 5), else_branch=branch("b", 9)
    )
    made = model([node], {"x": ["n", 6]}, {"c": np.array(True)})
    assert macs(made, {"x": (2, 6)}) == 2 * 6 * 9


def test_functions_are_looked_into() -> None:
    function = helper.make_function(
        "own",
        "Twice",
        ["a", "b"],
        ["c"],
        [
            helper.make_node("MatMul", ["a", "b"], ["h"]),
            helper.make_node("MatMul", ["h", "b"], ["c"]),
        ],
        [helper.make_opsetid("", 23)],
    )
    node = helper.make_node("Twice", ["x", "w"], ["y"], domain="own")
    made = model([node], {"x": ["n", 6]}, {"w": zeros(6, 6)}, functions=[function])
    assert macs(made, {"x": (3, 6)}) == 2 * 3 * 36


def test_a_function_that_calls_itself_is_refused() -> None:
    node = helper.make_node("Twice", ["x"], ["y"], domain="own")
    opsets = [helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "Twice", ["x"], ["y"], [node], opsets)
    with pytest.raises(EngineBuildError, match="can't infer the shapes"):
        macs(model([node], {"x": ["n", 6]}, functions=[function]), {"x": (3, 6)})


def loop() -> onnx.NodeProto:
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["next"]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, [1, 6]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, [1, 6]),
        ],
    )
    return helper.make_node("Loop", ["n", "c", "x"], ["y"], "again", body=body)


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        ([helper.make_node("Mystery", ["x"], ["y"], "odd", domain="own")], "Mystery 'odd': nobody"),
        ([loop()], "Loop 'again': nobody knows how often"),
        (
            [
                helper.make_node("NonZero", ["x"], ["places"]),
                helper.make_node("Cast", ["places"], ["floats"], to=FLOAT),
                helper.make_node("MatMul", ["w1", "floats"], ["y"], "late"),
            ],
            "MatMul 'late': the shape of 'y' is not known",
        ),
        (
            [helper.make_node("Einsum", ["x", "w"], ["y"], "dots", equation="...i,ij->...j")],
            "Einsum 'dots': its equation",
        ),
        ([helper.make_node("MatMul", ["x", "wrong"], ["y"])], "the shape of 'y' is not known"),
        ([helper.make_node("Einsum", ["x"], ["y"], equation="ijk->i")], "don't fit"),
    ],
)
def test_what_can_not_be_told_is_refused(nodes: Sequence[onnx.NodeProto], told: str) -> None:
    constants = {
        "w": zeros(6, 6),
        "w1": zeros(2, 2),
        "wrong": zeros(5, 6),
        "n": np.array(3),
        "c": np.array(True),
    }
    with pytest.raises(EngineBuildError, match=told):
        macs(model(nodes, {"x": [1, 6]}, constants), {"x": (1, 6)})


def test_inputs_that_do_not_fit_are_named() -> None:
    made = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 6]}, {"w": zeros(6, 2)}
    )
    for shapes, told in (
        ({}, "inputs: got none, expected x"),
        ({"x": (1, 6), "z": (1,)}, "inputs: got x, z, expected x"),
        ({"x": (1, 5)}, "shape of the input 'x'"),
        ({"x": (1, 6, 1)}, "shape of the input 'x'"),
        ({"x": (0, 6)}, "shape of the input 'x'"),
    ):
        with pytest.raises(ConfigError, match=told):
            macs(made, shapes)
    with pytest.raises(EngineBuildError, match="no ONNX model"):
        macs(b"\xff\xff", {})


def test_the_stages_of_a_bundle() -> None:
    found = stage_macs(Bundle.open(ROOT / "examples" / "digits" / "digits.bundle"), (8, 8))
    # Behind the preprocessing an image has 20 x 20 places; convolutions have 64 channels.
    block = 20 * 20 * 2 * 64 * 64 * 9
    assert found == {
        "preprocess": 0,
        "saver": 25 * 64 + 64 * 10,
        "segment1": 20 * 20 * 64 * 9 + 3 * block,
        "head1": 64 * 10,
        "segment2": 6 * block + 64 * 10,
    }


@pytest.mark.torch
@pytest.mark.parametrize("name", ["resnet50", "vit_tiny"])
def test_well_known_models_cost_what_is_published(name: str) -> None:
    """ResNet-50 has 4.09e9, ViT-Tiny 1.26e9."""
    import torch

    from bench import vit
    from bench.gpu.models import resnet_with_exits
    from engines.torch_exporter import to_onnx

    if name == "resnet50":
        modules = resnet_with_exits().modules
        chain = [*(modules[f"segment{k}"] for k in range(1, 5)), modules["head4"]]
        expected = 4_089_184_256
    else:
        chain = [stage.module for stage in vit.stages()[0] if stage.kind == "segment"]
        tokens, width = 197, 192
        block = tokens * 12 * width**2 + 2 * tokens**2 * width
        expected = 196 * 768 * width + 12 * block + width * 1000
        assert expected == pytest.approx(1.26e9, rel=0.01)
    net = torch.nn.Sequential(*chain).eval()
    pixels = torch.zeros(2, 3, 224, 224)
    made = to_onnx(name, net, [pixels], ["pixels"], ["logits"], 20)
    assert macs(made, {"pixels": (1, 3, 224, 224)}) == expected
