"""Operating points of studies, and what they can't be made of."""

from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.confidence import Metric, bounds
from edge_runtime.errors import ConfigError
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint


def same_everywhere(threshold: float, metric: Metric, exits: Sequence[str]) -> OperatingPoint:
    """The point with one threshold at all early exits.

    Args:
        threshold: Of the signal.
        metric: The signal.
        exits: Names of all exits.
    """
    return OperatingPoint(
        name=f"threshold_{threshold!r}",
        metric=metric,
        thresholds=dict.fromkeys(exits[:-1], threshold),
    )


def check_threshold(threshold: float, metric: Metric, classes: int, option: str) -> None:
    """Refuse a threshold that always or never fires.

    Raises:
        ConfigError: It is not within the signal's bounds.
    """
    low, high = bounds(metric, classes)
    if not low < threshold <= high:
        raise ConfigError(
            option, got=f"{threshold:g}", expected=f"> {low:.4g} and <= {high:.4g} for {metric}"
        )


def require_early_exit(bundle: Bundle, kind: str) -> None:
    """Refuse a bundle in which nothing can leave early.

    Raises:
        ConfigError: It has one exit.
    """
    if len(bundle.cascade.exits) < 2:
        raise ConfigError(
            f"study {kind}: the bundle {bundle.path} has no early exit",
            got=f"one exit, {bundle.cascade.exits[0].name}",
            expected="two or more",
        )
