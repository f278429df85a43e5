"""Which models are worth a look before any is run: public accuracies against public costs.

Both come as CSVs in the format of timm's results. Columns are found by name, as their order differs
between files. An accuracy belongs to a checkpoint (`resnet50.a1_in1k`), a cost to an architecture
(`resnet50`); they are joined on the architecture and the size of the image.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import ConfigError
from edge_runtime.files import read_plain
from edge_runtime.schema import nearest

MODEL = "model"
#: timm's own tiny models for its tests.
_TESTS = "test_"
_SIZE = "img_size"
_PER_SECOND, _GMACS, _STEP = "samples_per_sec", "gmacs", "step_time"


@dataclass(frozen=True)
class PublicModel:
    """A checkpoint at one size of the image.

    Attributes:
        model: Name of the checkpoint.
        image_size: Height and width of the image, pixels.
        accuracy: A fraction.
        cost: Of a sample, > 0, in the unit of `Shortlist.unit`.
    """

    model: str
    image_size: int
    accuracy: float
    cost: float

    @property
    def name(self) -> str:
        """The checkpoint with its size: names alone appear at several sizes."""
        return f"{self.model}@{self.image_size}"


@dataclass(frozen=True)
class PublicSaver:
    """A candidate saver of a base.

    Attributes:
        saver: The candidate.
        needed: The exit ratio that has to be exceeded to pay off: C_S / C_B.
        possible: The largest exit ratio at which nothing can be lost, whatever the signal: on the
            samples that stay the base can be right where the saver is not, and nowhere else, so
            that they are at least as many as the accuracies differ.
    """

    saver: PublicModel
    needed: float
    possible: float

    @property
    def best_delta(self) -> float:
        """The smallest Delta C that there can be without a loss; the true one needs predictions."""
        return self.needed - self.possible


@dataclass(frozen=True)
class Shortlist:
    """What two CSVs say together.

    Attributes:
        models: All that have both accuracy and cost.
        unit: What costs are in.
        dropped: Reason -> number of rows of the accuracies that were left out for it.
    """

    models: tuple[PublicModel, ...]
    unit: str
    dropped: dict[str, int]

    def front(self) -> tuple[PublicModel, ...]:
        """Models that no other one beats, by ascending cost and accuracy."""
        front: list[PublicModel] = []
        for one in sorted(self.models, key=lambda one: (one.cost, -one.accuracy, one.name)):
            if not front or one.accuracy > front[-1].accuracy:
                front.append(one)
        return tuple(front)

    def find(self, name: str) -> PublicModel:
        """The model of a name, with or without its size.

        Raises:
            ConfigError: There is none, or it has several sizes.
        """
        same = [one for one in self.models if name in (one.name, one.model)]
        if not same:
            raise ConfigError(
                f"--base: no model {name!r} has both accuracy and cost",
                remedy=nearest(name, {one.model for one in self.models}),
            )
        if len(same) > 1:
            raise ConfigError(
                f"--base {name}: there are {len(same)} sizes of the image",
                remedy=f"Give one of {', '.join(one.name for one in same)}",
            )
        return same[0]

    def savers(self, base: PublicModel) -> tuple[PublicSaver, ...]:
        """Models on the front that are cheaper than a base and could pay off.

        Returns:
            By ascending `best_delta`, all of which are negative.
        """
        found = []
        for one in self.front():
            possible = 1 - max(0.0, base.accuracy - one.accuracy)
            if one.cost < base.cost * possible:
                found.append(PublicSaver(one, one.cost / base.cost, possible))
        return tuple(sorted(found, key=lambda one: one.best_delta))


def read_shortlist(
    accuracies: str | Path,
    costs: str | Path,
    *,
    accuracy_column: str = "top1",
    cost_column: str = "infer_samples_per_sec",
    max_cost: float = math.inf,
    max_image_size: float = math.inf,
    max_params: float = math.inf,
) -> Shortlist:
    """Read and join accuracies and costs; timm's `test_*` models are left out.

    Args:
        accuracies: A CSV with the columns `model`, an image size and an accuracy in percent.
        costs: A CSV with the columns `model`, an image size and a cost.
        accuracy_column: Column of the accuracy.
        cost_column: Column of the cost. Samples per second become seconds, and GMACs MACs; other
            columns are taken as they are.
        max_cost: Models that cost more are left out; in the unit of the result.
        max_image_size: Models with larger images are left out; pixels.
        max_params: Models with more parameters are left out; millions, of the column `param_count`
            of the accuracies.

    Returns:
        Models that have both, in the order of the accuracies.

    Raises:
        ConfigError: A file or column is missing, a model appears twice at one size, a cell holds no
            such number, or nothing is left; the message names the line.
        ManifestError: A file can't be read or is larger than 64 MiB.
    """
    convert, unit = _unit(cost_column)
    cost_of = _read_costs(Path(costs), cost_column, convert)
    table = _Table.read(Path(accuracies), "accuracies")
    column = table.column(accuracy_column)
    size_column = table.size_column()
    params = table.column("param_count") if max_params < math.inf else None
    found: dict[tuple[str, int], PublicModel] = {}
    dropped: Counter[str] = Counter()
    for line, row in table.rows:
        model, size = row[table.model], table.whole(line, row, size_column)
        where = f"{table.where}, line {line}: {model!r} at {size} pixels"
        if (model, size) in found:
            raise ConfigError(f"{where} appears twice")
        accuracy = table.number(line, row, column)
        cost = cost_of.get((_architecture(model), size))
        reason = None
        if model.startswith(_TESTS):
            reason = "test models"
        elif accuracy is None:
            reason = "without an accuracy"
        elif cost is None:
            reason = "without a cost"
        elif cost > max_cost:
            reason = "above --max-cost"
        elif size > max_image_size:
            reason = "above --max-image-size"
        elif params is not None and (table.number(line, row, params) or math.inf) > max_params:
            reason = "above --max-params"
        if reason is not None or accuracy is None or cost is None:
            dropped[str(reason)] += 1
            continue
        if accuracy > 100:
            raise ConfigError(
                f"{where}: {accuracy_column}", got=accuracy, expected="percent, at most 100"
            )
        found[model, size] = PublicModel(model, size, accuracy / 100, cost)
    if not found:
        raise ConfigError(
            f"nothing is left of {table.where}",
            got=", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "no row",
            expected="a model with accuracy and cost",
        )
    return Shortlist(tuple(found.values()), unit, dict(dropped))


def _unit(column: str) -> tuple[Callable[[float], float], str]:
    """How a column becomes a cost, and in which unit."""
    if column.endswith(_PER_SECOND):
        return lambda value: 1 / value, "seconds per sample"
    if column.endswith(_GMACS):
        return lambda value: value * 1e9, "MACs"
    if column.endswith(_STEP):
        raise ConfigError(
            f"--cost-column {column}: times of batches, whose sizes differ between models",
            remedy=f"Use the column of samples per second, such as infer_{_PER_SECOND}",
        )
    return lambda value: value, column


def _read_costs(
    path: Path, name: str, convert: Callable[[float], float]
) -> dict[tuple[str, int], float]:
    """Architecture and image size -> cost, of the rows that have one."""
    table = _Table.read(path, "costs")
    column, size_column = table.column(name), table.size_column()
    costs: dict[tuple[str, int], float] = {}
    for line, row in table.rows:
        value = table.number(line, row, column)
        key = (_architecture(row[table.model]), table.whole(line, row, size_column))
        if key in costs:
            raise ConfigError(
                f"{table.where}, line {line}: {key[0]!r} at {key[1]} pixels appears twice"
            )
        if value is not None:
            costs[key] = convert(value)
    return costs


def _architecture(model: str) -> str:
    return model.split(".")[0]


@dataclass(frozen=True)
class _Table:
    """A CSV, its cells by the names of their columns.

    Attributes:
        where: What and where it is, for messages.
        header: Names of the columns.
        rows: Line number and cells of each row.
    """

    where: str
    header: Sequence[str]
    rows: Sequence[tuple[int, Sequence[str]]]

    @classmethod
    def read(cls, path: Path, what: str) -> _Table:
        where = f"{what} {path}"
        if not path.exists():
            raise ConfigError(f"{where}: there is no such file")
        try:
            text = read_plain(path, what).decode("utf-8-sig")
            reader = csv.reader(io.StringIO(text, newline=""), strict=True)
            rows = [
                (reader.line_num, [cell.strip() for cell in row])
                for row in reader
                if any(cell.strip() for cell in row)
            ]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{where}: no CSV: {error}") from error
        if not rows:
            raise ConfigError(f"{where}: the file is empty")
        header = rows[0][1]
        twice, count = Counter(header).most_common(1)[0]
        if count > 1:
            raise ConfigError(f"{where}: the column {twice!r} appears twice")
        for line, row in rows[1:]:
            if len(row) != len(header):
                raise ConfigError(
                    f"{where}, line {line}: cells", got=len(row), expected=len(header)
                )
        return cls(where, header, rows[1:])

    @property
    def model(self) -> int:
        return self.column(MODEL)

    def column(self, name: str) -> int:
        if name not in self.header:
            raise ConfigError(
                f"{self.where}: there is no column {name!r}", remedy=nearest(name, self.header)
            )
        return self.header.index(name)

    def size_column(self) -> int:
        """The column of image sizes, `img_size` or with a prefix such as `infer_img_size`."""
        names = [one for one in self.header if one == _SIZE or one.endswith(f"_{_SIZE}")]
        if len(names) != 1:
            raise ConfigError(
                f"{self.where}: columns of image sizes",
                got=", ".join(names) or "none",
                expected=f"one, {_SIZE} or such as infer_{_SIZE}",
            )
        return self.header.index(names[0])

    def number(self, line: int, row: Sequence[str], column: int) -> float | None:
        """A finite number > 0, None for an empty cell."""
        if not row[column]:
            return None
        text = row[column].replace(",", "")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(
                f"{self.where}, line {line}: {self.header[column]}",
                got=repr(row[column])[:80],
                expected="a finite number > 0",
            )
        return value

    def whole(self, line: int, row: Sequence[str], column: int) -> int:
        value = self.number(line, row, column)
        if value is None or value != int(value):
            raise ConfigError(
                f"{self.where}, line {line}: {self.header[column]}",
                got=repr(row[column])[:80],
                expected="a whole number of pixels",
            )
        return int(value)
