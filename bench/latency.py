"""The cascade against its base model, in one run.

Three subjects classify every image in turn: the cascade at its operating point, the base model (the
last exit alone) in stages, and, where stages run in ONNX Runtime, the base model as one session.
Their ratios hold while the machine's speed drifts; absolute times are for the machine that the
result names.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime import device, options
from edge_runtime.backends.onnxrt import OnnxRuntimeOptions, new_session
from edge_runtime.console import Console, milliseconds
from edge_runtime.errors import EngineBuildError
from edge_runtime.evaluate import Series, classify_in_turn, figures, show
from edge_runtime.manifest import Bundle
from edge_runtime.scheduler import Scheduler
from edge_runtime.schema import plain
from edge_runtime.timing import Latency, ratio
from engines.one_piece import one_piece

#: Passes over the data go on until this much time was measured.
_DURATION_S = 20.0
_MAX_PASSES = 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime bench``."""
    options.add_bundle(parser)
    options.add_operating_point(parser)
    options.add_data(parser)
    parser.add_argument(
        "--duration",
        type=options.positive,
        default=_DURATION_S,
        metavar="SECONDS",
        help=f"measure about this long (default {_DURATION_S:.0f})",
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure the subjects and print exits, times and the speed-up."""
    bundle = Bundle.open(args.bundle)
    data = options.open_data(args, bundle)
    with ExitStack() as stack:
        cascade, base = options.open_with_base(args, bundle, data, stack)
        subjects: dict[str, Callable[[NDArray[Any]], object]] = {"cascade": cascade, "base": base}
        missing = _add_one_session(subjects, args, bundle, base)
        console.note(f"{len(data)} images, {len(subjects)} subjects in turn; warming up")
        passes = _passes(data.image(0), subjects, len(data), args.duration)
        series = classify_in_turn(data, subjects, console, passes=passes)
        exits, point, plan = cascade.exits, cascade.point, cascade.plan
    evaluation = figures(series["cascade"], series["base"], data.labels, exits)
    show(evaluation, point, bundle.cascade.exits[-1].name, console)
    times = _show_times(series, missing, console)
    console.line(f"pruned stages: {', '.join(plan.pruned) or 'none'}")
    console.line(f"bundle {bundle.path}, data {args.data}, operating point {point.name}")
    return {
        "bundle": bundle.hash,
        "data": data.hash,
        "operating_point": plain(point),
        "passes": passes,
        "evaluation": plain(evaluation),
        "subjects": times,
        "device": device.fingerprint(),
    }


def one_session(
    model: bytes, scheduler: Scheduler, options_: OnnxRuntimeOptions
) -> Callable[[Any], object]:
    """The model as a function of one image, in a single session that shares our threads."""
    height, width = scheduler.image.shape[1:3]
    session = new_session(model, options_, {"height": int(height), "width": int(width)})
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image[None]})


def _add_one_session(
    subjects: dict[str, Callable[[NDArray[Any]], object]],
    args: argparse.Namespace,
    bundle: Bundle,
    base: Scheduler,
) -> str:
    """Add the base as one session; returns why that was not possible, or nothing."""
    if args.backend != "onnxrt":
        return f"a session runs in ONNX Runtime, and the cascade on the backend {args.backend}"
    try:
        model = one_piece(bundle, bundle.cascade.exits[-1].name, base.point.variants)
    except EngineBuildError as error:
        return str(error)
    subjects["base as one session"] = one_session(model, base, options.onnxrt_options(args))
    return ""


def _passes(
    image: NDArray[Any],
    subjects: dict[str, Callable[[NDArray[Any]], object]],
    images: int,
    duration_s: float,
) -> int:
    """How often to go through the data so that the measurement takes about `duration_s`."""
    begin = time.perf_counter()
    for _ in range(3):
        for subject in subjects.values():
            subject(image)
    per_image = (time.perf_counter() - begin) / 3
    return max(1, min(_MAX_PASSES, round(duration_s / (per_image * images))))


def _show_times(series: dict[str, Series], missing: str, console: Console) -> dict[str, Any]:
    """Print each subject's times and its ratio to the cascade; returns them as JSON."""
    rows, found = [], {}
    cascade = series["cascade"].seconds.ravel()
    for name, one in series.items():
        latency = Latency.of(one.seconds)
        speed_up = ratio(one.seconds.ravel(), cascade, statistic=np.mean)
        found[name] = {"latency": plain(latency), "mean_time_over_cascade": plain(speed_up)}
        times = [latency.mean, latency.p50, latency.p90, latency.p99, latency.p999, latency.max]
        rows.append(
            (
                name,
                *(milliseconds(value) for value in times),
                "1" if name == "cascade" else str(speed_up),
            )
        )
    console.table(
        "time per image, ms, measured in turn",
        ("subject", "mean", "p50", "p90", "p99", "p99.9", "max", "cascade is faster by"),
        rows,
    )
    if missing:
        console.line(f"base as one session: not measured: {missing}")
    return found
