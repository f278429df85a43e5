"""From what a classifier hands out to logits of the cascade's classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.tensors import TensorSpec
from engines.onnx_graph import value_info
from engines.onnx_package import onnx
from engines.recipe import OutputRecipe

#: Probabilities below this are taken for it: the logarithm of 0 is no logit.
MIN_PROBABILITY = 1e-7


def append_logits(
    model: onnx.ModelProto, name: str, scores: TensorSpec, recipe: OutputRecipe
) -> TensorSpec:
    """Append the conversion to a model's only output, in place.

    Args:
        model: A model whose output holds scores.
        name: Name of the logits.
        scores: Shape of its output: (batch, scores), or (batch, scores, 1, 1).
        recipe: What the scores mean.

    Returns:
        Spec of the logits, the model's new output.
    """
    graph = model.graph
    tensor = graph.output[0].name
    width = int(scores.shape[1])
    first, end = recipe.classes or (0, width)

    def add(operator: str, *constants: NDArray[Any], **attributes: Any) -> None:
        nonlocal tensor
        output = f"{name}/{operator.lower()}"
        inputs = [tensor]
        for i, values in enumerate(constants):
            graph.initializer.append(onnx.numpy_helper.from_array(values, f"{output}_{i}"))
            inputs.append(f"{output}_{i}")
        graph.node.append(onnx.helper.make_node(operator, inputs, [output], output, **attributes))
        tensor = output

    if len(scores.shape) > 2:
        add("Flatten", axis=1)
    if (first, end) != (0, width):
        add("Slice", *(np.array([value], np.int64) for value in (first, end, 1)))
    if recipe.kind == "probabilities":
        add("Max", np.array(MIN_PROBABILITY, np.float32))
        add("Log")
    graph.node.append(onnx.helper.make_node("Identity", [tensor], [name], name))
    logits = TensorSpec(name, (scores.shape[0], end - first), scores.dtype)
    del graph.output[:]
    graph.output.append(value_info(logits))
    return logits


def as_logits(scores: NDArray[Any], recipe: OutputRecipe) -> NDArray[np.float32]:
    """The same in numpy, to compare with.

    Args:
        scores: What the original hands out, shape (batch, scores) or (batch, scores, 1, 1).
        recipe: What the scores mean.

    Returns:
        Logits, shape (batch, classes).
    """
    flat = scores.reshape(len(scores), -1)
    kept = flat[:, slice(*recipe.classes)] if recipe.classes is not None else flat
    if recipe.kind == "probabilities":
        kept = np.log(np.maximum(kept, np.float32(MIN_PROBABILITY)))
    logits: NDArray[np.float32] = kept.astype(np.float32)
    return logits
