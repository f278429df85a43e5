"""The search against a brute force over all thresholds, and its points against a plain replay."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.cascade_search.exits import ENSEMBLES, Alone, Exits
from calib.cascade_search.methods import Method, exits_of
from calib.cascade_search.search import SearchResult, cascades_of, in_order, measure_cascade, search
from calib.cascade_search.signals import METRICS, Judgement, judge
from calib.exit_table import CostModel, ExitTable
from calib.model_table import ModelTable
from calib.sweep import sweep
from edge_runtime import Cascade, Exit, OperatingPoint, Scheduler, Stage, TensorSpec, confidence
from edge_runtime.backends.fake import FakeBackend
from edge_runtime.errors import ConfigError
from tests.calib.model_tables import (
    Arrays,
    PlainReference,
    logits_table,
    write_table,
)

#: Every metric with every ensemble; means need logits.
METHODS = [
    Method(metric, ensemble, scaled)
    for metric in METRICS
    for ensemble in ENSEMBLES
    for scaled in (False, True)
    if metric != "conf" or (ensemble in ("none", "comparison") and not scaled)
]


@st.composite
def tables(draw: st.DrawFn, conf: bool, models: int) -> tuple[Arrays, dict[str, float], int]:
    """Few samples and few values of logits, so that ties are common; costs that add up exactly."""
    samples = draw(st.integers(2, 9 if models == 2 else 7))
    classes = 6
    labels = draw(st.lists(st.integers(0, 2), min_size=samples - 2, max_size=samples - 2))
    arrays = {"labels": np.array([0, 1, *labels])}
    values = st.sampled_from([-1.0, 0.0, 0.5, 2.0])
    costs = {}
    for i in range(models):
        name = f"m.{i}"
        costs[name] = float(draw(st.integers(1, 5)))
        if conf and i != 1:  # a table may have both kinds
            predicted = draw(st.lists(st.integers(0, 2), min_size=samples, max_size=samples))
            stated = draw(st.lists(values, min_size=samples, max_size=samples))
            arrays[f"{name}.pred"] = np.array(predicted)
            arrays[f"{name}.conf"] = np.array(stated)
        else:
            rows = st.lists(values, min_size=classes, max_size=classes)
            logits = draw(st.lists(rows, min_size=samples, max_size=samples))
            arrays[name] = np.array(logits, draw(st.sampled_from(["f2", "f4", ">f4", "f8"])))
    return arrays, costs, draw(st.sampled_from([1] if conf else [1, 5]))


TEMPERATURES = {"m.0": 0.5, "m.1": 3.0}


def searched(
    arrays: Arrays, costs: Mapping[str, float], method: Method, top: int, longest: int, stride: int
) -> tuple[Exits, SearchResult]:
    with tempfile.TemporaryDirectory() as folder:
        table = ModelTable.open(write_table(Path(folder) / "t.npz", arrays))
        judged = judge(table, [method.signal], top=top, temperatures=TEMPERATURES)
        cascades = cascades_of(in_order(judged.of(method.signal), costs), longest)
        exits = exits_of(method, table, judged, cascades, top=top, temperatures=TEMPERATURES)
    return exits, search(exits, costs, longest=longest, stride=stride)


@pytest.mark.parametrize("longest", [2, 3])
@pytest.mark.parametrize("method", METHODS, ids=str)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_front_equals_brute_force_and_every_point_its_replay(
    data: st.DataObject, method: Method, longest: int
) -> None:
    models = data.draw(st.integers(longest, 3))
    arrays, costs, top = data.draw(tables(method.metric == "conf", models))
    exits, result = searched(arrays, costs, method, top, longest, stride=1)
    plain = PlainReference(arrays, method, top, TEMPERATURES)
    samples = len(arrays["labels"])
    outcomes = [(p.correct, pytest.approx(p.cost * samples, rel=1e-12)) for p in result.front]
    assert plain.front(costs, longest) == outcomes
    for point in result.front:
        correct, total, counts = plain.run(point.models, point.thresholds, costs)
        assert (point.correct, point.counts) == (correct, tuple(counts))
        assert point.accuracy == correct / samples
        assert point.exit_rates == tuple(count / samples for count in counts)
        assert point.cost == pytest.approx(total / samples, rel=1e-12)
        bounds = (-1e30, 1e30)
        measured = measure_cascade(exits, costs, bounds, point.models, point.thresholds)
        assert (measured.correct, measured.counts) == (correct, tuple(counts))
        assert measured.cost == pytest.approx(point.cost, rel=1e-12)


def alone(models: int, samples: int, seed: int, values: int) -> Alone:
    """Models with signals of a limited number of values."""
    generator = np.random.default_rng(seed)
    difficulty = generator.normal(size=samples)
    found = {}
    for i, skill in enumerate(np.linspace(0.2, 2, models)):
        score = skill - difficulty + 0.5 * generator.normal(size=samples)
        signal = 1 / (1 + np.exp(-np.abs(score + 0.5 * generator.normal(size=samples))))
        rounded = (signal * values).round() / values
        found[f"m{i}"] = Judgement(rounded.astype(np.float32), score > 0)
    return Alone(found)


@pytest.mark.parametrize(("samples", "values"), [(700, 10**6), (700, 60)])
@pytest.mark.parametrize("stride", [1, 10])
def test_triples_beyond_one_block_equal_a_search_over_every_cut(
    samples: int, values: int, stride: int
) -> None:
    """Bounds prune most cells here; nothing that belongs to the front may be among them."""
    exits = alone(4, samples, seed=samples + values, values=values)
    costs = {name: 3.0**i for i, name in enumerate(exits.models)}
    result = search(exits, costs, longest=3, stride=stride)
    found = [(point.correct, round(point.cost * samples, 6)) for point in result.front]
    assert any(len(point.models) == 3 for point in result.front)
    assert found == every_cut(exits, costs, stride)


def every_cut(exits: Alone, costs: Mapping[str, float], stride: int) -> list[tuple[int, float]]:
    """The front over all cascades, each second threshold solved by one cumulative sum."""
    best: dict[int, float] = {}

    def offer(correct: np.ndarray, cost: np.ndarray) -> None:
        for right, paid in zip(correct.tolist(), cost.tolist(), strict=True):
            best[right] = min(paid, best.get(right, np.inf))

    def leave(signal: np.ndarray) -> list[np.ndarray]:
        return [signal >= value for value in np.unique(signal)]

    names = list(exits.models)
    samples = len(exits.models[names[0]].correct)
    for i, a in enumerate(names):
        first = exits.models[a]
        offer(np.array([first.correct.sum()]), np.array([samples * costs[a]]))
        for j in range(i + 1, len(names)):
            b = exits.models[names[j]]
            for gone in leave(first.signal):
                right = (first.correct & gone).sum() + (b.correct & ~gone).sum()
                paid = samples * costs[a] + (~gone).sum() * costs[names[j]]
                offer(np.array([right]), np.array([paid]))
            wanted = np.sort(first.signal)[::-1][stride - 1 : samples - 1 : stride]
            order = np.argsort(-b.signal)
            ends = np.append(b.signal[order][:-1] != b.signal[order][1:], True)
            for value in np.unique(wanted):
                gone = first.signal >= value
                stays = ~gone[order]
                for name in names[j + 1 :]:
                    c = exits.models[name].correct
                    gain = np.cumsum((b.correct[order].astype(int) - c[order]) * stays)
                    correct = (first.correct & gone).sum() + (c & ~gone).sum() + gain
                    last = stays.sum() - np.cumsum(stays)
                    paid = samples * costs[a] + stays.sum() * costs[names[j]] + last * costs[name]
                    offer(correct[ends], paid[ends])
    front: list[tuple[int, float]] = []
    for correct, paid in sorted(best.items(), key=lambda one: (one[1], -one[0])):
        if not front or correct > front[-1][0]:
            front.append((correct, round(paid, 6)))
    return front


@pytest.mark.parametrize("seed", range(3))
def test_a_pair_agrees_with_the_sweep_that_chooses_thresholds_of_a_bundle(seed: int) -> None:
    exits = alone(2, 400, seed, values=100)
    (a, first), (b, last) = exits.models.items()
    costs = {a: 1.0, b: 8.0}
    table = ExitTable(first.signal[:, None], np.stack([first.correct, last.correct], 1), (0.0, 1.0))
    front = sweep(table, CostModel.from_models(costs))
    swept = [front.point(row) for row in range(len(front.cost))]
    want = {
        (p.correct, p.counts, p.thresholds)
        for p in swept
        if p.counts[1] and not (p.correct <= last.correct.sum() and p.cost >= costs[b])
    }
    found = search(exits, costs).front
    assert want == {(p.correct, p.counts, p.thresholds) for p in found if len(p.models) == 2}


@pytest.mark.parametrize("metric", confidence.METRICS)
def test_the_runtime_does_what_a_point_promises(metric: confidence.Metric) -> None:
    """A cascade of stages that answer with the table's logits, at points of the front."""
    arrays = logits_table(200, 3)
    costs = {"net.0": 1.0, "net.1": 10.0, "net.2": 300.0}
    _, result = searched(arrays, costs, Method(metric, scaled=True), 1, longest=3, stride=3)
    cascades = [point for point in result.front if len(point.models) > 1]
    assert any(len(point.models) == 3 for point in cascades)
    index = TensorSpec("image", ("batch", 1), "float32")
    images = np.arange(200, dtype=np.float32)[:, None]
    for point in cascades[:: len(cascades) // 5]:
        specs = [TensorSpec(f"{name}/logits", ("batch", 6), "float32") for name in point.models]
        cascade = Cascade(
            tuple("abcdef"),
            index,
            tuple(
                Stage(name, "saver", (index,), (spec,))
                for name, spec in zip(point.models, specs, strict=True)
            ),
            tuple(Exit(name, f"{name}/logits") for name in point.models),
        )
        functions = {
            name: lambda inputs, name=name: {
                f"{name}/logits": arrays[name][inputs["image"][:, 0].astype(int)]
            }
            for name in point.models
        }
        chosen = OperatingPoint(
            "chosen",
            metric=metric,
            thresholds=dict(zip(point.models, point.thresholds, strict=False)),
            temperatures={n: TEMPERATURES[n] for n in point.models if n in TEMPERATURES},
        )
        with Scheduler(cascade, FakeBackend(functions), chosen) as scheduler:
            predictions = scheduler.classify(images)
        right = [p.label == y for p, y in zip(predictions, arrays["labels"], strict=True)]
        assert np.mean(right) == point.accuracy
        left = [p.exit for p in predictions]
        assert tuple(left.count(name) / 200 for name in point.models) == point.exit_rates


def test_models_of_equal_cost_run_the_less_accurate_first() -> None:
    wrong, right = np.zeros(3, bool), np.ones(3, bool)
    signal = np.zeros(3, np.float32)
    models = {"good": Judgement(signal, right), "bad": Judgement(signal, wrong)}
    assert in_order(models, {"good": 1.0, "bad": 1.0}) == ["bad", "good"]
    assert in_order(models, {"good": 1.0, "bad": 2.0}) == ["good", "bad"]


def test_a_search_refuses_what_it_can_not_do() -> None:
    exits = alone(2, 10, seed=0, values=10)
    costs = dict.fromkeys(exits.models, 1.0)
    with pytest.raises(ConfigError, match="a search: got 4 models, stride 1"):
        search(exits, costs, longest=4, stride=1)
    with pytest.raises(ConfigError, match="a search: got 3 models, stride 0"):
        search(exits, costs, longest=3, stride=0)
    one = Alone({"m0": exits.models["m0"]})
    with pytest.raises(ConfigError, match="models of a search: got one, 'm0', expected >= 2"):
        search(one, costs)
