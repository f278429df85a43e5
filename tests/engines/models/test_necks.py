"""Necks, against their formulas written out, and a new one that is registered."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from edge_runtime.errors import ConfigError  # noqa: E402
from engines.models.early_exit import EarlyExit, parse_exits  # noqa: E402
from engines.models.features import Layout  # noqa: E402
from engines.models.necks import NECKS, Neck, build_neck, register  # noqa: E402
from engines.models.residual import Residual, ResidualOptions  # noqa: E402

pytestmark = pytest.mark.torch

TOKENS = Layout("tokens", 1, (4, 5), 8)


def features(layout: Layout = TOKENS) -> tuple[Tensor, Tensor]:
    """A map and a class token of a batch of three."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(3, layout.width, *layout.grid, generator=generator),
        torch.randn(3, layout.width, generator=generator),
    )


def neck_of(name: str, layout: Layout = TOKENS, **options: Any) -> Neck:
    torch.manual_seed(1)
    neck = build_neck(name, options, layout).eval()
    for module in neck.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                nn.init.uniform_(tensor, 0.5, 2)
    return neck


def parameters(neck: Neck) -> int:
    return sum(p.numel() for p in neck.parameters())


@torch.no_grad()
def test_local_perception_is_its_formula() -> None:
    """Thesis, section 4.3: Pool(Conv(G(X))) + CLS, with the shortcut of the published weights."""
    neck = neck_of("lph", kernel=3)
    map, cls = features()
    (first, _, norm1), (deep, _, norm2), (last, norm3) = neck.enter, neck.mix, neck.leave
    hidden = norm1(
        nn.functional.gelu(
            torch.einsum("oi,bihw->bohw", first.weight[..., 0, 0], map) + first.bias[:, None, None]
        )
    )
    padded = nn.functional.pad(hidden, (1, 1, 1, 1))
    around = sum(
        padded[:, :, i : i + 4, j : j + 5] * deep.weight[:, 0, i, j, None, None]
        for i in range(3)
        for j in range(3)
    )
    hidden = hidden + norm2(nn.functional.gelu(around + deep.bias[:, None, None]))
    want = norm3(last(hidden)).mean((2, 3)) + cls
    torch.testing.assert_close(neck(map, cls), want)


