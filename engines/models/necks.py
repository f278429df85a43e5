"""Necks: what an exit does with a block's features before its linear head.

A neck is a class with a name; a new one needs nothing but this:

    @register("mean_and_max")
    class MeanAndMax(Neck):
        def forward(self, map: Tensor, cls: Tensor | None) -> Tensor:
            return map.mean((2, 3)) + map.amax((2, 3))

Its options, if it has any, are a frozen dataclass `Options` in the class, read strictly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from edge_runtime import schema
from edge_runtime.errors import ConfigError
from engines.models.features import Layout

_NAME = re.compile(r"[A-Za-z0-9_]+")

#: Width of an attention head where nothing else is asked for: 12 heads of a ViT-B, 6 of a ViT-S.
_HEAD_WIDTH = 64


class Neck(nn.Module):
    """From features to one vector per sample.

    Args:
        layout: Of the features that it will read.
        options: An instance of the class's `Options`.

    Attributes:
        Options: Frozen dataclass of what the neck can be asked for.
        layout: Of the features that it reads.
        width: Numbers in the vector; the layout's, where the class does not say otherwise.
    """

    @dataclass(frozen=True)
    class Options:
        """No options."""

    def __init__(self, layout: Layout, options: Any) -> None:
        super().__init__()
        self.layout = layout
        self.width = layout.width

    def forward(self, map: Tensor, cls: Tensor | None) -> Tensor:
        """Reduce features to a vector.

        Args:
            map: Features of each place, shape (batch, width, height, width of the grid), float.
            cls: The class token, shape (batch, width); None where the backbone has none.

        Returns:
            Shape (batch, `width`).
        """
        raise NotImplementedError


NeckClass = TypeVar("NeckClass", bound=type[Neck])

#: Name -> class; `register` adds to it.
NECKS: dict[str, type[Neck]] = {}


def register(name: str) -> Callable[[NeckClass], NeckClass]:
    """Give a class of necks the name by which configurations call it.

    Raises:
        ConfigError: Another class has the name, or it is not letters, digits and "_".
    """
    if not _NAME.fullmatch(name):
        raise ConfigError("name of a neck", got=repr(name), expected="letters, digits and '_'")

    def add(neck: NeckClass) -> NeckClass:
        if name in NECKS:
            raise ConfigError(f"a neck {name!r} exists: {NECKS[name].__qualname__}")
        NECKS[name] = neck
        return neck

    return add


def read_options(name: str, options: Mapping[str, Any], where: str = "neck") -> Any:
    """Read the options of a neck.

    Args:
        name: Of the neck.
        options: As plain data.
        where: The place that messages name.

    Returns:
        An instance of the class's `Options`.

    Raises:
        ConfigError: No neck has the name, or an option is unknown or has a value that can't be.
    """
    if name not in NECKS:
        raise ConfigError(f"{where}: unknown neck {name!r}", remedy=schema.nearest(name, NECKS))
    return schema.read(NECKS[name].Options, options, f"{where}: {name}")


def build_neck(name: str, options: Mapping[str, Any], layout: Layout, where: str = "neck") -> Neck:
    """Make a neck for features of a layout.

    Args:
        name: Of the neck.
        options: As plain data.
        layout: Of the features that it will read.
        where: The place that messages name.

    Raises:
        ConfigError: As for `read_options`, or the options don't fit the layout.
    """
    read = read_options(name, options, where)
    try:
        return NECKS[name](layout, read)
    except ConfigError as error:
        raise ConfigError(f"{where}: {name}: {error}") from error


@register("pool")
class Pool(Neck):
    """The class token, or the mean of all places where there is none; no parameters."""

    def forward(self, map: Tensor, cls: Tensor | None) -> Tensor:
        """Pick or average."""
        return _mean(map) if cls is None else cls


@register("mlp")
class Mlp(Neck):
    """The control of the comparison: a hidden layer on the class token, or on the mean.

    Reference:
        BranchyNet's fully connected exits, in the terms of thesis section 4.3.
    """

    @dataclass(frozen=True)
    class Options:
        """What it can be asked for.

        Attributes:
            hidden: Numbers in the hidden layer, which are also those it hands on; None for the
                backbone's width.
        """

        hidden: int | None = None

        def __post_init__(self) -> None:
            """Refuse an empty layer."""
            if self.hidden is not None and self.hidden < 1:
                raise ConfigError("hidden", got=self.hidden, expected=">= 1")

    def __init__(self, layout: Layout, options: Options) -> None:
        super().__init__(layout, options)
        self.width = options.hidden or layout.width
        self.hidden = nn.Linear(layout.width, self.width)

    def forward(self, map: Tensor, cls: Tensor | None) -> Tensor:
        """Pool, then transform."""
        return nn.functional.gelu(self.hidden(_mean(map) if cls is None else cls))


@register("lph")
class LocalPerception(Neck):
    """Local perception head: convolutions on the map, averaged, plus the class token.

    1 x 1 convolution, GELU, batch norm; a depth-wise k x k one, GELU, batch norm, with a shortcut
    around it; 1 x 1 convolution, batch norm. The hidden width is the backbone's, as in the
    published weights: the expansion that the text speaks of is 1.

    Reference:
        Thesis, section 4.3 (Xu et al., LGViT, 2023), equations of LPH and G.
    """

    @dataclass(frozen=True)
    class Options:
        """What it can be asked for.

        Attributes:
            kernel: Side of the depth-wise convolution, an odd number; 0 leaves it out.
        """

        kernel: int = 3

        def __post_init__(self) -> None:
            """Refuse a kernel without a centre."""
            if self.kernel and (self.kernel < 3 or self.kernel % 2 == 0):
                raise ConfigError("kernel", got=self.kernel, expected="0, or an odd number >= 3")

    def __init__(self, layout: Layout, options: Options) -> None:
        super().__init__(layout, options)
        width, kernel = layout.width, options.kernel
        reach = 2 * min(layout.grid) - 1
        if kernel > reach:
            raise ConfigError(
                f"kernel on a grid of {_shown(layout)}", got=kernel, expected=f"at most {reach}"
            )
        self.enter = nn.Sequential(nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width))
        self.mix = (
            nn.Sequential(
                nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width),
                nn.GELU(),
                nn.BatchNorm2d(width),
            )
            if kernel
            else None
        )
        self.leave = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width))

    def forward(self, map: Tensor, cls: Tensor | None) -> Tensor:
        """Convolve, average, add the class token."""
        hidden = self.enter(map)
        if self.mix is not None:
            hidden = hidden + self.mix(hidden)
        return _plus(_mean(self.leave(hidden)), cls)


@register("gah")
class GlobalAggregation(Neck):
    """Global aggregation head: self-attention among every s-th place, averaged, plus CLS.

    The published weights subsample with an average pool of kernel 1, which picks places and
    averages nothing; queries, keys and values have no bias.

    Reference:
        Thesis, section 4.3 (Xu et al., LGViT, 2023), equations of PFC and GAH.
    """

    @dataclass(frozen=True)
    class Options:
        """What it can be asked for.

        Attributes:
            stride: Every how many places, down and across, one is kept.
            heads: Attention heads; None for one per 64 numbers of the width (12 for ViT-B), or the
                nearest smaller number that divides it.
        """

        stride: int = 2
        heads: int | None = None

        def __post_init__(self) -> None:
            """Refuse numbers below one."""
            for name, value in (("stride", self.stride), ("heads", self.heads)):
                if value is not None and value < 1:
                    raise ConfigError(name, got=value, expected=">= 1")

    def __init__(self, layout: Layout, options: Options) -> None:
        super().__init__(layout, options)
        width = layout.width
        if options.stride > max(layout.grid):
            raise ConfigError(
                f"stride on a grid of {_shown(layout)}",
                got=options.stride,
                expected=f"at most {max(layout.grid)}",
            )
        self.stride = options.stride
        self.heads = options.heads or _default_heads(width)
        if width % self.heads:
            raise ConfigError(
                "heads",
                got=self.heads,
                expected=f"a divisor of the width {width}",
                remedy=f"For example {_default_heads(width)}",
            )
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, map: Tensor, cls: Tensor | None) -> Tensor:
        """Subsample, attend, average, add the class token."""
        kept = map[:, :, :: self.stride, :: self.stride].flatten(2).transpose(1, 2)
        places, width = kept.shape[1], kept.shape[2]
        qkv = self.qkv(kept).reshape(-1, places, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).reshape(-1, places, width)
        return _plus(self.project(mixed).mean(1), cls)


def _mean(map: Tensor) -> Tensor:
    return map.mean((2, 3))


def _plus(pooled: Tensor, cls: Tensor | None) -> Tensor:
    return pooled if cls is None else pooled + cls


def _default_heads(width: int) -> int:
    """One head per 64 numbers, or the nearest smaller number of heads that divides the width."""
    return next(h for h in range(max(width // _HEAD_WIDTH, 1), 0, -1) if width % h == 0)


def _shown(layout: Layout) -> str:
    return " x ".join(map(str, layout.grid))
