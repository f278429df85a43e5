"""Small ONNX classifiers written by hand, the way other people's exporters write them."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = 8


class Net:
    """Collects nodes; each method returns the name of the tensor it adds."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, values: np.ndarray, name: str | None = None) -> str:
        name = name or f"weight{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def add(self, operator: str, *inputs: str, out: str | None = None, **attributes) -> str:
        out = out or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [out], **attributes))
        return out

    def conv(self, tensor: str, channels_in: int, channels_out: int, out: str | None = None) -> str:
        weights = self.rng.standard_normal((channels_out, channels_in, 3, 3)) / 3
        weight = self.constant(weights.astype(np.float32))
        tensor = self.add("Conv", tensor, weight, pads=[1, 1, 1, 1])
        return self.add("Relu", tensor, out=out)

    def dense(self, tensor: str, width_in: int, width_out: int, out: str | None = None) -> str:
        weights = self.rng.standard_normal((width_in, width_out)).astype(np.float32)
        return self.add("MatMul", tensor, self.constant(weights), out=out)

    def pool(self, tensor: str) -> str:
        return self.add("Flatten", self.add("GlobalAveragePool", tensor), axis=1)

    def model(
        self,
        outputs: dict[str, list],
        *,
        image: list,
        opset: int = 18,
        ir_version: int = 8,
        elem_type: int = TensorProto.FLOAT,
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "classifier",
            [helper.make_tensor_value_info("image", elem_type, image)],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
            self.constants,
        )
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version
        )


def classifier(
    *,
    classes: int = 4,
    layout: str = "NCHW",
    probabilities: bool = False,
    batch: int | str = "N",
    reshape: tuple[int, ...] | None = None,
    channels: int = 3,
    opset: int = 18,
    seed: int = 0,
) -> onnx.ModelProto:
    """Conv, pool, dense, perhaps softmax; names of tensors are alike in every model.

    Args:
        classes: Width of the output.
        layout: Of the input.
        probabilities: Whether a softmax ends it.
        batch: As the file declares it.
        reshape: A constant shape that the logits are reshaped to, as TFLite converters do.
        channels: Of the input.
        opset: ONNX operator set.
        seed: Of the weights.
    """
    net = Net(seed)
    tensor = "image"
    if layout == "NHWC":
        tensor = net.add("Transpose", tensor, perm=[0, 3, 1, 2])
    tensor = net.conv(tensor, channels, 6, out="features")
    tensor = net.dense(net.pool(tensor), 6, classes, out="raw")
    if reshape is not None:
        shape = net.constant(np.array(reshape, np.int64), "shape")
        tensor = net.add("Reshape", tensor, shape)
    operator = "Softmax" if probabilities else "Identity"
    net.add(operator, tensor, out="scores", **({"axis": 1} if probabilities else {}))
    chw = [channels, SIZE, SIZE] if layout == "NCHW" else [SIZE, SIZE, channels]
    return net.model({"scores": [batch, classes]}, image=[batch, *chw], opset=opset)


def residual_classifier(*, exits: bool = False, classes: int = 4) -> onnx.ModelProto:
    """Three convolutions, the second with a skip around it, and perhaps early exits.

    Tensors: "a" -> "b" -> "sum" = a + b -> "c" -> "final"; exits "early" from "a", "later" from
    "sum". A shared constant is read on both sides of every cut.
    """
    net = Net(3)
    scale = net.constant(np.array(0.5, np.float32), "scale")
    a = net.conv(net.add("Mul", "image", scale), 3, 5, out="a")
    b = net.conv(a, 5, 5, out="b")
    total = net.add("Add", a, b, out="sum")
    c = net.conv(net.add("Mul", total, scale), 5, 5, out="c")
    outputs = {}
    if exits:
        net.dense(net.pool(a), 5, classes, out="early")
        net.dense(net.pool(total), 5, classes, out="later/exit")
        outputs = {"early": ["N", classes], "later/exit": ["N", classes]}
    net.dense(net.pool(c), 5, classes, out="final")
    return net.model(outputs | {"final": ["N", classes]}, image=["N", 3, SIZE, SIZE])


def save(model: onnx.ModelProto, path: Path) -> Path:
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
