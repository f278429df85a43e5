"""FP16 typed in the graph: what is converted, what stays, and that the numbers agree."""

import math
from collections import Counter
from collections.abc import Callable
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edge_runtime.backends.onnxrt import new_session
from edge_runtime.errors import ConfigError, EngineBuildError, ManifestError
from edge_runtime.manifest import Bundle
from engines import fp16_keep, fp16_ranges
from engines.fp16 import convert
from engines.fp16_emulation import emulated
from engines.fp16_ranges import find_overflows, nodes_to_keep
from engines.preprocess import PreprocessSpec, camera_image, preprocess_model
from tests.engines.classifiers import SIZE, classifier, residual_classifier
from tests.tensorrt_without_gpu import parse_and_build

Feeds = dict[str, np.ndarray]


def run(model: bytes, feeds: Feeds) -> dict[str, np.ndarray]:
    session = new_session(model)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def error(converted: bytes, model: bytes, feeds: Feeds) -> float:
    """Largest relative error of the outputs, rounded as FP16 kernels would."""
    have, want = run(emulated(converted), feeds), run(model, feeds)
    assert have.keys() == want.keys()
    worst = 0.0
    for name, values in want.items():
        assert have[name].dtype == values.dtype and have[name].shape == values.shape
        difference = np.abs(have[name].astype(np.float64) - values).max()
        worst = float(np.maximum(worst, difference / np.abs(values).max()))
    return worst


def parse(model: bytes) -> onnx.ModelProto:
    return onnx.load_model_from_string(model)


def operators(model: bytes) -> Counter:
    return Counter(node.op_type for node in parse(model).graph.node)


def names_of(model: bytes, *kinds: str) -> list[str]:
    return [node.name for node in parse(model).graph.node if node.op_type in kinds]


def kinds_kept(model: bytes, kept: dict[str, str]) -> dict[str, str]:
    """Operator -> reason."""
    return {n.op_type: kept[n.name] for n in parse(model).graph.node if n.name in kept}


def net(
    nodes: list[onnx.NodeProto],
    *,
    x: list = ("N", 8),
    y: list = ("N", 8),
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 18,
    outputs: tuple[str, ...] = ("y",),
    domains: dict[str, int] | None = None,
) -> bytes:
    """A model that reads x and writes y, both FP32."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(y)) for name in outputs],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", opset)]
    imports += [helper.make_opsetid(*item) for item in (domains or {}).items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=9).SerializeToString()


def node(operator: str, inputs: str, output: str, **attributes) -> onnx.NodeProto:
    """A node named as what it writes."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(operator, names, output.split(), name=output, **attributes)


def f32(*values: float) -> np.ndarray:
    return np.array(values[0] if len(values) == 1 else values, np.float32)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


DENSE = {"w": normal(8, 8) / 3}


# What is converted ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [classifier(), residual_classifier(exits=True)])
def test_convolutions_are_half_as_large_and_agree(model: onnx.ModelProto) -> None:
    data = model.SerializeToString()
    converted = convert(data)
    assert converted.kept == {}
    # One at the input and one at each output.
    assert converted.casts == 1 + len(model.graph.output)
    assert error(converted.model, data, {"image": normal(5, 3, SIZE, SIZE)}) < 2e-3
    new = parse(converted.model)
    for before, after in zip(model.graph.initializer, new.graph.initializer, strict=True):
        assert before.name == after.name
        assert after.data_type == (10 if before.data_type == 1 else before.data_type)


def test_inputs_and_outputs_are_the_original_s() -> None:
    model = residual_classifier(exits=True)
    new = parse(convert(model.SerializeToString()).model)
    for after, before in (
        (new.graph.input, model.graph.input),
        (new.graph.output, model.graph.output),
    ):
        assert [(v.name, v.type) for v in after] == [(v.name, v.type) for v in before]
    assert new.opset_import == model.opset_import and new.ir_version == model.ir_version


def test_the_same_model_gives_the_same_bytes() -> None:
    data = residual_classifier(exits=True).SerializeToString()
    assert convert(data).model == convert(data).model


def test_nodes_get_names_and_lose_doc_strings() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], doc_string="/home/me/train.py"),
        helper.make_node("Abs", ["a"], ["b"], name="twin"),
        helper.make_node("Relu", ["b"], ["y"], name="twin"),
    ]
    model = convert(net(nodes)).model
    names = [one.name for one in parse(model).graph.node if one.op_type != "Cast"]
    assert names == ["Relu_0", "twin", "twin_2"]
    assert b"train.py" not in model


