"""A gate that knows which samples are hard, against thresholds that don't."""

from dataclasses import replace

import numpy as np
import pytest

from calib.quee.paths import valid_paths
from calib.quee.study import (
    GATE,
    ONE_STEP,
    AtAccuracy,
    Interval,
    Study,
    cost_at_accuracy,
    make_study,
    verdict,
)
from calib.quee.sweep import Resampling
from calib.quee.table import PathTable, StageWork, bit_operations
from edge_runtime.errors import CalibrationError, ConfigError
from edge_runtime.gate_model import ErrorPredictor, GateModel
from edge_runtime.paths import Paths
from tests.calib.quee.populations import CLASSES, EXITS, PATHS, population
from tests.edge_runtime.bundles import refused

HOW = Resampling(draws=300)
COLUMNS = ("bitops", "exits")
BASE = {
    "fp32": {"accuracy": 1.0, "bitops": 1.0, "exits": 3.0},
    "int8": {"accuracy": 2 / 3, "bitops": 0.25, "exits": 3.0},
}
#: BitOPS of the dearest path: 100 MACs of 32 bits in each block.
UNIT = 3 * 100.0 * 32


def knowing_gate() -> GateModel:
    """Knows of each kind of sample which path is right, from the largest probability alone.

    That is about 0.9, 0.7 and 0.5 for easy, deep and precise samples where the path is wrong. One
    hidden unit is positive for a deep or precise sample on a path that leaves before the last exit,
    one for a precise sample on a path that ends at less than the highest precision.
    """
    features = np.zeros((2 * CLASSES + 4, 2), np.float32)
    features[-1] = -100
    codes = np.zeros((len(EXITS) + 1, 2), np.float32)
    codes[len(EXITS) - 1] = (-200, -20)
    predictor = ErrorPredictor(
        features,
        codes,
        np.array([80, 65], np.float32),
        np.ones(2, np.float32),
        np.array([-5], np.float32),
    )
    return GateModel("b" * 64, CLASSES, PATHS, (predictor, predictor))


def all_int8(samples: int, seed: int) -> PathTable:
    """The samples of `population`, with every block at int8: no path is right about all."""
    table, _ = population(samples, seed)
    ends = [table.paths.index((0, *[1] * e)) for e in range(3)]
    paths = Paths(("int8",), EXITS, valid_paths(1, 3))
    costs = {
        "bitops": bit_operations(paths, [[StageWork(100.0, (8,))]] * 3, unit=UNIT),
        "exits": np.array([1.0, 2.0, 3.0]),
    }
    return replace(table, paths=paths, probabilities=table.probabilities[:, ends], costs=costs)


def both(samples: int, seed: int) -> dict[str, PathTable]:
    return {"own": population(samples, seed)[0], "all int8": all_int8(samples, seed)}


def a_study(**changed) -> Study:
    arguments = {"base": BASE, "columns": COLUMNS, "trade_offs": (0.0, 0.1, 0.5, 2.0)}
    arguments |= {"resampling": HOW, **changed}
    gate = arguments.pop("gate", None) or knowing_gate()
    tables = arguments.pop("tables", None) or both(400, 2)
    validation = arguments.pop("validation", None) or both(300, 1)
    return make_study(gate, tables, validation, **arguments)


@pytest.fixture(scope="module")
def made() -> Study:
    return a_study()


