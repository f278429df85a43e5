"""The validated, immutable dataflow of a classifier that runs in stages.

A `Cascade` is a list of stages joined by named tensors, and a list of exits, each a tensor of
logits. It knows nothing of files, precisions or devices. `Cascade.plan` picks the exits that will
be evaluated and drops every stage that serves none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edge_runtime.errors import ConfigError
from edge_runtime.schema import nearest
from edge_runtime.tensors import TensorSpec

StageKind = Literal["preprocess", "saver", "segment", "head"]


@dataclass(frozen=True, slots=True)
class Stage:
    """A subgraph that is run as a unit.

    Attributes:
        name: Unique within the cascade.
        kind: What it is for: "preprocess", "saver", "segment" or "head".
        inputs: Tensors it reads: the image, or outputs of earlier stages.
        outputs: Tensors it writes.
    """

    name: str
    kind: StageKind
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Exit:
    """A place where a prediction may leave.

    Attributes:
        name: Unique within the cascade.
        logits: Name of the tensor that is judged, shape (batch, classes), float32 or float16.
    """

    name: str
    logits: str


@dataclass(frozen=True, slots=True)
class Step:
    """The stages up to one exit that earlier steps have not run, and that exit.

    Attributes:
        position: Index of the exit in `Cascade.exits`.
        exit: The exit that is decided after the stages.
        stages: Stages to run first, in order; may be empty.
        live: Tensors that later steps still read, in no particular order.
    """

    position: int
    exit: Exit
    stages: tuple[Stage, ...]
    live: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be run: one step per evaluated exit.

    Attributes:
        image: Spec of the cascade's input.
        steps: In order of execution; the last one always answers.
        pruned: Names of stages that serve no evaluated exit.
    """

    image: TensorSpec
    steps: tuple[Step, ...]
    pruned: tuple[str, ...]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages of all steps, in order of execution."""
        return tuple(stage for step in self.steps for stage in step.stages)


@dataclass(frozen=True)
class Cascade:
    """Stages and exits that fit together.

    Attributes:
        classes: Class names; their number is the length of every exit's logits.
        image: Spec of the only input, for a camera ("batch", "height", "width", 3) uint8.
        stages: In order of execution.
        exits: In order of evaluation; the last one always answers.

    Raises:
        ConfigError: From the constructor, when the parts don't fit: a name twice, a tensor that
            nobody or two stages produce, a cycle, shapes or dtypes that don't meet, logits of
            another width.
    """

    classes: tuple[str, ...]
    image: TensorSpec
    stages: tuple[Stage, ...]
    exits: tuple[Exit, ...]

    def __post_init__(self) -> None:
        """Check everything once, so that nothing later has to."""
        _unique("class", self.classes)
        _unique("stage", [stage.name for stage in self.stages])
        _unique("exit", [exit_.name for exit_ in self.exits])
        if len(self.classes) < 2:
            raise ConfigError("a classifier needs classes", got=len(self.classes), expected=">= 2")
        if not self.stages or not self.exits:
            raise ConfigError("a cascade needs at least one stage and one exit")
        specs = self._check_tensors()
        for exit_ in self.exits:
            self._check_exit(exit_, specs)

    def only(self, exits: Sequence[str]) -> Cascade:
        """The same stages with some of the exits.

        Args:
            exits: Their names in any order; the last exit is always among them.

        Raises:
            ConfigError: There is no such exit.
        """
        names = [exit_.name for exit_ in self.exits]
        for name in exits:
            if name not in names:
                raise ConfigError(f"the cascade has no exit {name!r}", remedy=nearest(name, names))
        kept = tuple(exit_ for exit_ in self.exits if exit_.name in exits)
        return replace(self, exits=kept if self.exits[-1] in kept else (*kept, self.exits[-1]))

    def plan(self, positions: Iterable[int]) -> Plan:
        """Choose what will be run.

        Args:
            positions: Indices of the exits that are evaluated, in any order.

        Returns:
            The steps for these exits, each with the stages that it needs and earlier ones have
            not run; stages that serve none of them are pruned.

        Raises:
            ConfigError: No exit, or one that does not exist.
        """
        chosen = sorted(set(positions))
        if not chosen or chosen[0] < 0 or chosen[-1] >= len(self.exits):
            raise ConfigError(
                "exits to evaluate", got=chosen, expected=f"some of 0..{len(self.exits) - 1}"
            )
        groups: list[tuple[int, tuple[Stage, ...]]] = []
        done: set[str] = set()
        for position in chosen:
            needed = self._ancestors(self.exits[position].logits) - done
            groups.append((position, tuple(s for s in self.stages if s.name in needed)))
            done |= needed
        return Plan(
            image=self.image,
            steps=tuple(
                Step(position, self.exits[position], stages, self._live(groups[: i + 1], groups))
                for i, (position, stages) in enumerate(groups)
            ),
            pruned=tuple(stage.name for stage in self.stages if stage.name not in done),
        )

    def _live(
        self,
        past: Sequence[tuple[int, tuple[Stage, ...]]],
        groups: Sequence[tuple[int, tuple[Stage, ...]]],
    ) -> tuple[str, ...]:
        """Tensors known after `past` that the groups after it read."""
        known = {self.image.name}
        known |= {spec.name for _, stages in past for stage in stages for spec in stage.outputs}
        read = {
            spec.name
            for _, stages in groups[len(past) :]
            for stage in stages
            for spec in stage.inputs
        }
        read |= {self.exits[position].logits for position, _ in groups[len(past) :]}
        return tuple(sorted(known & read))

    def _ancestors(self, tensor: str) -> set[str]:
        """Names of all stages that `tensor` depends on."""
        producers = {spec.name: stage for stage in self.stages for spec in stage.outputs}
        found: set[str] = set()
        queue = [tensor]
        while queue:
            stage = producers.get(queue.pop())
            if stage is not None and stage.name not in found:
                found.add(stage.name)
                queue.extend(spec.name for spec in stage.inputs)
        return found

    def _check_tensors(self) -> dict[str, TensorSpec]:
        """Check that every tensor has one producer, which comes first and fits its consumers."""
        for stage in self.stages:
            _unique(f"input of stage {stage.name!r}:", [spec.name for spec in stage.inputs])
            if not stage.inputs or not stage.outputs:
                raise ConfigError(f"stage {stage.name!r} needs at least one input and one output")
        later = {spec.name: stage.name for stage in self.stages for spec in stage.outputs}
        specs = {self.image.name: self.image}
        producer = {self.image.name: "the image"}
        for stage in self.stages:
            for spec in stage.inputs:
                if spec.name not in specs:
                    raise self._unproduced(stage, spec.name, later)
                if not specs[spec.name].meets(spec):
                    raise ConfigError(
                        f"stage {stage.name!r}: input {spec.name!r} does not fit what "
                        f"{producer[spec.name]} writes",
                        got=str(specs[spec.name]),
                        expected=str(spec),
                    )
            for spec in stage.outputs:
                if spec.name in specs:
                    raise ConfigError(
                        f"tensor {spec.name!r} has two producers: {producer[spec.name]} and "
                        f"stage {stage.name!r}"
                    )
                specs[spec.name] = spec
                producer[spec.name] = f"stage {stage.name!r}"
        return specs

    def _unproduced(self, stage: Stage, tensor: str, later: dict[str, str]) -> ConfigError:
        """The error for an input that no earlier stage produces."""
        if tensor not in later:
            return ConfigError(
                f"stage {stage.name!r}: nobody produces its input {tensor!r}",
                remedy=f"Tensors that exist: {', '.join(sorted({self.image.name, *later}))}",
            )
        if stage.name in self._ancestors(tensor):
            return ConfigError(
                f"stage {stage.name!r} is part of a cycle: its input {tensor!r} depends on its "
                "own outputs"
            )
        return ConfigError(
            f"stage {stage.name!r} is listed before {later[tensor]!r}, which produces its input "
            f"{tensor!r}",
            remedy="List stages in order of execution",
        )

    def _check_exit(self, exit_: Exit, specs: dict[str, TensorSpec]) -> None:
        spec = specs.get(exit_.logits)
        if spec is None or exit_.logits == self.image.name:
            raise ConfigError(f"exit {exit_.name!r}: no stage produces its logits {exit_.logits!r}")
        if spec.dtype not in ("float32", "float16") or spec.shape[1:] != (len(self.classes),):
            raise ConfigError(
                f"exit {exit_.name!r}: logits {exit_.logits!r}",
                got=str(spec),
                expected=f"(batch, {len(self.classes)}) float32 or float16, one per class",
            )


def _unique(what: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if not name or name in seen:
            raise ConfigError(f"the {what} name {name!r} is " + ("used twice" if name else "empty"))
        seen.add(name)
