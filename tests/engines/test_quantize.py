"""Q/DQ nodes stand where the rules want them, with the right numbers in them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from edge_runtime.errors import CalibrationError, ConfigError, EngineBuildError
from edge_runtime.manifest import Bundle
from engines.onnx_graph import opset, with_outputs
from engines.preprocess import PreprocessSpec, camera_image, preprocess_model
from engines.qdq_lint import lint
from engines.qdq_write import quantize_weight
from engines.quantize import Quantized, QuantizeOptions, activations, quantize
from engines.verify import run_model
from tests.engines.classifiers import Net
from tests.engines.conftest import chain
from tests.tensorrt_without_gpu import parse_and_build

HALF = np.float16


class Graph(Net):
    """A `Net` with the pieces of these tests; "image" is its input, "y" its output."""

    def random(self, *shape: int, dtype: type = np.float32) -> str:
        return self.constant(self.rng.standard_normal(shape).astype(dtype) / 2)

    def convolve(self, tensor: str, *shape: int, dtype: type = np.float32, **attributes) -> str:
        bias = self.random(shape[0], dtype=dtype)
        weight = self.random(*shape, dtype=dtype)
        return self.add("Conv", tensor, weight, bias, pads=[shape[-1] // 2] * 4, **attributes)

    def normalise(self, tensor: str, channels: int) -> str:
        scale, variance = (self.rng.uniform(0.5, 2, channels).astype(np.float32) for _ in "ab")
        facts = [scale, *self.rng.standard_normal((2, channels)).astype(np.float32) / 5, variance]
        return self.add("BatchNormalization", tensor, *map(self.constant, facts))

    def file(
        self, shape: list, width: list, *, opset: int = 20, kind: int = TensorProto.FLOAT
    ) -> bytes:
        model = self.model({"y": width}, image=shape, opset=opset, ir_version=10, elem_type=kind)
        model.graph.output[0].type.tensor_type.elem_type = kind
        for number, node in enumerate(model.graph.node):
            node.name = f"{node.op_type}{number}"
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()


def residual_net() -> bytes:
    """Conv, BN, ReLU (skip), depthwise Conv, BN, Conv, BN, Add, ReLU, Conv."""
    net = Graph()
    skip = net.add("Relu", net.normalise(net.convolve("image", 4, 3, 3, 3), 4))
    branch = net.add("Clip", net.normalise(net.convolve(skip, 4, 1, 3, 3, group=4), 4))
    branch = net.normalise(net.convolve(branch, 4, 4, 1, 1), 4)
    total = net.add("Relu", net.add("Add", branch, skip))
    net.add("Identity", net.convolve(total, 2, 4, 3, 3), out="y")
    return net.file([2, 3, 8, 8], [2, 2, 8, 8])


def downsampling_net() -> bytes:
    """Both inputs of the Add come from a Conv."""
    net = Graph(1)
    branch = net.add("Relu", net.convolve("image", 4, 3, 3, 3, strides=[2, 2]))
    branch = net.normalise(net.convolve(branch, 4, 4, 3, 3), 4)
    skip = net.normalise(net.convolve("image", 4, 3, 1, 1, strides=[2, 2]), 4)
    net.add("Relu", net.add("Add", branch, skip), out="y")
    return net.file([1, 3, 8, 8], [1, 4, 4, 4])


def concat_net() -> bytes:
    """Two tensors go through a Concat into a Conv, and one of them into another Conv too."""
    net = Graph(2)
    a = net.add("Relu", net.convolve("image", 4, 3, 3, 3))
    b = net.add("Relu", net.convolve("image", 4, 3, 3, 3))
    joined = net.convolve(net.add("Concat", a, b, axis=1), 4, 8, 3, 3)
    net.add("Mul", joined, net.convolve(b, 4, 4, 3, 3), out="y")
    return net.file([1, 3, 8, 8], [1, 4, 8, 8])


def shared_weight_net() -> bytes:
    """One weight read by rows, by columns, and by something that stays float."""
    net = Graph(3)
    weight = net.random(6, 6)
    tensor = net.add("MatMul", net.add("Gemm", "image", weight), weight)
    tensor = net.add("Gemm", tensor, weight, transB=1)
    net.add("Add", tensor, net.add("ReduceMean", weight), out="y")
    return net.file([2, 6], [2, 6])


def attention_net() -> bytes:
    """Queries, keys and values are computed; LayerNorm reads what a MatMul reads too."""
    net = Graph(4)
    normal = net.add("LayerNormalization", "image", net.random(6), net.random(6), axis=-1)
    query, key = (net.add("MatMul", normal, net.random(6, 6)) for _ in "qk")
    scores = net.add("MatMul", query, net.add("Transpose", key, perm=[0, 2, 1]))
    mixed = net.add("MatMul", net.add("Softmax", scores, axis=-1), normal)
    total = net.add("Add", net.add("MatMul", mixed, net.random(6, 6)), "image")
    again = net.add("LayerNormalization", total, net.random(6), net.random(6), axis=-1)
    hidden = net.add("Gelu", net.add("Add", net.add("MatMul", again, net.random(6, 9)), "b"))
    net.constant(net.rng.standard_normal(9).astype(np.float32), "b")
    net.add("Add", total, net.add("MatMul", hidden, net.random(9, 6)), out="y")
    return net.file([2, 5, 6], [2, 5, 6])


def half_net() -> bytes:
    net = Graph(5)
    tensor = net.add("Relu", net.convolve("image", 4, 3, 3, 3, dtype=HALF))
    net.add("Identity", net.convolve(tensor, 4, 4, 3, 3, dtype=HALF), out="y")
    return net.file([1, 3, 8, 8], [1, 4, 8, 8], kind=TensorProto.FLOAT16)


def one_layer(
    operator: str, weight: tuple[int, ...], image: list, width: list, **attributes
) -> Callable[[], bytes]:
    """A graph of one operator with a weight."""

    def build() -> bytes:
        net = Graph(6)
        net.add(operator, "image", net.random(*weight), out="y", **attributes)
        return net.file(image, width)

    return build


def transposed_weight(perm: list[int]) -> Callable[[], bytes]:
    def build() -> bytes:
        net = Graph(7)
        weight = net.add("Identity", net.add("Transpose", net.random(5, 6), perm=perm))
        net.add("MatMul", "image", weight, out="y")
        return net.file([2, 6], [2, 5])

    return build


def weight_first() -> bytes:
    net = Graph(8)
    net.add("MatMul", net.random(5, 6), "image", out="y")
    return net.file([6, 2], [5, 2])


ONE_LAYER = {
    "conv": one_layer("Conv", (4, 3, 3, 3), [1, 3, 8, 8], [1, 4, 6, 6]),
    "conv 1d": one_layer("Conv", (4, 3, 3), [1, 3, 8], [1, 4, 6]),
    "depthwise": one_layer("Conv", (4, 1, 3, 3), [1, 4, 8, 8], [1, 4, 6, 6], group=4),
    "transposed": one_layer("ConvTranspose", (3, 4, 2, 2), [1, 3, 4, 4], [1, 4, 5, 5]),
    "transposed, groups": one_layer(
        "ConvTranspose", (4, 2, 2, 2), [1, 4, 4, 4], [1, 4, 5, 5], group=2
    ),
    "gemm": one_layer("Gemm", (6, 5), [2, 6], [2, 5]),
    "gemm, transB": one_layer("Gemm", (5, 6), [2, 6], [2, 5], transB=1, alpha=0.5),
    "gemm, transA": one_layer("Gemm", (6, 5), [6, 2], [2, 5], transA=1),
    "matmul": one_layer("MatMul", (6, 5), [3, 2, 6], [3, 2, 5]),
    "matmul, vector": one_layer("MatMul", (6,), [2, 6], [2]),
    "matmul, transposed weight": transposed_weight([1, 0]),
    "matmul, weight first": weight_first,
}
NETS = {
    "residual": residual_net,
    "downsampling": downsampling_net,
    "concat": concat_net,
    "shared weight": shared_weight_net,
    "attention": attention_net,
    "half": half_net,
}


def feeds_of(data: bytes, seed: int = 0) -> dict[str, np.ndarray]:
    """Random values for the input "image"."""
    tensor = onnx.load_from_string(data).graph.input[0].type.tensor_type
    shape = [axis.dim_value for axis in tensor.shape.dim]
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return {"image": np.random.default_rng(seed).standard_normal(shape).astype(dtype)}


def run(data: bytes, feeds: dict, names: list[str]) -> dict[str, np.ndarray]:
    """Any tensors of a model, its inputs too."""
    asked = [name for name in names if name not in feeds]
    file = with_outputs(onnx.load_from_string(data), asked).SerializeToString()
    return feeds | (run_model(file, feeds, asked) if asked else {})


def ranges_of(data: bytes, feeds: dict, options: QuantizeOptions | None = None) -> dict[str, float]:
    names = list(activations(data, options))
    values = run(data, feeds, names)
    return {name: float(np.abs(values[name].astype(np.float64)).max()) for name in names}


def quantized(data: bytes, options: QuantizeOptions | None = None) -> Quantized:
    result = quantize(data, ranges_of(data, feeds_of(data), options), options)
    onnx.checker.check_model(onnx.load_from_string(result.model), full_check=True)
    return result


def output(data: bytes, feeds: dict) -> np.ndarray:
    return run_model(data, feeds, ["y"])["y"].astype(np.float64)


def relative_error(have: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(have - want).max() / np.abs(want).max())


def edges(data: bytes, operators: str) -> dict[str, list[str]]:
    """Node -> operators, or "float", that its first two inputs come from."""
    graph = onnx.load_from_string(data).graph
    producers = {name: node.op_type for node in graph.node for name in node.output}
    return {
        node.name: [producers.get(name, "float") for name in node.input[:2]]
        for node in graph.node
        if node.op_type in operators.split()
    }


def counts(data: bytes) -> dict[str, int]:
    nodes = onnx.load_from_string(data).graph.node
    return {
        kind: sum(node.op_type == f"{kind}Linear" for node in nodes)
        for kind in ("Quantize", "Dequantize")
    }


DQ = "DequantizeLinear"


def test_a_residual_net_is_quantised_by_the_rules() -> None:
    result = quantized(residual_net())
    assert result.quantized == ("Conv0", "Conv3", "Conv6", "Add8", "Conv10")
    assert result.left == {}
    assert edges(result.model, "Conv") == {f"Conv{i}": [DQ, DQ] for i in (0, 3, 6, 10)}
    # The branch stays float, for it is fused; the skip has the pair that the Conv reads too.
    assert edges(result.model, "Add") == {"Add8": ["BatchNormalization", DQ]}
    assert edges(result.model, "BatchNormalization Relu Clip") == {
        "BatchNormalization1": ["Conv", "float"],
        "Relu2": ["BatchNormalization"],
        "BatchNormalization4": ["Conv", "float"],
        "Clip5": ["BatchNormalization"],
        "BatchNormalization7": ["Conv", "float"],
        "Relu9": ["Add"],
    }
    assert counts(result.model) == {"Quantize": 4, "Dequantize": 8}
    assert activations(residual_net()) == ("image", "t2", "t5", "t9")


def test_of_two_convolutions_that_are_added_the_first_is_the_skip() -> None:
    result = quantized(downsampling_net())
    assert edges(result.model, "Add") == {"Add6": [DQ, "BatchNormalization"]}
    assert lint(result.model) == ()


def test_attention_keeps_its_delicate_operators_float() -> None:
    result = quantized(attention_net())
    assert edges(result.model, "LayerNormalization Softmax Gelu") == {
        "LayerNormalization0": ["float", "float"],
        "Softmax5": ["MatMul"],
        "LayerNormalization9": ["Add", "float"],
        "Gelu12": ["Add"],
    }
    found = edges(result.model, "MatMul")
    assert len(found) == 7
    assert all(sources == [DQ, DQ] for sources in found.values())
    assert edges(result.model, "Add") == {
        "Add8": ["MatMul", DQ],
        "Add11": ["MatMul", "float"],
        "Add14": [DQ, "MatMul"],
    }


def test_pairs_around_a_concat_share_the_largest_scale() -> None:
    data = concat_net()
    ranges = {"image": 1.0, "t4": 2.0, "t3": 5.0}
    assert set(activations(data)) == set(ranges)
    model = onnx.load_from_string(quantize(data, ranges).model)
    scales = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert scales["t3_scale"] == scales["t4_scale"] == np.float32(5 / 127)
    assert scales["image_scale"] == np.float32(1 / 127)


def test_a_shared_weight_is_stored_once_for_each_axis() -> None:
    model = onnx.load_from_string(quantized(shared_weight_net()).model)
    stored = [t for t in model.graph.initializer if t.data_type == TensorProto.INT8 and t.dims]
    assert sorted(len(tensor.dims) for tensor in stored) == [1, 2, 2]
    assert "weight0" in {tensor.name for tensor in model.graph.initializer}


@pytest.mark.parametrize("name", ONE_LAYER)
def test_a_weight_has_a_scale_per_output_channel(name: str) -> None:
    model = onnx.load_from_string(quantized(ONE_LAYER[name]()).model)
    (node,) = [n for n in model.graph.node if n.op_type == DQ and n.input[0].startswith(("w", "t"))]
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    values, scale, zero = (stored[name] for name in node.input)
    assert values.dtype == zero.dtype == np.int8
    assert not zero.any()
    assert scale.shape == zero.shape
    # What was a Transpose of the weight is folded, and no float weight is left.
    assert {n.op_type for n in model.graph.node}.isdisjoint({"Transpose", "Identity"})
    assert not [t for t in stored.values() if t.dtype == np.float32 and t.size > 5]
    if name == "matmul, vector":
        assert scale.shape == ()
        return
    axis = helper.get_attribute_value(node.attribute[0])
    wanted = {"gemm, transB": 0, "conv": 0, "conv 1d": 0, "depthwise": 0, "matmul, weight first": 0}
    assert axis == wanted.get(name, 1)
    other = tuple(i for i in range(values.ndim) if i != axis)
    np.testing.assert_array_equal(np.abs(values).max(axis=other), 127)


@pytest.mark.parametrize("name", NETS | ONE_LAYER)
def test_the_linter_is_content(name: str) -> None:
    assert lint(quantized((NETS | ONE_LAYER)[name]()).model) == ()


@pytest.mark.parametrize("name", NETS | ONE_LAYER)
def test_boundaries_stay_and_the_bytes_are_the_same_each_time(name: str) -> None:
    data = (NETS | ONE_LAYER)[name]()
    first, second = quantized(data), quantized(data)
    assert first == second
    before, after = onnx.load_from_string(data).graph, onnx.load_from_string(first.model).graph
    for ours, theirs in ((after.input, before.input), (after.output, before.output)):
        assert [(v.name, v.type) for v in ours] == [(v.name, v.type) for v in theirs]


@pytest.mark.parametrize("name", ONE_LAYER)
def test_one_layer_computes_what_its_rounded_operands_give(name: str) -> None:
    """INT8 kernels against the float operator on operands that numpy rounded."""
    data = ONE_LAYER[name]()
    feeds = feeds_of(data)
    ranges = ranges_of(data, feeds)
    scale = np.float32(ranges["image"] / 127)
    rounded = np.clip(np.rint(feeds["image"] / scale), -128, 127) * scale
    model = onnx.load_from_string(data)
    weight = model.graph.initializer[0]
    values = onnx.numpy_helper.to_array(weight)
    axis = {"Conv": 0, "ConvTranspose": 1, "MatMul": values.ndim - 1, "Gemm": 1}[
        model.graph.node[-1].op_type
    ]
    if name in ("gemm, transB", "matmul, transposed weight", "matmul, weight first"):
        axis = 0
    other = tuple(i for i in range(values.ndim) if i != axis)
    scales = (np.abs(values).max(axis=other or None, keepdims=True) / 127).astype(np.float32)
    fake = np.clip(np.rint(values / scales), -127, 127) * scales
    weight.CopyFrom(onnx.numpy_helper.from_array(fake.astype(np.float32), weight.name))
    want = output(model.SerializeToString(), {"image": rounded})
    assert relative_error(output(quantize(data, ranges).model, feeds), want) < 1e-5


@pytest.mark.parametrize("name", NETS)
def test_nets_compute_what_the_reference_computes(name: str) -> None:
    data = NETS[name]()
    feeds = feeds_of(data)
    file = quantize(data, ranges_of(data, feeds)).model
    (want,) = ReferenceEvaluator(onnx.load_from_string(file)).run(None, feeds)
    # A value between two steps may be rounded to either, which later layers see.
    assert relative_error(output(file, feeds), want.astype(np.float64)) < 0.015
    assert relative_error(output(file, feeds), output(data, feeds)) < 0.05


def test_values_beyond_the_range_saturate() -> None:
    data = ONE_LAYER["gemm"]()
    feeds = feeds_of(data)
    limit = 0.25
    clipped = {"image": np.clip(feeds["image"], -limit * 128 / 127, limit)}
    file = quantize(data, {"image": limit}).model
    np.testing.assert_allclose(output(file, feeds), output(file, clipped), rtol=1e-6)


def test_weights_are_rounded_half_to_even_and_zero_channels_have_scale_one() -> None:
    weight = np.array([[127, 0.5, 1.5, -2.5], [0, 0, 0, 0], [-254, 1, 3, 5]], np.float32)
    scale, values = quantize_weight(weight, 0)
    np.testing.assert_array_equal(scale, [1, 1, 2])
    np.testing.assert_array_equal(values, [[127, 0, 2, -2], [0, 0, 0, 0], [-127, 0, 2, 2]])
    assert scale.dtype == np.float32
    scale, values = quantize_weight(weight, None)
    assert scale.shape == ()
    assert scale == 2


@pytest.mark.parametrize("dtype", [np.float32, HALF])
@pytest.mark.parametrize("size", [1e-7, 1e-5, 1.0, 6e4])
def test_no_scale_is_zero(dtype: type, size: float) -> None:
    weight = (np.random.default_rng(0).uniform(-1, 1, (4, 9)) * size).astype(dtype)
    scale, values = quantize_weight(weight, 0)
    assert scale.dtype == dtype
    assert (scale > 0).all()
    back = values * scale.astype(np.float64)[:, None]
    # Half a step, also where half precision has no finer steps for the scale itself.
    assert (np.abs(back - weight.astype(np.float64)) <= 0.501 * scale[:, None]).all()


def test_half_precision_has_half_precision_scales() -> None:
    model = onnx.load_from_string(quantized(half_net()).model)
    scales = [t for t in model.graph.initializer if t.name.endswith("_scale")]
    assert len(scales) == 4
    assert {t.data_type for t in scales} == {TensorProto.FLOAT16}


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_random_convolutional_nets_lose_a_few_percent(data: st.DataObject) -> None:
    net = Graph(data.draw(st.integers(0, 999)))
    channels = data.draw(st.sampled_from([3, 4, 8]))
    tensor = net.add("Relu", net.convolve("image", channels, 3, 3, 3))
    for _ in range(data.draw(st.integers(1, 4))):
        before = tensor
        group = data.draw(st.sampled_from([1, channels]))
        tensor = net.convolve(tensor, channels, channels // group, 3, 3, group=group)
        if data.draw(st.booleans()):
            tensor = net.normalise(tensor, channels)
        kind = data.draw(st.sampled_from(["plain", "residual", "concat"]))
        if kind == "residual":
            tensor = net.add("Add", before, tensor)
        tensor = net.add("Relu", tensor)
        if kind == "concat":
            joined = net.add("Concat", before, tensor, axis=1)
            tensor = net.add("Relu", net.convolve(joined, channels, 2 * channels, 1, 1))
    net.dense(net.pool(tensor), channels, 5, out="y")
    file = net.file([8, 3, 12, 12], [8, 5])
    feeds = feeds_of(file, seed=1)
    result = quantize(file, ranges_of(file, feeds))
    assert lint(result.model) == ()
    assert result.left == {}
    difference = output(result.model, feeds) - output(file, feeds)
    assert np.sqrt((difference**2).mean() / (output(file, feeds) ** 2).mean()) < 0.05


def test_options_choose_nodes_and_say_so() -> None:
    data = residual_net()
    some = quantized(data, QuantizeOptions(exclude="^Conv0$|Conv6"))
    # No quantised branch is left for the Add, so its skip is not quantised either.
    assert some.quantized == ("Conv3", "Conv10")
    assert some.left == {"Conv0": "excluded", "Conv6": "excluded"}
    assert quantized(data, QuantizeOptions(exclude="Add")).left == {"Add8": "excluded"}
    no_add = quantized(data, QuantizeOptions(op_types=("Conv",)))
    assert no_add.left == {"Add8": "Add is not among the op types to quantise"}
    assert edges(no_add.model, "Add") == {"Add8": ["BatchNormalization", "Relu"]}


def test_one_scale_per_weight_on_request() -> None:
    result = quantized(residual_net(), QuantizeOptions(per_channel=False))
    assert {violation.rule for violation in lint(result.model)} == {"weights-per-channel"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": "("}, "exclude: missing"),
        ({"op_types": ("Conv", "Matmul")}, "'Matmul' can't be quantised. Did you mean 'MatMul'"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizeOptions(**options)


def dynamic_weight(net: Graph) -> None:
    net.add("Conv", "image", net.add("Mul", "image", net.constant(np.float32(2))), out="y")


def computed_weight(net: Graph) -> None:
    net.add("MatMul", "image", net.add("Mul", net.random(4, 4), net.random(4)), out="y")


def batch_of_weights(net: Graph) -> None:
    net.add("MatMul", "image", net.random(4, 4, 4), out="y")


def only_constants(net: Graph) -> None:
    net.add("Add", "image", net.add("MatMul", net.random(4, 4), net.random(4, 4)), out="y")


def constant_convolved(net: Graph) -> None:
    net.add(
        "Add", "image", net.add("Conv", net.random(4, 4, 4, 4), net.random(4, 4, 1, 1)), out="y"
    )


def integers(net: Graph) -> None:
    whole = net.add("Cast", "image", to=TensorProto.INT32)
    product = net.add("MatMul", whole, net.constant(np.eye(4, dtype=np.int32)))
    net.add("Cast", product, to=TensorProto.FLOAT, out="y")


def einsum(net: Graph) -> None:
    net.add("Einsum", "image", net.random(4, 4), equation="abcd,de->abce", out="y")


def branches(net: Graph) -> None:
    def branch(name: str) -> onnx.GraphProto:
        node = helper.make_node("MatMul", ["image", weight], [name], name="inner")
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [value])

    weight = net.random(4, 4)
    # A tensor that a branch reads keeps its name: both branches see what they saw.
    whether = net.add(
        "Greater", net.add("ReduceMax", "image", keepdims=0), net.constant(np.float32(0))
    )
    net.add("If", whether, then_branch=branch("a"), else_branch=branch("b"), out="y")


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (dynamic_weight, "its weight is no constant"),
        (computed_weight, "'t0' is computed from constants: fold them first"),
        (batch_of_weights, "its weight 'weight0' is a batch of matrices"),
        (only_constants, "both of its inputs are constants"),
        (constant_convolved, "its first input is a constant"),
        (integers, "its tensors are int32, neither float32 nor float16"),
        (einsum, "Einsum is not supported"),
        (branches, "what is inside of If, Loop and Scan is not quantised"),
    ],
)
def test_what_stays_float_says_why(build: Callable[[Graph], None], reason: str) -> None:
    net = Graph()
    build(net)
    shape = [1, 1, 1, 1] if build is dynamic_weight else [4, 4, 4, 4]
    data = net.file(shape, shape)
    result = quantize(data, {})
    assert result == Quantized(data, (), result.left)
    assert list(result.left.values()) == [reason]
    assert activations(data) == ()
    assert lint(data) == ()


def test_a_weight_that_callers_may_replace_stays() -> None:
    model = onnx.load_from_string(ONE_LAYER["gemm"]())
    model.graph.input.append(helper.make_tensor_value_info("weight0", TensorProto.FLOAT, [6, 5]))
    result = quantize(model.SerializeToString(), {})
    assert list(result.left.values()) == [
        "its weight 'weight0' is an input that a caller may replace"
    ]


def test_nodes_without_names_go_by_what_they_write() -> None:
    model = onnx.load_from_string(residual_net())
    for node in model.graph.node:
        node.name = ""
    data = model.SerializeToString()
    assert quantized(data).quantized == ("t0", "t3", "t6", "t8", "t10")
    assert quantized(data, QuantizeOptions(exclude="^t3$")).left == {"t3": "excluded"}
    for node in model.graph.node:
        node.name = "same"
    ranges = dict.fromkeys(activations(data), 1.0)
    assert quantize(model.SerializeToString(), ranges).quantized == ("t0", "t3", "t6", "t8", "t10")


def test_a_preprocess_stage_has_nothing_to_quantise() -> None:
    spec = PreprocessSpec((8, 8), mean=(0.5,), std=(0.25,))
    data = preprocess_model(spec, camera_image(3), "pixels").SerializeToString()
    assert quantize(data, {}) == Quantized(data, (), {})


def test_names_that_are_taken_are_not_taken_again() -> None:
    net = Graph()
    tensor = net.add("Relu", "image", out="image_quantized")
    tensor = net.add("Gemm", tensor, net.constant(np.eye(4, dtype=np.float32), "zero_point"))
    net.add("Gemm", net.add("Add", tensor, "image"), net.random(4, 4), out="y")
    data = net.file([1, 4], [1, 4])
    result = quantized(data)
    assert lint(result.model) == ()
    assert relative_error(output(result.model, feeds_of(data)), output(data, feeds_of(data))) < 0.03


def test_docstrings_and_paths_do_not_survive() -> None:
    model = onnx.load_from_string(residual_net())
    model.doc_string = model.graph.node[0].doc_string = "/home/someone"
    data = quantized(model.SerializeToString()).model
    assert b"/home" not in data
    assert data == quantized(residual_net()).model


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), None])
def test_every_range_must_be_a_positive_number(value: float | None) -> None:
    data = residual_net()
    ranges = {"image": 1.0, "t2": 1.0, "t5": 1.0, "t9": value}
    if value is None:
        del ranges["t9"]
    with pytest.raises(CalibrationError, match="range of tensor 't9'"):
        quantize(data, ranges)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    net = Graph()
    weight = np.ones((4, 4), np.float32)
    weight[2, 1] = bad
    transposed = net.add("Transpose", net.constant(weight, "broken"), perm=[1, 0])
    net.add("MatMul", "image", transposed, out="y")
    with pytest.raises(EngineBuildError, match="initializer 'broken' has values that are NaN"):
        activations(net.file([1, 4], [1, 4]))


def test_old_opsets_are_refused() -> None:
    net = Graph()
    net.add("MatMul", "image", net.random(4, 4), out="y")
    with pytest.raises(EngineBuildError, match=r"too old for INT8: got 12, expected 13 or later"):
        activations(net.file([1, 4], [1, 4], opset=12))
    net = Graph()
    net.add("MatMul", "image", net.random(4, 4, dtype=HALF), out="y")
    data = net.file([1, 4], [1, 4], opset=18, kind=TensorProto.FLOAT16)
    with pytest.raises(EngineBuildError, match=r"FP16 scales: got 18, expected 19 or later"):
        quantize(data, {"image": 1.0})


def test_a_quantised_model_is_refused() -> None:
    data = quantized(residual_net()).model
    with pytest.raises(EngineBuildError, match="quantised already: it has QuantizeLinear 'image_q"):
        quantize(data, {})


def test_local_functions_and_other_files_are_refused() -> None:
    with pytest.raises(EngineBuildError, match="no ONNX file"):
        activations(b"\xffnothing")
    model = onnx.load_from_string(ONE_LAYER["gemm"]())
    model.functions.add(name="Block", domain="here")
    with pytest.raises(EngineBuildError, match="local functions"):
        activations(model.SerializeToString())


def stages_of(bundle: Bundle) -> dict[str, tuple[bytes, Quantized, dict[str, np.ndarray]]]:
    """Stage -> float file, quantised, and the values of its inputs and outputs."""
    spec = bundle.cascade.image
    shape = [8, *spec.shape[1:]]
    known = {spec.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    known |= chain(bundle, known[spec.name])
    stages = {}
    for record in bundle.manifest.stages:
        data = bundle.stage_model(record.name, "fp32")
        feeds = {spec.name: known[spec.name] for spec in record.inputs}
        result = quantize(data, ranges_of(data, feeds))
        stages[record.name] = data, result, known
    return stages


@pytest.mark.torch
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_a_transformer_exported_from_torch(transformer_bundle: Bundle) -> None:
    quantised = set()
    for record in transformer_bundle.manifest.stages:
        _, result, known = stages_of(transformer_bundle)[record.name]
        assert result.left == {}
        assert lint(result.model) == ()
        assert opset(onnx.load_from_string(result.model)) == 20
        quantised |= set(edges(result.model, "MatMul Gemm Conv"))
        assert all(
            sources == [DQ, DQ] for sources in edges(result.model, "MatMul Gemm Conv").values()
        )
        delicate = edges(result.model, "LayerNormalization Softmax Gelu").values()
        assert not any(DQ in sources for sources in delicate)
        feeds = {spec.name: known[spec.name] for spec in record.inputs}
        names = [spec.name for spec in record.outputs]
        for name, values in run_model(result.model, feeds, names).items():
            assert relative_error(values, known[name]) < 0.03
    assert len(quantised) > 6


@pytest.mark.tensorrt
@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("name", NETS)
def test_tensorrt_builds_nets(tensorrt: ModuleType, name: str, per_channel: bool) -> None:
    options = QuantizeOptions(per_channel=per_channel)
    assert parse_and_build(quantized(NETS[name](), options).model)


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", ONE_LAYER)
def test_tensorrt_builds_layers(tensorrt: ModuleType, name: str) -> None:
    assert parse_and_build(quantized(ONE_LAYER[name]()).model)


@pytest.mark.tensorrt
@pytest.mark.torch
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_tensorrt_builds_a_transformer(tensorrt: ModuleType, transformer_bundle: Bundle) -> None:
    for record in transformer_bundle.manifest.stages[:3]:
        _, result, known = stages_of(transformer_bundle)[record.name]
        shapes = {spec.name: (1, *known[spec.name].shape[1:]) for spec in record.inputs}
        assert parse_and_build(result.model, shapes)
