"""The stages of an exit as one model."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.backends.onnxrt import new_session
from edge_runtime.cascade import Exit, Stage
from edge_runtime.errors import ConfigError, EngineBuildError
from edge_runtime.manifest import Bundle
from edge_runtime.tensors import TensorSpec
from engines.bundle import BuiltStage, write_bundle
from engines.import_onnx import build
from engines.one_piece import one_piece
from tests.engines.classifiers import classifier, residual_classifier
from tests.engines.conftest import chain
from tests.engines.test_import_onnx import IMAGES, one_sample_model, recipe_of


def spec(name: str, batch: str | int = "batch") -> TensorSpec:
    return TensorSpec(name, (batch, 2), "float32")


def stage(
    name: str, inputs: str, output: str, *, factor: float = 1, opset: int = 18, domain: str = ""
) -> BuiltStage:
    """Adds its inputs and multiplies; its inner names are alike in every stage."""
    sources = inputs.split()
    graph = helper.make_graph(
        [
            helper.make_node("Sum", sources, ["inner"], "node"),
            helper.make_node("Mul", ["inner", "factor"], [output], "node2"),
        ],
        "stage",
        [helper.make_tensor_value_info(s, TensorProto.FLOAT, ["batch", 2]) for s in sources],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(np.float32(factor), "factor")],
    )
    opsets = [helper.make_opsetid("", opset)]
    if domain:
        opsets.append(helper.make_opsetid(domain, opset))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    kind = "head" if output.endswith("logits") else "segment"
    return BuiltStage(
        Stage(name, kind, tuple(spec(s) for s in sources), (spec(output),)), {"fp32": model}
    )


def bundle_of(out: Path, stages: list[BuiltStage], *logits: str) -> Bundle:
    return write_bundle(
        out,
        name="test",
        classes=("a", "b"),
        image=spec("image"),
        stages=stages,
        exits=[Exit(name.split(".")[0], name) for name in logits],
        provenance={},
    )


def run(model: bytes, image: np.ndarray, name: str = "image") -> np.ndarray:
    (output,) = new_session(model).run(None, {name: image})
    return output


X = np.array([[1, 2], [3, 4]], np.float32)


def test_names_that_collide_are_kept_apart(tmp_path: Path) -> None:
    stages = [
        stage("s1", "image", "a", factor=2),
        stage("s2", "a", "b", factor=3),
        stage("h", "b", "only.logits", factor=5),
    ]
    model = one_piece(bundle_of(tmp_path / "b", stages, "only.logits"), "only")
    np.testing.assert_array_equal(run(model, X), 30 * X)


def test_a_tensor_and_the_image_may_have_several_readers(tmp_path: Path) -> None:
    """A diamond: two stages read the image, two read `a`, and the head reads three tensors."""
    stages = [
        stage("s1", "image", "a", factor=2),
        stage("s2", "image a", "b", factor=3),
        stage("h", "image a b", "only.logits", factor=1),
    ]
    model = one_piece(bundle_of(tmp_path / "b", stages, "only.logits"), "only")
    np.testing.assert_array_equal(run(model, X), X + 2 * X + 9 * X)


def test_only_the_stages_of_the_exit_are_taken(tmp_path: Path) -> None:
    stages = [
        stage("s1", "image", "a", factor=2),
        stage("h1", "a", "early.logits", factor=7),
        stage("s2", "a", "b", factor=3),
        stage("h2", "b", "late.logits", factor=5),
    ]
    bundle = bundle_of(tmp_path / "b", stages, "early.logits", "late.logits")
    for name, want, nodes in (("early", 14 * X, 4), ("late", 30 * X, 6)):
        model = one_piece(bundle, name)
        np.testing.assert_array_equal(run(model, X), want)
        graph = onnx.load_model_from_string(model).graph
        assert [o.name for o in graph.output] == [f"{name}.logits"]
        assert len(graph.node) == nodes


def test_variants_can_be_chosen(tmp_path: Path) -> None:
    plain, other = (stage("h", "image", "only.logits", factor=f) for f in (2, 9))
    both = BuiltStage(plain.stage, {"fp32": plain.default, "fp16": other.default})
    bundle = bundle_of(tmp_path / "b", [both], "only.logits")
    np.testing.assert_array_equal(run(one_piece(bundle, "only"), X), 2 * X)
    np.testing.assert_array_equal(run(one_piece(bundle, "only", {"h": "fp16"}), X), 9 * X)
    with pytest.raises(ConfigError, match="stage 'h': variant: got 'int8'"):
        one_piece(bundle, "only", {"h": "int8"})


def test_refuses_an_exit_that_is_not_there(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "b", [stage("h", "image", "only.logits")], "only.logits")
    with pytest.raises(ConfigError, match=r"the bundle has no exit 'onyl'\. Did you mean 'only'"):
        one_piece(bundle, "onyl")


def test_refuses_stages_of_different_opsets(tmp_path: Path) -> None:
    stages = [stage("s1", "image", "a"), stage("h", "a", "only.logits", opset=17)]
    bundle = bundle_of(tmp_path / "b", stages, "only.logits")
    with pytest.raises(EngineBuildError) as error:
        one_piece(bundle, "only")
    assert str(error.value).startswith(
        "stages 's1' and 'h' can't be merged: their opsets of ai.onnx differ: got 18 and 17"
    )


def test_operators_of_other_domains_are_kept(tmp_path: Path) -> None:
    stages = [
        stage("s1", "image", "a"),
        stage("h", "a", "only.logits", domain="com.example"),
    ]
    model = one_piece(bundle_of(tmp_path / "b", stages, "only.logits"), "only")
    versions = {e.domain: e.version for e in onnx.load_model_from_string(model).opset_import}
    assert versions == {"": 18, "com.example": 18}


def test_a_stage_for_one_sample_makes_a_model_for_one_sample(tmp_path: Path) -> None:
    bundle = build(recipe_of(tmp_path, (one_sample_model(), {})), tmp_path / "b")
    model = one_piece(bundle, "m0")
    graph = onnx.load_model_from_string(model).graph
    assert [
        v.type.tensor_type.shape.dim[0].dim_value for v in (graph.input[0], graph.output[0])
    ] == [1, 1]
    want = chain(bundle, IMAGES[:1])["m0.logits"]
    np.testing.assert_allclose(run(model, IMAGES[:1]), want, rtol=1e-5)


@pytest.mark.parametrize("exit_name", ["m0", "m1.early", "m1.later_exit", "m1.final"])
def test_imported_models_in_one_piece_equal_their_stages(tmp_path: Path, exit_name: str) -> None:
    options = {"cut_at": ("a", "sum"), "exits": ("early", "later/exit", "final")}
    recipe = recipe_of(tmp_path, (classifier(), {}), (residual_classifier(exits=True), options))
    bundle = build(recipe, tmp_path / "b")
    want = chain(bundle, IMAGES)[f"{exit_name}.logits"]
    have = run(one_piece(bundle, exit_name), IMAGES)
    np.testing.assert_allclose(have, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.torch
@pytest.mark.parametrize("fixture", ["convolutional_bundle", "transformer_bundle"])
def test_exported_models_in_one_piece_equal_their_stages(
    request: pytest.FixtureRequest, fixture: str
) -> None:
    bundle: Bundle = request.getfixturevalue(fixture)
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (3, 33, 21, 3), dtype=np.uint8)
    if bundle.cascade.image.dtype == "float32":
        image = rng.standard_normal((3, 3, 16, 16)).astype(np.float32)
    tensors = chain(bundle, image)
    for exit_ in bundle.cascade.exits:
        want = tensors[exit_.logits]
        have = run(one_piece(bundle, exit_.name), image, bundle.cascade.image.name)
        np.testing.assert_allclose(have, want, atol=1e-4 * np.abs(want).max())