@pytest.mark.parametrize(
    "constant",
    [
        {"value": numpy_helper.from_array(f32(0.3), "v")},
        {"value_float": 0.3},
        {"value_floats": [0.3] * 8},
    ],
    ids=["tensor", "float", "floats"],
)
def test_constants_are_converted_in_whatever_way_they_are_written(constant: dict) -> None:
    data = net([node("Constant", "", "c", **constant), node("Mul", "x c", "y")])
    converted = convert(data)
    assert converted.casts == 2 and converted.kept == {}
    assert error(converted.model, data, {"x": normal(4, 8)}) < 1e-3


def test_integers_of_a_constant_stay() -> None:
    nodes = [
        node("Constant", "", "shape", value_ints=[-1, 4, 2]),
        node("Reshape", "x shape", "r"),
        node("Relu", "r", "y"),
    ]
    data = net(nodes, y=["N", 4, 2])
    assert error(convert(data).model, data, {"x": normal(3, 8)}) < 1e-3


def test_a_model_of_one_sample_and_an_output_that_is_read_inside() -> None:
    nodes = [node("MatMul", "x w", "first"), node("Relu", "first", "y")]
    data = net(nodes, constants=DENSE, x=[1, 8], y=[1, 8], outputs=("first", "y"))
    converted = convert(data)
    assert converted.casts == 3
    assert error(converted.model, data, {"x": normal(1, 8)}) < 1e-3


def test_resize_keeps_its_scales() -> None:
    nodes = [node("Resize", "x none scales", "r", mode="linear"), node("Relu", "r", "y")]
    # One empty constant for both, as exporters write it.
    constants = {"none": np.zeros(0, np.float32), "scales": f32(1, 1, 2, 2)}
    data = net(nodes, x=["N", 3, 4, 4], y=["N", 3, 8, 8], constants=constants)
    converted = convert(data)
    assert converted.kept == {} and converted.casts == 2
    kinds = {t.name: t.data_type for t in parse(converted.model).graph.initializer}
    assert kinds["scales"] == TensorProto.FLOAT
    assert error(converted.model, data, {"x": normal(2, 3, 4, 4)}) < 1e-3


def test_a_quantised_model_gets_fp16_around_its_int8() -> None:
    data = quantised(19)
    converted = convert(data)
    assert converted.kept == {} and converted.casts == 2
    kinds = {t.name: t.data_type for t in parse(converted.model).graph.initializer}
    assert kinds["scale"] == TensorProto.FLOAT16 and kinds["w"] == TensorProto.INT8
    assert error(converted.model, data, {"x": normal(4, 8)}) < 0.02


def quantised(opset: int) -> bytes:
    nodes = [
        node("QuantizeLinear", "x scale zero", "q"),
        node("DequantizeLinear", "q scale zero", "d"),
        node("DequantizeLinear", "w scales", "dw", axis=1),
        node("MatMul", "d dw", "m"),
        node("Relu", "m", "y"),
    ]
    weights = np.random.default_rng(0).integers(-127, 128, (8, 8), dtype=np.int8)
    constants = {
        "scale": f32(0.03),
        "zero": np.int8(0),
        "w": weights,
        "scales": np.full(8, 0.004, np.float32),
    }
    return net(nodes, constants=constants, opset=opset)


# What stays -------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("opset", [18, 20])
def test_an_exported_transformer(opset: int, transformers: Callable[[int], Bundle]) -> None:
    """LayerNorm stays; attention, softmax and GELU (one node at opset 20, five at 18) don't."""
    bundle = transformers(opset)
    samples = {f"{name}0": normal(3, length, 12) for name, length in (("token", 1), ("tokens", 16))}
    data = bundle.stage_model("block1", "fp32")
    converted = convert(data)
    assert kinds_kept(converted.model, converted.kept) == {"LayerNormalization": fp16_keep.NORM}
    # Two inputs, two outputs, and one on each side of a norm.
    assert converted.casts == 2 + 2 + 2 * 2
    assert operators(converted.model)["Gelu"] == (opset >= 20)
    assert error(converted.model, data, samples) < 2e-3


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Bundle]:
    from engines.export import export_stages
    from tests.engines import torch_models

    made: dict[int, Bundle] = {}

    def transformer(opset: int) -> Bundle:
        if opset not in made:
            stages, exits = torch_models.transformer()
            made[opset] = export_stages(
                stages,
                exits,
                example=normal(2, 3, 16, 16),
                classes=torch_models.CLASSES,
                out=tmp_path_factory.mktemp("transformer") / "a.bundle",
                name="transformer",
                opset=opset,
                one_piece_check=False,
            )
        return made[opset]

    return transformer


