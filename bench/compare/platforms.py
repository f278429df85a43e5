"""The EEVIT thesis's measurements of one model on four targets, as results to compare with.

Its author published one row per sample: the platform, the exit at which the sample left, the
accuracy of that exit, and the time. The model is a ViT-B/16 with eight exits as one ONNX graph with
`If` nodes in ONNX Runtime; the samples are the 10,000 test images of CIFAR-100.

Reference:
    EEVIT, master's thesis; rows as in the author's repository ionymikler/early_exit_vit,
    commit 15662683, March 2025.
"""

from __future__ import annotations

import csv
import math
import re
import stat
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from bench.result import BLOCK, Distribution, ExitFigures, Result, SubjectFigures
from edge_runtime.errors import ConfigError, ManifestError
from edge_runtime.files import MAX_JSON_BYTES as MAX_BYTES

COLUMNS = ("platform", "exit", "accuracy_of_exit_percent", "latency_ms")
METHOD = "published: one ONNX-If graph on ONNX Runtime, one image at a time"
SOURCE = "EEVIT thesis, ionymikler/early_exit_vit at commit 15662683"
#: What the author's names of platforms stand for.
MACHINES = {
    "orin_onnx_cpu": "Jetson AGX Orin, CPU",
    "orin_onnx_gpu": "Jetson AGX Orin, GPU",
    "pc_onnx_cpu": "desktop, Core i7-9750H",
    "pc_onnx_gpu": "desktop, GeForce GTX 1650",
}
#: More than these are not a table of platforms.
_MOST_PLATFORMS = 64
_MOST_EXITS = 256

_NUMBERED = re.compile(r"[^0-9]*([0-9]{1,9})")


@dataclass
class _Platform:
    """What the rows of one platform say.

    Attributes:
        line: Where it begins.
        exits: Number of the exit of each row, in the order of `_Rows.exits`.
        milliseconds: Latency of each row.
        accuracy: Number of the exit -> its accuracy in percent.
    """

    line: int
    exits: array[int] = field(default_factory=lambda: array("H"))
    milliseconds: array[float] = field(default_factory=lambda: array("d"))
    accuracy: dict[int, float] = field(default_factory=dict)


@dataclass
class _Rows:
    """All rows of a file; exits are numbered as they come."""

    platforms: dict[str, _Platform] = field(default_factory=dict)
    exits: dict[str, int] = field(default_factory=dict)


def read_platforms(path: Path) -> tuple[Result, ...]:
    """Read published measurements of platforms.

    Rows that are grouped by exit, as the author's are, have lost the order in which they were
    measured. Blocks are then made as if the samples of each exit had been spread evenly over the
    run: every block has its part of each exit.

    Args:
        path: A CSV with the columns platform, exit, accuracy_of_exit_percent and latency_ms, one
            row per sample, UTF-8.

    Returns:
        One result of kind "reference" per platform, in the file's order. Exits are in the order of
        their numbers; the one without a number is the last layer, where samples end up that left
        nowhere.

    Raises:
        ConfigError: A column is missing or in another place, or a cell is not such a number; the
            message names the line.
        ManifestError: The file can't be read or is larger than 64 MiB.
    """
    rows = _Rows()
    for line, cells in _lines(path):
        _add(rows, f"{path}, line {line}", line, cells)
    if not rows.platforms:
        raise ConfigError(f"{path}", got="no row", expected="one row per sample")
    order = _in_order(path, rows.exits)
    return tuple(
        _result(path, name, platform, rows.exits, order)
        for name, platform in rows.platforms.items()
    )


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows below the head, with the number of their line."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise ManifestError(f"platforms {path} is not a plain file")
        if info.st_size > MAX_BYTES:
            raise ManifestError(
                f"platforms {path}", got=f"{info.st_size} bytes", expected=f"at most {MAX_BYTES}"
            )
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _parsed(path, file)
    except FileNotFoundError as error:
        raise ManifestError(f"platforms {path} does not exist") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8: {error}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ManifestError(f"platforms {path} can't be read: {error}") from error


def _parsed(path: Path, file: TextIO) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(file, strict=True)
    head = True
    try:
        for cells in reader:
            if head and tuple(cells) != COLUMNS:
                raise ConfigError(
                    f"{path}, line {reader.line_num}: columns",
                    got=",".join(cells)[:120] or "nothing",
                    expected=",".join(COLUMNS),
                )
            if not head and cells:
                yield reader.line_num, cells
            head = False
    except csv.Error as error:
        raise ConfigError(f"{path}, line {reader.line_num}: {error}") from error


