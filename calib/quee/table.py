"""Path tables: what every path says of every sample, and what every path costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_runtime import schema
from edge_runtime.errors import CalibrationError, ConfigError, ManifestError
from edge_runtime.npz import check_nothing_else, read_npz, take, write_npz
from edge_runtime.paths import Levels, Paths

SCHEMA_VERSION = 1

#: A table is held in memory twice while it is written.
_MOST_BYTES = 16 * 2**30
#: Rounding of a softmax in float32, of a thousand classes.
_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class PathTable:
    """What every path says of labelled samples.

    Attributes:
        paths: The P paths.
        probabilities: Softmax of the exit that the path ends at, shape (N, P, classes), float32.
        labels: True class indices, shape (N,), int64.
        costs: Column name -> cost of each path in any unit, shape (P,), float64. Tables that are
            compared with each other have their columns in the same units.
        bundle: Hash of the bundle.

    Raises:
        CalibrationError: From the constructor, where shapes, dtypes or values don't fit.
    """

    paths: Paths
    probabilities: NDArray[np.float32]
    labels: NDArray[np.int64]
    costs: Mapping[str, NDArray[np.float64]]
    bundle: str = ""

    def __post_init__(self) -> None:
        """Check that arrays fit each other and hold probabilities, classes and costs."""
        shape = self.probabilities.shape
        if (
            self.probabilities.dtype != np.float32
            or len(shape) != 3
            or shape[:2] != (len(self.labels), len(self.paths))
            or min(shape) < 1
            or shape[2] < 2
        ):
            raise CalibrationError(
                "probabilities of a path table",
                got=f"{self.probabilities.dtype} {shape}",
                expected=f"float32 ({len(self.labels)}, {len(self.paths)}, classes), one sample "
                "and two classes at least",
            )
        self._check_labels()
        self._check_probabilities()
        for column, costs in self.costs.items():
            self._check_costs(column, costs)

    def __len__(self) -> int:
        """N, the number of samples."""
        return len(self.labels)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.probabilities.shape[2])

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        """Whether each path's answer is right, shape (N, P); the lowest class wins a tie."""
        right: NDArray[np.bool_] = self.probabilities.argmax(axis=2) == self.labels[:, None]
        return right

    def column(self, name: str) -> NDArray[np.float64]:
        """Cost of each path, shape (P,).

        Raises:
            ConfigError: There is no such column.
        """
        if name not in self.costs:
            raise ConfigError(
                f"the path table has no cost {name!r}", remedy=schema.nearest(name, self.costs)
            )
        return self.costs[name]

    def path_costs(self, name: str) -> dict[Levels, float]:
        """Path -> cost, as `Gate` takes them; arguments and errors as of `column`."""
        return dict(zip(self.paths.paths, self.column(name).tolist(), strict=True))

    def samples(self, rows: ArrayLike) -> PathTable:
        """The table of some samples, in the order of `rows`, indices or a mask."""
        chosen = np.asarray(rows)
        return replace(self, probabilities=self.probabilities[chosen], labels=self.labels[chosen])

    def of(self, paths: Paths) -> PathTable:
        """The table of some paths, in their order.

        Raises:
            ConfigError: It has other levels or exits, or lacks a path.
        """
        self.check_names(paths)
        rows = [self.paths.index(path) for path in paths.paths]
        return replace(
            self,
            paths=paths,
            probabilities=self.probabilities[:, rows],
            costs={name: costs[rows] for name, costs in self.costs.items()},
        )

    def check_names(self, paths: Paths) -> None:
        """Refuse paths of other levels or exits than the table's.

        Raises:
            ConfigError: They are.
        """
        for what, got, expected in (
            ("levels", paths.levels, self.paths.levels),
            ("exits", paths.exits, self.paths.exits),
        ):
            if got != expected:
                raise ConfigError(
                    f"{what} of the paths, against the path table's",
                    got=", ".join(got),
                    expected=", ".join(expected),
                )

    def write(self, path: Path) -> None:
        """Write the table as one npz of plain arrays.

        Raises:
            EdgeRuntimeError: The file can't be written; the old one is still there.
        """
        names = list(self.costs)
        meta = _Meta(
            SCHEMA_VERSION,
            self.bundle,
            self.paths.levels,
            self.paths.exits,
            self.paths.paths,
            self.classes,
            len(self),
            tuple(names),
        )
        arrays: dict[str, NDArray[Any]] = {
            "probabilities": self.probabilities,
            "labels": self.labels,
        }
        arrays |= {f"cost.{i}": self.costs[name] for i, name in enumerate(names)}
        write_npz(path, schema.plain(meta), arrays)

    @classmethod
    def read(cls, path: Path) -> PathTable:
        """Read a table that `write` wrote; the file may come from anywhere.

        Raises:
            ManifestError: The file is missing, damaged, or of another version.
            CalibrationError: Its values are no probabilities, classes or costs.
        """
        where = f"path table {path}"
        data, arrays = read_npz(path, "path table", most=_MOST_BYTES)
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise ManifestError(
                f"{where}: schema version",
                got=repr(version)[:80],
                expected=SCHEMA_VERSION,
                remedy="It was written by another version of edge-runtime: collect it again",
            )
        try:
            meta = schema.read(_Meta, data, where)
            paths = Paths(meta.levels, meta.exits, meta.paths)
        except ConfigError as error:
            raise ManifestError(
                str(error) if where in str(error) else f"{where}: {error}"
            ) from error
        shape = (meta.samples, len(paths), meta.classes)
        probabilities = take(arrays, "probabilities", np.float32, shape, where)
        labels = take(arrays, "labels", np.int64, (meta.samples,), where)
        costs = {
            name: take(arrays, f"cost.{i}", np.float64, (len(paths),), where)
            for i, name in enumerate(meta.costs)
        }
        check_nothing_else(arrays, where)
        return cls(paths, probabilities, labels, costs, meta.bundle)

    def _check_labels(self) -> None:
        labels = self.labels
        if labels.dtype != np.int64 or labels.min() < 0 or labels.max() >= self.classes:
            raise CalibrationError(
                "labels of a path table",
                got=f"{labels.dtype}, {labels.min()}..{labels.max()}",
                expected=f"int64, 0..{self.classes - 1}",
            )

    def _check_probabilities(self) -> None:
        sums = self.probabilities.sum(axis=2)
        bad = ~(np.abs(sums - 1) < _TOLERANCE) | (self.probabilities.min(axis=2) < 0)
        if bad.any():
            sample, path = np.argwhere(bad)[0]
            raise CalibrationError(
                f"probabilities of sample {sample} on the path "
                f"{self.paths.name(self.paths.paths[path])!r}",
                got=f"a sum of {sums[sample, path]}, the smallest "
                f"{self.probabilities[sample, path].min()}",
                expected="numbers >= 0 that make 1",
            )

    def _check_costs(self, column: str, costs: NDArray[np.float64]) -> None:
        if costs.dtype != np.float64 or costs.shape != (len(self.paths),):
            raise CalibrationError(
                f"cost {column!r} of a path table",
                got=f"{costs.dtype} {costs.shape}",
                expected=f"float64 ({len(self.paths)},), one per path",
            )
        bad = ~(np.isfinite(costs) & (costs >= 0))
        if bad.any():
            row = int(bad.argmax())
            raise CalibrationError(
                f"cost {column!r} of the path {self.paths.name(self.paths.paths[row])!r}",
                got=costs[row],
                expected="a finite number >= 0",
            )


