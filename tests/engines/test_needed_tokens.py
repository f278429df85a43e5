"""The last segment of a transformer computes what its classifier reads, and no other tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, fx, nn  # noqa: E402

from edge_runtime.cascade import Exit  # noqa: E402
from edge_runtime.manifest import Bundle  # noqa: E402
from engines.export import TorchStage, export_stages  # noqa: E402
from engines.macs import macs  # noqa: E402
from engines.quantize import activations, quantize  # noqa: E402
from engines.split import split  # noqa: E402
from engines.torch_exporter import to_onnx  # noqa: E402
from tests.engines.test_split import FAMILIES, VIT, images, model_of, timm_model  # noqa: E402
from tests.engines.test_tensorrt_builds import build_all  # noqa: E402

pytestmark = pytest.mark.torch

_ATEN = torch.ops.aten
WIDTH, PATCHES, CLASSES = 16, 16, 5
PLAIN, DISTILLED = "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
#: Model of timm, its options, tokens in front of the patches, and how many of them are read.
READ: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "class token": (PLAIN, {}, 1, 1),
    "two tokens": (DISTILLED, {}, 2, 2),
    "registers": (PLAIN, {"reg_tokens": 4}, 5, 1),
    "layer scale, norm of queries": (PLAIN, {"init_values": 0.1, "qk_norm": True}, 1, 1),
}


def vit(name: str, **options: Any) -> nn.Module:
    return timm_model(name, num_classes=CLASSES, **(VIT | options)).eval()


def onnx_of(last: nn.Module, features: Tensor) -> bytes:
    return to_onnx("last", last, (features,), ("features",), ("logits",), 20)


def block_macs(tokens: int, read: int) -> int:
    """Of a last block and its classifiers: keys and values of all tokens, the rest of a few.

    Those are queries, both products of attention, its projection and an MLP of four times the
    width.
    """
    of_all = tokens * 2 * WIDTH * WIDTH
    of_few = read * (WIDTH * WIDTH + 2 * tokens * WIDTH + WIDTH * WIDTH + 8 * WIDTH * WIDTH)
    return of_all + of_few + read * WIDTH * CLASSES


def bundle_of(model: nn.Module, folder: Path) -> Bundle:
    first, last = split(model, images(2), ["blocks.1"])
    stages = [
        TorchStage("segment1", "segment", first, ("pixels",), ("features",)),
        TorchStage("segment2", "segment", last, ("features",), ("logits",)),
    ]
    return export_stages(
        stages,
        [Exit("final", "logits")],
        example=images(2),
        classes=[str(i) for i in range(CLASSES)],
        out=folder / "a.bundle",
        name="a",
    )


@pytest.mark.parametrize("kind", READ)
def test_the_last_segment_takes_the_operations_of_what_is_read(kind: str) -> None:
    name, options, prefix, read = READ[kind]
    model, tokens = vit(name, **options), PATCHES + prefix
    first, last = split(model, images(1), ["blocks.1"])
    data = onnx_of(last, torch.zeros(2, tokens, WIDTH))
    assert macs(data, {"features": (1, tokens, WIDTH)}) == block_macs(tokens, read)
    for count in (1, 2, 3):
        with torch.no_grad():
            given, want = last(first(images(count))), model(images(count))
        torch.testing.assert_close(given, want, rtol=1e-5, atol=1e-5)
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert {id(tensor) for tensor in (*last.parameters(), *last.buffers())} <= own


def test_the_last_segment_builds_in_tensorrt(tensorrt: ModuleType, tmp_path: Path) -> None:
    name, options, _, _ = READ["two tokens"]
    assert build_all(bundle_of(vit(name, **options), tmp_path)) == ["segment1", "segment2"]


def test_a_divided_projection_follows_the_weights_of_the_model() -> None:
    model = vit(PLAIN)
    first, last = split(model, images(1), ["blocks.1"])
    with torch.no_grad():
        model.blocks[2].attn.qkv.weight += torch.randn(3 * WIDTH, WIDTH)
        torch.testing.assert_close(last(first(images(2))), model(images(2)))


def test_a_divided_projection_of_any_size_can_be_quantised() -> None:
    """Torch leaves slices of larger weights to the runtime."""
    last = split(vit(PLAIN, embed_dim=64), images(1), ["blocks.1"])[-1]
    data = onnx_of(last, torch.zeros(2, 17, 64))
    made = quantize(data, dict.fromkeys(activations(data), 1.0))
    assert not [reason for reason in made.left.values() if "constants" in reason]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (PLAIN, {"global_pool": "avg"}),
        (PLAIN, {"global_pool": "avg", "class_token": False}),
        (PLAIN, {"global_pool": "map", "class_token": False}),
    ],
    ids=["mean", "mean without class token", "attention"],
)
def test_a_transformer_of_which_all_tokens_are_read_is_left_as_it_is(
    name: str, options: dict[str, Any]
) -> None:
    unchanged(vit(name, **options), "blocks.1")


@pytest.mark.parametrize("family", ["swin", "resnet"])
def test_other_families_are_left_as_they_are(family: str) -> None:
    unchanged(model_of(FAMILIES[family]), FAMILIES[family].layers[-2])


def unchanged(model: nn.Module, at: str) -> None:
    lines = [
        [str(part.graph) for part in split(model, images(1), [at], needed_only=needed_only)]
        for needed_only in (True, False)
    ]
    assert lines[0] == lines[1]


def test_the_whole_block_stays_where_it_is_asked_for() -> None:
    model = vit(PLAIN)
    last = split(model, images(1), ["blocks.1"], needed_only=False)[-1]
    assert sum(node.target is _ATEN.slice.Tensor for node in last.graph.nodes) == 1
    assert sum(node.target is _ATEN.linear.default for node in last.graph.nodes) == 5


class Tokens(nn.Module):
    """Something on (batch, 6, 4) tokens between two layers, of which tokens are read after."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.run = nn.Linear(4, 4), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.first(x)).flatten(1)


