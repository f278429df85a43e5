"""Plain ONNX classifiers become cascades that compute what the files compute."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.backends.onnxrt import new_session
from edge_runtime.errors import ConfigError
from edge_runtime.manifest import Bundle
from engines.import_onnx import build
from engines.recipe import ImageRecipe, InputRecipe, ModelRecipe, OutputRecipe, Recipe
from tests.engines.classifiers import SIZE, Net, classifier, residual_classifier, save
from tests.engines.conftest import chain

IMAGES = np.random.default_rng(2).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)


def recipe_of(tmp_path: Path, *models: tuple[onnx.ModelProto, dict], **changes) -> Recipe:
    """A recipe of models that are saved as m0.onnx, m1.onnx, ..."""
    recipes = []
    for i, (model, options) in enumerate(models):
        path = save(model, tmp_path / f"m{i}.onnx")
        defaults = {"name": f"m{i}", "input": InputRecipe((SIZE, SIZE), range=(-1.0, 1.0))}
        recipes.append(ModelRecipe(file=str(path), **(defaults | options)))
    return Recipe(**({"name": "test", "classes": 4, "models": tuple(recipes)} | changes))


def made(tmp_path: Path, *models: tuple[onnx.ModelProto, dict], **changes) -> Bundle:
    return build(recipe_of(tmp_path, *models, **changes), tmp_path / "out.bundle")


def original(tmp_path: Path, i: int, pixels: np.ndarray) -> list[np.ndarray]:
    """What a file itself gives, one sample at a time; the file may be fixed to one."""
    session = new_session((tmp_path / f"m{i}.onnx").read_bytes())
    runs = [session.run(None, {"image": pixels[k : k + 1]}) for k in range(len(pixels))]
    return [np.concatenate(values) for values in zip(*runs, strict=True)]


def test_two_classifiers_become_a_cascade(tmp_path: Path) -> None:
    nhwc = InputRecipe((SIZE, SIZE), layout="NHWC", mean=(0.5,), std=(0.25,), crop=0.9)
    bundle = made(
        tmp_path,
        (classifier(seed=1), {"name": "m0"}),
        (classifier(seed=2, layout="NHWC"), {"name": "m1", "input": nhwc}),
    )
    assert [(r.name, r.kind) for r in bundle.manifest.stages] == [
        ("m0.preprocess", "preprocess"),
        ("m0", "saver"),
        ("m1.preprocess", "preprocess"),
        ("m1", "segment"),
    ]
    assert [e.name for e in bundle.cascade.exits] == ["m0", "m1"]
    have = chain(bundle, IMAGES)
    assert have["m0.pixels"].shape == (3, 3, SIZE, SIZE)
    assert have["m1.pixels"].shape == (3, SIZE, SIZE, 3)
    for i in range(2):
        (want,) = original(tmp_path, i, have[f"m{i}.pixels"])
        np.testing.assert_allclose(have[f"m{i}.logits"], want, rtol=1e-5, atol=1e-6)


def test_names_of_two_models_never_meet(tmp_path: Path) -> None:
    """Both files name their tensors alike; only the image is common to both."""
    nhwc = InputRecipe((SIZE, SIZE), layout="NHWC", range=(0.0, 1.0))
    bundle = made(
        tmp_path, (classifier(), {}), (classifier(layout="NHWC", seed=3), {"input": nhwc})
    )
    names = []
    for stage in ("m0", "m1"):
        graph = onnx.load_model_from_string(bundle.stage_model(stage, "fp32")).graph
        names.append(
            {n for node in graph.node for n in node.output} | {t.name for t in graph.initializer}
        )
    assert names[0].isdisjoint(names[1])


def test_models_with_the_same_input_share_a_preprocess_stage(tmp_path: Path) -> None:
    bundle = made(tmp_path, (classifier(), {}), (classifier(seed=1), {}))
    assert [r.name for r in bundle.manifest.stages] == ["m0.preprocess", "m0", "m1"]
    assert bundle.record("m1").inputs[0].name == "m0.pixels"


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
@pytest.mark.parametrize("background", [False, True], ids=["all", "sliced"])
def test_outputs_become_logits_of_the_classes(tmp_path: Path, kind: str, background: bool) -> None:
    model = classifier(classes=6 if background else 4, probabilities=kind == "probabilities")
    output = OutputRecipe(kind, (1, 5) if background else None)
    bundle = made(tmp_path, (model, {"output": output}))
    have = chain(bundle, IMAGES)
    (scores,) = original(tmp_path, 0, have["m0.pixels"])
    want = scores[:, 1:5] if background else scores
    if kind == "probabilities":
        want = np.log(want)
    assert have["m0.logits"].shape == (3, 4)
    np.testing.assert_allclose(have["m0.logits"], want, rtol=1e-4, atol=1e-5)


def test_a_probability_of_zero_is_a_finite_logit(tmp_path: Path) -> None:
    net = Net()
    raw = net.dense(net.pool(net.conv("image", 3, 6)), 6, 4)
    hard = net.add("Mul", raw, net.constant(np.array(1e4, np.float32)))
    net.add("Softmax", hard, out="scores", axis=1)
    model = net.model({"scores": ["N", 4]}, image=["N", 3, SIZE, SIZE])
    logits = chain(made(tmp_path, (model, {"output": OutputRecipe("probabilities")})), IMAGES)[
        "m0.logits"
    ]
    assert np.isfinite(logits).all()
    assert logits.min() == pytest.approx(np.log(1e-7))


def test_another_tensor_can_be_the_output(tmp_path: Path) -> None:
    output = OutputRecipe("logits", tensor="raw")
    bundle = made(tmp_path, (classifier(probabilities=True), {"output": output}))
    have = chain(bundle, IMAGES)
    (probabilities,) = original(tmp_path, 0, have["m0.pixels"])
    shifted = np.exp(have["m0.logits"] - have["m0.logits"].max(axis=1, keepdims=True))
    np.testing.assert_allclose(
        shifted / shifted.sum(axis=1, keepdims=True), probabilities, rtol=1e-4
    )
    graph = onnx.load_model_from_string(bundle.stage_model("m0", "fp32")).graph
    assert "Softmax" not in {node.op_type for node in graph.node}


def test_scores_with_axes_of_one_are_flattened(tmp_path: Path) -> None:
    net = Net()
    weights = net.constant(net.rng.standard_normal((4, 3, 1, 1)).astype(np.float32))
    net.add("GlobalAveragePool", net.add("Conv", "image", weights), out="scores")
    model = net.model({"scores": ["N", 4, 1, 1]}, image=["N", 3, SIZE, SIZE])
    bundle = made(tmp_path, (model, {}))
    have = chain(bundle, IMAGES)
    (want,) = original(tmp_path, 0, have["m0.pixels"])
    np.testing.assert_allclose(have["m0.logits"], want[:, :, 0, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "reshape", "note"),
    [
        ("N", None, "symbolic"),
        ("N", (-1, 4), "symbolic"),
        (1, None, "fixed 1 in the file, made symbolic and checked"),
        (1, (1, 4), "fixed 1 in the file, made symbolic and checked"),
        (1, (1, -1), "fixed 1 in the file, made symbolic and checked"),
    ],
)
def test_a_batch_is_made_symbolic_where_that_works(
    tmp_path: Path, batch: int | str, reshape: tuple[int, ...] | None, note: str
) -> None:
    bundle = made(tmp_path, (classifier(batch=batch, reshape=reshape), {}))
    assert bundle.manifest.provenance["models"][0]["batch"] == note
    assert str(bundle.record("m0").inputs[0]) == f"(batch, 3, {SIZE}, {SIZE}) float32"
    have = chain(bundle, IMAGES)
    (want,) = original(tmp_path, 0, have["m0.pixels"])
    np.testing.assert_allclose(have["m0.logits"], want, rtol=1e-5, atol=1e-6)


def one_sample_model() -> onnx.ModelProto:
    """Its normalisation is over the whole tensor, so a batch would mix its samples."""
    net = Net()
    mean = net.add("ReduceMean", "image", keepdims=0)
    raw = net.dense(net.pool(net.conv(net.add("Sub", "image", mean), 3, 6)), 6, 4)
    net.add("Identity", raw, out="scores")
    return net.model({"scores": [1, 4]}, image=[1, 3, SIZE, SIZE])


def test_a_batch_of_one_stays_where_samples_would_mix(tmp_path: Path) -> None:
    bundle = made(tmp_path, (one_sample_model(), {}), (classifier(seed=4), {}))
    note = bundle.manifest.provenance["models"][0]["batch"]
    assert note == "1, because a batch of 3 gives other values of 'scores' than single runs"
    record = bundle.record("m0")
    assert str(record.inputs[0]) == f"(1, 3, {SIZE}, {SIZE}) float32"
    assert str(record.outputs[0]) == "(1, 4) float32"
    have = chain(bundle, IMAGES)
    (want,) = original(tmp_path, 0, have["m0.pixels"])
    np.testing.assert_allclose(have["m0.logits"], want, rtol=1e-5, atol=1e-6)


def test_a_symbolic_batch_that_does_not_work_is_fixed_to_one(tmp_path: Path) -> None:
    model = classifier(batch="N", reshape=(4,))
    shape = next(t for t in model.graph.initializer if t.name == "shape")
    shape.CopyFrom(numpy_helper.from_array(np.array([2, 2], np.int64), "shape"))
    model.graph.node[-1].CopyFrom(
        helper.make_node("Flatten", [model.graph.node[-1].input[0]], ["flat"], axis=0)
    )
    model.graph.node.append(helper.make_node("Identity", ["flat"], ["scores"]))
    bundle = made(tmp_path, (model, {}))
    assert (
        bundle.manifest.provenance["models"][0]["batch"] == "1, because a batch of 3 can't be run"
    )
    assert str(bundle.record("m0").inputs[0]).startswith("(1, ")


def test_open_lengths_of_an_input_are_filled_in(tmp_path: Path) -> None:
    model = classifier()
    for axis in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        axis.Clear()
    bundle = made(tmp_path, (model, {}))
    assert str(bundle.record("m0").inputs[0]) == f"(batch, 3, {SIZE}, {SIZE}) float32"


@pytest.mark.parametrize("opset", [11, 13, 17, 21])
def test_preprocessing_has_the_opset_of_its_model(tmp_path: Path, opset: int) -> None:
    bundle = made(
        tmp_path,
        (classifier(opset=opset, probabilities=True), {"output": OutputRecipe("probabilities")}),
    )
    for record in bundle.manifest.stages:
        for variant in record.variants:
            model = onnx.load_model_from_string(bundle.stage_model(record.name, variant))
            assert [entry.version for entry in model.opset_import] == [opset]


def test_a_model_is_cut_into_segments(tmp_path: Path) -> None:
    bundle = made(tmp_path, (residual_classifier(), {"cut_at": ("a", "sum")}))
    assert [(r.name, r.kind) for r in bundle.manifest.stages] == [
        ("m0.preprocess", "preprocess"),
        ("m0.1", "segment"),
        ("m0.2", "segment"),
        ("m0.3", "segment"),
    ]
    assert [r.outputs[0].name for r in bundle.manifest.stages] == [
        "m0.pixels", "m0/a", "m0/sum", "m0.logits",
    ]  # fmt: skip
    have = chain(bundle, IMAGES)
    (want,) = original(tmp_path, 0, have["m0.pixels"])
    np.testing.assert_allclose(have["m0.logits"], want, rtol=1e-5, atol=1e-6)


def test_exits_of_a_model_become_heads_on_the_nearest_cut(tmp_path: Path) -> None:
    options = {"cut_at": ("a", "sum"), "exits": ("early", "later/exit", "final")}
    bundle = made(tmp_path, (residual_classifier(exits=True), options))
    assert [(r.name, r.kind, r.inputs[0].name) for r in bundle.manifest.stages] == [
        ("m0.preprocess", "preprocess", "image"),
        ("m0.1", "segment", "m0.pixels"),
        ("m0.early", "head", "m0/a"),
        ("m0.2", "segment", "m0/a"),
        ("m0.later_exit", "head", "m0/sum"),
        ("m0.3", "segment", "m0/sum"),
    ]
    assert [(e.name, e.logits) for e in bundle.cascade.exits] == [
        ("m0.early", "m0.early.logits"),
        ("m0.later_exit", "m0.later_exit.logits"),
        ("m0.final", "m0.final.logits"),
    ]
    have = chain(bundle, IMAGES)
    wanted = original(tmp_path, 0, have["m0.pixels"])
    for exit_, want in zip(bundle.cascade.exits, wanted, strict=True):
        np.testing.assert_allclose(have[exit_.logits], want, rtol=1e-5, atol=1e-6)


def test_a_saver_in_front_of_a_cut_model(tmp_path: Path) -> None:
    options = {"cut_at": ("a",), "exits": ("early", "final")}
    bundle = made(tmp_path, (classifier(), {}), (residual_classifier(exits=True), options))
    assert [(r.name, r.kind) for r in bundle.manifest.stages] == [
        ("m0.preprocess", "preprocess"),
        ("m0", "saver"),
        ("m1.1", "segment"),
        ("m1.early", "head"),
        ("m1.2", "segment"),
    ]


def test_int8_models_are_called_so(tmp_path: Path) -> None:
    net = Net()
    scale, zero = net.constant(np.float32(0.01)), net.constant(np.uint8(128))
    tensor = net.add("QuantizeLinear", "image", scale, zero)
    tensor = net.add("DequantizeLinear", tensor, scale, zero)
    net.add("Identity", net.dense(net.pool(net.conv(tensor, 3, 6)), 6, 4), out="scores")
    model = net.model({"scores": ["N", 4]}, image=["N", 3, SIZE, SIZE])
    bundle = made(tmp_path, (model, {}))
    assert list(bundle.record("m0").variants) == ["int8"]


def test_external_data_is_taken_into_the_bundle(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, (classifier(), {}))
    inside = build(recipe, tmp_path / "inside")
    onnx.save(
        onnx.load(tmp_path / "m0.onnx"),
        tmp_path / "m0.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    outside = build(recipe, tmp_path / "outside")
    assert (tmp_path / "weights.bin").stat().st_size > 100
    np.testing.assert_array_equal(
        chain(outside, IMAGES)["m0.logits"], chain(inside, IMAGES)["m0.logits"]
    )


def test_provenance_names_the_files_and_what_was_verified(tmp_path: Path) -> None:
    bundle = made(tmp_path, (classifier(), {}))
    provenance = bundle.manifest.provenance
    assert provenance["models"][0]["file"] == "m0.onnx"
    assert len(provenance["models"][0]["sha256"]) == 64
    assert provenance["verification"]["worst_relative_error"]["m0"] <= 1e-4
    assert str(tmp_path) not in (bundle.path / "manifest.json").read_text()


def test_it_works_without_torch(tmp_path: Path) -> None:
    save(classifier(), tmp_path / "m.onnx")
    (tmp_path / "c.yaml").write_text(
        f"name: t\nclasses: 4\nmodels:\n  - name: m\n    file: m.onnx\n"
        f"    input: {{size: [{SIZE}, {SIZE}], range: [0, 1]}}\n"
    )
    code = """
