"""The picture of a simulation: accuracy against latency of every operating point."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.studies.plots import text
from engines.plot_file import BLUE, GREY, ORANGE, new_figure, save_figure

if TYPE_CHECKING:
    from bench.simulate.command import Row


def plot(path: Path, *, title: str, rows: Sequence[Row]) -> None:
    """Draw accuracy against mean latency, with a line to the p99, and what was measured.

    Args:
        path: The file.
        title: Above the picture.
        rows: One or more points.

    Raises:
        EdgeRuntimeError: The file can't be written.
    """
    figure = new_figure(8, 5)
    axes = figure.subplots()
    best = sorted(
        (row.simulated.latency.mean * 1e3, 100 * row.simulated.accuracy) for row in rows if row.best
    )
    axes.step(*zip(*best, strict=True), where="post", color=GREY, linewidth=1, zorder=1)
    shown = set()
    names: dict[tuple[float, float], list[str]] = {}

    def once(label: str) -> str | None:
        new = label not in shown
        shown.add(label)
        return label if new else None

    for row in rows:
        one = row.simulated
        x, y = one.latency.mean * 1e3, 100 * one.accuracy
        if one.latency.p99 is not None:
            line = [x, one.latency.p99 * 1e3], [y, y]
            axes.plot(*line, color=BLUE, linewidth=0.8, alpha=0.4, label=once("to the p99"))
        face, label = (BLUE, "best") if row.best else ("white", "others")
        axes.plot(x, y, "o", color=BLUE, markerfacecolor=face, label=once(f"simulated, {label}"))
        if row.measured is not None:
            mean = row.measured.latency.mean * 1e3
            axes.plot(mean, y, "x", color=ORANGE, label=once("measured there"), zorder=3)
        names.setdefault((x, y), []).append(one.point)
    for place, together in names.items():
        label = text(", ".join(together), 60)
        axes.annotate(label, place, (5, 6), textcoords="offset points", fontsize=8)
    axes.set_xlim(left=0)
    axes.margins(0.1)
    axes.set_xlabel("latency, ms: mean, and a line to the p99")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="best")
    axes.set_title(text(title, 100), fontsize=10)
    save_figure(figure, path)
