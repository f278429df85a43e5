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


#: Channels and stride of the 13 blocks of MobileNet v1, before the width multiplier.
_MOBILENET_V1 = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)]
_MOBILENET_V1 += [(512, 1)] * 5 + [(1024, 2), (1024, 1)]
#: Expansion, channels, blocks, and stride of the first one, of MobileNet v2.
_MOBILENET_V2 = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)]
_MOBILENET_V2 += [(6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


class MobileNet(Net):
    """The layers of MobileNets, batch norm folded, as converters from TFLite write them."""

    channels = 3

    def filter(self, tensor: str, out: int, *, size: int, stride: int, bound: bool = True) -> str:
        """A convolution over the channels (1 x 1 or the first), and ReLU6 where it has a bound."""
        weights = self.rng.standard_normal((out, self.channels, size, size))
        weights *= np.sqrt((1 + bound) / weights[0].size)
        self.channels = out
        return self._convolve(tensor, weights, stride, 1, bound)

    def depthwise(self, tensor: str, stride: int) -> str:
        """A convolution in each channel, and ReLU6."""
        weights = self.rng.standard_normal((self.channels, 1, 3, 3)) * np.sqrt(2 / 9)
        return self._convolve(tensor, weights, stride, self.channels, True)

    def _convolve(
        self, tensor: str, weights: np.ndarray, stride: int, group: int, bound: bool
    ) -> str:
        size = weights.shape[2]
        bias = self.rng.standard_normal(len(weights)) / 10
        constants = [self.constant(values.astype(np.float32)) for values in (weights, bias)]
        tensor = self.add(
            "Conv",
            tensor,
            *constants,
            kernel_shape=[size, size],
            strides=[stride, stride],
            pads=[0, 0, 1, 1] if stride == 2 else [size // 2] * 4,
            group=group,
        )
        if not bound:
            return tensor
        limits = [self.constant(np.array(value, np.float32)) for value in (0, 6)]
        return self.add("Clip", tensor, *limits)

    def inverted_residual(self, tensor: str, expansion: int, out: int, stride: int) -> str:
        """Wider, depthwise, narrower without a bound; a skip around it where shapes allow."""
        source, before = tensor, self.channels
        if expansion != 1:
            tensor = self.filter(tensor, expansion * before, size=1, stride=1)
        tensor = self.depthwise(tensor, stride)
        tensor = self.filter(tensor, out, size=1, stride=1, bound=False)
        return self.add("Add", source, tensor) if stride == 1 and before == out else tensor


def mobilenet(version: int, width: float, size: int, logits: str) -> onnx.ModelProto:
    """A MobileNet for ImageNet with random weights: all its layers, a softmax at its end.

    Args:
        version: 1 or 2.
        width: Multiplier of the channels.
        size: Height and width of its input, a multiple of 32.
        logits: Name of the tensor before the softmax, of 1001 classes.
    """
    net = MobileNet(version)
    tensor = net.filter("image", int(32 * width), size=3, stride=2)
    if version == 1:
        for channels, stride in _MOBILENET_V1:
            tensor = net.depthwise(tensor, stride)
            tensor = net.filter(tensor, int(channels * width), size=1, stride=1)
    else:
        for expansion, channels, blocks, stride in _MOBILENET_V2:
            for step in [stride] + [1] * (blocks - 1):
                tensor = net.inverted_residual(tensor, expansion, int(channels * width), step)
        tensor = net.filter(tensor, 1280, size=1, stride=1)
    tensor = net.add("AveragePool", tensor, kernel_shape=[size // 32] * 2)
    tensor = net.filter(tensor, 1001, size=1, stride=1, bound=False)
    tensor = net.add("Transpose", tensor, perm=[0, 2, 3, 1])
    net.add("Reshape", tensor, net.constant(np.array([1, 1001], np.int64)), out=logits)
    net.add("Softmax", logits, out="scores", axis=-1)
    return net.model({"scores": [1, 1001]}, image=[1, 3, size, size], opset=13, ir_version=7)


def save(model: onnx.ModelProto, path: Path) -> Path:
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
