"""Toy bundles with variants, data for them, and made-up times: what tests of precisions share."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

import edge_runtime as er
from calib.sensitivity import Mixes
from calib.variant_times import VariantTimes
from edge_runtime import Bundle, OperatingPoint
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset
from edge_runtime.scheduler import Scheduler
from edge_runtime.timing import Ratio
from engines.bundle import BuiltStage, write_bundle
from engines.verify import run_stages
from tests.toys import CLASSES, DENSE, dense_model, mean_model, toy_cascade, toy_images

FASTER, SLOWER, UNSURE = (0.5, 0.48, 0.52), (1.4, 1.3, 1.5), (0.95, 0.85, 1.02)


def trained_models() -> dict[str, bytes]:
    """The toy cascade with exits that mostly agree: the earlier, the worse."""
    random = np.random.default_rng(7)
    colours = random.standard_normal((3, 4)) * 0.004
    first_four = np.eye(6, 4)
    weights = {
        "saver": colours + random.standard_normal((3, 4)) * 0.001,
        "segment1": np.concatenate([colours, random.standard_normal((3, 2)) * 0.004], axis=1),
        "head1": first_four * 0.5 + random.standard_normal((6, 4)) * 0.03,
        "segment2": np.eye(6) * 0.3,
        "head2": first_four * 0.5,
    }
    models = {"preprocess": mean_model()}
    for stage in toy_cascade().stages[1:]:
        (source,), (target,) = stage.inputs, stage.outputs
        shape, seed, _ = DENSE[stage.name]
        model = dense_model(source.name, target.name, *shape, seed=seed, batch=source.shape[0])
        models[stage.name] = with_constant(model, "weights", weights[stage.name])
    return models


def with_constant(model: bytes, name: str, value: np.ndarray) -> bytes:
    """A toy model with another constant."""
    loaded = onnx.load_from_string(model)
    (tensor,) = (tensor for tensor in loaded.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
    return loaded.SerializeToString()


def scaled(model: bytes, factor: float) -> bytes:
    """The same model with its outputs scaled: of logits, a temperature."""
    return with_constant(model, "three", np.array(3 * factor))


def ruined(model: bytes) -> bytes:
    """The same model with the columns of its weights in another order."""
    loaded = onnx.load_from_string(model)
    weights = numpy_helper.to_array(loaded.graph.initializer[0])
    return with_constant(model, "weights", np.roll(weights, 1, axis=1))


def slow(model: bytes, products: int = 6) -> bytes:
    """A toy model with the same outputs that takes longer, by some products of 3 us each."""
    loaded = onnx.load_from_string(model)
    graph = loaded.graph
    source, target = graph.input[0].name, graph.output[0].name
    graph.node[-1].output[0] = "light"
    width = graph.input[0].type.tensor_type.shape.dim[1].dim_value
    for name, value in (
        ("widen", np.ones((width, 256), np.float32)),
        ("same", np.eye(256, dtype=np.float32)),
        ("last_axis", np.array([-1])),
        ("zero", np.float32(0)),
    ):
        graph.initializer.append(numpy_helper.from_array(value, name))
    graph.node.append(helper.make_node("MatMul", [source, "widen"], ["wide0"]))
    for i in range(products):
        graph.node.append(helper.make_node("MatMul", [f"wide{i}", "same"], [f"wide{i + 1}"]))
    graph.node.append(helper.make_node("ReduceMean", [f"wide{products}", "last_axis"], ["mean"]))
    graph.node.append(helper.make_node("Mul", ["mean", "zero"], ["nothing"]))
    graph.node.append(helper.make_node("Add", ["light", "nothing"], [target]))
    return loaded.SerializeToString()


def write_toy(
    out: Path, variants: Mapping[str, bytes], *, defaults: Mapping[str, bytes] | None = None
) -> Bundle:
    """A bundle of the trained toy, some stages with a variant "int8"."""
    cascade, models = toy_cascade(), {**trained_models(), **(defaults or {})}
    return write_bundle(
        out,
        name="toy",
        classes=CLASSES,
        image=cascade.image,
        stages=[
            BuiltStage(
                stage,
                {"fp32": models[stage.name]}
                | ({"int8": variants[stage.name]} if stage.name in variants else {}),
            )
            for stage in cascade.stages
        ],
        exits=cascade.exits,
        provenance={},
    )


@functools.cache
def toy_data(count: int = 400) -> ImageDataset:
    """Images labelled by the last exit, with every tenth label wrong."""
    images = toy_images(count)
    logits = run_stages(toy_cascade(), trained_models(), images)["final/logits"]
    labels = logits.argmax(axis=1)
    labels[::10] = (labels[::10] + 1) % 4
    return ImageDataset.from_arrays(images, labels, CLASSES)


def quiet() -> Console:
    return Console(stdout=io.StringIO(), stderr=io.StringIO())


def opener(bundle: Bundle):
    def open_scheduler(point: OperatingPoint) -> Scheduler:
        return er.load(bundle, operating_point=point, image_size=(5, 7))

    return open_scheduler


def mixes_of(bundle: Bundle, metric: str = "max_softmax", **options) -> Mixes:
    return Mixes(bundle, toy_data(), quiet(), opener(bundle), metric, **options)


def times_of(bundle: Bundle, ratios: Mapping[str, tuple[float, float, float]]) -> VariantTimes:
    """Made-up times: every stage takes 1 ms, its variant as the ratio (value, low, high) says."""
    seconds = {stage.name: {"fp32": 1e-3} for stage in bundle.cascade.stages}
    for name, (value, *_) in ratios.items():
        seconds[name]["int8"] = value * 1e-3
    found = {name: Ratio(*ratios[name]) for name in seconds if name in ratios}
    return VariantTimes("int8", dict.fromkeys(seconds, "fp32"), seconds, found)