class TestCurves:
    def test_gate_reference_rivals_and_other_weighings(self, made):
        names = [curve.name for curve in made.columns[0].curves]
        assert names == [GATE, "thresholds, fp32", "thresholds, all int8", "gate, weighing exits"]
        assert made.columns[1].curves[3].name == "gate, weighing bitops"
        assert made.columns[0].reference.name == "thresholds, fp32"
        assert (made.samples, made.levels) == (400, ("fp32", "int8"))

    def test_points_are_those_of_their_samples(self, made):
        for column in made.columns:
            for curve in column.curves:
                np.testing.assert_allclose(
                    [point.accuracy.mean for point in curve.points], curve.right.mean(axis=0)
                )
                np.testing.assert_allclose(
                    [point.cost.mean for point in curve.points], curve.costs.mean(axis=0)
                )
                for point in curve.points:
                    assert sum(curve.leaving(point).values()) == pytest.approx(1)

    def test_a_table_of_the_highest_level_alone_makes_no_second_reference(self):
        def tables(samples, seed):
            of_int8 = all_int8(samples, seed)
            paths = replace(of_int8.paths, levels=("fp32",))
            return {**both(samples, seed), "all fp32": replace(of_int8, paths=paths)}

        names = [
            curve.name
            for curve in a_study(tables=tables(50, 2), validation=tables(50, 1)).columns[0].curves
        ]
        assert "thresholds, all fp32" not in names

    def test_a_one_step_gate_stands_in_the_column_it_was_fitted_for(self):
        ahead = [
            replace(knowing_gate(), kind="one_step", trade_off=value, figures={"column": "bitops"})
            for value in (0.5, 0.1)
        ]
        bitops, exits = a_study(one_step=ahead).columns
        found = next(curve for curve in bitops.curves if curve.name == ONE_STEP)
        assert [point.setting for point in found.points] == [0.1, 0.5]
        assert ONE_STEP not in [curve.name for curve in exits.curves]

    def test_calibration_errors_are_those_of_the_gates_own_table(self):
        pytest.importorskip("sklearn")
        made = a_study(clusters=(2, 10))
        assert [one.clusters for one in made.calibration] == [2, 10]
        assert all(len(one.paths) == len(PATHS) for one in made.calibration)


class TestCostAtAccuracy:
    def test_the_gate_is_cheaper_where_precision_counts(self, made):
        gate = made.columns[0].against["thresholds, fp32"]
        assert {one.verdict for one in gate} == {"cheaper"}
        # A third of the samples needs one block, one three of which two at int8, one all.
        for one in gate:
            assert one.accuracy == 1
            assert one.cost == pytest.approx((1 / 3 + 1 / 2 + 1) / 3, abs=0.05)
            assert one.ratio.low <= one.ratio.value <= one.ratio.high
            assert one.ratio.value == pytest.approx(11 / 14, abs=0.04)

    def test_and_not_where_only_the_exit_counts(self, made):
        gate = made.columns[1].against["thresholds, fp32"]
        assert {one.verdict for one in gate} == {"unclear"}

    def test_a_rival_that_is_never_as_accurate(self, made):
        rivals = made.columns[0].against["thresholds, all int8"]
        assert {one.verdict for one in rivals} == {"only one"}
        assert {one.ratio for one in rivals} == {None}
        rival = [one for one in made.columns[0].at_accuracy if one.curve == "thresholds, all int8"]
        assert {one.verdict for one in rival} == {"out of reach"}

    def test_thresholds_at_int8_win_where_their_accuracy_is_enough(self):
        # At lambda 1.5 the gate has given up the precise samples, as int8 has to.
        made = a_study(trade_offs=(0.0, 1.5), drops=(0.35,))
        (rival,) = made.columns[0].against["thresholds, all int8"]
        assert rival.setting == 1.5
        assert rival.verdict == "dearer"
        assert rival.ratio.low > 1

    def test_a_curve_against_itself_is_neither_cheaper_nor_dearer(self, made):
        reference = made.columns[0].reference
        (found,) = cost_at_accuracy([reference], reference, [0.9], HOW)
        assert found.ratio == Interval(1, 1, 1)
        assert found.gain == Interval(0, 0, 0)
        assert found.verdict == "unclear"

    def test_paired_resamples_are_narrower_than_the_costs_own_intervals(self, made):
        one = made.columns[0].against["thresholds, fp32"][0]
        gate = made.columns[0].curves[0]
        cost = gate.points[gate.cheapest(one.target)].cost
        assert (one.ratio.high - one.ratio.low) / one.ratio.value < (
            cost.high - cost.low
        ) / one.cost

    @pytest.mark.parametrize(
        ("ratio", "gain", "expected"),
        [
            ((0.8, 0.7, 0.9), (0.0, -0.1, 0.1), "cheaper"),
            ((0.8, 0.7, 0.9), (-0.2, -0.3, -0.1), "unclear"),
            ((1.2, 1.1, 1.3), (0.0, -0.1, 0.1), "dearer"),
            ((1.2, 1.1, 1.3), (0.2, 0.1, 0.3), "unclear"),
            ((0.9, 0.8, 1.1), (0.0, -0.1, 0.1), "unclear"),
        ],
    )
    def test_cheaper_but_surely_less_accurate_is_not_clear(self, ratio, gain, expected):
        one = AtAccuracy("a", "b", 0.9, 0.1, 0.9, 1.0, Interval(*ratio), Interval(*gain))
        assert one.verdict == expected

    def test_curves_of_other_samples_are_refused(self, made):
        fewer = a_study(tables=both(50, 2)).columns[0].curves[0]
        with refused(CalibrationError, "different samples: got [50, 400]"):
            cost_at_accuracy([fewer], made.columns[0].reference, [0.9], HOW)


