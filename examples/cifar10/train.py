"""A small residual network for CIFAR-10 with an intermediate exit, trained on a CPU.

The images (32 x 32, ten classes; Krizhevsky, 2009) are not part of this repository: --data names a
folder of class folders with the training images. A tenth of them is kept out of the training and
written as thresholds.npz; 1,000 of the others are written as calibration.npz, for INT8. About
fifteen minutes on two cores:

    python examples/cifar10/train.py --data cifar10_train --out cifar10
    edge-runtime thresholds cifar10/cifar10.bundle --data cifar10/thresholds.npz
    edge-runtime evaluate cifar10/cifar10.bundle --data cifar10_val
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edge_runtime import Exit
from edge_runtime.dataset import ImageDataset
from engines.export import TorchStage, export_stages
from engines.preprocess import PreprocessSpec

logger = logging.getLogger("cifar10")

CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]  # in the order of labels
SEED, BATCH, EPOCHS, RATE = 0, 128, 6, 0.01
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
CALIBRATION = 1000


class Residual(nn.Module):
    """Two convolutions and a shortcut, which is a strided convolution where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        )
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, channels_in, h, w) to (batch, channels, h / stride, w / stride)."""
        return torch.relu(self.shortcut(x) + self.second(torch.relu(self.first(x))))


def stem() -> nn.Sequential:
    """Pixels to 16 channels."""
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())


def head(channels: int) -> nn.Sequential:
    """Global average pool and linear."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Net(nn.Module):
    """Both segments and heads, for training."""

    def __init__(self) -> None:
        super().__init__()
        self.segment1 = nn.Sequential(stem(), Residual(16, 16), Residual(16, 32, 2))
        self.head1 = head(32)
        self.segment2 = nn.Sequential(Residual(32, 64, 2), Residual(64, 64), Residual(64, 64))
        self.head2 = head(64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both exits, (batch, 10) each."""
        features = self.segment1(x)
        return self.head1(features), self.head2(self.segment2(features))


def everything(data: ImageDataset) -> tuple[Tensor, Tensor]:
    """Pixels (n, 3, 32, 32), normalised, and labels."""
    images = torch.cat(
        [torch.from_numpy(images).permute(0, 3, 1, 2) for images, _ in data.batches(1000)]
    )
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std, torch.from_numpy(np.array(data.labels))


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror and shift a batch as a whole: cheap, and another way for every batch."""
    if torch.rand((), generator=generator) < 0.5:
        x = x.flip(3)
    down, right = torch.randint(0, 7, (2,), generator=generator).tolist()
    return nn.functional.pad(x, (3, 3, 3, 3), mode="reflect")[
        :, :, down : down + 32, right : right + 32
    ]


def train(net: Net, data: ImageDataset, epochs: int) -> None:
    """AdamW with a one-cycle rate on the sum of both exits' losses."""
    x, y = everything(data)
    generator = torch.Generator().manual_seed(SEED)
    steps = epochs * -(-len(x) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    net.train()
    for epoch in range(epochs):
        begin, total = time.monotonic(), 0.0
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            outputs = net(shifted(x[rows], generator))
            loss = sum(nn.functional.cross_entropy(logits, y[rows]) for logits in outputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        seconds = time.monotonic() - begin
        logger.info("epoch %d of %d, loss %.3f, %.0f s", epoch + 1, epochs, total / len(x), seconds)
    net.eval()


def write(data: ImageDataset, path: Path) -> None:
    """Write images and labels."""
    images, labels = next(data.batches(len(data)))
    np.savez_compressed(path, images=images, labels=labels)


def main() -> None:
    """Train, export, write the data for thresholds and calibration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of class folders, training images")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(SEED)
    training, thresholds = ImageDataset.open(args.data, CLASSES).split((0.9, 0.1), seed=SEED)
    net = Net()
    logger.info("training on %d images", len(training))
    train(net, training, args.epochs)
    args.out.mkdir(parents=True, exist_ok=True)
    write(thresholds, args.out / "thresholds.npz")
    write(training.balanced(CALIBRATION, seed=SEED), args.out / "calibration.npz")
    bundle = export_stages(
        [
            TorchStage("segment1", "segment", net.segment1, ("pixels",), ("features",)),
            TorchStage("head1", "head", net.head1, ("features",), ("early_logits",)),
            TorchStage(
                "segment2",
                "segment",
                nn.Sequential(net.segment2, net.head2),
                ("features",),
                ("final_logits",),
            ),
        ],
        [Exit("early", "early_logits"), Exit("final", "final_logits")],
        example=next(thresholds.batches(8))[0],
        preprocess=PreprocessSpec(size=(32, 32), mean=MEAN, std=STD),
        image_size=(32, 32),
        classes=CLASSES,
        out=args.out / "cifar10.bundle",
        name="cifar10",
        overwrite=True,
    )
    logger.info("wrote %s", bundle.path)


if __name__ == "__main__":
    main()
