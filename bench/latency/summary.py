"""From recorded frames to figures: per subject, per exit, per stage, and what to expect of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bench.latency.lineup import APART
from bench.latency.rounds import Recording, Rounds, StageRecording
from bench.latency.subjects import Subject
from bench.result import (
    BLOCK,
    Deadline,
    Distribution,
    ExitFigures,
    Expectation,
    FrameTrace,
    LatencyTable,
    Span,
    StageFigures,
    SubjectFigures,
)
from edge_runtime.cascade import Cascade
from edge_runtime.timing import ratio

#: trtexec's limits above which a run is not to be trusted.
UNSTEADY, ENQUEUE_BOUND = 0.025, 0.8
#: Share of time that other guests of the host may take before a run is not to be trusted.
STOLEN = 0.02


def subject_figures(subjects: Sequence[Subject], rounds: Rounds) -> tuple[SubjectFigures, ...]:
    """Latency of every subject, and its ratio to the cascade's.

    Those in processes of their own are compared with the cascade in one: there a frame follows
    another of the same subject, and finds its caches warm.
    """
    cascade = rounds.recordings["cascade"]
    apart = rounds.recordings.get(APART, cascade)
    found = []
    for subject in subjects:
        recording = rounds.recordings[subject.name]
        reference = apart if subject.apart and subject.name != APART else cascade
        found.append(
            SubjectFigures(
                name=subject.name,
                what=subject.what,
                latency=Distribution.of(recording.seconds, curve=True),
                over_cascade=ratio(recording.seconds, reference.seconds, statistic=np.mean),
                unsteadiness=unsteadiness(recording),
                blocks=tuple(_blocks(recording.seconds).mean(axis=1).tolist()),
            )
        )
    return tuple(found)


def unsteadiness(recording: Recording) -> float | None:
    """Coefficient of variation of the block medians; None for fewer than two blocks.

    Each frame is first divided by the median of those that left at its exit, so that easy and hard
    images don't count as a machine that changes its speed.
    """
    seconds, exits = recording.seconds, recording.exits
    relative = np.empty_like(seconds)
    for position in np.unique(exits):
        here = exits == position
        relative[here] = seconds[here] / np.median(seconds[here])
    medians = np.median(_blocks(relative), axis=1)
    return float(medians.std(ddof=1) / medians.mean()) if len(medians) > 1 else None


def _blocks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Whole blocks of frames, shape (blocks, BLOCK)."""
    whole = len(values) // BLOCK * BLOCK
    return values[:whole].reshape(-1, BLOCK)


def exit_figures(
    cascade: Cascade,
    evaluated: Sequence[str],
    rounds: Rounds,
    inference: NDArray[np.float64] | None,
    labels: NDArray[np.int64] | None,
) -> tuple[ExitFigures, ...]:
    """What left at each exit of the bundle.

    Args:
        cascade: The bundle's.
        evaluated: Names of the exits that the operating point evaluates.
        rounds: What was measured.
        inference: Seconds of each frame without preprocessing, shape (rounds,).
        labels: True class index of each round, shape (rounds,); None where not known.
    """
    recording = rounds.recordings["cascade"]
    seconds, left = recording.seconds, recording.exits
    right = None if labels is None else recording.labels == labels
    found = []
    for position, exit_ in enumerate(cascade.exits):
        here = left == position
        some = bool(here.any())
        forced = rounds.recordings.get(f"exit {exit_.name} always")
        found.append(
            ExitFigures(
                name=exit_.name,
                evaluated=exit_.name in evaluated,
                count=int(here.sum()),
                share=float(here.mean()),
                accuracy=float(right[here].mean()) if right is not None and some else None,
                latency=Distribution.of(seconds[here], curve=True) if some else None,
                inference=_of(inference[here]) if inference is not None and some else None,
                forced=None if forced is None else Distribution.of(forced.seconds, curve=True),
            )
        )
    return tuple(found)


def stage_figures(
    recording: StageRecording, precisions: Mapping[str, str], table: LatencyTable
) -> tuple[StageFigures, ...]:
    """Time of every stage of the cascade.

    Args:
        recording: Its frames.
        precisions: Stage name -> the variant that was run, or several joined by "/".
        table: Times of single stages, for those of which the cascade's frames tell none.
    """
    columns = {key: i for i, key in enumerate(zip(table.stages, table.precisions, strict=True))}
    stage_us = np.array(table.stage_us)
    durations, ran = recording.durations, recording.ran
    found = []
    for i, name in enumerate(recording.stages):
        known = durations[:, i][np.isfinite(durations[:, i])]
        column = columns.get((name, precisions[name]))
        if ran[:, i].any() and not known.size and column is not None:
            known = stage_us[:, column] / 1e6
        found.append(
            StageFigures(
                name=name,
                kind=recording.kinds[i],
                precision=precisions[name],
                share=float(ran[:, i].mean()),
                latency=_of(known) if known.size else None,
            )
        )
    return tuple(found)


def _of(seconds: NDArray[np.float64]) -> Distribution:
    return Distribution.of(seconds)