@torch.no_grad()
def test_global_aggregation_is_its_formula() -> None:
    """Thesis, section 4.3: Pool(MHSA(AvgPool(X))) + CLS."""
    neck = neck_of("gah", stride=2, heads=2)
    map, cls = features()
    kept = nn.AvgPool2d(1, 2)(map).flatten(2).transpose(1, 2)
    assert kept.shape == (3, 2 * 3, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    attention.in_proj_weight.copy_(neck.qkv.weight)
    attention.in_proj_bias.zero_()
    attention.out_proj.load_state_dict(neck.project.state_dict())
    want = attention(kept, kept, kept, need_weights=False)[0].mean(1) + cls
    torch.testing.assert_close(neck(map, cls), want)


@torch.no_grad()
def test_pool_and_mlp_read_the_class_token_or_the_mean() -> None:
    map, cls = features()
    pool, mlp = neck_of("pool"), neck_of("mlp", hidden=5)
    assert parameters(pool) == 0
    assert torch.equal(pool(map, cls), cls)
    torch.testing.assert_close(pool(map, None), map.mean((2, 3)))
    assert mlp.width == 5
    torch.testing.assert_close(mlp(map, cls), nn.functional.gelu(mlp.hidden(cls)))
    torch.testing.assert_close(mlp(map, None), nn.functional.gelu(mlp.hidden(map.mean((2, 3)))))


@torch.no_grad()
@pytest.mark.parametrize("name", ["lph", "gah"])
def test_without_a_class_token_its_term_is_left_out(name: str) -> None:
    map, cls = features()
    neck = neck_of(name)
    torch.testing.assert_close(neck(map, None) + cls, neck(map, cls))


def test_parameters_of_the_published_necks() -> None:
    """Thesis, table 4 and figure 20, less the heads of 76,900 each."""
    layout = Layout("tokens", 1, (14, 14), 768)
    with torch.device("meta"):
        counts = [
            parameters(build_neck(name, options, layout))
            for name, options in (("lph", {"kernel": 3}), ("lph", {"kernel": 0}), ("gah", {}))
        ]
        assert build_neck("gah", {}, layout).heads == 12
    assert counts == [1_193_472, 1_184_256, 2_360_064]


@torch.no_grad()
def test_each_layout_reads_its_own_form() -> None:
    map, cls = features()
    tokens = torch.cat([cls[:, None], map.flatten(2).transpose(1, 2)], 1)
    read = TOKENS.read(tokens)
    assert torch.equal(read.map, map)
    assert torch.equal(read.cls, cls)
    registers = Layout("tokens", 1, (4, 5), 8, has_cls=False).read(tokens)
    assert torch.equal(registers.map, map)
    assert registers.cls is None
    last = Layout("NHWC", 0, (4, 5), 8).read(map.permute(0, 2, 3, 1))
    assert torch.equal(last.map, map)
    assert last.cls is None
    assert torch.equal(Layout("NCHW", 0, (4, 5), 8).read(map).map, map)


class Says(nn.Module):
    """A model that says of itself what timm's models say."""

    def __init__(self, grid: tuple[int, int] | None = None, **said: Any) -> None:
        super().__init__()
        if grid is not None:
            self.patch_embed = nn.Module()
            self.patch_embed.grid_size = grid
        for name, value in said.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("model", "shape", "image", "layout"),
    [
        (Says((4, 6), num_prefix_tokens=1), (2, 25, 8), (4, 6), ("tokens", 1, (4, 6), 8, True)),
        # Registers only: nothing stands for the class.
        (
            Says((4, 4), num_prefix_tokens=4, cls_token=None),
            (2, 20, 8),
            (1, 1),
            ("tokens", 4, (4, 4), 8, False),
        ),
        # The class token joins later, as in CaiT.
        (Says((4, 4), num_prefix_tokens=1), (2, 16, 8), (1, 1), ("tokens", 0, (4, 4), 8, False)),
        # Downsampled after the patches.
        (Says((8, 8)), (2, 16, 8), (1, 1), ("tokens", 0, (4, 4), 8, False)),
        (Says(), (2, 17, 8), (1, 1), ("tokens", 1, (4, 4), 8, True)),
        (Says(output_fmt="NHWC"), (2, 8, 8, 8), (1, 1), ("NHWC", 0, (8, 8), 8, False)),
        (Says(), (2, 8, 8, 8), (1, 1), ("NCHW", 0, (8, 8), 8, False)),
        (Says(), (2, 4, 4, 8), (1, 1), ("NHWC", 0, (4, 4), 8, False)),
        (Says(), (2, 15, 20, 96), (480, 640), ("NHWC", 0, (15, 20), 96, False)),
        (Says(), (2, 20, 15, 20), (480, 640), ("NCHW", 0, (15, 20), 20, False)),
        (Says(), (2, 96, 8, 10), (120, 160), ("NCHW", 0, (8, 10), 96, False)),
    ],
)
def test_a_layout_is_found(
    model: nn.Module, shape: tuple[int, ...], image: tuple[int, int], layout: tuple[Any, ...]
) -> None:
    assert Layout.of(model, torch.zeros(shape), image) == Layout(*layout)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 8), "an exit can't read the output of its layer: got shape (2, 8), expected tokens"),
        ((2, 14, 8), "an exit can't read the output of its layer: got 14 tokens, expected those"),
    ],
)
def test_what_is_no_map_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Layout.of(Says(), torch.zeros(shape))
    assert str(raised.value).startswith(message)


@pytest.fixture
def mean_and_max() -> Iterator[str]:
    """A new neck, registered for one test."""

    @register("mean_and_max")
    class MeanAndMax(Neck):
        @dataclass(frozen=True)
        class Options:
            share: float = 0.5

        def __init__(self, layout: Layout, options: Options) -> None:
            super().__init__(layout, options)
            self.share = options.share

        def forward(self, map: Tensor, cls: Tensor | None) -> Tensor:
            return self.share * map.mean((2, 3)) + (1 - self.share) * map.amax((2, 3))

    yield "mean_and_max"
    del NECKS["mean_and_max"]


def test_a_new_neck_needs_a_class_and_a_name(mean_and_max: str) -> None:
    torch.manual_seed(0)
    backbone = Residual(5, 3, ResidualOptions((4,), (2,)))
    images = torch.randn(2, 3, 8, 8)
    exits = parse_exits([[0, mean_and_max, {"share": 0.25}]])
    model = EarlyExit(backbone, exits, images).eval()
    map = model.features(images)[0]
    pooled = 0.25 * map.mean((2, 3)) + 0.75 * map.amax((2, 3))
    torch.testing.assert_close(model(images)[0], model.heads[0].head(pooled))
    with pytest.raises(ConfigError, match=r"mean_and_max: unknown key 'shares'\. Did you mean"):
        parse_exits([[0, mean_and_max, {"shares": 0.25}]])


def test_a_name_is_given_once() -> None:
    with pytest.raises(ConfigError, match="a neck 'gah' exists: GlobalAggregation"):
        register("gah")(Neck)
    with pytest.raises(ConfigError, match="name of a neck: got 'a-b', expected letters"):
        register("a-b")
