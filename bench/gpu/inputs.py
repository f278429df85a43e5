"""Images and operating points that are hard to agree on, for the check that all modes do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.gpu import kernel_stages
from edge_runtime import confidence
from edge_runtime.cascade import Cascade
from edge_runtime.confidence import METRICS, Metric, bounds
from edge_runtime.errors import BackendError
from edge_runtime.operating_point import OperatingPoint

#: Makes the logits of all exits, shape (rows, classes), float64.
_Kind = Callable[[np.random.Generator, int, int], NDArray[np.float64]]

#: Temperatures that the points with thresholds use.
_TEMPERATURES = (1.0, 0.75, 1.5)


def _random(random: np.random.Generator, rows: int, classes: int) -> NDArray[np.float64]:
    return random.standard_normal((rows, classes)) * float(random.choice([0.1, 1.0, 3.0, 10.0]))


def _all_equal(random: np.random.Generator, rows: int, classes: int) -> NDArray[np.float64]:
    return np.full((rows, classes), random.choice([0.0, -0.0, 7.5, -7.5]))


def _two_best(random: np.random.Generator, rows: int, classes: int) -> NDArray[np.float64]:
    logits = np.round(random.standard_normal((rows, classes)), 1)
    for row in logits:
        row[random.choice(classes, 2, replace=False)] = row.max() + 1
    return logits


def _certain(random: np.random.Generator, rows: int, classes: int) -> NDArray[np.float64]:
    logits = random.standard_normal((rows, classes))
    logits[np.arange(rows), random.integers(0, classes, rows)] = 2000
    return logits


def _same_label(random: np.random.Generator, rows: int, classes: int) -> NDArray[np.float64]:
    logits = random.standard_normal((rows, classes))
    logits[:, random.integers(classes)] += 4
    return logits


def _signed_zeros(random: np.random.Generator, rows: int, classes: int) -> NDArray[np.float64]:
    return np.where(random.random((rows, classes)) < 0.5, 0.0, -0.0)


def _tiny(random: np.random.Generator, rows: int, classes: int) -> NDArray[np.float64]:
    """Below the smallest normal number of float16 and, every second time, of float32."""
    return random.standard_normal((rows, classes)) * float(random.choice([1e-6, 1e-40]))


def _large(random: np.random.Generator, rows: int, classes: int) -> NDArray[np.float64]:
    return random.choice([-30000.0, 0.0, 30000.0], (rows, classes))


def _beyond(random: np.random.Generator, rows: int, classes: int) -> NDArray[np.float64]:
    """One exit's logits differ by more than float32 holds; float16 has no such numbers."""
    logits = random.standard_normal((rows, classes))
    logits[random.integers(rows), :2] = 3e38, -3e38
    return logits


def _one_nan(random: np.random.Generator, rows: int, classes: int) -> NDArray[np.float64]:
    logits = random.standard_normal((rows, classes))
    logits[random.integers(rows), random.integers(classes)] = kernel_stages.NAN
    return logits


def _only_nan(random: np.random.Generator, rows: int, classes: int) -> NDArray[np.float64]:
    logits = random.standard_normal((rows, classes))
    logits[random.integers(rows) :] = kernel_stages.NAN
    return logits


ADVERSARIAL: dict[str, _Kind] = {
    "all logits equal": _all_equal,
    "two best": _two_best,
    "certain": _certain,
    "same label at every exit": _same_label,
    "signed zeros": _signed_zeros,
    "tiny": _tiny,
    "large": _large,
    "beyond float32": _beyond,
    "one NaN": _one_nan,
    "only NaN": _only_nan,
}


