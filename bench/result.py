"""The file that a bench writes: everything that was measured, with where and how.

```
result = read_result(Path("orin.json"))
result.end_to_end.p99           # seconds; None where too few frames were measured to tell
result.exit("saver").forced     # every frame made to leave there
```

All times are seconds, energies joules, powers watts. What was not measured is None or absent, never
zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from edge_runtime import schema
from edge_runtime.errors import ConfigError, EdgeRuntimeError, ManifestError
from edge_runtime.files import read_json, write_json
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.timing import Ratio

SCHEMA_VERSION = 1

#: How frames are timed; another way of timing gets another name, and the two are not compared.
METHOD = "one frame at a time, subjects in turn, order drawn per frame"

#: Probabilities at which a distribution's curve is stored.
QUANTILES: tuple[float, ...] = tuple(i / 200 for i in range(201))

#: Frames per block, whose medians tell whether a run was stable.
BLOCK = 50


def frames_for(quantile: float, confidence: float = 0.95) -> int:
    """How many frames a percentile needs: the slowest of them lies above it with `confidence`.

    Args:
        quantile: In (0, 1).
        confidence: In (0, 1).

    Returns:
        The smallest n with 1 - quantile^n >= confidence: 299 for p99, 2,995 for p99.9.

    Reference:
        Wilks, Determination of sample sizes for setting tolerance limits, 1941.
    """
    return math.ceil(math.log(1 - confidence) / math.log(quantile))


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Durations of frames or stages, in seconds.

    Attributes:
        count: How many.
        mean: Arithmetic mean.
        p50: Median; this and the following are None where `count` is below `frames_for`.
        p90: 90th percentile.
        p99: 99th percentile.
        p999: 99.9th percentile.
        max: Largest.
        jitter: Mean absolute difference between one and the next; None for a single one.
        curve: Its values at `QUANTILES`; empty where it was not kept.
    """

    count: int
    mean: float
    p50: float | None
    p90: float | None
    p99: float | None
    p999: float | None
    max: float
    jitter: float | None = None
    curve: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no durations have.

        Raises:
            ConfigError: A negative time or count, or a curve of another length.
        """
        known = (self.mean, self.p50, self.p90, self.p99, self.p999, self.max, self.jitter)
        if self.count < 1 or min(0.0 if one is None else one for one in known) < 0:
            raise ConfigError("durations", got=f"count {self.count}, {known}", expected=">= 0")
        if len(self.curve) not in (0, len(QUANTILES)):
            raise ConfigError("curve", got=len(self.curve), expected=f"0 or {len(QUANTILES)}")

    @classmethod
    def of(cls, seconds: ArrayLike, *, curve: bool = False) -> Distribution:
        """Sum up one or more durations, given in the order in which they were measured."""
        values = np.asarray(seconds, np.float64)
        found = [
            float(np.quantile(values, q)) if values.size >= frames_for(q) else None
            for q in (0.5, 0.9, 0.99, 0.999)
        ]
        steps = np.abs(np.diff(values))
        return cls(
            count=values.size,
            mean=float(values.mean()),
            p50=found[0],
            p90=found[1],
            p99=found[2],
            p999=found[3],
            max=float(values.max()),
            jitter=float(steps.mean()) if steps.size else None,
            curve=tuple(np.quantile(values, QUANTILES).tolist()) if curve else (),
        )


def _check_share(name: str, share: float | None) -> None:
    if share is not None and not 0 <= share <= 1:
        raise ConfigError(name, got=share, expected="0 to 1")


@dataclass(frozen=True, kw_only=True)
class SubjectFigures:
    """One thing that classified every frame in turn with the others.

    Attributes:
        name: As tables show it: "cascade", "base", "exit saver always", ...
        what: What it is, in a few words.
        latency: End to end.
        over_cascade: Its mean time over the cascade's, frames paired; of a subject in a process of
            its own over that of the cascade in one.
        unsteadiness: Coefficient of variation of the block medians, each frame divided by the
            median of its exit; None where there are fewer than two blocks.
        blocks: Mean of each block of `BLOCK` frames, in order.
    """

    name: str
    what: str
    latency: Distribution
    over_cascade: Ratio | None = None
    unsteadiness: float | None = None
    blocks: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExitFigures:
    """What left at one exit of the bundle.

    Attributes:
        name: Of the exit.
        evaluated: Whether the operating point evaluates it.
        count: Frames that left here.
        share: Of all frames, in [0, 1].
        accuracy: Share of these that were right; None where nobody left or labels are not known.
        latency: End to end, of these frames.
        inference: The same without preprocessing; None where the device does not tell.
        forced: End to end, when every frame is made to leave here (earlier exits are evaluated).
        joules: Energy of one such frame.
    """

    name: str
    evaluated: bool
    count: int
    share: float
    accuracy: float | None = None
    latency: Distribution | None = None
    inference: Distribution | None = None
    forced: Distribution | None = None
    joules: float | None = None

    def __post_init__(self) -> None:
        """Refuse shares that are none.

        Raises:
            ConfigError: A share or accuracy is not within [0, 1].
        """
        _check_share("share", self.share)
        _check_share("accuracy", self.accuracy)


@dataclass(frozen=True, kw_only=True)
class StageFigures:
    """One stage of the cascade.

    Attributes:
        name: Of the stage.
        kind: preprocess, saver, segment or head.
        precision: The variant that was run.
        share: Share of the frames that ran it, in [0, 1].
        latency: Of the stage; None where the device does not tell, or no frame ran it.
    """

    name: str
    kind: str
    precision: str
    share: float
    latency: Distribution | None = None

    def __post_init__(self) -> None:
        """Refuse a share that is none."""
        _check_share("share", self.share)


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What the exit shares and the forced runs predict, beside what was measured.

    Attributes:
        seconds: Sum over the exits of share times mean time when it always answers.
        measured: Mean of the cascade.
        ratio: Measured over expected.
    """

    seconds: float
    measured: float
    ratio: Ratio


