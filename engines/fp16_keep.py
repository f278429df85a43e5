"""What stays in FP32 when a model becomes FP16, and why.

Softmax inside a model does not: it subtracts the largest value first, so that its sums can't
overflow. Neither do GELU and BatchNormalization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.fp16_graph import FLOAT, Model
from engines.onnx_package import onnx

NORM = "norm"
SUM = "sum of many values"
STEEP = "steep function"
OUTPUT = "softmax at the output"
NO_FP16 = "operator without FP16"
TOO_LARGE = "constant beyond FP16"
TOO_SMALL = "constant too small for FP16"

#: Operators that stay in FP32 wherever they are: the norms, and those that torch.autocast keeps.
_BY_OPERATOR = {
    **dict.fromkeys(
        (
            "GroupNormalization",
            "InstanceNormalization",
            "LRN",
            "LayerNormalization",
            "LpNormalization",
            "MeanVarianceNormalization",
            "RMSNormalization",
        ),
        NORM,
    ),
    **dict.fromkeys(
        (
            "CumSum",
            "GlobalLpPool",
            "LpPool",
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceProd",
            "ReduceSum",
            "ReduceSumSquare",
        ),
        SUM,
    ),
    **dict.fromkeys(
        (
            "Acos",
            "Asin",
            "Cosh",
            "Exp",
            "Log",
            "LogSoftmax",
            "Reciprocal",
            "Sinh",
            "Softplus",
            "Tan",
        ),
        STEEP,
    ),
}
#: Inputs that are FP32 whatever the type of the others, and that the converter knows.
ALWAYS_FP32 = {("Resize", 2)}

#: Between a norm's reduction, its root and its division.
_ON_THE_WAY = frozenset(
    {
        "Abs",
        "Add",
        "Cast",
        "Clip",
        "Div",
        "Expand",
        "Identity",
        "Max",
        "Mul",
        "Pow",
        "Reshape",
        "Squeeze",
        "Sub",
        "Unsqueeze",
    }
)
_REDUCTIONS = frozenset(
    {"GlobalAveragePool", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare"}
)
#: Nodes between a norm's reduction and its root, or its root and its division, at most.
_REACH = 4
#: The smallest number that has all 11 bits.
FP16_NORMAL = 2.0**-14
#: Rounding changes a constant by 0.03 % (root of the mean square) where FP16 has all of its bits.
_ROUNDING = 1e-3


def kept_nodes(model: Model) -> dict[str, str]:
    """Node that must stay in FP32 -> why."""
    kept = dict.fromkeys(_decomposed_norms(model), NORM)
    outputs = {value.name for value in model.proto.graph.output}
    for node in model.nodes:
        if node.name in kept or not any(map(model.is_float, (*node.input, *node.output))):
            continue
        reason = _BY_OPERATOR.get(node.op_type) or _missing_fp16(model, node)
        if node.op_type == "Softmax" and not outputs.isdisjoint(node.output):
            reason = OUTPUT
        if node.op_type == "Pow" and not _is_gentle_power(model, node):
            reason = STEEP
        reason = reason or _unfit_constant(model, node)
        if reason:
            kept[node.name] = reason
    return kept


def _missing_fp16(model: Model, node: onnx.NodeProto) -> str | None:
    """`NO_FP16` where the operator's definition has no FP16 for a tensor that is float."""
    if node.domain not in ("", "ai.onnx"):
        return NO_FP16
    schema = onnx.defs.get_schema(node.op_type, model.opset, "")
    allowed = {item.type_param_str: item.allowed_type_strs for item in schema.type_constraints}
    for names, formals in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for index, name in enumerate(names):
            if not model.is_float(name) or (node.op_type, index) in ALWAYS_FP32:
                continue
            formal = formals[min(index, len(formals) - 1)]
            if "tensor(float16)" not in allowed.get(formal.type_str, [formal.type_str]):
                return NO_FP16
    return None


def _is_gentle_power(model: Model, node: onnx.NodeProto) -> bool:
    """Whether a power is by a constant that FP16 can follow, such as the 3 in GELU's tanh form."""
    tensor = model.constants.get(node.input[1])
    if tensor is None:
        return False
    exponent = onnx.numpy_helper.to_array(tensor)
    return bool(((exponent >= 0) & (exponent <= 3)).all())


