"""Backbones by name, with weights of others' files."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

from torch import Tensor, nn  # noqa: E402

from edge_runtime import schema  # noqa: E402
from edge_runtime.errors import ConfigError  # noqa: E402
from engines.models.backbones import BackboneRecipe, build_backbone  # noqa: E402
from engines.models.residual import Residual, ResidualOptions  # noqa: E402

pytestmark = pytest.mark.torch

IMAGE = (3, 16, 16)
VIT = {"depth": 2, "embed_dim": 8, "num_heads": 2, "patch_size": 8}
SMALL = {"widths": [4, 8], "blocks": [1, 1]}


def vit(name: str = "vit_tiny_patch16_224", **more: Any) -> BackboneRecipe:
    return BackboneRecipe(name, VIT, **more)


def same(one: nn.Module, other: nn.Module, but: str = "-") -> bool:
    mine, others = one.state_dict(), other.state_dict()
    names = [name for name in mine if not name.startswith(but)]
    return all(torch.equal(mine[name], others[name]) for name in names)


def test_the_residual_network_is_that_of_the_paper() -> None:
    """He et al., 2016, table 6: 0.27 million parameters with 20 layers, 0.85 with 56."""
    for blocks, layers, millions in ((3, 20, 0.27), (9, 56, 0.85)):
        model = Residual(10, 3, ResidualOptions(blocks=(blocks,) * 3))
        weights = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(weights) == layers
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@torch.no_grad()
def test_a_shortcut_takes_every_second_place_and_fills_channels_with_zeros() -> None:
    model = Residual(10, 3, ResidualOptions((4, 6), (1, 1))).eval()
    block = model.stages[1][0]
    block.second[1].weight.zero_()
    x = torch.rand(2, 4, 8, 8)
    made = block(x)
    assert torch.equal(made[:, :4], nn.functional.avg_pool2d(x, 1, 2))
    assert torch.equal(made[:, 4:], torch.zeros(2, 2, 4, 4))


@pytest.mark.parametrize(
    ("recipe", "image"),
    [
        (BackboneRecipe("residual", SMALL), (1, 9, 12)),
        (vit(), (1, 16, 24)),
        (vit("deit_tiny_distilled_patch16_224"), IMAGE),
        # Takes no image size.
        (BackboneRecipe("convnextv2_atto", {"dims": [8] * 4, "depths": [1] * 4}), (3, 32, 48)),
    ],
)
def test_a_backbone_answers_for_the_classes_and_the_image(
    recipe: BackboneRecipe, image: tuple[int, int, int]
) -> None:
    model = build_backbone(recipe, 7, image)
    assert model.training
    assert model.eval()(torch.zeros(2, *image)).shape == (2, 7)


Save = Callable[[dict[str, Tensor], Path], Any]
FORMS: dict[str, tuple[str, Save]] = {
    "safetensors": (".safetensors", lambda state, path: safetensors.save_file(state, path)),
    "pth": (".pth", torch.save),
    "model": (".pth", lambda state, path: torch.save({"model": state, "epoch": 3}, path)),
    "state_dict": (".bin", lambda state, path: torch.save({"state_dict": state}, path)),
    "wrapped": (
        ".pt",
        lambda state, path: torch.save({f"module.{n}": t for n, t in state.items()}, path),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_loaded(form: str, tmp_path: Path) -> None:
    suffix, save = FORMS[form]
    original = build_backbone(vit(), 7, IMAGE)
    path = tmp_path / f"weights{suffix}"
    save(original.state_dict(), path)
    assert same(build_backbone(vit(weights=str(path)), 7, IMAGE), original)


def test_a_classifier_of_other_classes_is_left_out_on_request_only(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    original = build_backbone(vit(), 7, IMAGE)
    safetensors.save_file(original.state_dict(), path)
    with pytest.raises(ConfigError) as raised:
        build_backbone(vit(weights=str(path)), 5, IMAGE)
    assert str(raised.value) == (
        f"weights {path}: they are not those of the model: got 2 of another shape: "
        "head.weight (7, 8) instead of (5, 8), head.bias (7,) instead of (5,). "
        "new_head: true leaves out the file's classifier"
    )
    model = build_backbone(vit(weights=str(path), new_head=True), 5, IMAGE)
    assert same(model, original, but="head")
    torch.manual_seed(3)
    again = build_backbone(vit(weights=str(path), new_head=True), 7, IMAGE)
    assert not torch.equal(again.head.weight, original.head.weight)


def test_a_file_without_a_classifier_is_one_for_a_new_head(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    original = build_backbone(vit(), 7, IMAGE)
    state = {n: t for n, t in original.state_dict().items() if not n.startswith("head")}
    torch.save(state, path)
    with pytest.raises(
        ConfigError, match=r"got 2 missing: head\.weight, head\.bias\. new_head: true"
    ):
        build_backbone(vit(weights=str(path)), 7, IMAGE)
    assert same(build_backbone(vit(weights=str(path), new_head=True), 5, IMAGE), original, "head")


def test_weights_of_another_model_are_refused_with_their_names(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    state = build_backbone(vit(), 7, IMAGE).state_dict()
    state["patch_embed.proj.weight"] = torch.zeros(8, 1, 8, 8)
    state["more"] = state.pop("norm.weight")
    for name in [name for name in state if name.startswith("blocks.1.")]:
        del state[name]
    torch.save(state, path)
    with pytest.raises(ConfigError) as raised:
        build_backbone(vit(weights=str(path), new_head=True), 7, IMAGE)
    assert str(raised.value) == (
        f"weights {path}: they are not those of the model: got 13 missing: blocks.1.norm1.weight, "
        "blocks.1.norm1.bias, blocks.1.attn.qkv.weight, blocks.1.attn.qkv.bias, ...; "
        "1 unexpected: more; 1 of another shape: patch_embed.proj.weight (8, 1, 8, 8) instead of "
        "(8, 3, 8, 8)"
    )


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def test_a_file_that_asks_for_more_of_pickle_runs_nothing(tmp_path: Path) -> None:
    path, touched = tmp_path / "a.pth", tmp_path / "touched"
    torch.save({"model": {}, "args": Runs(touched)}, path)
    with pytest.raises(ConfigError) as raised:
        build_backbone(vit(weights=str(path)), 7, IMAGE)
    assert str(raised.value) == (
        f"weights {path}: besides tensors they hold objects, whose loading can run any code. "
        "Convert them to .safetensors, if you trust where they come from"
    )
    for protocol, message in ((2, "whose loading can run any code"), (4, "not what torch.save wr")):
        path.write_bytes(pickle.dumps(Runs(touched), protocol))
        with pytest.raises(ConfigError, match=message):
            build_backbone(vit(weights=str(path)), 7, IMAGE)
    assert not touched.exists()


def cut_short() -> bytes:
    whole = io.BytesIO()
    torch.save({"a": torch.zeros(99)}, whole)
    return whole.getvalue()[:-100]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.pth", None, "there is no such file"),
        ("a.npz", b"x", "kind of file: got '.npz', expected .safetensors or .pth or .pt or .bin"),
        ("a.safetensors", b"", "can't be read: SafetensorError: "),
        ("a.safetensors", b"\xff" * 99, "can't be read: SafetensorError: "),
        ("a.pth", b"", "can't be read: EOFError"),
        ("a.pth", b"weights\n", "can't be read: "),
        ("a.pth", cut_short(), "can't be read: "),
    ],
)
def test_damaged_files_are_refused(
    tmp_path: Path, name: str, data: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError) as raised:
        build_backbone(BackboneRecipe("residual", SMALL, weights=str(path)), 7, IMAGE)
    assert str(raised.value).startswith(f"weights {path}")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ({"epoch": 3, "best": torch.zeros(1)}, "got epoch, best, expected name -> tensor"),
        ({"state_dict": {}}, "got state_dict, expected"),
        ([torch.zeros(1)], "got list, expected"),
        (torch.zeros(1), "got Tensor, expected"),
    ],
)
def test_files_without_weights_are_refused(tmp_path: Path, content: Any, got: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    recipe = BackboneRecipe("residual", SMALL, weights=str(tmp_path / "a.pth"))
    with pytest.raises(ConfigError, match=f"they hold no tensors by name: {got}"):
        build_backbone(recipe, 7, IMAGE)


@pytest.mark.parametrize(
    ("model", "options", "image", "message"),
    [
        (
            "vit_tinny_patch16_224",
            {},
            IMAGE,
            "unknown backbone 'vit_tinny_patch16_224'. Did you mean 'vit_tiny_patch16_224' or ",
        ),
        ("residul", {}, IMAGE, "unknown backbone 'residul'. Did you mean 'residual'? Valid: resi"),
        ("hf-hub:timm/resnet18", {}, IMAGE, "unknown backbone 'hf-hub:timm/resnet18'"),
        (
            "vit_tiny_patch16_224",
            VIT | {"embed_dimm": 8},
            IMAGE,
            "backbone 'vit_tiny_patch16_224': unknown option 'embed_dimm'. Did you mean 'embed_",
        ),
        (
            "vit_tiny_patch16_224",
            VIT | {"checkpoint_path": "a.pth"},
            IMAGE,
            "backbone 'vit_tiny_patch16_224': option 'checkpoint_path'. Weights come from a file",
        ),
        (
            "vit_tiny_patch16_224",
            VIT | {"num_classes": 5},
            IMAGE,
            "backbone 'vit_tiny_patch16_224': option 'num_classes'. The data and the image say it",
        ),
        (
            "vit_tiny_patch16_224",
            VIT | {"num_heads": 3},
            IMAGE,
            "backbone 'vit_tiny_patch16_224': timm can't make it with these options: Assertion",
        ),
        (
            "vit_tiny_patch16_224",
            VIT | {"global_pool": ""},
            IMAGE,
            "backbone 'vit_tiny_patch16_224': its answer to one image: got [1, 5, 7], expected [1,",
        ),
        (
            "vit_tiny_patch16_224",
            VIT,
            (3, 16, 20),
            "backbone 'vit_tiny_patch16_224': image: got 16 x 20 pixels, expected multiples of the "
            "patch, 8 x 8",
        ),
        ("residual", SMALL, (0, 16, 16), "image of a backbone: got [0, 16, 16], expected [chan"),
        (
            "residual",
            {"width": [4]},
            IMAGE,
            "backbone 'residual': options: unknown key 'width'. Did you mean 'widths'?",
        ),
        (
            "residual",
            {"widths": [8, 4], "blocks": [1, 1]},
            IMAGE,
            "backbone 'residual': options: widths: got [8, 4], expected positive and never falling",
        ),
        (
            "residual",
            {"widths": [8]},
            IMAGE,
            "backbone 'residual': options: widths and blocks: got 1 and 3 stages",
        ),
        (
            "residual",
            {"blocks": [1, 0, 1]},
            IMAGE,
            "backbone 'residual': options: blocks: got [1, 0, 1], expected at least 1",
        ),
        (
            "residual",
            {"stem_stride": 0},
            IMAGE,
            "backbone 'residual': options: stem_stride: got 0, expected >= 1",
        ),
    ],
)
def test_backbones_that_can_t_be_are_refused(
    model: str, options: dict[str, Any], image: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        build_backbone(BackboneRecipe(model, options), 7, image)
    assert str(raised.value).startswith(message)


def test_a_backbone_needs_two_classes() -> None:
    with pytest.raises(ConfigError, match="classes of a backbone: got 1, expected >= 2"):
        build_backbone(BackboneRecipe("residual", SMALL), 1, IMAGE)


def test_a_recipe_is_read_from_plain_data() -> None:
    data = {"model": "residual", "options": SMALL, "weights": "a.pth", "new_head": True}
    assert schema.read(BackboneRecipe, data, "x") == BackboneRecipe(
        "residual", SMALL, "a.pth", new_head=True
    )
    with pytest.raises(ConfigError, match=r"new_head without weights\. Without a file every part"):
        schema.read(BackboneRecipe, {"model": "residual", "new_head": True}, "x")
