"""The measuring: every subject classifies every frame, in an order drawn anew for each frame.

A subject that always came behind a large model would always find the caches cold. What is recorded
is taken from a frame between two timed calls, as plain numbers, so that recording costs no frame
its time and no long run its memory. Ctrl-C keeps the rounds that every subject has finished.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bench.latency.frames import Frames
from bench.latency.subjects import Answer, Subject
from edge_runtime.cascade import Plan
from edge_runtime.console import Console
from edge_runtime.prediction import Prediction
from edge_runtime.timing import Clock

#: Fewer rounds say nothing.
LEAST_ROUNDS = 20
#: A warm-up has this many rounds unless told otherwise, and lasts 0.2 s at least.
WARM_UP_ROUNDS, WARM_UP_S = 200, 0.2
#: Rounds, and seconds, after which subjects in processes of their own have their turns at most.
_BLOCK, _BLOCK_S = 20, 1.0


class Recording:
    """What one subject did, frame by frame.

    Args:
        exits: Names of the bundle's exits; what a subject says of its exits is counted in these.
    """

    def __init__(self, exits: Sequence[str]) -> None:
        self._position = {name: i for i, name in enumerate(exits)}
        self._seconds = array("d")
        self._exits = array("q")
        self._labels = array("q")

    def add(self, answer: Answer) -> None:
        """Take over one frame."""
        self._seconds.append(answer.seconds)
        self._exits.append(self._position.get(answer.exit, -1))
        self._labels.append(answer.label)

    def __len__(self) -> int:
        """Number of frames."""
        return len(self._labels)

    def cut(self, rounds: int) -> None:
        """Forget what came after some rounds."""
        for column in (self._seconds, self._exits, self._labels):
            del column[rounds:]

    @property
    def seconds(self) -> NDArray[np.float64]:
        """Duration of each frame, shape (rounds,)."""
        return np.array(self._seconds, np.float64)

    @property
    def exits(self) -> NDArray[np.int64]:
        """Position of the exit at which each frame left, shape (rounds,); -1 where unknown."""
        return np.array(self._exits, np.int64)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class index of each answer, shape (rounds,); -1 where unknown."""
        return np.array(self._labels, np.int64)


class StageRecording:
    """When each stage of the cascade began and ended, and each exit was decided.

    Args:
        plan: What the cascade runs.
    """

    def __init__(self, plan: Plan) -> None:
        self.stages = tuple(stage.name for stage in plan.stages)
        self.kinds = tuple(stage.kind for stage in plan.stages)
        self.exits = tuple(step.exit.name for step in plan.steps)
        #: Which exit each stage was run for.
        self._steps = [i for i, step in enumerate(plan.steps) for _ in step.stages]
        self._columns = {name: i for i, name in enumerate(self.stages)}
        self._times = array("d")
        self._decided = array("d")
        self._cut_short = array("b")
        self._late = array("b")

    def add(self, prediction: Prediction) -> None:
        """Take over one frame."""
        trace = prediction.trace
        times = [np.nan] * (2 * len(self.stages))
        for run in trace.stages:
            at = 2 * self._columns[run.stage]
            times[at], times[at + 1] = run.start_s, run.duration_s
        self._times.extend(times)
        decided = [one.at_s for one in trace.exits]
        self._decided.extend(decided + [np.nan] * (len(self.exits) - len(decided)))
        self._cut_short.append(trace.ended == "deadline")
        self._late.append(prediction.deadline_missed)

    def cut(self, rounds: int) -> None:
        """Forget what came after some rounds."""
        del self._times[2 * len(self.stages) * rounds :]
        del self._decided[len(self.exits) * rounds :]
        del self._cut_short[rounds:]
        del self._late[rounds:]

    @property
    def begins(self) -> NDArray[np.float64]:
        """Seconds from the call to each stage's begin, shape (rounds, stages); NaN: not run."""
        return np.array(self._times).reshape(-1, len(self.stages), 2)[:, :, 0]

    @property
    def durations(self) -> NDArray[np.float64]:
        """Seconds of each stage, shape (rounds, stages); NaN where it was not run or is unknown."""
        return np.array(self._times).reshape(-1, len(self.stages), 2)[:, :, 1]

    @property
    def ran(self) -> NDArray[np.bool_]:
        """Whether each stage was run, shape (rounds, stages)."""
        begun = np.isfinite(self.begins)
        if begun.any():
            return begun
        # Only the device knows when; the decisions tell which ones were.
        return np.isfinite(self.decided)[:, self._steps]

    @property
    def decided(self) -> NDArray[np.float64]:
        """Seconds from the call to each decision, shape (rounds, exits); NaN: not evaluated."""
        return np.array(self._decided).reshape(-1, len(self.exits))

    @property
    def cut_short(self) -> NDArray[np.bool_]:
        """Whether a frame left early because of its deadline, shape (rounds,)."""
        return np.array(self._cut_short, bool)

    @property
    def late(self) -> NDArray[np.bool_]:
        """Whether a frame missed its deadline, shape (rounds,)."""
        return np.array(self._late, bool)