@dataclass(frozen=True)
class _Meta:
    """The description in a table's file."""

    schema_version: int
    bundle: str
    levels: tuple[str, ...]
    exits: tuple[str, ...]
    paths: tuple[Levels, ...]
    classes: int
    samples: int
    costs: tuple[str, ...]


@dataclass(frozen=True)
class StageWork:
    """What one stage of a block computes.

    Attributes:
        macs: Multiply-accumulates, >= 0.
        bits: Bit width at which it really runs, per level; a stage that lacks a level's variant
            runs at its own. Ones make the cost plain MACs.
    """

    macs: float
    bits: tuple[int, ...]


def bit_operations(
    paths: Paths, blocks: Sequence[Sequence[StageWork]], *, unit: float | None = None
) -> NDArray[np.float64]:
    """BitOPS of each path: MACs times bit width, over the stages of its blocks.

    Args:
        paths: The paths.
        blocks: The stages of each block, one entry per exit.
        unit: BitOPS that count as 1; by default those of the dearest path. Tables that are
            compared take the same.

    Returns:
        Shape (P,), float64.

    Raises:
        ConfigError: Blocks and exits, or bit widths and levels, differ in number, or a number is
            negative or not finite.

    Reference:
        Regol et al., QuEE, 2024, Eq. 17.
    """
    levels = len(paths.levels)
    for block in blocks:
        for stage in block:
            if len(stage.bits) != levels:
                raise ConfigError(
                    "bit widths of a stage",
                    got=len(stage.bits),
                    expected=f"{levels}, one per level",
                )
    work = [
        [sum(stage.macs * stage.bits[level] for stage in block) for level in range(levels)]
        for block in blocks
    ]
    total = sum_of_blocks(paths, np.array(work, np.float64).reshape(len(blocks), levels))
    divisor = float(total[paths.index(paths.dearest)]) if unit is None else unit
    if not 0 < divisor < math.inf:
        raise ConfigError("BitOPS that count as 1", got=divisor, expected="a finite number > 0")
    return total / divisor


def sum_of_blocks(paths: Paths, blocks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cost of each path, as the sum of what its blocks cost at their levels.

    Args:
        paths: The paths.
        blocks: Cost of each block at each level, shape (exits, levels), any unit.

    Returns:
        Shape (P,), float64.

    Raises:
        ConfigError: The shape is another one, or a cost is negative or not finite.
    """
    shape = (len(paths.exits), len(paths.levels))
    if blocks.shape != shape:
        raise ConfigError(
            "costs of blocks", got=f"shape {blocks.shape}", expected=f"{shape}, (exits, levels)"
        )
    if not (np.isfinite(blocks) & (blocks >= 0)).all():
        raise ConfigError("costs of blocks", got=blocks.min(), expected="finite numbers >= 0")
    sums = [sum(blocks[j, level] for j, level in enumerate(path)) for path in paths.paths]
    return np.array(sums, np.float64)
