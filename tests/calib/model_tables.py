"""Tables of predictions that the tests of the cascade search share, and a plain reference.

The reference works sample by sample, straight from the definitions: no sorting, no blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calib.cascade_search.methods import Method
from edge_runtime import confidence

Arrays = dict[str, np.ndarray]
Thresholds = Sequence[float | None]


def logits_table(samples: int, models: int, classes: int = 6, seed: int = 0) -> Arrays:
    """Labels and logits of models that agree on what is hard; the later ones are better."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, samples)
    labels[:2] = (0, 1)
    ease = generator.normal(size=samples)
    arrays = {"labels": labels}
    for i, skill in enumerate(np.linspace(0.5, 2.5, models)):
        logits = generator.normal(size=(samples, classes)).astype(np.float32)
        logits[np.arange(samples), labels] += (skill + ease).astype(np.float32)
        arrays[f"net.{i}"] = logits
    return arrays


def write_table(path: Path, arrays: Mapping[str, Any]) -> Path:
    np.savez(path, **arrays)
    return path


def write_costs(path: Path, costs: Mapping[str, float]) -> Path:
    lines = ["model,cost", *(f"{name},{cost!r}" for name, cost in costs.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def doubling_costs(arrays: Iterable[str]) -> dict[str, float]:
    """1, 2, 4, ...: sums of them are exact."""
    names = (name for name in arrays if name != "labels")
    return {name: float(2**i) for i, name in enumerate(names)}


@dataclass(frozen=True)
class PlainReference:
    """What a cascade answers, one sample after the other.

    Attributes:
        arrays: Labels and models as in the npz.
        method: How exits judge and answer.
        top: A label among so many of the largest values is right.
        temperatures: Model -> temperature, used by scaled methods.
    """

    arrays: Arrays
    method: Method
    top: int
    temperatures: Mapping[str, float]

    def exit(self, models: Sequence[str], sample: int) -> tuple[float, bool]:
        """Signal and correctness of the exit after some models."""
        if self.method.ensemble == "none":
            return self._own(models[-1], sample)
        if self.method.ensemble == "comparison":
            # max() keeps the first of equals: the last model comes first.
            return max(
                (self._own(name, sample) for name in reversed(models)), key=lambda one: one[0]
            )
        values = [self._logits(name, sample) for name in models]
        if len(models) == 1:
            return self._own(models[0], sample)
        if self.method.ensemble == "mean_logits":
            total = sum(values[1:], start=values[0])
            return self._signal(total / np.float32(len(models))), self._right(total, sample)
        total = sum(map(softmax, values[1:]), start=softmax(values[0]))
        mean = np.maximum(total / np.float32(len(models)), np.finfo(np.float32).tiny)
        return self._signal(np.log(mean)), self._right(total, sample)

    def run(
        self, models: Sequence[str], thresholds: Thresholds, costs: Mapping[str, float]
    ) -> tuple[int, float, list[int]]:
        """Right answers, summed cost, and samples that leave at each exit."""
        correct, total, counts = 0, 0.0, [0] * len(models)
        for sample in range(len(self.arrays["labels"])):
            for k, name in enumerate(models):
                total += costs[name]
                signal, right = self.exit(models[: k + 1], sample)
                last = k == len(models) - 1
                if last or (thresholds[k] is not None and signal >= np.float32(thresholds[k])):
                    correct += right
                    counts[k] += 1
                    break
        return correct, total, counts

    def front(self, costs: Mapping[str, float], longest: int) -> list[tuple[int, float]]:
        """Pareto front over all cascades and all values of the signals as thresholds."""
        samples = range(len(self.arrays["labels"]))
        accuracy = {name: self.run([name], [], costs)[0] for name in costs}
        order = sorted(costs, key=lambda name: (costs[name], accuracy[name]))
        outcomes = set()
        for count in range(1, longest + 1):
            for models in itertools.combinations(order, count):
                exits = [[self.exit(models[: k + 1], i) for i in samples] for k in range(count)]
                values = [[None, *sorted({one[0] for one in exit_})] for exit_ in exits[:-1]]
                for thresholds in itertools.product(*values):
                    outcomes.add(_outcome(exits, thresholds, [costs[name] for name in models]))
        return sorted(
            one
            for one in outcomes
            if not any(o != one and o[0] >= one[0] and o[1] <= one[1] for o in outcomes)
        )

    def _logits(self, name: str, sample: int) -> np.ndarray:
        values = self.arrays[name][sample].astype(np.float32)
        if self.method.scaled:
            values = values / np.float32(self.temperatures.get(name, 1.0))
        return values

    def _own(self, name: str, sample: int) -> tuple[float, bool]:
        if name + ".pred" in self.arrays:
            right = self.arrays[name + ".pred"][sample] == self.arrays["labels"][sample]
            return float(np.float32(self.arrays[name + ".conf"][sample])), bool(right)
        values = self.arrays[name][sample].astype(np.float32)
        own = self.temperatures.get(name, 1.0) if self.method.scaled else 1.0
        return self._signal(values, own), self._right(values, sample)

    def _signal(self, values: np.ndarray, temperature: float = 1.0) -> float:
        if self.method.metric == "top5_sum":
            shifted = values - values.max()
            weight = np.exp(shifted / np.float32(temperature) if temperature != 1 else shifted)
            share = np.add.reduce(np.sort(weight)[-5:]) / np.add.reduce(weight)
            return float(min(share, np.float32(1)))
        metric = "max_softmax" if self.method.metric == "conf" else self.method.metric
        return float(confidence.decide(values, metric, temperature).signal)

    def _right(self, values: np.ndarray, sample: int) -> bool:
        ranked = sorted(range(len(values)), key=lambda k: (-values[k], k))
        return int(self.arrays["labels"][sample]) in ranked[: self.top]


def softmax(values: np.ndarray) -> np.ndarray:
    weight = np.exp(values - values.max())
    return weight / np.add.reduce(weight)


def _outcome(
    exits: Sequence[Sequence[tuple[float, bool]]], thresholds: Thresholds, costs: Sequence[float]
) -> tuple[int, float]:
    correct, total = 0, 0.0
    for said in zip(*exits, strict=True):
        for k, (signal, right) in enumerate(said):
            total += costs[k]
            if k == len(said) - 1 or (thresholds[k] is not None and signal >= thresholds[k]):
                correct += right
                break
    return correct, total
