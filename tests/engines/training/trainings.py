"""A small training of digits, 8 x 8 grey, that the tests vary."""

import json
from collections.abc import Sequence
from pathlib import Path

from edge_runtime.cli import run_command
from engines import train_command

DIGITS = Path(__file__).parents[3] / "examples/digits/thresholds.npz"

TEXT = f"""
name: digits
classes: 10
data:
  train: {{path: {DIGITS}}}
  validation: 0.2
  image: {{channels: 1, size: [8, 8]}}
input: {{size: [8, 8], mean: [0.5], std: [0.25]}}
saver: {{model: residual, options: {{widths: [4], blocks: [1]}}}}
base: {{model: residual, options: {{widths: [8, 16], blocks: [1, 1]}}}}
exits: [[0, pool]]
esn: {{layers: 1, width: 8, heads: 2}}
phases:
  - {{train: backbone, epochs: 2, batch: 32, rate: 0.02}}
"""


def write(folder: Path, text: str = TEXT) -> Path:
    path = folder / "training.yaml"
    path.write_text(text)
    return path


def run(config: Path, out: Path, *arguments: str) -> int:
    """The command, with one thread for results that are the same bit for bit."""
    fixed = {"--out": str(out), "--threads": "1", "--device": "cpu"}
    missing = [x for name, value in fixed.items() if name not in arguments for x in (name, value)]
    return run_command("edge-runtime train", train_command, [str(config), *arguments, *missing])


def phases(*lines: str) -> str:
    """An override that replaces the phases."""
    return f"phases=[{', '.join('{' + line + '}' for line in lines)}]"


def weights(out: Path) -> dict[str, bytes]:
    """The files of all components."""
    return {path.stem: path.read_bytes() for path in sorted((out / "weights").iterdir())}


def log(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def timeless(lines: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """A log without what the clock says."""
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "images_per_second")}
        for line in lines
    ]
