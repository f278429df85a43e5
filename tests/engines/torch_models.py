"""Small torch models in stages, made for these tests."""

import torch
from torch import nn

from edge_runtime.cascade import Exit
from engines.export import TorchStage

CLASSES = tuple("abcde")


class Convolutions(nn.Sequential):
    """Images (batch, 3, 16, 16) -> features; batch norm and dropout make the mode matter."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Dropout(0.5),
        )


class Pooled(nn.Sequential):
    """Features -> logits."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, len(CLASSES)))


def convolutional() -> tuple[list[TorchStage], list[Exit]]:
    """A saver, two segments, and a head on each; exits "saver", "early", "last"."""
    torch.manual_seed(0)
    saver = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, len(CLASSES)))
    stages = [
        TorchStage("saver", "saver", saver, ("pixels",), ("saver/logits",)),
        TorchStage("segment1", "segment", Convolutions(3, 6), ("pixels",), ("low",)),
        TorchStage("head1", "head", Pooled(6), ("low",), ("early/logits",)),
        TorchStage("segment2", "segment", Convolutions(6, 8), ("low",), ("high",)),
        TorchStage("head2", "head", Pooled(8), ("high",), ("last/logits",)),
    ]
    for stage in stages:
        for module in stage.module.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 2)
    exits = [Exit(name, f"{name}/logits") for name in ("saver", "early", "last")]
    return stages, exits


class Patches(nn.Module):
    """Images -> a class token and patch tokens, as two tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, 16, width) * 0.1)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.cut(pixels).flatten(2).transpose(1, 2) + self.places
        return self.token.expand(len(pixels), -1, -1), tokens


class Block(nn.Module):
    """Attention over both tensors, and an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(
        self, token: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.cat([token, tokens], dim=1)
        normal = self.norm1(whole)
        whole = whole + self.attention(normal, normal, normal, need_weights=False)[0]
        whole = whole + self.mlp(self.norm2(whole))
        return whole[:, :1], whole[:, 1:]


class TokenHead(nn.Module):
    """A class token, and the mean of the patch tokens -> logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classify = nn.Linear(2 * width, len(CLASSES))

    def forward(self, token: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.classify(torch.cat([token[:, 0], tokens.mean(dim=1)], dim=1))


def transformer() -> tuple[list[TorchStage], list[Exit]]:
    """A ViT of two blocks; two tensors cross every boundary; exits "one" and "two"."""
    torch.manual_seed(1)
    stages = [
        TorchStage("patches", "segment", Patches(12), ("pixels",), ("token0", "tokens0")),
        TorchStage("block1", "segment", Block(12), ("token0", "tokens0"), ("token1", "tokens1")),
        TorchStage("head1", "head", TokenHead(12), ("token1", "tokens1"), ("one/logits",)),
        TorchStage("block2", "segment", Block(12), ("token1", "tokens1"), ("token2", "tokens2")),
        TorchStage("head2", "head", TokenHead(12), ("token2", "tokens2"), ("two/logits",)),
    ]
    return stages, [Exit("one", "one/logits"), Exit("two", "two/logits")]
