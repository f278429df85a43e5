"""The blocks of a cascade at several precisions: what a backend loads, and what is run.

A stage at another precision than its operating point's is a stage of its own for the backend,
called "segment1.int8"; it reads and writes the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edge_runtime.cascade import Plan, Stage, Step
from edge_runtime.errors import ConfigError
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
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

    def check(self) -> None:
        """Refuse levels that are none.

        Raises:
            ConfigError: No stage has a variant of a level that some path takes.
        """
        records = [one for one in self._bundle.manifest.stages if one.kind != "preprocess"]
        taken = sorted({level for path in self._paths.paths for level in path})
        for name in (self._paths.levels[level] for level in taken):
            if not any(name in record.variants for record in records):
                known = ", ".join(
                    f"{record.name} ({', '.join(record.variants)})" for record in records
                )
                raise ConfigError(
                    f"level {name!r}: no stage of the bundle {self._bundle.path} has this variant",
                    got=known,
                    expected=f"{name} of one stage at least",
                    remedy="Make it with: edge-runtime quantize, or convert; then fit the gate",
                )

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
        """The plan with every variant as a stage of its own, for `Backend.open`.

        Raises:
            ConfigError: The bundle has another stage that is called as a variant would be.
        """
        steps = []
        for step in plan.steps:
            stages = {}
            for level in self.levels_at(step.position):
                for stage, name in zip(step.stages, self.runs(step, level), strict=True):
                    self._check_name(stage, name)
                    stages[name] = replace(stage, name=name)
            steps.append(replace(step, stages=tuple(stages.values())))
        return replace(plan, steps=tuple(steps))

    def _check_name(self, stage: Stage, name: str) -> None:
        others = {record.name for record in self._bundle.manifest.stages} - {stage.name}
        if name in others:
            raise ConfigError(
                f"stage {name!r} is called as the variant of stage {stage.name!r} would be",
                remedy="Export the bundle again with another name for it",
            )

    def choices(self, plan: Plan) -> list[dict[str, str]]:
        """Which variants run together, one choice per level: stage name -> precision.

        Blocks that no path takes at a level are at the highest one in its choice, so that together
        the choices name what is loaded and nothing else.
        """
        return [
            dict(self._variants)
            | {
                stage.name: precision
                for step in plan.steps
                for stage, precision in zip(
                    step.stages, self.precisions(step, self._nearest(step, level)), strict=True
                )
                if stage.kind != "preprocess"
            }
            for level in range(len(self._paths.levels))
        ]

    def _nearest(self, step: Step, level: int) -> int:
        own = self.levels_at(step.position)
        return level if level in own else own[0]

    def _default(self, stage: Stage) -> str:
        return self._bundle.precision(stage.name, self._variants)

    def _called(self, stage: Stage, precision: str) -> str:
        # A stage without a choice keeps its name: a backend may have a variant of its own for it.
        return stage.name if precision == self._default(stage) else f"{stage.name}.{precision}"


def variants_of(bundle: Bundle, point: OperatingPoint) -> list[dict[str, str]]:
    """Which variants an operating point runs together: one choice, or one per level of its gate.

    Args:
        bundle: The bundle.
        point: One of its operating points.

    Returns:
        Stage name -> precision; stages that are not named run as they do without a choice.

    Raises:
        ManifestError: The gate's file is missing, altered or not whole.
        ConfigError: The gate was fitted for another bundle, or has a level that no stage has.
    """
    if point.gate is None:
        return [dict(point.variants)]
    blocks = Blocks(bundle, bundle.gate(point.gate).paths, point.variants)
    blocks.check()
    return blocks.choices(bundle.cascade.plan(range(len(bundle.cascade.exits))))