def _unfit_constant(model: Model, node: onnx.NodeProto) -> str | None:
    """Why a constant that a node reads or makes can't be rounded to FP16."""
    constants = [(i, model.values(name)) for i, name in enumerate(node.input)]
    constants += [
        (-1, onnx.numpy_helper.to_array(a.t))
        for a in node.attribute
        if a.HasField("t") and a.t.data_type == FLOAT
    ]
    for index, values in constants:
        if values is None or (node.op_type, index) in ALWAYS_FP32:
            continue
        reason = _unfit(values, divides=node.op_type == "Div" and index == 1)
        # A bound that becomes the largest number of FP16 still bounds all that FP16 has.
        if reason and not (reason == TOO_LARGE and node.op_type == "Clip"):
            return reason
    return None


def _unfit(values: NDArray[Any], *, divides: bool) -> str | None:
    """Why values can't be rounded to FP16.

    Tiny weights among larger ones are none: what their rounding changes is lost in the sum.
    """
    finite = values[np.isfinite(values)]
    with np.errstate(over="ignore", under="ignore"):
        rounded = finite.astype(np.float16).astype(np.float32)
    if np.isinf(rounded).any():
        return TOO_LARGE
    change = np.linalg.norm((rounded - finite).astype(np.float64).ravel())
    if change > _ROUNDING * np.linalg.norm(finite.astype(np.float64).ravel()):
        return TOO_SMALL
    small = (finite != 0) & (np.abs(finite) < FP16_NORMAL)
    return TOO_SMALL if divides and small.any() else None


def _decomposed_norms(model: Model) -> set[str]:
    """Nodes of norms that an exporter wrote as single steps: x / sqrt(mean(x * x) + epsilon)."""
    found: set[str] = set()
    for root in model.nodes:
        if root.op_type == "ReduceL2":
            statistics = {root.name}
        elif root.op_type == "Sqrt" or _is_root(model, root):
            statistics = _statistics(model, root)
        else:
            continue
        if statistics:
            found |= {root.name, *statistics, *_divisions(model, root)}
    return found


def _is_root(model: Model, node: onnx.NodeProto) -> bool:
    """Whether a node is a power of 0.5 or -0.5."""
    exponent = model.values(node.input[1]) if node.op_type == "Pow" else None
    return exponent is not None and exponent.size > 0 and bool((np.abs(exponent) == 0.5).all())


def _statistics(model: Model, root: onnx.NodeProto) -> set[str]:
    """Nodes from a norm's first reduction up to its root; none where nothing is reduced."""
    found: set[str] = set()
    for path in _paths(root, lambda node: _writers(model, node)):
        if path[-1].op_type not in _REDUCTIONS:
            continue
        found.update(node.name for node in path)
        for square in _writers(model, path[-1]):
            if square.op_type not in ("Abs", "Mul", "Pow"):
                continue
            found.add(square.name)
            for centred in _writers(model, square):
                if centred.op_type == "Sub":
                    found.add(centred.name)
                    means = _writers(model, centred)
                    found.update(node.name for node in means if node.op_type in _REDUCTIONS)
    return found


def _divisions(model: Model, root: onnx.NodeProto) -> set[str]:
    """Nodes from a norm's root to where something is divided by it."""
    found: set[str] = set()
    for path in _paths(root, lambda node: _reading(model, node), ends=("Div", "Reciprocal", "Mul")):
        if path[-1].op_type in ("Div", "Reciprocal", "Mul"):
            found.update(node.name for node in path)
        if path[-1].op_type == "Reciprocal":
            found.update(n.name for n in _reading(model, path[-1]) if n.op_type == "Mul")
    return found


def _paths(
    start: onnx.NodeProto,
    step: Callable[[onnx.NodeProto], list[onnx.NodeProto]],
    ends: Iterable[str] = tuple(_REDUCTIONS),
) -> Iterator[list[onnx.NodeProto]]:
    """Paths from a node to the nearest of some operators, over steps of norms alone."""
    paths = [[node] for node in step(start)]
    for _ in range(_REACH):
        longer = []
        for path in paths:
            if path[-1].op_type in ends:
                yield path
            elif path[-1].op_type in _ON_THE_WAY:
                longer += [[*path, node] for node in step(path[-1])]
        paths = longer


def _writers(model: Model, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [model.producers[name] for name in node.input if name in model.producers]


def _reading(model: Model, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [reader for name in node.output for reader in model.readers[name]]
