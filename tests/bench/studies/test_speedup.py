"""The formulas against the thesis's figure, against each other, and against hand-made sums."""

from __future__ import annotations

import pytest

from bench.studies.speedup import cost_speed_up, layer_speed_up
from edge_runtime.errors import ConfigError
from tests.edge_runtime.bundles import refused

#: Samples of CIFAR-100's 10,000 test images that leave after so many of 12 layers, at 0.8: the exit
#: counts of the EEVIT thesis's published data, the same on all four of its platforms.
EEVIT = {4: 4330, 5: 1556, 6: 943, 7: 894, 8: 1136, 9: 498, 10: 236, 11: 94, 12: 313}


def test_the_thesis_s_exit_counts_give_its_speed_up() -> None:
    assert sum(EEVIT.values()) == 10_000
    assert layer_speed_up(EEVIT, 12) == pytest.approx(2.08, abs=0.005)


def test_without_early_exits_nothing_is_faster() -> None:
    assert layer_speed_up({12: 7}, 12) == 1.0


def test_exits_that_cost_more_than_they_save_give_less_than_one() -> None:
    # 9 of 10 pass an exit of 2 in vain: 10 * 10 / (1 * 4 + 9 * 12).
    assert cost_speed_up([1, 9], [4.0, 12.0], 10.0) == pytest.approx(100 / 112)


@pytest.mark.parametrize("executed", [0, 13])
def test_layers_that_the_model_lacks_are_refused(executed: int) -> None:
    with refused(ConfigError, f"executed layers: got {executed}, expected 1..12"):
        layer_speed_up({executed: 1, 12: 1}, 12)


@pytest.mark.parametrize(
    ("counts", "costs", "message"),
    [
        ([1], [1.0, 2.0], "1 counts and 2 costs"),
        ([0, 0], [1.0, 2.0], "some sample"),
        ([1, -1], [1.0, 2.0], "numbers >= 0"),
        ([1, 0], [0.0, 2.0], "samples that cost nothing"),
    ],
)
def test_sums_that_mean_nothing_are_refused(
    counts: list[int], costs: list[float], message: str
) -> None:
    with refused(ConfigError, message):
        cost_speed_up(counts, costs, 2.0)
