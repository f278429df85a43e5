"""Multiply-accumulate operations of ONNX models, for comparing what models cost.

Counted are the products that a model's size is told by: convolutions, matrix products, attention
and recurrent layers, as floats, as INT8 operators or between QuantizeLinear and DequantizeLinear.
Element-wise operations, normalisations, pooling and resizing count nothing, as in the tables of
papers. Why an own counter: onnx-tool 1.0.1 counts element-wise operations too and stops at a vision
transformer that torch 2.13 exports; onnx_opcounter 0.0.4 states no licence.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence

from edge_runtime.errors import ConfigError, EngineBuildError
from edge_runtime.manifest import Bundle
from edge_runtime.scheduler import image_axes
from edge_runtime.tensors import BATCH
from engines.onnx_graph import subgraphs
from engines.onnx_package import DecodeError, onnx

Shape = tuple[int, ...]
#: Shape of a tensor that a node reads or writes, by its place; () where there is none.
_Shapes = Callable[[Sequence[str], int], Shape]

_STANDARD = ("", "ai.onnx", "ai.onnx.ml")


def macs(model: bytes, shapes: Mapping[str, Sequence[int]]) -> int:
    """Count the multiply-accumulate operations of a model.

    Args:
        model: An ONNX file.
        shapes: Name -> shape of every input, the batch included; 1 as the batch for one sample.

    Returns:
        Operations of one call. Of an If the dearer branch counts.

    Raises:
        ConfigError: The inputs are others than the model's.
        EngineBuildError: It is no ONNX model, or has an operator or a shape that can't be told,
            such as an operator of another domain, or a product inside a Loop.
    """
    try:
        proto = onnx.load_model_from_string(model)
    except DecodeError as error:
        raise EngineBuildError(f"MACs: this is no ONNX model: {error}") from error
    _fix_inputs(proto.graph, shapes)
    try:
        # Functions hide what they are made of; the exporter of torch writes some.
        proto = onnx.inliner.inline_local_functions(proto)
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except (
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        RuntimeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())
        raise EngineBuildError(f"MACs: onnx can't infer the shapes: {reason}") from error
    return _count(proto.graph, {})


def stage_macs(bundle: Bundle, image_size: tuple[int, int] | None = None) -> dict[str, int]:
    """Count the operations of every stage of a bundle, for one image.

    Args:
        bundle: The bundle; of each stage its first variant is counted.
        image_size: (height, width) of the image, where the bundle leaves it open.

    Returns:
        Stage name -> operations, in order of execution.

    Raises:
        ConfigError: The image size does not fit.
        EngineBuildError: As for `macs`, with the stage's name.
    """
    whole = bundle.cascade.plan(range(len(bundle.cascade.exits)))
    axes = {BATCH: 1, **image_axes(whole, image_size)}
    found = {}
    for record in bundle.manifest.stages:
        model = bundle.stage_model(record.name, next(iter(record.variants)))
        shapes = {
            spec.name: (1, *spec.resolve(axes).sample_shape()) for spec in record.stage.inputs
        }
        try:
            found[record.name] = macs(model, shapes)
        except EngineBuildError as error:
            raise EngineBuildError(f"stage {record.name!r}: {error}") from error
    return found


def _fix_inputs(graph: onnx.GraphProto, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give the inputs their shapes, and forget the ones that were derived from other batches."""
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if {value.name for value in inputs} != set(shapes):
        raise ConfigError(
            "MACs: inputs",
            got=", ".join(shapes) or "none",
            expected=", ".join(value.name for value in inputs) or "none",
        )
    for value in inputs:
        dims, given = value.type.tensor_type.shape.dim, shapes[value.name]
        fixed = [dim.dim_value or None for dim in dims]
        fits = len(fixed) == len(given) and all(
            want in (None, have) and have >= 1 for want, have in zip(fixed, given, strict=True)
        )
        if not fits:
            expected = [dim.dim_value or dim.dim_param or "any" for dim in dims]
            raise ConfigError(
                f"MACs: shape of the input {value.name!r}", got=list(given), expected=expected
            )
        for dim, length in zip(dims, given, strict=True):
            dim.dim_value = length
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")


def _count(graph: onnx.GraphProto, outer: Mapping[str, Shape | None]) -> int:
    known = {**outer, **_known(graph)}
    total = 0
    for node in graph.node:
        inner = [_count(body, known) for body in subgraphs(node)]
        if node.op_type == "If":
            total += max(inner, default=0)
        elif any(inner):
            raise EngineBuildError(f"{_named(node)}: nobody knows how often its body is run")
        else:
            total += _count_node(node, known)
    return total