#: Takes what a subject answered; called between two timed calls.
Take = Callable[[Answer], None]


@dataclass
class Rounds:
    """What was measured.

    Attributes:
        recordings: Subject -> its frames.
        rows: Index of the image of each round, shape (rounds,).
        warm_up_s: How long the warm-up took.
        measured_s: How long the measuring took.
        interrupted: Whether somebody stopped it.
    """

    recordings: dict[str, Recording]
    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    warm_up_s: float = 0.0
    measured_s: float = 0.0
    interrupted: bool = False

    def __len__(self) -> int:
        """Number of rounds."""
        return len(self.rows)

    @property
    def finished(self) -> int:
        """Rounds that every subject has finished."""
        return min(len(one) for one in self.recordings.values())


class Measurement:
    """Subjects in turn, first to warm up, then to be measured.

    Those that live in a process of their own take their turns in blocks, some frames at once:
    before each, all threads here have to come to rest, which takes longer than a small model's
    frame.

    Args:
        frames: What is classified, over and over.
        subjects: Who takes turns.
        exits: Names of the bundle's exits.
        seed: Of the order of the subjects.
        clock: Monotonic seconds, of the measurement as a whole.
    """

    def __init__(
        self,
        frames: Frames,
        subjects: Sequence[Subject],
        exits: Sequence[str],
        *,
        seed: int = 0,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._frames = frames
        self._here = [one for one in subjects if not one.apart]
        self._apart = [one for one in subjects if one.apart]
        self._exits = exits
        self._rng = np.random.default_rng(seed)
        self._clock = clock
        self._warm_up_s = 0.0
        #: Rounds until those apart have their turn.
        self._block = 1

    def warm_up(self, rounds: int, console: Console) -> float:
        """Run all subjects without recording.

        Args:
            rounds: How often at least; it takes 0.2 s at least as well.
            console: Shows progress.

        Returns:
            Seconds that one round takes.
        """
        begin = self._clock()
        done, per_round = 0, 0.0
        with console.status("warming up") as tell:
            while done < rounds or self._clock() - begin < WARM_UP_S:
                start = self._clock()
                self._rounds(range(done, done + self._block), {})
                per_round = (self._clock() - start) / self._block
                done += self._block
                if self._apart:
                    self._block = max(1, min(_BLOCK, int(_BLOCK_S / max(per_round, 1e-9))))
                tell(f"{done} of {rounds} rounds")
        self._warm_up_s = self._clock() - begin
        return per_round

    def count(self, rounds: int) -> Rounds:
        """Measure a number of rounds."""
        found = self._nothing()
        begin = self._clock()
        self._rounds(range(rounds), {name: [one.add] for name, one in found.recordings.items()})
        return self._finished(found, begin)

    def measure(
        self, seconds: float, console: Console, takes: dict[str, list[Take]] | None = None
    ) -> Rounds:
        """Measure for some time, and 20 rounds at least.

        Args:
            seconds: How long.
            console: Shows progress.
            takes: Subject -> what else records its frames; each takes the answer of every round.

        Raises:
            KeyboardInterrupt: Fewer than 20 rounds were finished.
        """
        found = self._nothing()
        all_takes = {
            name: [one.add, *(takes or {}).get(name, [])] for name, one in found.recordings.items()
        }
        done = 0
        begin = self._clock()
        try:
            with console.status("measuring") as tell:
                while (spent := self._clock() - begin) < seconds or done < LEAST_ROUNDS:
                    self._rounds(range(done, done + self._block), all_takes)
                    done += self._block
                    tell(f"{done} rounds, {spent:.0f} of {seconds:.0f} s")
        except KeyboardInterrupt:
            if found.finished < LEAST_ROUNDS:
                raise
            console.note(f"interrupted: {found.finished} rounds were measured")
            found.interrupted = True
        return self._finished(found, begin)

    def _nothing(self) -> Rounds:
        everyone = (*self._here, *self._apart)
        return Rounds(
            {one.name: Recording(self._exits) for one in everyone}, warm_up_s=self._warm_up_s
        )

    def _finished(self, found: Rounds, begin: float) -> Rounds:
        found.measured_s = self._clock() - begin
        done = found.finished
        for one in found.recordings.values():
            one.cut(done)
        found.rows = np.arange(done) % len(self._frames)
        return found

    def _rounds(self, turns: range, takes: dict[str, list[Take]]) -> None:
        """Some frames for every subject."""
        for turn in turns:
            for i in self._rng.permutation(len(self._here)).tolist():
                self._turn(self._here[i], turn, takes)
        for i in self._rng.permutation(len(self._apart)).tolist():
            for turn in turns:
                self._turn(self._apart[i], turn, takes)
        if self._apart:
            # Meanwhile our threads have gone to sleep, and the first frame would pay for that.
            self._turn(self._here[0], turns[-1], {})

    def _turn(self, subject: Subject, turn: int, takes: dict[str, list[Take]]) -> None:
        subject.prepare(turn)
        answer = subject.classify(self._frames.images[turn % len(self._frames)])
        for take in takes.get(subject.name, ()):
            take(answer)
