"""One run of a bench: warm up, measure, and put the figures together."""

from __future__ import annotations

import functools
import time

import numpy as np

from bench.latency import summary
from bench.latency.frames import Frames
from bench.latency.lineup import Lineup
from bench.latency.rounds import Measurement, Rounds, StageRecording, Take
from bench.latency.subjects import Answer, Staged
from bench.result import METHOD, Distribution, LatencyTable, Point, Result
from bench.simulate.simulation import simulated_points
from bench.simulate.table import TableRows, merge
from calib.tables import collect
from edge_runtime.console import Console
from edge_runtime.manifest import Bundle
from edge_runtime.scheduler import Scheduler

#: Frames whose enqueueing is timed.
_ENQUEUED = 200
_NOISE = (
    "Noise was classified, made to leave where the operating point's record says that images "
    "leave: accuracy is not known."
)


class Run:
    """A bench of an opened lineup.

    Args:
        bundle: The bundle.
        frames: What is classified.
        lineup: Who takes turns.
        seed: Of the order of turns.
    """

    def __init__(self, bundle: Bundle, frames: Frames, lineup: Lineup, *, seed: int = 0) -> None:
        self._bundle = bundle
        self._frames = frames
        self._lineup = lineup
        exits = [exit_.name for exit_ in bundle.cascade.exits]
        self._measurement = Measurement(frames, lineup.subjects, exits, seed=seed)
        self._stages = StageRecording(lineup.cascade.plan)
        self._tables = {
            one.name: TableRows(one.scheduler.plan)
            for one in lineup.subjects
            if isinstance(one, Staged) and one.name in lineup.tables
        }

    def warm_up(self, rounds: int, console: Console) -> float:
        """Run all subjects unrecorded; returns the seconds that a round takes."""
        return self._measurement.warm_up(rounds, console)

    def measure(self, seconds: float, console: Console) -> Rounds:
        """Measure all subjects for some time.

        Raises:
            KeyboardInterrupt: Hardly a frame was measured.
        """
        takes: dict[str, list[Take]] = {"cascade": [functools.partial(take_stages, self._stages)]}
        for name, rows in self._tables.items():
            takes.setdefault(name, []).append(functools.partial(take_row, rows))
        rounds = self._measurement.measure(seconds, console, takes)
        self._stages.cut(len(rounds))
        for rows in self._tables.values():
            rows.cut(len(rounds))
        return rounds

    def result(self, rounds: Rounds, console: Console) -> Result:
        """What was measured; machine, command and energy are not known here."""
        lineup, bundle, frames = self._lineup, self._bundle, self._frames
        recording = rounds.recordings["cascade"]
        seconds = recording.seconds
        labels = None if frames.labels is None else frames.labels[rounds.rows]
        base = rounds.recordings["base"]
        inference = summary.without_preprocessing(self._stages, seconds)
        gap = summary.host_gap(self._stages, seconds)
        subjects = summary.subject_figures(lineup.subjects, rounds)
        plan = lineup.cascade.plan
        precisions = {name: "/".join(some) for name, some in lineup.cascade.precisions.items()}
        table = merge([rows.finish() for rows in self._tables.values()])
        deadline_s = lineup.deadline_s
        return Result(
            kind="bench",
            name="",
            command="",
            created="",
            method=METHOD,
            bundle=bundle.hash,
            bundle_name=bundle.manifest.name,
            data="" if frames.data is None else frames.data.hash,
            images=min(len(frames), len(rounds)),
            operating_point=lineup.point,
            backend=lineup.cascade.backend.name,
            mode=lineup.cascade.backend.mode,
            warm_up_s=rounds.warm_up_s,
            measured_s=rounds.measured_s,
            accuracy=None if labels is None else float((recording.labels == labels).mean()),
            base_accuracy=None if labels is None else float((base.labels == labels).mean()),
            end_to_end=Distribution.of(seconds, curve=True),
            inference=None if inference is None else Distribution.of(inference),
            host_gap=None if gap is None else Distribution.of(gap),
            enqueue_share=enqueue_share(lineup.cascade, frames),
            subjects=subjects,
            exits=summary.exit_figures(
                bundle.cascade, lineup.cascade.exits, rounds, inference, labels
            ),
            stages=summary.stage_figures(self._stages, precisions, table),
            pruned=plan.pruned,
            expectation=summary.expectation(lineup.cascade.exits, bundle.cascade, rounds),
            deadline=None if deadline_s is None else summary.deadline(self._stages, deadline_s),
            points=self._points(table, console),
            frames=summary.frame_traces(self._stages, rounds),
            latency_table=table,
            not_measured=lineup.not_measured,
            notes=self._notes(rounds),
        )

    def _points(self, table: LatencyTable, console: Console) -> tuple[Point, ...]:
        """Accuracy and expected latency of the bundle's operating points."""
        if self._frames.data is None:
            return ()
        predictions = collect(self._lineup.every, self._frames.data, console)
        return simulated_points(
            self._bundle, table, predictions, self._lineup.cascade.point.variants
        )

    def _notes(self, rounds: Rounds) -> tuple[str, ...]:
        notes = []
        if self._frames.data is None:
            notes.append(_NOISE)
        if self._frames.note:
            notes.append(self._frames.note)
        if rounds.interrupted:
            notes.append("The run was interrupted before its time.")
        if self._lineup.cascade.backend.asynchronous:
            notes.append(
                "The device runs ahead of the host: times of single stages, and the latency table, "
                "are from a mode in which the host waits for every stage."
            )
        return tuple(notes)


def enqueue_share(scheduler: Scheduler, frames: Frames) -> float | None:
    """Median share of a frame's time in which the host puts it on the device.

    Returns:
        None where the host runs the stages itself.
    """
    if not scheduler.backend.decides:
        return None
    shares = []
    for i in range(_ENQUEUED):
        begin = time.perf_counter()
        pending = scheduler.submit(frames.images[i % len(frames)])
        enqueued = time.perf_counter()
        pending.result()
        shares.append((enqueued - begin) / (time.perf_counter() - begin))
    return float(np.median(shares))


def take_stages(recording: StageRecording, answer: Answer) -> None:
    """Record the stages of a scheduler's answer."""
    assert answer.prediction is not None
    recording.add(answer.prediction)


def take_row(rows: TableRows, answer: Answer) -> None:
    """Record a scheduler's answer as a row of a latency table."""
    assert answer.prediction is not None
    rows.add(answer.prediction, answer.seconds)
