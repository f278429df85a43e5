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

_LARGEST = float(np.finfo(np.float32).max)


class Decision(NamedTuple):
    """What one exit says: of a batch as arrays, of one sample as numpy scalars.

    Attributes:
        labels: Index of the largest logit, shape (batch,) or (), int64; the lowest wins a tie.
        signal: Confidence by the chosen metric, shape (batch,) or (), float32.
        confidence: Largest softmax probability, shape (batch,) or (), float32, in [1 / classes, 1].
    """

    labels: NDArray[np.int64] | np.int64
    signal: NDArray[np.float32] | np.float32
    confidence: NDArray[np.float32] | np.float32


def decide(logits: NDArray[np.floating], metric: Metric, temperature: float = 1.0) -> Decision:
    """Judge the logits of one exit.

    One sample is the case that counts on a robot. After a stage has evicted the caches, every call
    into numpy costs some ten microseconds there, so this makes few of them.

    Args:
        logits: Shape (batch, classes), or (classes,) for one sample; float32 or float16.
        metric: The signal: "max_softmax"; "entropy" (the *negative* Shannon entropy, in nats);
            "softmax_margin" and "logits_margin" (largest minus second largest).
        temperature: Logits are divided by it first; > 0. Labels do not depend on it.

    Returns:
        Labels, signal and confidence of each sample, bit for bit the same in a batch and alone.

    Raises:
        BackendError: A logit is NaN or infinite, or logits differ by more than float32 holds.

    Reference:
        Lebovitz et al., Efficient Inference With Model Cascades, TMLR 2023, section 3.
    """
    values = logits if logits.dtype == np.float32 else logits.astype(np.float32)
    labels = values.argmax(axis=-1)
    lowest = values.argmin(axis=-1)
    if values.ndim == 1:
        top = values.item(labels)
        if not _fits(top - values.item(lowest), temperature):
            raise not_finite(0)
        shifted = np.subtract(values, top)
    else:
        rows = np.arange(len(values))
        tops = values[rows, labels]
        for sample, low in enumerate(values[rows, lowest].tolist()):
            if not _fits(tops.item(sample) - low, temperature):
                raise not_finite(sample)
        shifted = values - tops[:, None]
    if temperature != 1.0:
        shifted /= np.float32(temperature)
    exponent = np.exp(shifted)
    total = np.add.reduce(exponent, axis=-1)
    confidence = np.float32(1) / total
    if metric == "max_softmax":
        signal = confidence
    elif metric == "entropy":
        signal = np.add.reduce(exponent * shifted, axis=-1) / total - np.log(total)
    else:
        second = np.partition(shifted, -2, axis=-1)[..., -2]
        signal = -second if metric == "logits_margin" else (1 - np.exp(second)) / total
    return Decision(labels, signal, confidence)


def probabilities(logits: NDArray[np.floating]) -> NDArray[np.float32]:
    """Softmax of logits, shape (..., classes), float32."""
    largest = np.maximum.reduce(logits, axis=-1, keepdims=True)
    exponent: NDArray[np.float32] = np.exp(np.subtract(logits, largest, dtype=np.float32))
    exponent /= np.add.reduce(exponent, axis=-1, keepdims=True)
    return exponent


def _fits(spread: float, temperature: float) -> bool:
    """Whether all logits of a sample are finite and float32 holds their softmax.

    The spread is a Python float, which says nothing of inf - inf: a NaN or infinity anywhere
    makes the comparison false.
    """
    return spread <= _LARGEST and spread / temperature <= _LARGEST


def not_finite(sample: int) -> BackendError:
    """The error for logits of a sample that are no numbers."""
    return BackendError(
        f"the logits of sample {sample} of the batch are NaN, infinite or beyond float32's range",
        remedy="The model overflows on this image: a stage at higher precision may mend it",
    )


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
    return 0.0, 1.0 if metric == "softmax_margin" else _LARGEST
