"""A gate's predictor as ONNX, so that it can run in a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError
from edge_runtime.gate_model import ErrorPredictor, GateModel
from engines.onnx_package import onnx

_OPSET = 17
_IR_VERSION = 8


def to_onnx(model: GateModel, position: int) -> bytes:
    """The predictor of one exit as an ONNX model.

    Its inputs are `features`, float32 ("batch", 2 * classes + 4), as `gate_model.input_features`
    makes them, and `codes`, float32 ("paths", exits + 1), as `Paths.codes` does; its output
    `errors`, float32 ("batch", "paths"): probabilities of error, or of a gate of the kind
    "one_step" losses.

    Args:
        model: The gate.
        position: The exit, counted from 0; not the last.

    Returns:
        The file's bytes.

    Raises:
        ConfigError: The exit has no predictor.
        BackendUnavailable: onnx is not installed.
    """
    if not 0 <= position < len(model.predictors):
        raise ConfigError(
            "exit with a predictor", got=position, expected=f"0..{len(model.predictors) - 1}"
        )
    predictor = model.predictors[position]
    steps = [
        ("MatMul", ["features", "feature_weights"], "of_features"),
        ("Unsqueeze", ["of_features", "axis_1"], "of_samples"),
        ("MatMul", ["codes", "code_weights"], "of_codes"),
        ("Add", ["of_codes", "bias"], "of_paths"),
        ("Add", ["of_samples", "of_paths"], "summed"),
        ("Relu", ["summed"], "hidden"),
        ("MatMul", ["hidden", "output_weights"], "column"),
        ("Squeeze", ["column", "axis_2"], "unbiased"),
    ]
    if model.kind == "paths":
        steps += [
            ("Add", ["unbiased", "output_bias"], "scores"),
            ("Sigmoid", ["scores"], "errors"),
        ]
    else:
        steps.append(("Add", ["unbiased", "output_bias"], "errors"))
    helper = onnx.helper
    width, code = predictor.features.shape[0], predictor.codes.shape[0]
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, [output], name=output) for kind, inputs, output in steps],
        f"gate_{position}",
        [_value("features", ["batch", width]), _value("codes", ["paths", code])],
        [_value("errors", ["batch", "paths"])],
        [onnx.numpy_helper.from_array(a, name) for name, a in _constants(predictor).items()],
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION
    )
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString())


def _constants(predictor: ErrorPredictor) -> dict[str, NDArray[Any]]:
    return {
        "feature_weights": predictor.features,
        "code_weights": predictor.codes,
        "bias": predictor.bias,
        "output_weights": predictor.output[:, None],
        "output_bias": predictor.output_bias,
        "axis_1": np.array([1], np.int64),
        "axis_2": np.array([2], np.int64),
    }


def _value(name: str, shape: list[str | int]) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
