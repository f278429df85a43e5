"""Models of timm and of our own come apart into segments that compute what the whole computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from edge_runtime.cascade import Exit  # noqa: E402
from edge_runtime.errors import ConfigError, EngineBuildError  # noqa: E402
from edge_runtime.manifest import Bundle  # noqa: E402
from edge_runtime.tensors import BATCH  # noqa: E402
from engines.export import TorchStage, export_stages  # noqa: E402
from engines.macs import macs  # noqa: E402
from engines.split import Taps, equal_macs, layers, macs_until, split  # noqa: E402
from tests.engines.conftest import chain  # noqa: E402
from tests.engines.test_tensorrt_builds import build_all  # noqa: E402

pytestmark = pytest.mark.torch


@dataclass(frozen=True)
class Family:
    """A small model of timm.

    Attributes:
        model: Its name in timm's registry, or its class where `blocks` are given.
        layers: The layers it has.
        equal: Those of two cuts at equal MACs.
        at: Places to cut it at; `equal` and others in between.
        options: Options of the model.
        blocks: Blocks of each stage, in timm's notation.
    """

    model: str
    layers: tuple[str, ...]
    equal: tuple[str, ...]
    at: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    blocks: tuple[tuple[str, ...], ...] = ()


VIT = {"img_size": 32, "embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 8}
FAMILIES = {
    "vit": Family(
        "vit_tiny_patch16_224",
        layers=("blocks.0", "blocks.1", "blocks.2"),
        equal=("blocks.0", "blocks.1"),
        at=("patch_embed", "blocks.0", "blocks.1", "norm"),
        options=VIT,
    ),
    "deit": Family(
        "deit_tiny_distilled_patch16_224",
        layers=("blocks.0", "blocks.1", "blocks.2"),
        equal=("blocks.0", "blocks.1"),
        at=("blocks.0", "blocks.1"),
        options=VIT,
    ),
    "swin": Family(
        "swin_tiny_patch4_window7_224",
        layers=("layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"),
        equal=("layers.0.blocks.0", "layers.0.blocks.1"),
        at=("layers.0.blocks.0", "layers.0.blocks.1", "layers.1.downsample", "layers.1"),
        options={
            "img_size": 32,
            "embed_dim": 8,
            "depths": (2, 1),
            "num_heads": (2, 2),
            "window_size": 4,
        },
    ),
    "convnext": Family(
        "convnextv2_atto",
        layers=tuple(f"stages.{i}.blocks.{j}" for i in range(4) for j in range(1 + (i == 2))),
        equal=("stages.0.blocks.0", "stages.1.blocks.0"),
        at=("stages.0.blocks.0", "stages.1", "stages.2.blocks.0", "head.global_pool"),
        options={"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20)},
    ),
    "resnet": Family(
        "resnet18",
        layers=("layer1.0", "layer2.0", "layer3.0", "layer4.0"),
        equal=("layer1.0", "layer2.0"),
        at=("maxpool", "layer1.0", "layer2", "layer4.0", "global_pool"),
        options={"layers": (1, 1, 1, 1), "channels": (4, 8, 8, 8), "stem_width": 4},
    ),
    "efficientnet": Family(
        "EfficientNet",
        layers=("blocks.0.0", "blocks.1.0", "blocks.1.1", "blocks.2.0"),
        equal=("blocks.0.0", "blocks.1.1"),
        at=("bn1", "blocks.0.0", "blocks.1.1", "conv_head"),
        options={"stem_size": 8, "num_features": 16, "act_layer": "silu"},
        blocks=(
            ("ds_r1_k3_s1_e1_c8_se0.25",),
            ("ir_r2_k3_s2_e2_c12_se0.25",),
            ("ir_r1_k5_s2_e2_c16",),
        ),
    ),
    "mobilenet": Family(
        "MobileNetV3",
        layers=("blocks.0.0", "blocks.1.0", "blocks.1.1", "blocks.2.0"),
        equal=("blocks.0.0", "blocks.1.0"),
        at=("blocks.0.0", "blocks.1.0", "blocks.2", "global_pool"),
        options={"stem_size": 8, "num_features": 16},
        blocks=(
            ("ds_r1_k3_s2_e1_c8_se0.25_nre",),
            ("ir_r2_k5_s1_e2_c12_se0.25_nhs",),
            ("cn_r1_k1_s1_c24_nhs",),
        ),
    ),
}


def timm_model(name: str, *, blocks: Sequence[Sequence[str]] = (), **options: Any) -> nn.Module:
    """With random weights, none of which leaves a block without effect."""
    from engines.timm_package import timm

    torch.manual_seed(0)
    package = timm()
    if blocks:
        from timm.models._efficientnet_builder import decode_arch_def

        model = getattr(package.models, name)(decode_arch_def([*map(list, blocks)]), **options)
    else:
        model = package.create_model(name, pretrained=False, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1 or not parameter.any():
                parameter += 0.2 * torch.randn_like(parameter)
    assert isinstance(model, nn.Module)
    return model


def model_of(family: Family) -> nn.Module:
    return timm_model(family.model, num_classes=5, blocks=family.blocks, **family.options)


def images(count: int, side: int = 32) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def check_segments(model: nn.Module, at: Sequence[str], side: int = 32) -> list[nn.Module]:
    """Split a model and compare on another batch; returns the segments."""
    segments = split(model, images(1, side), at)
    assert len(segments) == len(at) + 1
    samples = images(4, side)
    with torch.no_grad():
        wanted = Taps(copy.deepcopy(model).eval(), at)(samples)
        for segment, want in zip(segments, wanted, strict=True):
            # As another runtime has it, whatever the layout in memory was.
            samples = segment(samples.contiguous())
            torch.testing.assert_close(samples, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(samples[0], samples[1], rtol=1e-2)
    return segments


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_blocks_are_layers_and_segments_equal_the_whole(family: Family) -> None:
    model = model_of(family).train()
    assert layers(model, images(1)) == family.layers
    assert equal_macs(model, images(1), 2, among=family.layers) == family.equal
    segments = check_segments(model, family.at)
    assert all(module.training for module in model.modules())
    assert not any(segment.training for segment in segments)
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    used = [id(tensor) for part in segments for tensor in (*part.parameters(), *part.buffers())]
    assert set(used) <= own
    assert len(used) == len(set(used)) >= len(list(model.parameters()))


class Block(nn.Module):
    """Adds its input to its output."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.conv(x)
        deep += x
        return self.relu(deep)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x + 1


