"""What each model of a table says of each sample by itself: is it right, and how confident is it.

Signals are those of the runtime (`edge_runtime.confidence`), bit for bit, and two that only tables
have: the sum of the five largest softmax probabilities, and the confidence that a predictor without
logits states itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from calib.model_table import ModelTable
from edge_runtime import confidence
from edge_runtime.errors import BackendError, ConfigError

Metric = Literal["max_softmax", "entropy", "softmax_margin", "logits_margin", "top5_sum", "conf"]
METRICS: tuple[Metric, ...] = get_args(Metric)

_LARGEST = float(np.finfo(np.float32).max)


class Signal(NamedTuple):
    """A kind of signal.

    Attributes:
        metric: How confidence is measured.
        scaled: Whether logits are divided by the model's temperature first.
    """

    metric: Metric
    scaled: bool


class Judgement(NamedTuple):
    """What an exit says of every sample.

    Attributes:
        signal: Its confidence, shape (N,), float32, finite.
        correct: Whether its answer is right, shape (N,), bool.
    """

    signal: NDArray[np.float32]
    correct: NDArray[np.bool_]


@dataclass(frozen=True)
class JudgedModels:
    """What each model says by itself.

    Attributes:
        correct: Model -> whether it is right, shape (N,), bool.
        signals: Kind of signal -> model -> its values, shape (N,), float32.
        classes: Number of classes, None where no model has logits.
    """

    correct: Mapping[str, NDArray[np.bool_]]
    signals: Mapping[Signal, Mapping[str, NDArray[np.float32]]]
    classes: int | None

    def of(self, signal: Signal) -> dict[str, Judgement]:
        """All models by one kind of signal."""
        return {
            name: Judgement(self.signals[signal][name], correct)
            for name, correct in self.correct.items()
        }

    def bounds(self, metric: Metric) -> tuple[float, float]:
        """The smallest and largest value that a signal can take."""
        return bounds(metric, self.classes)


def judge(
    table: ModelTable,
    signals: Sequence[Signal],
    *,
    top: int = 1,
    temperatures: Mapping[str, float] | None = None,
    judged: Callable[[], None] = lambda: None,
) -> JudgedModels:
    """Reduce a table to what a search needs, in one pass over the logits of each model.

    Args:
        table: The predictions.
        signals: Kinds of signal that are wanted.
        top: A model is right where the label is among so many of its largest logits: 1 or 5.
        temperatures: Model -> temperature, for scaled signals.
        judged: Called after each model.

    Returns:
        Correctness and signals of every model.

    Raises:
        ConfigError: As `check_metrics`, an array can't be read, or a number in it is NaN or
            infinite; the message names array and row.
    """
    check_metrics(table, signals, top)
    correct: dict[str, NDArray[np.bool_]] = {}
    found: dict[Signal, dict[str, NDArray[np.float32]]] = {signal: {} for signal in signals}
    for name in table.names:
        if name in table.with_logits:
            correct[name], values = _judge_logits(
                table, name, signals, top, (temperatures or {}).get(name, 1.0)
            )
        else:
            predicted, stated = table.predictions(name)
            correct[name], values = predicted == table.labels, [stated] * len(signals)
        for signal, of_model in zip(signals, values, strict=True):
            found[signal][name] = of_model
        judged()
    return JudgedModels(correct, found, table.classes)


def check_metrics(table: ModelTable, signals: Sequence[Signal], top: int) -> None:
    """Refuse kinds of signal, or an answer of five classes, that a table does not support.

    Raises:
        ConfigError: A model lacks logits that are needed, or there are too few classes.
    """
    few = table.classes is not None and table.classes <= 5
    if few and (top == 5 or any(signal.metric == "top5_sum" for signal in signals)):
        raise ConfigError(
            "classes for the five largest of them", got=table.classes, expected="more than 5"
        )
    for name in table.names:
        if name in table.with_logits:
            continue
        where = f"table {table.path}: the model {name!r} has no logits"
        if top != 1:
            raise ConfigError(where, remedy=f"Its top-{top} accuracy is not known: use --top 1")
        for signal in signals:
            if signal.metric != "conf" or signal.scaled:
                how = "without a temperature" if signal.metric == "conf" else "with --metric conf"
                raise ConfigError(where, remedy=f"It can only be searched {how}")


def judge_values(
    logits: NDArray[np.float32], metric: Metric, temperature: float = 1.0
) -> NDArray[np.float32]:
    """The signal of some samples.

    Args:
        logits: Shape (n, K), float32, finite.
        metric: The signal; "conf" of logits is their largest softmax probability, which the
            runtime calls confidence.
        temperature: Logits are divided by it first.

    Returns:
        Shape (n,), float32, bit for bit the same in a block and alone.

    Raises:
        BackendError: Logits differ by more than float32 holds.
    """
    if metric == "top5_sum":
        return _top5_sum(logits, temperature)
    runtime: confidence.Metric = "max_softmax" if metric == "conf" else metric
    return np.asarray(confidence.decide(logits, runtime, temperature).signal)


def right_answers(
    values: NDArray[np.float32], labels: NDArray[np.int64], top: int
) -> NDArray[np.bool_]:
    """Whether the label is among the `top` largest values; of equal ones the lowest index counts.

    Args:
        values: Logits or probabilities, shape (n, K).
        labels: True class indices, shape (n,).
        top: 1 or 5.

    Returns:
        Shape (n,), bool.
    """
    if top == 1:
        first: NDArray[np.bool_] = values.argmax(axis=1) == labels
        return first
    own = values[np.arange(len(labels)), labels][:, None]
    before = np.arange(values.shape[1]) < labels[:, None]
    ahead = (values > own) | ((values == own) & before)
    among: NDArray[np.bool_] = np.count_nonzero(ahead, axis=1) < top
    return among


def bounds(metric: Metric, classes: int | None) -> tuple[float, float]:
    """The smallest and largest value that a signal can take.

    Args:
        metric: The signal.
        classes: Number of classes, None where no model has logits.
    """
    if metric == "conf" or classes is None:
        return -_LARGEST, _LARGEST
    if metric == "top5_sum":
        return 0.0, 1.0
    return confidence.bounds(metric, classes)


def _judge_logits(
    table: ModelTable, name: str, signals: Sequence[Signal], top: int, temperature: float
) -> tuple[NDArray[np.bool_], list[NDArray[np.float32]]]:
    correct = np.empty(len(table), bool)
    found = [np.empty(len(table), np.float32) for _ in signals]
    begin = 0
    for logits in table.logits(name):
        rows = slice(begin, begin + len(logits))
        correct[rows] = right_answers(logits, table.labels[rows], top)
        try:
            for values, signal in zip(found, signals, strict=True):
                own = temperature if signal.scaled else 1.0
                values[rows] = judge_values(logits, signal.metric, own)
        except BackendError as error:
            raise ConfigError(
                f"table {table.path}: array {name!r}, rows {begin}..{rows.stop - 1}: in one of "
                "them logits differ by more than float32 holds"
            ) from error
        begin = rows.stop
    return correct, found


def _top5_sum(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        shifted = logits - logits.max(axis=1, keepdims=True)
        if temperature != 1.0:
            shifted /= np.float32(temperature)
    exponent = np.exp(shifted)
    total = np.add.reduce(exponent, axis=1)
    largest = np.sort(np.partition(exponent, -5, axis=1)[:, -5:], axis=1)
    # Rounding may carry the sum above all of it.
    share: NDArray[np.float32] = np.minimum(np.add.reduce(largest, axis=1) / total, np.float32(1))
    return share