class TestVerdict:
    def test_it_says_for_each_cost_and_rival_what_the_intervals_say(self, made):
        said = verdict(made)
        assert said[0].startswith("bitops: the gate is cheaper than thresholds, fp32 at 100.00 % (")
        assert said[1].startswith("bitops: thresholds, all int8 never reach 100.00 %, 99.50 %")
        assert said[2].startswith("bitops: where as accurate as fp32 without exits (100.00 %)")
        assert said[4].startswith("exits: the gate is neither clearly cheaper")

    def test_fixed_precision_that_no_gate_reaches(self):
        tables = both(400, 2)
        labels = tables["own"].labels.copy()
        labels[0] = (labels[0] + 2) % CLASSES
        tables = {name: replace(table, labels=labels) for name, table in tables.items()}
        said = verdict(a_study(tables=tables))
        assert "bitops: the gate never gets as accurate as fp32 without exits (100.00 %)" in said


class TestRefused:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"trade_offs": ()}, "values of lambda: got none"),
            ({"trade_offs": (float("nan"),)}, "lambda: got nan"),
            ({"trade_offs": (-0.1,)}, "lambda: got -0.1"),
            ({"columns": ("watts",)}, "the path table has no cost 'watts'"),
            ({"columns": ()}, "costs to show: got []"),
            ({"drops": (-0.1,)}, "drops of accuracy: got [-0.1]"),
            ({"base": {"fp32": {"accuracy": 1.0, "bitops": 1.0}}}, "'fp32' without exits has no"),
            ({"base": {"x": {"accuracy": 98.0, "bitops": 1.0}}}, "'accuracy' of the precision 'x'"),
            ({"validation": {"own": population(50, 1)[0]}}, "validation tables: got own, expected"),
            ({"one_step": (knowing_gate(),)}, "one-step gate: got kind 'paths'"),
            (
                {"gate": replace(knowing_gate(), kind="one_step", trade_off=0.1)},
                "kind of the gate: got one_step",
            ),
            ({"gate": replace(knowing_gate(), bundle="c" * 64)}, "fitted for another bundle"),
        ],
    )
    def test_what_does_not_fit(self, changed, message):
        with refused(ConfigError, message):
            a_study(**changed)

    def test_tables_of_other_samples(self):
        tables = {"own": population(400, 2)[0], "all int8": all_int8(400, 3)}
        with refused(CalibrationError, "'all int8' has other samples than 'own'"):
            a_study(tables=tables)

    def test_no_table_of_the_gates_own(self):
        only = {"all int8": all_int8(50, 1)}
        with refused(ConfigError, "tables of several levels, or of the gate's one: got none"):
            a_study(tables=only, validation=only)

    def test_too_few_samples_for_clusters(self):
        with refused(CalibrationError, "too few validation samples for 100 clusters"):
            a_study(clusters=(100,))
