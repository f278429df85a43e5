"""Backbones with exits: what they are made of, what they answer, and what they are exported as."""

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from edge_runtime.config import load  # noqa: E402
from edge_runtime.errors import ConfigError  # noqa: E402
from edge_runtime.manifest import Bundle  # noqa: E402
from engines.export import export_stages  # noqa: E402
from engines.models.backbones import BackboneRecipe, build_backbone  # noqa: E402
from engines.models.early_exit import EarlyExit, EqualMacs, ExitSpec, parse_exits  # noqa: E402
from engines.split import macs_until  # noqa: E402
from tests.engines.conftest import chain  # noqa: E402
from tests.engines.test_tensorrt_builds import build_all  # noqa: E402

pytestmark = pytest.mark.torch

CLASSES = tuple("abcde")
IMAGE = (3, 16, 24)

#: Published for ViT-B/16, see the thesis, listing 2.
PUBLISHED = [
    *([layer, "lph", {"kernel": 3}] for layer in (3, 4)),
    *([layer, "lph", {"kernel": 0}] for layer in (5, 6)),
    *([layer, "gah", {"stride": 2}] for layer in (7, 8)),
    *([layer, "gah", {"stride": 3}] for layer in (9, 10)),
]

VIT = BackboneRecipe(
    "vit_tiny_patch16_224", {"depth": 5, "embed_dim": 16, "num_heads": 2, "patch_size": 4}
)
SWIN = BackboneRecipe(
    "swin_tiny_patch4_window7_224",
    {"depths": [1, 2], "embed_dim": 8, "num_heads": [2, 2], "window_size": 2, "patch_size": 2},
)
RESIDUAL = BackboneRecipe("residual", {"widths": [4, 8], "blocks": [1, 2]})

KINDS: dict[str, tuple[BackboneRecipe, list[list[Any]]]] = {
    "vit": (VIT, [[0, "lph"], [1, "gah", {"heads": 2}], [2, "mlp", {"hidden": 6}], [3]]),
    "swin": (SWIN, [[0, "lph", {"kernel": 0}], ["layers.1.blocks.0", "gah"]]),
    "residual": (RESIDUAL, [["stages.0.0", "lph"]]),
}


def example(batch: int = 2) -> Tensor:
    return torch.randn(batch, *IMAGE, generator=torch.Generator().manual_seed(batch))


def model_of(kind: str, exits: Any = None) -> EarlyExit:
    torch.manual_seed(0)
    recipe, asked = KINDS[kind]
    backbone = build_backbone(recipe, len(CLASSES), IMAGE)
    model = EarlyExit(backbone, parse_exits(asked if exits is None else exits), example())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, EarlyExit]:
    return {kind: model_of(kind).eval() for kind in KINDS}


