"""Half precision typed in the graph: FP16 weights and casts, the form that every TensorRT takes.

onnxruntime's own converter (onnxruntime.transformers.float16) changes types and inserts casts. It
comes with a package that is needed anyway; onnxconverter-common, from which it was derived, would
be one more. What it gets wrong on graphs with nodes that stay in FP32 is mended around it: before,
constants are given to FP16 and FP32 readers apart; after, casts that appear twice or undo each
other go, and the nodes are sorted. So a tensor between two FP32 nodes never passes through FP16.

What stays in FP32, and why, is in `_BY_OPERATOR` and the functions around `_kept`. Softmax inside
a model does not: it subtracts the largest value first, so that its sums can't overflow. Neither do
GELU and BatchNormalization. Stages of kind "preprocess" are left alone by the command: there is
little to save in them, and pixels times a scale are not what precision should be lost on.
"""

from __future__ import annotations

import importlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends.onnxrt import native_error, native_exceptions, new_session
from edge_runtime.errors import ConfigError, EngineBuildError, missing_package
from edge_runtime.onnx_guard import refuse_external_data
from edge_runtime.schema import nearest
from engines.onnx_graph import opset, strip_debug_info, subgraphs
from engines.onnx_package import DecodeError, onnx

#: The largest finite number, and the smallest that has all 11 bits.
FP16_MAX = 65504.0
FP16_NORMAL = 2.0**-14
#: Before it, Softmax flattens and the axes of reductions are attributes.
MIN_OPSET = 13
#: The first whose QuantizeLinear and DequantizeLinear take FP16 scales.
QUANTISED_OPSET = 19
#: Data is a sample: values up to half of what FP16 holds are taken for safe.
MARGIN = 2.0

NORM = "norm"
SUM = "sum of many values"
STEEP = "steep function"
OUTPUT = "softmax at the output"
NO_FP16 = "operator without FP16"
TOO_LARGE = "constant beyond FP16"
TOO_SMALL = "constant too small for FP16"
OVERFLOW = "values beyond FP16 on the data"

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

