"""Energy per frame: windows in which one subject runs alone, taken in turn with the others.

Power can't be told apart between subjects that change places every millisecond, so each gets the
device to itself for a second or two, several times, with windows of nothing between them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bench.latency.frames import Frames
from bench.latency.subjects import Subject
from bench.result import Energy, Result, SubjectEnergy
from edge_runtime.console import Console
from edge_runtime.power.base import PowerSource
from edge_runtime.power.window import EnergyWindow, WindowEnergy

#: Windows per subject.
REPEATS = 3
IDLE = "idle"
#: Share of a forced frame's time that it must take longer than the exit before.
_LEAST_STEP = 0.1


@dataclass(frozen=True)
class _Window:
    """One window of one subject, as one source saw it."""

    frames: int
    energy: WindowEnergy


def measure_energy(
    subjects: Sequence[Subject],
    frames: Frames,
    sources: Sequence[PowerSource],
    seconds: float,
    console: Console,
) -> tuple[Energy, ...]:
    """Measure the energy of each subject and of doing nothing.

    Args:
        subjects: Each runs alone.
        frames: What is classified.
        sources: What tells energy or power; open.
        seconds: Length of a window.
        console: Shows progress.

    Returns:
        One entry per source, in order.
    """
    everyone: list[Subject | None] = [None, *subjects]
    windows: dict[str, list[list[_Window]]] = {_name(one): [] for one in everyone}
    turns = [one for _ in range(REPEATS) for one in everyone]
    for subject in console.progress(turns, "measuring energy", len(turns)):
        with EnergyWindow(sources) as window:
            ran = _run(subject, frames, seconds)
        windows[_name(subject)].append([_Window(ran, energy) for energy in window.results])
    return tuple(
        _energy(source.name, {name: [w[i] for w in found] for name, found in windows.items()})
        for i, source in enumerate(sources)
    )


def with_energy(
    result: Result, energy: tuple[Energy, ...], steps: Mapping[str, Sequence[str]]
) -> Result:
    """A result with its energy, per exit and per stage too, by the first source that tells.

    No reader tells the stages of a frame apart, which follow each other within milliseconds. The
    power of those between two exits is what both forced runs differ by in energy over what they
    differ by in time.

    Args:
        result: What was measured besides.
        energy: Of every source.
        steps: Evaluated exit -> stages that are run for it and for none before, in order.
    """
    told = next((one for one in energy if one.subjects), None)
    if told is None:
        return replace(result, energy=energy)
    joules = {
        one.name: figures.joules_per_frame
        for one in result.exits
        if (figures := told.of(f"exit {one.name} always"))
    }
    exits = tuple(replace(one, joules=joules.get(one.name)) for one in result.exits)
    table = result.latency_table
    if table is not None:
        table = replace(table, watts=_watts(told, steps))
    return replace(result, energy=energy, exits=exits, latency_table=table)


def _watts(energy: Energy, steps: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Mean power of each stage while it runs.

    Args:
        energy: What a source told.
        steps: Evaluated exit -> stages that are run for it and for none before, in order.
    """
    found: dict[str, float] = {}
    joules = seconds = 0.0
    for exit_name, stages in steps.items():
        forced = energy.of(f"exit {exit_name} always")
        if forced is None or forced.joules_per_frame is None:
            return {}
        frame_s = forced.seconds / forced.frames
        more_j, more_s = forced.joules_per_frame - joules, frame_s - seconds
        # Where two exits hardly differ, noise could make any number of the difference.
        power = more_j / more_s if more_s > _LEAST_STEP * frame_s and more_j > 0 else forced.watts
        found |= dict.fromkeys(stages, power)
        joules, seconds = forced.joules_per_frame, frame_s
    return found


def _name(subject: Subject | None) -> str:
    return IDLE if subject is None else subject.name


def _run(subject: Subject | None, frames: Frames, seconds: float) -> int:
    """Run a subject for some time, or nothing; returns how many frames it classified."""
    if subject is None:
        time.sleep(seconds)
        return 0
    end = time.perf_counter() + seconds
    done = 0
    while time.perf_counter() < end:
        subject.prepare(done)
        subject.classify(frames.images[done % len(frames)])
        done += 1
    return done


def _energy(reader: str, windows: dict[str, list[_Window]]) -> Energy:
    """What one source says of all subjects."""
    every = [window for found in windows.values() for window in found]
    bad = [window.energy.problem for window in every if window.energy.joules is None]
    rates = [w.energy.hertz for w in every if w.energy.hertz is not None]
    subjects = [figures for name, found in windows.items() if (figures := _of_subject(name, found))]
    problem = f"{len(bad)} of {len(every)} windows: {bad[0]}" if bad else ""
    hertz = float(np.median(rates)) if rates else None
    return Energy(reader=reader, hertz=hertz, subjects=tuple(subjects), problem=problem)


def _of_subject(name: str, windows: Sequence[_Window]) -> SubjectEnergy | None:
    """The figures of a subject; None where no window was good."""
    good = [
        (w.energy.joules, w.energy.seconds, w.frames)
        for w in windows
        if w.energy.joules is not None
    ]
    if not good:
        return None
    joules, seconds, frames = (float(sum(column)) for column in zip(*good, strict=True))
    idle = name == IDLE
    each = np.array([j / (s if idle else n) for j, s, n in good])
    return SubjectEnergy(
        subject=name,
        seconds=seconds,
        frames=int(frames),
        joules=joules,
        watts=joules / seconds,
        joules_per_frame=None if idle else joules / frames,
        spread=float(each.std(ddof=1) / each.mean()) if len(each) > 1 and each.mean() else None,
    )
