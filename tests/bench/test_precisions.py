"""Architectures of the size that people use, at every precision, in TensorRT's real builder."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from bench.gpu.precisions import with_precisions
from edge_runtime.cascade import Exit
from tests.engines.test_tensorrt_builds import build_all

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.torch, pytest.mark.tensorrt]

SIDE, CLASSES = 32, 5
Parts = list[tuple[torch.nn.Module, torch.nn.Module]]


def vit() -> Parts:
    """Pre-norm blocks with attention, class token, a head after each block."""
    from bench import vit

    size = vit.Size(width=64, heads=4, blocks=2, patch=8, image=SIDE, classes=CLASSES)
    return [(torch.nn.Sequential(*parts), head) for parts, head in vit.segments(size, (1, 2))]


def resnet() -> Parts:
    """Bottlenecks with shortcuts."""
    from bench.gpu.models import Bottleneck, PooledHead

    torch.manual_seed(0)
    return [
        (Bottleneck(3, 8, 1), PooledHead(32, CLASSES)),
        (Bottleneck(32, 8, 2), PooledHead(32, CLASSES)),
    ]


def convnext() -> Parts:
    """Depth-wise 7 x 7, layer norm over channels, GELU (Liu et al., A ConvNet for the 2020s)."""
    from bench.gpu.models import PooledHead

    torch.manual_seed(0)
    return [
        (torch.nn.Sequential(torch.nn.Conv2d(3, 16, 4, 4), ConvNeXtBlock(16)), PooledHead(16, 5)),
        (ConvNeXtBlock(16), PooledHead(16, CLASSES)),
    ]


class ConvNeXtBlock(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = torch.nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = torch.nn.LayerNorm(width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)
        self.scale = torch.nn.Parameter(torch.full((width,), 0.1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        deep = self.norm(self.depthwise(features).permute(0, 2, 3, 1))
        deep = self.down(torch.nn.functional.gelu(self.up(deep))) * self.scale
        return features + deep.permute(0, 3, 1, 2)


@pytest.mark.parametrize("make", [vit, resnet, convnext])
def test_every_stage_builds_at_every_precision(
    tensorrt: ModuleType, tmp_path: Path, make: Callable[[], Parts]
) -> None:
    from engines.export import TorchStage, export_stages
    from engines.preprocess import PreprocessSpec

    stages, exits, before = [], [], "pixels"
    for k, (segment, head) in enumerate(make(), 1):
        stages.append(TorchStage(f"segment{k}", "segment", segment, (before,), (f"features{k}",)))
        stages.append(TorchStage(f"head{k}", "head", head, (f"features{k}",), (f"logits{k}",)))
        exits.append(Exit(f"exit{k}", f"logits{k}"))
        before = f"features{k}"
    images = np.random.default_rng(0).integers(0, 256, (8, 40, 48, 3), np.uint8)
    bundle = export_stages(
        stages,
        exits,
        example=images,
        preprocess=PreprocessSpec((SIDE, SIDE), mean=(0.5,), std=(0.5,)),
        classes=[str(i) for i in range(CLASSES)],
        out=tmp_path / "a.bundle",
        name="a",
    )
    every = with_precisions(bundle, images, tmp_path / "b.bundle")
    for precision in ("fp32", "fp16", "int8"):
        assert len(build_all(every, precision)) == 5
