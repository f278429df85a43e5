"""Small real cascades: a dataflow for the fake backend, and the same as a bundle of ONNX stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_runtime import Bundle, Cascade, Exit, Stage, TensorSpec
from engines.bundle import BuiltStage, write_bundle

CLASSES = ("north", "east", "south", "west")
IMAGE = TensorSpec("image", ("batch", "height", "width", 3), "uint8")
PIXELS = TensorSpec("pixels", ("batch", 3), "float32")
SAVER_LOGITS = TensorSpec("saver/logits", ("batch", 4), "float32")
FEATURES = TensorSpec("features", ("batch", 6), "float32")
DEEP = TensorSpec("deep", ("batch", 6), "float32")
MIDDLE_LOGITS = TensorSpec("middle/logits", ("batch", 4), "float32")
FINAL_LOGITS = TensorSpec("final/logits", ("batch", 4), "float32")

#: Shape, seed and scale of the weights of each stage behind the preprocessing.
DENSE = {
    "saver": ((3, 4), 1, 0.004),
    "segment1": ((3, 6), 2, 0.004),
    "head1": ((6, 4), 3, 0.5),
    "segment2": ((6, 6), 4, 1.0),
    "head2": ((6, 4), 5, 1.0),
}


def toy_cascade() -> Cascade:
    """Preprocess, a saver, two segments and two heads: three exits."""
    return Cascade(
        CLASSES,
        IMAGE,
        (
            Stage("preprocess", "preprocess", (IMAGE,), (PIXELS,)),
            Stage("saver", "saver", (PIXELS,), (SAVER_LOGITS,)),
            Stage("segment1", "segment", (PIXELS,), (FEATURES,)),
            Stage("head1", "head", (FEATURES,), (MIDDLE_LOGITS,)),
            # This one takes one sample at a time, as imported ONNX files often do.
            Stage("segment2", "segment", (_single(FEATURES),), (_single(DEEP),)),
            Stage("head2", "head", (DEEP,), (FINAL_LOGITS,)),
        ),
        (
            Exit("saver", "saver/logits"),
            Exit("middle", "middle/logits"),
            Exit("final", "final/logits"),
        ),
    )


def toy_bundle(out: Path) -> Bundle:
    """The toy cascade with random weights, as a bundle."""
    cascade = toy_cascade()
    models = {"preprocess": mean_model()}
    for stage in cascade.stages[1:]:
        shape, seed, scale = DENSE[stage.name]
        (source,), (target,) = stage.inputs, stage.outputs
        models[stage.name] = dense_model(
            source.name, target.name, *shape, seed=seed, scale=scale, batch=source.shape[0]
        )
    return write_bundle(
        out,
        name="toy",
        classes=cascade.classes,
        image=cascade.image,
        stages=[BuiltStage(stage, {"fp32": models[stage.name]}) for stage in cascade.stages],
        exits=cascade.exits,
        provenance={"made_by": "tests"},
    )


def toy_modules() -> dict[str, Any]:
    """The same stages as torch modules."""
    import torch

    class Mean(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.float().mean(dim=(1, 2))

    class Dense(torch.nn.Module):
        def __init__(self, *shape: int, seed: int, scale: float) -> None:
            super().__init__()
            weights = dense_weights(*shape, seed=seed, scale=scale)
            self.weights = torch.nn.Parameter(torch.from_numpy(weights))

        def forward(self, source: torch.Tensor) -> torch.Tensor:
            return torch.tanh(source @ self.weights) * 3

    dense = {name: Dense(*shape, seed=s, scale=c) for name, (shape, s, c) in DENSE.items()}
    return {"preprocess": Mean(), **dense}


def toy_images(count: int, seed: int = 0, height: int = 5, width: int = 7) -> np.ndarray:
    """Random images whose mean colours differ, shape (count, height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(0, 200, (count, 1, 1, 3))
    return (colour + rng.integers(0, 55, (count, height, width, 3))).astype(np.uint8)


def mean_model() -> bytes:
    """Images (batch, height, width, 3) uint8 -> mean colour (batch, 3) float32."""
    axes = numpy_helper.from_array(np.array([1, 2], np.int64), "axes")
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["pixels"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "mean",
        [
            helper.make_tensor_value_info(
                "image", TensorProto.UINT8, ["batch", "height", "width", 3]
            )
        ],
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3])],
        [axes],
    )
    return _model(graph)


def dense_model(
    source: str,
    target: str,
    width_in: int,
    width_out: int,
    *,
    seed: int,
    scale: float = 1.0,
    batch: str | int = "batch",
) -> bytes:
    """tanh(source @ weights * scale), times three."""
    weights = dense_weights(width_in, width_out, seed=seed, scale=scale)
    initializers = [
        numpy_helper.from_array(weights, "weights"),
        numpy_helper.from_array(np.float32(3), "three"),
    ]
    nodes = [
        helper.make_node("MatMul", [source, "weights"], ["product"]),
        helper.make_node("Tanh", ["product"], ["bent"]),
        helper.make_node("Mul", ["bent", "three"], [target]),
    ]
    graph = helper.make_graph(
        nodes,
        "dense",
        [helper.make_tensor_value_info(source, TensorProto.FLOAT, [batch, width_in])],
        [helper.make_tensor_value_info(target, TensorProto.FLOAT, [batch, width_out])],
        initializers,
    )
    return _model(graph)


def dense_weights(width_in: int, width_out: int, *, seed: int, scale: float) -> np.ndarray:
    """Random weights, shape (in, out), float32."""
    weights = np.random.default_rng(seed).standard_normal((width_in, width_out))
    return (weights * scale).astype(np.float32)


def _model(graph: onnx.GraphProto) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _single(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.name, (1, *spec.shape[1:]), spec.dtype)
