"""ONNX operators as calls of torch, for `engines.eager`.

Each function of the table looks at a node of opset 18 or later, and at its inputs of one call, and
returns what computes it: a function of the inputs that it has not taken as settings. Shapes are
known then, so whatever depends on them alone is worked out once. What torch can't do the same way
is refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor

from engines.onnx_package import onnx

#: Computes a node: takes tensors, returns one or, of an operator with several outputs, a tuple.
Call = Callable[..., Any]

_TYPES = onnx.TensorProto
_DTYPES: dict[int, torch.dtype] = {
    _TYPES.FLOAT: torch.float32,
    _TYPES.FLOAT16: torch.float16,
    _TYPES.BFLOAT16: torch.bfloat16,
    _TYPES.DOUBLE: torch.float64,
    _TYPES.UINT8: torch.uint8,
    _TYPES.INT8: torch.int8,
    _TYPES.INT32: torch.int32,
    _TYPES.INT64: torch.int64,
    _TYPES.BOOL: torch.bool,
}


class Unsupported(Exception):
    """A node asks for what is not here; the message says what, got and expected."""

    def __init__(self, what: str, *, got: object = None, expected: object = None) -> None:
        self.what, self.got, self.expected = what, got, expected
        super().__init__(what)


class Node:
    """A node with its inputs of one call.

    Args:
        proto: The node.
        values: Value of each of its inputs by name.
        constants: Names of those that are the same in every call.

    Attributes:
        outputs: Number of its outputs.
        taken: Positions of the inputs that were read as settings.
    """

    def __init__(
        self, proto: onnx.NodeProto, values: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> None:
        self._proto = proto
        self._attributes = {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}
        self._values = values
        self._constants = constants
        self.outputs = len(proto.output)
        self.taken: set[int] = set()

    def has(self, position: int) -> bool:
        """Whether an input is given."""
        return position < len(self._proto.input) and bool(self._proto.input[position])

    def value(self, position: int = 0) -> Tensor:
        """An input of this call, for its shape and dtype."""
        return self._values[self._proto.input[position]]

    def take(self, position: int) -> Tensor | None:
        """An input as a setting; None where it is not given.

        Raises:
            Unsupported: It is computed from the image.
        """
        if not self.has(position):
            return None
        self.taken.add(position)
        name = self._proto.input[position]
        if name not in self._constants:
            raise Unsupported(f"input {name!r}, which is computed from the image", expected="fixed")
        return self._constants[name]

    def numbers(self, position: int) -> list[Any] | None:
        """An input as a flat list of settings; None where it is not given or empty."""
        values = self.take(position)
        return None if values is None or not values.numel() else values.flatten().tolist()

    def number(self, position: int, default: Any = None) -> Any:
        """An input as one number."""
        values = self.numbers(position)
        return default if values is None else values[0]

    def get(self, attribute: str, default: Any = None) -> Any:
        """An attribute."""
        value = self._attributes.get(attribute, default)
        return value.decode() if isinstance(value, bytes) else value

    def only(self, attribute: str, default: Any, *valid: Any) -> Any:
        """An attribute that has to have one of these values."""
        value = self.get(attribute, default)
        if value not in (valid or (default,)):
            expected = " or ".join(map(str, valid or (default,)))
            raise Unsupported(f"attribute {attribute}", got=value, expected=expected)
        return value

    def axis(self, default: int) -> int:
        """The attribute `axis`, counted from the front."""
        return int(self.get("axis", default)) % max(1, self.value().ndim)


def _plain(function: Call) -> Callable[[Node], Call]:
    """An operator without settings."""
    return lambda node: function


def _folded(function: Call) -> Callable[[Node], Call]:
    """An operator of any number of inputs that torch takes two at a time."""
    return lambda node: lambda first, *more: _reduce(function, first, more)


def _reduce(function: Call, value: Tensor, more: Sequence[Tensor]) -> Tensor:
    for other in more:
        value = function(value, other)
    return value


def _dtype(kind: int) -> torch.dtype:
    if kind not in _DTYPES:
        name = onnx.helper.tensor_dtype_to_string(kind)
        raise Unsupported("type", got=name, expected="a float, an integer of 8 to 64 bits, or bool")
    return _DTYPES[kind]


def tensor_of(proto: onnx.TensorProto) -> Tensor:
    """A constant as a tensor.

    Raises:
        Unsupported: It has a type that torch or this baseline lacks.
    """
    dtype = _dtype(proto.data_type)
    values = onnx.numpy_helper.to_array(proto)
    if dtype is torch.bfloat16:
        values = values.astype(np.float32)
    return torch.from_numpy(np.array(values)).to(dtype)


def _constant(node: Node) -> Call:
    if isinstance(node.get("value"), onnx.TensorProto):
        value = tensor_of(node.get("value"))
    else:
        kinds = {"value_float": torch.float32, "value_int": torch.int64}
        kinds |= {f"{name}s": dtype for name, dtype in kinds.items()}
        name = next((name for name in kinds if node.get(name) is not None), None)
        if name is None:
            raise Unsupported("a constant that is no plain tensor")
        value = torch.tensor(node.get(name), dtype=kinds[name])
    return lambda: value


def _shape(node: Node) -> Call:
    shape = list(node.value().shape)[node.get("start", 0) : node.get("end")]
    device = node.value().device
    return lambda x: torch.tensor(shape, dtype=torch.int64, device=device)


def _conv(node: Node) -> Call:
    weight = node.value(1)
    rank = weight.ndim - 2
    if rank not in (1, 2, 3):
        raise Unsupported("a convolution", got=f"{rank} axes", expected="1 to 3")
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    strides = node.get("strides", [1] * rank)
    dilations = node.get("dilations", [1] * rank)
    pads = _pads(node, weight.shape[2:], strides, dilations)
    groups = node.get("group", 1)
    if pads[:rank] == pads[rank:]:
        settings = (strides, pads[:rank], dilations, groups)
        return lambda x, w, b=None: function(x, w, b, *settings)
    margins = _margins(pads)
    return lambda x, w, b=None: function(F.pad(x, margins), w, b, strides, 0, dilations, groups)


def _pads(
    node: Node, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """Padding at the begin of each axis, then at the end of each."""
    rank = len(kernel)
    rule = node.only("auto_pad", "NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
    if rule in ("NOTSET", "VALID"):
        return list(node.get("pads", [0] * 2 * rank)) if rule == "NOTSET" else [0] * 2 * rank
    lengths = node.value().shape[2:]
    totals = [
        max(0, (math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n)
        for n, k, s, d in zip(lengths, kernel, strides, dilations, strict=True)
    ]
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return [*small, *large] if rule == "SAME_UPPER" else [*large, *small]


def _margins(pads: Sequence[int]) -> list[int]:
    """ONNX's padding as `F.pad` takes it: pairs, from the last axis to the first."""
    rank = len(pads) // 2
    return [pads[end] for axis in reversed(range(rank)) for end in (axis, axis + rank)]


