"""The gate at each exit: leave here, or run the next block at which precision.

It weighs, for every path that begins as the sample's own did, the path's cost against the predicted
probability that its answer is wrong, and takes a step towards the best. Costs and their weight
lambda are set when the gate is made, without fitting anything anew.

Reference:
    Regol et al., QuEE, 2024, Eq. 9 and 18.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError
from edge_runtime.gate_model import TINY, ErrorPredictor, GateModel
from edge_runtime.paths import Levels

#: The step that leaves at the current exit.
LEAVE = -1
#: Samples of a batch at a time: their hidden units stay in a core's cache.
_BLOCK = 64


class Weighed(NamedTuple):
    """What a gate thinks of the paths of some samples.

    Attributes:
        steps: The next step towards each candidate, shape (k,), int64: -1 to leave, or a level.
        excess: By how much lambda times cost plus predicted error exceeds the best candidate's,
            shape (n, k), float32; the first 0 of a row is the gate's choice.
    """

    steps: NDArray[np.int64]
    excess: NDArray[np.float32]


class Gate:
    """A fitted gate at one trade-off between cost and errors.

    Candidates at an exit are to leave there and every known path that goes on. The error of leaving
    is predicted too, as that of a path of its own. Of equals the cheapest wins, then the first.

    A gate computes in buffers of its own: calls must not overlap.

    Args:
        model: What was fitted.
        costs: Path -> cost of the whole path in any unit, such as BitOPS, seconds or joules;
            finite, >= 0. All are divided by the largest (Eq. 17).
        trade_off: lambda, the price of the dearest path in probabilities of error; >= 0. For a
            model of the kind "one_step" it must be the model's, and the costs have no effect.

    Attributes:
        model: As given.
        costs: Cost of each path in the order of `model.paths.paths`, the largest is 1.
        trade_off: As given.

    Raises:
        ConfigError: lambda is negative, NaN, infinite or not the model's, a path has no cost, or
            one that is no cost.
    """

    def __init__(self, model: GateModel, costs: Mapping[Levels, float], trade_off: float) -> None:
        check_trade_off(trade_off)
        if model.trade_off is not None and trade_off != model.trade_off:
            raise ConfigError(
                "lambda of a gate that was fitted for one lambda",
                got=trade_off,
                expected=model.trade_off,
                remedy="Fit one for this lambda, or a gate of the kind paths, which takes any",
            )
        self.model = model
        self.trade_off = float(trade_off)
        self.costs = _normalised(model, costs)
        self._steps = {path: self._step(path) for path in model.paths.paths}

    def route(
        self,
        position: int,
        levels_so_far: Sequence[int],
        probabilities: NDArray[np.float32],
        previous: NDArray[np.float32] | None,
    ) -> int:
        """Decide about one sample at one exit.

        Args:
            position: The exit, counted from 0.
            levels_so_far: Level of each block that was run, `position` + 1 of them.
            probabilities: Softmax of the exit's logits, shape (classes,), float32, finite.
            previous: The same of the exit before it; None at the first.

        Returns:
            -1 to leave here, else the level of the next block. Where no path goes on, at the last
            exit or behind a beginning that the gate does not know, it is -1.

        Raises:
            ConfigError: As many levels as exits passed, or a previous exit's answer, are missing.
        """
        if len(levels_so_far) != position + 1 or (position and previous is None):
            raise _incomplete(position, levels_so_far)
        step = self._steps.get(tuple(levels_so_far), LEAVE)
        return step if isinstance(step, int) else step.choose(probabilities, previous)

    def weigh(
        self,
        levels_so_far: Sequence[int],
        probabilities: NDArray[np.float32],
        previous: NDArray[np.float32] | None,
    ) -> Weighed:
        """Decide about samples that came the same way, as `route` does about each.

        Args:
            levels_so_far: Level of each block that was run.
            probabilities: Shape (n, classes), float32, finite.
            previous: The same of the exit before, None at the first exit.

        Raises:
            ConfigError: The previous exit's answers are missing.
        """
        if len(levels_so_far) > 1 and previous is None:
            raise _incomplete(len(levels_so_far) - 1, levels_so_far)
        step = self._steps.get(tuple(levels_so_far), LEAVE)
        if isinstance(step, int):
            return Weighed(np.array([step]), np.zeros((len(probabilities), 1), np.float32))
        return Weighed(np.array(step.steps), step.excess(probabilities, previous))

    def _step(self, begin: Levels) -> _Step | int:
        """What is left to decide behind a beginning, prepared; an int where nothing is."""
        model = self.model
        if len(begin) == len(model.paths.exits):
            return LEAVE
        if model.kind == "one_step":
            known = {model.paths.paths[i][: len(begin) + 1] for i in self._known(begin)}
            ends, prices = sorted(known), None
        else:
            order = sorted(self._known(begin), key=lambda i: self.costs[i])
            lowest = self.costs[order[0]]
            # Errors lie in [0, 1]: what costs 1 more than the cheapest can't be better.
            order = [i for i in order if self.trade_off * (self.costs[i] - lowest) < 1]
            ends = [model.paths.paths[i] for i in order]
            prices = [self.trade_off * (self.costs[i] - lowest) for i in order]
        steps = [end[len(begin)] if len(end) > len(begin) else LEAVE for end in ends]
        if len(set(steps)) == 1:
            return steps[0]
        predictor = model.predictors[len(begin) - 1]
        codes = model.paths.codes(ends)
        return _Step(predictor, model.classes, codes, steps, prices, first=len(begin) == 1)

    def _known(self, begin: Levels) -> tuple[int, ...]:
        return self.model.paths.beginning_with(begin)


class _Step:
    """One decision, with all that does not depend on the sample computed beforehand.

    Caches are cold when a gate runs, behind a stage, and every call into numpy costs some
    microseconds then. So few are made, with these equalities: the weight of an entropy is that of
    each of its terms p log p; relu(z + c) = max(z, -c) + c, whose second term is a constant per
    path, kept in two more hidden units; and 2 sigmoid(x) - 1 = tanh(x / 2), so that costs count
    twice and the constant does not matter.
    """

    def __init__(
        self,
        predictor: ErrorPredictor,
        classes: int,
        codes: NDArray[np.float32],
        steps: Sequence[int],
        prices: Sequence[float] | None,
        *,
        first: bool,
    ) -> None:
        self.steps = list(steps)
        self._prices = None if prices is None else 2 * np.array(prices, np.float32)
        share = 1.0 if prices is None else 0.5
        output = share * predictor.output.astype(np.float64)
        known = codes.astype(np.float64) @ predictor.codes + predictor.bias
        constant = known @ output + share * float(predictor.output_bias[0])
        extra = np.stack([np.maximum(constant, 0), np.maximum(-constant, 0)], axis=1)
        self._floor = np.concatenate([-known, extra], axis=1).astype(np.float32)
        self._output = np.append(output, [1, -1]).astype(np.float32)
        self._weights = _weights(predictor.features, classes, first=first)

        self._first = first
        self.choose = self._bound()

    def _bound(self) -> Callable[[NDArray[np.float32], NDArray[np.float32] | None], int]:
        """The decision about one sample, in buffers of its own.

        A closure finds all that it needs without looking it up by name: with cold caches that
        saves 2 of 25 microseconds.
        """
        add, log, multiply, maximum = np.add, np.log, np.multiply, np.maximum
        concatenate, dot, tanh, reduce = np.concatenate, np.dot, np.tanh, np.maximum.reduce
        weights, floor, output, tiny = self._weights, self._floor, self._output, TINY
        prices, steps, first = self._prices, self.steps, self._first
        features = np.zeros(len(weights), np.float32)
        rows = 1 if first else 2
        classes = (len(weights) - rows) // (2 * rows)
        both, products, largest = np.split(features, [rows * classes, 2 * rows * classes])
        table, logs = both.reshape(rows, classes), np.empty_like(both)
        z, hidden = np.empty(len(output), np.float32), np.empty_like(floor)
        values = np.empty(len(steps), np.float32)
        best = values.argmin

        def choose(probabilities: NDArray[np.float32], previous: NDArray[np.float32] | None) -> int:
            parts: Any = (probabilities,) if first else (probabilities, previous)
            concatenate(parts, out=both)
            add(both, tiny, logs)
            log(logs, logs)
            multiply(logs, both, products)
            reduce(table, axis=1, out=largest)
            dot(features, weights, z)
            maximum(z, floor, out=hidden)
            dot(hidden, output, values)
            if prices is not None:
                tanh(values, values)
                add(values, prices, values)
            return steps[best()]

        return choose

    def excess(
        self, probabilities: NDArray[np.float32], previous: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        """As `Weighed.excess`, for a batch; the same operations as for one sample."""
        rows = [probabilities] if self._first or previous is None else [probabilities, previous]
        products = [p * np.log(p + TINY) for p in rows]
        largest = [p.max(axis=1, keepdims=True) for p in rows]
        z = np.concatenate([*rows, *products, *largest], axis=1) @ self._weights
        values = np.empty((len(z), len(self.steps)), np.float32)
        for begin in range(0, len(z), _BLOCK):
            hidden = np.maximum(z[begin : begin + _BLOCK, None, :], self._floor)
            np.matmul(hidden, self._output, out=values[begin : begin + _BLOCK])
        scale = np.float32(1)
        if self._prices is not None:
            values = np.tanh(values) + self._prices
            scale = np.float32(0.5)
        excess: NDArray[np.float32] = (values - values.min(axis=1, keepdims=True)) * scale
        return excess


def _incomplete(position: int, levels: Sequence[int]) -> ConfigError:
    return ConfigError(
        f"the gate at exit {position}",
        got=f"{len(levels)} levels so far",
        expected=f"{position + 1}, and the answer of the exit before",
    )


def check_trade_off(trade_off: float) -> None:
    """Refuse a lambda that no trade-off can have.

    Raises:
        ConfigError: It is negative, NaN or infinite.
    """
    if not 0 <= trade_off < math.inf:
        raise ConfigError("lambda", got=trade_off, expected="a finite number >= 0")


def _normalised(model: GateModel, costs: Mapping[Levels, float]) -> tuple[float, ...]:
    found = []
    for path in model.paths.paths:
        name = model.paths.name(path)
        cost = costs.get(path)
        if cost is None:
            raise ConfigError(
                f"the path {name!r} has no cost",
                got=f"costs of {len(costs)} paths",
                expected=f"those of all {len(model.paths)} paths of the gate",
            )
        if not 0 <= cost < math.inf:
            raise ConfigError(
                f"cost of the path {name!r}", got=cost, expected="a finite number >= 0"
            )
        found.append(float(cost))
    dearest = max(found)
    if dearest == 0:
        raise ConfigError("all paths of the gate cost 0", expected="a cost > 0 for some")
    return tuple(cost / dearest for cost in found)


def _weights(features: NDArray[np.float32], classes: int, *, first: bool) -> NDArray[np.float32]:
    """Weights in the order of the buffer: p, the terms p log p, max p, each of one exit or two.

    The terms make up negative entropies. At the first exit, what belongs to the exit before is
    zero and left out.
    """
    own, before, stats = np.split(features, [classes, 2 * classes])
    entropy, entropy_before, largest_before, largest = stats[:, None, :]
    terms, terms_before = (np.repeat(-row, classes, axis=0) for row in (entropy, entropy_before))
    if first:
        parts = [own, terms, largest]
    else:
        parts = [own, before, terms, terms_before, largest, largest_before]
    weights = np.concatenate(parts)
    return np.concatenate([weights, np.zeros((len(weights), 2), np.float32)], axis=1)
