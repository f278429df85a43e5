"""Early-exit models of the size that people use, with random weights, as torch modules per stage.

A ViT-S/16 with eight exits (Touvron et al., DeiT, 2021) and a ResNet-50 with four (He et al., Deep
Residual Learning, CVPR 2016, Table 1). Each takes a uint8 image, height x width x 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench import vit
from edge_runtime.cascade import Cascade, Exit, Stage
from edge_runtime.tensors import TensorSpec

#: Blocks before each exit of the ViT-S.
VIT_EXITS = (2, 4, 5, 6, 7, 8, 10, 12)
#: Bottlenecks in each layer of a ResNet-50.
RESNET_LAYERS = (3, 4, 6, 3)
#: A bottleneck's output has so many times the channels of its middle.
_EXPANSION = 4


class Model(NamedTuple):
    """A cascade and the module of each of its stages, in eval mode."""

    cascade: Cascade
    modules: dict[str, nn.Module]


class Preprocess(nn.Module):
    """Images (batch, height, width, 3) uint8 -> pixels (batch, 3, height, width) in [-1, 1]."""

    def forward(self, image: Tensor) -> Tensor:
        """Normalise."""
        pixels = image.permute(0, 3, 1, 2).to(torch.float32)
        return (pixels / 127.5 - 1).contiguous()


def vit_with_exits(size: vit.Size = vit.SMALL, after: Sequence[int] = VIT_EXITS) -> Model:
    """A vision transformer with a linear head on the class token after some of its blocks."""
    parts = [(nn.Sequential(*blocks), head) for blocks, head in vit.segments(size, after)]
    shapes = [(size.tokens, size.width)] * len(parts)
    return _model(parts, shapes, size.image, size.classes)


def resnet_with_exits(
    width: int = 64,
    image: int = 224,
    classes: int = 1000,
    layers: Sequence[int] = RESNET_LAYERS,
) -> Model:
    """A residual network of bottlenecks with a linear head after each of its layers.

    Args:
        width: Channels of the first convolution; 64 in a ResNet-50.
        image: Side of the image, in pixels; a multiple of 32.
        classes: Logits of an exit.
        layers: Bottlenecks in each layer.
    """
    torch.manual_seed(0)
    stem = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    parts, shapes = [], []
    channels, side = width, image // 4
    for i, count in enumerate(layers):
        middle, stride = width * 2**i, 2 if i else 1
        blocks: list[nn.Module] = [] if i else list(stem)
        for j in range(count):
            blocks.append(Bottleneck(channels, middle, 1 if j else stride))
            channels = middle * _EXPANSION
        side //= stride
        parts.append((nn.Sequential(*blocks), PooledHead(channels, classes)))
        shapes.append((channels, side, side))
    return _model(parts, shapes, image, classes)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution beside a shortcut."""

    def __init__(self, channels: int, middle: int, stride: int) -> None:
        super().__init__()
        out = middle * _EXPANSION
        self.body = nn.Sequential(
            nn.Conv2d(channels, middle, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, middle, 3, stride, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, features: Tensor) -> Tensor:
        """Add the body to the shortcut."""
        result: Tensor = torch.relu(self.body(features) + self.shortcut(features))
        return result


class PooledHead(nn.Module):
    """Logits (batch, classes) from the mean over all places."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Classify."""
        logits: Tensor = self.linear(features.mean(dim=(2, 3)))
        return logits


def _model(
    parts: Sequence[tuple[nn.Module, nn.Module]],
    shapes: Sequence[tuple[int, ...]],
    side: int,
    classes: int,
) -> Model:
    """Preprocess, then a segment and a head per exit."""
    image = TensorSpec("image", ("batch", side, side, 3), "uint8")
    before = TensorSpec("pixels", ("batch", 3, side, side), "float32")
    stages = [Stage("preprocess", "preprocess", (image,), (before,))]
    modules: dict[str, nn.Module] = {"preprocess": Preprocess()}
    exits = []
    for k, ((segment, head), shape) in enumerate(zip(parts, shapes, strict=True), 1):
        after = TensorSpec(f"features{k}", ("batch", *shape), "float32")
        logits = TensorSpec(f"logits{k}", ("batch", classes), "float32")
        stages.append(Stage(f"segment{k}", "segment", (before,), (after,)))
        stages.append(Stage(f"head{k}", "head", (after,), (logits,)))
        modules |= {f"segment{k}": segment, f"head{k}": head}
        exits.append(Exit(f"exit{k}", logits.name))
        before = after
    for module in modules.values():
        module.eval()
    names = tuple(str(i) for i in range(classes))
    return Model(Cascade(names, image, tuple(stages), tuple(exits)), modules)
