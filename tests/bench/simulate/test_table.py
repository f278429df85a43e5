"""A latency table holds what frames took, wherever they left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from bench.simulate.table import MOST_ROWS, TableRows, merge, table_points
from edge_runtime import BackendError, ConfigError, load
from edge_runtime.confidence import METRICS, Metric
from edge_runtime.prediction import ExitRun, Prediction, StageRun, Trace
from tests.bench.results import latency_table
from tests.toys import toy_bundle, toy_cascade, toy_images

CASCADE = toy_cascade()
PLAN = CASCADE.plan(range(3))
US = 1e-6


def frame(exits: int, stage_us: float, decide_us: float, around_us: float) -> tuple:
    """A frame through some exits, and the seconds of its call: half of the rest comes before."""
    at, stages, decisions = around_us / 2 * US, [], []
    for step in PLAN.steps[:exits]:
        for stage in step.stages:
            stages.append(StageRun(stage.name, "fp32", at, stage_us * US, 1))
            at += stage_us * US
        at += decide_us * US
        decisions.append(ExitRun(step.exit.name, 0, 0.9, 0.9, at))
    trace = Trace("made up", "host", "last", tuple(stages), tuple(decisions))
    name = decisions[-1].exit
    prediction = Prediction(0, "north", 0.9, name, at, False, lambda: trace)
    return prediction, at + around_us / 2 * US


def rows_of(frames: Sequence[tuple]) -> TableRows:
    rows = TableRows(PLAN)
    for prediction, seconds in frames:
        rows.add(prediction, seconds)
    return rows


def test_a_row_has_the_frame_s_own_times_and_the_nearest_ones_of_what_it_did_not_run() -> None:
    shallow, deep = (frame(1, 10, 1, 5), frame(1, 11, 2, 5)), (frame(3, 20, 3, 5),)
    rows = rows_of([*deep, *shallow, frame(3, 30, 4, 5)])
    found = rows.finish(watts={"saver": 3.0})
    assert found.stages == tuple(stage.name for stage in PLAN.stages)
    assert set(found.precisions) == {"fp32"} and found.exits == ("saver", "middle", "final")
    assert np.allclose(np.array(found.stage_us)[:, :2], [[20] * 2, [10] * 2, [11] * 2, [30] * 2])
    assert np.allclose(np.array(found.stage_us)[:, 2:], [[20] * 4, [20] * 4, [30] * 4, [30] * 4])
    assert np.allclose(found.decide_us, [[3] * 3, [1, 3, 3], [2, 4, 4], [4] * 3])
    assert np.allclose(found.around_us, 5) and found.watts == {"saver": 3.0}


def test_what_the_rest_takes_more_behind_later_exits_belongs_to_their_first_stage() -> None:
    found = rows_of([frame(1, 10, 1, 5), frame(2, 10, 1, 9), frame(3, 10, 1, 12)] * 5).finish()
    assert np.allclose(found.around_us, 5)
    assert np.allclose(found.stage_us, [[10, 10, 14, 10, 13, 10]] * 15)
    total = np.sum(found.stage_us, axis=1) + np.sum(found.decide_us, axis=1) + found.around_us
    assert total.mean() * US == pytest.approx(frame(3, 10, 1, 12)[1])


def test_a_long_run_is_thinned_evenly() -> None:
    rows = rows_of([frame(3, 10 + i, 1, 5) for i in range(MOST_ROWS + 500)])
    first = np.array(rows.finish().stage_us)[:, 0]
    assert len(first) == MOST_ROWS and (first[0], first[-1]) == (10, 10 + MOST_ROWS + 499)
    assert set(np.diff(first)) == {1, 2}
    rows.cut(7)
    assert len(rows) == 7 and len(rows.finish().around_us) == 7


def test_a_table_that_would_lack_times_is_refused() -> None:
    with pytest.raises(ConfigError, match="a latency table: got no frame"):
        TableRows(PLAN).finish()
    with pytest.raises(ConfigError, match="none of 2 frames reached 'final'"):
        rows_of([frame(1, 10, 1, 5), frame(2, 10, 1, 5)]).finish()
    prediction, seconds = frame(1, math.nan, 1, 5)
    with pytest.raises(BackendError, match="does not tell how long a stage took"):
        TableRows(PLAN).add(prediction, seconds)


@pytest.mark.parametrize("metric", METRICS)
def test_frames_of_a_table_leave_at_every_exit_in_turn_whatever_they_show(
    tmp_path, metric: Metric
) -> None:
    bundle = toy_bundle(tmp_path / "toy.bundle")
    points = table_points(bundle.cascade, metric, {})
    found = []
    with load(bundle, operating_point=points[-1], image_size=(5, 7)) as scheduler:
        rows = TableRows(scheduler.plan)
        for image in toy_images(5):
            for point in points:
                scheduler.switch(point)
                (prediction,) = scheduler.classify(image[None])
                rows.add(prediction, prediction.latency_s)
                found.append(prediction.exit)
    assert found == ["saver", "final", "middle", "final"] * 5
    table = rows.finish()
    assert np.array(table.stage_us).shape == (20, 6) and np.min(table.stage_us) > 0


def test_a_cascade_with_one_exit_has_one_point() -> None:
    alone = replace(CASCADE, exits=CASCADE.exits[-1:])
    (point,) = table_points(alone, "entropy", {"saver": "int8"})
    assert point.policy_for(alone).evaluated(1) == (0,) and point.variants == {"saver": "int8"}


def test_merged_tables_have_the_columns_of_all() -> None:
    first = latency_table()
    other = replace(
        latency_table(slower=2), precisions=("fp32", "int8", "int8", "fp32", "int8"), watts={"a": 1}
    )
    found = merge([first, other])
    assert found.stages == (*first.stages, "saver", "segment1", "segment2")
    assert found.precisions == ("fp32",) * 5 + ("int8",) * 3
    assert np.array_equal(np.array(found.stage_us)[:, 5:], np.array(other.stage_us)[:, [1, 2, 4]])
    assert found.around_us == first.around_us and found.watts == {**first.watts, "a": 1}
    with pytest.raises(ConfigError, match=r"got 100 rows of saver.*expected 200 rows"):
        merge([first, latency_table(frames=100)])
