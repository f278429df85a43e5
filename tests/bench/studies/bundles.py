"""Bundles of an early-exit model of linear layers: each exit is better and surer than the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_runtime import Bundle, Exit, Stage, TensorSpec
from engines.bundle import BuiltStage, write_bundle

#: (layer, neck) of each exit.
EXITS = ((1, "lph"), (2, "lph"), (4, "gah"))
LAYERS = 6
SIDE = 5
IMAGE = TensorSpec("image", ("batch", SIDE, SIDE, 1), "uint8")


def spec(name: str, width: int) -> TensorSpec:
    return TensorSpec(name, ("batch", width), "float32")


def layered_bundle(
    out: Path,
    *,
    classes: int = 4,
    exits: Sequence[tuple[int, str]] = EXITS,
    layers: int = LAYERS,
    side: int = SIDE,
    saver: bool = False,
    model: Mapping[str, Any] | str | None = "described",
) -> Bundle:
    """Class k shows at pixel k; what an exit makes of it has less noise the later it comes.

    Args:
        out: The bundle's folder.
        classes: At most side * side.
        exits: (layer, neck) of each early exit.
        layers: Of the whole.
        side: Height and width of the images, which have one channel.
        saver: Whether a saver comes first.
        model: The provenance's "model"; None for none, "described" for the right one.
    """
    rng = np.random.default_rng(0)
    width = side * side
    image = TensorSpec("image", ("batch", side, side, 1), "uint8")
    stages = [built("preprocess", "preprocess", image, spec("pixels", width), None)]
    heads = []
    if saver:
        weights = head_weights(rng, width, classes, 0.0)
        stages.append(
            built("saver", "saver", spec("pixels", width), spec("saver_logits", classes), weights)
        )
        heads.append(Exit("saver", "saver_logits"))
    before = "pixels"
    for i, (layer, neck) in enumerate(exits, 1):
        features, logits = f"features_{layer}", f"logits_{layer}"
        depth = (layer + 1) / layers
        source = spec(before, width)
        eye = np.eye(width, dtype=np.float32)
        stages.append(built(f"segment{i}", "segment", source, spec(features, width), eye))
        weights = head_weights(rng, width, classes, depth)
        source = spec(features, width)
        head, exit_ = names(layer, neck)
        stages.append(built(head, "head", source, spec(logits, classes), weights))
        heads.append(Exit(exit_, logits))
        before = features
    last = f"segment{len(exits) + 1}"
    weights = head_weights(rng, width, classes, 1.0)
    source = spec(before, width)
    stages.append(built(last, "segment", source, spec("final_logits", classes), weights))
    if model == "described":
        model = description(exits, layers)
    return write_bundle(
        out,
        name="layered",
        classes=[f"class {k}" for k in range(classes)],
        image=image,
        stages=stages,
        exits=[*heads, Exit("final", "final_logits")],
        provenance={"made_by": "tests"} | ({} if model is None else {"model": model}),
    )


def names(layer: int, neck: str) -> tuple[str, str]:
    """Names of a head's stage and of its exit."""
    return (f"esn_{layer}",) * 2 if neck == "esn" else (f"head_{layer}", f"exit_{layer}")


def description(exits: Sequence[tuple[int, str]] = EXITS, layers: int = LAYERS) -> dict[str, Any]:
    """What an early-exit model says of itself."""
    ends = [layer + 1 for layer, _ in exits] + [layers]
    starts = [0, *ends[:-1]]
    return {
        "layers": layers,
        "exits": {
            f"exit_{layer}": {"layer": layer, "neck": neck}
            for layer, neck in exits
            if neck != "esn"
        },
        "segments": {
            f"segment{i}": {"layers": list(range(start, end))}
            for i, (start, end) in enumerate(zip(starts, ends, strict=True), 1)
        },
    }


def layered_images(
    count: int, *, classes: int = 4, side: int = SIDE, seed: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, side, side, 1) uint8 and labels; the higher the class, the fainter."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 90, (count, side * side))
    images[np.arange(count), labels] += (165 - 100 * labels / classes).astype(int)
    return images.astype(np.uint8).reshape(count, side, side, 1), labels


def head_weights(rng: np.random.Generator, width: int, classes: int, depth: float) -> np.ndarray:
    """Weights of a head at a depth in [0, 1], shape (width, classes), float32."""
    noise = rng.standard_normal((width, classes)) * 1.75 / np.sqrt(width)
    weights = np.eye(width)[:, :classes] + (1 - depth) * noise
    return ((4 + 10 * depth) * weights).astype(np.float32)


def built(
    name: str, kind: Any, source: TensorSpec, target: TensorSpec, weights: np.ndarray | None
) -> BuiltStage:
    """A stage that multiplies, or, without weights, makes numbers in [0, 1] of pixels."""
    stage = Stage(name, kind, (source,), (target,))
    if weights is not None:
        nodes = [helper.make_node("MatMul", [source.name, "weights"], [target.name])]
        constants = [numpy_helper.from_array(weights, "weights")]
    else:
        nodes = [
            helper.make_node("Cast", [source.name], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["floats"], ["flat"]),
            helper.make_node("Div", ["flat", "white"], [target.name]),
        ]
        constants = [numpy_helper.from_array(np.float32(255), "white")]
    graph = helper.make_graph(
        nodes,
        name,
        [value(source)],
        [value(target)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    return BuiltStage(stage, {"fp32": model.SerializeToString()})


def value(tensor: TensorSpec) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return helper.make_tensor_value_info(tensor.name, kind, list(tensor.shape))