#: What an operator that only moves values around computes: nothing.
_MOVES = frozenset(
    {
        "Cast",
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Shape",
        "Size",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
#: Operators to which an infinite constant is a bound and no value.
_BOUNDS = frozenset({"Clip", "Max", "Min", "Pad", "Where"})
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
#: Rounding changes a constant by 0.03 % (root of the mean square) where FP16 has all of its bits.
_ROUNDING = 1e-3
#: Inputs that are FP32 whatever the type of the others, and that the converter knows.
_ALWAYS_FP32 = {("Resize", 2)}

_FLOAT, _FLOAT16 = int(onnx.TensorProto.FLOAT), int(onnx.TensorProto.FLOAT16)
_HALF = (_FLOAT16, int(onnx.TensorProto.BFLOAT16))


@dataclass(frozen=True)
class Converted:
    """A model in FP16.

    Attributes:
        model: The ONNX file; names, shapes and dtypes of inputs and outputs are the original's.
        kept: Node that stays in FP32 -> why, in order of execution.
        casts: Casts between FP32 and FP16 in it.
    """

    model: bytes
    kept: Mapping[str, str]
    casts: int


def convert(model: bytes, *, keep: Mapping[str, str] | None = None) -> Converted:
    """Convert a model to FP16.

    Args:
        model: An ONNX file in FP32. Nodes without a name, or with one that another has, get one.
        keep: Node -> reason, for more nodes that are to stay in FP32; see `nodes_to_keep`.

    Returns:
        The model, the same for the same arguments on every machine.

    Raises:
        ConfigError: `keep` names a node that the model lacks.
        EngineBuildError: It is no FP32 model that can be converted; the message says what to do.
        ManifestError: It has external data.
        BackendUnavailable: onnx or onnxruntime is missing.
    """
    whole = _Model(model)
    nodes = {node.name: node for node in whole.nodes}
    for name in keep or {}:
        if name not in nodes:
            raise ConfigError(f"keep: the model has no node {name!r}", remedy=nearest(name, nodes))
    whole.check_convertible()
    found = _kept(whole) | dict(keep or {})
    kept = {name: found[name] for name in nodes if name in found}
    _give_constants_apart(whole, kept)
    # It logs and changes what it is given; the lists are all that may differ from its defaults.
    changed = _converter()(
        whole.proto,
        keep_io_types=True,
        disable_shape_infer=True,
        op_block_list=[],
        node_block_list=list(kept),
    )
    casts = _tidy(changed)
    _check(changed, whole.interface)
    return Converted(changed.SerializeToString(deterministic=True), kept, casts)


def emulated(model: bytes) -> bytes:
    """An FP32 model that rounds where an FP16 model does, to be run where there is no FP16.

    ONNX Runtime computes FP16 nodes in FP32 on a CPU and drops the casts in between at every level
    of optimisation, so that nothing is rounded and nothing overflows. Here each tensor that is FP16
    is rounded by casts that it does not drop: what FP16 kernels give that add up in FP32.

    Args:
        model: What `convert` made.

    Returns:
        A model with the same inputs and outputs.
    """
    proto = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(model))
    graph = proto.graph
    halves = {name for name, kind in _types(graph).items() if kind == _FLOAT16}
    for tensor in graph.initializer:
        _widen(tensor)
    nodes = []
    for node in graph.node:
        nodes.append(node)
        _widen_attributes(node)
        if node.op_type in _MOVES and node.op_type != "Cast":
            continue
        for index, name in enumerate(node.output):
            if name not in halves:
                continue
            node.output[index] = f"{name}/exact"
            half = f"{name}/half"
            for source, target, kind in (
                (node.output[index], half, _FLOAT16),
                (half, name, _FLOAT),
            ):
                nodes.append(onnx.helper.make_node("Cast", [source], [target], to=kind))
    _replace_nodes(graph, nodes)
    del graph.value_info[:]
    data: bytes = proto.SerializeToString()
    return data


def _widen(tensor: onnx.TensorProto) -> None:
    """Make an FP16 tensor FP32."""
    if tensor.data_type == _FLOAT16:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _widen_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            _widen(attribute.t)
        if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == _FLOAT16:
            attribute.i = _FLOAT


def _replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


class RangeFinder:
    """Runs an FP32 model and remembers the largest magnitude of each of its tensors.

    Only maxima leave the session, so memory does not grow with the number of samples.

    Args:
        model: An ONNX file in FP32.

    Raises:
        EngineBuildError: It can't be converted anyway.
        BackendError: ONNX Runtime refuses it.
    """

    def __init__(self, model: bytes) -> None:
        whole = _Model(model)
        whole.check_convertible()
        self._outputs = [value.name for value in whole.proto.graph.output]
        self.largest: dict[str, float] = dict.fromkeys(whole.float_tensors(), 0.0)
        graph = whole.proto.graph
        for index, name in enumerate(self.largest):
            magnitude, maximum = f"range/{index}/abs", f"range/{index}"
            graph.node.append(onnx.helper.make_node("Abs", [name], [magnitude]))
            graph.node.append(
                onnx.helper.make_node("ReduceMax", [magnitude], [maximum], keepdims=0)
            )
            graph.output.append(onnx.helper.make_tensor_value_info(maximum, _FLOAT, []))
        self._session = new_session(whole.proto.SerializeToString())

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run a batch.

        Args:
            feeds: Input name -> batch.

        Returns:
            The model's outputs.

        Raises:
            BackendError: ONNX Runtime refuses the batch.
            EngineBuildError: An output is NaN, so that the FP32 model is no reference.
        """
        try:
            results = self._session.run(None, dict(feeds))
        except native_exceptions() as error:
            raise native_error(error, "the model failed") from error
        outputs = dict(zip(self._outputs, results, strict=False))
        for name, values in outputs.items():
            if values.dtype.kind == "f" and np.isnan(values).any():
                raise EngineBuildError(f"output {name!r} of the FP32 model is NaN on the data")
        maxima = results[len(self._outputs) :]
        for name, maximum in zip(self.largest, maxima, strict=True):
            self.largest[name] = max(self.largest[name], float(maximum))
        return outputs

    def overflows(self, limit: float = FP16_MAX, margin: float = MARGIN) -> dict[str, float]:
        """Tensors whose magnitude came to `limit / margin` or beyond, with the largest seen."""
        return {name: top for name, top in self.largest.items() if not top < limit / margin}


def find_overflows(
    model: bytes,
    batches: Iterable[Mapping[str, NDArray[Any]]],
    limit: float = FP16_MAX,
    margin: float = MARGIN,
) -> dict[str, float]:
    """Run a model on data to find the tensors that FP16 can't hold.

    Args:
        model: An ONNX file in FP32.
        batches: Input name -> batch, in any number.
        limit: The largest magnitude that can be held.
        margin: What the limit is divided by, >= 1, since other data may give larger values.

    Returns:
        Tensor -> largest magnitude, for those at `limit / margin` or beyond; `nodes_to_keep` turns
        it into what `convert` takes.

    Raises:
        ConfigError: The limit or the margin is none, or there is no batch.
        EngineBuildError: The model can't be converted anyway, or gives NaN.
        BackendError: ONNX Runtime refuses the model or a batch.
    """
    if not (limit > 0 and margin >= 1):
        raise ConfigError("limit, margin", got=(limit, margin), expected="> 0, >= 1")
    finder = RangeFinder(model)
    count = 0
    for count, feeds in enumerate(batches, start=1):  # noqa: B007
        finder.run(feeds)
    if not count:
        raise ConfigError("there is no batch to find ranges on")
    return finder.overflows(limit, margin)


def nodes_to_keep(model: bytes, overflows: Mapping[str, float]) -> dict[str, str]:
    """The nodes that write or read such tensors: node -> reason, in order of execution."""
    return {
        node.name: OVERFLOW
        for node in _Model(model).nodes
        if node.op_type not in ("Shape", "Size")
        and any(name in overflows for name in (*node.input, *node.output))
    }


class _Model:
    """A model ready to be looked at: nodes named, constants as initializers, types known."""

    def __init__(self, data: bytes) -> None:
        refuse_external_data(data, "the model")
        try:
            proto = onnx.load_model_from_string(data)
            onnx.checker.check_model(proto)
        except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
            raise EngineBuildError(f"no valid ONNX file: {_first_line(error)}") from error
        version = opset(proto)
        if version < MIN_OPSET:
            raise EngineBuildError(
                "opset",
                got=version,
                expected=f"{MIN_OPSET} or later",
                remedy="Convert it with onnx.version_converter.convert_version",
            )
        proto = onnx.inliner.inline_local_functions(proto)
        strip_debug_info(proto)
        constants = {tensor.name for tensor in proto.graph.initializer}
        inputs = [value for value in proto.graph.input if value.name not in constants]
        del proto.graph.input[:]
        proto.graph.input.extend(inputs)
        _name_nodes(proto.graph)
        _constants_to_initializers(proto.graph)
        self.interface = _interface(proto)
        self.opset = version
        self.proto = onnx.shape_inference.infer_shapes(proto)
        graph = self.proto.graph
        self.nodes = graph.node
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.types = _types(graph)
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self.readers[name].append(node)

    def values(self, name: str) -> NDArray[Any] | None:
        """Values of a float constant; None for every other tensor."""
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_type != _FLOAT:
            return None
        values: NDArray[Any] = onnx.numpy_helper.to_array(tensor)
        return values

    def is_float(self, name: str) -> bool:
        return self.types.get(name) == _FLOAT

    def float_tensors(self) -> list[str]:
        """Inputs and computed tensors in FP32, in order."""
        names = [value.name for value in self.proto.graph.input]
        names += [name for node in self.nodes for name in node.output if name]
        return [name for name in names if self.is_float(name)]

    def check_convertible(self) -> None:
        """Refuse what can't be converted, or what nobody would want to be.

        Raises:
            EngineBuildError: With what to do.
        """
        for node in self.nodes:
            if subgraphs(node):
                raise EngineBuildError(
                    f"node {node.name!r} is a {node.op_type}: precision inside its branches can't "
                    "be converted",
                    remedy="Export the model without control flow; stages and exits replace it",
                )
            for name in node.output:
                if name and not self.types.get(name):
                    raise EngineBuildError(
                        f"node {node.name!r}: the type of what {node.domain or 'ai.onnx'}."
                        f"{node.op_type} computes is not known",
                        remedy="Use the model as it was before it was optimised for one runtime",
                    )
        halves = [n for n, kind in self.types.items() if kind in _HALF]
        if halves:
            raise EngineBuildError(
                f"the model has tensors in half precision already, such as {halves[0]!r}",
                remedy="Convert its FP32 original",
            )
        quantised = any(n.op_type in ("QuantizeLinear", "DequantizeLinear") for n in self.nodes)
        if quantised and self.opset < QUANTISED_OPSET:
            raise EngineBuildError(
                "the model is quantised, and its scales can't be FP16: opset",
                got=self.opset,
                expected=f"{QUANTISED_OPSET} or later",
                remedy="Convert its FP32 original with onnx.version_converter.convert_version and "
                "quantise it again",
            )
        work = [node for node in self.nodes if node.op_type not in _MOVES]
        if not any(self.is_float(name) for node in work for name in node.input):
            raise EngineBuildError(
                "the model computes nothing in floating point: FP16 would add casts and save none",
                remedy="Leave it as it is",
            )
        for name in self.constants:
            self._check_finite(name)

    def _check_finite(self, name: str) -> None:
        values = self.values(name)
        if values is None or np.isfinite(values).all():
            return
        nan = bool(np.isnan(values).any())
        if nan or any(node.op_type not in _BOUNDS for node in self.readers[name]):
            raise EngineBuildError(
                f"initializer {name!r} has {'NaN' if nan else 'infinite values'}",
                remedy="The model is broken: train or export it again",
            )


def _kept(model: _Model) -> dict[str, str]:
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


def _missing_fp16(model: _Model, node: onnx.NodeProto) -> str | None:
    """`NO_FP16` where the operator's definition has no FP16 for a tensor that is float."""
    if node.domain not in ("", "ai.onnx"):
        return NO_FP16
    schema = onnx.defs.get_schema(node.op_type, model.opset, "")
    allowed = {item.type_param_str: item.allowed_type_strs for item in schema.type_constraints}
    for names, formals in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for index, name in enumerate(names):
            if not model.is_float(name) or (node.op_type, index) in _ALWAYS_FP32:
                continue
            formal = formals[min(index, len(formals) - 1)]
            if "tensor(float16)" not in allowed.get(formal.type_str, [formal.type_str]):
                return NO_FP16
    return None


def _is_gentle_power(model: _Model, node: onnx.NodeProto) -> bool:
    """Whether a power is by a constant that FP16 can follow, such as the 3 in GELU's tanh form."""
    tensor = model.constants.get(node.input[1])
    if tensor is None:
        return False
    exponent = onnx.numpy_helper.to_array(tensor)
    return bool(((exponent >= 0) & (exponent <= 3)).all())


def _unfit_constant(model: _Model, node: onnx.NodeProto) -> str | None:
    """Why a constant that a node reads or makes can't be rounded to FP16."""
    constants = [(i, model.values(name)) for i, name in enumerate(node.input)]
    constants += [
        (-1, onnx.numpy_helper.to_array(a.t))
        for a in node.attribute
        if a.HasField("t") and a.t.data_type == _FLOAT
    ]
    for index, values in constants:
        if values is None or (node.op_type, index) in _ALWAYS_FP32:
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


def _decomposed_norms(model: _Model) -> set[str]:
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


def _is_root(model: _Model, node: onnx.NodeProto) -> bool:
    """Whether a node is a power of 0.5 or -0.5."""
    exponent = model.values(node.input[1]) if node.op_type == "Pow" else None
    return exponent is not None and exponent.size > 0 and bool((np.abs(exponent) == 0.5).all())


def _statistics(model: _Model, root: onnx.NodeProto) -> set[str]:
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


def _divisions(model: _Model, root: onnx.NodeProto) -> set[str]:
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


def _writers(model: _Model, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [model.producers[name] for name in node.input if name in model.producers]


def _reading(model: _Model, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [reader for name in node.output for reader in model.readers[name]]


def _give_constants_apart(model: _Model, kept: Mapping[str, str]) -> None:
    """Give a constant that FP16 and FP32 nodes read a copy for the latter.

    The converter would round it and cast it back, and 1e-12 is no more then.
    """
    slots: dict[str, dict[bool, list[tuple[onnx.NodeProto, int]]]] = {}
    for node in model.nodes:
        for index, name in enumerate(node.input):
            if name in model.constants and model.is_float(name):
                full = node.name in kept or (node.op_type, index) in _ALWAYS_FP32
                slots.setdefault(name, {}).setdefault(full, []).append((node, index))
    taken = set(model.types)
    for name, readers in slots.items():
        if len(readers) < 2:
            continue
        copy = _free(f"{name}_fp32", taken)
        tensor = model.proto.graph.initializer.add()
        tensor.CopyFrom(model.constants[name])
        tensor.name = copy
        for node, index in readers[True]:
            node.input[index] = copy


def _tidy(model: onnx.ModelProto) -> int:
    """Mend what the converter leaves; returns the number of casts between FP32 and FP16."""
    graph = model.graph
    _merge_equal_casts(graph)
    _sort(graph)
    del graph.value_info[:]
    types = _types(onnx.shape_inference.infer_shapes(model).graph)
    _skip_cast_pairs(graph, types)
    _drop_unread_casts(graph)
    floats = (_FLOAT, _FLOAT16)
    return sum(
        node.op_type == "Cast" and types.get(node.input[0]) in floats and _target(node) in floats
        for node in graph.node
    )


def _merge_equal_casts(graph: onnx.GraphProto) -> None:
    """Leave one of the casts that the converter makes for each reader of one tensor."""
    seen: set[str] = set()
    for node in list(graph.node):
        if node.op_type == "Cast":
            if node.output[0] in seen:
                graph.node.remove(node)
            seen.add(node.output[0])


def _skip_cast_pairs(graph: onnx.GraphProto, types: Mapping[str, int]) -> None:
    """Read before a pair of casts what comes out of it: no rounding between two FP32 nodes."""
    outputs = {value.name for value in graph.output}
    fixed = outputs | {value.name for value in graph.input}
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    other: dict[str, str] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = other.get(name, name)
        if node.op_type != "Cast":
            continue
        before = casts.get(node.input[0])
        if before is not None and {_target(before), _target(node)} <= {_FLOAT, _FLOAT16}:
            source = other.get(before.input[0], before.input[0])
            # To FP16 and back rounds, which nobody asked for; back and forth does nothing.
            if _target(before) == _FLOAT16 or types.get(source) == _FLOAT16:
                node.input[0] = source
        source, target = node.input[0], node.output[0]
        if types.get(source) != _target(node):
            continue
        if target not in outputs:
            other[target] = source
        elif source in fixed or source in casts:
            node.op_type = "Identity"
            del node.attribute[:]
        else:
            other[source] = target
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = _last(other, name)


def _last(names: Mapping[str, str], name: str) -> str:
    while name in names:
        name = names[name]
    return name


def _drop_unread_casts(graph: onnx.GraphProto) -> None:
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    for node in reversed(list(graph.node)):
        if node.op_type != "Cast":
            continue
        if node.input[0] == node.output[0] or not readers[node.output[0]]:
            readers[node.input[0]] -= 1
            graph.node.remove(node)


def _sort(graph: onnx.GraphProto) -> None:
    """Put nodes behind those that they read, otherwise in the order that they have."""
    producers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    order: list[int] = []
    done: set[int] = set()
    for start in range(len(graph.node)):
        stack = [start]
        while stack:
            index = stack[-1]
            needs = (producers[name] for name in graph.node[index].input if name in producers)
            missing = next((i for i in needs if i not in done), None)
            if missing is not None and index not in done:
                stack.append(missing)
                continue
            stack.pop()
            if index not in done:
                done.add(index)
                order.append(index)
    _replace_nodes(graph, [graph.node[i] for i in order])


def _check(model: onnx.ModelProto, interface: list[bytes]) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EngineBuildError(f"the model in FP16 is not valid: {_first_line(error)}") from error
    if _interface(model) != interface:
        raise EngineBuildError("the converter has changed the model's inputs or outputs")


def _interface(model: onnx.ModelProto) -> list[bytes]:
    return [v.SerializeToString() for v in (*model.graph.input, *model.graph.output)]


def _target(cast: onnx.NodeProto) -> int:
    """Type that a Cast writes."""
    return next(int(a.i) for a in cast.attribute if a.name == "to")


def _types(graph: onnx.GraphProto) -> dict[str, int]:
    """Tensor -> element type; 0 or absent where it is not known."""
    types = {
        value.name: int(value.type.tensor_type.elem_type)
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    return types | {tensor.name: int(tensor.data_type) for tensor in graph.initializer}


def _name_nodes(graph: onnx.GraphProto) -> None:
    counts = Counter(node.name for node in graph.node)
    taken = set(counts)
    seen: set[str] = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            node.name = _free(f"{node.name or node.op_type}_{index}", taken)
        seen.add(node.name)


def _free(name: str, taken: set[str]) -> str:
    """A name that is not taken, and now is."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Make one of the ways to write a constant of the several: the converter misses some."""
    outputs = {value.name for value in graph.output}
    for node in list(graph.node):
        if node.op_type != "Constant" or node.domain or node.output[0] in outputs:
            continue
        (attribute,) = node.attribute
        if attribute.name == "value":
            values = onnx.numpy_helper.to_array(attribute.t)
        elif attribute.name in ("value_float", "value_floats"):
            values = np.array(onnx.helper.get_attribute_value(attribute), np.float32)
        elif attribute.name in ("value_int", "value_ints"):
            values = np.array(onnx.helper.get_attribute_value(attribute), np.int64)
        else:
            continue
        graph.initializer.append(onnx.numpy_helper.from_array(values, node.output[0]))
        graph.node.remove(node)


def _converter() -> Any:
    try:
        return importlib.import_module("onnxruntime.transformers.float16").convert_float_to_float16
    except ImportError as error:
        raise missing_package("onnxruntime", "calib") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