def _known(graph: onnx.GraphProto) -> dict[str, Shape | None]:
    """Shapes of the tensors of a graph; None where one has an axis of unknown length."""
    found: dict[str, Shape | None] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape"):
            whole = all(dim.HasField("dim_value") for dim in tensor.shape.dim)
            found[value.name] = tuple(d.dim_value for d in tensor.shape.dim) if whole else None
    found.update((tensor.name, tuple(tensor.dims)) for tensor in graph.initializer)
    return found


def _count_node(node: onnx.NodeProto, known: Mapping[str, Shape | None]) -> int:
    if node.domain not in _STANDARD:
        raise EngineBuildError(
            f"{_named(node)}: nobody knows what the operators of {node.domain!r} cost",
            remedy="Count the model as it was before a runtime optimised it",
        )
    rule = _RULES.get(node.op_type)
    if rule is None:
        return 0

    def shape(names: Sequence[str], place: int) -> Shape:
        if place >= len(names) or not names[place]:
            return ()
        found = known.get(names[place])
        if found is None:
            raise EngineBuildError(f"{_named(node)}: the shape of {names[place]!r} is not known")
        return found

    try:
        return rule(node, shape)
    except (IndexError, ValueError) as error:
        raise EngineBuildError(f"{_named(node)}: the shapes of its inputs don't fit") from error


def _named(node: onnx.NodeProto) -> str:
    return f"MACs: {node.op_type} {node.name or ', '.join(node.output)!r}"


def _conv(node: onnx.NodeProto, shape: _Shapes) -> int:
    """Each number that comes out takes the weights of its channel."""
    weights = shape(node.input, 3 if node.op_type == "QLinearConv" else 1)
    return math.prod(shape(node.output, 0)) * math.prod(weights[1:])


def _conv_transpose(node: onnx.NodeProto, shape: _Shapes) -> int:
    """Each number that goes in takes the weights of its channel."""
    return math.prod(shape(node.input, 0)) * math.prod(shape(node.input, 1)[1:])


def _gemm(node: onnx.NodeProto, shape: _Shapes) -> int:
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return math.prod(shape(node.output, 0)) * shape(node.input, 0)[0 if transposed else 1]


def _matmul(node: onnx.NodeProto, shape: _Shapes) -> int:
    return math.prod(shape(node.output, 0)) * shape(node.input, 0)[-1]


def _attention(node: onnx.NodeProto, shape: _Shapes) -> int:
    """Queries by keys, then by values; keys (batch[, heads], tokens, width), and earlier ones."""
    past = shape(node.input, 4)
    keys = shape(node.input, 1)[-2] + (past[2] if past else 0)
    return (math.prod(shape(node.input, 0)) + math.prod(shape(node.output, 0))) * keys


def _recurrent(node: onnx.NodeProto, shape: _Shapes) -> int:
    """Every step of every sequence takes all weights, of the input and of the state."""
    weights = math.prod(shape(node.input, 1)) + math.prod(shape(node.input, 2))
    return math.prod(shape(node.input, 0)[:2]) * weights


def _einsum(node: onnx.NodeProto, shape: _Shapes) -> int:
    """All lengths that the equation names, multiplied, for each product."""
    (equation,) = (a.s.decode() for a in node.attribute if a.name == "equation")
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    if not set("".join(terms)) <= set(string.ascii_letters):
        raise EngineBuildError(f"{_named(node)}: its equation {equation!r} is not understood")
    lengths: dict[str, int] = {}
    for place, term in enumerate(terms):
        for axis, length in zip(term, shape(node.input, place), strict=True):
            lengths[axis] = max(length, lengths.get(axis, 1))
    return math.prod(lengths.values()) * (len(terms) - 1)


_RULES: Mapping[str, Callable[[onnx.NodeProto, _Shapes], int]] = {
    **dict.fromkeys(("Conv", "ConvInteger", "QLinearConv", "DeformConv"), _conv),
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    **dict.fromkeys(("MatMul", "MatMulInteger", "QLinearMatMul"), _matmul),
    "Attention": _attention,
    **dict.fromkeys(("RNN", "GRU", "LSTM"), _recurrent),
    "Einsum": _einsum,
}
