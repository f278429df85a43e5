"""TensorRT parses and builds every stage that is exported."""

from pathlib import Path
from types import ModuleType

import pytest

from edge_runtime.backends.tensorrt.keys import CAST_FIRST
from edge_runtime.errors import EngineBuildError
from edge_runtime.manifest import Bundle, StageRecord
from edge_runtime.tensors import BATCH
from engines.import_onnx import build
from engines.preprocess import PreprocessSpec, camera_image, preprocess_model
from engines.recipe import InputRecipe, OutputRecipe
from tests.engines.classifiers import SIZE, classifier, residual_classifier
from tests.engines.test_import_onnx import one_sample_model, recipe_of
from tests.tensorrt_without_gpu import parse_and_build

pytestmark = pytest.mark.tensorrt

CAMERA = {BATCH: 1, "height": 48, "width": 64}


def build_stage(bundle: Bundle, record: StageRecord, precision: str) -> bytes:
    """Build an engine of a stage, for one image of a small camera."""
    shapes = {
        spec.name: tuple(CAMERA[a] if isinstance(a, str) else a for a in spec.shape)
        for spec in record.inputs
        if any(isinstance(axis, str) for axis in spec.shape)
    }
    return parse_and_build(bundle.stage_model(record.name, precision), shapes)


def build_all(bundle: Bundle, precision: str = "fp32") -> list[str]:
    """Build an engine of every stage, which must have the precision; returns their names."""
    for record in bundle.manifest.stages:
        variant = CAST_FIRST if record.kind == "preprocess" else precision
        assert build_stage(bundle, record, variant)
    return [record.name for record in bundle.manifest.stages]


@pytest.mark.torch
def test_exported_convolutions(tensorrt: ModuleType, convolutional_bundle: Bundle) -> None:
    names = ["preprocess", "saver", "segment1", "head1", "segment2", "head2"]
    assert build_all(convolutional_bundle) == names


@pytest.mark.torch
def test_exported_transformer(tensorrt: ModuleType, transformer_bundle: Bundle) -> None:
    assert build_all(transformer_bundle) == ["patches", "block1", "head1", "block2", "head2"]


def test_imported_models(tensorrt: ModuleType, tmp_path: Path) -> None:
    probabilities = classifier(classes=6, layout="NHWC", probabilities=True, batch=1, opset=13)
    nhwc = InputRecipe((SIZE, SIZE), layout="NHWC", range=(-1.0, 1.0), crop=0.875)
    exits = {"cut_at": ("a", "sum"), "exits": ("early", "later/exit", "final")}
    recipe = recipe_of(
        tmp_path,
        (probabilities, {"input": nhwc, "output": OutputRecipe("probabilities", (1, 5))}),
        (residual_classifier(exits=True), exits),
        (one_sample_model(), {}),
    )
    assert len(build_all(build(recipe, tmp_path / "b"))) == 9


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("opset", [11, 18, 20])
@pytest.mark.parametrize("size", [None, (48, 64)], ids=["any-size", "fixed-size"])
def test_preprocessing(
    tensorrt: ModuleType, layout: str, opset: int, size: tuple[int, int] | None
) -> None:
    spec = PreprocessSpec((32, 24), layout=layout, crop=0.875, mean=(0.4, 0.5, 0.6), std=(0.25,))
    model = preprocess_model(spec, camera_image(3, size), "pixels", opset, cast_first=True)
    assert parse_and_build(model.SerializeToString(), {"image": (1, 48, 64, 3)})


def test_the_cpu_s_variant_is_not_for_tensorrt(tensorrt: ModuleType) -> None:
    """Why there are two: when this builds too, the second variant can go."""
    spec = PreprocessSpec((32, 24), crop=0.875, range=(0, 1))
    model = preprocess_model(spec, camera_image(3), "pixels")
    with pytest.raises(EngineBuildError, match="UINT8"):
        parse_and_build(model.SerializeToString(), {"image": (1, 48, 64, 3)})
