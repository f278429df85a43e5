"""The latency table of a device: from frames that were timed to times of single stages.

```
points = table_points(cascade, "max_softmax", variants)
rows = TableRows(scheduler.plan)               # opened at points[-1]
scheduler.switch(points[turn % len(points)])   # then classify, timed
rows.add(prediction, seconds)
rows.finish()                                  # a LatencyTable
```

Where frames leave says how warm the caches are: a stage that one frame in six reaches may take a
quarter longer than one that every frame reaches. Half of a table's frames go to the end, which is
what such a stage takes where a cascade runs alone; the others leave at each earlier exit in turn.
Each frame is a row; what it did not run it takes from the frame nearest in time that did.

The host's work around the stages takes longer, too, behind stages that evicted it from the caches.
The column of it is of frames that left at the first exit; what it takes more behind a later one is
in the column of the first stage on the way there.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bench.latency.forced import leave_at
from bench.result import LatencyTable
from calib.tables import around_seconds, deciding_seconds, durations
from edge_runtime.cascade import Cascade, Plan
from edge_runtime.confidence import Metric
from edge_runtime.errors import ConfigError
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.prediction import Prediction

#: Rows of a table at most.
MOST_ROWS = 2000


class TableRows:
    """Collects the rows of a table.

    Args:
        plan: What the frames run: all exits of the cascade are evaluated.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._stages = tuple(stage.name for stage in plan.stages)
        self._exits = tuple(step.exit.name for step in plan.steps)
        self._precisions: dict[str, str] = {}
        #: Seconds per row: of stages, of decisions, and of what is around them.
        self._seconds = array("d")

    def __len__(self) -> int:
        """Number of frames."""
        return len(self._seconds) // self._width

    @property
    def _width(self) -> int:
        return len(self._stages) + len(self._exits) + 1

    def add(self, prediction: Prediction, call_s: float) -> None:
        """Take over a frame of one image that was given no deadline.

        Args:
            prediction: Its answer.
            call_s: Seconds that the call took.

        Raises:
            BackendError: The backend does not tell how long a stage took.
        """
        trace = prediction.trace
        took = durations(trace)
        if len(self._precisions) < len(self._stages):
            self._precisions.update((run.stage, run.precision) for run in trace.stages)
        self._seconds.extend(took.get(name, math.nan) for name in self._stages)
        decided = deciding_seconds(self._plan, trace)
        self._seconds.extend(decided + [math.nan] * (len(self._exits) - len(decided)))
        self._seconds.append(around_seconds(prediction, call_s))

    def cut(self, frames: int) -> None:
        """Forget what came after some frames."""
        del self._seconds[frames * self._width :]

    def finish(self, *, watts: Mapping[str, float] | None = None) -> LatencyTable:
        """The table, with `MOST_ROWS` rows evenly taken where there are more.

        Args:
            watts: Stage name -> mean power while it runs.

        Raises:
            ConfigError: There is no frame, or none reached some exit.
        """
        if not len(self):
            raise ConfigError("a latency table", got="no frame", expected="one or more")
        rows = np.array(self._seconds).reshape(-1, self._width)
        for name, column in zip(self._exits, rows[:, len(self._stages) :].T, strict=False):
            if np.isnan(column).all():
                raise ConfigError(f"a latency table: none of {len(rows)} frames reached {name!r}")
        self._move_what_stages_cost_the_rest(rows)
        taken = np.linspace(0, len(rows) - 1, min(len(rows), MOST_ROWS)).round().astype(np.intp)
        whole = np.maximum(0, _nearest(rows)[taken] * 1e6).round(2)
        stages, exits = len(self._stages), len(self._exits)
        return LatencyTable(
            stages=self._stages,
            precisions=tuple(self._precisions[name] for name in self._stages),
            exits=self._exits,
            stage_us=_tuples(whole[:, :stages]),
            decide_us=_tuples(whole[:, stages : stages + exits]),
            around_us=tuple(whole[:, -1].tolist()),
            watts=dict(watts or {}),
        )

    def _move_what_stages_cost_the_rest(self, rows: NDArray[np.float64]) -> None:
        """Make the last column one of frames that left at the first exit; see the module."""
        first = len(self._stages)
        around, left = rows[:, -1], (~np.isnan(rows[:, first:-1])).sum(axis=1) - 1
        seen = np.unique(left).tolist()
        medians = [float(np.median(around[left == position])) for position in seen]
        for position, (before, median) in zip(seen[1:], pairwise(medians), strict=True):
            stages = self._plan.steps[position].stages
            if stages:
                rows[:, self._stages.index(stages[0].name)] += max(0.0, median - before)
        around[left != seen[0]] = math.nan


def table_points(
    cascade: Cascade, metric: Metric, variants: Mapping[str, str]
) -> tuple[OperatingPoint, ...]:
    """Points for the frames of a table, in the order in which they take turns.

    A scheduler that was opened at one of them can switch to the others. The device must not be the
    one that decides.

    Args:
        cascade: The cascade.
        metric: The signal; judging takes longer by some than by others.
        variants: Stage name -> precision.

    Returns:
        One for each early exit, and behind each the one that goes to the last.
    """
    last = len(cascade.exits) - 1
    positions = [position for early in range(last) for position in (early, last)] or [last]
    point = OperatingPoint("all", metric=metric, variants=variants)
    points = {i: leave_at(point, tuple(range(last + 1)), i) for i in positions}
    return tuple(points[i] for i in positions)


def merge(tables: Sequence[LatencyTable]) -> LatencyTable:
    """One table of several that were measured in turn, each with its own precisions.

    Args:
        tables: One or more of the same exits and with the same number of rows. A column that
            several have, decisions, the rest and watts come from the first that has them.

    Raises:
        ConfigError: They don't fit together.
    """
    first, *others = tables
    columns = {key: i for i, key in enumerate(zip(first.stages, first.precisions, strict=True))}
    times = [np.array(first.stage_us).reshape(len(first.around_us), -1)]
    keys, watts = list(columns), dict(first.watts)
    for other in others:
        if (other.exits, len(other.around_us)) != (first.exits, len(first.around_us)):
            raise ConfigError(
                "latency tables to merge",
                got=f"{len(other.around_us)} rows of {', '.join(other.exits)}",
                expected=f"{len(first.around_us)} rows of {', '.join(first.exits)}",
            )
        own = list(zip(other.stages, other.precisions, strict=True))
        new = [i for i, key in enumerate(own) if key not in keys]
        keys += [own[i] for i in new]
        times.append(np.array(other.stage_us)[:, new])
        watts = {**other.watts, **watts}
    return replace(
        first,
        stages=tuple(stage for stage, _ in keys),
        precisions=tuple(precision for _, precision in keys),
        stage_us=_tuples(np.concatenate(times, axis=1)),
        watts=watts,
    )


def _nearest(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each NaN replaced by the value of its column in the nearest row that has one."""
    filled: NDArray[np.float64] = rows.copy()
    places = np.arange(len(rows))
    for column in filled.T:
        known = np.flatnonzero(~np.isnan(column))
        if len(known) == len(rows):
            continue
        after = np.searchsorted(known, places).clip(0, len(known) - 1)
        before = (after - 1).clip(0)
        nearer = np.abs(known[before] - places) <= np.abs(known[after] - places)
        column[:] = column[known[np.where(nearer, before, after)]]
    return filled


def _tuples(values: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, values.tolist()))
