"""Who takes turns in a bench of a bundle: the cascade, its forced exits, and its baselines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.latency.forced import always
from bench.latency.frames import Frames
from bench.latency.other_process import OtherProcess
from bench.latency.subjects import Elsewhere, Session, Staged, Subject
from bench.simulate.table import table_points
from edge_runtime import options
from edge_runtime.backends.onnxrt import OnnxRuntimeOptions, new_session
from edge_runtime.errors import ConfigError, EdgeRuntimeError, EngineBuildError
from edge_runtime.load import DEFAULT_POINT, load
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.scheduler import Scheduler
from edge_runtime.schema import nearest
from engines.monolith import if_model
from engines.one_piece import one_piece

#: Option value -> what the baseline is.
BASELINES = {
    "one-session": "the base model as one ONNX Runtime session",
    "if-graph": "the cascade as one ONNX graph with If nodes",
    "eager": "PyTorch eager with the same exits",
    "naive": "the cascade with a thread pool per session",
    "precisions": "cascade and base at each other precision of the bundle",
}
ONE_SESSION, IF_GRAPH = "base as one session", "one graph with If"
EAGER, NAIVE = "PyTorch eager", "a thread pool per session"
#: What subjects in processes of their own are compared with: their caches are as warm as its.
APART = "cascade in a process of its own"
#: Where else the baselines of ONNX Runtime and PyTorch are measured, by backend.
_ELSEWHERE = {"tensorrt": "beside TensorRT it is measured by: python -m bench.gpu_check"}
#: Baselines that can't ask a gate -> what they are called in results.
_WITHOUT_GATE = {
    "if-graph": IF_GRAPH,
    "eager": EAGER,
    "naive": NAIVE,
    "precisions": "cascade at other precisions",
}
#: Precisions that people choose; others are made for one backend's sake.
_PRECISIONS = ("fp32", "fp16", "int8")


@dataclass
class Lineup:
    """Opened subjects.

    Attributes:
        cascade: At the operating point.
        base: The last exit alone.
        point: The operating point.
        subjects: All that take turns, the cascade and the base first.
        every: Evaluates all exits of the bundle.
        tables: Subjects from whose frames the times of single stages are known.
        deadline_s: Of the cascade's frames; None without one.
        not_measured: Baseline -> why it takes no turns.
    """

    cascade: Scheduler
    base: Scheduler
    point: OperatingPoint
    subjects: list[Subject]
    every: Scheduler
    tables: list[str] = field(default_factory=list)
    deadline_s: float | None = None
    not_measured: dict[str, str] = field(default_factory=dict)


def parse_baselines(text: str) -> tuple[str, ...]:
    """Which baselines an option asks for.

    Raises:
        ConfigError: There is no such baseline.
    """
    if text in ("all", "none"):
        return tuple(BASELINES) if text == "all" else ()
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in BASELINES:
            raise ConfigError(
                f"--baselines: there is no {name!r}",
                remedy=nearest(name, [*BASELINES, "all", "none"]),
            )
    return names


def chosen_point(args: argparse.Namespace, bundle: Bundle) -> OperatingPoint:
    """The operating point of `args`, at the precision of `args`.

    Raises:
        ManifestError: The point is not there or not whole.
        ConfigError: No stage has the precision, or the point has a gate, which chooses it.
    """
    point = bundle.operating_point(args.operating_point or DEFAULT_POINT)
    if args.precision is None:
        return point
    if point.gate is not None:
        raise ConfigError(
            f"--precision {args.precision}: the gate of operating point {point.name!r} chooses "
            "precisions itself",
            remedy="Leave the option out, or take another operating point",
        )
    return at_precision(bundle, point, args.precision)


def at_precision(bundle: Bundle, point: OperatingPoint, precision: str) -> OperatingPoint:
    """The point with every stage that has a precision run at it.

    Raises:
        ConfigError: No stage has it.
    """
    records = bundle.manifest.stages
    having = [record.name for record in records if precision in record.variants]
    if not having:
        known = {name for record in records for name in record.variants}
        raise ConfigError(
            f"--precision {precision}: no stage of {bundle.path} has this variant",
            remedy=f"{nearest(precision, known)}. Make it with: edge-runtime quantize, or convert",
        )
    variants = {**point.variants, **dict.fromkeys(having, precision)}
    return replace(point, name=f"{point.name}-{precision}", variants=variants)


def open_lineup(
    args: argparse.Namespace,
    bundle: Bundle,
    frames: Frames,
    point: OperatingPoint,
    baselines: tuple[str, ...],
    stack: ExitStack,
) -> Lineup:
    """Open all that take turns; `stack` closes them.

    Args:
        args: The command's options of backend and deadline.
        bundle: The bundle.
        frames: What will be classified.
        point: The operating point.
        baselines: Keys of `BASELINES`.
        stack: Closes what was opened.

    Returns:
        What was opened. Beside a gate, which nothing can make leave at a certain exit, there are no
        forced exits.

    Raises:
        ConfigError: A gate is to classify noise.
    """
    if point.gate is not None and frames.labels is None:
        raise ConfigError(
            f"operating point {point.name!r}: noise can't be made to leave where images leave at "
            "a gate",
            remedy="Give labelled images with --data",
        )
    opener = _Opener(args, bundle, frames, stack)
    cascade = opener.scheduler(point)
    base = opener.scheduler(_base(point))
    deadline_s = None if args.deadline_ms is None else args.deadline_ms / 1e3
    turns = [point] if frames.labels is not None else _by_record(cascade, point, args.seed)
    subjects: list[Subject] = [
        Staged("cascade", "at the operating point", cascade, turns, deadline_s),
        Staged("base", "the last exit alone, in stages", base, [base.point]),
    ]
    for name in cascade.exits if point.gate is None else ():
        what = "every frame leaves there, earlier exits evaluated"
        subjects.append(Staged(f"exit {name} always", what, cascade, [always(cascade, name)]))
    lineup = Lineup(cascade, base, point, subjects, cascade, deadline_s=deadline_s)
    lineup.every = opener.add_table_source(lineup, cascade, "all exits in turn")
    for key in BASELINES:
        if key not in baselines:
            continue
        if point.gate is not None and key in _WITHOUT_GATE:
            lineup.not_measured[_WITHOUT_GATE[key]] = "it can't ask a gate"
        else:
            _ADD[key](opener, lineup)
    return lineup


def _base(point: OperatingPoint) -> OperatingPoint:
    return OperatingPoint(name="base", policy="never", variants=point.variants)


class _Opener:
    """Opens schedulers, sessions and processes alike."""

    def __init__(
        self, args: argparse.Namespace, bundle: Bundle, frames: Frames, stack: ExitStack
    ) -> None:
        self.args = args
        self.bundle = bundle
        self.frames = frames
        self._stack = stack

    def scheduler(self, point: OperatingPoint, *, time_stages: bool = False) -> Scheduler:
        args = self.args
        if time_stages and args.backend == "tensorrt":
            # The modes in which the device decides can't time stages; "best" takes one that can.
            args = argparse.Namespace(**{**vars(args), "mode": None})
        backend_options = options.backend_options(args, time_stages=time_stages)
        return self._stack.enter_context(
            load(
                self.bundle,
                backend=args.backend,
                operating_point=point,
                image_size=self.frames.size,
                options=backend_options,
            )
        )

    def add_table_source(self, lineup: Lineup, opened: Scheduler, name: str) -> Scheduler:
        """Add a subject from whose frames the times of single stages are known.

        Args:
            lineup: Where to add it.
            opened: Is used again where it evaluates all exits, knows its stages' times, and has no
                gate.
            name: Of the subject.

        Returns:
            What evaluates all exits.
        """
        cascade, point = self.bundle.cascade, opened.point
        points = table_points(cascade, point.metric, point.variants)
        exits = tuple(exit_.name for exit_ in cascade.exits)
        shared = opened.exits == exits and not opened.backend.asynchronous and point.gate is None
        every = opened if shared else self.scheduler(points[-1], time_stages=True)
        what = "leaves at each exit of the bundle in turn, for the latency table"
        lineup.subjects.append(Staged(name, what, every, points))
        lineup.tables.append(name)
        return every

    def session(self, model: bytes) -> Callable[[NDArray[np.uint8]], Any]:
        return one_session(model, self.frames.size, options.onnxrt_options(self.args))

    def process(self, kind: str, point: OperatingPoint) -> OtherProcess:
        return self._stack.enter_context(
            OtherProcess(
                self.bundle.path, point, self.frames.size, kind=kind, threads=self.args.threads
            )
        )


def one_session(
    model: bytes, size: tuple[int, int], options_: OnnxRuntimeOptions
) -> Callable[[NDArray[np.uint8]], Any]:
    """The model as a function of one image, in a single session that shares our threads."""
    session = new_session(model, options_, {"height": size[0], "width": size[1]})
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image[None]})


def _add_one_session(opener: _Opener, lineup: Lineup) -> None:
    if _needs_onnxruntime(opener, lineup, ONE_SESSION):
        return
    try:
        last = opener.bundle.cascade.exits[-1].name
        model = one_piece(opener.bundle, last, lineup.base.point.variants)
        run = opener.session(model)
    except EdgeRuntimeError as error:
        lineup.not_measured[ONE_SESSION] = str(error)
        return
    lineup.subjects.append(Session(ONE_SESSION, BASELINES["one-session"], run))


def _add_if_graph(opener: _Opener, lineup: Lineup) -> None:
    if _needs_onnxruntime(opener, lineup, IF_GRAPH):
        return
    if opener.frames.labels is None:
        lineup.not_measured[IF_GRAPH] = "noise can't be made to leave anywhere in it"
        return
    try:
        run = opener.session(if_model(opener.bundle, lineup.point))
    except (EngineBuildError, ConfigError) as error:
        lineup.not_measured[IF_GRAPH] = str(error)
        return
    lineup.subjects.append(Session(IF_GRAPH, BASELINES["if-graph"], run, lineup.cascade.exits))


def _needs_onnxruntime(opener: _Opener, lineup: Lineup, name: str) -> bool:
    """Say why a baseline of ONNX Runtime takes no turns beside another backend."""
    if opener.args.backend == "onnxrt":
        return False
    lineup.not_measured[name] = _ELSEWHERE.get(
        opener.args.backend, "it needs models, which this backend has not"
    )
    return True


def _add_process(opener: _Opener, lineup: Lineup, key: str, name: str) -> None:
    if _needs_onnxruntime(opener, lineup, name):
        return
    if opener.frames.labels is None:
        lineup.not_measured[name] = "noise can't be made to leave anywhere in it"
        return
    try:
        process = opener.process(key, lineup.point)
    except EdgeRuntimeError as error:
        lineup.not_measured[name] = str(error)
        return
    if all(one.name != APART for one in lineup.subjects):
        own = opener.process("shared", lineup.point)
        what = "what others in processes of their own are compared with"
        lineup.subjects.append(Elsewhere(APART, what, own))
    lineup.subjects.append(Elsewhere(name, BASELINES[key], process))


def _add_precisions(opener: _Opener, lineup: Lineup) -> None:
    point, bundle = lineup.point, opener.bundle
    records = [record for record in bundle.manifest.stages if record.kind != "preprocess"]
    here = {record.name: bundle.precision(record.name, point.variants) for record in records}
    for precision in _PRECISIONS:
        if not any(
            precision in record.variants and here[record.name] != precision for record in records
        ):
            continue
        fixed = at_precision(bundle, point, precision)
        name = f"all {precision}"
        try:
            cascade, base = opener.scheduler(fixed), opener.scheduler(_base(fixed))
        except EdgeRuntimeError as error:
            lineup.not_measured[f"cascade, {name}"] = str(error)
            continue
        turns = [fixed]
        if opener.frames.labels is None:
            turns = _by_record(cascade, fixed, opener.args.seed)
        lineup.subjects += [
            Staged(f"cascade, {name}", "the same thresholds at this precision", cascade, turns),
            Staged(f"base, {name}", "the last exit alone", base, [base.point]),
        ]
        opener.add_table_source(lineup, cascade, f"all exits in turn, {name}")


_ADD: Mapping[str, Callable[[_Opener, Lineup], None]] = {
    "one-session": _add_one_session,
    "if-graph": _add_if_graph,
    "eager": lambda opener, lineup: _add_process(opener, lineup, "eager", EAGER),
    "naive": lambda opener, lineup: _add_process(opener, lineup, "naive", NAIVE),
    "precisions": _add_precisions,
}


def _by_record(scheduler: Scheduler, point: OperatingPoint, seed: int) -> list[OperatingPoint]:
    """Points that make noise leave as often at each exit as the point's record says of images."""
    rates = recorded_rates(point, scheduler.exits)
    points = [always(scheduler, name) for name in scheduler.exits]
    drawn = np.random.default_rng(seed).choice(len(points), _TURNS, p=rates)
    return [points[i] for i in drawn.tolist()]


#: Turns after which the drawn exits repeat: a prime, so that they fall on ever other images.
_TURNS = 9973


def recorded_rates(point: OperatingPoint, exits: tuple[str, ...]) -> list[float]:
    """Share of samples that left at each evaluated exit when the point was chosen.

    Raises:
        ConfigError: The point carries no such record.
    """
    record = point.expected.get("in_sample")
    rates = record.get("exit_rates") if isinstance(record, Mapping) else None
    found = [rates.get(name, 0.0) if isinstance(rates, Mapping) else None for name in exits]
    numbers = [float(rate) for rate in found if isinstance(rate, int | float) and rate >= 0]
    if len(numbers) < len(exits) or not np.isclose(sum(numbers), 1, atol=1e-6):
        if len(exits) == 1:
            return [1.0]
        raise ConfigError(
            f"operating point {point.name!r} does not record how many samples leave at each exit",
            remedy="Give labelled images with --data",
        )
    return [number / sum(numbers) for number in numbers]
