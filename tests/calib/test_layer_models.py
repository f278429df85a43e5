"""Single layers of an INT8 model, whoever made it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.layer_models import Layer, LayerModels
from edge_runtime import Bundle, ConfigError
from tests.calib.conv_toys import LAYERS, int8_bundle
from tests.engines.test_quantize import NETS, feeds_of, quantized, run


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return int8_bundle(tmp_path_factory.mktemp("conv"))


def models_of(bundle: Bundle, stage: str) -> LayerModels:
    return LayerModels(bundle.stage_model(stage, "fp32"), bundle.stage_model(stage, "int8"))


@pytest.mark.parametrize("stage", LAYERS)
def test_layers_are_the_quantised_nodes_in_order(bundle: Bundle, stage: str) -> None:
    wanted = [Layer(name, name.rstrip("0123456789")) for name in LAYERS[stage]]
    assert list(models_of(bundle, stage).layers) == wanted


@pytest.mark.parametrize(("stage", "name"), [(s, n) for s, names in LAYERS.items() for n in names])
def test_one_node_alone_reads_quantised_values(bundle: Bundle, stage: str, name: str) -> None:
    graph = onnx.load_from_string(models_of(bundle, stage).build([name])).graph
    counts = Counter(node.op_type for node in graph.node)
    assert counts["QuantizeLinear"] == 1
    assert counts["DequantizeLinear"] == (1 if name == "Add5" else 2)  # a skip has no weight
    behind = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    readers = {node.name for node in graph.node for tensor in node.input if tensor in behind}
    assert readers == {name}


@pytest.mark.parametrize("net", NETS)
def test_all_layers_together_are_the_int8_model_and_none_the_float_one(net: str) -> None:
    base = NETS[net]()
    int8 = quantized(base)
    models, feeds = LayerModels(base, int8.model), feeds_of(base)
    assert tuple(layer.node for layer in models.layers) == int8.quantized
    for nodes, whole in ((int8.quantized, int8.model), ((), base)):
        have, want = (run(data, feeds, ["y"])["y"] for data in (models.build(nodes), whole))
        np.testing.assert_array_equal(have, want)
    for layer in models.layers:
        onnx.checker.check_model(models.build([layer.node]), full_check=True)


def test_asymmetric_pairs_of_other_tools_are_taken_over(bundle: Bundle) -> None:
    base, symmetric = (bundle.stage_model("segment2", p) for p in ("fp32", "int8"))
    model = onnx.load_from_string(symmetric)
    zero = next(tensor for tensor in model.graph.initializer if tensor.name == "zero_point")
    zero.CopyFrom(numpy_helper.from_array(np.int8(100), "zero_point"))
    int8 = model.SerializeToString()
    built = LayerModels(base, int8).build(LAYERS["segment2"])
    feeds = {"features": np.random.default_rng(0).random((2, 5, 8, 8), np.float32)}
    have, want, other = (run(d, feeds, ["deep"])["deep"] for d in (built, int8, symmetric))
    np.testing.assert_array_equal(have, want)
    assert np.abs(have - other).max() > 0.1


class TestRefusals:
    """Anything that is not the float model with pairs in it."""

    @staticmethod
    def refused(base: bytes, int8: onnx.ModelProto | bytes) -> str:
        data = int8 if isinstance(int8, bytes) else int8.SerializeToString()
        with pytest.raises(
            ConfigError, match="int8 variant can't be split into layers: "
        ) as caught:
            LayerModels(base, data)
        assert "edge-runtime quantize" in str(caught.value)
        return str(caught.value)

    @pytest.fixture
    def int8(self, bundle: Bundle) -> onnx.ModelProto:
        return onnx.load_from_string(bundle.stage_model("segment1", "int8"))

    @pytest.fixture
    def base(self, bundle: Bundle) -> bytes:
        return bundle.stage_model("segment1", "fp32")

    def test_nothing_is_quantised(self, base: bytes) -> None:
        assert "nothing in it is quantised" in self.refused(base, base)

    def test_a_tensor_has_another_name(self, base: bytes, int8: onnx.ModelProto) -> None:
        for node in int8.graph.node:
            for names in (node.input, node.output):
                names[:] = ["other" if name == "b" else name for name in names]
        assert "no node of it computes 'b'" in self.refused(base, int8)

    def test_a_node_too_many(self, base: bytes, int8: onnx.ModelProto) -> None:
        int8.graph.node.append(onnx.helper.make_node("Relu", ["features"], ["more"]))
        assert "no node of fp32 computes 'more'" in self.refused(base, int8)

    def test_another_operator(self, base: bytes, int8: onnx.ModelProto) -> None:
        next(n for n in int8.graph.node if n.op_type == "Relu").op_type = "Sigmoid"
        assert "is not the Relu of fp32" in self.refused(base, int8)

    def test_another_stride(self, base: bytes, int8: onnx.ModelProto) -> None:
        conv = next(n for n in int8.graph.node if n.op_type == "Conv")
        conv.attribute.append(onnx.helper.make_attribute("strides", [2, 2]))
        assert "is not the Conv of fp32" in self.refused(base, int8)

    def test_another_source(self, base: bytes, int8: onnx.ModelProto) -> None:
        pair = next(n for n in int8.graph.node if n.input[0] == "b")
        pair.input[0] = "t0"
        assert "which is not 'b' of fp32" in self.refused(base, int8)

    def test_a_computed_scale(self, base: bytes, int8: onnx.ModelProto) -> None:
        pair = next(n for n in int8.graph.node if n.input[0] == "b")
        pair.input[1] = "t0"
        assert "a scale or zero point of 'b_dequantized' is no constant" in self.refused(base, int8)

    def test_another_float_constant(self, bundle: Bundle, tmp_path: Path) -> None:
        base = onnx.load_from_string(bundle.stage_model("head1", "fp32"))
        (mean,) = (t for t in base.graph.initializer if list(t.dims) == [4])
        mean.CopyFrom(numpy_helper.from_array(np.zeros(4, np.float32), mean.name))
        why = self.refused(base.SerializeToString(), bundle.stage_model("head1", "int8"))
        assert f"its constant {mean.name!r} is not that of fp32" in why

    def test_other_operator_sets(self, base: bytes, int8: onnx.ModelProto) -> None:
        int8.opset_import[0].version = 21
        assert "it uses other operator sets" in self.refused(base, int8)

    def test_no_onnx_file(self, base: bytes) -> None:
        with pytest.raises(ConfigError, match="its int8 variant is no ONNX file"):
            LayerModels(base, b"\xff\xff\xff")
