"""What a study leaves in its folder: JSON and CSV first, then pictures; each is whole or absent."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edge_runtime.errors import ConfigError, EdgeRuntimeError, missing_package
from edge_runtime.files import write_bytes, write_json
from edge_runtime.schema import plain


@dataclass(frozen=True)
class Table:
    """Rows of a CSV.

    Attributes:
        columns: Their names, with units.
        rows: Values; None is an empty cell.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    def text(self) -> bytes:
        """The CSV, UTF-8, with one line per row."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([_cell(value) for value in row] for row in self.rows)
        return text.getvalue().encode()


@dataclass(frozen=True)
class StudyResult:
    """What came of a study.

    Attributes:
        found: The result as JSON data.
        tables: File name without suffix -> its CSV.
        pictures: File name without suffix -> what draws it, given its path.
        interrupted: Whether somebody stopped it, so that it covers less than was asked for.
    """

    found: Mapping[str, Any]
    tables: Mapping[str, Table]
    pictures: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    interrupted: bool = False

    def with_stamp(self, stamp: Mapping[str, Any]) -> StudyResult:
        """The same with what says where it comes from, before all else in its JSON."""
        return replace(self, found={**stamp, **self.found})


def open_folder(path: str | None) -> Path | None:
    """Make the folder of `--out`, before anything long begins.

    Returns:
        It; None where no files are wanted.

    Raises:
        ConfigError: It is a file, or its parent does not exist.
        BackendUnavailable: matplotlib is not installed.
        EdgeRuntimeError: It can't be made.
    """
    if path is None:
        return None
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}", got="a file", expected="a folder, new or not")
    if not folder.absolute().parent.is_dir():
        raise ConfigError(f"the folder {folder.parent} does not exist", remedy="Create it first")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise missing_package("matplotlib", "bench") from error
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise EdgeRuntimeError(f"{folder} can't be made: {error.strerror or error}") from error
    return folder


def write_study(
    folder: Path, name: str, result: StudyResult, wrote: Callable[[Path], None]
) -> list[Path]:
    """Write a study; files of the same names are replaced.

    Args:
        folder: From `open_folder`.
        name: File name of the JSON, without suffix.
        result: What came of it.
        wrote: Told each file once it is whole.

    Raises:
        EdgeRuntimeError: A file can't be written; those before it are whole.
    """
    files = []

    def done(path: Path) -> None:
        files.append(path)
        wrote(path)

    path = folder / f"{name}.json"
    write_json(path, plain(result.found))
    done(path)
    for stem, table in result.tables.items():
        path = folder / f"{stem}.csv"
        write_bytes(path, table.text())
        done(path)
    for stem, draw in result.pictures.items():
        path = folder / f"{stem}.png"
        draw(path)
        done(path)
    return files


def _cell(value: object) -> object:
    """Numbers with as many digits as a measurement has."""
    return f"{value:.6g}" if isinstance(value, float) else value
