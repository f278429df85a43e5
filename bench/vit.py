"""Vision transformers with exits and random weights: they measure, and classify nothing.

The sizes are those of Touvron et al., DeiT, 2021, Table 1: "DeiT-Ti" and "DeiT-S".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from engines.export import TorchStage


@dataclass(frozen=True)
class Size:
    """Size of a transformer.

    Attributes:
        width: Numbers per token.
        heads: Attention heads; they divide the width.
        blocks: Transformer blocks.
        patch: Side of a patch, in pixels.
        image: Side of the image, in pixels; a multiple of the patch.
        classes: Logits of an exit.
    """

    width: int
    heads: int
    blocks: int = 12
    patch: int = 16
    image: int = 224
    classes: int = 1000

    @property
    def tokens(self) -> int:
        """Tokens of an image, the class token included."""
        return 1 + (self.image // self.patch) ** 2


TINY = Size(width=192, heads=3)
SMALL = Size(width=384, heads=6)


class Block(nn.Module):
    """Pre-norm transformer block on tokens of shape (batch, tokens, width)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend, then transform each token."""
        batch, count, width = tokens.shape
        qkv = self.qkv(self.norm1(tokens))
        qkv = qkv.reshape(batch, count, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        tokens = tokens + self.out(mixed.transpose(1, 2).reshape(batch, count, width))
        hidden = nn.functional.gelu(self.up(self.norm2(tokens)))
        result: Tensor = tokens + self.down(hidden)
        return result


class Stem(nn.Module):
    """Pixels (batch, 3, image, image) -> class token and patch tokens with positions."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, size.width, size.patch, size.patch)
        self.token = nn.Parameter(torch.randn(1, 1, size.width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, size.tokens, size.width) * 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed."""
        tokens = self.patches(pixels).flatten(2).transpose(1, 2)
        token = self.token.expand(tokens.shape[0], -1, -1)
        result: Tensor = torch.cat([token, tokens], 1) + self.position
        return result


class Head(nn.Module):
    """Logits (batch, classes) from the class token."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(size.width), nn.Linear(size.width, size.classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Classify."""
        logits: Tensor = self.linear(self.norm(tokens[:, 0]))
        return logits


def segments(size: Size, after: Sequence[int]) -> Iterator[tuple[list[nn.Module], Head]]:
    """The parts of each segment and the head behind it; the weights are random but always the same.

    Args:
        size: Of the transformer.
        after: Number of blocks before each exit, ascending; the last is all of them.
    """
    torch.manual_seed(0)
    before = 0
    for count in after:
        parts: list[nn.Module] = [] if before else [Stem(size)]
        parts += [Block(size) for _ in range(count - before)]
        yield parts, Head(size)
        before = count


def stages() -> tuple[list[TorchStage], list[tuple[str, str]]]:
    """A ViT-Tiny in four segments of three blocks; the last segment answers itself.

    Returns:
        The stages, and the exits as (name, logits tensor).
    """
    from engines.export import TorchStage  # needs onnx, which the model itself does not

    found: list[TorchStage] = []
    exits = []
    before, after = "pixels", (3, 6, 9, TINY.blocks)
    for i, (parts, head) in enumerate(segments(TINY, after), 1):
        last = i == len(after)
        parts += [head] if last else []
        made = f"logits{i}" if last else f"tokens{i}"
        found.append(
            TorchStage(f"segment{i}", "segment", nn.Sequential(*parts), (before,), (made,))
        )
        if not last:
            found.append(TorchStage(f"head{i}", "head", head, (made,), (f"logits{i}",)))
        exits.append((f"exit{i}", f"logits{i}"))
        before = made
    return found, exits
