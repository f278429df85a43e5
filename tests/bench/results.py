"""Results of a bench that never ran, for tests of what is made of results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from bench.result import (
    METHOD,
    Distribution,
    Energy,
    ExitFigures,
    Expectation,
    FrameTrace,
    LatencyTable,
    Point,
    Result,
    Span,
    StageFigures,
    SubjectEnergy,
    SubjectFigures,
    Throughput,
)
from edge_runtime import OperatingPoint
from edge_runtime.timing import Ratio

EXITS = ("saver", "middle", "final")
#: Share of frames, accuracy and seconds at each exit.
SHARES = (0.6, 0.3, 0.1)
ACCURACIES = (0.99, 0.95, 0.8)
SECONDS = (0.5e-3, 2e-3, 5e-3)
STAGES = (
    ("preprocess", "preprocess", 0.1e-3),
    ("saver", "saver", 0.35e-3),
    ("segment1", "segment", 1.3e-3),
    ("head1", "head", 0.15e-3),
    ("segment2", "segment", 2.9e-3),
)
#: What an exit needs beyond those before it.
NEEDS = (2, 4, 5)


def durations(mean: float, count: int = 400, seed: int = 0) -> np.ndarray:
    """Seconds around a mean, a few of them slow."""
    noise = np.random.default_rng(seed).gamma(20, 1 / 20, count)
    return mean * noise


def distribution(mean: float, count: int = 400, seed: int = 0) -> Distribution:
    """The distribution of `durations`."""
    return Distribution.of(durations(mean, count, seed), curve=True)


def made_up_result(name: str = "Orin NX", slower: float = 1.0, **changes: Any) -> Result:
    """A whole result of a cascade with three exits.

    Args:
        name: Of the machine.
        slower: Factor on all times.
        **changes: Fields of the result that differ.
    """
    seconds = [slower * s for s in SECONDS]
    frames = 1000
    counts = [round(share * frames) for share in SHARES]
    mixed = np.concatenate(
        [durations(s, n, i) for i, (s, n) in enumerate(zip(seconds, counts, strict=True))]
    )
    mixed = np.random.default_rng(9).permutation(mixed)
    expected = float(np.dot(SHARES, seconds))
    base = seconds[-1]
    subjects = [
        SubjectFigures(
            name=subject,
            what=what,
            latency=distribution(mean, frames, 5),
            over_cascade=Ratio(mean / expected, 0.97 * mean / expected, 1.03 * mean / expected),
            unsteadiness=0.01,
            blocks=tuple(durations(mean, 20, 6).tolist()),
        )
        for subject, what, mean in (
            ("base", "the last exit alone, in stages", base),
            ("base as one session", "the last exit alone, one ONNX Runtime session", 0.98 * base),
        )
    ]
    cascade = SubjectFigures(
        name="cascade",
        what="at the operating point",
        latency=Distribution.of(mixed, curve=True),
        over_cascade=Ratio(1.0, 1.0, 1.0),
        unsteadiness=0.012,
        blocks=tuple(mixed.reshape(20, 50).mean(axis=1).tolist()),
    )
    exits = [
        ExitFigures(
            name=exit_,
            evaluated=True,
            count=count,
            share=share,
            accuracy=accuracy,
            latency=distribution(s, count, i),
            inference=distribution(0.9 * s, count, i),
            forced=distribution(s, frames, i + 3),
            joules=8.0 * s,
        )
        for i, (exit_, count, share, accuracy, s) in enumerate(
            zip(EXITS, counts, SHARES, ACCURACIES, seconds, strict=True)
        )
    ]
    reached = [1.0, 1.0, 0.4, 0.4, 0.1]
    stages = [
        StageFigures(
            name=stage,
            kind=kind,
            precision="fp32",
            share=share,
            latency=distribution(slower * s, round(share * frames), i),
        )
        for i, ((stage, kind, s), share) in enumerate(zip(STAGES, reached, strict=True))
    ]
    made = Result(
        kind="bench",
        name=name,
        command="edge-runtime bench my.bundle --data photos",
        created="2026-11-24T15:00:00+00:00",
        method=METHOD,
        bundle="b" * 64,
        bundle_name="my-cascade",
        data="d" * 64,
        images=500,
        operating_point=OperatingPoint(
            "zero_loss", thresholds={"saver": 0.9, "middle": 0.8}, bundle="b" * 64
        ),
        backend="onnxrt",
        mode="host",
        warm_up_s=0.5,
        measured_s=20.0,
        environment={"machine": {"cpu": name, "cores": 8}, "threads": 0},
        accuracy=float(np.dot(SHARES, ACCURACIES)),
        base_accuracy=0.96,
        end_to_end=cascade.latency,
        inference=Distribution.of(0.9 * mixed, curve=True),
        host_gap=Distribution.of(0.02 * mixed, curve=True),
        subjects=(cascade, *subjects),
        exits=tuple(exits),
        stages=tuple(stages),
        expectation=Expectation(
            seconds=expected,
            measured=float(mixed.mean()),
            ratio=Ratio(float(mixed.mean()) / expected, 0.98, 1.02),
        ),
        throughput=(
            Throughput(batch=8, calls=50, cascade=900.0, base=300.0, speed_up=Ratio(3.0, 2.9, 3.1)),
        ),
        energy=(made_up_energy(slower),),
        points=(
            Point(name="base", accuracy=0.96, seconds=base),
            Point(name="zero_loss", accuracy=0.96, seconds=expected),
            Point(name="drop_1", accuracy=0.95, seconds=0.7 * expected),
        ),
        frames=(frame(slower),),
        latency_table=latency_table(slower),
        not_measured={"PyTorch eager": "the package torch is not installed"},
    )
    return replace(made, **changes)


def made_up_energy(slower: float = 1.0) -> Energy:
    """Energy at 8 W busy and 5 W idle."""
    idle = SubjectEnergy(subject="idle", seconds=2.0, frames=0, joules=10.0, watts=5.0)
    busy = [
        SubjectEnergy(
            subject=name,
            seconds=2.0,
            frames=round(2.0 / (slower * s)),
            joules=16.0,
            watts=8.0,
            joules_per_frame=8.0 * slower * s,
            spread=0.02,
        )
        for name, s in (
            ("cascade", float(np.dot(SHARES, SECONDS))),
            ("base", SECONDS[-1]),
            *((f"exit {exit_} always", s) for exit_, s in zip(EXITS, SECONDS, strict=True)),
        )
    ]
    return Energy(reader="VDD_IN (INA3221)", hertz=48.0, subjects=(idle, *busy))


def frame(slower: float = 1.0) -> FrameTrace:
    """One frame that went through all stages."""
    begin, spans = 0.02e-3, []
    for name, kind, s in STAGES:
        spans.append(Span(name=name, kind=kind, begin=begin, seconds=slower * s))
        begin += slower * s
        if name in ("saver", "head1", "segment2"):
            spans.append(Span(name=f"decide {name}", kind="decide", begin=begin, seconds=0.01e-3))
            begin += 0.01e-3
    return FrameTrace(what="slowest frame", exit="final", seconds=begin, spans=tuple(spans))


def latency_table(slower: float = 1.0, frames: int = 200) -> LatencyTable:
    """Times of single stages, with 8 W while a stage runs."""
    columns = [durations(slower * s * 1e6, frames, i) for i, (_, _, s) in enumerate(STAGES)]
    return LatencyTable(
        stages=tuple(name for name, _, _ in STAGES),
        precisions=("fp32",) * len(STAGES),
        exits=EXITS,
        stage_us=tuple(map(tuple, np.stack(columns, axis=1).round(2).tolist())),
        decide_us=tuple(map(tuple, np.full((frames, len(EXITS)), 10.0).tolist())),
        around_us=tuple(np.full(frames, 20.0).tolist()),
        watts={name: 8.0 for name, _, _ in STAGES},
    )
