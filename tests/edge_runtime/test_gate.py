"""Gates: the step they choose, and what they refuse."""

import itertools
import math

import numpy as np
import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.gate import Gate
from edge_runtime.gate_model import ErrorPredictor, GateModel
from edge_runtime.paths import Levels, Paths
from tests.edge_runtime.bundles import refused
from tests.edge_runtime.gates import BUNDLE, LEVELS, all_paths, costs, model, probabilities


def by_the_paper(
    gate: Gate, begin: Levels, now: np.ndarray, before: np.ndarray | None
) -> list[tuple[float, float, Levels]]:
    """(lambda c + error, c, path) of every candidate, written out in float64; the best first."""

    def entropy(p: np.ndarray) -> float:
        return -sum(x * math.log(x) for x in p.tolist() if x > 0)

    zeros = np.zeros(len(now))
    last = zeros if before is None else before
    u = [*now, *last, entropy(now), entropy(last), last.max(), now.max()]
    predictor = gate.model.predictors[len(begin) - 1]
    weighed = []
    for path, cost in zip(gate.model.paths.paths, gate.costs, strict=True):
        if path[: len(begin)] != begin:
            continue
        bits = [(32, 16, 8)[level] / 32 for level in path]
        code = [*bits, *[0.0] * (4 - len(path)), len(path) / 4]
        hidden = u @ predictor.features.astype(float) + code @ predictor.codes.astype(float)
        score = np.maximum(hidden + predictor.bias, 0) @ predictor.output + predictor.output_bias[0]
        weighed.append((gate.trade_off * cost + 1 / (1 + math.exp(-score)), cost, path))
    return sorted(weighed)


@pytest.mark.parametrize("trade_off", [0.0, 0.3, 1.5, 40.0])
@pytest.mark.parametrize("begin", [(0,), (0, 0), (0, 2), (0, 1, 1)])
def test_a_step_leads_to_the_path_that_the_paper_chooses(trade_off, begin):
    now, before = probabilities(30, 1), probabilities(30, 2)
    now[0] = [1, 0, 0, 0, 0]
    steps = set()
    for seed, (p, q) in itertools.product(range(6), zip(now, before, strict=True)):
        gate = Gate(model(seed), costs(), trade_off)
        previous = q if len(begin) > 1 else None
        (best, _, path), *others = by_the_paper(gate, begin, p, previous)
        expected = path[len(begin)] if len(path) > len(begin) else -1
        rivals = [v for v, _, other in others if other[: len(begin) + 1] != path[: len(begin) + 1]]
        if not rivals or min(rivals) - best > 1e-5:
            assert gate.route(len(begin) - 1, begin, p, previous) == expected, seed
            steps.add(expected)
    assert -1 in steps
    assert len(steps) > 1 or trade_off > 0


@pytest.mark.parametrize("kind", ["paths", "one_step"])
def test_a_batch_is_weighed_as_its_samples_are_routed(kind):
    gate = Gate(model(3, kind=kind), costs(), 0.5)
    now, before = probabilities(300, 3), probabilities(300, 4)
    seen = set()
    for begin in ((0,), (0, 0), (0, 1), (0, 0, 2), (0, 2, 2)):
        previous = before if len(begin) > 1 else None
        steps, excess = gate.weigh(begin, now, previous)
        assert excess.min() == 0
        for row in range(300):
            one = None if previous is None else previous[row]
            step = gate.route(len(begin) - 1, begin, now[row], one)
            near = np.flatnonzero(excess[row] < 1e-6)
            assert step in steps[near]
            seen.add(step)
    assert {-1, 0} < seen


def test_the_excess_is_in_probabilities_of_error():
    gate = Gate(model(), costs(), 0.3)
    now, before = probabilities(5, 1), probabilities(5, 2)
    steps, excess = gate.weigh((0, 0), now, before)
    for row in range(5):
        values = [v for v, _, _ in by_the_paper(gate, (0, 0), now[row], before[row])]
        np.testing.assert_allclose(sorted(excess[row]), np.array(values) - values[0], atol=1e-5)
    assert len(steps) == excess.shape[1] == 10


def test_the_order_of_paths_does_not_matter():
    now, before = probabilities(100, 5), probabilities(100, 6)
    straight = model()
    turned = Gate(
        GateModel(
            BUNDLE, 5, Paths(LEVELS, straight.paths.exits, all_paths()[::-1]), straight.predictors
        ),
        costs(),
        0.4,
    )
    gate = Gate(straight, costs(), 0.4)
    for p, q in zip(now, before, strict=True):
        assert gate.route(1, (0, 1), p, q) == turned.route(1, (0, 1), p, q)


