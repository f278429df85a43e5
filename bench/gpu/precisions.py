"""Bundles at every precision for `bench.gpu.engines`: what people run, at the sizes they run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.manifest import Bundle

ROOT = Path(__file__).parents[2]
RESNET = "ResNet-50, 4 exits, random weights"
#: Makes a bundle and images for it, shape (n, height, width, channels).
Maker = Callable[[], tuple[Bundle, NDArray[np.uint8]]]
#: Images that INT8 ranges are measured on.
_CALIBRATION = 64


def digits() -> tuple[Bundle, NDArray[np.uint8]]:
    """The example of this repository, and its test images."""
    with np.load(ROOT / "examples/digits/test.npz", allow_pickle=False) as file:
        images = file["images"].reshape(-1, 8, 8, 1)
    return Bundle.open(ROOT / "examples/digits/digits.bundle"), images


def resnet(out: Path) -> tuple[Bundle, NDArray[np.uint8]]:
    """A ResNet-50 with four exits and random weights, and noise."""
    from bench.gpu.models import resnet_with_exits
    from engines.export import TorchStage, export_stages
    from engines.preprocess import PreprocessSpec

    model = resnet_with_exits()
    stages = [
        TorchStage(
            stage.name,
            stage.kind,
            model.modules[stage.name],
            tuple(spec.name for spec in stage.inputs),
            tuple(spec.name for spec in stage.outputs),
        )
        for stage in model.cascade.stages
        if stage.kind != "preprocess"
    ]
    images = np.random.default_rng(0).integers(0, 256, (_CALIBRATION, 224, 224, 3), np.uint8)
    bundle = export_stages(
        stages,
        model.cascade.exits,
        example=images[:1],
        image_size=(224, 224),
        preprocess=PreprocessSpec(size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3),
        classes=model.cascade.classes,
        out=out,
        name="resnet50-random",
        one_piece_check=False,
    )
    return bundle, images


def with_precisions(bundle: Bundle, images: NDArray[np.uint8], out: Path) -> Bundle:
    """The bundle with FP16 and INT8 variants of its stages.

    INT8 ranges are measured on the images that are run later: times and agreement are of interest
    here, and accuracy on other images is not.
    """
    from engines.bundle import with_variants
    from engines.fp16 import convert

    models: dict[str, dict[str, bytes]] = {}
    for record in bundle.manifest.stages:
        if record.kind != "preprocess":
            model = bundle.stage_model(record.name, "fp32")
            models[record.name] = {"fp16": convert(model).model}
    for name, model in _int8(bundle, images).items():
        models[name]["int8"] = model
    return with_variants(bundle, models, out, provenance={"made_by": "python -m bench.gpu_check"})


def _int8(bundle: Bundle, images: NDArray[np.uint8]) -> dict[str, bytes]:
    from calib.int8 import histograms, ranges_of
    from engines import parts
    from engines.quantize import activations, quantize

    chain = parts.bundle_parts(bundle, None, "int8")
    float_models = {
        record.name: bundle.stage_model(record.name, "fp32")
        for record in bundle.manifest.stages
        if record.kind != "preprocess"
    }
    tensors = {name: activations(model) for name, model in float_models.items()}
    image = bundle.cascade.image.name
    batches = ({image: one[None]} for one in images[:_CALIBRATION])
    ranges = ranges_of(histograms(chain, batches, tensors), "mse", {})
    return {
        name: quantize(model, ranges.stages[name]).model for name, model in float_models.items()
    }
