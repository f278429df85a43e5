"""Fitted gates on a population of which it is known what each sample needs."""

import itertools
import math
import signal
from dataclasses import fields, replace

import numpy as np
import pytest

from calib.quee.baselines import (
    route_by_threshold,
    route_fixed,
    threshold_curve,
    thresholds,
)
from calib.quee.fit import FitOptions, fit_gate, fit_one_step
from calib.quee.routing import NEAR_TIE, route_table
from calib.quee.sweep import Resampling, curve, sweep
from calib.quee.to_onnx import to_onnx
from edge_runtime.backends.onnxrt import new_session
from edge_runtime.console import Console
from edge_runtime.errors import CalibrationError, ConfigError
from edge_runtime.gate import Gate
from edge_runtime.gate_model import ErrorPredictor, GateModel, input_features
from edge_runtime.paths import Paths
from tests.calib.quee.populations import DEEP, EASY, PATHS, PRECISE, population
from tests.edge_runtime.bundles import refused

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

OPTIONS = FitOptions(
    clusters=30, hidden=16, max_epochs=120, patience=10, batch=64, learning_rate=1e-2
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def fitted() -> GateModel:
    return fit_gate(population(600, 0)[0], population(300, 1)[0], OPTIONS, console=Console())


@pytest.fixture(scope="module")
def test_data():
    return population(400, 2)


def gate(model: GateModel, table, trade_off: float, column: str = "bitops") -> Gate:
    return Gate(model, table.path_costs(column), trade_off)


class TestWhatIsLearnt:
    def test_each_kind_of_sample_takes_the_cheapest_path_that_is_right_about_it(
        self, fitted, test_data
    ):
        table, kinds = test_data
        routed = route_table(gate(fitted, table, 0.5), table)
        for kind, path in ((EASY, (0,)), (DEEP, (0, 1, 1)), (PRECISE, (0, 0, 0))):
            taken = routed.path[kinds == kind] == PATHS.index(path)
            assert taken.mean() > 0.95, (kind, routed.shares)
        assert routed.accuracy > 0.99
        assert routed.cost("bitops") < 0.7
        assert set(routed.costs()) == {"bitops", "exits"}

    def test_the_predictors_are_far_better_than_constants(self, fitted):
        for figures in fitted.figures["exits"].values():
            assert figures["validation_loss"] < 0.1 * figures["constant_loss"]
            assert 0 < figures["best_epoch"] <= figures["epochs"] <= 120
        assert fitted.figures["training_samples"] == 600
        assert fitted.bundle == "b" * 64

    def test_without_a_price_errors_alone_count_and_a_high_one_leaves_at_once(
        self, fitted, test_data
    ):
        table, _ = test_data
        assert route_table(gate(fitted, table, 0.0), table).accuracy > 0.99
        cheap = route_table(gate(fitted, table, 100.0), table)
        assert (cheap.path == PATHS.index((0,))).all()
        assert cheap.accuracy == table.right[:, PATHS.index((0,))].mean()

    def test_a_higher_lambda_costs_no_more(self, fitted):
        table, _ = population(600, 0)
        costs = [
            route_table(gate(fitted, table, value), table).cost("bitops")
            for value in (0.0, 0.1, 0.2, 0.5, 1.0, 1.5, 5.0)
        ]
        # Up to samples that change their mind under way.
        assert all(a >= b - 0.01 for a, b in itertools.pairwise(costs)), costs
        assert costs[0] > costs[-1] + 0.2

    def test_other_costs_need_no_other_gate(self, fitted, test_data):
        """Where precision costs nothing, deep samples need not go down in it."""
        table, kinds = test_data
        routed = route_table(gate(fitted, table, 0.5, "exits"), table)
        assert (routed.path[kinds == EASY] == PATHS.index((0,))).all()
        assert routed.accuracy > 0.99

    def test_the_order_of_paths_changes_nothing(self, fitted, test_data):
        table, _ = test_data
        turned = table.of(Paths(PATHS.levels, PATHS.exits, PATHS.paths[::-1]))
        straight = route_table(gate(fitted, table, 0.2), table)
        other = route_table(gate(fitted, table, 0.2), turned)
        np.testing.assert_array_equal(len(PATHS) - 1 - other.path, straight.path)

    def test_the_same_seed_gives_the_same_gate_another_one_another(self):
        few = replace(OPTIONS, max_epochs=2)
        train, val = population(100, 0)[0], population(120, 1)[0]
        one, two = (fit_gate(train, val, few, console=Console()) for _ in range(2))
        other = fit_gate(train, val, replace(few, seed=1), console=Console())
        for part in fields(ErrorPredictor):
            a, b, c = (getattr(m.predictors[1], part.name) for m in (one, two, other))
            np.testing.assert_array_equal(a, b)
            assert (a != c).any()
        assert one.figures == two.figures


@pytest.mark.parametrize("trade_off", [0.0, 0.2])
def test_samples_are_routed_in_the_table_as_one_by_one(fitted, test_data, trade_off):
    table, _ = test_data
    made = gate(fitted, table, trade_off)
    routed = route_table(made, table)
    assert NEAR_TIE == 1e-6
    # Errors near 0 are nearly equal; with a price they are not.
    assert routed.near_ties < (4 if trade_off else len(table) / 4)
    for row in range(len(table)):
        path, before = (0,), None
        while True:
            now = table.probabilities[row, PATHS.index(path)]
            step = made.route(len(path) - 1, path, now, before)
            if step < 0:
                break
            path, before = (*path, step), now
        assert routed.near[row] or PATHS.paths[routed.path[row]] == path


def test_equal_values_are_counted_as_near_ties(fitted, test_data):
    table, _ = test_data
    blind = [
        ErrorPredictor(p.features * 0, p.codes * 0, p.bias * 0, p.output, p.output_bias)
        for p in fitted.predictors
    ]
    made = replace(fitted, predictors=tuple(blind))
    assert route_table(gate(made, table, 0.0), table).near_ties == len(table)
    assert route_table(gate(made, table, 0.1), table).near_ties == 0


class TestOneStep:
    def test_it_learns_the_same_where_the_task_is_easy(self, test_data):
        table, _ = test_data
        model = fit_one_step(
            population(600, 0)[0],
            population(300, 1)[0],
            OPTIONS,
            column="bitops",
            trade_off=0.2,
            console=Console(),
        )
        assert (model.kind, model.trade_off) == ("one_step", 0.2)
        assert model.figures["column"] == "bitops"
        routed = route_table(gate(model, table, 0.2), table)
        assert routed.accuracy > 0.97
        assert routed.cost("bitops") < 0.7

    def test_a_lambda_or_a_column_that_is_none(self):
        train, val = population(60, 0)[0], population(120, 1)[0]
        with refused(ConfigError, "lambda: got nan"):
            fit_one_step(
                train, val, OPTIONS, column="bitops", trade_off=math.nan, console=Console()
            )
        with refused(ConfigError, "no cost 'seconds'"):
            fit_one_step(train, val, OPTIONS, column="seconds", trade_off=0.1, console=Console())


class TestInterrupted:
    def test_ctrl_c_keeps_the_best_so_far(self, monkeypatch, capsys):
        from calib.quee import fit

        real, calls = fit._Run.epoch, []

        def epoch(run):
            calls.append(run)
            if len(calls) == 6:
                signal.raise_signal(signal.SIGINT)
            real(run)

        monkeypatch.setattr(fit._Run, "epoch", epoch)
        model = fit_gate(population(100, 0)[0], population(120, 1)[0], OPTIONS, console=Console())
        assert model.figures["interrupted"] is True
        assert [e["epochs"] for e in model.figures["exits"].values()] == [3, 2]
        assert "interrupted: the gate keeps its best so far" in capsys.readouterr().err

    def test_before_anything_was_learnt_there_is_no_gate(self, monkeypatch):
        from calib.quee import fit

        monkeypatch.setattr(fit._Run, "epoch", lambda run: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            fit_gate(population(60, 0)[0], population(120, 1)[0], OPTIONS, console=Console())


def test_at_one_precision_a_gate_decides_about_exits_only() -> None:
    train, val = (population(400, seed)[0] for seed in (0, 1))
    alone = Paths(("fp32",), PATHS.exits, ((0,), (0, 0), (0, 0, 0)))
    rows = [PATHS.index(path) for path in alone.paths]
    single = [
        replace(t, paths=alone, probabilities=t.probabilities[:, rows], costs={})
        for t in (train, val)
    ]
    model = fit_gate(*single, OPTIONS, console=Console())
    assert [predictor.hidden for predictor in model.predictors] == [OPTIONS.hidden] * 2


class TestRefused:
    def test_tables_that_do_not_belong_together(self):
        train, val = (population(120, seed)[0] for seed in (0, 1))
        with refused(ConfigError, "the validation table is of another bundle: got none"):
            fit_gate(train, replace(val, bundle=""), OPTIONS, console=Console())
        fewer = val.of(Paths(PATHS.levels, PATHS.exits, ((0,), (0, 0), (0, 0, 0))))
        with refused(ConfigError, "got 3 paths, 4 classes, expected the 6 paths"):
            fit_gate(train, fewer, OPTIONS, console=Console())

    def test_too_few_samples_for_the_clusters(self):
        train, val = population(60, 0)[0], population(119, 1)[0]
        with refused(CalibrationError, "for 30 clusters: got 119, expected >= 120"):
            fit_gate(train, val, OPTIONS, console=Console())

    @pytest.mark.parametrize(
        "change",
        [{"clusters": 0}, {"hidden": 0}, {"patience": 0}, {"learning_rate": 0}, {"seed": -1}],
    )
    def test_options(self, change):
        with refused(ConfigError, f"got {next(iter(change.values()))}"):
            FitOptions(**change)

    def test_a_table_without_a_path_of_the_gate(self, fitted, test_data):
        table, _ = test_data
        made = gate(fitted, table, 0.1)
        few = table.of(Paths(PATHS.levels, PATHS.exits, ((0,), (0, 0), (0, 0, 0))))
        with refused(ConfigError, "the path 'fp32 -> int8' is not known"):
            route_table(made, few)


@pytest.mark.parametrize("kind", ["paths", "one_step"])
def test_the_onnx_model_says_what_the_predictor_says(fitted, test_data, kind):
    table, _ = test_data
    model = replace(fitted, kind=kind, trade_off=None if kind == "paths" else 0.1)
    before, now = table.probabilities[:9, 0], table.probabilities[:9, PATHS.index((0, 1))]
    features, codes = input_features(now, before), PATHS.codes(PATHS.paths)
    session = new_session(to_onnx(model, 1))
    (found,) = session.run(None, {"features": features, "codes": codes})
    predictor = model.predictors[1]
    said = predictor.errors if kind == "paths" else predictor.scores
    np.testing.assert_allclose(found, said(features, codes), atol=2e-6, rtol=1e-5)
    with refused(ConfigError, "exit with a predictor: got 2, expected 0..1"):
        to_onnx(model, 2)


class TestBaselines:
    def test_thresholds_at_one_level(self, test_data):
        table, kinds = test_data
        routed = route_by_threshold(table, 0.8)
        # Nothing but what is understood is as sure as 0.9 here.
        assert (routed.path[kinds == EASY] == PATHS.index((0,))).mean() > 0.98
        assert (routed.path[kinds != EASY] == PATHS.index((0, 0, 0))).all()
        assert route_by_threshold(table, 0).cost("exits") == 1
        assert route_by_threshold(table, 2).cost("exits") == 3
        lower = route_fixed(table, level=1)
        assert (lower.path == PATHS.index((0, 1, 1))).all()
        assert lower.accuracy == (kinds != PRECISE).mean()

    def test_a_curve_goes_from_the_first_exit_to_the_last(self, test_data):
        table, _ = test_data
        values = thresholds(table, 9)
        assert list(values) == sorted(set(values))
        costs = [routed.cost("exits") for routed in threshold_curve(table, values)]
        assert costs == sorted(costs)
        assert (costs[0], costs[-1]) == (1, 3)

    def test_what_they_refuse(self, test_data):
        table, _ = test_data
        with refused(ConfigError, "level: got 2, expected 0..1"):
            route_fixed(table, level=2)
        with refused(ConfigError, "threshold: got nan"):
            route_by_threshold(table, math.nan)
        with refused(ConfigError, "thresholds of a curve: got 1"):
            thresholds(table, 1)


class TestSweep:
    def test_a_sweep_has_the_figures_of_each_lambda_with_intervals(self, fitted, test_data):
        table, _ = test_data
        how = Resampling(draws=300)
        points = sweep(fitted, table, [0.0, 0.2, 50.0], column="bitops", resampling=how)
        for point, value in zip(points, [0.0, 0.2, 50.0], strict=True):
            routed = route_table(gate(fitted, table, value), table)
            assert point.accuracy.mean == pytest.approx(routed.accuracy)
            assert point.cost.mean == pytest.approx(routed.cost("bitops"))
            assert point.accuracy.low <= point.accuracy.mean <= point.accuracy.high
            assert len(point.cost.parts) == 10
            assert np.mean(point.cost.parts) == pytest.approx(point.cost.mean)
        assert points == sweep(fitted, table, [0.0, 0.2, 50.0], column="bitops", resampling=how)

    def test_an_interval_is_that_of_a_share(self, test_data):
        """Of the first exit alone, whose accuracy is a share that the normal law knows."""
        table, _ = test_data
        (point,) = curve(
            [0], [route_by_threshold(table, 0)], column="exits", resampling=Resampling()
        )
        share, half = point.accuracy.mean, (point.accuracy.high - point.accuracy.low) / 2
        assert half == pytest.approx(1.96 * math.sqrt(share * (1 - share) / len(table)), rel=0.1)
        assert (point.cost.low, point.cost.high) == (1, 1)

    def test_what_it_refuses(self, fitted, test_data):
        table, _ = test_data
        how = Resampling()
        with refused(ConfigError, "points of a curve: got 0 settings, expected >= 1"):
            sweep(fitted, table, [], column="bitops", resampling=how)
        with refused(ConfigError, "lambda: got -1"):
            sweep(fitted, table, [-1], column="bitops", resampling=how)
        with refused(CalibrationError, "samples for 10 splits: got 9"):
            sweep(fitted, table.samples(range(9)), [0.1], column="bitops", resampling=how)
        with refused(ConfigError, "splits and draws: got 1 and 2000"):
            Resampling(splits=1)
