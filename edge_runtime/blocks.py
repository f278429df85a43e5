"""The blocks of a cascade at several precisions: what a backend loads, and what is run.

A stage at another precision than its operating point's is a stage of its own for the backend,
called "segment1.int8"; it reads and writes the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edge_runtime.cascade import Plan, Stage, Step
from edge_runtime.manifest import Bundle
from edge_runtime.paths import Paths


class Blocks:
    """The stages of each block at each level that some path takes.

    Args:
        bundle: Where the stages come from.
        paths: The paths, one block per exit of the bundle.
        variants: Stage name -> precision, for stages that have no variant of a level and do not
            run at their first one.
    """

    def __init__(self, bundle: Bundle, paths: Paths, variants: Mapping[str, str]) -> None:
        self._bundle = bundle
        self._paths = paths
        self._variants = variants

    def levels_at(self, position: int) -> list[int]:
        """Levels at which some path runs a block, rising."""
        paths = self._paths.paths
        return sorted({path[position] for path in paths if len(path) > position})

    def precisions(self, step: Step, level: int) -> tuple[str, ...]:
        """The precision of each stage of a block at a level: its own where it lacks the level's."""
        name = self._paths.levels[level]
        return tuple(
            name
            if stage.kind != "preprocess" and name in self._bundle.record(stage.name).variants
            else self._default(stage)
            for stage in step.stages
        )

    def runs(self, step: Step, level: int) -> tuple[str, ...]:
        """What the backend calls the stages of a block at a level."""
        return tuple(
            self._called(stage, precision)
            for stage, precision in zip(step.stages, self.precisions(step, level), strict=True)
        )

    def loaded(self, plan: Plan) -> Plan:
        """The plan with every variant as a stage of its own, for `Backend.open`."""
        steps = []
        for step in plan.steps:
            stages = {
                name: replace(stage, name=name)
                for level in self.levels_at(step.position)
                for stage, name in zip(step.stages, self.runs(step, level), strict=True)
            }
            steps.append(replace(step, stages=tuple(stages.values())))
        return replace(plan, steps=tuple(steps))

    def _default(self, stage: Stage) -> str:
        return self._bundle.precision(stage.name, self._variants)

    def _called(self, stage: Stage, precision: str) -> str:
        # A stage without a choice keeps its name: a backend may have a variant of its own for it.
        return stage.name if precision == self._default(stage) else f"{stage.name}.{precision}"