def frame_traces(recording: StageRecording, rounds: Rounds) -> tuple[FrameTrace, ...]:
    """A typical frame of each exit, and the slowest of all."""
    cascade = rounds.recordings["cascade"]
    seconds, left = cascade.seconds, cascade.exits
    found = []
    names = recording.exits
    at = np.isfinite(recording.decided).sum(axis=1) - 1
    for position, name in enumerate(names):
        here = np.flatnonzero((at == position) & (left >= 0))
        if here.size:
            middle = here[np.argsort(seconds[here], kind="stable")[here.size // 2]]
            what = f"median frame that left at {name}"
            found.append(_frame(recording, int(middle), what, name, seconds[middle]))
    slowest = int(seconds.argmax())
    name = names[at[slowest]]
    found.append(_frame(recording, slowest, "slowest frame", name, seconds[slowest]))
    return tuple(found)


def _frame(
    recording: StageRecording, row: int, what: str, exit_name: str, seconds: float
) -> FrameTrace:
    begins, durations = recording.begins[row], recording.durations[row]
    spans = [
        Span(name=name, kind=kind, begin=float(begin), seconds=float(took))
        for name, kind, begin, took in zip(
            recording.stages, recording.kinds, begins, durations, strict=True
        )
        if np.isfinite(begin) and np.isfinite(took)
    ]
    spans += _decisions(recording, row, spans)
    spans.sort(key=lambda span: (span.begin, span.seconds))
    return FrameTrace(what=what, exit=exit_name, seconds=float(seconds), spans=tuple(spans))


def _decisions(recording: StageRecording, row: int, stages: Sequence[Span]) -> list[Span]:
    """From the end of the stage before it to each decision."""
    found = []
    ends = sorted(span.begin + span.seconds for span in stages)
    before = 0.0
    for name, at in zip(recording.exits, recording.decided[row].tolist(), strict=True):
        if not np.isfinite(at):
            break
        begin = max([end for end in ends if before <= end <= at], default=before)
        # Where only the device knows the stages, all that led to the decision is one bar.
        kind, what = ("decide", "decide") if stages else ("until decided", "until")
        found.append(Span(name=f"{what} {name}", kind=kind, begin=begin, seconds=at - begin))
        before = at
    return found


def without_preprocessing(
    recording: StageRecording, seconds: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """Seconds of each frame from the end of its preprocessing; None where that is not known."""
    columns = [i for i, kind in enumerate(recording.kinds) if kind == "preprocess"]
    if not columns:
        return seconds
    last = columns[-1]
    ends = recording.begins[:, last] + recording.durations[:, last]
    return seconds - ends if np.isfinite(ends).all() else None


def host_gap(recording: StageRecording, seconds: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Seconds of each frame that no stage accounts for; None where stages' times are not known."""
    durations = recording.durations
    if not np.isfinite(durations[recording.ran]).all():
        return None
    gap: NDArray[np.float64] = seconds - np.nansum(durations, axis=1)
    return gap


def expectation(evaluated: Sequence[str], cascade: Cascade, rounds: Rounds) -> Expectation | None:
    """Shares of the exits times what each takes when it always answers, against the measured mean.

    Args:
        evaluated: Names of the exits that the operating point evaluates.
        cascade: The bundle's.
        rounds: What was measured.

    Returns:
        None where no exit was forced.
    """
    if not all(f"exit {name} always" in rounds.recordings for name in evaluated):
        return None
    recording = rounds.recordings["cascade"]
    positions = {exit_.name: i for i, exit_ in enumerate(cascade.exits)}
    expected = np.zeros(len(rounds))
    for name in evaluated:
        share = float((recording.exits == positions[name]).mean())
        expected += share * rounds.recordings[f"exit {name} always"].seconds
    return Expectation(
        seconds=float(expected.mean()),
        measured=float(recording.seconds.mean()),
        ratio=ratio(recording.seconds, expected, statistic=np.mean),
    )


def deadline(recording: StageRecording, seconds: float) -> Deadline:
    """How many frames a deadline cut short, and how many missed it."""
    return Deadline(
        seconds=seconds,
        missed=int(recording.late.sum()),
        cut_short=int(recording.cut_short.sum()),
        frames=len(recording.late),
    )


def instability(
    subjects: Sequence[SubjectFigures], enqueue_share: float | None, stolen: float | None
) -> tuple[str, ...]:
    """Why a run is not to be trusted, in sentences; nothing where it is stable.

    Args:
        subjects: All of them; the cascade and the base count.
        enqueue_share: Host time to enqueue a frame over the frame's time.
        stolen: Share of the processor's time that the host's other guests took.
    """
    found = [
        f"block medians of {one.name} vary by {one.unsteadiness:.1%} "
        f"(coefficient of variation, at most {UNSTEADY:.1%})"
        for one in subjects
        if one.name in ("cascade", "base") and (one.unsteadiness or 0) > UNSTEADY
    ]
    if enqueue_share is not None and enqueue_share > ENQUEUE_BOUND:
        found.append(
            f"enqueueing a frame takes {enqueue_share:.0%} of its time (at most "
            f"{ENQUEUE_BOUND:.0%}): the host is the bottleneck"
        )
    if stolen is not None and stolen > STOLEN:
        found.append(f"other guests of the host took {stolen:.1%} of the processor's time")
    return tuple(found)
