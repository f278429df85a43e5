"""What can't be imported, each with its line."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge_runtime.errors import ConfigError, EngineBuildError
from engines.import_onnx import build
from engines.recipe import InputRecipe, LabelsFile, OutputRecipe
from tests.engines.classifiers import SIZE, Net, classifier, residual_classifier
from tests.engines.conftest import folder_is_empty
from tests.engines.test_import_onnx import made, recipe_of


def no_batch() -> onnx.ModelProto:
    net = Net()
    total = net.add("ReduceSum", "image", net.constant(np.array([0, 2, 3], np.int64)), keepdims=0)
    net.add("MatMul", total, net.constant(np.ones((3, 4), np.float32)), out="scores")
    return net.model({"scores": [4]}, image=["N", 3, SIZE, SIZE])


def float16() -> onnx.ModelProto:
    net = Net()
    net.add("Cast", net.pool(net.conv("image", 3, 4)), out="half", to=TensorProto.FLOAT16)
    net.add("Cast", "half", out="scores", to=TensorProto.FLOAT)
    return net.model({"scores": ["N", 4]}, image=["N", 3, SIZE, SIZE])


def two_inputs() -> onnx.ModelProto:
    model = classifier()
    model.graph.input.append(helper.make_tensor_value_info("second", TensorProto.FLOAT, ["N", 3]))
    return model


def uint8_input() -> onnx.ModelProto:
    net = Net()
    net.add("Cast", "image", out="floats", to=TensorProto.FLOAT)
    net.add("Identity", net.pool(net.conv("floats", 3, 4)), out="scores")
    return net.model({"scores": ["N", 4]}, image=["N", 3, SIZE, SIZE], elem_type=TensorProto.UINT8)


NHWC = InputRecipe((SIZE, SIZE), layout="NHWC", range=(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            classifier(),
            {"input": InputRecipe((9, 9), range=(0.0, 1.0))},
            "model 'm0': its input 'image' is not what the recipe says: got (N, 3, 8, 8) float, "
            "expected (batch, 3, 9, 9) float32",
        ),
        (classifier(), {"input": NHWC}, "model 'm0': its input 'image' is not what the recipe"),
        (classifier(channels=1), {}, "model 'm0': its input 'image' is not what the recipe"),
        (uint8_input(), {}, "model 'm0': its input 'image' is not what the recipe"),
        (two_inputs(), {}, "model 'm0': inputs: got image, second, expected exactly one"),
        (classifier(batch=5), {}, "model 'm0': its batch is fixed: got 5"),
        (
            classifier(classes=5),
            {},
            "model 'm0': classes in its output 'scores' of 5: got 5 (0 to 5), expected 4",
        ),
        (
            classifier(classes=5),
            {"output": OutputRecipe(classes=(2, 6))},
            "model 'm0': classes in its output 'scores' of 5: got 4 (2 to 6)",
        ),
        (
            classifier(),
            {"output": OutputRecipe(tensor="features")},
            "model 'm0': its output 'features' holds no scores: got (batch, 6, 8, 8) float32",
        ),
        (
            float16(),
            {"output": OutputRecipe(tensor="half")},
            "model 'm0': its output 'half' holds no scores: got (batch, 4) float16",
        ),
        (
            classifier(),
            {"output": OutputRecipe(tensor="ra")},
            "model 'm0': no node computes 'ra'. Did you mean 'raw'?",
        ),
        (no_batch(), {}, "model 'm0': tensor 'scores': its first axis is not the batch"),
        (
            residual_classifier(exits=True),
            {},
            "model 'm0': outputs: got early, later/exit, final, expected one. Name the exits",
        ),
        (
            residual_classifier(exits=True),
            {"exits": ("erly", "final"), "cut_at": ("a",)},
            "model 'm0': exits: it has no output 'erly'. Did you mean 'early'?",
        ),
        (
            residual_classifier(),
            {"cut_at": ("b",)},
            "model 'm0': the cut at 'b' does not separate 'final' from the graph before: 'a' "
            "crosses it",
        ),
        (
            residual_classifier(),
            {"cut_at": ("sum", "a")},
            "model 'm0': cut_at: 'a' does not depend on 'sum'",
        ),
        (
            residual_classifier(),
            {"cut_at": ("summ",)},
            "model 'm0': cut_at: no node computes 'summ'. Did you mean 'sum'?",
        ),
        (residual_classifier(), {"cut_at": ("final",)}, "model 'm0': cut_at: 'final' is the model"),
        (
            residual_classifier(exits=True),
            {"cut_at": ("sum",), "exits": ("early", "final")},
            "model 'm0': the exit 'early' depends on no tensor of cut_at",
        ),
    ],
)  # fmt: skip
def test_refuses(tmp_path: Path, model: onnx.ModelProto, options: dict, message: str) -> None:
    recipe = recipe_of(tmp_path, (model, options))
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError) as error:
        build(recipe, tmp_path / "out" / "a")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert folder_is_empty(tmp_path / "out")


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (None, ConfigError, "model 'm0': the file "),
        (b"", EngineBuildError, "model 'm0': "),
        (b"no ONNX file at all", EngineBuildError, "model 'm0': "),
        (classifier().SerializeToString()[:-40], EngineBuildError, "model 'm0': "),
        (classifier(opset=9).SerializeToString(), EngineBuildError, "model 'm0': opset of "),
    ],
    ids=["missing", "empty", "text", "truncated", "old-opset"],
)
def test_refuses_files(
    tmp_path: Path, data: bytes | None, error: type[Exception], message: str
) -> None:
    recipe = recipe_of(tmp_path, (classifier(), {}))
    (tmp_path / "m0.onnx").unlink()
    if data is not None:
        (tmp_path / "m0.onnx").write_bytes(data)
    with pytest.raises(error) as raised:
        build(recipe, tmp_path / "a")
    assert str(raised.value).startswith(message)
    assert "m0.onnx" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "a").exists()


def test_refuses_labels_of_another_number(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    labels = LabelsFile(str(tmp_path / "labels.txt"))
    with pytest.raises(ConfigError, match="model 'm0': classes in its output 'scores' of 4"):
        made(tmp_path, (classifier(), {}), classes=labels)


def test_refuses_an_operator_that_onnxruntime_lacks(tmp_path: Path) -> None:
    net = Net()
    raw = net.pool(net.conv("image", 3, 4))
    net.add("Unknown", raw, out="scores", domain="com.example")
    model = net.model({"scores": ["N", 4]}, image=["N", 3, SIZE, SIZE])
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    with pytest.raises(EngineBuildError) as error:
        made(tmp_path, (model, {}))
    assert str(error.value).startswith("model 'm0': the model can't be loaded: ONNX Runtime says: ")
    assert "\n" not in str(error.value)
