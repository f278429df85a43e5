"""Small questions to and edits of an ONNX graph that the onnx package has no function for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from edge_runtime.errors import ConfigError
from edge_runtime.schema import nearest
from edge_runtime.tensors import TensorSpec
from engines.onnx_package import onnx


def opset(model: onnx.ModelProto) -> int:
    """Version of the standard operators that a model uses; 0 where it uses none."""
    return opsets(model).get("", 0)


def opsets(model: onnx.ModelProto) -> dict[str, int]:
    """Operator domain -> version; the standard domain is ""."""
    return {
        "" if entry.domain == "ai.onnx" else entry.domain: entry.version
        for entry in model.opset_import
    }


def value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    """A tensor's spec as ONNX writes it."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    return onnx.helper.make_tensor_value_info(spec.name, kind, spec.shape)


def tensors(model: onnx.ModelProto) -> set[str]:
    """Names of all tensors of the main graph."""
    graph = model.graph
    names = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    return names | {name for node in graph.node for name in node.output if name}


def check_exists(model: onnx.ModelProto, names: Iterable[str], where: str) -> None:
    """Check that tensors of these names are computed by nodes of the main graph.

    Raises:
        ConfigError: One is not; the message has the nearest name.
    """
    computed = {name for node in model.graph.node for name in node.output if name}
    for name in names:
        if name not in computed:
            valid = computed if len(computed) <= 20 else _near(name, computed)
            raise ConfigError(f"{where}: no node computes {name!r}", remedy=nearest(name, valid))


def varying(model: onnx.ModelProto, source: str) -> set[str]:
    """Names of the tensors that depend on `source`, itself included."""
    found = {source}
    for node in model.graph.node:
        if not found.isdisjoint(reads(node)):
            found.update(name for name in node.output if name)
    return found


def reads(node: onnx.NodeProto) -> set[str]:
    """Names of the tensors that a node reads, through its subgraphs too."""
    names = {name for name in node.input if name}
    for graph in subgraphs(node):
        own = {value.name for value in (*graph.input, *graph.initializer)}
        for inner in graph.node:
            names |= reads(inner) - own
            own.update(inner.output)
        names |= {value.name for value in graph.output} - own
    return names


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """Graphs in a node's attributes: branches of If, bodies of Loop and Scan."""
    graphs = []
    for attribute in node.attribute:
        if attribute.HasField("g"):
            graphs.append(attribute.g)
        graphs.extend(attribute.graphs)
    return graphs


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy that hands out other tensors, whatever their type and shape."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copy


def extract(
    model: onnx.ModelProto, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> onnx.ModelProto:
    """The part of a model between tensors.

    A graph with If, Loop or Scan keeps all of its nodes: the library's Extractor does not see what
    their branches read.
    """
    if any(subgraphs(node) for node in model.graph.node):
        part = with_outputs(model, [])
        part.graph.output.extend(value_info(spec) for spec in outputs)
        return part
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    known = {spec.name: spec for spec in (*inputs, *outputs)}
    del whole.graph.value_info[:]
    for values in (whole.graph.input, whole.graph.output):
        kept = [value for value in values if value.name not in known]
        del values[:]
        values.extend(kept)
    whole.graph.value_info.extend(value_info(spec) for spec in known.values())
    extractor = onnx.utils.Extractor(whole)
    part = extractor.extract_model([s.name for s in inputs], [s.name for s in outputs])
    del part.graph.value_info[:]
    part.graph.name = model.graph.name
    part.producer_name, part.producer_version = model.producer_name, model.producer_version
    return part


def rename(graph: onnx.GraphProto, prefix: str, names: Mapping[str, str]) -> onnx.GraphProto:
    """A copy in which everything has a prefix, except what `names` names anew.

    Args:
        graph: Any graph.
        prefix: Put before the names of nodes and tensors.
        names: Old name -> new name; covers every input and output of the graph.
    """
    return onnx.compose.add_prefix_graph(
        graph, prefix, rename_inputs=False, rename_outputs=False, name_map=dict(names)
    )


def strip_debug_info(model: onnx.ModelProto) -> None:
    """Remove doc strings and metadata: exporters put stack traces and paths there."""
    model.doc_string = ""
    del model.metadata_props[:]
    _strip_graph(model.graph)
    for function in model.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        for node in function.node:
            _strip_node(node)


def _strip_graph(graph: onnx.GraphProto) -> None:
    for item in (graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]
    for node in graph.node:
        _strip_node(node)


def _strip_node(node: onnx.NodeProto) -> None:
    node.doc_string = ""
    del node.metadata_props[:]
    for graph in subgraphs(node):
        _strip_graph(graph)


def _near(name: str, names: set[str]) -> list[str]:
    return difflib.get_close_matches(name, names, n=5, cutoff=0.3)
