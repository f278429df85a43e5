"""What models cost: a CSV with a row per model and a column per kind of cost.

```
model,cost,seconds_orin,joules
tiny,59.3e6,0.0011,0.02
```

MACs, measured seconds on a device, energy: the column is chosen by its name.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_runtime.errors import ConfigError
from edge_runtime.files import read_plain
from edge_runtime.schema import nearest

MODEL, COST = "model", "cost"


def add_costs(parser: argparse.ArgumentParser) -> None:
    """The options that name costs of a table's models."""
    parser.add_argument("--costs", required=True, metavar="C.csv", help="what the models cost")
    parser.add_argument(
        "--cost-column", default=COST, metavar="NAME", help=f"column of the costs (default {COST})"
    )


def read_costs(path: str | Path, column: str = COST) -> dict[str, float]:
    """Read one column of costs.

    Args:
        path: A CSV, UTF-8, whose first line names the columns, `model` among them.
        column: The column that is read.

    Returns:
        Model name -> cost, > 0, in the order of the file.

    Raises:
        ConfigError: There is no such file or column, a column or a model appears twice, a row has
            another number of cells, or a cost is no finite number > 0; the message names the row.
        ManifestError: The file can't be read or is larger than 64 MiB.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"the costs {path} do not exist")
    rows = _rows(path)
    if not rows:
        raise ConfigError(f"costs {path}: the file is empty", expected="model,cost")
    _, header = rows[0]
    twice, count = Counter(header).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"costs {path}: the column {twice!r} appears twice")
    for name in (MODEL, column):
        if name not in header:
            raise ConfigError(
                f"costs {path}: there is no column {name!r}", remedy=nearest(name, header)
            )
    if column == MODEL:
        raise ConfigError(f"costs {path}: the column 'model' holds names, not costs")
    costs: dict[str, float] = {}
    for line, cells in rows[1:]:
        where = f"costs {path}, line {line}"
        if len(cells) != len(header):
            raise ConfigError(f"{where}: cells", got=len(cells), expected=len(header))
        row = dict(zip(header, cells, strict=True))
        if row[MODEL] in costs:
            raise ConfigError(f"{where}: the model {row[MODEL]!r} appears twice")
        costs[row[MODEL]] = _cost(row[column], f"{where}: {column} of {row[MODEL]!r}")
    return costs


def costs_of(models: Sequence[str], costs: Mapping[str, float], path: str | Path) -> list[float]:
    """The cost of each model of a table.

    Args:
        models: The table's models.
        costs: What `read_costs` has read.
        path: From where, for the message.

    Returns:
        Costs in the order of `models`.

    Raises:
        ConfigError: A model has no cost, or there is a cost for a model that the table lacks.
    """
    for name in models:
        if name not in costs:
            raise ConfigError(
                f"costs {path}: there is no cost for the model {name!r}",
                remedy=nearest(name, costs),
            )
    for name in costs:
        if name not in models:
            raise ConfigError(
                f"costs {path}: the table has no model {name!r}", remedy=nearest(name, models)
            )
    return [costs[name] for name in models]


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """Line number and cells of each row that is not blank."""
    try:
        text = read_plain(path, "costs").decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        return [
            (reader.line_num, [cell.strip() for cell in row])
            for row in reader
            if any(cell.strip() for cell in row)
        ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"costs {path} are no CSV: {error}") from error


def _cost(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(where, got=repr(text)[:80], expected="a finite number > 0")
    return value
