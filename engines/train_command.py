"""Train an early-exit classifier that a YAML file describes, and export it as a bundle.

The file names the data, the preprocessing, the models (a backbone with exits, optionally a saver
and an exit sequence network) and the phases of the training. The same command again goes on where
a checkpoint stands; when all is trained it only exports. DIR gets the bundle, log.jsonl,
training.png, weights/, calibration.npz (training images, for edge-runtime quantize) and, where the
validation images are a share of the training data, thresholds.npz for edge-runtime thresholds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edge_runtime.console import Console
from edge_runtime.errors import ConfigError, missing_package


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path, help="data, models and phases")
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        default=[],
        help="replaces a value of the file, such as phases.0.rate=0.001",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to write in")
    parser.add_argument(
        "--restart", action="store_true", help="throw DIR's checkpoint away and begin again"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a bundle that is already there"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute; auto is CUDA where there is one",
    )
    parser.add_argument("--threads", metavar="N", type=int, help="threads of torch")
    parser.add_argument(
        "--workers",
        metavar="N",
        type=int,
        default=0,
        help="processes that read and vary images beside the training (0)",
    )
    parser.add_argument(
        "--checkpoint-minutes",
        metavar="M",
        type=float,
        default=10.0,
        help="time between checkpoints within an epoch (10); there is one at each epoch's end",
    )
    parser.add_argument("--no-export", action="store_true", help="train only")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Train, export, and show what came out."""
    _check(args)
    try:
        import safetensors  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise missing_package(str(error.name), "train") from error
    from engines.training.config import load_training
    from engines.training.job import JobOptions, train
    from engines.training.report import describe, plot, show

    recipe = load_training(args.config, args.overrides)
    options = JobOptions(
        restart=args.restart,
        force=args.force,
        export=not args.no_export,
        device=args.device,
        threads=args.threads,
        workers=args.workers,
        checkpoint_s=60 * args.checkpoint_minutes,
    )
    trained = train(recipe, args.out, options, console)
    if not plot(trained.state.history, args.out / "training.png", recipe.name):
        console.note("training.png is left out: matplotlib is not installed")
    result = describe(trained, args.out)
    show(result, console)
    return result


def _check(args: argparse.Namespace) -> None:
    limits = (("--threads", args.threads, 1), ("--workers", args.workers, 0))
    for name, value, least in limits:
        if value is not None and not least <= value <= 1024:
            raise ConfigError(name, got=value, expected=f"{least}..1024")
    if not 0 <= args.checkpoint_minutes < float("inf"):
        raise ConfigError("--checkpoint-minutes", got=args.checkpoint_minutes, expected=">= 0")