def _add(rows: _Rows, where: str, line: int, cells: list[str]) -> None:
    if len(cells) != len(COLUMNS):
        raise ConfigError(
            f"{where}: columns", got=len(cells), expected=f"{len(COLUMNS)}: {', '.join(COLUMNS)}"
        )
    name, exit_name = cells[0].strip(), cells[1].strip()
    if not name or not exit_name:
        raise ConfigError(f"{where}: {COLUMNS[0 if not name else 1]}", got="nothing")
    accuracy = _number(f"{where}: {COLUMNS[2]}", cells[2])
    if not 0 <= accuracy <= 100:
        raise ConfigError(f"{where}: {COLUMNS[2]}", got=cells[2], expected="percent, 0 to 100")
    latency = _number(f"{where}: {COLUMNS[3]}", cells[3])
    if latency <= 0:
        raise ConfigError(f"{where}: {COLUMNS[3]}", got=cells[3], expected="milliseconds > 0")
    platform = rows.platforms.setdefault(name, _Platform(line))
    number = rows.exits.setdefault(exit_name, len(rows.exits))
    for what, count, most in (
        ("platforms", len(rows.platforms), _MOST_PLATFORMS),
        ("exits", len(rows.exits), _MOST_EXITS),
    ):
        if count > most:
            raise ConfigError(f"{where}: {what}", got=count, expected=f"at most {most}")
    if platform.accuracy.setdefault(number, accuracy) != accuracy:
        raise ConfigError(
            f"{where}: {COLUMNS[2]} of {exit_name}",
            got=cells[2],
            expected=f"{platform.accuracy[number]}, as in its other rows of {name}",
        )
    platform.exits.append(number)
    platform.milliseconds.append(latency)


def _number(where: str, text: str) -> float:
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(where, got=repr(text)[:80], expected="a number")
    return value


def _in_order(path: Path, exits: dict[str, int]) -> list[str]:
    """Exits by their number; the one without a number comes last."""
    found = {name: _NUMBERED.fullmatch(name) for name in exits}
    without = [name for name, match in found.items() if match is None]
    if len(without) > 1:
        raise ConfigError(
            f"{path}: the order of the exits {', '.join(sorted(without))} is not known",
            expected="names with a number, and at most one without: the last layer",
        )
    numbers = {name: int(match[1]) for name, match in found.items() if match is not None}
    return [*sorted(numbers, key=lambda name: (numbers[name], name)), *without]


def _result(
    path: Path, name: str, platform: _Platform, exits: dict[str, int], order: list[str]
) -> Result:
    seconds = np.frombuffer(platform.milliseconds, np.float64) / 1e3
    where = np.frombuffer(platform.exits, np.uint16)
    figures, right = [], 0.0
    for exit_name in order:
        here = where == exits[exit_name]
        count = int(here.sum())
        accuracy = platform.accuracy.get(exits[exit_name], 0.0) / 100
        right += accuracy * count
        figures.append(
            ExitFigures(
                name=exit_name,
                evaluated=True,
                count=count,
                share=count / seconds.size,
                accuracy=accuracy if count else None,
                latency=_distribution(seconds[here]) if count else None,
            )
        )
    early = sum(_NUMBERED.fullmatch(exit_name) is not None for exit_name in order)
    latency = _distribution(seconds)
    return Result(
        kind="reference",
        name=name,
        command=f"{path.name}, line {platform.line} on; {SOURCE}",
        created="2025-03",
        method=METHOD,
        bundle=f"EEVIT ViT-B/16, {early} exits",
        bundle_name="EEVIT ViT-B/16",
        data="CIFAR-100 test",
        images=seconds.size,
        backend="ONNX Runtime",
        mode="If graph",
        measured_s=float(seconds.sum()),
        environment={"stamp": {"board": MACHINES[name]}} if name in MACHINES else {},
        accuracy=right / seconds.size,
        end_to_end=latency,
        subjects=(
            SubjectFigures(
                name="cascade",
                what="one ONNX graph with If",
                latency=latency,
                blocks=_blocks(seconds, where),
            ),
        ),
        exits=tuple(figures),
        notes=(
            *((MACHINES[name],) if name in MACHINES else ()),
            "Published: order of measurement, clocks, versions and energy are not told, nor a run "
            "without exits: the time of the last layer holds that of all exits before it.",
        ),
    )


def _distribution(seconds: NDArray[np.float64]) -> Distribution:
    """Without jitter, as neighbouring rows are no neighbouring frames."""
    return replace(Distribution.of(seconds, curve=True), jitter=None)


def _blocks(seconds: NDArray[np.float64], exits: NDArray[np.uint16]) -> tuple[float, ...]:
    """Mean seconds of each whole block of `BLOCK` rows."""
    changes = int(np.count_nonzero(np.diff(exits)))
    if 0 < changes == len(np.unique(exits)) - 1:
        seconds = seconds[_spread_evenly(exits)]
    whole = seconds.size // BLOCK
    means: list[float] = seconds[: whole * BLOCK].reshape(whole, BLOCK).mean(axis=1).tolist()
    return tuple(means)


def _spread_evenly(exits: NDArray[np.uint16]) -> NDArray[np.intp]:
    """An order of rows grouped by exit in which each exit's rows are spread over the whole."""
    places = np.empty(exits.size)
    for exit_ in np.unique(exits):
        here = np.flatnonzero(exits == exit_)
        places[here] = (np.arange(here.size) + 0.5) / here.size
    return np.argsort(places, kind="stable")
