"""What ``edge-runtime thresholds`` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from calib.guarantee import Certificate
from calib.temperature import Reliability
from calib.thresholds import ByExit, Choice
from edge_runtime.console import Console, milliseconds, percent
from edge_runtime.operating_point import OperatingPoint


@dataclass(frozen=True, slots=True)
class Chosen:
    """An operating point, the choice behind it, and what to say of it."""

    point: OperatingPoint
    choice: Choice
    text: str


def show(found: Sequence[Chosen], console: Console) -> None:
    """Cross-validated figures, those of the images chosen on, and a verdict on each point."""
    _show_held_out(found, console)
    base = found[0].choice.base
    console.table(
        f"on the {sum(base.counts)} images they were chosen on; "
        f"base alone: {percent(base.accuracy)}, {milliseconds(base.cost)} ms",
        ("point", "accuracy", "mean ms", "faster", "leaving at", "thresholds"),
        [
            (
                one.point.name,
                percent(one.choice.point.accuracy),
                *_speed(one.choice),
                _thresholds(one.choice),
            )
            for one in found
        ],
    )
    for one in found:
        console.line(f"{one.point.name}: {one.text}")


def _show_held_out(found: Sequence[Chosen], console: Console) -> None:
    rows = []
    for one in found:
        held_out, base = one.choice.cross_validation, one.choice.base
        if held_out is None:
            continue
        low, high = held_out.interval
        rows.append(
            (
                one.point.name,
                f"{100 * held_out.drop:.2f} [{100 * low:.2f}, {100 * high:.2f}]",
                f"{100 * (base.accuracy - one.choice.point.accuracy):.2f}",
                percent(held_out.below),
                milliseconds(held_out.cost),
                f"{base.cost / held_out.cost:.2f}",
                _rates(one.choice.exits, held_out.exit_rates),
            )
        )
    if not rows:
        console.line(
            "Not cross-validated (--repeats 0): on new images more accuracy is lost than these "
            "figures say."
        )
        return
    console.table(
        "expected on new images (cross-validated)",
        (
            "point",
            "drop, points [95 %]",
            "in sample",
            "folds below base",
            "mean ms",
            "faster",
            "leaving at",
        ),
        rows,
    )


def show_guarantee(
    name: str, certificate: Certificate, found: Sequence[Chosen], text: str, console: Console
) -> None:
    """What the guaranteed point costs, beside the points that promise nothing, and the promise."""
    promised = 0 if certificate.base_alone else 100 * certificate.promise.epsilon
    rows = [(one.point.name, "-", *_speed(one.choice), _thresholds(one.choice)) for one in found]
    rows.append((name, f"{promised:g}", *_speed(certificate), _thresholds(certificate)))
    console.table(
        "what certainty costs",
        ("point", "promised drop, points", "mean ms", "faster", "leaving at", "thresholds"),
        rows,
    )
    beside = found[0]
    console.line(
        f"{name}: {text}\nThis takes {milliseconds(certificate.point.cost)} ms per image on "
        f"average; {beside.point.name}, which promises nothing, takes "
        f"{milliseconds(beside.choice.point.cost)} ms."
    )


def show_reliability(
    calibration: Mapping[str, Mapping[str, Reliability]],
    temperatures: Mapping[str, float],
    scaled: bool,
    console: Console,
) -> None:
    """A row per exit, where there is anything to show.

    Args:
        calibration: Exit -> "before" and perhaps "after" -> its reliability.
        temperatures: Exit -> temperature fitted on all images.
        scaled: Whether temperatures were asked for.
        console: Where to.
    """
    if not calibration:
        return
    rows = []
    for name, states in calibration.items():
        cells = [f"{states[when].nll:.4f}" for when in states]
        cells += [percent(states[when].ece) for when in states]
        if scaled:
            cells.insert(0, f"{temperatures[name]:.4g}" if name in temperatures else "1")
        rows.append((name, *cells))
    if not scaled:
        console.table("confidence of each exit", ("exit", "NLL", "ECE"), rows)
        return
    console.table(
        "confidence of each exit (after: on images that temperatures were not fitted on)",
        ("exit", "temperature", "NLL before", "after", "ECE before", "after"),
        rows,
    )
    for name in calibration:
        if name not in temperatures:
            console.line(
                f"exit {name}: these images determine no temperature (right on all, or no better "
                "than chance): it stays at 1."
            )


def _speed(figures: ByExit) -> tuple[str, str, str]:
    """Mean milliseconds, how many times faster than the base, and where samples leave."""
    return (
        milliseconds(figures.point.cost),
        f"{figures.base.cost / figures.point.cost:.2f}",
        _rates(figures.exits, figures.point.exit_rates),
    )


def _thresholds(figures: ByExit) -> str:
    return ", ".join(
        f"{name} {'never' if value is None else f'{value:.4g}'}"
        for name, value in figures.thresholds.items()
    )


def _rates(exits: tuple[str, ...], rates: tuple[float, ...]) -> str:
    return ", ".join(f"{name} {rate:.0%}" for name, rate in zip(exits, rates, strict=True))
