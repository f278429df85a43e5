"""Which path every sample of a table takes: a gate's decisions without running anything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.quee.table import PathTable
from edge_runtime.errors import ConfigError
from edge_runtime.gate import LEAVE, Gate
from edge_runtime.paths import Levels

#: Where the best two steps differ by less, another order of sums may decide otherwise.
NEAR_TIE = 1e-6


@dataclass(frozen=True, eq=False)
class RoutedTable:
    """The path of every sample, by a gate or another rule.

    Attributes:
        table: What every path says of the samples.
        path: Index into `table.paths.paths` of the path that each sample takes, shape (N,), int64.
        near: Whether one of the sample's decisions was nearly a tie, shape (N,).
    """

    table: PathTable
    path: NDArray[np.int64]
    near: NDArray[np.bool_]

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether the answer of each sample's path is right, shape (N,)."""
        right: NDArray[np.bool_] = self.table.right[np.arange(len(self.path)), self.path]
        return right

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.right.mean())

    @property
    def near_ties(self) -> int:
        """Number of samples with a decision that was nearly a tie."""
        return int(self.near.sum())

    @property
    def shares(self) -> NDArray[np.float64]:
        """Share of the samples on each path, shape (P,)."""
        return np.bincount(self.path, minlength=len(self.table.paths)) / len(self.path)

    def cost(self, column: str) -> float:
        """Mean cost in one of the table's columns.

        Raises:
            ConfigError: There is no such column.
        """
        return float(self.sample_costs(column).mean())

    def costs(self) -> dict[str, float]:
        """Column -> mean cost."""
        return {column: self.cost(column) for column in self.table.costs}

    def sample_costs(self, column: str) -> NDArray[np.float64]:
        """Cost of each sample, shape (N,); arguments and errors as of `cost`."""
        costs: NDArray[np.float64] = self.table.column(column)[self.path]
        return costs


def route_table(gate: Gate, table: PathTable) -> RoutedTable:
    """Route every sample of a table as the gate would while running.

    Args:
        gate: At its lambda and costs.
        table: Has all of the gate's paths, in any order, and possibly more.

    Raises:
        ConfigError: It has other levels, exits or classes, or lacks a path.
    """
    known = gate.model.paths
    table.check_names(known)
    if table.classes != gate.model.classes:
        raise ConfigError(
            "classes of the path table", got=table.classes, expected=gate.model.classes
        )
    index = {path: table.paths.index(path) for path in known.paths}
    taken = np.full(len(table), index[(0,)], np.int64)
    near = np.zeros(len(table), bool)
    waiting: dict[Levels, NDArray[np.intp]] = {(0,): np.arange(len(table))}
    while waiting:
        begin, rows = waiting.popitem()
        taken[rows] = index[begin]
        now = table.probabilities[rows, index[begin]]
        before = table.probabilities[rows, index[begin[:-1]]] if len(begin) > 1 else None
        steps, excess = gate.weigh(begin, now, before)
        chosen = steps[excess.argmin(axis=1)]
        near[rows] |= ((excess < NEAR_TIE) & (steps != chosen[:, None])).any(axis=1)
        for step in np.unique(chosen).tolist():
            if step != LEAVE:
                further = (*begin, step)
                waiting[further] = rows[chosen == step]
    return RoutedTable(table, taken, near)
