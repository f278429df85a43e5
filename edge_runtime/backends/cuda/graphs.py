"""A whole frame as one CUDA graph: a branch per exit, entered only if the exit before goes on.

The branches stand one behind the other (flat) or one inside the other (nested). `decide` at the end
of a branch sets the condition of the next one; conditions are 0 at every launch, so behind the exit
that answers nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_runtime.backends.cuda.base import Body, Condition, Cuda, ExecutableGraph

#: Adds the work of an exit's `decide` to a body; gets the exit's index and the next condition.
Judge = Callable[[Body, int, Condition | None], None]


@dataclass(frozen=True)
class FramePlan:
    """What a graph does.

    Attributes:
        bring: Adds the image's way to the device, where that belongs to this graph.
        steps: Per exit, the captured stages that run before it is judged.
        judge: Adds an exit's `decide`.
        nested: Whether branches stand inside each other.
    """

    bring: Callable[[Body], None]
    steps: Sequence[Sequence[int]]
    judge: Judge
    nested: bool = False


def frame_graph(cuda: Cuda, plan: FramePlan) -> ExecutableGraph:
    """Build the graph of a frame."""
    with cuda.graph() as graph:
        plan.bring(graph)
        body: Body = graph
        condition: Condition | None = None
        last = len(plan.steps) - 1
        for k, stages in enumerate(plan.steps):
            if condition is not None:
                body = (body if plan.nested else graph).branch(condition)
            for stage in stages:
                body.embed(stage)
            condition = graph.condition() if k < last else None
            plan.judge(body, k, condition)
        executable: ExecutableGraph = graph.instantiate()
    return executable


def ahead_graph(
    cuda: Cuda, bring: Callable[[Body], None], stages: Sequence[int]
) -> ExecutableGraph:
    """Build the graph that brings an image and preprocesses it, beside the frame before."""
    with cuda.graph() as graph:
        bring(graph)
        for stage in stages:
            graph.embed(stage)
        executable: ExecutableGraph = graph.instantiate()
    return executable