def layer_norm(form: str) -> list[onnx.NodeProto]:
    """The path from x to y, a norm in single steps as older exporters write it."""
    steps = [
        node("ReduceMean", "x axis", "mean"),
        node("Sub", "x mean", "centred"),
        node("Mul", "centred centred", "square")
        if form == "reciprocal"
        else node("Pow", "centred two", "square"),
        node("ReduceMean", "square axis", "variance"),
        node("Add", "variance epsilon", "sum"),
    ]
    if form == "power":
        steps += [
            node("Pow", "sum minus_half", "root"),
            node("Mul", "centred root", "normal"),
        ]
    elif form == "reciprocal":
        steps += [
            node("Sqrt", "sum", "root"),
            node("Reciprocal", "root", "inverse"),
            node("Mul", "centred inverse", "normal"),
        ]
    else:
        steps += [node("Sqrt", "sum", "root"), node("Div", "centred root", "normal")]
    return [*steps, node("Mul", "normal gamma", "scaled"), node("Relu", "scaled", "y")]


NORM = {
    "axis": np.array([-1]),
    "two": f32(2),
    "epsilon": f32(1e-5),
    "minus_half": f32(-0.5),
    "gamma": normal(8),
}


@pytest.mark.parametrize("form", ["division", "reciprocal", "power"])
def test_a_norm_in_single_steps_stays_whole(form: str) -> None:
    data = net(layer_norm(form), constants=NORM)
    converted = convert(data)
    names = [one.name for one in parse(data).graph.node]
    assert set(converted.kept) == set(names) - {"scaled", "y"}
    # Nothing is rounded within it: in, and out on both sides of the rest.
    assert converted.casts == 2
    # A difference of 300 has a square beyond FP16.
    feeds = {"x": normal(4, 8) * 300}
    assert error(converted.model, data, feeds) < 1e-3
    assert np.isfinite(run(emulated(converted.model), feeds)["y"]).all()


@pytest.mark.parametrize("epsilon", [1e-12, 1e-6])
def test_an_l2_norm_stays_with_its_epsilon(epsilon: float) -> None:
    nodes = [
        node("ReduceL2", "x axis", "length"),
        node("Clip", "length epsilon", "clipped"),
        node("Div", "x clipped", "unit"),
        node("MatMul", "unit w", "y"),
    ]
    data = net(nodes, constants=DENSE | {"axis": np.array([-1]), "epsilon": f32(epsilon)})
    converted = convert(data)
    assert set(converted.kept) == {"length", "clipped", "unit"}
    assert error(converted.model, data, {"x": normal(4, 8) * 1e-3}) < 2e-3


def test_pooling_and_attention_scales_are_no_norms() -> None:
    nodes = [
        node("GlobalAveragePool", "x", "pooled"),
        node("Conv", "pooled w", "gate"),
        node("Sigmoid", "gate", "share"),
        node("Mul", "x share", "gated"),
        node("Sqrt", "share", "y"),
    ]
    constants = {"w": normal(8, 8, 1, 1)}
    data = net(nodes, x=["N", 8, 4, 4], y=["N", 8, 1, 1], constants=constants)
    assert convert(data).kept == {}


