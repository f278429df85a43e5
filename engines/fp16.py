"""Half precision typed in the graph: FP16 weights and casts, the form that every TensorRT takes.

onnxruntime's own converter (onnxruntime.transformers.float16) changes types and inserts casts. It
comes with a package that is needed anyway; onnxconverter-common, from which it was derived, would
be one more. What it gets wrong on graphs with nodes that stay in FP32 is mended around it: before,
constants are given to FP16 and FP32 readers apart; after, casts that appear twice or undo each
other go, and the nodes are sorted. So a tensor between two FP32 nodes never passes through FP16.

What stays in FP32, and why, is in `engines.fp16_keep`. Stages of kind "preprocess" are left alone
by the command: there is little to save in them, and pixels times a scale are not what precision
should be lost on.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_runtime.errors import ConfigError, EngineBuildError, missing_package
from edge_runtime.schema import nearest
from engines.fp16_graph import (
    FLOAT,
    FLOAT16,
    Model,
    first_line,
    free_name,
    interface,
    replace_nodes,
    tensor_types,
)
from engines.fp16_keep import ALWAYS_FP32, kept_nodes
from engines.onnx_package import onnx


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
        keep: Node -> reason, for more nodes that are to stay in FP32; see `engines.fp16_ranges`.

    Returns:
        The model, the same for the same arguments on every machine.

    Raises:
        ConfigError: `keep` names a node that the model lacks.
        EngineBuildError: It is no FP32 model that can be converted; the message says what to do.
        ManifestError: It has external data.
        BackendUnavailable: onnx or onnxruntime is missing.
    """
    whole = Model(model)
    nodes = {node.name: node for node in whole.nodes}
    for name in keep or {}:
        if name not in nodes:
            raise ConfigError(f"keep: the model has no node {name!r}", remedy=nearest(name, nodes))
    whole.check_convertible()
    found = kept_nodes(whole) | dict(keep or {})
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


def _converter() -> Any:
    try:
        return importlib.import_module("onnxruntime.transformers.float16").convert_float_to_float16
    except ImportError as error:
        raise missing_package("onnxruntime", "calib") from error


def _give_constants_apart(model: Model, kept: Mapping[str, str]) -> None:
    """Give a constant that FP16 and FP32 nodes read a copy for the latter.

    The converter would round it and cast it back, and 1e-12 is no more then.
    """
    slots: dict[str, dict[bool, list[tuple[onnx.NodeProto, int]]]] = {}
    for node in model.nodes:
        for index, name in enumerate(node.input):
            if name in model.constants and model.is_float(name):
                full = node.name in kept or (node.op_type, index) in ALWAYS_FP32
                slots.setdefault(name, {}).setdefault(full, []).append((node, index))
    taken = set(model.types)
    for name, readers in slots.items():
        if len(readers) < 2:
            continue
        copy = free_name(f"{name}_fp32", taken)
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
    types = tensor_types(onnx.shape_inference.infer_shapes(model).graph)
    _skip_cast_pairs(graph, types)
    _drop_unread_casts(graph)
    floats = (FLOAT, FLOAT16)
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
    replace_nodes(graph, [graph.node[i] for i in order])


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
        if before is not None and {_target(before), _target(node)} <= {FLOAT, FLOAT16}:
            source = other.get(before.input[0], before.input[0])
            # To FP16 and back rounds, which nobody asked for; back and forth does nothing.
            if _target(before) == FLOAT16 or types.get(source) == FLOAT16:
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


def _target(cast: onnx.NodeProto) -> int:
    """Type that a Cast writes."""
    return next(int(a.i) for a in cast.attribute if a.name == "to")


def _check(model: onnx.ModelProto, wanted: list[bytes]) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EngineBuildError(f"the model in FP16 is not valid: {first_line(error)}") from error
    if interface(model) != wanted:
        raise EngineBuildError("the converter has changed the model's inputs or outputs")