@pytest.fixture(
    scope="module", params=["vit", "residual", pytest.param("swin", marks=pytest.mark.slow)]
)
def exported(
    request: pytest.FixtureRequest,
    models: dict[str, EarlyExit],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[EarlyExit, Bundle]:
    model = models[request.param]
    stages, exits = model.stages(example())
    bundle = export_stages(
        stages,
        exits,
        example=example(),
        classes=CLASSES,
        out=tmp_path_factory.mktemp(request.param) / "a.bundle",
        name=request.param,
        provenance={"model": model.describe()},
    )
    return model, bundle


def test_the_published_variant_has_the_published_numbers_of_parameters() -> None:
    """Thesis, table 4; on "meta" no memory is taken."""
    with torch.device("meta"):
        backbone = build_backbone(BackboneRecipe("vit_base_patch16_224"), 100, (3, 224, 224))
    model = EarlyExit(backbone, parse_exits(PUBLISHED), torch.zeros(1, 3, 224, 224))
    counts = model.parameter_counts()
    whole = {name: n for name, n in counts.items() if not name.startswith("exit_")}
    assert whole == {
        "patch embeddings": 742_656,
        "encoder": 85_056_000,
        "exits": 14_810_912,
        "classifier": 76_900,
    }
    assert sum(n for name, n in counts.items() if name.startswith("exit_")) == 14_810_912
    assert [counts[f"exit_{layer}"] for layer in (3, 5, 7)] == [1_270_372, 1_261_156, 2_436_964]
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_components_of_other_backbones_are_told_apart(models: dict[str, EarlyExit]) -> None:
    for kind, front, width in (("swin", "patch embeddings", 16), ("residual", "stem", 8)):
        counts = models[kind].parameter_counts()
        assert list(counts)[:3] == [front, "encoder", "exits"]
        assert counts["classifier"] == 5 * (width + 1)
        parts = [n for name, n in counts.items() if not name.startswith("exit_")]
        assert sum(parts) == sum(p.numel() for p in models[kind].parameters())
    assert models["residual"].parameter_counts()["stem"] == 3 * 9 * 4 + 2 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_exit_answers_and_the_backbone_s_own_answer_is_last(
    models: dict[str, EarlyExit], kind: str
) -> None:
    model, x = models[kind], example(3)
    with torch.no_grad():
        logits = model(x)
        features = model.features(x)
        alone = model.heads_on(features)
        torch.testing.assert_close(logits[-1], model.backbone(x))
    assert [tuple(one.shape) for one in logits] == [(3, 5)] * (len(model.exits) + 1)
    assert len(features) == len(logits) == len(alone) + 1
    for one, other in zip((*alone, features[-1]), logits, strict=True):
        torch.testing.assert_close(one, other)


def test_layouts_of_all_kinds_are_read(models: dict[str, EarlyExit]) -> None:
    seen = [models[kind].layouts[0] for kind in ("vit", "swin", "residual")]
    assert [(one.kind, one.grid, one.width) for one in seen] == [
        ("tokens", (4, 6), 16),
        ("NHWC", (8, 12), 8),
        ("NCHW", (16, 24), 4),
    ]
    assert [one.prefix for one in seen] == [1, 0, 0]


def test_gradients_reach_backbone_and_heads_and_a_frozen_backbone_none() -> None:
    model = model_of("vit").train()
    sum(one.square().mean() for one in model(example())).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    model.backbone.requires_grad_(False)
    sum(one.square().mean() for one in model(example())[:-1]).backward()
    assert all(p.grad is not None for p in model.heads.parameters())
    assert all(p.grad is None for p in model.backbone.parameters())


def test_a_copy_is_a_model_of_its_own(models: dict[str, EarlyExit]) -> None:
    """As averaged weights need it."""
    model, twin = models["vit"], copy.deepcopy(models["vit"])
    with torch.no_grad():
        before = model(example())
        twin.backbone.patch_embed.proj.weight.zero_()
        assert all(torch.equal(a, b) for a, b in zip(model(example()), before, strict=True))
        assert not torch.equal(twin(example())[0], before[0])
    names = [*model.state_dict()]
    assert {name.partition(".")[0] for name in names} == {"backbone", "heads"}


def test_building_leaves_the_backbone_s_mode_and_statistics() -> None:
    backbone = build_backbone(RESIDUAL, 5, IMAGE).train()
    backbone.stem.eval()
    modes = [module.training for module in backbone.modules()]
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    EarlyExit(backbone, [ExitSpec(0)], example())
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(before[name], t) for name, t in backbone.state_dict().items())


def test_names_of_stages_tensors_and_exits(exported: tuple[EarlyExit, Bundle]) -> None:
    model, bundle = exported
    cascade = bundle.cascade
    assert [exit_.name for exit_ in cascade.exits] == [
        *(f"exit_{label}" for label in model.labels),
        "final",
    ]
    assert [stage.name for stage in cascade.stages] == [
        *(n for i, label in enumerate(model.labels, 1) for n in (f"segment{i}", f"head_{label}")),
        f"segment{len(model.labels) + 1}",
    ]
    made = [stage.outputs[0].name for stage in cascade.stages]
    assert made[:2] == [f"features_{model.labels[0]}", f"logits_{model.labels[0]}"]
    assert made[-1] == "final_logits"


