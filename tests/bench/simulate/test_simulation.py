"""A simulation is arithmetic on a table and on where the scheduler would let samples leave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.result import LatencyTable
from bench.simulate.simulation import (
    Outcome,
    Simulated,
    base_point,
    check_table,
    replay,
    simulate,
    simulated_points,
)
from calib.tables import PredictionTable
from edge_runtime import Bundle, ConfigError, OperatingPoint, load
from tests.bench.studies.bundles import layered_bundle, layered_images
from tests.toys import toy_bundle, toy_images

STAGES = ("preprocess", "saver", "segment1", "head1", "segment2", "head2")
EXITS = ("saver", "middle", "final")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return toy_bundle(tmp_path_factory.mktemp("simulation") / "toy.bundle")


@pytest.fixture(scope="module")
def predictions(bundle: Bundle) -> PredictionTable:
    return collected(bundle, toy_images(60), np.arange(60) % 4)


def collected(bundle: Bundle, images: np.ndarray, labels: np.ndarray) -> PredictionTable:
    point = OperatingPoint.all_exits(bundle.cascade)
    with load(bundle, operating_point=point, image_size=images.shape[1:3]) as scheduler:
        logits = [scheduler.logits(image[None]) for image in images]
    names = [exit_.name for exit_ in bundle.cascade.exits]
    found = {name: np.concatenate([one[name] for one in logits]) for name in names}
    return PredictionTable(bundle.cascade, found, labels)


def table(rows: int = 400, **changes: Any) -> LatencyTable:
    rng = np.random.default_rng(0)
    made = LatencyTable(
        stages=STAGES,
        precisions=("fp32",) * len(STAGES),
        exits=EXITS,
        stage_us=tuple(map(tuple, rng.gamma(9, 10, (rows, len(STAGES))).tolist())),
        decide_us=tuple(map(tuple, rng.gamma(9, 1, (rows, 3)).tolist())),
        around_us=tuple(rng.gamma(9, 2, rows).tolist()),
    )
    return replace(made, **changes)


POINT = OperatingPoint("threshold", thresholds={"saver": 0.5, "middle": 0.4})

EARLY = ("exit_1", "exit_2", "exit_4")
RULES = [
    OperatingPoint("threshold", thresholds=dict.fromkeys(EARLY, 0.8)),
    OperatingPoint(
        "temperature",
        metric="entropy",
        thresholds={"exit_1": -0.2, "exit_4": -0.4},
        temperatures={"exit_1": 0.5, "exit_4": 2.0},
    ),
    OperatingPoint("patience", policy="patience", patience=1),
    OperatingPoint(
        "patient and confident",
        policy="patient_and_confident",
        metric="softmax_margin",
        thresholds=dict.fromkeys(EARLY, 0.6),
        patience=2,
    ),
    base_point({}),
]


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, PredictionTable]:
    bundle = layered_bundle(tmp_path_factory.mktemp("layered") / "a.bundle")
    images, labels = layered_images(80)
    return bundle, collected(bundle, images, labels)


@pytest.mark.parametrize("point", RULES, ids=lambda point: point.name)
def test_samples_leave_where_the_scheduler_lets_them(
    layered: tuple[Bundle, PredictionTable], point: OperatingPoint
) -> None:
    bundle, predictions = layered
    images, _ = layered_images(80)
    with load(bundle, operating_point=point) as scheduler:
        answers = [scheduler.classify(image[None])[0] for image in images]
    outcome = replay(predictions, point)
    names = [exit_.name for exit_ in bundle.cascade.exits]
    assert [names[at] for at in outcome.at] == [answer.exit for answer in answers]
    labels = np.array([answer.label for answer in answers])
    assert outcome.right.tolist() == (labels == predictions.labels).tolist()
    if point.name != "base":
        assert len(set(outcome.at.tolist())) > 1


def one(bundle: Bundle, counts: tuple[int, ...], latency: LatencyTable, **more: Any) -> Simulated:
    at = np.repeat(np.arange(3), counts)
    outcome = Outcome(at, np.arange(len(at)) % 4 != 0)
    return simulate(latency, bundle, POINT, outcome, **more)


def test_latency_is_the_mixture_over_rows_and_exits(bundle: Bundle) -> None:
    latency = table()
    stage, decide = np.array(latency.stage_us), np.array(latency.decide_us)
    around = np.array(latency.around_us)
    saver = (around + stage[:, :2].sum(axis=1) + decide[:, 0]) / 1e6
    middle = saver + (stage[:, 2:4].sum(axis=1) + decide[:, 1]) / 1e6
    final = middle + (stage[:, 4:].sum(axis=1) + decide[:, 2]) / 1e6
    found = one(bundle, (240, 120, 40), latency, deadline_s=300e-6)
    every = np.concatenate([np.tile(saver, 6), np.tile(middle, 3), final])
    assert found.latency.mean == pytest.approx(every.mean())
    assert found.latency.max == pytest.approx(final.max())
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        expected = np.quantile(every, q, method="inverted_cdf")
        assert getattr(found.latency, name) == pytest.approx(expected)
    assert found.late == pytest.approx((every > 300e-6).mean())
    assert [exit_.share for exit_ in found.exits] == [0.6, 0.3, 0.1]
    assert found.exits[1].seconds == pytest.approx(middle.mean())
    assert (found.accuracy, found.early) == (0.75, 0.9)


def test_an_exit_where_nobody_leaves_adds_nothing_to_percentiles(bundle: Bundle) -> None:
    slow = tuple((1.0,) * 5 + (9e6,) for _ in range(400))
    assert one(bundle, (200, 200, 0), table(stage_us=slow)).latency.max < 1


def test_stages_that_the_point_prunes_cost_nothing(bundle: Bundle) -> None:
    latency = table()
    outcome = Outcome(np.full(9, 2), np.ones(9, bool))
    found = simulate(latency, bundle, base_point({}), outcome)
    rows = np.array(latency.stage_us)[:, [0, 2, 4, 5]].sum(axis=1) + latency.around_us
    expected = (rows + np.array(latency.decide_us)[:, 2]).mean() / 1e6
    assert found.latency.mean == pytest.approx(expected)


def test_percentiles_need_rows_and_samples(bundle: Bundle) -> None:
    assert one(bundle, (240, 120, 40), table(298)).latency.p99 is None
    few = one(bundle, (100, 20, 10), table()).latency
    assert (few.count, few.p99) == (130, None) and few.p90 is not None


def test_energy_is_power_times_time_and_unknown_where_a_stage_has_none(bundle: Bundle) -> None:
    watts = dict(zip(STAGES, (2.0, 4.0, 6.0, 8.0, 10.0, 12.0), strict=True))
    flat = table(
        stage_us=((100.0,) * 6,) * 300, decide_us=((10.0,) * 3,) * 300, around_us=(20.0,) * 300
    )
    assert one(bundle, (1, 1, 0), flat).joules is None
    found = one(bundle, (1, 1, 0), replace(flat, watts=watts))
    saver = 100e-6 * (2 + 4) + 7 * 30e-6
    assert found.exits[0].joules == pytest.approx(saver)
    assert found.joules == pytest.approx(saver + (100e-6 * (6 + 8) + 7 * 10e-6) / 2)
    assert one(bundle, (1, 1, 0), replace(flat, watts={"saver": 2.0})).joules is None


def test_points_of_the_bundle_are_simulated_and_what_is_not_possible_is_left_out(
    tmp_path: Path, predictions: PredictionTable
) -> None:
    bundle = toy_bundle(tmp_path / "toy.bundle")
    bundle.write_operating_point(replace(POINT, bundle=bundle.hash))
    (bundle.path / "operating_points" / "broken.json").write_text("{")
    found = simulated_points(bundle, table(), predictions, {})
    assert [point.name for point in found] == ["base", "threshold"]
    assert found[0].seconds > found[1].seconds
    assert found[1].accuracy == replay(predictions, POINT).right.mean()
    no_head = table(stages=(*STAGES[:3], "other", *STAGES[4:]))
    assert [p.name for p in simulated_points(bundle, no_head, predictions, {})] == ["base"]


def test_a_table_that_does_not_fit_is_refused(bundle: Bundle) -> None:
    with pytest.raises(
        ConfigError, match=r"times of stage 'head1': got int8, expected fp32.*bench"
    ):
        one(bundle, (1, 1, 1), table(precisions=("fp32",) * 3 + ("int8",) + ("fp32",) * 2))
    path = Path("orin.json")
    for changes, message in (
        ({"exits": ("saver", "other", "final")}, "got saver, other, final, expected saver, middle"),
        ({"stage_us": ((0.0,) * 6,) * 400}, "no stage takes any time"),
        ({"watts": {"saver": -1.0}}, "watts of stage 'saver': got -1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_table(table(**changes), bundle.cascade, path)


def test_no_sample_is_refused(predictions: PredictionTable) -> None:
    logits = {name: values[:0] for name, values in predictions.logits.items()}
    nothing = replace(predictions, logits=logits, labels=predictions.labels[:0])
    with pytest.raises(ConfigError, match="the data has no sample"):
        replay(nothing, POINT)