def _max_pool(node: Node) -> Call:
    kernel, strides, dilations = _window(node)
    function = _by_rank(kernel, F.max_pool1d, F.max_pool2d, F.max_pool3d)
    pads = _pads(node, kernel, strides, dilations)
    rank, ceil = len(kernel), bool(node.get("ceil_mode", 0))
    if pads[:rank] == pads[rank:]:
        return lambda x: function(x, kernel, strides, pads[:rank], dilations, ceil)
    margins, least = _margins(pads), -math.inf
    return lambda x: function(F.pad(x, margins, value=least), kernel, strides, 0, dilations, ceil)


def _average_pool(node: Node) -> Call:
    kernel, strides, dilations = _window(node)
    function = _by_rank(kernel, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
    if any(d != 1 for d in dilations):
        raise Unsupported("attribute dilations", got=dilations, expected=1)
    pads = _pads(node, kernel, strides, dilations)
    rank, ceil = len(kernel), bool(node.get("ceil_mode", 0))
    counted = bool(node.get("count_include_pad", 0))
    if pads[:rank] == pads[rank:]:
        return lambda x: function(x, kernel, strides, pads[:rank], ceil, counted)
    if not counted or ceil:
        raise Unsupported("uneven padding that is not counted, or with ceil_mode", got=pads)
    margins = _margins(pads)
    return lambda x: function(F.pad(x, margins), kernel, strides)


def _window(node: Node) -> tuple[list[int], list[int], list[int]]:
    kernel = list(node.get("kernel_shape"))
    ones = [1] * len(kernel)
    return kernel, list(node.get("strides", ones)), list(node.get("dilations", ones))


def _by_rank(kernel: Sequence[int], *functions: Call) -> Call:
    if len(kernel) > len(functions):
        raise Unsupported("attribute kernel_shape", got=kernel, expected="1 to 3 axes")
    return functions[len(kernel) - 1]


def _global_average_pool(node: Node) -> Call:
    axes = list(range(2, node.value().ndim))
    return lambda x: x.mean(axes, keepdim=True)


def _reduction(function: Call) -> Callable[[Node], Call]:
    def bind(node: Node) -> Call:
        axes = node.numbers(1)
        keep = bool(node.get("keepdims", 1))
        if axes is None and node.get("noop_with_empty_axes", 0):
            return lambda x: x
        chosen = axes or list(range(node.value().ndim))
        return lambda x: function(x, chosen, keep)

    return bind


def _gemm(node: Node) -> Call:
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    flip_a, flip_b = node.get("transA", 0), node.get("transB", 0)
    plain = alpha == beta == 1 and not flip_a
    if plain and flip_b and (not node.has(2) or node.value(2).ndim == 1):
        return F.linear

    def call(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.mT if flip_a else a, b.mT if flip_b else b
        if c is not None:
            return torch.addmm(c, a, b, beta=beta, alpha=alpha)
        return a @ b if alpha == 1 else (a @ b) * alpha

    return call


def _batch_normalization(node: Node) -> Call:
    node.only("training_mode", 0)
    epsilon = node.get("epsilon", 1e-5)
    return lambda x, scale, bias, mean, variance: F.batch_norm(
        x, mean, variance, scale, bias, False, 0.0, epsilon
    )


def _layer_normalization(node: Node) -> Call:
    shape = list(node.value().shape[node.axis(-1) :])
    epsilon = node.get("epsilon", 1e-5)
    return lambda x, scale, bias=None: F.layer_norm(x, shape, scale, bias, epsilon)


def _instance_normalization(node: Node) -> Call:
    epsilon = node.get("epsilon", 1e-5)
    return lambda x, scale, bias: F.instance_norm(x, None, None, scale, bias, True, 0.0, epsilon)


def _softmax(function: Call) -> Callable[[Node], Call]:
    def bind(node: Node) -> Call:
        axis = node.axis(-1)
        return lambda x: function(x, axis)

    return bind


def _gelu(node: Node) -> Call:
    approximate = node.only("approximate", "none", "none", "tanh")
    return lambda x: F.gelu(x, approximate=approximate)


def _leaky_relu(node: Node) -> Call:
    slope = node.get("alpha", 0.01)
    return lambda x: F.leaky_relu(x, slope)


def _elu(node: Node) -> Call:
    alpha = node.get("alpha", 1.0)
    return lambda x: F.elu(x, alpha)


def _hard_sigmoid(node: Node) -> Call:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return F.hardsigmoid
    return lambda x: (x * alpha + beta).clamp(0, 1)


def _clip(node: Node) -> Call:
    low, high = node.number(1), node.number(2)
    if low is None and high is None:
        return lambda x: x
    return lambda x: torch.clamp(x, low, high)


def _div(node: Node) -> Call:
    if node.value().is_floating_point():
        return torch.div
    return lambda a, b: torch.div(a, b, rounding_mode="trunc")


def _concat(node: Node) -> Call:
    axis = node.axis(0)
    return lambda *parts: torch.cat(parts, axis)


def _slice(node: Node) -> Call:
    starts, ends = node.numbers(1) or [], node.numbers(2) or []
    axes = node.numbers(3) or list(range(len(starts)))
    steps = node.numbers(4) or [1] * len(starts)
    shape = node.value().shape
    index = [slice(None)] * len(shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise Unsupported("input steps", got=step, expected=">= 1")
        # torch takes no bounds that lie far outside.
        index[axis] = slice(*slice(start, end, step).indices(shape[axis]))
    place = tuple(index)
    return lambda x: x[place]


def _split(node: Node) -> Call:
    axis = node.axis(0)
    length = node.value().shape[axis]
    sizes = node.numbers(1)
    if sizes is None:
        each = math.ceil(length / node.get("num_outputs", node.outputs))
        sizes = [min(each, length - start) for start in range(0, length, each)]
    if node.outputs == 1:
        return lambda x: x
    return lambda x: x.split(sizes, axis)


def _gather(node: Node) -> Call:
    axis = node.axis(0)
    indices = node.take(1)
    assert indices is not None
    indices = torch.where(indices < 0, indices + node.value().shape[axis], indices)
    if not indices.ndim:
        place = int(indices)
        return lambda x: x.select(axis, place)
    if indices.ndim == 1:
        return lambda x: x.index_select(axis, indices)
    shape = [*node.value().shape[:axis], *indices.shape, *node.value().shape[axis + 1 :]]
    flat = indices.flatten()
    return lambda x: x.index_select(axis, flat).reshape(shape)


def _reshape(node: Node) -> Call:
    shape, source = node.numbers(1) or [], node.value().shape
    if not node.get("allowzero", 0):
        shape = [n or source[axis] for axis, n in enumerate(shape)]
    return lambda x: x.reshape(shape)


def _flatten(node: Node) -> Call:
    shape, axis = node.value().shape, node.get("axis", 1)
    rows = math.prod(shape[: axis + len(shape) if axis < 0 else axis])
    target = [rows, math.prod(shape) // max(1, rows)]
    return lambda x: x.reshape(target)


def _squeeze(node: Node) -> Call:
    shape, axes = node.value().shape, node.numbers(1)
    gone = {i for i, n in enumerate(shape) if n == 1}
    if axes is not None:
        gone = {axis % len(shape) for axis in axes}
    target = [n for i, n in enumerate(shape) if i not in gone]
    return lambda x: x.reshape(target)


def _unsqueeze(node: Node) -> Call:
    axes = node.numbers(1) or []
    rest = list(node.value().shape)
    rank = len(rest) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        rest.insert(axis, 1)
    return lambda x: x.reshape(rest)


def _transpose(node: Node) -> Call:
    order = node.get("perm", list(reversed(range(node.value().ndim))))
    return lambda x: x.permute(order)


def _expand(node: Node) -> Call:
    shape = np.broadcast_shapes(tuple(node.value().shape), tuple(node.numbers(1) or []))
    return lambda x: x.expand(shape)


def _pad(node: Node) -> Call:
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    mode = modes[node.only("mode", "constant", *modes)]
    given, fill, rank = node.numbers(1) or [], node.number(2, 0), node.value().ndim
    axes = node.numbers(3) or list(range(rank))
    pads = [0] * 2 * rank
    for i, axis in enumerate(axes):
        pads[axis % rank], pads[axis % rank + rank] = given[i], given[i + len(axes)]
    margins = _margins(pads)
    if mode == "constant":
        return lambda x: F.pad(x, margins, value=fill)
    # torch takes these modes for the last axes only.
    while len(margins) > 2 and margins[-2:] == [0, 0]:
        margins = margins[:-2]
    return lambda x: F.pad(x, margins, mode=mode)


def _cast(node: Node) -> Call:
    dtype = _dtype(node.get("to"))
    return lambda x: x.to(dtype)


def _resize(node: Node) -> Call:
    shape = node.value().shape
    node.only("keep_aspect_ratio_policy", "stretch")
    node.take(1)
    scales, sizes = node.numbers(2), node.numbers(3)
    axes = node.get("axes") or list(range(len(shape)))
    if sizes is None:
        values = scales or []
    else:
        values = [size / shape[axis] for size, axis in zip(sizes, axes, strict=True)]
    changed = {axis % len(shape): i for i, axis in enumerate(axes) if values[i] != 1}
    if not changed:
        return lambda x: x
    last = set(changed) <= {2, 3}
    if len(shape) != 4 or not (last or set(changed) <= {1, 2}):
        raise Unsupported("what is resized", got=sorted(changed), expected="axes 2, 3 or 1, 2 of 4")
    if not node.value().is_floating_point():
        raise Unsupported("input", got=node.value().dtype, expected="a float")
    spatial = (2, 3) if last else (1, 2)
    if sizes is None:
        factors = [values[changed[a]] if a in changed else 1.0 for a in spatial]
        target: dict[str, Any] = {"scale_factor": factors}
    else:
        target = {"size": [sizes[changed[a]] if a in changed else shape[a] for a in spatial]}
    settings = {**target, **_interpolation(node, [values[i] for i in changed.values()])}
    if last:
        return lambda x: F.interpolate(x, **settings)
    return lambda x: F.interpolate(x.permute(0, 3, 1, 2), **settings).permute(0, 2, 3, 1)


def _interpolation(node: Node, scales: Sequence[float]) -> dict[str, Any]:
    """Mode of `F.interpolate` that is exactly what a Resize asks for."""
    where = node.get("coordinate_transformation_mode", "half_pixel")
    kind = node.only("mode", "nearest", "nearest", "linear", "cubic")
    if kind == "nearest":
        return {"mode": _nearest(where, node.get("nearest_mode", "round_prefer_floor"), scales)}
    if where not in ("half_pixel", "align_corners"):
        raise Unsupported(
            "attribute coordinate_transformation_mode",
            got=where,
            expected="half_pixel or align_corners",
        )
    smooth = bool(node.get("antialias", 0))
    if smooth or kind == "cubic":
        # torch renormalises the filters at the edges of a shrunk image, and repeats the edges of
        # another one.
        node.only("exclude_outside", 0, int(smooth))
    sharpness = node.get("cubic_coeff_a", -0.75)
    if kind == "cubic" and not math.isclose(sharpness, -0.5 if smooth else -0.75):
        raise Unsupported(
            "attribute cubic_coeff_a", got=sharpness, expected=-0.5 if smooth else -0.75
        )
    return {
        "mode": "bilinear" if kind == "linear" else "bicubic",
        "align_corners": where == "align_corners",
        "antialias": smooth,
    }


def _nearest(where: str, rule: str, scales: Sequence[float]) -> str:
    """The mode that takes the same pixels."""
    if (where, rule) == ("asymmetric", "floor"):
        return "nearest"
    # Whole scales have no ties, at which alone the two rules differ.
    exact = ["round_prefer_ceil"]
    if all(float(scale).is_integer() for scale in scales):
        exact.append("round_prefer_floor")
    if where == "half_pixel" and rule in exact:
        return "nearest-exact"
    raise Unsupported(
        "mode nearest",
        got=f"{where}, {rule}",
        expected="asymmetric, floor; or half_pixel, round_prefer_ceil",
    )


def _along(node: Node, values: Tensor, axis: int) -> Tensor:
    """A scale or zero point per tensor or per channel, shaped to be broadcast."""
    if node.get("block_size", 0):
        raise Unsupported("attribute block_size", got=node.get("block_size"), expected=0)
    if values.numel() == 1:
        return values.reshape(())
    return values.reshape([-1 if i == axis else 1 for i in range(node.value().ndim)])


def _quantize_linear(node: Node) -> Call:
    axis = node.axis(1)
    scale, zero = node.take(1), node.take(2)
    assert scale is not None
    if zero is None:
        zero = torch.zeros((), dtype=_dtype(node.get("output_dtype") or onnx.TensorProto.UINT8))
    limits, dtype = torch.iinfo(zero.dtype), zero.dtype
    divisor, offset = (_along(node, values, axis) for values in (scale, zero.to(scale.dtype)))
    return lambda x: (x / divisor).round().add(offset).clamp(limits.min, limits.max).to(dtype)


def _dequantize_linear(node: Node) -> Call:
    axis = node.axis(1)
    scale, zero = node.take(1), node.take(2)
    assert scale is not None
    factor, dtype = _along(node, scale, axis), scale.dtype
    if zero is None or not zero.any():
        return lambda x: x.to(dtype) * factor
    offset = _along(node, zero.to(dtype), axis)
    return lambda x: (x.to(dtype) - offset) * factor


#: Operator -> what makes its call. Without a domain: those of ONNX itself.
OPERATORS: dict[str, Callable[[Node], Call]] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(torch.add),
    "And": _plain(torch.logical_and),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Cast": _cast,
    "Ceil": _plain(torch.ceil),
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "Conv": _conv,
    "DequantizeLinear": _dequantize_linear,
    "Div": _div,
    "Dropout": _plain(lambda x, *settings: x),
    "Elu": _elu,
    "Equal": _plain(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _plain(torch.floor),
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "Greater": _plain(torch.gt),
    "GreaterOrEqual": _plain(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _plain(F.hardswish),
    "Identity": _plain(lambda x: x),
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "LeakyRelu": _leaky_relu,
    "Less": _plain(torch.lt),
    "LessOrEqual": _plain(torch.le),
    "Log": _plain(torch.log),
    "LogSoftmax": _softmax(torch.log_softmax),
    "MatMul": _plain(torch.matmul),
    "Max": _folded(torch.maximum),
    "MaxPool": _max_pool,
    "Min": _folded(torch.minimum),
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "Not": _plain(torch.logical_not),
    "Or": _plain(torch.logical_or),
    "Pad": _pad,
    "Pow": _plain(lambda x, exponent: torch.pow(x, exponent).to(x.dtype)),
    "PRelu": _plain(lambda x, slope: torch.where(x < 0, x * slope, x)),
    "QuantizeLinear": _quantize_linear,
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceL2": _reduction(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMean": _reduction(torch.mean),
    "ReduceMin": _reduction(torch.amin),
    "ReduceSum": _reduction(torch.sum),
    "Relu": _plain(torch.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Round": _plain(torch.round),
    "Shape": _shape,
    "Sigmoid": _plain(torch.sigmoid),
    "Slice": _slice,
    "Softmax": _softmax(torch.softmax),
    "Softplus": _plain(F.softplus),
    "Split": _split,
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _plain(torch.sub),
    "Sum": _folded(operator.add),
    "Tanh": _plain(torch.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _plain(torch.where),
}