class Toy(nn.Module):
    """What can go wrong at a cut, in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Identity()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.twice = Block()
        self.alias = self.twice
        self.unused = Block()
        self.pair = Pair()
        self.flat = nn.Flatten(0, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.twice(self.twice(self.blocks(self.stem(self.front(x)))))
        pooled = torch.cat(self.pair(deep.mean((2, 3))), 1)
        spread = self.flat(pooled[:, :, None]).reshape(x.shape[0], 8)
        result: Tensor = self.fc(spread)
        return result


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


TOY = images(2, 8)
BLOCKS = ("blocks.0", "blocks.1", "blocks.2", "blocks.3")


@pytest.mark.parametrize(
    ("at", "says"),
    [
        (["blocks.7"], r"the model has no module 'blocks.7'\. Did you mean 'blocks"),
        ([""], "no module ''"),
        ("blocks.0", "names of modules: got one text, 'blocks.0', expected a list"),
        (["blocks.0", "blocks.0"], "module 'blocks.0' is named twice"),
        (["twice", "alias"], "'twice' and 'alias' are names of one and the same module"),
        (["twice"], "'twice' runs more than once per image. Name one that runs once"),
        (["unused"], "'unused' is not run: the model does not call it"),
        (["pair"], "module 'pair' returns: got tuple, expected one tensor"),
        (["blocks.2", "blocks.1"], "after 'blocks.1': it does not come later than .*'blocks.2'"),
        (["blocks.3", "blocks"], "after 'blocks': it does not come later than .*'blocks.3'"),
        (
            ["blocks.2.conv"],
            "after 'blocks.2.conv': its output doesn't carry everything.*nearest: "
            "'blocks.1' or 'blocks.2'$",
        ),
        (["flat"], "after 'flat': its output is no tensor that has the batch as its first"),
        (["front"], "after 'front': its output is the model's own input"),
        (["fc"], "after 'fc': its output is the model's own output"),
    ],
)
def test_a_cut_that_can_t_be_says_why(toy: Toy, at: Sequence[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        split(toy, TOY, at)
    assert not any(module._forward_hooks for module in toy.modules())
    assert all(module.training for module in toy.modules())


@pytest.mark.parametrize(
    ("example", "error", "says"),
    [
        (np.zeros((2, 3, 8, 8), np.float32), ConfigError, "example: got ndarray"),
        (TOY.to(torch.uint8), ConfigError, "example: got torch.uint8, expected a tensor of floats"),
        (TOY[:0], ConfigError, r"example: got shape \(0, 3, 8, 8\), expected a batch"),
        (TOY[:, :2], EngineBuildError, r"the model failed on shape \(.*torch says: RuntimeError"),
    ],
)
@pytest.mark.parametrize(
    "call", [layers, lambda m, x: split(m, x, []), lambda m, x: macs_until(m, x, [])]
)
def test_an_example_that_does_not_fit_is_refused(
    toy: Toy, call: Callable[[Any, Any], Any], example: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        call(toy, example)


class FixedBatch(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).reshape(int(x.shape[0]), 5)


class Counting(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.images += 1
        return super().forward(x)


class AlwaysDropping(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, training=True)


class Listing(Toy):
    def forward(self, x: Tensor) -> Any:
        return [super().forward(x)]


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        (FixedBatch, EngineBuildError, "can't be exported: torch says.*Take the batch from tensor"),
        (Counting, EngineBuildError, "the model writes into its buffer 'images'"),
        (AlwaysDropping, EngineBuildError, "for a batch of 2 the segments give for the model's"),
        (Listing, ConfigError, "the model returns: got list, expected one tensor"),
    ],
)
def test_a_model_that_can_t_be_split_says_why(
    model: type[Toy], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        split(model(), TOY, ["blocks.0"])


def test_modes_are_given_back_one_by_one(toy: Toy) -> None:
    toy.eval()
    toy.blocks[1].train()
    modes = [module.training for module in toy.modules()]
    split(toy, TOY, ["blocks.0"])
    assert [module.training for module in toy.modules()] == modes


def test_a_module_that_runs_twice_can_stay_inside_of_a_segment(toy: Toy) -> None:
    assert layers(toy, TOY) == BLOCKS
    check_segments(toy, ["blocks"], side=8)


class Nested(nn.Sequential):
    """Numbered modules inside of numbered ones; only some of the inner ones are separators."""

    def __init__(self) -> None:
        plain = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Sequential(nn.Conv2d(4, 4, 1)))
        skipping = Block()
        skipping.conv = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1)), nn.ReLU())
        super().__init__(plain, Block(), skipping, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_layers_are_of_one_depth_where_the_inner_ones_are_not_all_separators() -> None:
    model = Nested()
    assert layers(model, TOY) == ("0.0", "0.1", "1", "2")
    model[0] = nn.Sequential(Block(3), nn.Conv2d(3, 4, 1))
    model[0][0].conv = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)))
    assert layers(model, TOY) == ("0.0", "1", "2")


def test_a_model_without_layers_has_none(toy: Toy) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    assert layers(model, TOY) == ()
    with pytest.raises(
        ConfigError, match=r"expected a model with layers\. Name the modules to choose"
    ):
        equal_macs(model, TOY, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.ReLU())
    with pytest.raises(
        ConfigError, match="the nearest: the model has none that is found by its name"
    ):
        split(model, TOY, ["2"])


class Remembering(nn.Module):
    """Keeps in eval mode what its weights give, as LeViT's attention does with its biases."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 1)
        self.bias = nn.Parameter(torch.ones(3, 1, 1))
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Remembering:
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and not self.kept:
            self.kept["bias"] = self.bias * 2
        return self.body(x) + (self.bias * 2 if self.training else self.kept["bias"])