@pytest.mark.parametrize(
    ("nodes", "constants", "kept"),
    [
        ([node("Exp", "x", "e"), node("Relu", "e", "y")], {}, {"e": fp16_keep.STEEP}),
        ([node("Softplus", "x", "s"), node("Tanh", "s", "y")], {}, {"s": fp16_keep.STEEP}),
        ([node("Softmax", "x", "y")], {}, {"y": fp16_keep.OUTPUT}),
        ([node("Softmax", "x", "s"), node("MatMul", "s w", "y")], DENSE, {}),
        ([node("Pow", "x p", "y")], {"p": f32(3)}, {}),
        ([node("Pow", "x p", "y")], {"p": f32(7)}, {"y": fp16_keep.STEEP}),
        ([node("Add", "x c", "y")], {"c": f32(1e-12)}, {"y": fp16_keep.TOO_SMALL}),
        ([node("Add", "x c", "y")], {"c": f32(0)}, {}),
        ([node("Mul", "x c", "y")], {"c": f32(70000)}, {"y": fp16_keep.TOO_LARGE}),
        ([node("Mul", "x c", "y")], {"c": f32(65519)}, {}),
        ([node("Mul", "x c", "y")], {"c": f32(65520)}, {"y": fp16_keep.TOO_LARGE}),
        # A tiny weight among larger ones is lost in the sum; a tiny divisor is not.
        ([node("Mul", "x c", "y")], {"c": f32(*[1] * 7, 1e-20)}, {}),
        ([node("Div", "x c", "y")], {"c": f32(*[1] * 7, 1e-20)}, {"y": fp16_keep.TOO_SMALL}),
        ([node("Clip", "x - c", "y")], {"c": f32(3.4e38)}, {}),
        ([node("Clip", "x - c", "y")], {"c": f32(math.inf)}, {}),
        (
            [
                node("Greater", "x c", "mask"),
                node("Where", "mask x low", "w"),
                node("Softmax", "w", "s"),
                node("Abs", "s", "y"),
            ],
            {"c": f32(0), "low": f32(-3.4e38)},
            {"w": fp16_keep.TOO_LARGE},
        ),
        (
            [
                node("Shape", "x", "shape"),
                node("ConstantOfShape", "shape", "c", value=helper.make_tensor("", 1, [1], [1e6])),
                node("Add", "x c", "y"),
            ],
            {},
            {"c": fp16_keep.TOO_LARGE},
        ),
        (
            [node("Range", "a b c", "r"), node("Mul", "x r", "y")],
            {"a": f32(0), "b": f32(8), "c": f32(1)},
            {"r": fp16_keep.NO_FP16},
        ),
        ([node("CumSum", "x axis", "y")], {"axis": np.array(1)}, {"y": fp16_keep.SUM}),
    ],
)
def test_what_stays_and_why(nodes: list, constants: dict, kept: dict[str, str]) -> None:
    data = net(nodes, constants=constants)
    converted = convert(data)
    assert converted.kept == kept
    assert converted.casts <= 2 + 2 * len(kept)
    # The model itself loads, and what is emulated is what the definition of its operators says.
    new_session(converted.model)
    if nodes[0].op_type != "Range":  # whose reference writes float64
        feeds = {"x": normal(4, 8) / 100}
        with np.errstate(over="ignore"):
            want = ReferenceEvaluator(parse(converted.model)).run(None, feeds)[0]
        have = run(emulated(converted.model), feeds)["y"]
        np.testing.assert_allclose(have, want, rtol=0, atol=2e-3 * np.abs(want).max())


def test_a_constant_that_both_precisions_read_is_there_twice() -> None:
    nodes = [node("Mul", "x c", "a"), node("Div", "a c", "y")]
    data = net(nodes, constants={"c": f32(*[1.5] * 7, 1e-6)})
    converted = convert(data)
    assert converted.kept == {"y": fp16_keep.TOO_SMALL}
    kinds = {t.name: t.data_type for t in parse(converted.model).graph.initializer}
    assert kinds == {"c": TensorProto.FLOAT16, "c_fp32": TensorProto.FLOAT}


def test_a_node_can_be_kept() -> None:
    data = net([node("MatMul", "x w", "m"), node("Relu", "m", "y")], constants=DENSE)
    converted = convert(data, keep={"m": "I say so"})
    assert converted.kept == {"m": "I say so"}
    assert converted.casts == 2
    (weights,) = parse(converted.model).graph.initializer
    assert weights.data_type == TensorProto.FLOAT
    with pytest.raises(ConfigError, match=r"keep: the model has no node 'mm'.*'m'"):
        convert(data, keep={"mm": "a typing error"})


def test_all_nodes_kept_leave_no_cast() -> None:
    nodes = [
        node("Identity", "x", "i"),
        node("Relu", "i", "a"),
        node("Abs", "a", "first"),
        node("Neg", "a", "b"),
        node("Identity", "b", "y"),
    ]
    data = net(nodes, outputs=("first", "y"))
    converted = convert(data, keep=dict.fromkeys(("i", "a", "first", "b", "y"), "test"))
    assert converted.casts == 0
    assert error(converted.model, data, {"x": normal(2, 8)}) == 0


