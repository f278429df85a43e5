"""Each rule finds the model that breaks it, and no other rule does."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime import cli
from edge_runtime.errors import ConfigError, EngineBuildError
from engines.qdq_lint import RULES, lint, quantized_nodes
from engines.quantize import QuantizeOptions
from tests.engines.test_quantize import (
    Graph,
    attention_net,
    concat_net,
    half_net,
    quantized,
    residual_net,
)
from tests.tensorrt_without_gpu import parse_and_build

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("EDGE_SHARED") or ROOT.parent / "shared")
MODELS = SHARED / "data" / "imagenet_mobilenets"


class Draft:
    """A good quantised model, to be broken."""

    def __init__(self, data: bytes, options: QuantizeOptions | None = None) -> None:
        self.model = onnx.load_from_string(quantized(data, options).model)
        self.graph = self.model.graph

    def node(self, name: str) -> onnx.NodeProto:
        (found,) = (node for node in self.graph.node if node.name == name)
        return found

    def constant(self, name: str, values: np.ndarray) -> str:
        """Add an initializer, or replace the one of this name."""
        for tensor in self.graph.initializer:
            if tensor.name == name:
                self.graph.initializer.remove(tensor)
        self.graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    def before(self, reader: str, *nodes: onnx.NodeProto) -> None:
        """Insert nodes before another one."""
        place = list(self.graph.node).index(self.node(reader))
        for node in reversed(nodes):
            self.graph.node.insert(place, node)

    def pair(self, tensor: str, reader: str, index: int = 0, scale: str = "image_scale") -> None:
        """Put a pair of its own between a tensor and one of its readers."""
        middle, out = f"{tensor}_q", f"{tensor}_dq"
        self.before(
            reader,
            helper.make_node("QuantizeLinear", [tensor, scale, "zero_point"], [middle], middle),
            helper.make_node("DequantizeLinear", [middle, scale, "zero_point"], [out], out),
        )
        self.node(reader).input[index] = out


def unsigned() -> Draft:
    draft = Draft(residual_net())
    draft.constant("zero_point", np.array(0, np.uint8))
    return draft


def no_zero_point() -> Draft:
    draft = Draft(residual_net())
    for kind in ("", "de"):
        del draft.node(f"image_{kind}quantized").input[2]
    return draft


def asymmetric() -> Draft:
    draft = Draft(residual_net())
    draft.constant("zero_point", np.array(3, np.int8))
    return draft


def asymmetric_weight() -> Draft:
    draft = Draft(residual_net())
    draft.constant("zero_point_2", np.array([0, 1], np.int8))
    return draft


def old_half() -> Draft:
    draft = Draft(half_net())
    draft.model.opset_import[0].version = 18
    return draft


def other_scale() -> Draft:
    draft = Draft(residual_net())
    draft.node("image_dequantized").input[1] = "t2_scale"
    return draft


def nothing_dequantises() -> Draft:
    draft = Draft(residual_net())
    cast = helper.make_node("Cast", ["image_quantized"], ["c"], "c", to=TensorProto.FLOAT)
    draft.before("image_dequantized", cast)
    draft.node("Conv0").input[0] = "c"
    draft.graph.node.remove(draft.node("image_dequantized"))
    draft.node("Conv0").input[1] = draft.constant("w", np.ones((4, 3, 3, 3), np.float32))
    return draft


def scales_of_channels() -> Draft:
    draft = Draft(residual_net())
    for kind in ("", "de"):
        node = draft.node(f"image_{kind}quantized")
        node.input[1] = draft.constant("three", np.array([0.1, 0.2, 0.3], np.float32))
        node.input[2] = draft.constant("zeros", np.zeros(3, np.int8))
    return draft


def one_weight_scale() -> Draft:
    return Draft(residual_net(), QuantizeOptions(per_channel=False))


def wrong_axis() -> Draft:
    draft = Draft(residual_net())
    (weight,) = (n for n in draft.graph.node if n.name == draft.node("Conv6").input[1])
    weight.attribute[0].i = 1
    return draft


def axis_behind_a_transpose() -> Draft:
    """Stored as (out, in) and transposed: along axis 1 the scales are of the input channels."""
    net = Graph()
    net.add("MatMul", "image", net.random(6, 6), out="y")
    draft = Draft(net.file([2, 6], [2, 6]))
    source = draft.node("MatMul0").input[1]
    draft.before("MatMul0", helper.make_node("Transpose", [source], ["t"], "t", perm=[1, 0]))
    draft.node("MatMul0").input[1] = "t"
    return draft


def float_weight() -> Draft:
    draft = Draft(residual_net())
    draft.node("Conv0").input[1] = draft.constant("w", np.ones((4, 3, 3, 3), np.float32))
    return draft


def float_activation() -> Draft:
    draft = Draft(residual_net())
    draft.node("Conv10").input[0] = "t9"
    for name in ("t9_dequantized", "t9_quantized"):
        draft.graph.node.remove(draft.node(name))
    return draft


def quantised_bias() -> Draft:
    draft = Draft(residual_net())
    values = draft.constant("b", np.arange(4, dtype=np.int32))
    scale = draft.constant("b_scale", np.full(4, 1e-4, np.float32))
    zero = draft.constant("b_zero", np.zeros(4, np.int32))
    dq = helper.make_node("DequantizeLinear", [values, scale, zero], ["bias"], "bias", axis=0)
    draft.before("Conv0", dq)
    draft.node("Conv0").input[2] = "bias"
    return draft


def quantised_added_bias() -> Draft:
    draft = Draft(attention_net())
    draft.constant("b8", np.arange(9, dtype=np.int8))
    scale = draft.constant("b_scale", np.array(0.1, np.float32))
    dq = helper.make_node("DequantizeLinear", ["b8", scale, "zero_point"], ["bias"], "bias")
    draft.before("Add11", dq)
    draft.node("Add11").input[1] = "bias"
    return draft


def two_pairs() -> Draft:
    draft = Draft(residual_net())
    draft.pair("t2", "Add8", 1, "t2_scale")
    return draft


def two_dequantisers() -> Draft:
    draft = Draft(residual_net())
    copy = helper.make_node("DequantizeLinear", draft.node("t2_dequantized").input, ["c"], "c")
    draft.before("Add8", copy)
    draft.node("Add8").input[1] = "c"
    return draft


def float_skip() -> Draft:
    return Draft(residual_net(), QuantizeOptions(exclude="Add8"))


def scales_of_a_concat() -> Draft:
    draft = Draft(concat_net())
    draft.constant("t3_scale", np.array(0.5, np.float32))
    return draft


def inputs_of_a_concat() -> Draft:
    """Pairs before the Concat instead of behind it."""
    net = Graph()
    a, b = (net.add("Relu", net.convolve("image", 4, 3, 3, 3)) for _ in "ab")
    net.add("Identity", net.convolve(net.add("Concat", a, b, axis=1), 4, 8, 3, 3), out="y")
    draft = Draft(net.file([1, 3, 8, 8], [1, 4, 8, 8]))
    draft.pair(a, "Concat4", 0, "image_scale")
    draft.pair(b, "Concat4", 1, "t4_scale")
    draft.node("Conv5").input[0] = "t4"
    for name in ("t4_dequantized", "t4_quantized"):
        draft.graph.node.remove(draft.node(name))
    return draft


def quantised_norm() -> Draft:
    draft = Draft(attention_net())
    draft.node("LayerNormalization9").input[0] = "t8_dequantized"
    return draft


def quantised_softmax() -> Draft:
    draft = Draft(attention_net())
    draft.pair("t4", "Softmax5")
    return draft


def before_the_norm() -> Draft:
    draft = Draft(residual_net())
    draft.pair("t0", "BatchNormalization1")
    return draft


def before_the_activation() -> Draft:
    draft = Draft(residual_net())
    draft.pair("t4", "Clip5")
    return draft


def for_an_output() -> Draft:
    draft = Draft(residual_net())
    draft.pair("t10", "Identity11")
    return draft


def for_float_arithmetic() -> Draft:
    """The pool could run in int8, were it quantised behind."""
    net = Graph()
    tensor = net.add("Relu", net.convolve("image", 4, 3, 3, 3))
    net.add("GlobalAveragePool", tensor, out="y")
    draft = Draft(net.file([1, 3, 8, 8], [1, 4, 1, 1]))
    draft.pair("t1", "GlobalAveragePool2")
    return draft


def in_a_branch() -> Draft:
    """A subgraph that reads tensors of the graph around it."""
    draft = Draft(residual_net())
    outer = ["t10", "image_scale", "zero_point"]
    nodes = [
        helper.make_node("QuantizeLinear", outer, ["a"], "inner_quantized"),
        helper.make_node("DequantizeLinear", ["a", *outer[1:]], ["b"], "inner_dequantized"),
    ]
    value = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
    branch = helper.make_graph(nodes, "branch", [], [value])
    draft.constant("yes", np.array(True))
    draft.graph.node.remove(draft.node("Identity11"))
    node = helper.make_node("If", ["yes"], ["y"], "If", then_branch=branch, else_branch=branch)
    draft.graph.node.append(node)
    return draft


def qlinear() -> Draft:
    draft = Draft(residual_net())
    node = draft.node("image_quantized")
    node.op_type = "DynamicQuantizeLinear"
    return draft


BROKEN: list[tuple[str, Callable[[], Draft], str, str]] = [
    ("qoperator", qlinear, "image_quantized", "DynamicQuantizeLinear computes"),
    ("signed", unsigned, "image_quantized", "uint8, not int8"),
    ("signed", no_zero_point, "image_quantized", "uint8, not int8, which it is without"),
    ("symmetric", asymmetric, "image_quantized", "its zero point is 3"),
    ("symmetric", asymmetric_weight, "weight19_dequantized", "its zero point is 1"),
    ("fp16-scale-opset", old_half, "image_quantized", "its scale is FP16, the opset 18"),
    ("pair", other_scale, "image_quantized", "'image_dequantized' has another scale"),
    ("pair", nothing_dequantises, "image_quantized", "something else than a Dequantize"),
    ("activations-per-tensor", scales_of_channels, "image_quantized", "it has 3 scales"),
    ("weights-per-channel", one_weight_scale, "Conv0", "one scale for 4 channels"),
    ("weights-per-channel", wrong_axis, "Conv6", "along axis 1, not 0"),
    ("weights-per-channel", axis_behind_a_transpose, "MatMul0", "along axis 1, not 0"),
    ("inputs", float_weight, "Conv0", "its input 'w' is not quantised"),
    ("inputs", float_activation, "Conv10", "its input 't9' is not quantised"),
    ("bias", quantised_bias, "Conv0", "its bias 'bias' is quantised"),
    ("bias", quantised_added_bias, "Add11", "the bias 'bias' that it adds"),
    ("shared-pair", two_pairs, "t2_quantized", "2 pairs read 't2'"),
    ("shared-pair", two_dequantisers, "t2_quantized", "2 DequantizeLinear follow it"),
    ("residual", float_skip, "Add8", "the skip beside its quantised branch"),
    ("concat", scales_of_a_concat, "Concat4", "differ: "),
    ("concat", inputs_of_a_concat, "Concat4", "differ: "),
    ("float-ops", quantised_norm, "LayerNormalization9", "it is a LayerNormalization"),
    ("float-ops", quantised_softmax, "Softmax5", "it is a Softmax and reads quantised"),
    ("between-conv-and-relu", before_the_norm, "t0_q", "between a Conv and its Batch"),
    ("between-conv-and-relu", before_the_activation, "t4_q", "between a Conv and its Clip"),
    ("output-only-for-consumer", for_an_output, "t10_q", "no quantised operator reads it"),
    ("output-only-for-consumer", for_float_arithmetic, "t1_q", "no quantised operator"),
    ("output-only-for-consumer", in_a_branch, "inner_quantized", "no quantised operator"),
]


@pytest.mark.parametrize(
    ("rule", "build", "node", "why"), BROKEN, ids=[build.__name__ for _, build, *_ in BROKEN]
)
def test_a_broken_model_breaks_one_rule(
    rule: str, build: Callable[[], Draft], node: str, why: str
) -> None:
    found = lint(build().model)
    assert {violation.rule for violation in found} == {rule}
    assert found[0].node == node
    assert why in found[0].why
    assert found[0].remedy == RULES[rule]


def test_every_rule_has_a_broken_model() -> None:
    assert {rule for rule, *_ in BROKEN} == set(RULES)


@pytest.mark.tensorrt
@pytest.mark.parametrize("build", [asymmetric, asymmetric_weight, quantised_bias])
def test_tensorrt_refuses_these_itself(tensorrt: ModuleType, build: Callable[[], Draft]) -> None:
    with pytest.raises(EngineBuildError, match="parser refused"):
        parse_and_build(build().model.SerializeToString())


@pytest.mark.tensorrt
@pytest.mark.parametrize("build", [unsigned, no_zero_point])
def test_tensorrt_takes_unsigned_activations_for_signed(
    tensorrt: ModuleType, build: Callable[[], Draft]
) -> None:
    """Why "signed" matters: no error, and 255 steps above 0 become 127."""
    network = tensorrt.Builder(log := tensorrt.Logger()).create_network(0)
    parser = tensorrt.OnnxParser(network, log)
    assert parser.parse(build().model.SerializeToString())
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    written = [lay.get_output(0).dtype for lay in layers if lay.type == tensorrt.LayerType.QUANTIZE]
    assert written == [tensorrt.int8] * 4


def half_behind_casts() -> Draft:
    """FP16 around Q/DQ in float32, which is how opset 18 does it."""
    draft = Draft(residual_net())
    conv = draft.node("Conv10")
    for index in (0, 1):
        name = f"half{index}"
        cast = helper.make_node("Cast", [conv.input[index]], [name], name, to=TensorProto.FLOAT16)
        draft.before("Conv10", cast)
        conv.input[index] = name
    conv.input[2] = draft.constant("half_bias", np.zeros(2, np.float16))
    draft.before("Identity11", helper.make_node("Cast", ["t10"], ["full"], "full", to=1))
    draft.node("Identity11").input[0] = "full"
    return draft


def pool_in_int8() -> Draft:
    """A pool and a Concat between pairs of the same scale: they run in int8."""
    net = Graph()
    tensor = net.add("Relu", net.convolve("image", 4, 3, 3, 3))
    joined = net.add("Concat", tensor, tensor, axis=1)
    pooled = net.add("MaxPool", joined, kernel_shape=[2, 2], strides=[2, 2])
    net.add("Identity", net.convolve(pooled, 4, 8, 3, 3), out="y")
    draft = Draft(net.file([1, 3, 8, 8], [1, 4, 4, 4]))
    draft.pair("t1", "Concat2", 0, "t3_scale")
    draft.node("Concat2").input[1] = "t1_dq"
    return draft


def weights_stored_in_float() -> Draft:
    """As training with fake quantisation leaves them: float, Q, DQ."""
    draft = Draft(residual_net())
    conv = draft.node("Conv10")
    scale = draft.constant("s", np.full(2, 0.01, np.float32))
    values = draft.constant("w", np.ones((2, 4, 3, 3), np.float32))
    inputs = [scale, "zero_point_2"]
    draft.before(
        "Conv10",
        helper.make_node("QuantizeLinear", [values, *inputs], ["wq"], "wq", axis=0),
        helper.make_node("DequantizeLinear", ["wq", *inputs], ["wdq"], "wdq", axis=0),
    )
    conv.input[1] = "wdq"
    return draft


def int8_input() -> Draft:
    """A boundary in int8, whose scale the stage before has too."""
    draft = Draft(residual_net())
    draft.graph.node.remove(draft.node("image_quantized"))
    draft.graph.input[0].type.tensor_type.elem_type = TensorProto.INT8
    draft.node("image_dequantized").input[0] = "image"
    return draft


@pytest.mark.parametrize("build", [half_behind_casts, pool_in_int8, weights_stored_in_float])
def test_other_ways_to_keep_the_rules(build: Callable[[], Draft]) -> None:
    model = build().model
    onnx.checker.check_model(model, full_check=True)
    assert lint(model) == ()


def test_an_int8_boundary_keeps_the_rules() -> None:
    assert lint(int8_input().model) == ()


def test_functions_are_looked_into() -> None:
    draft = unsigned()
    names = [tensor.name for tensor in draft.graph.initializer]
    function = helper.make_function(
        "here", "Net", ["image", *names], ["y"], draft.graph.node, draft.model.opset_import
    )
    node = helper.make_node("Net", ["image", *names], ["y"], "Net", domain="here")
    del draft.graph.node[:]
    draft.graph.node.append(node)
    draft.model.functions.append(function)
    draft.model.opset_import.append(helper.make_opsetid("here", 1))
    assert {violation.rule for violation in lint(draft.model)} == {"signed"}


def test_the_order_of_the_nodes_does_not_matter() -> None:
    """Some tools append their nodes at the end, which ONNX Runtime accepts."""
    draft = quantised_norm()
    nodes = list(draft.graph.node)[::-1]
    del draft.graph.node[:]
    draft.graph.node.extend(nodes)
    assert [violation.rule for violation in lint(draft.model)] == ["float-ops"]


def test_float_models_violate_nothing() -> None:
    for build in (residual_net, attention_net, half_net):
        assert lint(build()) == ()
        assert quantized_nodes(onnx.load_from_string(build())) == 0


@pytest.mark.parametrize("data", [b"", b"\xffnothing", b"\x08\x0a"])
def test_what_is_no_model_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match="is no ONNX model"):
        lint(data)


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["lint-qdq", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_the_command_on_a_clean_model(capsys, tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    file.write_bytes(quantized(residual_net()).model)
    code, out, err = command(capsys, file, "--json", tmp_path / "a.json")
    assert code == 0
    assert out == f"{file}: 12 quantised nodes, no rule is violated\n"
    result = json.loads((tmp_path / "a.json").read_text())
    assert result == {"file": str(file), "quantized_nodes": 12, "violations": []}
    file.write_bytes(residual_net())
    code, out, err = command(capsys, file)
    assert (code, out, err) == (0, f"{file}: nothing is quantised\n", "")


def test_the_command_on_a_broken_model(capsys, tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    onnx.save(one_weight_scale().model, file)
    code, out, err = command(capsys, file, "--json", tmp_path / "a.json")
    assert code == 1
    assert out.splitlines() == [
        f"weights-per-channel (4)  {RULES['weights-per-channel']}",
        *(f"    Conv{i}: its weight has one scale for {n} channels" for i, n in CHANNELS.items()),
    ]
    assert f"error: {file} violates rules for INT8: weights-per-channel (4)\n" in err
    result = json.loads((tmp_path / "a.json").read_text())
    assert [violation["node"] for violation in result["violations"]] == [
        f"Conv{i}" for i in CHANNELS
    ]
    assert set(result["violations"][0]) == {"rule", "node", "why", "remedy"}
    code, out, err = command(capsys, file, "--json", "-")
    assert code == 1
    assert len(json.loads(out)["violations"]) == 4


CHANNELS = {0: 4, 3: 4, 6: 4, 10: 2}


def test_the_command_shows_the_first_of_many(capsys, tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    draft = unsigned()
    for node in draft.graph.node:
        node.name = "a/long/name/" * 20 + node.name
    for size in (2, 4):
        draft.constant(f"zero_point_{size}", np.zeros(size, np.uint8))
    onnx.save(draft.model, file)
    _, out, _ = command(capsys, file)
    assert "signed (8)" in out
    assert "    and 3 more" in out
    assert max(map(len, out.splitlines())) < 110


def test_the_command_refuses_other_files(capsys, tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    for content in (b"", b"\xff not ONNX"):
        file.write_bytes(content)
        code, _, err = command(capsys, file)
        assert code == 2
        assert err.startswith(f"error: {file} is no ONNX model")
    for path in (tmp_path / "missing.onnx", tmp_path):
        code, _, err = command(capsys, path)
        assert code == 2
        assert err.startswith(f"error: {path} can't be read: ")


def test_external_data_is_read(capsys, tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    onnx.save(asymmetric_weight().model, file, save_as_external_data=True, size_threshold=0)
    assert command(capsys, file)[0] == 1
    (data,) = (path for path in tmp_path.iterdir() if path != file)
    data.unlink()
    assert command(capsys, file)[0] == 2


@pytest.mark.parametrize("name", ["mobilenet_v1_0.25_128", "mobilenet_v2_1.0_224"])
def test_models_that_tensorflow_quantised(name: str) -> None:
    """uint8, asymmetric, a pair between Conv and ReLU6, a quantised Softmax; biases in float."""
    file = MODELS / f"{name}.onnx"
    if not file.is_file():
        pytest.skip(f"no pretrained models in {MODELS}: EDGE_SHARED names the folder of data/")
    model = onnx.load(file)
    found = Counter(violation.rule for violation in lint(model))
    convolutions = sum(node.op_type == "Conv" for node in model.graph.node)
    quantizers = sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
    clips = sum(node.op_type == "Clip" for node in model.graph.node)
    # Its first Softmax reads a pair, and the pairs before and behind it are for nothing.
    assert found == {
        "signed": quantizers,
        "symmetric": found["symmetric"],
        "weights-per-channel": convolutions,
        "between-conv-and-relu": clips,
        "float-ops": 1,
        "output-only-for-consumer": 3,
    }
    assert found["symmetric"] > convolutions