def test_a_layer_that_was_named_labels_its_exit(models: dict[str, EarlyExit]) -> None:
    assert models["swin"].labels == ("0", "layers_1_blocks_0")
    assert [spec.layer for spec in models["swin"].exits] == [0, 1]


@pytest.mark.parametrize("count", [1, 3])
def test_the_exported_stages_give_what_torch_gives(
    exported: tuple[EarlyExit, Bundle], count: int
) -> None:
    model, bundle = exported
    x = example(count)
    have = chain(bundle, x.numpy())
    with torch.no_grad():
        answers = model(x)
    for exit_, want in zip(bundle.cascade.exits, answers, strict=True):
        magnitude = float(want.abs().max())
        np.testing.assert_allclose(have[exit_.logits], want.numpy(), atol=1e-4 * magnitude)


@pytest.mark.tensorrt
def test_tensorrt_builds_every_stage(
    tensorrt: ModuleType, exported: tuple[EarlyExit, Bundle]
) -> None:
    model, bundle = exported
    assert len(build_all(bundle)) == 2 * len(model.exits) + 1


def test_the_description_says_which_layers_each_segment_runs(
    exported: tuple[EarlyExit, Bundle], models: dict[str, EarlyExit]
) -> None:
    model, bundle = exported
    described = bundle.manifest.provenance["model"]
    assert described == model.describe()
    layers = [i for segment in described["segments"].values() for i in segment["layers"]]
    assert layers == list(range(described["layers"]))
    assert models["vit"].describe()["exits"]["exit_1"] == {
        "layer": 1,
        "neck": "gah",
        "options": {"heads": 2},
        "parameters": models["vit"].parameter_counts()["exit_1"],
    }


def test_without_exits_the_backbone_answers_alone() -> None:
    model = model_of("residual", []).eval()
    assert len(model(example())) == 1
    stages, exits = model.stages(example(), source="image")
    assert [(s.name, s.inputs, s.outputs) for s in stages] == [
        ("segment1", ("image",), ("final_logits",))
    ]
    assert [exit_.name for exit_ in exits] == ["final"]


def test_exits_at_equal_shares_of_the_operations() -> None:
    model = model_of("vit", {"count": 2, "neck": "mlp", "options": {"hidden": 3}})
    assert [(spec.layer, spec.neck) for spec in model.exits] == [(1, "mlp"), (2, "mlp")]
    assert model.heads[0].neck.width == 3
    *until, total = macs_until(
        model.backbone, example(), [model.layer_names[spec.layer] for spec in model.exits]
    )
    assert np.allclose(np.array(until) / total, [1 / 3, 2 / 3], atol=0.15)


