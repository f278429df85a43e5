"""The YAML of plain ONNX classifiers."""

from pathlib import Path

import pytest

from edge_runtime.errors import ConfigError
from engines.recipe import ImageRecipe, OutputRecipe, load_recipe

SMALL = """
name: test
classes: 2
models:
  - name: small
    file: small.onnx
    input: {size: [8, 8], range: [0, 1]}
"""


def load(tmp_path: Path, text: str):
    path = tmp_path / "cascade.yaml"
    path.write_text(text)
    return load_recipe(path)


def test_reads_everything(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        """
name: test
classes: {file: labels.txt}
image: {channels: 1, size: [480, 640]}
models:
  - name: small
    file: models/small.onnx
    input: {size: [8, 6], layout: NHWC, range: [-1, 1], crop: 0.875}
    output: {kind: probabilities, classes: [1, 3], tensor: softmax}
  - name: large
    file: /models/large.onnx
    input: {size: [16, 16], mean: [0.5], std: [0.25], antialias: true}
    cut_at: [a, b]
    exits: [early, late]
""",
    )
    (tmp_path / "labels.txt").write_text("cat\n\n dog \n")
    assert recipe.class_names == ("cat", "dog")
    assert recipe.image == ImageRecipe(channels=1, size=(480, 640))
    small, large = recipe.models
    assert small.file == str(tmp_path / "models/small.onnx")
    assert small.output == OutputRecipe("probabilities", (1, 3), "softmax")
    assert small.input.spec(1).layout == "NHWC"
    assert large.file == "/models/large.onnx"
    assert large.output == OutputRecipe("logits", None, None)
    assert large.input.spec(1).antialias
    assert (large.cut_at, large.exits) == (("a", "b"), ("early", "late"))


def test_classes_are_a_number_or_names(tmp_path: Path) -> None:
    assert load(tmp_path, SMALL).class_names == ("0", "1")
    named = SMALL.replace("classes: 2", "classes: [cat, dog]")
    assert load(tmp_path, named).class_names == ("cat", "dog")


def test_paths_of_variables_are_taken_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = SMALL.replace("small.onnx", "${EDGE_TEST_MODELS:-../models}/small.onnx")
    monkeypatch.delenv("EDGE_TEST_MODELS", raising=False)
    assert load(tmp_path, text).models[0].file == str(tmp_path / "../models/small.onnx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGE_TEST_MODELS", "here")
    assert load(tmp_path, text).models[0].file == str(tmp_path / "here/small.onnx")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: small", "nam: small", "unknown key 'nam'. Did you mean 'name'?"),
        ("    file: small.onnx\n", "", "the key 'file' is missing"),
        ("name: small", "name: small/one", "name of a model: got 'small/one'"),
        ("range: [0, 1]", "range: [0, 1, 2]", "range: got 3 values, expected 2"),
        ("range: [0, 1]", "range: [1, 0]", "range: got [1.0, 0.0]"),
        ("range: [0, 1]", "crop: 0.9", "normalisation: got nothing"),
        ("range: [0, 1]", "range: [0, 1], layout: CHW", "layout: got 'CHW'"),
        ("range: [0, 1]", "range: [0, 1], crop: 2", "crop: got 2.0"),
        ("range: [0, 1]", "range: [0, 1], crop: 1e-1", "'1e-1' is "),
        ("range: [0, 1]", "range: [0, 1], antialias: on", "'on' is "),
        ("classes: 2", "classes: {fil: x}", "unknown key 'fil'"),
        ("classes: 2", "classes: 2\nclasses: 3", "the key 'classes' appears twice"),
        ("classes: 2", "image: {channels: 2}\nclasses: 2", "channels: got 2, expected 1 or 3"),
        ("models:", "models: []\nmodel:", "unknown key 'model'"),
        ("[8, 8], range", "[8, 8], mean: [0.5, 0.5], std: [1.0], rang", "unknown key 'rang'"),
        (
            "    input",
            "    output: {classes: [3, 3]}\n    input",
            "classes: got [3, 3], expected [first, last + 1]",
        ),
        ("    input", "    output: {kind: scores}\n    input", "kind: got 'scores'"),
        ("    input", "    cut_at: [a, a]\n    input", "cut_at names a tensor twice"),
        ("    input", "    exits: [a, b]\n    input", "model 'small' has 2 exits and is not cut"),
        (
            "    input",
            "    exits: [a]\n    output: {tensor: b}\n    input",
            "output.tensor and exits exclude each other",
        ),
    ],
)
def test_refuses(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SMALL
    with pytest.raises(ConfigError) as error:
        load(tmp_path, SMALL.replace(old, new))
    assert message in str(error.value)
    assert str(tmp_path / "cascade.yaml") in str(error.value)
    assert "\n" not in str(error.value)


def test_refuses_no_models_and_equal_names(tmp_path: Path) -> None:
    empty = SMALL[: SMALL.index("models:")] + "models: []\n"
    with pytest.raises(ConfigError, match="models: got none"):
        load(tmp_path, empty)
    with pytest.raises(ConfigError, match="models: a name is used twice: got small, small"):
        load(tmp_path, SMALL + SMALL[SMALL.index("  - name") :])


def test_labels_that_can_t_be_read(tmp_path: Path) -> None:
    recipe = load(tmp_path, SMALL.replace("classes: 2", "classes: {file: labels.txt}"))
    with pytest.raises(ConfigError, match=r"classes: .*labels.txt can't be read"):
        _ = recipe.class_names
