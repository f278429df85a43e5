"""The interval of two separate runs says neither too little nor too much."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bench.compare.ratios import block_ratio, ratio_of_runs
from bench.result import Result
from edge_runtime.timing import Ratio
from tests.bench.results import durations, made_up_result


def test_of_100_runs_against_their_like_few_intervals_exclude_one() -> None:
    runs = [durations(1e-3, 40, seed) for seed in range(200)]
    found = [block_ratio(a, b) for a, b in zip(runs[::2], runs[1::2], strict=True)]
    excluded = sum(one is None or not one.low <= 1 <= one.high for one in found)
    assert excluded <= 10


def test_a_real_difference_is_found() -> None:
    found = block_ratio(durations(1e-3, 40, 1), durations(2e-3, 60, 2))
    assert found is not None
    assert 0.4 < found.low < found.value < found.high < 0.6
    assert found.value == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("blocks", [(), (1.0, 1.0, 1.0), (1.0, 1.0, 0.0, 1.0)])
def test_few_or_impossible_blocks_give_no_interval(blocks: tuple[float, ...]) -> None:
    assert block_ratio(blocks, (1.0,) * 8) is None
    assert block_ratio((1.0,) * 8, blocks) is None


def test_very_many_blocks_take_a_moment_only() -> None:
    many = np.full(1_000_003, 1e-3)
    found = block_ratio(many.tolist(), (2 * many).tolist())
    assert found is not None
    assert found.value == pytest.approx(0.5)


def test_runs_without_blocks_have_a_ratio_without_an_interval() -> None:
    assert isinstance(ratio_of_runs(made_up_result("b", 0.5), made_up_result()), Ratio)
    assert ratio_of_runs(_without_blocks(0.5), made_up_result()) == pytest.approx(0.5)


def test_a_mean_of_zero_has_no_ratio() -> None:
    first = made_up_result()
    impossible = replace(first, end_to_end=replace(first.end_to_end, mean=0.0))
    assert ratio_of_runs(first, impossible) is None


def _without_blocks(slower: float) -> Result:
    made = made_up_result("b", slower)
    return replace(made, subjects=tuple(replace(one, blocks=()) for one in made.subjects))