def attend(x: Tensor, **options: Any) -> Tensor:
    return nn.functional.scaled_dot_product_attention(x, x, x, **options)


def by_hand(x: Tensor) -> Tensor:
    bias = torch.arange(36.0).reshape(6, 6).cos()
    return ((x @ x.transpose(1, 2)) + bias).softmax(-1) @ x


def tokens_of(part: nn.Module, kind: Any, x: Tensor) -> list[int]:
    """Tokens that operations of a kind give."""
    seen: list[int] = []

    class Shapes(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            if node.target is kind:
                seen.append(value.shape[1])
            return value

    Shapes(part).run(x)
    return seen


@pytest.mark.parametrize(
    ("run", "kind", "tokens"),
    [
        (lambda x: x.tanh()[:, 2:4], "tanh.default", 2),
        (lambda x: x.tanh()[:, -1], "tanh.default", 1),
        (lambda x: x.tanh()[:, 1:3][:, :, 1:][:, 1], "tanh.default", 1),
        (lambda x: torch.cat([x.tanh()[:, 1], x.tanh().exp()[:, 2]], 1), "tanh.default", 1),
        (lambda x: (lambda y: torch.cat([y[:, 1], y[:, 3]], 1))(x.tanh()), "tanh.default", 3),
        (lambda x: x.reshape(-1, 6, 2, 2).permute(2, 0, 1, 3)[0].tanh()[:, 0], "tanh.default", 1),
        (lambda x: (x[:, :1].expand(-1, 6, -1) * x).tanh()[:, :2], "mul.Tensor", 2),
        (lambda x: attend(x)[:, 1:3], "scaled_dot_product_attention.default", 2),
        (
            lambda x: attend(x, attn_mask=torch.arange(36.0).reshape(6, 6).cos())[:, 3:5],
            "scaled_dot_product_attention.default",
            2,
        ),
        (lambda x: by_hand(x)[:, 4], "softmax.int", 1),
        # Left as they are.
        (lambda x: x.tanh()[:, :4], "tanh.default", 6),
        (lambda x: x.tanh()[:, ::3], "tanh.default", 6),
        (lambda x: x.tanh().cumsum(1)[:, 5], "tanh.default", 6),
        (lambda x: x.softmax(1)[:, 5], "softmax.int", 6),
        (lambda x: nn.functional.layer_norm(x, (6, 4))[:, 0], "layer_norm.default", 6),
        (lambda x: (lambda y: y[:, 0] + y.mean(1))(x.tanh()), "tanh.default", 6),
        (
            lambda x: attend(x, is_causal=True)[:, 2],
            "scaled_dot_product_attention.default",
            6,
        ),
    ],
)
def test_a_part_is_computed_alone_where_that_gives_the_same(
    run: Callable[[Tensor], Tensor], kind: str, tokens: int
) -> None:
    model, x = Tokens(run), torch.randn(3, 6, 4)
    last = split(model, x, ["first"])[-1]
    given = model.first(x)
    torch.testing.assert_close(last(given), model(x))
    package, _, overload = kind.partition(".")
    assert set(tokens_of(last, getattr(getattr(_ATEN, package), overload), given)) == {tokens}
