"""Runs a cascade with a gate: after each exit a sample leaves, or goes on at a chosen precision.

```
with er.load("my.bundle", operating_point="gate") as cascade:
    prediction = cascade(image)
    [(run.stage, run.precision) for run in prediction.trace.stages]
```

All variants that a path can take are loaded; boundary tensors have one dtype, so a stage reads what
any variant of the one before has written.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime import confidence
from edge_runtime.backends.base import Backend
from edge_runtime.blocks import Blocks
from edge_runtime.cascade import Plan, Step
from edge_runtime.errors import ConfigError, InputError
from edge_runtime.frame import ExpectedTimes, Frame
from edge_runtime.gate import LEAVE, Gate
from edge_runtime.gate_model import GateModel
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import GateChoice, OperatingPoint
from edge_runtime.paths import Levels
from edge_runtime.policy import Policy
from edge_runtime.prediction import Prediction
from edge_runtime.scheduler import PreparedStep, Scheduler
from edge_runtime.timing import Clock

_ANEW = "Open the cascade anew with this operating point"


class GatedScheduler(Scheduler):
    """A cascade with a gate that is ready to run; it takes images one at a time.

    Args:
        bundle: What to run.
        backend: What runs its stages; the host must be the one that decides.
        point: Of the policy "gate".
        image_size: As in `Scheduler`.
        clock: As in `Scheduler`.

    Attributes:
        gate_s: Seconds that the gate took in the frame that was finished last.

    Raises:
        ConfigError: From the constructor: the point has no gate, one of another bundle, one with
            a level that no stage has, or none of its cost column and lambda.
        ManifestError: From the constructor: the gate's file is not whole.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        point: OperatingPoint,
        *,
        image_size: tuple[int, int] | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        super().__init__(bundle.cascade, backend, point, image_size=image_size, clock=clock)
        self._model = bundle.gate(_choice(point))
        self._blocks = Blocks(bundle, self._model.paths, point.variants)
        self._blocks.check()
        self._gate = self._gate_of(point)
        self.gate_s = 0.0

    @property
    def model(self) -> GateModel:
        """The gate that was fitted."""
        return self._model

    def open(self) -> GatedScheduler:
        """Load every variant that a path of the gate can take; see `Scheduler.open`."""
        self.backend.host_decides = True
        super().open()
        return self

    def switch(self, point: OperatingPoint) -> None:
        """Go on with another lambda or cost column from the next frame on.

        Raises:
            ConfigError: It has another gate, or none, or the gate lacks the cost column; the
                cascade goes on as before.
        """
        policy = self._policy_of(point)
        got, have = _choice(point), _choice(self.point)
        for what, one, other in (
            ("gate", got.sha256[:12], have.sha256[:12]),
            ("variants of stages", dict(point.variants), dict(self.point.variants)),
        ):
            if one != other:
                raise ConfigError(
                    f"operating point {point.name!r}: {what}",
                    got=one or "the first ones",
                    expected=f"{other or 'the first ones'}, for which the cascade was opened",
                    remedy=_ANEW,
                )
        with self._lock:
            self._check_open()
            self._drain()
            self._use(point, policy)

    def classify(
        self, images: NDArray[Any], *, deadline_s: float | None = None
    ) -> list[Prediction]:
        """Classify images one after the other; a deadline is for each of them."""
        if not _are_several(images):
            return super().classify(images, deadline_s=deadline_s)
        with self._lock:
            self._check_open()
            checked = self.image.check(images)
        single = super().classify
        return [single(image[None], deadline_s=deadline_s)[0] for image in checked]

    def block(self, position: int, level: int) -> PreparedStep:
        """What is run for an exit at a level."""
        return self._at[position][level]

    @property
    def precisions(self) -> dict[str, tuple[str, ...]]:
        """Stage name -> the precisions at which it may run, the highest level's first."""
        found: dict[str, dict[str, None]] = {}
        for block in self._at:
            for step in block.values():
                for stage, precision in zip(step.stages, step.precisions, strict=True):
                    found.setdefault(stage, {})[precision] = None
        return {stage: tuple(precisions) for stage, precisions in found.items()}

    def _policy_of(self, point: OperatingPoint) -> Policy:
        _choice(point)
        return point.policy_for(self.cascade)

    def _gate_of(self, point: OperatingPoint) -> Gate:
        choice = _choice(point)
        return Gate(self._model, self._model.costs(choice.cost), choice.trade_off)

    def _loaded(self, plan: Plan) -> Plan:
        return self._blocks.loaded(plan)

    def _use(self, point: OperatingPoint, policy: Policy) -> None:
        gate = self._gate_of(point)
        super()._use(point, policy)
        self._gate = gate
        self._at = [
            {level: self._at_level(step, level) for level in self._blocks.levels_at(step.position)}
            for step in self.plan.steps
        ]
        self._level_count = len(self._model.paths.levels)

    def _prepared(self, step: Step) -> PreparedStep:
        return self._at_level(step, self._blocks.levels_at(step.position)[0])

    def _at_level(self, step: Step, level: int) -> PreparedStep:
        """As `Scheduler._prepared`, at a level."""
        stages = tuple(stage.name for stage in step.stages)
        runs = self._blocks.runs(step, level)
        return PreparedStep(
            position=step.position,
            exit=step.exit.name,
            logits=step.exit.logits,
            temperature=self.point.temperatures.get(step.exit.name, 1.0),
            stages=stages,
            runs=runs,
            # A backend may run a stage at a variant of its own where nobody has chosen one.
            precisions=tuple(
                self.backend.precision(run) if run == stage else precision
                for stage, run, precision in zip(
                    stages, runs, self._blocks.precisions(step, level), strict=True
                )
            ),
            live=step.live,
            level=level,
        )

    def _begin(self, images: NDArray[Any], deadline_s: float | None) -> Frame:
        if _are_several(images):
            self.image.check(images)
            raise InputError(
                "images per frame of a cascade with a gate",
                got=len(images),
                expected=1,
                remedy="Submit them one by one",
            )
        frame = super()._begin(images, deadline_s)
        frame.steps = []
        return frame

    def _advance(self, frame: Frame, deadline_s: float | None) -> None:
        """Run block after block at the level that the gate chose, until the sample leaves."""
        last = len(self._at) - 1
        levels: Levels = ()
        before: NDArray[np.float32] | None = None
        level, spent = 0, 0.0
        for index in range(last + 1):
            run = frame.begin(self._clock())
            step = self._at[index][level]
            key = index * self._level_count + level
            if deadline_s is not None and index and self._too_late(key, frame, deadline_s):
                self._expected.skip(key, 1)
                frame.answer(index - 1, "deadline", run.marks[0])
                break
            frame.steps.append(step)
            if not self._run_stages(step, frame, run, deadline_s if index else None):
                frame.answer(index - 1, "deadline", run.marks[-1])
                break
            run.decision = self._decide(step)
            levels = (*levels, level)
            begin = run.decided = self._clock()
            if index < last:
                now = confidence.probabilities(self.backend.read(step.logits)[0])
                level, before = self._gate.route(index, levels, now, before), now
                run.decided = self._clock()
                spent += run.decided - begin
            if deadline_s is not None:
                self._expected.observe(key, 1, run.decided - run.marks[0])
            if index == last or level == LEAVE:
                frame.answer(index, "last" if index == last else "confident", run.decided)
                break
        self.gate_s = spent

    def _warm_up(self) -> None:
        """Run noise through every block at every level, and time each."""
        count = len(self._at) * self._level_count
        self._expected = ExpectedTimes(count)
        noise = np.random.default_rng(0).random((1, *self.image.sample_shape())) * 255
        image = noise.astype(self.image.dtype)
        for level in range(self._level_count):
            steps = [block.get(level, block[min(block)]) for block in self._at]
            for _ in range(self.warm_up_frames):
                self.backend.feed(image)
                self._warm_up_blocks(steps)
                self.backend.done()

    def _warm_up_blocks(self, steps: list[PreparedStep]) -> None:
        """Run blocks and the gate behind each but the last, whatever it says."""
        before: NDArray[np.float32] | None = None
        levels: Levels = ()
        for index, step in enumerate(steps):
            begin = self._clock()
            for stage in step.runs:
                self.backend.run(stage)
            self._decide(step)
            levels = (*levels, step.level)
            if index < len(steps) - 1:
                now = confidence.probabilities(self.backend.read(step.logits)[0])
                self._gate.route(index, levels, now, before)
                before = now
            key = index * self._level_count + step.level
            self._expected.warm(key, self._clock() - begin)


def _are_several(images: NDArray[Any]) -> bool:
    """Whether it is a batch of more than one; what is no array, others will refuse."""
    return isinstance(images, np.ndarray) and images.ndim > 0 and len(images) > 1


def _choice(point: OperatingPoint) -> GateChoice:
    """The gate of a point.

    Raises:
        ConfigError: It has none.
    """
    if point.policy != "gate" or point.gate is None:
        raise ConfigError(
            f"operating point {point.name!r}",
            got=f"policy {point.policy}",
            expected="policy gate, as the cascade runs one",
            remedy=_ANEW,
        )
    return point.gate
