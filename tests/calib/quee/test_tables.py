"""Paths, path tables, costs and targets: what they hold and what they refuse."""

import math
from dataclasses import replace

import numpy as np
import pytest

from calib.quee.paths import valid_paths
from calib.quee.table import PathTable, StageWork, bit_operations, sum_of_blocks
from calib.quee.targets import calibration_error, find_clusters, targets
from edge_runtime.errors import CalibrationError, ConfigError, ManifestError
from edge_runtime.paths import Paths
from tests.calib.quee.populations import PATHS, population
from tests.edge_runtime.bundles import refused


class TestValidPaths:
    def test_all_of_three_levels_and_three_exits(self):
        assert valid_paths(3, 3) == (
            (0,),
            *((0, b) for b in range(3)),
            *((0, b, c) for b in range(3) for c in range(b, 3)),
        )

    def test_above_most_they_are_drawn_with_the_dearest_and_every_beginning(self):
        drawn = valid_paths(4, 8, most=50, seed=1)
        assert len(drawn) == len(set(drawn)) == 50
        assert set(drawn) < set(valid_paths(4, 8, most=1000))
        Paths(("fp32", "fp16", "int8", "int4"), tuple("abcdefgh"), drawn)
        assert drawn == valid_paths(4, 8, most=50, seed=1)
        assert drawn != valid_paths(4, 8, most=50, seed=2)
        assert valid_paths(4, 8, most=8) == tuple((0,) * e for e in range(1, 9))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"levels": 0, "exits": 2}, "got 0 levels and 2 exits"),
            ({"levels": 2, "exits": 5, "most": 4}, "the most paths: got 4, expected >= 5"),
            ({"levels": 9, "exits": 60, "most": 100}, "expected <= 200000"),
        ],
    )
    def test_numbers_out_of_range(self, arguments, message):
        with refused(ConfigError, message):
            valid_paths(**arguments)


class TestTable:
    def test_a_table_comes_back_from_its_file(self, tmp_path):
        table, _ = population(20, 0)
        table.write(tmp_path / "t.npz")
        back = PathTable.read(tmp_path / "t.npz")
        assert (back.paths, back.bundle) == (table.paths, table.bundle)
        np.testing.assert_array_equal(back.probabilities, table.probabilities)
        np.testing.assert_array_equal(back.labels, table.labels)
        assert list(back.costs) == ["bitops", "exits"]
        np.testing.assert_array_equal(back.column("bitops"), table.column("bitops"))

    def test_some_samples_and_some_paths(self):
        table, _ = population(20, 0)
        few = table.samples([3, 1]).of(Paths(PATHS.levels, PATHS.exits, PATHS.paths[::-1]))
        np.testing.assert_array_equal(few.probabilities, table.probabilities[[3, 1]][:, ::-1])
        assert few.path_costs("bitops") == table.path_costs("bitops")
        np.testing.assert_array_equal(few.right, table.right[[3, 1]][:, ::-1])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: {"labels": t.labels[:-1]}, "got float32 (9, 6, 4), expected float32 (8, 6"),
            (lambda t: {"labels": t.labels + 4}, "expected int64, 0..3"),
            (lambda t: {"probabilities": t.probabilities.astype(float)}, "got float64"),
            (lambda t: {"probabilities": t.probabilities * 2}, "sample 0 on the path 'fp32'"),
            (lambda t: {"probabilities": t.probabilities * np.float32("nan")}, "a sum of nan"),
            (lambda t: {"costs": {"s": np.ones(5)}}, "cost 's' of a path table"),
            (lambda t: {"costs": {"s": -np.ones(6)}}, "cost 's' of the path 'fp32': got -1.0"),
        ],
    )
    def test_arrays_that_do_not_fit(self, change, message):
        table, _ = population(9, 0)
        with refused(CalibrationError, message):
            replace(table, **change(table))

    def test_a_column_that_is_not_there_names_the_nearest(self):
        table, _ = population(9, 0)
        with refused(ConfigError, "no cost 'bitop'", "Did you mean 'bitops'?"):
            table.path_costs("bitop")

    def test_another_file_is_no_path_table(self, tmp_path):
        np.savez(tmp_path / "t.npz", a=np.ones(3))
        with refused(ManifestError, "t.npz", "no description in it"):
            PathTable.read(tmp_path / "t.npz")


