"""Signals, correctness and means of a table, against their definitions in float64."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from calib.cascade_search.exits import Mean, MostConfident
from calib.cascade_search.means import mean_exits
from calib.cascade_search.methods import COMPARED, Method
from calib.cascade_search.signals import (
    METRICS,
    Judgement,
    Signal,
    judge,
    judge_values,
    right_answers,
)
from calib.model_table import ModelTable
from edge_runtime.errors import ConfigError
from tests.calib.model_tables import Arrays, logits_table, write_table

TEMPERATURE = 1.7


def softmax(logits: np.ndarray) -> np.ndarray:
    weight = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return weight / weight.sum(axis=1, keepdims=True)


def expected(logits: np.ndarray, metric: str) -> np.ndarray:
    share = np.sort(softmax(logits), axis=1)[:, ::-1]
    if metric == "entropy":
        return (share * np.log(share)).sum(axis=1)
    if metric == "softmax_margin":
        return share[:, 0] - share[:, 1]
    if metric == "logits_margin":
        ordered = np.sort(logits.astype(np.float64), axis=1)
        return ordered[:, -1] - ordered[:, -2]
    return share[:, :5].sum(axis=1) if metric == "top5_sum" else share[:, 0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scaled", [False, True])
def test_signals_of_a_table(tmp_path: Path, metric, scaled: bool) -> None:
    arrays = logits_table(700, 2, classes=30)
    table = ModelTable.open(write_table(tmp_path / "t.npz", arrays))
    signal = Signal(metric, scaled)
    judged = judge(table, [signal], temperatures={"net.1": TEMPERATURE})
    low, high = judged.bounds(metric)
    for name, temperature in (("net.0", 1.0), ("net.1", TEMPERATURE if scaled else 1.0)):
        values = judged.signals[signal][name]
        assert values == pytest.approx(expected(arrays[name] / temperature, metric), abs=3e-6)
        assert values.min() >= low and values.max() <= high
        assert (
            judged.correct[name].tolist()
            == (arrays[name].argmax(axis=1) == arrays["labels"]).tolist()
        )
        rows = [judge_values(arrays[name][i : i + 1], metric, temperature)[0] for i in range(50)]
        assert values[:50].tolist() == rows


def test_the_label_among_five_largest_with_ties_by_index() -> None:
    values = np.array([[1, 1, 1, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6]], np.float32)
    for label, right in ((4, [True, True]), (5, [False, True]), (1, [True, False])):
        assert right_answers(values, np.array([label] * 2), 5).tolist() == right
    assert right_answers(values, np.array([0, 6]), 1).tolist() == [True, True]
    assert right_answers(values, np.array([1, 5]), 1).tolist() == [False, False]


@pytest.mark.parametrize("softmax_mean", [False, True])
@pytest.mark.parametrize("metric", METRICS[:5])
@pytest.mark.parametrize("top", [1, 5])
def test_means_of_two_and_three_models(tmp_path: Path, softmax_mean, metric, top) -> None:
    arrays = logits_table(300, 3, classes=9)
    table = ModelTable.open(write_table(tmp_path / "t.npz", arrays))
    temperatures = {"net.0": 2.0, "net.2": 0.7}
    models = judge(table, [Signal(metric, True)], temperatures=temperatures).of(
        Signal(metric, True)
    )
    cascades = [("net.0", "net.1"), ("net.0", "net.2"), ("net.0", "net.1", "net.2")]
    exits = mean_exits(
        table,
        models,
        cascades,
        softmax=softmax_mean,
        metric=metric,
        top=top,
        temperatures=temperatures,
    )
    for cascade in cascades:
        values = [arrays[name] / temperatures.get(name, 1.0) for name in cascade]
        if softmax_mean:
            values = [softmax(one) for one in values]
        mean = np.mean(values, axis=0, dtype=np.float64)
        best = np.argsort(-mean, axis=1, kind="stable")[:, :top]
        right = (best == arrays["labels"][:, None]).any(axis=1)
        judgement = exits.after(cascade)
        assert judgement.correct.tolist() == right.tolist()
        if cascade == ("net.0", "net.1"):
            logits = np.log(mean) if softmax_mean else mean
            assert judgement.signal == pytest.approx(expected(logits, metric), abs=5e-6)
    assert exits.after(("net.1",)) is models["net.1"]
    part = exits.rows(np.arange(5, 20))
    assert isinstance(part, Mean)
    assert part.after(cascades[2]).correct.tolist() == (
        exits.after(cascades[2]).correct[5:20].tolist()
    )


def test_the_most_confident_of_three_wins_and_the_last_of_equals() -> None:
    def said(signal: list[float], correct: list[int]) -> Judgement:
        return Judgement(np.array(signal, np.float32), np.array(correct, bool))

    exits = MostConfident(
        {
            "a": said([0.9, 0.5, 0.5, 0.2], [1, 1, 0, 0]),
            "b": said([0.5, 0.9, 0.5, 0.2], [0, 1, 1, 0]),
            "c": said([0.4, 0.4, 0.4, 0.2], [0, 0, 0, 1]),
        }
    )
    two, three = exits.after(("a", "b")), exits.after(("a", "b", "c"))
    assert two.signal.tolist() == np.float32([0.9, 0.9, 0.5, 0.2]).tolist()
    assert two.correct.tolist() == [True, True, True, False]
    assert three.correct.tolist() == [True, True, True, True]


def test_the_twelve_methods() -> None:
    assert [str(method) for method in COMPARED] == [
        "max_softmax",
        "entropy",
        "softmax_margin",
        "logits_margin",
        "comparison by max_softmax, TS",
        "comparison by entropy, TS",
        "comparison by softmax_margin, TS",
        "comparison by logits_margin, TS",
        "mean_logits by max_softmax",
        "mean_logits by max_softmax, TS",
        "mean_softmax by max_softmax",
        "mean_softmax by max_softmax, TS",
    ]


@pytest.mark.parametrize(
    ("method", "top", "message"),
    [
        (Method("entropy"), 1, "the model 'p' has no logits. It can only be searched with --metr"),
        (Method("conf", scaled=True), 1, "'p' has no logits. It can only be searched without a"),
        (Method("conf"), 5, "'p' has no logits. Its top-5 accuracy is not known"),
        (Method("conf", "mean_logits"), 1, "'p' has no logits. mean_logits needs them"),
        (Method("top5_sum"), 1, "classes for the five largest of them: got 5, expected more"),
        (Method("max_softmax"), 5, "classes for the five largest of them: got 5, expected more"),
    ],
)
def test_what_a_table_can_not_be_judged_by(
    tmp_path: Path, method: Method, top: int, message: str
) -> None:
    arrays: Arrays = logits_table(4, 1, classes=6 if "'p'" in message else 5)
    arrays |= {"p.pred": np.zeros(4, int), "p.conf": np.zeros(4)}
    table = ModelTable.open(write_table(tmp_path / "t.npz", arrays))
    with pytest.raises(ConfigError, match=re.escape(message)):
        method.check(table)
        judge(table, [method.signal], top=top)


def test_logits_that_float32_can_not_tell_apart(tmp_path: Path) -> None:
    arrays = logits_table(4, 2)
    arrays["net.1"][2, :2] = (3e38, -3e38)
    table = ModelTable.open(write_table(tmp_path / "t.npz", arrays))
    with pytest.raises(ConfigError, match=r"array 'net.1', rows 0..3: in one of them logits diff"):
        judge(table, [Method().signal])
