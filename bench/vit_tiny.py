"""A vision transformer of ViT-Tiny's size in four segments with three heads, random weights.

12 blocks, width 192, 3 attention heads, 197 tokens, 1000 classes (Touvron et al., DeiT, 2021,
Table 1: "DeiT-Ti"). It measures what staging costs; it classifies nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engines.export import TorchStage

WIDTH, HEADS, BLOCKS, PATCH, IMAGE, CLASSES = 192, 3, 12, 16, 224, 1000
SEGMENTS = 4


class Block(nn.Module):
    """Pre-norm transformer block on tokens of shape (batch, 197, 192)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend, then transform each token."""
        batch, count, _ = tokens.shape
        qkv = self.qkv(self.norm1(tokens)).reshape(batch, count, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        tokens = tokens + self.out(mixed.transpose(1, 2).reshape(batch, count, WIDTH))
        hidden = nn.functional.gelu(self.up(self.norm2(tokens)))
        result: Tensor = tokens + self.down(hidden)
        return result


class Stem(nn.Module):
    """Pixels (batch, 3, 224, 224) -> class token and patch tokens with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 1 + (IMAGE // PATCH) ** 2, WIDTH) * 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed."""
        tokens = self.patches(pixels).flatten(2).transpose(1, 2)
        token = self.token.expand(tokens.shape[0], -1, -1)
        result: Tensor = torch.cat([token, tokens], 1) + self.position
        return result


class Head(nn.Module):
    """Logits (batch, 1000) from the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Classify."""
        logits: Tensor = self.linear(self.norm(tokens[:, 0]))
        return logits


def stages() -> tuple[list[TorchStage], list[tuple[str, str]]]:
    """Four segments of three blocks; heads after the first three; the last segment answers itself.

    Returns:
        The stages, and the exits as (name, logits tensor).
    """
    torch.manual_seed(0)
    per_segment = BLOCKS // SEGMENTS
    found: list[TorchStage] = []
    exits = []
    before = "pixels"
    for i in range(1, SEGMENTS + 1):
        last = i == SEGMENTS
        parts: list[nn.Module] = [Stem()] if i == 1 else []
        parts += [Block() for _ in range(per_segment)]
        parts += [Head()] if last else []
        after = f"logits{i}" if last else f"tokens{i}"
        found.append(
            TorchStage(f"segment{i}", "segment", nn.Sequential(*parts), (before,), (after,))
        )
        if not last:
            found.append(TorchStage(f"head{i}", "head", Head(), (after,), (f"logits{i}",)))
        exits.append((f"exit{i}", f"logits{i}"))
        before = after
    return found, exits
