"""Files for tests of compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.result import Result, write_result

HEAD = "platform,exit,accuracy_of_exit_percent,latency_ms"


def written(folder: Path, *results: Result) -> list[str]:
    """Write results as a.json, b.json, ..."""
    paths = [folder / f"{chr(ord('a') + i)}.json" for i in range(len(results))]
    for path, result in zip(paths, results, strict=True):
        write_result(result, path)
    return [str(path) for path in paths]


def platforms(path: Path, rows: Sequence[str] | None = None) -> Path:
    """Write a CSV of two platforms, 1,000 rows each: exit 10 after exit 9, then the last layer."""
    path.write_text("\n".join([HEAD, *(made_up_rows() if rows is None else rows), ""]))
    return path


def made_up_rows() -> list[str]:
    """Of two platforms, grouped by exit, the exits in no order; the second takes half as long."""
    rows = []
    for platform, factor in (("slow", 1.0), ("fast", 0.5)):
        for exit_, accuracy, count, ms in (
            ("exit_10", 50.0, 300, 20.0),
            ("exit_9", 90.0, 600, 10.0),
            ("final", 40.0, 100, 30.0),
        ):
            rows += [
                f"{platform},{exit_},{accuracy},{factor * (ms + 0.01 * (i % 7)):.4f}"
                for i in range(count)
            ]
    return rows
