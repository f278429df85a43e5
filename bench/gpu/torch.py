"""Real models: the execution modes against what people do in PyTorch, with and without graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bench.gpu.lab import Lab, NotRun, Times, leaving_at, microseconds
from edge_runtime.backends.torch import TorchBackend, import_torch
from edge_runtime.backends.torch_cuda import TorchStages
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.prediction import Prediction
from edge_runtime.scheduler import Scheduler
from edge_runtime.timing import ratio

if TYPE_CHECKING:
    from bench.gpu.models import Model

#: What is compared with; and the subject that is to be faster.
_BASE, _SUBJECT = "sync", "graph"
_EAGER, _PER_STAGE = "torch eager", "torch graph per stage"
_MODES = ("graph", "polling", "sync")
#: Rounds of a measurement, and resamples of an interval.
_ROUNDS, _RESAMPLES = 300, 1000
_PAUSE_S = 100e-6
#: Frames that are compared with and without overlap.
_OVERLAPPED = 12
#: A margin between logits that every image has: the exit that is to be left at, is.
_MARGIN = 1e-6


def models(lab: Lab) -> dict[str, Any]:
    """A ViT-S with 8 exits and a ResNet-50 with 4, one image at a time."""
    if lab.reasons[_BASE]:
        raise NotRun(f"it compares with the mode {_BASE}, which is not run: {lab.reasons[_BASE]}")
    torch = import_torch(f"cuda:{lab.device}")
    from bench.gpu import models

    made: dict[str, Callable[[], Model]] = {
        "ViT-S/16, 8 exits": models.vit_with_exits,
        "ResNet-50, 4 exits": models.resnet_with_exits,
    }
    found: dict[str, Any] = {}
    overlapped: dict[str, int] = {}
    for number, (name, make) in enumerate(made.items()):
        seconds = lab.left_s / (len(made) - number)
        model = make()
        found[name] = _compare(lab, torch, model, seconds)
        overlapped[name] = _different_when_overlapped(lab, model)
        torch.cuda.empty_cache()
    judged = judge(found)
    return {
        **judged,
        "ok": judged["ok"] and not any(overlapped.values()),
        "frames_different_when_overlapped": overlapped,
        "dtype": "float32",
        "tf32": {
            "matmul": bool(torch.backends.cuda.matmul.allow_tf32),
            "cudnn": bool(torch.backends.cudnn.allow_tf32),
        },
        "models": found,
        "not_run": lab.missing(*_MODES),
    }


def _different_when_overlapped(lab: Lab, model: Model) -> int:
    """How many of some frames give something else when the next one is fed ahead."""
    of = model.cascade
    point = leaving_at(of, len(of.exits) - 1)
    shape = (_OVERLAPPED, *of.image.sample_shape())
    images = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    mode = lab.modes("graph", "polling", "sync")[0]
    said = []
    for options in ({}, {"overlap": True}):
        stages = TorchStages(model.modules, device=lab.device)
        with lab.scheduler(of, point, mode, stages=stages, **options).open() as scheduler:
            said.append([_all_labels(one) for one in scheduler.each(images)])
    return sum(a != b for a, b in zip(*said, strict=True))


def _all_labels(prediction: Prediction | list[Prediction]) -> list[int]:
    assert isinstance(prediction, Prediction)
    return [run.label for run in prediction.trace.exits]


def judge(found: Mapping[str, Any]) -> dict[str, Any]:
    """Whether all subjects agree, and graph is below sync wherever that waits more than once.

    Args:
        found: Model -> where it leaves -> "over_sync" (subject -> ratio, low, high), "agree".
    """
    slower, disagree, said = [], [], []
    for model, places in found.items():
        for place, figures in places.items():
            over = figures["over_sync"].get(_SUBJECT)
            if not figures["agree"]:
                disagree.append(f"{model} {place}")
            # Without exits, and at the first one, either mode waits once: nothing is promised.
            waits_once = place in ("no exit", "first exit")
            if over is not None and not waits_once and not over[2] < 1:
                slower.append(f"{model} {place}: {over[0]:.3f} [{over[1]:.3f}, {over[2]:.3f}]")
        ratios = [
            f"{place} {figures['over_sync'][_SUBJECT][0]:.3f}"
            for place, figures in places.items()
            if _SUBJECT in figures["over_sync"]
        ]
        said.append(f"{model}: {', '.join(ratios) or 'no mode graph here'}")
    return {
        "ok": not slower and not disagree,
        "summary": "graph over sync: "
        + "; ".join(said)
        + "".join(f"; labels differ: {one}" for one in disagree),
        "graph_below_sync": not slower,
        "graph_not_below_sync": slower,
        "labels_differ": disagree,
        "bound": "the interval of graph over sync is below 1 at the middle and the last exit",
    }


def _compare(lab: Lab, torch: Any, model: Model, seconds: float) -> dict[str, Any]:
    """Every subject at every place."""
    of = model.cascade
    exits = len(of.exits)
    shape = of.image.sample_shape()
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    begin = lab.clock()
    with ExitStack() as stack:

        def opened(point: OperatingPoint) -> dict[str, Scheduler]:
            made = {
                mode: lab.scheduler(
                    of, point, mode, stages=TorchStages(model.modules, device=lab.device)
                )
                for mode in lab.modes(*_MODES)
            }
            eager = TorchBackend(model.modules, device=f"cuda:{lab.device}")
            made[_EAGER] = Scheduler(of, eager, point)
            return {name: stack.enter_context(one) for name, one in made.items()}

        with_exits = opened(leaving_at(of, 0))
        base = opened(OperatingPoint("base", policy="never"))
        per_stage = stack.enter_context(PerStage(torch, model, f"cuda:{lab.device}"))
        places = {"first exit": 0, "middle exit": exits // 2, "last exit": exits - 1}
        left = seconds - (lab.clock() - begin)
        share = max(left, 0.0) / (len(places) + 1)
        found = {}
        for place, k in places.items():
            for scheduler in with_exits.values():
                scheduler.switch(leaving_at(of, k))
            margins = [_MARGIN if i == k else float("inf") for i in range(k + 1)]
            manual = functools.partial(per_stage.leaving(range(k + 1), margins), image)
            found[place] = _measured(lab, with_exits, manual, image, share)
        manual = functools.partial(per_stage.leaving([exits - 1], [_MARGIN]), image)
        found["no exit"] = _measured(lab, base, manual, image, share)
    return found


def _measured(
    lab: Lab,
    schedulers: Mapping[str, Scheduler],
    manual: Callable[[], int],
    image: NDArray[Any],
    seconds: float,
) -> dict[str, Any]:
    subjects: dict[str, Callable[[], object]] = {
        name: functools.partial(scheduler, image) for name, scheduler in schedulers.items()
    }
    labels = {name: _label(scheduler(image)) for name, scheduler in schedulers.items()}
    labels[_PER_STAGE] = manual()
    subjects[_PER_STAGE] = manual
    times = lab.measure(
        subjects, rounds=lab.count(_ROUNDS, least=4), seconds=seconds, pause_s=_PAUSE_S
    )
    return figures(times, labels)


def figures(times: Times, labels: Mapping[str, int]) -> dict[str, Any]:
    """What one place gave.

    Args:
        times: Subject -> seconds per frame, shape (rounds,).
        labels: Subject -> its answer.
    """
    over = {
        name: ratio(seconds, times[_BASE], resamples=_RESAMPLES)
        for name, seconds in times.items()
        if name != _BASE
    }
    return {
        # torch's own ways may choose other algorithms, and random weights decide by a hair.
        "agree": len({labels[mode] for mode in _MODES if mode in labels}) == 1,
        "labels": dict(labels),
        "us": {name: microseconds(seconds) for name, seconds in times.items()},
        "us_99th_percentile": {
            name: microseconds(np.percentile(seconds, 99)) for name, seconds in times.items()
        },
        "over_sync": {name: [r.value, r.low, r.high] for name, r in over.items()},
        "rounds": len(times[_BASE]),
    }


def _label(prediction: Prediction | list[Prediction]) -> int:
    assert isinstance(prediction, Prediction)
    return prediction.label


class PerStage:
    """What careful PyTorch code does: a CUDA graph per stage, and one read-back at every exit.

    The margin between the two largest logits and the label are part of each head's graph, in one
    tensor of two numbers.

    Args:
        torch: The module.
        model: Its modules are on the device already.
        device: "cuda:0" or another one.
    """

    def __init__(self, torch: Any, model: Model, device: str) -> None:
        self._torch = torch
        self._model = model
        self._device = device
        self._graphs: dict[str, Any] = {}
        self._tensors: dict[str, Any] = {}
        self._said: dict[str, Any] = {}

    def __enter__(self) -> PerStage:
        """Capture every stage."""
        torch, of = self._torch, self._model.cascade
        shape = (1, *of.image.sample_shape())
        # A pinned image is copied without a detour.
        self._pinned = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
        self._host = self._pinned.numpy()
        self._tensors[of.image.name] = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        self._stream = torch.cuda.Stream(self._device)
        pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode():
            for stage in of.stages:
                run = functools.partial(self._run, stage.name)
                with torch.cuda.stream(self._stream):
                    for _ in range(3):
                        run()
                self._stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(
                    graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    run()
                self._graphs[stage.name] = graph
        return self

    def _run(self, name: str) -> None:
        """Run a stage eagerly, and keep what it makes."""
        stage = next(stage for stage in self._model.cascade.stages if stage.name == name)
        (source,), (target,) = stage.inputs, stage.outputs
        made = self._model.modules[name](self._tensors[source.name])
        self._tensors[target.name] = made
        if stage.kind == "head":
            best = self._torch.topk(made[0], 2)
            label = best.indices[0].to(best.values.dtype)
            self._said[target.name] = self._torch.stack((best.values[0] - best.values[1], label))

    def leaving(
        self, exits: Sequence[int], margins: Sequence[float]
    ) -> Callable[[NDArray[Any]], int]:
        """A function from an image, shape (height, width, 3) uint8, to its label.

        Args:
            exits: Indices of the exits that are evaluated.
            margins: Of each of them: the margin between the largest logits at which it answers.
        """
        steps = [
            ([self._graphs[stage.name].replay for stage in step.stages], self._said[logits], least)
            for step, least in zip(self._model.cascade.plan(exits).steps, margins, strict=True)
            for logits in [step.exit.logits]
        ]
        there = self._tensors[self._model.cascade.image.name]

        def classify(image: NDArray[Any]) -> int:
            with self._torch.cuda.stream(self._stream):
                self._host[0] = image
                there.copy_(self._pinned, non_blocking=True)
                for replays, said, least in steps:
                    for replay in replays:
                        replay()
                    margin, label = said.tolist()
                    if margin >= least:
                        return int(label)
            raise EdgeRuntimeError(f"no exit had a margin of {margins[-1]:g}")

        return classify

    def __exit__(self, *_: object) -> None:
        """Free the graphs."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs, self._tensors, self._said = {}, {}, {}
