"""Accuracy against cost over a range of lambda, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.quee.routing import RoutedTable, route_table
from calib.quee.table import PathTable
from edge_runtime.errors import CalibrationError, ConfigError
from edge_runtime.gate import Gate
from edge_runtime.gate_model import GateModel

_LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How intervals are found.

    Attributes:
        splits: Disjoint random parts of the test samples, R, >= 2, whose figures are told too.
        draws: Bootstrap resamples, >= 100.
        seed: Of both.
    """

    splits: int = 10
    draws: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that make no interval."""
        if self.splits < 2 or self.draws < 100:
            raise ConfigError(
                "splits and draws",
                got=f"{self.splits} and {self.draws}",
                expected=">= 2 and >= 100",
            )


@dataclass(frozen=True)
class Estimate:
    """A mean over the test samples.

    Attributes:
        mean: Over all samples.
        low: Lower end of the 95 % percentile-bootstrap interval: test samples are drawn with
            replacement, as many as there are. What the gate was fitted on is not drawn anew.
        high: Its upper end.
        parts: Means of the disjoint random parts, R of them, whose spread the paper shows.
    """

    mean: float
    low: float
    high: float
    parts: tuple[float, ...]


@dataclass(frozen=True)
class CurvePoint:
    """One point of a curve.

    Attributes:
        setting: lambda, or the threshold.
        accuracy: Share of right answers.
        cost: Mean cost, in the unit of its column.
        shares: Share of the samples on each path of the table.
        near_ties: Samples with a decision that was nearly a tie.
    """

    setting: float
    accuracy: Estimate
    cost: Estimate
    shares: tuple[float, ...]
    near_ties: int


def sweep(
    model: GateModel,
    table: PathTable,
    trade_offs: Sequence[float],
    *,
    column: str,
    resampling: Resampling,
) -> tuple[CurvePoint, ...]:
    """The curve of one gate, fitted once.

    Args:
        model: The gate; of the kind "paths".
        table: Test samples.
        trade_offs: Values of lambda.
        column: The cost that the gate weighs and the curve shows.
        resampling: How intervals are found.

    Returns:
        One point per lambda, in the order given.

    Raises:
        ConfigError: No lambda, one that is none, no such column, or a table that does not fit.
        CalibrationError: Fewer samples than splits.
    """
    costs = table.path_costs(column)
    routed = [route_table(Gate(model, costs, value), table) for value in trade_offs]
    return curve(trade_offs, routed, column=column, resampling=resampling)


def curve(
    settings: Sequence[float],
    routed: Sequence[RoutedTable],
    *,
    column: str,
    resampling: Resampling,
) -> tuple[CurvePoint, ...]:
    """Figures of some rules on the same samples, gates or baselines.

    All points, and all curves of as many samples and one seed, see the same resamples and parts,
    so that their differences are not blurred by the drawing.

    Args:
        settings: What each rule was set to.
        routed: The path of each sample by each rule; tables of as many samples.
        column: The cost.
        resampling: How intervals are found.

    Raises:
        ConfigError: No rule, as many settings as rules are not there, or no such column.
        CalibrationError: Tables of different sizes, or fewer samples than splits.
    """
    if not routed or len(settings) != len(routed):
        raise ConfigError(
            "points of a curve", got=f"{len(settings)} settings", expected=len(routed) or ">= 1"
        )
    samples = {len(one.table) for one in routed}
    if len(samples) > 1:
        raise CalibrationError("a curve over tables of different sizes", got=sorted(samples))
    values = np.concatenate(
        [
            np.stack([one.right for one in routed], axis=1).astype(np.float64),
            np.stack([one.sample_costs(column) for one in routed], axis=1),
        ],
        axis=1,
    )
    estimates = _estimates(values, resampling)
    return tuple(
        CurvePoint(
            setting=float(setting),
            accuracy=estimates[i],
            cost=estimates[len(routed) + i],
            shares=tuple(one.shares.tolist()),
            near_ties=one.near_ties,
        )
        for i, (setting, one) in enumerate(zip(settings, routed, strict=True))
    )


def _estimates(values: NDArray[np.float64], how: Resampling) -> list[Estimate]:
    """Of each column of `values`, shape (N, k)."""
    samples = len(values)
    if samples < how.splits:
        raise CalibrationError(
            f"samples for {how.splits} splits", got=samples, expected=f">= {how.splits}"
        )
    generator = np.random.default_rng(how.seed)
    parts = np.array_split(generator.permutation(samples), how.splits)
    split_means = np.stack([values[rows].mean(axis=0) for rows in parts])
    drawn = np.empty((how.draws, values.shape[1]))
    for draw in range(how.draws):
        count = np.bincount(generator.integers(samples, size=samples), minlength=samples)
        drawn[draw] = count @ values / samples
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    means = values.mean(axis=0)
    return [
        Estimate(float(means[i]), float(low[i]), float(high[i]), tuple(split_means[:, i].tolist()))
        for i in range(values.shape[1])
    ]
