"""What a training ends with: tables, a picture, and the JSON result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_runtime.console import Console, percent
from engines.plot_file import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, new_figure, save_figure
from engines.training.checkpoint import EpochRecord
from engines.training.job import Trained

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#e69f00", "#56b4e9", BLACK)


def describe(trained: Trained, out: Path) -> dict[str, Any]:
    """What `--json` writes."""
    bundle = trained.bundle
    return {
        "out": str(out),
        "bundle": None if bundle is None else str(bundle.path),
        "hash": None if bundle is None else bundle.hash,
        "already_finished": trained.already,
        "validation_images": trained.samples,
        "accuracy": dict(trained.accuracy),
        "parameters": trained.model.parameter_counts(),
        "macs": _macs(trained),
        "phases": [_phase(records) for records in _by_phase(trained.state.history)],
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Write the tables."""
    console.table(
        "Phases",
        ("phase", "epochs", "best", "accuracy", "seconds", "images/s"),
        [
            (
                phase["train"],
                phase["epochs"],
                phase["best_epoch"],
                percent(phase["best_accuracy"]),
                f"{phase['seconds']:.0f}",
                f"{phase['images_per_second']:.0f}",
            )
            for phase in result["phases"]
        ],
    )
    console.table(
        f"Accuracy on {result['validation_images']} validation images",
        ("exit", "accuracy"),
        [(name, percent(share)) for name, share in result["accuracy"].items()],
    )
    console.table(
        "Components",
        ("component", "parameters"),
        [(name, f"{count:,}") for name, count in result["parameters"].items()],
    )
    if result["macs"]:
        console.table(
            "Operations for one image",
            ("stage", "million MACs"),
            [(name, f"{count / 1e6:.3f}") for name, count in result["macs"].items()],
        )
    if result["bundle"] is not None:
        console.line(f"bundle  {result['bundle']}")
        console.line(f"hash    {result['hash']}")


def plot(history: Sequence[EpochRecord], path: Path, title: str) -> bool:
    """Draw loss and accuracy over the epochs; False where matplotlib is not installed.

    Raises:
        EdgeRuntimeError: The file can't be written.
    """
    try:
        figure = new_figure(8, 6)
    except ImportError:
        return False
    above, below = figure.subplots(2, 1, sharex=True)
    names = list(dict.fromkeys(name for record in history for name in record.accuracy))
    done = 0
    for records in _by_phase(history):
        epochs = range(done + 1, done + len(records) + 1)
        above.plot(epochs, [r.loss for r in records], ".-", color=BLACK, label="loss")
        for i, name in enumerate(names):
            if name in records[0].accuracy:
                shares = [100 * record.accuracy[name] for record in records]
                colour = _COLOURS[i % len(_COLOURS)]
                below.plot(epochs, shares, ".-", color=colour, label=name)
        above.axvline(done + 0.5, color=GREY, linewidth=1)
        below.axvline(done + 0.5, color=GREY, linewidth=1)
        above.annotate(records[0].train, (done + 0.6, 1.02), xycoords=("data", "axes fraction"))
        done += len(records)
    above.set_ylabel("training loss")
    below.set_ylabel("validation accuracy (%)")
    below.set_xlabel("epoch")
    lines = {str(line.get_label()): line for line in below.get_lines()}
    below.legend([lines[name] for name in names], names, fontsize=8)
    figure.suptitle(title)
    save_figure(figure, path)
    return True


def _macs(trained: Trained) -> dict[str, int]:
    from engines.macs import stage_macs

    if trained.bundle is None:
        return {}
    return stage_macs(trained.bundle, trained.image_size)


def _by_phase(history: Sequence[EpochRecord]) -> list[list[EpochRecord]]:
    phases: dict[int, list[EpochRecord]] = {}
    for record in history:
        phases.setdefault(record.phase, []).append(record)
    return list(phases.values())


def _phase(records: Sequence[EpochRecord]) -> dict[str, Any]:
    best = [record for record in records if record.best][-1]
    seconds = sum(record.seconds for record in records)
    images = sum(record.seconds * record.images_per_second for record in records)
    return {
        "train": records[0].train,
        "epochs": len(records),
        "best_epoch": best.epoch,
        "best_accuracy": best.mean_accuracy,
        "accuracy": dict(best.accuracy),
        "seconds": seconds,
        "images_per_second": images / max(seconds, 1e-9),
    }