def constant(paths: tuple[Levels, ...]) -> GateModel:
    """A gate to which all paths are equally likely to be wrong."""
    made = model(paths=paths)
    blind = [
        ErrorPredictor(p.features * 0, p.codes * 0, p.bias * 0, p.output, p.output_bias)
        for p in made.predictors
    ]
    return GateModel(BUNDLE, 5, made.paths, tuple(blind))


def test_of_equals_the_cheapest_wins_then_the_first():
    paths = all_paths()
    p = probabilities(1, 0)[0]
    assert Gate(constant(paths), costs(), 0.0).route(0, (0,), p, None) == -1
    shortest_is_dearest = {path: float(10 - len(path)) for path in paths}
    gate = Gate(constant(paths), shortest_is_dearest, 0.0)
    # All paths of four blocks cost the same: of them the one that is listed first is at fp32.
    assert gate.route(0, (0,), p, None) == 0
    turned = Gate(constant(paths[::-1]), shortest_is_dearest, 0.0)
    assert turned.route(0, (0,), p, None) == 2


def test_a_large_lambda_leaves_at_once_and_the_last_exit_always_answers():
    gate = Gate(model(), costs(), 1e9)
    for p in probabilities(50, 0):
        assert gate.route(0, (0,), p, None) == -1
        assert gate.route(3, (0, 0, 1, 2), p, p) == -1


def test_where_no_path_is_known_a_sample_leaves():
    known = ((0,), (0, 0), (0, 0, 0), (0, 0, 0, 0), (0, 2), (0, 2, 2))
    gate = Gate(model(paths=known), costs(known), 0.0)
    p, q = probabilities(2, 0)
    assert gate.route(2, (0, 2, 2), p, q) == -1
    assert gate.route(1, (0, 1), p, q) == -1
    assert gate.route(1, (0, 0), p, q) in (-1, 0)


def test_costs_of_any_unit_are_the_same():
    seconds = costs()
    halves = {path: cost / 64 for path, cost in seconds.items()}
    assert Gate(model(), seconds, 1.0).costs == Gate(model(), halves, 1.0).costs
    assert max(Gate(model(), seconds, 1.0).costs) == 1


class TestRefused:
    @pytest.mark.parametrize("trade_off", [-0.1, math.nan, math.inf])
    def test_lambda(self, trade_off):
        with refused(ConfigError, f"lambda: got {trade_off}, expected a finite number >= 0"):
            Gate(model(), costs(), trade_off)

    def test_another_lambda_than_a_one_step_gate_was_fitted_for(self):
        with refused(ConfigError, "fitted for one lambda: got 0.25, expected 0.5"):
            Gate(model(kind="one_step"), costs(), 0.25)

    @pytest.mark.parametrize("cost", [-1.0, math.nan, math.inf])
    def test_a_cost(self, cost):
        with refused(ConfigError, f"cost of the path 'fp32 -> int8': got {cost}"):
            Gate(model(), costs() | {(0, 2): cost}, 1.0)

    def test_a_path_without_a_cost(self):
        few = {path: cost for path, cost in costs().items() if path != (0, 2)}
        with refused(ConfigError, "the path 'fp32 -> int8' has no cost: got costs of 19 paths"):
            Gate(model(), few, 1.0)
        with refused(ConfigError, "all paths of the gate cost 0"):
            Gate(model(), dict.fromkeys(all_paths(), 0), 1.0)

    def test_levels_or_answers_that_are_missing(self):
        gate, p = Gate(model(), costs(), 1.0), probabilities(3, 0)
        with refused(ConfigError, "the gate at exit 1: got 1 levels so far, expected 2"):
            gate.route(1, (0,), p[0], p[0])
        with refused(ConfigError, "the gate at exit 1", "the answer of the exit before"):
            gate.route(1, (0, 0), p[0], None)
        with refused(ConfigError, "the gate at exit 1", "the answer of the exit before"):
            gate.weigh((0, 0), p, None)


def test_a_higher_lambda_never_costs_more_at_one_exit():
    """What is true of one decision: the path aimed at gets cheaper as lambda rises."""
    made = model(7)
    gates = [Gate(made, costs(), value) for value in (0.0, 0.1, 0.5, 1.0, 3.0, 10.0)]
    for p in probabilities(100, 8):
        aims = [by_the_paper(gate, (0,), p, None)[0][1] for gate in gates]
        assert all(a >= b for a, b in itertools.pairwise(aims))
