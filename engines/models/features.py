"""What a block's output means: a map of places, and a class token where the backbone has one.

Transformers hand on tokens or maps with the width last, convolutional networks maps with the width
first. `Layout` says which, so that one neck fits all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from edge_runtime.errors import ConfigError


class FeatureMap(NamedTuple):
    """Features of a batch, in the one form that necks read.

    Attributes:
        map: Features of each place, shape (batch, width, height, width of the grid), float.
        cls: The class token, shape (batch, width); None where the backbone has none.
    """

    map: Tensor
    cls: Tensor | None


@dataclass(frozen=True)
class Layout:
    """How the output of a block is laid out.

    Attributes:
        kind: "tokens": (batch, prefix + height * width of the grid, width); "NHWC": (batch, height,
            width of the grid, width); "NCHW": (batch, width, height, width of the grid).
        prefix: Tokens in front of those of the places; 0 but for tokens.
        grid: Places, as (height, width).
        width: Numbers per place.
        has_cls: Whether the first token of the prefix is a class token. Without one a prefix holds
            registers only, which no neck reads.
    """

    kind: Literal["tokens", "NHWC", "NCHW"]
    prefix: int
    grid: tuple[int, int]
    width: int
    has_cls: bool = True

    @classmethod
    def of(cls, model: nn.Module, feature: Tensor, image: tuple[int, int] = (1, 1)) -> Layout:
        """The layout of a block's output.

        Tokens are split into prefix and grid by what timm's models say of themselves
        (`patch_embed.grid_size`, `num_prefix_tokens`, `cls_token`). A map's last axis is its width
        where the model says so (`output_fmt`) or where only the axes before it are to each other as
        the sides of the image.

        Args:
            model: The backbone.
            feature: Output of one of its blocks, for any batch.
            image: Height and width of the image, or a ratio like theirs.

        Raises:
            ConfigError: The output is no map and no tokens of a grid.
        """
        shape = tuple(int(length) for length in feature.shape)
        if len(shape) == 4:
            if _width_is_last(model, shape, image):
                return cls("NHWC", 0, (shape[1], shape[2]), shape[3], has_cls=False)
            return cls("NCHW", 0, (shape[2], shape[3]), shape[1], has_cls=False)
        if len(shape) == 3:
            prefix, grid = _tokens(model, shape[1])
            has_cls = prefix > 0 and _has_class_token(model)
            return cls("tokens", prefix, grid, shape[2], has_cls=has_cls)
        raise ConfigError(
            "an exit can't read the output of its layer",
            got=f"shape {shape}",
            expected="tokens (batch, tokens, width) or a map with 4 axes",
        )

    def read(self, feature: Tensor) -> FeatureMap:
        """Bring a block's output into the one form.

        Args:
            feature: Of this layout, any batch.

        Returns:
            The map (batch, width, height, width of the grid), and the class token (batch, width).
        """
        if self.kind == "NCHW":
            return FeatureMap(feature, None)
        if self.kind == "NHWC":
            return FeatureMap(feature.permute(0, 3, 1, 2), None)
        places = feature[:, self.prefix :].transpose(1, 2)
        cls = feature[:, 0] if self.prefix and self.has_cls else None
        return FeatureMap(places.reshape(-1, self.width, *self.grid), cls)


def _width_is_last(model: nn.Module, shape: tuple[int, ...], image: tuple[int, int]) -> bool:
    """Whether a map is (batch, height, width, channels)."""
    said = str(getattr(model, "output_fmt", "")).upper()
    if said in ("NHWC", "NCHW"):
        return said == "NHWC"
    return _is_grid(shape[1], shape[2], image) and not _is_grid(shape[2], shape[3], image)


def _is_grid(height: int, width: int, image: tuple[int, int]) -> bool:
    """Whether some stride makes such a grid of an image, rounded up or down."""
    return abs(height * image[1] - width * image[0]) < max(image)


def _tokens(model: nn.Module, tokens: int) -> tuple[int, tuple[int, int]]:
    """Prefix and grid of a number of tokens."""
    known = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if isinstance(known, tuple) and len(known) == 2:
        prefix = tokens - math.prod(known)
        if prefix in {0, *_prefixes(model)}:
            return prefix, (int(known[0]), int(known[1]))
    for prefix in _prefixes(model):
        side = math.isqrt(max(tokens - prefix, 0))
        if side and side * side == tokens - prefix:
            return prefix, (side, side)
    raise ConfigError(
        "an exit can't read the output of its layer",
        got=f"{tokens} tokens",
        expected="those of a grid, and class and register tokens in front",
    )


def _prefixes(model: nn.Module) -> tuple[int, ...]:
    """Lengths that the prefix may have, the likely one first."""
    said = getattr(model, "num_prefix_tokens", None)
    return (said, 0) if isinstance(said, int) and said else (0, 1, 2)


def _has_class_token(model: nn.Module) -> bool:
    """Whether the first token of a prefix is one for the class."""
    said = getattr(model, "has_class_token", None)
    if isinstance(said, bool):
        return said
    return not hasattr(model, "cls_token") or model.cls_token is not None
