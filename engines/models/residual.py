"""A residual network for small images, whose blocks are places for exits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from edge_runtime.errors import ConfigError


@dataclass(frozen=True)
class ResidualOptions:
    """What `Residual` can be asked for.

    Attributes:
        widths: Channels of each stage; no stage is narrower than the one before.
        blocks: Blocks of each stage. [3, 3, 3] makes a ResNet-20, [9, 9, 9] a ResNet-56.
        stem_stride: Stride of the first convolution; 1 for images of 32 pixels.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    blocks: tuple[int, ...] = (3, 3, 3)
    stem_stride: int = 1

    def __post_init__(self) -> None:
        """Refuse what no network could be."""
        if not self.widths or len(self.widths) != len(self.blocks):
            raise ConfigError(
                "widths and blocks",
                got=f"{len(self.widths)} and {len(self.blocks)} stages",
                expected="as many of one as of the other, at least one",
            )
        if min(self.widths) < 1 or list(self.widths) != sorted(self.widths):
            raise ConfigError(
                "widths", got=list(self.widths), expected="positive and never falling"
            )
        if min(self.blocks) < 1:
            raise ConfigError("blocks", got=list(self.blocks), expected="at least 1 in each stage")
        if self.stem_stride < 1:
            raise ConfigError("stem_stride", got=self.stem_stride, expected=">= 1")


class Residual(nn.Module):
    """Residual network on images (batch, channels, height, width) float -> logits.

    A 3 x 3 convolution, stages of which all but the first begin with stride 2, the mean of all
    places, a linear classifier. Shortcuts have no parameters: where the shape changes they take
    every second place and fill new channels with zeros.

    Args:
        classes: Number of logits.
        channels: Of the image.
        options: Widths, blocks and the stride of the stem.

    Reference:
        He et al., Deep Residual Learning for Image Recognition, 2016, section 4.2 (shortcuts of
        option A).
    """

    def __init__(
        self, classes: int, channels: int = 3, options: ResidualOptions | None = None
    ) -> None:
        super().__init__()
        options = options or ResidualOptions()
        widths = options.widths
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, options.stem_stride, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        self.stages = nn.Sequential()
        before = widths[0]
        for i, (width, count) in enumerate(zip(widths, options.blocks, strict=True)):
            strides = [2 if i else 1] + [1] * (count - 1)
            befores = [before] + [width] * (count - 1)
            self.stages.append(nn.Sequential(*map(_Block, befores, [width] * count, strides)))
            before = width
        self.classifier = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Linear:
        """The layer that makes the logits, as timm's models name theirs."""
        return self.classifier

    def forward(self, pixels: Tensor) -> Tensor:
        """Classify.

        Args:
            pixels: Shape (batch, channels, height, width), float.

        Returns:
            Logits, shape (batch, classes).
        """
        logits: Tensor = self.classifier(self.stages(self.stem(pixels)).mean((2, 3)))
        return logits


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.more = stride, width - before
        self.first = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.second = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        made = self.second(self.first(x))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.more:
            x = functional.pad(x, (0, 0, 0, 0, 0, self.more))
        return functional.relu(x + made)