def test_what_a_model_keeps_of_its_weights_is_no_copy_in_a_segment() -> None:
    model = Remembering()
    segments = split(model, TOY, ["body"])
    before = segments[1](TOY)
    with torch.no_grad():
        model.bias += 1
    torch.testing.assert_close(segments[1](TOY), before + 2)
    torch.testing.assert_close(model.eval()(TOY), segments[1](segments[0](TOY)))


def test_taps_can_be_trained(toy: Toy) -> None:
    taps = Taps(toy, ["blocks.2", "blocks.0"])
    late, early, final = taps(TOY)
    torch.testing.assert_close(final, toy(TOY))
    torch.testing.assert_close(early, toy.blocks[0](toy.stem(TOY)))
    torch.testing.assert_close(late, toy.blocks[2](toy.blocks[1](early)))
    late.sum().backward()
    assert toy.blocks[2].conv.weight.grad is not None
    assert toy.fc.weight.grad is None
    assert not any(module._forward_hooks for module in toy.modules())


def test_macs_are_those_of_the_modules_in_order(toy: Toy) -> None:
    stem, block, fc = 64 * 9 * 3 * 4, 64 * 9 * 4 * 4, 8 * 5
    names = ["blocks.1", "stem"]
    assert macs_until(toy, TOY, names) == (stem + 2 * block, stem, stem + 6 * block + fc)


