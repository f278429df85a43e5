"""All that a cascade needs on the device, made once, when it is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

from edge_runtime.backends.cuda import decide
from edge_runtime.backends.cuda.base import (
    Body,
    Condition,
    Cuda,
    Event,
    ExecutableGraph,
    Stream,
)
from edge_runtime.backends.cuda.graphs import FramePlan, ahead_graph, frame_graph
from edge_runtime.backends.cuda.judge import Call, Judge
from edge_runtime.backends.cuda.slots import Keep, Slot
from edge_runtime.backends.cuda.stages import DeviceStages, Work
from edge_runtime.cascade import Plan, Stage
from edge_runtime.errors import CudaError
from edge_runtime.tensors import TensorSpec


class Prepared:
    """Streams, memory, kernels and graphs of an opened cascade.

    Args:
        cuda: The device, open.
        stages: What brings the stages' work.
        batch: Samples of every run.
        keep: Takes what must be closed later.

    Attributes:
        specs: Every tensor by its name, with all axes but the batch known.
        loaded: The stages by their names.
        exits: Name of the logits of each evaluated exit.
        positions: Index in the cascade of each evaluated exit.
        main: The stream that frames run on.
        side: The stream that brings images to the device: `main` where no frame is fed ahead.
        slots: Memory of one frame, or of two.
        judge: The exits' decisions.
        calls: Per slot and exit, the decision of which the host waits for the verdict.
        work: What `stages` was opened with.
        run_ahead: Names of the stages that run as soon as an image has arrived, in order.
        moments: Events for the begin and the end of a stage, where stages are timed.
    """

    main: Stream
    side: Stream
    judge: Judge
    work: Work
    run_ahead: Sequence[str]
    moments: tuple[Event, Event]

    def __init__(self, cuda: Cuda, stages: DeviceStages, batch: int, keep: Keep) -> None:
        self._cuda = cuda
        self._stages = stages
        self._batch = batch
        self._keep = keep
        self.stride = batch * decide.RECORD_BYTES
        self.specs: dict[str, TensorSpec] = {}
        self.loaded: dict[str, Stage] = {}
        self.exits: list[str] = []
        self.positions: list[int] = []
        self.slots: list[Slot] = []
        self.calls: list[list[Call]] = []
        #: Per slot, in the mode "graph".
        self.frame_graphs: list[ExecutableGraph] = []
        self.ahead_graphs: list[ExecutableGraph] = []

    def open(
        self,
        plan: Plan,
        axes: Mapping[str, int],
        variants: Mapping[str, str],
        *,
        mode: str,
        ahead: bool,
        timed: bool,
    ) -> None:
        """Allocate, compile and load.

        Args:
            plan: What will be run.
            axes: Lengths of the image's named axes.
            variants: Stage name -> precision.
            mode: The execution mode.
            ahead: Whether a frame may be fed while another is in flight.
            timed: Whether stages are timed.
        """
        cuda, keep = self._cuda, self._keep
        image = self._resolve(plan, axes)
        self.main = self.side = keep(cuda.stream())
        if ahead:
            self.side = keep(cuda.stream())
        if timed:
            self.moments = (keep(cuda.event()), keep(cuda.event()))
        exits = [self.specs[name] for name in self.exits]
        slots = range(2 if ahead else 1)
        self.slots += [Slot(i, cuda, image, self._batch, len(exits), keep) for i in slots]
        conditionals = mode == "graph"
        self.judge = Judge(cuda, exits, batch=self._batch, conditionals=conditionals, keep=keep)
        self._records: int = keep(cuda.memory(len(exits) * self.stride)).address
        self.work = Work(
            stages=tuple(self.loaded.values()),
            variants=variants,
            batch=self._batch,
            image=image,
            images=tuple(slot.image for slot in self.slots),
            ahead=_ahead(plan) if ahead else frozenset(),
        )
        self.run_ahead = [name for name in self.loaded if name in self.work.ahead]
        keep(closing(self._stages))
        self._stages.open(cuda, self.work, self.main)
        for slot in self.slots:
            self.calls.append([self._call(k, slot, mode) for k in range(len(exits))])

    def _resolve(self, plan: Plan, axes: Mapping[str, int]) -> TensorSpec:
        """Take over stages and tensors; returns the image's spec."""
        image = plan.image.resolve(axes)
        self.specs[image.name] = image
        for stage in plan.stages:
            inputs = tuple(spec.resolve(axes) for spec in stage.inputs)
            outputs = tuple(spec.resolve(axes) for spec in stage.outputs)
            self.loaded[stage.name] = Stage(stage.name, stage.kind, inputs, outputs)
            self.specs |= {spec.name: spec for spec in outputs}
        for spec in self.specs.values():
            spec.sample_shape()
        self.exits += [step.exit.logits for step in plan.steps]
        self.positions += [step.position for step in plan.steps]
        return image

    def record(self, k: int) -> int:
        """Device address of the verdict on exit `k`, for modes that copy it to the host."""
        return self._records + k * self.stride

    def _call(self, k: int, slot: Slot, mode: str) -> Call:
        logits = self._stages.address(self.exits[k], slot.number)
        record = None if mode == "polling" else self.record(k)
        return self.judge.call(k, slot, logits, record=record)

    def build_graphs(self, plan: Plan, *, nested: bool) -> None:
        """Build a frame's graph for each slot, and one that runs ahead where there are two."""
        for slot in self.slots:
            bring: Callable[[Body], None] = slot.bring
            if self.side is not self.main:
                ahead = [self._captured(stage, slot) for stage in self.run_ahead]
                self.ahead_graphs.append(self._keep(ahead_graph(self._cuda, slot.bring, ahead)))
                self.ahead_graphs[-1].upload(self.side)
                bring = _nothing
            steps = [
                [
                    self._captured(stage.name, slot)
                    for stage in step.stages
                    if stage.name not in self.work.ahead
                ]
                for step in plan.steps
            ]

            def judge(body: Body, k: int, condition: Condition | None, slot: Slot = slot) -> None:
                logits = self._stages.address(self.exits[k], slot.number)
                call = self.judge.call(k, slot, logits, on_device=True, condition=condition)
                body.launch(*call)

            frame_plan = FramePlan(bring, steps, judge, nested=nested)
            self.frame_graphs.append(self._keep(frame_graph(self._cuda, frame_plan)))
            self.frame_graphs[-1].upload(self.main)

    def _captured(self, stage: str, slot: Slot) -> int:
        try:
            return self._stages.captured(stage, slot.number)
        except CudaError as error:
            raise CudaError(f"stage {stage!r} can't be captured: {error}", stage=stage) from error


def _ahead(plan: Plan) -> frozenset[str]:
    """Names of the stages that need the image alone, or what such stages make of it."""
    known, found = {plan.image.name}, []
    for stage in plan.steps[0].stages:
        if stage.kind == "preprocess" and {spec.name for spec in stage.inputs} <= known:
            found.append(stage.name)
            known |= {spec.name for spec in stage.outputs}
    return frozenset(found)


def _nothing(body: Body) -> None:
    """The image is brought by another graph."""
