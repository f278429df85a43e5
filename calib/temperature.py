"""One temperature per exit, and how far to trust what an exit says of its own confidence.

The logits of an exit are divided by its temperature before they are judged. The label does not
change, the confidence does: a temperature above 1 takes back what a network overstates. All exits
then speak of confidence in the same terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime import confidence
from edge_runtime.errors import CalibrationError

#: Temperatures are looked for between these.
LOWEST, HIGHEST = 0.05, 20.0

_TOLERANCE = 1e-6
_MOST_STEPS = 60
#: Samples whose logits are looked at together.
_BLOCK = 4096

#: Gives logits, shape (n, classes), and labels, shape (n,), block by block; called once per step.
Blocks = Callable[[], Iterable[tuple[NDArray[np.floating], NDArray[np.int64]]]]


@dataclass(frozen=True)
class Reliability:
    """How the confidence of an exit compares with how often it is right.

    Attributes:
        samples: Number of samples.
        nll: Mean negative log-likelihood of the true classes, in nats.
        ece: Expected calibration error: the mean, over samples, of the distance between confidence
            and accuracy in the sample's bin; in [0, 1]. On few samples it is too large: with 15
            bins a perfectly calibrated exit shows some 0.04 on 450 samples at an accuracy of 82 %.
        counts: Samples in each bin of equal width of the confidence, shape (bins,), int64.
        confidence: Mean confidence in each bin, shape (bins,), NaN where it is empty.
        accuracy: Share of samples in each bin that are right, shape (bins,), NaN where it is empty.

    Reference:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 2.
    """

    samples: int
    nll: float
    ece: float
    counts: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def figures(self) -> dict[str, float]:
        """What a file records."""
        return {"nll": self.nll, "ece": self.ece}


class _Slope(NamedTuple):
    """First and second derivative of the mean negative log-likelihood by 1 / temperature."""

    first: float
    second: float


class _Judged(NamedTuple):
    """Per sample: confidence, whether the answer is right, negative log-likelihood; (N,) each."""

    confidence: NDArray[np.float32]
    right: NDArray[np.bool_]
    nll: NDArray[np.float64]


def fit_temperature(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> float | None:
    """The temperature that minimises the negative log-likelihood.

    Args:
        logits: Of one exit, shape (N, classes).
        labels: True class indices, shape (N,).

    Returns:
        As `fit_in_blocks`.

    Raises:
        CalibrationError: There is no sample, numbers of samples differ, a label is no class, or a
            logit is NaN or infinite.

    Reference:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 4.2.
    """
    _check(logits, labels)
    return fit_in_blocks(lambda: _blocks(logits, labels))


def fit_in_blocks(blocks: Blocks) -> float | None:
    """As `fit_temperature`, for logits that need not be in memory.

    The loss is convex in the inverse of the temperature, so that Newton's method finds its minimum
    in some six passes.

    Returns:
        The temperature, exactly representable in float32. None where the minimum is not within
        [0.05, 20]: an exit that is right everywhere would ask for 0, one that is no better than
        chance for infinity, and neither says anything about new data.
    """
    low, high, at = 1 / HIGHEST, 1 / LOWEST, 1.0
    if _slope(blocks, low).first >= 0 or _slope(blocks, high).first <= 0:
        return None
    for _ in range(_MOST_STEPS):
        first, second = _slope(blocks, at)
        low, high = (low, at) if first > 0 else (at, high)
        following = at - first / second if second > 0 else low
        if not low < following < high:
            following = (low * high) ** 0.5
        done = abs(following - at) <= _TOLERANCE * at
        at = following
        if done:
            break
    return float(np.float32(1 / at))


def fit_temperatures(
    logits: Mapping[str, NDArray[np.floating]], labels: NDArray[np.int64]
) -> dict[str, float]:
    """Temperatures by exit; without the exits for which the data determines none.

    Args:
        logits: Exit name -> logits, shape (N, classes).
        labels: True class indices, shape (N,).

    Raises:
        CalibrationError: As `fit_temperature`.
    """
    fitted = {name: fit_temperature(values, labels) for name, values in logits.items()}
    return {name: value for name, value in fitted.items() if value is not None}


def reliability(
    logits: NDArray[np.floating],
    labels: NDArray[np.int64],
    temperature: float = 1.0,
    bins: int = 15,
) -> Reliability:
    """How an exit's confidence compares with its accuracy, at a given temperature.

    Args:
        logits: Shape (N, classes).
        labels: True class indices, shape (N,).
        temperature: Must not be fitted to these samples, or the figures flatter.
        bins: Number of bins.

    Raises:
        CalibrationError: As `fit_temperature`.
    """
    _check(logits, labels)
    return _summary(_judge(logits, labels, temperature), bins)


def held_out_reliability(
    logits: NDArray[np.floating],
    labels: NDArray[np.int64],
    folds: int = 5,
    seed: int = 0,
    bins: int = 15,
) -> Reliability:
    """The same with temperatures that have not seen the samples: cross-validated.

    Args:
        logits: Shape (N, classes).
        labels: True class indices, shape (N,).
        folds: Each is judged at the temperature of all others; where those determine none, at 1.
        seed: Seed of the folds.
        bins: Number of bins.

    Raises:
        CalibrationError: As `fit_temperature`, or there are fewer samples than folds.
    """
    _check(logits, labels)
    if len(labels) < folds:
        raise CalibrationError(
            f"samples for {folds} folds", got=len(labels), expected=f">= {folds}"
        )
    fold_of = np.random.default_rng(seed).permutation(np.arange(len(labels)) % folds)
    parts = []
    for fold in range(folds):
        seen, unseen = fold_of != fold, fold_of == fold
        fitted = fit_temperature(logits[seen], labels[seen]) or 1.0
        parts.append(_judge(logits[unseen], labels[unseen], fitted))
    together = (np.concatenate(part) for part in zip(*parts, strict=True))
    return _summary(_Judged(*together), bins)


def _judge(logits: NDArray[np.floating], labels: NDArray[np.int64], temperature: float) -> _Judged:
    parts = []
    for values, truth in _blocks(logits, labels):
        decision = confidence.decide(values, "max_softmax", temperature)
        answers, certainty = np.asarray(decision.labels), np.asarray(decision.confidence)
        # Confidence is the softmax of the largest logit; the true one lies this much below it.
        below = _true_logit(values, truth) - values.max(axis=1)
        nll = -np.log(certainty.astype(np.float64)) - below / temperature
        parts.append(_Judged(certainty, answers == truth, nll))
    together = (np.concatenate(part) for part in zip(*parts, strict=True))
    return _Judged(*together)


def _summary(judged: _Judged, bins: int) -> Reliability:
    samples = len(judged.right)
    # The bins are (0, 1 / bins], (1 / bins, 2 / bins], ... as in the paper.
    at = np.ceil(judged.confidence.astype(np.float64) * bins).astype(np.int64).clip(1, bins) - 1
    counts = np.bincount(at, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(at, judged.confidence, bins) / counts
        accuracy = np.bincount(at, judged.right, bins) / counts
    return Reliability(
        samples=samples,
        nll=float(judged.nll.mean()),
        ece=float(np.nansum(counts * np.abs(mean - accuracy)) / samples),
        counts=counts,
        confidence=mean,
        accuracy=accuracy,
    )


def _slope(blocks: Blocks, inverse: float) -> _Slope:
    first = second = 0.0
    samples = 0
    for logits, labels in blocks():
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        weight = np.exp(shifted * inverse)
        total = weight.sum(axis=1)
        mean = np.einsum("ij,ij->i", weight, shifted) / total
        square = np.einsum("ij,ij,ij->i", weight, shifted, shifted) / total
        first += float((mean - _true_logit(shifted, labels)).sum())
        second += float((square - mean * mean).sum())
        samples += len(labels)
    return _Slope(first / samples, second / samples)


def _true_logit(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """The logit of the true class, shape (N,)."""
    return logits[np.arange(len(labels)), labels].astype(np.float64)


def _blocks(
    logits: NDArray[np.floating], labels: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.floating], NDArray[np.int64]]]:
    for begin in range(0, len(labels), _BLOCK):
        rows = slice(begin, begin + _BLOCK)
        yield logits[rows], labels[rows]


def _check(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> None:
    """Refuse what no temperature can be fitted to."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not logits.size:
        raise CalibrationError(
            "logits of an exit and labels",
            got=f"{logits.shape} and {labels.shape}",
            expected="(samples, classes) and (samples,), at least one sample",
        )
    bad = ~((labels >= 0) & (labels < logits.shape[1]))
    if bad.any():
        sample = int(bad.argmax())
        raise CalibrationError(
            f"the label of sample {sample}",
            got=labels[sample],
            expected=f"a class index from 0 to {logits.shape[1] - 1}",
        )
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        raise CalibrationError(f"a logit of sample {int(finite.argmin())} is NaN or infinite")
