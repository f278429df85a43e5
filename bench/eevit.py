"""A ViT-B/16 with the eight published exits: in stages, as the thesis exports it, without exits.

The thesis exports one ONNX graph in which every layer is an If (`engines.fast_pass`). Here its
bundle in stages and that graph take the same paths, in turn, in one process: each exit forced, and
the full run in which all heads answer and none is taken. Beside them runs the plain ViT-B/16, one
session without exits. All read the same float pixels, without preprocessing, and all sessions share
one thread pool and one memory arena. The weights are random.

A path to a later exit is not the same work: the scheduler leaves out the heads of exits that can't
fire, which the graph can't. Up to the first exit, and in the full run, both run the same layers.
The warm-up is 10 rounds instead of 200: a round has some twenty runs of the model.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import edge_runtime as er
from edge_runtime import device, options
from edge_runtime.backends.onnxrt import OnnxRuntimeBackend, OnnxRuntimeOptions, new_session
from edge_runtime.cli import run_command
from edge_runtime.console import Console
from edge_runtime.errors import EngineBuildError, missing_package
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.scheduler import Scheduler
from edge_runtime.schema import plain
from edge_runtime.timing import Ratio, interleave, ratio, warm_up

if TYPE_CHECKING:
    from engines.models.early_exit import EarlyExit

Times = Mapping[str, NDArray[np.float64]]

#: Softmax probabilities lie between these two, so they force an exit and rule it out.
_ALWAYS, _NEVER = 0.0, 2.0
_WARM_UP_ROUNDS = 10
#: Name of the full run beside those of the exits.
_FULL = "all heads"


@dataclass(frozen=True)
class Setup:
    """What is compared; the defaults are the published model.

    Attributes:
        model: Name of the backbone.
        options: Of the backbone.
        image: Side of the image, in pixels.
        classes: Number of logits.
        exits: As `engines.models.early_exit.parse_exits` reads them.

    Reference:
        Thesis, sections 4.3 and 5.2.1.
    """

    model: str = "vit_base_patch16_224"
    options: Mapping[str, Any] = field(default_factory=dict)
    image: int = 224
    classes: int = 100
    exits: tuple[tuple[int, str, Mapping[str, int]], ...] = (
        *((layer, "lph", {"kernel": 3}) for layer in (3, 4)),
        *((layer, "lph", {"kernel": 0}) for layer in (5, 6)),
        *((layer, "gah", {"stride": 2}) for layer in (7, 8)),
        *((layer, "gah", {"stride": 3}) for layer in (9, 10)),
    )


@dataclass(frozen=True)
class _Row:
    """A line of the table: two subjects, and the largest ratio that we allow ourselves."""

    name: str
    subject: str
    against: str
    bar: float | None = None


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``python -m bench.eevit``."""
    parser.add_argument("--rounds", type=options.count, default=100, help="times each subject runs")
    parser.add_argument(
        "--threads", type=options.whole, default=0, help="0: one per core (default)"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Export the published model in three forms, measure all subjects, print the ratios."""
    return compare(Setup(), args.rounds, args.threads, console)


def compare(setup: Setup, rounds: int, threads: int, console: Console) -> dict[str, Any]:
    """Export a model in three forms, measure all paths in turn, print the ratios.

    Args:
        setup: The model.
        rounds: How often each subject runs.
        threads: Of the thread pool; 0 is one per core.
        console: Takes tables and progress.

    Returns:
        "ratios": name -> ratio of medians with its interval, and its bar; "median_ms": subject ->
        milliseconds; "logits_max_relative_error": largest difference between the forms, over the
        largest magnitude; "parameters": component -> number.

    Raises:
        EngineBuildError: A form could not be exported, or the graph takes another exit.
        BackendUnavailable: A package of the extra "train" is missing.
    """
    settings = OnnxRuntimeOptions(threads=threads)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = early_exit(setup)
        parameters = model.parameter_counts()
        console.table("parameters", ("component", "number"), parameters.items())
        forms = _Forms(model, setup, Path(folder), settings, stack, console)
        error = forms.largest_error()
        times = _measure(forms.subjects(), rounds, console)
    rows = _rows(forms.exits)
    found = {row.name: ratio(times[row.subject], times[row.against]) for row in rows}
    _show(rows, found, times, console)
    console.line(f"logits of the forms differ by {error:.1e} relative, at most")
    return {
        "ratios": {row.name: {**plain(found[row.name]), "bar": row.bar} for row in rows},
        "median_ms": {name: float(np.median(value)) * 1e3 for name, value in times.items()},
        "logits_max_relative_error": error,
        "parameters": parameters,
        "rounds": rounds,
        "threads": settings.thread_count,
        "environment": {**device.fingerprint(), "load_average": os.getloadavg()},
    }


def early_exit(setup: Setup) -> EarlyExit:
    """The model, with random weights that are always the same.

    Raises:
        BackendUnavailable: A package of the extra "train" is missing.
    """
    try:
        import torch

        from engines.models.backbones import BackboneRecipe, build_backbone
        from engines.models.early_exit import EarlyExit, parse_exits
    except ImportError as error:
        raise missing_package("torch", "train") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        recipe = BackboneRecipe(setup.model, setup.options)
        backbone = build_backbone(recipe, setup.classes, (3, setup.image, setup.image))
        example = torch.from_numpy(_pixels(setup))
        return EarlyExit(backbone, parse_exits(setup.exits), example).eval()


class _Forms:
    """The model in three forms, ready to run.

    Args:
        model: What to export.
        setup: What it is made of.
        folder: For files that are needed no longer than this.
        settings: Of all sessions.
        stack: Closes what was opened.
        console: Shows progress.

    Attributes:
        exits: Names of the early exits.
    """

    def __init__(
        self,
        model: EarlyExit,
        setup: Setup,
        folder: Path,
        settings: OnnxRuntimeOptions,
        stack: ExitStack,
        console: Console,
    ) -> None:
        import torch

        from engines.fast_pass import fast_pass_onnx
        from engines.torch_exporter import to_onnx

        self._pixels = _pixels(setup)
        self._settings, self._stack = settings, stack
        example = torch.from_numpy(self._pixels)
        count = len(model.heads)
        console.note("exporting stages")
        self._bundle = _export(model, setup, self._pixels, folder / "eevit.bundle")
        self.exits = [exit_.name for exit_ in self._bundle.cascade.exits[:-1]]
        console.note("exporting one graph with If nodes")
        self._graph = new_session(fast_pass_onnx(model, [_NEVER] * count, example), settings)
        console.note("exporting the plain model")
        samples = torch.cat([example, example])
        self._plain = new_session(
            to_onnx("plain", model.backbone, [samples], ["pixels"], ["logits"], 20), settings
        )
        self._thresholds = {_FULL: np.full(count, _NEVER, np.float32)}
        for i, name in enumerate(self.exits):
            forced = np.full(count, _NEVER, np.float32)
            forced[i] = _ALWAYS
            self._thresholds[name] = forced
        console.note("opening sessions")
        points = {
            name: OperatingPoint.forced(self._bundle.cascade, name)
            for name in (*self.exits, "final")
        }
        points[_FULL] = OperatingPoint.all_exits(self._bundle.cascade)
        self._staged = {name: self._open(point) for name, point in points.items()}

    def _open(self, point: OperatingPoint) -> Scheduler:
        backend = OnnxRuntimeBackend(self._bundle, self._settings)
        return self._stack.enter_context(Scheduler(self._bundle.cascade, backend, point))

    def subjects(self) -> dict[str, Callable[[], object]]:
        """What is measured, neighbours being compared."""
        found: dict[str, Callable[[], object]] = {}
        for name, thresholds in self._thresholds.items():
            found[f"staged {name}"] = functools.partial(self._staged[name], self._pixels[0])
            found[f"graph {name}"] = functools.partial(self._run_graph, thresholds)
        found["staged no heads"] = functools.partial(self._staged["final"], self._pixels[0])
        found["plain"] = self._run_plain
        return found

    def largest_error(self) -> float:
        """Largest difference between the logits of the forms, on the same paths."""
        answers = self._staged[_FULL].logits(self._pixels)
        errors = [_relative_error(answers["final"], self._run_plain())]
        for position, name in enumerate((*self.exits, "final")):
            logits, exit_ = self._run_graph(self._thresholds.get(name, self._thresholds[_FULL]))
            if int(exit_[0]) != position:
                raise EngineBuildError(
                    f"the graph with If nodes, {name} forced", got=int(exit_[0]), expected=position
                )
            errors.append(_relative_error(answers[name], logits))
        return float(np.max(errors))

    def _run_graph(self, thresholds: NDArray[np.float32]) -> Any:
        return self._graph.run(None, {"pixels": self._pixels, "thresholds": thresholds})

    def _run_plain(self) -> Any:
        return self._plain.run(None, {"pixels": self._pixels})[0]


def _export(model: EarlyExit, setup: Setup, pixels: NDArray[np.float32], out: Path) -> er.Bundle:
    import torch

    from engines.export import export_stages

    stages, exits = model.stages(torch.from_numpy(pixels))
    return export_stages(
        stages,
        exits,
        example=pixels,
        classes=[str(i) for i in range(setup.classes)],
        out=out,
        name=f"{setup.model}-random",
        one_piece_check=False,
        provenance={"model": model.describe()},
    )


def _pixels(setup: Setup) -> NDArray[np.float32]:
    shape = (1, 3, setup.image, setup.image)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _measure(subjects: Mapping[str, Callable[[], object]], rounds: int, console: Console) -> Times:
    def once() -> None:
        for subject in subjects.values():
            subject()

    console.note("warming up")
    warm_up(once, clock=time.perf_counter, iterations=_WARM_UP_ROUNDS)
    ticks = console.progress(range(rounds + 1), "measuring", rounds)
    return interleave(
        subjects, rounds=rounds, clock=time.perf_counter, each_round=lambda: next(ticks)
    )


def _rows(exits: list[str]) -> list[_Row]:
    rows = [
        _Row(name, f"staged {name}", f"graph {name}", None if i else 0.90)
        for i, name in enumerate(exits)
    ]
    return [
        *rows,
        _Row("full", f"staged {_FULL}", f"graph {_FULL}", 0.95),
        _Row("full_to_plain", f"staged {_FULL}", "plain", 1.12),
        _Row("no_heads_to_plain", "staged no heads", "plain"),
        _Row("graph_to_plain", f"graph {_FULL}", "plain"),
        _Row("first_exit_to_plain", f"staged {exits[0]}", "plain"),
        _Row("graph_first_exit_to_plain", f"graph {exits[0]}", "plain"),
    ]


def _show(rows: list[_Row], found: Mapping[str, Ratio], times: Times, console: Console) -> None:
    lines = []
    for row in rows:
        value = found[row.name]
        met = "" if row.bar is None else f"{row.bar:.2f} {_verdict(value.value, row.bar)}"
        medians = [f"{np.median(times[name]) * 1e3:.1f}" for name in (row.subject, row.against)]
        lines.append((row.subject, row.against, *medians, value, met))
    console.table(
        "ratios of medians, with 95 % intervals",
        ("subject", "against", "ms", "ms", "ratio", "at most"),
        lines,
    )


def _verdict(value: float, bar: float) -> str:
    return "met" if value <= bar else "NOT met"


def _relative_error(have: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    return float(np.abs(have - want).max() / np.abs(want).max())


if __name__ == "__main__":
    sys.exit(run_command("python -m bench.eevit", sys.modules[__name__], sys.argv[1:]))