def test_exits_from_yaml_are_refused_by_line(tmp_path: Path) -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Settings:
        exits: Any

    path = tmp_path / "a.yaml"
    path.write_text("exits:\n  - [3, lph, {kernel: 3}]\n  - [layers.1, gah]\n  - [4]\n")
    assert parse_exits(load(path, Settings).exits) == (
        ExitSpec(3, "lph", {"kernel": 3}),
        ExitSpec("layers.1", "gah"),
        ExitSpec(4, "pool"),
    )
    path.write_text("exits:\n  - [3]\n  - [4, lhp]\n")
    with pytest.raises(ConfigError) as raised:
        parse_exits(load(path, Settings).exits)
    assert str(raised.value).startswith(f"{path}:3: exits[1]: unknown neck 'lhp'. Did you mean")
    path.write_text("exits: {count: 4, neck: lph, options: {kernel: 5}}\n")
    assert parse_exits(load(path, Settings).exits) == EqualMacs(4, "lph", {"kernel": 5})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "exits: got nonetype None, expected a list of [layer, neck, {options}]"),
        ([3], "exits[0]: got 3, expected [layer, neck, {options}], [layer, neck] or [layer]"),
        ([[]], "exits[0]: got [], expected [layer"),
        ([[1, "lph", {}, 4]], "exits[0]: got [1, 'lph', {}, 4], expected [layer"),
        ([[1], [True]], "exits[1]: layer: got bool True, expected int or str"),
        ([[1.5]], "exits[0]: layer: got float 1.5, expected int or str"),
        ([[1, 2]], "exits[0]: neck: got int 2, expected str"),
        ([[1, "lph", 3]], "exits[0]: options: got int 3, expected a mapping"),
        ([[1, "gha"]], "exits[0]: unknown neck 'gha'. Did you mean 'gah'? Valid: "),
        (
            [[1, "lph", {"kernal": 3}]],
            "exits[0]: lph: unknown key 'kernal'. Did you mean 'kernel'? Valid: kernel",
        ),
        ([[1, "lph", {"kernel": "3"}]], "exits[0]: lph: kernel: got str '3', expected int"),
        ([[1, "lph", {"kernel": 4}]], "exits[0]: lph: kernel: got 4, expected 0, or an odd"),
        ([[1, "gah", {"stride": 0}]], "exits[0]: gah: stride: got 0, expected >= 1"),
        ([[1, "mlp", {"hidden": 0}]], "exits[0]: mlp: hidden: got 0, expected >= 1"),
        ([[1, "pool", {"x": 0}]], "exits[0]: pool: unknown key 'x'. Valid: none"),
        ({"count": 0}, "exits: count: got 0, expected >= 1"),
        ({"neck": "gah"}, "exits: the key 'count' is missing"),
        ({"count": 2, "neck": "attn"}, "exits: unknown neck 'attn'"),
    ],
)
def test_exits_that_are_no_exits_are_refused(data: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_exits(data)
    assert str(raised.value).startswith(message)


class Convolutions(nn.Module):
    """Three layers, "blocks.0" to "blocks.2", on maps of 4 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(n, 4, 1)) for n in (3, 4, 4)))
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ([[3]], "layer of an exit: got 3, expected 0..2"),
        ([[-1]], "layer of an exit: got -1, expected 0..2"),
        (
            [["block.1"]],
            "layer of an exit: the backbone can't be cut after 'block.1'. Did you mean 'blocks.1'? "
            "Valid: blocks.0, blocks.1, blocks.2",
        ),
        ([[1], [0]], "exit 0: it stands after exit 1: got an earlier layer, expected exits in"),
        ([[1], ["blocks.1"]], "exit blocks.1: it stands after exit 1: got a layer twice, expected"),
        (
            [[2]],
            "exit 2: this is the last layer. The backbone's own answer follows it; the last exit "
            "can be 1",
        ),
        (
            [[0, "gah", {"heads": 3}]],
            "exit 0: gah: heads: got 3, expected a divisor of the width 4. For example 1",
        ),
        (
            [[0, "gah", {"stride": 25}]],
            "exit 0: gah: stride on a grid of 16 x 24: got 25, expected at most 24",
        ),
        (
            [[0, "lph", {"kernel": 33}]],
            "exit 0: lph: kernel on a grid of 16 x 24: got 33, expected at most 31",
        ),
        (
            {"count": 3},
            "count of exits: got 3, expected at most 2, for a backbone of 3 layers",
        ),
    ],
)
def test_exits_that_don_t_fit_the_backbone_are_refused(exits: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        EarlyExit(Convolutions(), parse_exits(exits), example())
    assert str(raised.value).startswith(message)


def test_a_backbone_without_layers_takes_no_exits() -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 24, 5))
    assert EarlyExit(backbone, [], example()).parameter_counts()["classifier"] == 5 * 1153
    with pytest.raises(ConfigError, match="0: the backbone can't be cut after any of its modules"):
        EarlyExit(backbone, [ExitSpec(0)], example())