@dataclass(frozen=True, kw_only=True)
class Deadline:
    """Frames under a deadline.

    Attributes:
        seconds: The deadline.
        missed: Frames that were late.
        cut_short: Frames that left early because of it.
        frames: All frames.
    """

    seconds: float
    missed: int
    cut_short: int
    frames: int


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Images per second in batches, in turn with the base model.

    Attributes:
        batch: Images per call.
        calls: Calls that were timed.
        cascade: Images per second of the cascade.
        base: Images per second of the base model.
        speed_up: Cascade over base, with its interval.
    """

    batch: int
    calls: int
    cascade: float
    base: float
    speed_up: Ratio


@dataclass(frozen=True, kw_only=True)
class SubjectEnergy:
    """Energy of one subject, from windows in which it ran alone.

    Attributes:
        subject: Its name; "idle" for windows in which nothing ran.
        seconds: Length of all windows.
        frames: Frames that ran in them.
        joules: Energy of all windows.
        watts: Mean power.
        joules_per_frame: None for "idle".
        spread: Standard deviation of the windows' joules per frame over their mean (of their watts
            for "idle"); None for one window.
    """

    subject: str
    seconds: float
    frames: int
    joules: float
    watts: float
    joules_per_frame: float | None = None
    spread: float | None = None


@dataclass(frozen=True, kw_only=True)
class Energy:
    """What one reader of energy told.

    Attributes:
        reader: Its name, such as "VDD_IN (INA3221)".
        hertz: Samples per second of a reader of power; None for a counter of energy.
        subjects: Per subject; empty where it could not be measured.
        problem: Why not, or what is doubtful; empty where all went well.
    """

    reader: str
    hertz: float | None
    subjects: tuple[SubjectEnergy, ...] = ()
    problem: str = ""

    def of(self, subject: str) -> SubjectEnergy | None:
        """The figures of a subject, None where there are none."""
        return next((one for one in self.subjects if one.subject == subject), None)


@dataclass(frozen=True, kw_only=True)
class Point:
    """An operating point of the bundle by its simulated figures, for accuracy against latency.

    Attributes:
        name: Of the point; "base" for the last exit alone.
        accuracy: On the bench's data, in [0, 1].
        seconds: Mean latency that the latency table predicts.
    """

    name: str
    accuracy: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Span:
    """One bar of a frame's timeline.

    Attributes:
        name: Stage, or "decide <exit>".
        kind: Kind of the stage, or "decide".
        begin: Seconds from the frame's begin.
        seconds: How long it took.
    """

    name: str
    kind: str
    begin: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class FrameTrace:
    """One frame that was recorded.

    Attributes:
        what: Why this one: "median frame that left at saver", "slowest frame".
        exit: Where it left.
        seconds: End to end.
        spans: Its stages and decisions, in order.
    """

    what: str
    exit: str
    seconds: float
    spans: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Times of single stages on one device, frame by frame, from which any point can be simulated.

    Columns of one row belong to one moment, so what slows the machine down slows them together.

    Attributes:
        stages: Name of each stage column.
        precisions: Precision of each stage column; a stage may have several.
        exits: Names of all exits of the bundle, in order.
        stage_us: Microseconds of each stage, shape (frames, stage columns).
        decide_us: Microseconds of judging each exit, shape (frames, exits).
        around_us: Microseconds that a frame spends besides, shape (frames,).
        watts: Stage name -> mean power while it runs; empty where power was not measured.
    """

    stages: tuple[str, ...]
    precisions: tuple[str, ...]
    exits: tuple[str, ...]
    stage_us: tuple[tuple[float, ...], ...]
    decide_us: tuple[tuple[float, ...], ...]
    around_us: tuple[float, ...]
    watts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a table whose parts don't fit together.

        Raises:
            ConfigError: Rows or columns are missing, or a time is negative.
        """
        frames = len(self.around_us)
        shapes = (
            ("precisions", (len(self.precisions),), (len(self.stages),)),
            ("stage_us", _shape(self.stage_us), (frames, len(self.stages))),
            ("decide_us", _shape(self.decide_us), (frames, len(self.exits))),
        )
        if frames == 0:
            raise ConfigError("a latency table", got="no frame", expected="one or more")
        for name, got, expected in shapes:
            if got != expected:
                raise ConfigError(f"{name} of a latency table", got=got, expected=expected)
        if min(map(min, (*self.stage_us, *self.decide_us, self.around_us)), default=0) < 0:
            raise ConfigError("a latency table", got="a negative time", expected=">= 0")


def _shape(rows: Sequence[Sequence[float]]) -> tuple[int, ...]:
    widths = {len(row) for row in rows}
    return (len(rows), widths.pop()) if len(widths) == 1 else (len(rows), -1)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run of the bench, or a published measurement that it can be compared with.

    Attributes:
        kind: "bench", or "reference" for figures that somebody else published.
        name: What tables call it: the board or CPU, unless the user gave a name.
        command: The exact command line, or where a reference comes from.
        created: Date and time, ISO 8601.
        method: `METHOD`, or how a reference was measured.
        bundle: Hash of the bundle, or a reference's name of its model.
        bundle_name: The bundle's own name.
        data: Hash of the images; empty where noise was classified.
        images: How many different images were classified.
        operating_point: How the cascade ran; None for a reference that does not tell.
        backend: Name of the backend.
        mode: Execution mode.
        batch: Images per frame of the single stream; 1.
        warm_up_s: Seconds of warm-up.
        measured_s: Seconds of measuring.
        environment: What the machine was: see `bench.machine.environment`.
        accuracy: Of the cascade, in [0, 1]; None where labels are not known.
        base_accuracy: Of the base model, on the same frames.
        end_to_end: The cascade's latency.
        inference: The same without preprocessing; None where the device does not tell.
        host_gap: End to end less the stages' own time; None likewise.
        enqueue_share: Host time to enqueue a frame over its time on the device; None on the CPU.
        subjects: What was measured in turn.
        exits: All exits of the bundle, in order.
        stages: Stages that the cascade runs, in order.
        pruned: Stages that it does not.
        expectation: Expected against measured.
        deadline: Frames under a deadline, where one was asked for.
        throughput: In batches.
        energy: Per reader.
        no_energy: Why there is no energy at all; empty where there is.
        points: Operating points of the bundle, simulated.
        frames: Recorded frames.
        latency_table: What `simulate` needs.
        not_measured: Baseline -> why it was not measured.
        unstable: Why the run is not to be trusted; empty where it is stable.
        notes: What else a reader must know.
        schema_version: Version of this file format.
    """

    kind: Literal["bench", "reference"]
    name: str
    command: str
    created: str
    method: str
    bundle: str
    bundle_name: str
    end_to_end: Distribution
    exits: tuple[ExitFigures, ...]
    data: str = ""
    images: int = 0
    operating_point: OperatingPoint | None = None
    backend: str = ""
    mode: str = ""
    batch: int = 1
    warm_up_s: float = 0.0
    measured_s: float = 0.0
    environment: Mapping[str, Any] = field(default_factory=dict)
    accuracy: float | None = None
    base_accuracy: float | None = None
    inference: Distribution | None = None
    host_gap: Distribution | None = None
    enqueue_share: float | None = None
    subjects: tuple[SubjectFigures, ...] = ()
    stages: tuple[StageFigures, ...] = ()
    pruned: tuple[str, ...] = ()
    expectation: Expectation | None = None
    deadline: Deadline | None = None
    throughput: tuple[Throughput, ...] = ()
    energy: tuple[Energy, ...] = ()
    no_energy: str = ""
    points: tuple[Point, ...] = ()
    frames: tuple[FrameTrace, ...] = ()
    latency_table: LatencyTable | None = None
    not_measured: Mapping[str, str] = field(default_factory=dict)
    unstable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        """Refuse a result that contradicts itself.

        Raises:
            ConfigError: An accuracy is not within [0, 1], or two exits or subjects have one name.
        """
        _check_share("accuracy", self.accuracy)
        _check_share("base_accuracy", self.base_accuracy)
        for what, parts in (("exits", self.exits), ("subjects", self.subjects)):
            names = [one.name for one in parts]
            if len(set(names)) < len(names) or (what == "exits" and not names):
                raise ConfigError(what, got=", ".join(names) or "none", expected="distinct names")

    def exit(self, name: str) -> ExitFigures:
        """The figures of an exit."""
        return next(one for one in self.exits if one.name == name)

    def subject(self, name: str) -> SubjectFigures | None:
        """The figures of a subject, None where it was not measured."""
        return next((one for one in self.subjects if one.name == name), None)


def write_result(result: Result, path: Path) -> None:
    """Write a result as JSON, atomically."""
    write_json(path, schema.plain(result))


def read_result(path: Path) -> Result:
    """Read a result that `edge-runtime bench --json` wrote.

    Raises:
        ManifestError: The file is missing, is not whole, or is no result of this version.
    """
    where = f"result {path}"
    data = read_json(path, "result")
    if not isinstance(data, dict) or "schema_version" not in data or "end_to_end" not in data:
        raise ManifestError(
            f"{where} is no result of the bench",
            remedy="Write one with: edge-runtime bench BUNDLE --data DATA --json FILE",
        )
    version = data["schema_version"]
    if version != SCHEMA_VERSION:
        raise ManifestError(
            f"{where}: schema version",
            got=version,
            expected=SCHEMA_VERSION,
            remedy="It was written by another version of edge-runtime: measure again",
        )
    try:
        return schema.read(Result, data, where)
    except EdgeRuntimeError as error:
        raise ManifestError(str(error)) from error