@pytest.mark.parametrize(
    ("count", "among", "expected"),
    [
        (1, None, ("blocks.2",)),
        (2, BLOCKS, ("blocks.1", "blocks.3")),
        (4, BLOCKS[::-1], BLOCKS),
        (1, ["blocks.3", "blocks.0"], ("blocks.3",)),
        (2, ["blocks.3", "blocks.0"], ("blocks.0", "blocks.3")),
    ],
)
def test_cuts_at_equal_macs_are_the_nearest(
    toy: Toy, count: int, among: Sequence[str] | None, expected: tuple[str, ...]
) -> None:
    assert equal_macs(toy, TOY, count, among) == expected


@pytest.mark.parametrize("count", [0, 5])
def test_as_many_cuts_as_there_are_layers_at_most(toy: Toy, count: int) -> None:
    with pytest.raises(ConfigError, match=f"count of cuts: got {count}, expected 1 to 4"):
        equal_macs(toy, TOY, count, BLOCKS)


class Head(nn.Module):
    """Tokens, NHWC or NCHW features -> logits."""

    def __init__(self, features: Tensor, classes: int) -> None:
        super().__init__()
        square = features.ndim == 4 and features.shape[2] == features.shape[3]
        self.axes = (2, 3) if square else tuple(range(1, features.ndim - 1))
        self.linear = nn.Linear(features.shape[1 if square else -1], classes)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear(features.mean(self.axes))
        return logits


def exported(model: nn.Module, at: Sequence[str], example: Tensor, folder: Path) -> Bundle:
    """A bundle of the segments, with a head after each but the last."""
    segments = split(model, example, at)
    with torch.no_grad():
        *features, logits = Taps(copy.deepcopy(model).eval(), at)(example)
    stages, exits, before = [], [], "pixels"
    for k, (segment, feature) in enumerate(zip(segments, features, strict=False), 1):
        after = f"features{k}"
        head = Head(feature, logits.shape[1])
        stages.append(TorchStage(f"segment{k}", "segment", segment, (before,), (after,)))
        stages.append(TorchStage(f"head{k}", "head", head, (after,), (f"logits{k}",)))
        exits.append(Exit(f"exit{k}", f"logits{k}"))
        before = after
    last = TorchStage(f"segment{len(segments)}", "segment", segments[-1], (before,), ("final",))
    return export_stages(
        [*stages, last],
        [*exits, Exit("final", "final")],
        example=example,
        classes=[str(i) for i in range(logits.shape[1])],
        out=folder / "a.bundle",
        name="a",
    )


@pytest.mark.parametrize("name", ["swin", pytest.param("mobilenet", marks=pytest.mark.slow)])
def test_a_bundle_of_segments_gives_what_the_model_gives(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = model_of(family)
    at = family.layers[1:2]
    bundle = exported(model, at, images(2), tmp_path)
    have = chain(bundle, images(3).numpy())
    with torch.no_grad():
        want = Taps(model.eval(), at)(images(3))
    for tensor, values in zip(("features1", "final"), want, strict=True):
        np.testing.assert_allclose(have[tensor], values.numpy(), rtol=1e-4, atol=1e-5)
    cost = [
        macs(
            bundle.stage_model(record.name, "fp32"),
            {
                s.name: [1 if axis == BATCH else int(axis) for axis in s.shape]
                for s in record.inputs
            },
        )
        for record in bundle.manifest.stages
        if record.kind == "segment"
    ]
    assert tuple(np.cumsum(cost)) == macs_until(model, images(1), at)


@pytest.mark.slow
@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("name", "count", "at"),
    [
        ("efficientvit_b0", 10, ("stages.1.blocks.0", "stages.2.blocks.1", "stages.3.blocks.1")),
        (
            "efficientvit_m0",
            14,
            ("stages.0.blocks.0", "stages.1.blocks.0", "stages.2.downsample.res2.0"),
        ),
        (
            "efficientformerv2_s0",
            14,
            ("stages.1.blocks.0", "stages.2.blocks.3", "stages.3.blocks.0"),
        ),
        ("maxvit_tiny_tf_224", 11, ("stages.0.blocks.1", "stages.2.blocks.0", "stages.2.blocks.3")),
        ("davit_tiny", 12, ("stages.1.blocks.0.0", "stages.2.blocks.0.1", "stages.2.blocks.2.0")),
    ],
)
def test_families_of_the_ordinary_size(
    tensorrt: ModuleType, tmp_path: Path, name: str, count: int, at: tuple[str, ...]
) -> None:
    model = timm_model(name).eval()
    found = layers(model, images(1, 224))
    assert len(found) == count
    assert equal_macs(model, images(1, 224), 3, among=found) == at
    bundle = exported(model, at, images(2, 224), tmp_path)
    assert max(bundle.manifest.provenance["verification"]["worst_relative_error"].values()) < 1e-5
    assert len(build_all(bundle)) == 7