class TestCosts:
    def test_bit_operations_are_those_of_the_paper(self):
        paths = Paths(("fp16", "int8"), ("a", "b"), ((0,), (0, 0), (0, 1)))
        blocks = [
            [StageWork(10, (32, 32)), StageWork(20, (16, 8))],
            [StageWork(30, (16, 8)), StageWork(1, (16, 16))],
        ]
        first = 10 * 32 + 20 * 16
        full = first + 31 * 16
        cheap = first + 30 * 8 + 16
        np.testing.assert_allclose(
            bit_operations(paths, blocks), [first / full, 1, cheap / full], rtol=1e-12
        )
        np.testing.assert_allclose(
            bit_operations(paths, blocks, unit=2), np.array([first, full, cheap]) / 2
        )

    @pytest.mark.parametrize(
        ("blocks", "message"),
        [
            ([[StageWork(1, (32,))]] * 2, "bit widths of a stage: got 1, expected 2"),
            ([[StageWork(1, (32, 8))]], "costs of blocks: got shape (1, 2), expected (2, 2)"),
            ([[StageWork(math.nan, (32, 8))]] * 2, "expected finite numbers >= 0"),
            ([[StageWork(0, (32, 8))]] * 2, "BitOPS that count as 1: got 0.0"),
        ],
    )
    def test_work_that_can_not_be(self, blocks, message):
        paths = Paths(("fp32", "int8"), ("a", "b"), ((0,), (0, 0), (0, 1)))
        with refused(ConfigError, message):
            bit_operations(paths, blocks)

    def test_measured_blocks_add_up(self):
        paths = Paths(("fp32", "int8"), ("a", "b"), ((0,), (0, 0), (0, 1)))
        seconds = np.array([[3.0, 9.0], [5.0, 2.0]])
        assert sum_of_blocks(paths, seconds).tolist() == [3, 8, 5]


class TestTargets:
    def test_a_target_is_the_error_rate_of_validation_samples_that_look_alike(self):
        """At the first exit three kinds stand apart: by label where right, by label where wrong."""
        table, kinds = population(600, 0)
        wanted = targets(find_clusters(table, 24), table)
        assert wanted.shape == (600, len(PATHS)) and wanted.dtype == np.float32
        for i in range(len(PATHS)):
            # In this population every cluster is of one kind, so targets are the truth.
            np.testing.assert_array_equal(wanted[:, i], ~table.right[:, i])
        assert set(kinds) == {0, 1, 2}

    def test_one_cluster_gives_every_sample_the_mean_error(self):
        table, _ = population(50, 1)
        wanted = targets(find_clusters(table, 1), table)
        np.testing.assert_allclose(wanted, np.tile((~table.right).mean(axis=0), (50, 1)), rtol=1e-6)

    def test_a_path_that_says_few_things_gets_few_clusters(self):
        table, _ = population(40, 1)
        same = np.tile(table.probabilities[:1], (40, 1, 1))
        found = find_clusters(replace(table, probabilities=same), 5)
        assert [len(path.errors) for path in found] == [1] * len(PATHS)

    def test_too_few_samples(self):
        table, _ = population(79, 0)
        with refused(
            CalibrationError,
            "too few validation samples for 20 clusters: got 79, expected >= 80, 4 per cluster",
        ):
            find_clusters(table, 20)

    def test_the_calibration_error_is_that_of_the_appendix(self):
        """With one cluster it is known by hand: 15 bins of one sample, each right or wrong."""
        validation, _ = population(40, 0)
        test, _ = population(15, 2)
        found = calibration_error(validation, test, 1)
        said = validation.right.mean(axis=0)
        expected = np.abs(test.right - said).mean(axis=0)
        np.testing.assert_allclose(found.paths, expected, atol=1e-6)
        assert found.error == pytest.approx(expected.mean())

    def test_clusters_that_tell_kinds_apart_are_calibrated_better_than_one(self):
        validation, _ = population(300, 0)
        test, _ = population(300, 2)
        assert calibration_error(validation, test, 12).error < 0.01
        assert calibration_error(validation, test, 1).error > 0.05
        with refused(CalibrationError, "samples for 15 bins: got 14"):
            calibration_error(validation, test.samples(range(14)), 2)