def hard_images(of: Cascade, count: int, *, seed: int = 0) -> NDArray[Any]:
    """Two thirds random, one third adversarial, mixed; shape (count, rows, classes)."""
    random = np.random.default_rng(seed)
    rows, classes = of.image.sample_shape()
    kinds = list(ADVERSARIAL.values())
    if of.image.dtype == "float16":
        kinds.remove(_beyond)
    made = [
        (kinds[i // 3 % len(kinds)] if i % 3 == 0 else _random)(random, rows, classes)
        for i in range(count)
    ]
    return np.stack(made)[random.permutation(count)].astype(of.image.dtype)


def operating_points(of: Cascade, images: NDArray[Any]) -> Iterator[OperatingPoint]:
    """Every metric and policy, with thresholds at 0, at 1, in between and certain to fire."""
    names = [exit_.name for exit_ in of.exits[:-1]]
    temperatures = dict(zip(names, _TEMPERATURES, strict=False))
    for metric in METRICS:
        lowest, highest = bounds(metric, len(of.classes))
        middle = {
            name: _middle(images, k, metric, temperatures.get(name, 1.0))
            for k, name in enumerate(names)
        }
        every: dict[str, dict[str, float | None]] = {
            "middle": dict(middle),
            "zero": dict.fromkeys(names, 0.0),
            "one": dict.fromkeys(names, min(highest, 1.0)),
            "certain": {**middle, names[-1]: lowest},
            "without-the-first": {**middle, names[0]: None},
        }
        for name, thresholds in every.items():
            yield OperatingPoint(
                f"{metric}-{name}",
                metric=metric,
                thresholds=thresholds,
                temperatures=temperatures if name == "middle" else {},
            )
        for patience in (1, 2, len(names)):
            yield OperatingPoint(
                f"{metric}-confident-{patience}-times",
                policy="patient_and_confident",
                metric=metric,
                thresholds=dict(middle),
                patience=patience,
            )
    for patience in (1, 2):
        yield OperatingPoint(f"patience-{patience}", policy="patience", patience=patience)
    yield OperatingPoint("never", policy="never")


def _middle(images: NDArray[Any], exit: int, metric: Metric, temperature: float) -> float:
    """A threshold that about half of the images reach."""
    signals = [
        judged.signal
        for image in images
        if (judged := judge(image, exit, metric, temperature)) is not None
    ]
    return float(np.median(signals)) if signals else 0.5


def judge(
    image: NDArray[Any], exit: int, metric: Metric, temperature: float
) -> confidence.Decision | None:
    """What numpy says of an exit; None where its logits are not finite."""
    try:
        return confidence.decide(kernel_stages.logits(image, exit), metric, temperature)
    except BackendError:
        return None


@dataclass(frozen=True)
class ExactCase:
    """Thresholds that stand on an image's own signals, or one step above them.

    Attributes:
        image: Index of the image.
        point: The thresholds.
        exit: Where the image must leave.
    """

    image: int
    point: OperatingPoint
    exit: str


def exact_cases(
    of: Cascade, signals: dict[int, list[float]], metric: Metric
) -> Iterator[ExactCase]:
    """Cases that a comparison of another kind, or of other signals, decides otherwise.

    Args:
        of: The cascade.
        signals: Index of an image -> the device's own signal at each exit but the last.
        metric: Of the signals.
    """
    lowest, highest = bounds(metric, len(of.classes))
    names = [exit_.name for exit_ in of.exits]
    for number, (image, own) in enumerate(signals.items()):
        with np.errstate(over="ignore"):
            above = [float(np.nextafter(np.float32(s), np.float32(np.inf))) for s in own]
        # Such thresholds would prune exits: the cascade had to be opened anew.
        if max(above) > highest or min(own) <= lowest:
            continue
        k = number % len(own)
        for equal, exit_ in ((True, names[k]), (False, names[-1])):
            thresholds: dict[str, float | None] = dict(zip(names, above, strict=False))
            if equal:
                thresholds[names[k]] = own[k]
            yield ExactCase(
                image,
                OperatingPoint(
                    f"{metric}-{'on' if equal else 'above'}-the-signal",
                    metric=metric,
                    thresholds=thresholds,
                ),
                exit_,
            )
