"""How confident an exit is: signals from logits, and the decision record made of them.

Every signal is higher when the model is more confident, so an exit leaves when signal >= threshold.
This is the numpy form of `decide`; a backend that decides on a device follows it number by number.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import BackendError

Metric = Literal["max_softmax", "entropy", "softmax_margin", "logits_margin"]
METRICS: tuple[Metric, ...] = get_args(Metric)


class Decision(NamedTuple):
    """What one exit says about a batch.

    Attributes:
        labels: Index of the largest logit, shape (batch,), int64; the lowest index wins a tie.
        signal: Confidence by the chosen metric, shape (batch,), float32.
        confidence: Largest softmax probability, shape (batch,), float32, in [1 / classes, 1].
    """

    labels: NDArray[np.int64]
    signal: NDArray[np.float32]
    confidence: NDArray[np.float32]


def decide(logits: NDArray[np.floating], metric: Metric, temperature: float = 1.0) -> Decision:
    """Judge the logits of one exit.

    Args:
        logits: Shape (batch, classes), float32 or float16.
        metric: The signal: "max_softmax"; "entropy" (the *negative* Shannon entropy, in nats);
            "softmax_margin" and "logits_margin" (largest minus second largest).
        temperature: Logits are divided by it first; > 0. Labels do not depend on it.

    Returns:
        Labels, signal and confidence of each sample.

    Raises:
        BackendError: A logit is NaN or infinite, or logits differ by more than float32 holds.

    Reference:
        Lebovitz et al., Efficient Inference With Model Cascades, TMLR 2023, section 3.
    """
    scaled = logits.astype(np.float32, copy=False)
    # Before the division, whose rounding may make two logits equal.
    labels = scaled.argmax(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        if temperature != 1.0:
            scaled = scaled / np.float32(temperature)
        shifted = scaled - scaled.max(axis=1, keepdims=True)
    # One look catches everything: a NaN or +inf makes its whole row NaN, a -inf stays, and so does
    # a difference that float32 can't hold.
    if not np.isfinite(shifted).all():
        bad = int(np.flatnonzero(~np.isfinite(shifted).all(axis=1))[0])
        raise BackendError(
            f"the logits of sample {bad} of the batch are NaN, infinite or beyond float32's range",
            remedy="The model overflows on this image: a stage at higher precision may mend it",
        )
    exponent = np.exp(shifted)
    total = exponent.sum(axis=1)
    confidence = np.float32(1) / total
    if metric == "max_softmax":
        signal = confidence
    elif metric == "entropy":
        signal = (exponent * shifted).sum(axis=1) / total - np.log(total)
    else:
        top = np.partition(shifted, -2, axis=1)[:, -2]
        signal = -top if metric == "logits_margin" else (1 - np.exp(top)) / total
    return Decision(labels, signal, confidence)


def bounds(metric: Metric, classes: int) -> tuple[float, float]:
    """The smallest and largest value that a signal can take.

    Args:
        metric: The signal.
        classes: Number of classes, >= 2.

    Returns:
        (lowest, highest): a threshold <= lowest always fires, one > highest never does.
    """
    if metric == "max_softmax":
        return 0.0, 1.0
    if metric == "entropy":
        # Rounding may carry a uniform distribution a little below -ln(classes).
        return -math.log(classes) - 1e-3, 0.0
    return 0.0, 1.0 if metric == "softmax_margin" else float(np.finfo(np.float32).max)
