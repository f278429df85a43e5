"""What an FP16 model computes, to be run where there is no FP16."""

from __future__ import annotations

import numpy as np

from engines.fp16_graph import FLOAT, FLOAT16, MOVES, replace_nodes, tensor_types
from engines.onnx_package import onnx


def emulated(model: bytes) -> bytes:
    """An FP32 model that rounds where an FP16 model does, to be run where there is no FP16.

    ONNX Runtime computes FP16 nodes in FP32 on a CPU and drops the casts in between at every level
    of optimisation, so that nothing is rounded and nothing overflows. Here each tensor that is FP16
    is rounded by casts that it does not drop: what FP16 kernels give that add up in FP32.

    Args:
        model: What `engines.fp16.convert` made.

    Returns:
        A model with the same inputs and outputs.
    """
    proto = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(model))
    graph = proto.graph
    halves = {name for name, kind in tensor_types(graph).items() if kind == FLOAT16}
    for tensor in graph.initializer:
        _widen(tensor)
    nodes = []
    for node in graph.node:
        nodes.append(node)
        _widen_attributes(node)
        if node.op_type in MOVES and node.op_type != "Cast":
            continue
        for index, name in enumerate(node.output):
            if name not in halves:
                continue
            node.output[index] = f"{name}/exact"
            half = f"{name}/half"
            for source, target, kind in (
                (node.output[index], half, FLOAT16),
                (half, name, FLOAT),
            ):
                nodes.append(onnx.helper.make_node("Cast", [source], [target], to=kind))
    replace_nodes(graph, nodes)
    del graph.value_info[:]
    data: bytes = proto.SerializeToString()
    return data


def _widen(tensor: onnx.TensorProto) -> None:
    """Make an FP16 tensor FP32."""
    if tensor.data_type == FLOAT16:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _widen_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            _widen(attribute.t)
        if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == FLOAT16:
            attribute.i = FLOAT