def test_integers_are_cast_to_fp32_for_a_node_that_stays() -> None:
    """2049 is no number of FP16."""
    nodes = [
        node("Cast", "x", "i", to=TensorProto.INT64),
        node("Cast", "i", "f", to=TensorProto.FLOAT),
        node("Sub", "f c", "y"),
    ]
    data = net(nodes, constants={"c": f32(2048)})
    converted = convert(data, keep=dict.fromkeys("iy", "test"))
    assert run(emulated(converted.model), {"x": np.full((1, 8), 2049, np.float32)})["y"][0, 0] == 1


# Values beyond FP16 -----------------------------------------------------------------------------


@pytest.fixture
def loud() -> bytes:
    """The middle tensors of it are around 1e6, as activations of some trained models are."""
    nodes = [
        node("MatMul", "x w", "quiet"),
        node("Mul", "quiet up", "loud"),
        node("Add", "loud one", "sum"),
        node("Transpose", "sum", "turned", perm=[1, 0]),
        node("Mul", "turned down", "calm"),
        node("Transpose", "calm", "y", perm=[1, 0]),
    ]
    constants = DENSE | {"up": f32(30000), "one": f32(1), "down": f32(1e-4)}
    return net(nodes, constants=constants)


def test_data_finds_what_overflows_and_it_is_kept(loud: bytes) -> None:
    feeds = {"x": normal(8, 8) * 10}
    without = convert(loud)
    assert without.kept == {}
    assert not np.isfinite(run(emulated(without.model), feeds)["y"]).all()
    # ONNX Runtime on a CPU would not show it.
    shown = new_session(without.model)
    assert np.isfinite(shown.run(None, feeds)[0]).all()

    found = find_overflows(loud, [{"x": feeds["x"][i : i + 3]} for i in range(0, 8, 3)])
    want = np.abs(feeds["x"] @ DENSE["w"]).max() * 30000
    assert set(found) == {"loud", "sum", "turned"}
    assert found["loud"] == pytest.approx(want, rel=1e-5)
    keep = nodes_to_keep(loud, found)
    assert keep == dict.fromkeys(("loud", "sum", "turned", "calm"), fp16_ranges.OVERFLOW)
    converted = convert(loud, keep=keep)
    assert list(converted.kept) == ["loud", "sum", "turned", "calm"]
    assert converted.casts == 4
    assert error(converted.model, loud, feeds) < 2e-3


def test_limit_and_margin() -> None:
    data = net([node("Relu", "x", "y")])
    batches = [{"x": np.full((1, 8), 40000, np.float32)}]
    assert find_overflows(data, batches) == {"x": 40000, "y": 40000}
    assert find_overflows(data, batches, margin=1) == {}
    assert find_overflows(data, batches, limit=40000, margin=1) == {"x": 40000, "y": 40000}
    for limit, margin in ((0, 1), (1, 0.5)):
        with pytest.raises(ConfigError, match="limit, margin"):
            find_overflows(data, batches, limit, margin)
    with pytest.raises(ConfigError, match="no batch"):
        find_overflows(data, [])


def test_infinite_values_count_and_nan_is_refused() -> None:
    data = net([node("Reciprocal", "x", "r"), node("Atan", "r", "y")])
    assert find_overflows(data, [{"x": np.zeros((1, 8), np.float32)}]) == {"r": math.inf}
    data = net([node("Sqrt", "x", "y")])
    with pytest.raises(EngineBuildError, match="output 'y' of the FP32 model is NaN"):
        find_overflows(data, [{"x": -np.ones((1, 8), np.float32)}])


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_ranges_at_every_opset(opset: int) -> None:
    nodes = [node("MatMul", "x w", "m"), node("Relu", "m", "y")]
    data = net(nodes, constants={"w": np.eye(8, dtype=np.float32) * 1e5}, opset=opset)
    found = find_overflows(data, [{"x": np.ones((1, 8), np.float32)}])
    assert found == {"m": pytest.approx(1e5), "y": pytest.approx(1e5)}


# What is refused --------------------------------------------------------------------------------


def half_already() -> bytes:
    return convert(classifier().SerializeToString()).model


