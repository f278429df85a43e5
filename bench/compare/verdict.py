"""What a comparison says, in words."""

from __future__ import annotations

from collections.abc import Sequence

from bench.compare.ratios import quotient, ratio_of_means, ratio_of_runs, value_of
from bench.result import BLOCK, Distribution, Energy, Result
from edge_runtime.console import percent
from edge_runtime.timing import Ratio

#: Accuracies that differ by less are called the same: what one decimal of a percent shows.
_SAME_ACCURACY = 0.0005
#: Ratios of exits that lie closer together than this factor are called about the same.
_SAME_RATIO = 1.1
_FRAME = "cascade"


def verdicts(results: Sequence[Result]) -> tuple[str, ...]:
    """A sentence per result on how it compares with the first, and one per unstable result."""
    first = results[0]
    said = [_verdict(result, first) for result in results[1:]]
    if len({result.images for result in results}) > 1:
        seen = ", ".join(f"{result.name} {result.images}" for result in results)
        said.append(f"The runs got through different numbers of images: {seen}.")
    for result in results:
        if result.unstable:
            said.append(f"{result.name} was unstable: {'; '.join(result.unstable)}.")
    return tuple(said)


def frame_energy(result: Result, reader: str | None = None) -> tuple[str, float] | None:
    """The reader and the joules per frame of the cascade.

    Args:
        result: Of the bench.
        reader: The reader that is asked for; the first that told it where None.
    """
    for energy in result.energy:
        joules = _joules(energy)
        if joules is not None and reader in (None, energy.reader):
            return energy.reader, joules
    return None


def common_reader(results: Sequence[Result]) -> str | None:
    """The first reader that told the energy of a frame in every result."""
    for energy in results[0].energy:
        if all(frame_energy(result, energy.reader) for result in results):
            return energy.reader
    return None


def _joules(energy: Energy) -> float | None:
    found = energy.of(_FRAME)
    return found.joules_per_frame if found else None


def _verdict(one: Result, first: Result) -> str:
    ratio = ratio_of_runs(one, first)
    if ratio is None:
        return f"{one.name} and {first.name}: times can't be compared."
    parts = [f"{_time(one.name, first.name, ratio)}{_accuracy(one, first)}"]
    energy = _energy(one, first)
    if energy is not None:
        parts.append(f"it needs {energy}")
    exits = _exits(one, first)
    if exits is not None:
        parts.append(exits)
    return "; ".join(parts) + "."


def _time(one: str, first: str, ratio: Ratio | float) -> str:
    shown = _shown(ratio)
    if isinstance(ratio, Ratio) and ratio.low <= 1 <= ratio.high:
        return f"{one} and {first} take the same time per frame, as far as can be told: {shown}"
    if (value_of(ratio) or 0) < 1:
        return f"{one} takes {shown} of {first}'s time per frame"
    return f"{one} takes {shown} times as long per frame as {first}"


def _shown(ratio: Ratio | float) -> str:
    """A ratio with two decimals; with three where the interval needs them."""
    if not isinstance(ratio, Ratio):
        return f"{ratio:.2f}"
    if f"{ratio.low:.2f}" == f"{ratio.high:.2f}":
        return str(ratio)
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _accuracy(one: Result, first: Result) -> str:
    if one.accuracy is None or first.accuracy is None:
        return "; what accuracy it has beside that is not known"
    if abs(one.accuracy - first.accuracy) < _SAME_ACCURACY:
        return f", at the same accuracy ({percent(one.accuracy)})"
    return f", at an accuracy of {percent(one.accuracy)} against {percent(first.accuracy)}"


def _energy(one: Result, first: Result) -> str | None:
    reader = common_reader((one, first))
    if reader is None:
        return None
    energies = frame_energy(one, reader), frame_energy(first, reader)
    ratio = quotient(*(energy[1] if energy else None for energy in energies))
    return None if ratio is None else f"{ratio:.2f} of its energy per frame ({reader})"


def _exits(one: Result, first: Result) -> str | None:
    """At which exit it gains most and least; None where fewer than two exits can be told apart."""
    ratios = {}
    for exit_ in first.exits:
        mine = next((other for other in one.exits if other.name == exit_.name), None)
        if mine is None:
            continue
        pairs = ((mine.forced, exit_.forced), (mine.latency, exit_.latency))
        for pair in pairs:
            ratio = ratio_of_means(*pair)
            if ratio is not None and _enough(*pair):
                ratios[exit_.name] = ratio
                break
    if len(ratios) < 2:
        return None
    low, high = min(ratios, key=lambda name: ratios[name]), max(ratios, key=lambda n: ratios[n])
    least, most = ratios[low], ratios[high]
    if most < _SAME_RATIO * least:
        return f"that is about the same at every exit ({least:.2f} to {most:.2f})"
    fast, slow = f"{_exit(low)} ({least:.2f})", f"{_exit(high)} ({most:.2f})"
    if most < 1:
        return f"it saves more at {fast} than at {slow}"
    if least > 1:
        return f"it loses more at {slow} than at {fast}"
    return f"it is faster at {fast} and not at {slow}"


def _exit(name: str) -> str:
    return name if name.startswith("exit") else f"exit {name}"


def _enough(*distributions: Distribution | None) -> bool:
    """Whether means are of a block of frames at least: a few frames name no exit."""
    return all(one is not None and one.count >= BLOCK for one in distributions)
