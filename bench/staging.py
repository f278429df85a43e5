"""What staging costs: a ViT-Tiny in four segments with three heads against the model in one piece.

All subjects run in turn in one process, on one image, and are compared as ratios of medians. The
model in one piece is a bundle of one stage, run by the same scheduler, so the ratio is the price of
the cuts alone; a bare ONNX Runtime session beside it shows what the scheduler adds. The naive
variant, a thread pool per session, can't share a process with the others: its pools would slow
them down too. It runs after them, in a process of its own, and is compared with the same one-piece
model. The scheduler's own cost is measured on the fake backend.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edge_runtime as er
from bench.latency.lineup import one_session
from bench.latency.other_process import OtherProcess
from edge_runtime import device, options
from edge_runtime.backends.fake import FakeBackend
from edge_runtime.backends.onnxrt import OnnxRuntimeBackend, OnnxRuntimeOptions
from edge_runtime.cli import run_command
from edge_runtime.console import Console
from edge_runtime.errors import missing_package
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.scheduler import Scheduler
from edge_runtime.timing import Ratio, interleave, ratio, warm_up
from engines.bundle import BuiltStage, write_bundle
from engines.one_piece import one_piece

Times = dict[str, NDArray[np.float64]]

#: Stages and classes of the cascade on which the scheduler's own cost is measured.
_FAKE_EXITS, _FAKE_CLASSES, _FAKE_FRAMES = 4, 10, 3000


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``python -m bench.staging``."""
    parser.add_argument("--rounds", type=options.count, default=200, help="times each subject runs")
    parser.add_argument(
        "--threads", type=options.whole, default=0, help="0: one per core (default)"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Export the model, measure all subjects, print the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        console.note("exporting a ViT-Tiny with random weights")
        bundle = export_vit_tiny(Path(folder) / "vit_tiny.bundle")
        whole = in_one_piece(bundle, Path(folder) / "one_piece.bundle")
        times, error = staged_times(bundle, whole, args.rounds, args.threads, console)
        console.note("measuring the naive variant in a process of its own")
        times["naive"] = naive_times(bundle, args.rounds, args.threads)
    found = {
        "staged_without_heads": ratio(times["staged_without_heads"], times["one_piece"]),
        "staged_with_heads": ratio(times["staged_with_heads"], times["one_piece"]),
        "naive": ratio(times["naive"], times["one_piece"]),
        "one_piece_to_bare_session": ratio(times["one_piece"], times["bare_session"]),
    }
    forced = [
        ratio(times[f"forced {e.name}"], _own_times(bundle, e, times)) for e in _exits(bundle)
    ]
    scheduler_us = scheduler_seconds_per_stage() * 1e6
    _show(found, forced, _exits(bundle), console)
    console.line(f"scheduler's own cost: {scheduler_us:.1f} us per stage, decision included")
    console.line(f"staged logits against one piece: {error:.1e} relative, at most")
    return {
        "ratios": {
            **{name: value.value for name, value in found.items()},
            "forced_exit": [value.value for value in forced],
        },
        "intervals": {
            **{name: [value.low, value.high] for name, value in found.items()},
            "forced_exit": [[value.low, value.high] for value in forced],
        },
        "median_ms": {name: float(np.median(value)) * 1e3 for name, value in times.items()},
        "scheduler_us_per_stage": scheduler_us,
        "logits_max_relative_error": error,
        "rounds": args.rounds,
        "environment": {**device.fingerprint(), "load_average": os.getloadavg()},
    }


def export_vit_tiny(out: Path) -> er.Bundle:
    """Write the staged ViT-Tiny as a bundle.

    Raises:
        BackendUnavailable: torch is not installed.
    """
    try:
        from bench import vit
    except ImportError as error:
        raise missing_package("torch", "export") from error
    from engines.export import export_stages
    from engines.preprocess import PreprocessSpec

    stages, exits = vit.stages()
    size = (vit.TINY.image, vit.TINY.image)
    return export_stages(
        stages,
        [er.Exit(name, logits) for name, logits in exits],
        example=_image()[None],
        image_size=size,
        preprocess=PreprocessSpec(size=size, mean=(0.5,) * 3, std=(0.5,) * 3),
        classes=[str(i) for i in range(vit.TINY.classes)],
        out=out,
        name="vit-tiny-random",
    )


def in_one_piece(bundle: er.Bundle, out: Path) -> er.Bundle:
    """The same model up to its last exit, as a bundle of one stage."""
    exit_ = bundle.cascade.exits[-1]
    logits = next(s for t in bundle.cascade.stages for s in t.outputs if s.name == exit_.logits)
    stage = er.Stage("whole", "segment", (bundle.cascade.image,), (logits,))
    return write_bundle(
        out,
        name=f"{bundle.manifest.name}, one piece",
        classes=bundle.cascade.classes,
        image=bundle.cascade.image,
        stages=[BuiltStage(stage, {"fp32": one_piece(bundle, exit_.name)})],
        exits=[exit_],
        provenance={"made_of": bundle.hash},
    )


def staged_times(
    bundle: er.Bundle, whole: er.Bundle, rounds: int, threads: int, console: Console
) -> tuple[Times, float]:
    """Run every subject that can share a process, in turn.

    Args:
        bundle: The staged model.
        whole: The same in one piece.
        rounds: How often each subject runs.
        threads: Of the thread pool; 0 is one per core.
        console: Shows progress.

    Returns:
        Name -> seconds, shape (rounds,); and the largest relative difference between the logits of
        the staged and the one-piece model.
    """
    settings = OnnxRuntimeOptions(threads=threads)
    image = _image()
    with ExitStack() as stack:

        def opened(point: OperatingPoint, of: er.Bundle = bundle) -> Scheduler:
            return stack.enter_context(_scheduler(of, point, settings))

        never = OperatingPoint("base", policy="never")
        base, one = opened(never), opened(never, whole)
        heads = opened(OperatingPoint.all_exits(bundle.cascade))
        bare = one_session(whole.stage_model("whole", "fp32"), image.shape[:2], settings)
        subjects: dict[str, Callable[[], object]] = {
            "bare_session": lambda: bare(image),
            "one_piece": lambda: one(image),
            "staged_without_heads": lambda: base(image),
            "staged_with_heads": lambda: heads(image),
        }
        for exit_ in _exits(bundle):
            forced = opened(OperatingPoint.forced(bundle.cascade, exit_.name))
            subjects[f"forced {exit_.name}"] = functools.partial(forced, image)
        own = opened(OperatingPoint.all_exits(bundle.cascade)).backend
        own.feed(image[None])
        for stage in bundle.cascade.stages:
            subjects[f"own {stage.name}"] = functools.partial(own.run, stage.name)
        times = _measure(subjects, rounds, console)
        error = _relative_error(base.logits(image[None]), one.logits(image[None]))
    return times, error


def naive_times(bundle: er.Bundle, rounds: int, threads: int) -> NDArray[np.float64]:
    """Seconds of the staged model, all heads evaluated, with a thread pool per session.

    Measured in a process of its own.
    """
    image, point = _image(), OperatingPoint.all_exits(bundle.cascade)
    size = (image.shape[0], image.shape[1])
    with OtherProcess(bundle.path, point, size, kind="naive", threads=threads) as naive:
        # Each call is two frames, the first of them untimed.
        warm_up(lambda: naive.classify(image), clock=time.perf_counter, iterations=100)
        return np.array([naive.classify(image).seconds for _ in range(rounds)])


def scheduler_seconds_per_stage() -> float:
    """Median time per stage that is not spent inside a stage, with every second stage an exit."""
    features = er.TensorSpec("image", ("batch", 16), "float32")
    stages, exits = [], []
    functions: dict[str, Any] = {}
    logits = np.random.default_rng(0).standard_normal((1, _FAKE_CLASSES)).astype(np.float32)
    for i in range(_FAKE_EXITS):
        after = er.TensorSpec(f"features{i}", ("batch", 16), "float32")
        answer = er.TensorSpec(f"logits{i}", ("batch", _FAKE_CLASSES), "float32")
        stages.append(er.Stage(f"segment{i}", "segment", (features,), (after,)))
        stages.append(er.Stage(f"head{i}", "head", (after,), (answer,)))
        exits.append(er.Exit(f"exit{i}", answer.name))
        functions[f"head{i}"] = lambda _, name=answer.name: {name: logits}
        features = after
    image = er.TensorSpec("image", ("batch", 16), "float32")
    classes = tuple(str(i) for i in range(_FAKE_CLASSES))
    cascade = er.Cascade(classes, image, tuple(stages), tuple(exits))
    frame = np.zeros(16, np.float32)
    costs = []
    point = OperatingPoint.all_exits(cascade)
    with Scheduler(cascade, FakeBackend(functions), point) as scheduler:
        for _ in range(_FAKE_FRAMES):
            begin = time.perf_counter()
            (prediction,) = scheduler.classify(frame[None])
            total = time.perf_counter() - begin
            costs.append(total - sum(run.duration_s for run in prediction.trace.stages))
    return float(np.median(costs)) / len(stages)


def _measure(subjects: Mapping[str, Callable[[], object]], rounds: int, console: Console) -> Times:
    def once() -> None:
        for subject in subjects.values():
            subject()

    warm_up(once, clock=time.perf_counter)
    ticks = console.progress(range(rounds + 1), "measuring", rounds)
    return interleave(
        subjects, rounds=rounds, clock=time.perf_counter, each_round=lambda: next(ticks)
    )


def _own_times(bundle: er.Bundle, exit_: er.Exit, times: Times) -> NDArray[np.float64]:
    """Sum of the times of an exit's stages, each run on its own, round by round."""
    position = bundle.cascade.exits.index(exit_)
    names = [stage.name for stage in bundle.cascade.plan([position]).stages]
    total: NDArray[np.float64] = np.sum([times[f"own {name}"] for name in names], axis=0)
    return total


def _exits(bundle: er.Bundle) -> Sequence[er.Exit]:
    return bundle.cascade.exits


def _scheduler(bundle: er.Bundle, point: OperatingPoint, settings: OnnxRuntimeOptions) -> Scheduler:
    image = _image()
    return Scheduler(
        bundle.cascade,
        OnnxRuntimeBackend(bundle, settings),
        point,
        image_size=(image.shape[0], image.shape[1]),
    )


def _image() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)


def _relative_error(
    staged: Mapping[str, NDArray[np.float32]], whole: Mapping[str, NDArray[np.float32]]
) -> float:
    """Largest difference of the last exit's logits over their largest magnitude."""
    (have,), (want,) = staged.values(), whole.values()
    return float(np.abs(have - want).max() / np.abs(want).max())


def _show(
    found: Mapping[str, Ratio], forced: Sequence[Ratio], exits: Sequence[er.Exit], console: Console
) -> None:
    against = {"one_piece_to_bare_session": "bare session"}
    rows = [
        (name.split("_to_")[0].replace("_", " "), against.get(name, "one piece"), value)
        for name, value in found.items()
    ]
    rows += [
        (f"forced {exit_.name}", "sum of its stages alone", value)
        for exit_, value in zip(exits, forced, strict=True)
    ]
    console.table("ratios of medians, with 95 % intervals", ("subject", "against", "ratio"), rows)


if __name__ == "__main__":
    sys.exit(run_command("python -m bench.staging", sys.modules[__name__], sys.argv[1:]))