def with_branch() -> bytes:
    inner = helper.make_graph(
        [node("Relu", "x", "b")], "b", [], [helper.make_tensor_value_info("b", 1, None)]
    )
    nodes = [node("If", "c", "y", then_branch=inner, else_branch=inner)]
    return net(nodes, constants={"c": np.array(True)})


def external() -> bytes:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return helper.make_model(helper.make_graph([], "g", [], [], [tensor])).SerializeToString()


def only_pixels() -> bytes:
    graph = helper.make_graph(
        [node("Cast", "image", "y", to=TensorProto.FLOAT)],
        "cast",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    ).SerializeToString()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (b"\x08\x09", "no valid ONNX file"),
        (lambda: net([node("Relu", "x", "y")], opset=12), "opset: got 12, expected 13 or later"),
        (half_already, r"half precision already, such as .*Convert its FP32 original"),
        (lambda: quantised(18), r"scales can't be FP16: opset: got 18, expected 19 or later"),
        (
            lambda: net([node("Mul", "x bad", "y")], constants={"bad": f32(*[1] * 7, math.nan)}),
            "initializer 'bad' has NaN",
        ),
        (
            lambda: net([node("Mul", "x bad", "y")], constants={"bad": f32(math.inf)}),
            "initializer 'bad' has infinite values",
        ),
        (lambda: net([node("Identity", "x", "y")]), "computes nothing in floating point"),
        (only_pixels, "computes nothing in floating point"),
        (with_branch, "node 'y' is a If: .*without control flow"),
        (
            lambda: net(
                [node("Gelu", "x", "g", domain="com.microsoft"), node("Relu", "g", "y")],
                domains={"com.microsoft": 1},
            ),
            r"node 'g': the type of what com.microsoft.Gelu computes is not known",
        ),
    ],
)
def test_refuses(model: bytes | Callable[[], bytes], message: str) -> None:
    data = model if isinstance(model, bytes) else model()
    for work in (convert, lambda data: find_overflows(data, [{}])):
        with pytest.raises(EngineBuildError, match=message):
            work(data)


@pytest.mark.parametrize(
    ("model", "message"), [(external(), "external data"), (b"no model", "not an ONNX file")]
)
def test_refuses_files_that_no_bundle_may_hold(model: bytes, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        convert(model)


def test_preprocessing_could_be_converted_but_the_command_leaves_it() -> None:
    """Nothing in the graph says what it is for; a whole model may begin like that."""
    spec = PreprocessSpec((8, 8), range=(0, 1))
    data = preprocess_model(spec, camera_image(3, (16, 16)), "pixels").SerializeToString()
    converted = convert(data)
    image = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    assert error(converted.model, data, {"image": image}) < 2e-3


# TensorRT ---------------------------------------------------------------------------------------


@pytest.mark.tensorrt
@pytest.mark.torch
@pytest.mark.parametrize("opset", [18, 20])
def test_tensorrt_builds_transformers(
    tensorrt: ModuleType, opset: int, transformers: Callable[[int], Bundle]
) -> None:
    bundle = transformers(opset)
    for record in bundle.manifest.stages:
        model = convert(bundle.stage_model(record.name, "fp32")).model
        shapes = {spec.name: (1, *spec.sample_shape()) for spec in record.inputs}
        assert parse_and_build(model, shapes)


@pytest.mark.tensorrt
@pytest.mark.torch
def test_tensorrt_builds_convolutions(tensorrt: ModuleType, convolutional_bundle: Bundle) -> None:
    for record in convolutional_bundle.manifest.stages[1:]:
        model = convert(convolutional_bundle.stage_model(record.name, "fp32")).model
        shapes = {spec.name: (1, *spec.sample_shape()) for spec in record.inputs}
        assert parse_and_build(model, shapes)


@pytest.mark.tensorrt
def test_tensorrt_builds_what_is_partly_fp32(tensorrt: ModuleType, loud: bytes) -> None:
    keep = nodes_to_keep(loud, find_overflows(loud, [{"x": normal(4, 8) * 10}]))
    assert parse_and_build(convert(loud, keep=keep).model, {"x": (1, 8)})
    for form in ("division", "reciprocal", "power"):
        data = net(layer_norm(form), constants=NORM)
        assert parse_and_build(convert(data).model, {"x": (1, 8)})


@pytest.mark.tensorrt
def test_tensorrt_builds_int8_in_fp16(tensorrt: ModuleType) -> None:
    assert parse_and_build(convert(quantised(19)).model, {"x": (1, 8)})