import sys
from pathlib import Path
sys.modules["torch"] = None
from engines.import_onnx import build, load_recipe
build(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]))
"""
    command = [sys.executable, "-c", code, tmp_path / "c.yaml", tmp_path / "out"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    assert Bundle.open(tmp_path / "out").manifest.name == "t"


def test_refuses_a_cut_through_control_flow(tmp_path: Path) -> None:
    net = Net()
    features = net.conv("image", 3, 6, out="features")
    branches = {}
    for branch in ("then_branch", "else_branch"):
        node = helper.make_node("Identity", [features], [f"{branch}_out"])
        output = helper.make_tensor_value_info(f"{branch}_out", TensorProto.FLOAT, None)
        branches[branch] = helper.make_graph([node], branch, [], [output])
    always = net.constant(np.array(True))
    net.add("If", always, out="chosen", **branches)
    net.add("Identity", net.dense(net.pool("chosen"), 6, 4), out="scores")
    model = net.model({"scores": ["N", 4]}, image=["N", 3, SIZE, SIZE])
    whole = made(tmp_path, (model, {}))
    have = chain(whole, IMAGES)
    (want,) = original(tmp_path, 0, have["m0.pixels"])
    np.testing.assert_allclose(have["m0.logits"], want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="a graph with If, Loop or Scan can't be cut"):
        build(recipe_of(tmp_path, (model, {"cut_at": ("features",)})), tmp_path / "b")


def test_a_fixed_camera_size(tmp_path: Path) -> None:
    bundle = made(tmp_path, (classifier(), {}), image=ImageRecipe(size=(20, 30)))
    assert str(bundle.cascade.image) == "(batch, 20, 30, 3) uint8"
    assert chain(bundle, IMAGES)["m0.logits"].shape == (3, 4)


def test_an_old_bundle_is_replaced_only_when_asked(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, (classifier(), {}))
    first = build(recipe, tmp_path / "a")
    with pytest.raises(ConfigError, match=r"exists.*--force"):
        build(recipe, tmp_path / "a")
    assert build(recipe, tmp_path / "a", overwrite=True).hash == first.hash
