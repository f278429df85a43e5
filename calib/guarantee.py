"""Thresholds with a promise: with confidence 1 - delta the accuracy drop is at most epsilon.

```
table = ExitTable(signals, correct, confidence.bounds(metric, classes))
costs = CostModel.from_stages(cascade, seconds_per_stage)
certificate = certify(table, costs, Promise(epsilon=0.01, delta=0.05))
certificate.thresholds          # {"saver": 0.8731, "middle": 0.8731}
certificate.text
```

The samples of the table are taken for independent draws of what the cascade will see. The promise
is about the draw: of a hundred tables, at most 100 * delta lead to thresholds whose true drop, on
all that could be drawn, is above epsilon.

**Method.** All early exits that take part share one threshold, which sinks from where nobody leaves
to where everybody leaves at the first of them. At every value an exact test (`calib.paired_test`)
asks whether the drop is below epsilon, and the first value that fails ends the walk. The cheapest
of the values before it is chosen.

**Why it is valid.** Let t* be the highest threshold whose true drop is above epsilon, or the limit
of such. It belongs to the population and not to the data, so the test at t* is one test, which a
cascade with that drop passes with a probability of at most delta. Whoever walks past t* has passed
it. So no correction for the number of thresholds is due, and none of them needs to be fixed
beforehand: between two neighbouring signals of the data the counts do not change. It needs no
drop that grows as the threshold sinks. Exits at quantiles of the data would not do, for there t* would
depend on the data; nor would the front that `calib.sweep` finds on them.

Which exits take part may be learnt, and temperatures must be, from samples that are not tested:
to the tested ones the walk is then as good as fixed beforehand. That costs samples, so it is done
only where it pays: exits that share all they compute with the base cost little when nobody leaves
there, and then all take part. A shared threshold loses little. On three synthetic populations with
3 or 4 exits and a known truth, the cheapest with a drop of 1 point was 0 to 2 % of the base's cost
dearer, with the exits that suit it best, than with a threshold of its own for each exit.

Reference:
    Angelopoulos, Bates, Candes, Jordan and Lei, Learn then Test: Calibrating Predictive Algorithms
    to Achieve Risk Control, Annals of Applied Statistics 19(2), 2025 (arXiv 2110.01052), section
    2.2.2: fixed sequence testing. Jazbec et al., Fast yet Safe: Early-Exiting with Risk Control,
    NeurIPS 2024: one threshold for all exits. Laufer-Goldshtein et al., Efficiently Controlling
    Multiple Risks with Pareto Testing, ICLR 2023: learning what is tested on other samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.exit_table import CostModel, ExitTable
from calib.paired_test import PairedTest, fewest_samples, paired_test, samples_for
from calib.sweep import measure, midway
from calib.thresholds import ByExit
from edge_runtime.errors import CalibrationError, ConfigError

# Chosen on five tables (three synthetic, with 3 or 4 exits, at 449 to 3,000 samples): shares of
# 10 to 30 % led to the same cost within 1 %.
_LEARN_SHARE = 0.2
#: Learn which exits take part where all of them together make the base dearer by more than this.
_DEAR = 0.1
#: Up to this many early exits every combination is tried, beyond it those of one, two and all.
_ALL_COMBINATIONS = 6


@dataclass(frozen=True)
class Promise:
    """What is to be promised.

    Attributes:
        epsilon: Largest drop of accuracy against the full model, a fraction in (0, 0.5).
        delta: Largest probability that the promise is broken, from 1e-6 to below 0.5.

    Raises:
        ConfigError: From the constructor, for other values.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.epsilon < 0.5:
            raise ConfigError(
                "epsilon of a guarantee",
                got=self.epsilon,
                expected="a fraction above 0 and below 0.5",
                remedy="0.01 is one point of accuracy",
            )
        if not 1e-6 <= self.delta < 0.5:
            raise ConfigError(
                "delta of a guarantee",
                got=self.delta,
                expected="a probability from 1e-6 to below 0.5",
                remedy="0.05 is a confidence of 95 %",
            )

    def __str__(self) -> str:
        return (
            f"a drop of at most {100 * self.epsilon:g} points with "
            f"{100 * (1 - self.delta):g} % confidence"
        )
