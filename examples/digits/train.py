"""Train a saver and a base model with an intermediate exit on handwritten digits.

The 1,797 digits of scikit-learn (8 x 8 grey values; Alpaydin and Kaynak, UCI, 1998) are split into
disjoint parts for training, for choosing thresholds and for testing. Writes, beside this file,
digits.bundle, train.npz, thresholds.npz and test.npz. Takes about a minute on 2 CPU cores:

    python examples/digits/train.py
    edge-runtime thresholds examples/digits/digits.bundle --data examples/digits/thresholds.npz
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from edge_runtime import Exit
from edge_runtime.dataset import ImageDataset
from engines.export import TorchStage, export_stages
from engines.preprocess import PreprocessSpec

logger = logging.getLogger("train")

CLASSES = [str(digit) for digit in range(10)]
#: Shares of the data for training, thresholds and test.
SPLIT = (0.5, 0.25, 0.25)
SEED = 0
BATCH = 32
SIZE = 20  # the digits are enlarged to SIZE x SIZE by the preprocessing stage
WIDTH = 64
BLOCKS = (3, 6)  # residual blocks before and after the intermediate exit
SAVER_EPOCHS, BASE_EPOCHS = 60, 14


def split() -> tuple[ImageDataset, ImageDataset, ImageDataset]:
    """Training, thresholds and test data: disjoint, seeded, stratified by class."""
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    everything = ImageDataset.from_arrays(images, digits.target, CLASSES)
    train, thresholds, test = everything.split(SPLIT, seed=SEED)
    return train, thresholds, test


def convolution(channels_in: int, channels_out: int) -> nn.Sequential:
    """3 x 3 convolution and batch norm."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out)
    )


class Residual(nn.Module):
    """Two convolutions and a shortcut; begins as the identity, so that depth does no harm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = convolution(WIDTH, WIDTH), convolution(WIDTH, WIDTH)
        nn.init.zeros_(self.second[1].weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, WIDTH, h, w) to the same."""
        return torch.relu(x + self.second(torch.relu(self.first(x))))


def head() -> nn.Sequential:
    """Global average pool and linear."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))


def saver() -> nn.Sequential:
    """A small network on 5 x 5 means of the digit."""
    return nn.Sequential(
        nn.AvgPool2d(SIZE // 5), nn.Flatten(), nn.Linear(25, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def segments() -> tuple[nn.Module, nn.Module]:
    """The base model before and after its intermediate exit."""
    before, after = BLOCKS
    first = nn.Sequential(convolution(1, WIDTH), nn.ReLU(), *(Residual() for _ in range(before)))
    second = nn.Sequential(*(Residual() for _ in range(after)), head())
    return first, second


def pixels(images: np.ndarray) -> Tensor:
    """What the preprocessing stage makes of images, for training."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    x = nn.functional.interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False)
    return (x - 0.5) / 0.5


def jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale and shift each digit a little: (batch, 1, h, w) to the same."""
    n = len(x)

    def random(low: float, high: float) -> Tensor:
        return torch.empty(n).uniform_(low, high, generator=generator)

    angle, scale = random(-0.2, 0.2), random(0.9, 1.1)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([cos, -sin, random(-0.1, 0.1)], 1)]
    rows += [torch.stack([sin, cos, random(-0.1, 0.1)], 1)]
    grid = nn.functional.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


def train(model: nn.Module, data: ImageDataset, epochs: int, rate: float) -> None:
    """AdamW with a one-cycle rate; a model with several outputs is trained on the sum of losses."""
    images, labels = next(data.batches(len(data)))
    x, y = pixels(images), torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(SEED)
    steps = epochs * -(-len(x) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.2
    )
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            outputs = model(jitter(x[rows], generator))
            losses = [nn.functional.cross_entropy(logits, y[rows]) for logits in outputs]
            loss = torch.stack(losses).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        if epochs <= 20 or epoch % 20 == 19:
            logger.info("  epoch %d of %d, loss %.4f", epoch + 1, epochs, total / len(x))
    model.eval()


class Saver(nn.Module):
    """The saver with its logits in a tuple, as `train` takes them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Logits (batch, 10)."""
        return (self.net(x),)


class Base(nn.Module):
    """Both segments and the intermediate head, for training."""

    def __init__(self, first: nn.Module, middle: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.second = first, middle, second

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both exits, (batch, 10) each."""
        features = self.first(x)
        return self.middle(features), self.second(features)


def main() -> None:
    """Train, export, write the data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write")
    out = parser.parse_args().out
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    begin = time.monotonic()
    torch.manual_seed(SEED)
    train_data, thresholds, test = split()
    small, (first, second), middle = saver(), segments(), head()
    logger.info("training the saver on %d digits", len(train_data))
    train(Saver(small), train_data, SAVER_EPOCHS, rate=0.01)
    logger.info("training the base model with its intermediate exit")
    train(Base(first, middle, second), train_data, BASE_EPOCHS, rate=0.006)
    out.mkdir(parents=True, exist_ok=True)
    bundle = export_stages(
        [
            TorchStage("saver", "saver", small, ("pixels",), ("saver_logits",)),
            TorchStage("segment1", "segment", first, ("pixels",), ("features",)),
            TorchStage("head1", "head", middle, ("features",), ("middle_logits",)),
            TorchStage("segment2", "segment", second, ("features",), ("final_logits",)),
        ],
        [
            Exit("saver", "saver_logits"),
            Exit("middle", "middle_logits"),
            Exit("final", "final_logits"),
        ],
        example=next(thresholds.batches(8))[0],
        preprocess=PreprocessSpec(size=(SIZE, SIZE), channels=1, mean=(0.5,), std=(0.5,)),
        image_size=(8, 8),
        classes=CLASSES,
        out=out / "digits.bundle",
        name="digits",
        overwrite=True,
    )
    for name, data in {"train": train_data, "thresholds": thresholds, "test": test}.items():
        images, labels = next(data.batches(len(data)))
        np.savez_compressed(out / f"{name}.npz", images=images, labels=labels)
    logger.info("wrote %s in %.0f s; next:", bundle.path, time.monotonic() - begin)
    logger.info("  edge-runtime thresholds %s --data %s", bundle.path, out / "thresholds.npz")


if __name__ == "__main__":
    main()
