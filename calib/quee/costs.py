"""What paths cost: BitOPS and MACs from the models, seconds and joules from this device."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from calib.quee.collect import Family, NewBackend
from calib.quee.table import PathTable, sum_of_blocks
from edge_runtime import confidence
from edge_runtime.backends.base import Backend
from edge_runtime.blocks import Blocks
from edge_runtime.cascade import Plan, Stage, Step
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import BackendError
from edge_runtime.gate import Gate
from edge_runtime.manifest import Bundle
from edge_runtime.power.find import Found
from edge_runtime.power.window import EnergyWindow
from edge_runtime.scheduler import image_axes
from edge_runtime.timing import warm_up
from engines.macs import stage_macs

#: Rounds in which every variant of every stage is timed.
_ROUNDS = 300
#: Length of a window of energy.
_WINDOW_S = 1.0
_BITS = re.compile(r"\d+")

#: A stage and the precision at which it runs.
Variant = tuple[str, str]


@dataclass(frozen=True)
class StageCosts:
    """What single stages cost for one image.

    Attributes:
        macs: Stage -> multiply-accumulates.
        seconds: Stage and precision -> median seconds on this device.
        decide_s: Median seconds of judging an exit.
        frame_s: Median seconds of taking in an image.
        gate_s: Median seconds of a gate's decision, with fetching logits and softmax.
        joules: Stage and precision -> joules on this device; empty where nothing measures them.
        no_energy: Why not.
    """

    macs: Mapping[str, int]
    seconds: Mapping[Variant, float]
    decide_s: float
    frame_s: float
    gate_s: float = 0.0
    joules: Mapping[Variant, float] = field(default_factory=dict)
    no_energy: str = ""


def measure_costs(
    bundle: Bundle,
    new_backend: NewBackend,
    data: ImageDataset,
    console: Console,
    energy: Found,
    gate: Gate,
) -> StageCosts:
    """Time every variant of every stage, in turn, and measure its energy where that can be.

    Args:
        bundle: The bundle.
        new_backend: Makes what runs the stages, which must tell or let see how long one takes.
        data: Images.
        console: Shows progress.
        energy: Readers of energy.
        gate: Is timed behind the stages, where it finds cold caches as in use.

    Raises:
        BackendError: The backend does not tell how long a stage takes.
    """
    cascade = bundle.cascade
    plan = cascade.plan(range(len(cascade.exits)))
    height, width, _ = data.image_shape
    images = [data.image(i)[None] for i in range(min(len(data), _ROUNDS))]
    backend = new_backend()
    backend.host_decides = True
    timer = _Timer(bundle, plan, backend, gate)
    try:
        backend.open(timer.loaded, image_axes(plan, (height, width)), {})
        if backend.asynchronous:
            raise BackendError(
                f"the backend {backend.name!r} does not tell how long a stage takes",
                remedy="Open it so that stages are timed",
            )
        warm_up(lambda: timer.round(images[0]), clock=time.perf_counter)
        timer.forget()
        for i in console.progress(range(_ROUNDS), "timing every variant of every stage"):
            timer.round(images[i % len(images)])
        joules, why = timer.energy(images[0], energy, console)
    finally:
        backend.close()
    return StageCosts(
        macs=stage_macs(bundle, (height, width)),
        seconds={key: float(np.median(times)) for key, times in timer.seconds.items()},
        decide_s=float(np.median(timer.deciding)),
        frame_s=float(np.median(timer.feeding)),
        gate_s=float(np.median(timer.gating)) if timer.gating else 0.0,
        joules=joules,
        no_energy=why,
    )


def with_costs(
    table: PathTable, bundle: Bundle, family: Family, costs: StageCosts, *, gated: bool
) -> PathTable:
    """A table with what its paths cost.

    The columns are "bit_operations" and "macs", in units of all stages at 32 bits, "latency" in
    seconds, and "energy" in joules where that was measured.

    Args:
        table: Of the family.
        bundle: The bundle.
        family: Its paths, and what stages run at.
        costs: Of its stages.
        gated: Whether a gate decides at every exit but the last.

    Reference:
        Regol et al., QuEE, 2024, Eq. 17.
    """
    lengths = np.array([len(path) for path in family.paths.paths], np.float64)
    gates = np.minimum(lengths, len(family.paths.exits) - 1) if gated else 0.0
    once = costs.frame_s + lengths * costs.decide_s + gates * costs.gate_s
    every = float(sum(costs.macs.values()))
    blocks = Blocks(bundle, family.paths, family.variants)
    plan = bundle.cascade.plan(range(len(bundle.cascade.exits)))

    def per_path(cost: Mapping[Variant, float]) -> NDArray[np.float64]:
        levels = len(family.paths.levels)
        each = np.zeros((len(plan.steps), levels))
        for step in plan.steps:
            for level in range(levels):
                names = zip(step.stages, blocks.precisions(step, level), strict=True)
                each[step.position, level] = sum(cost[s.name, p] for s, p in names)
        return sum_of_blocks(family.paths, each)

    macs = {(stage, p): costs.macs[stage] / every for stage, p in costs.seconds}
    found = {
        "bit_operations": per_path({key: macs[key] * bits(key[1]) / 32 for key in macs}),
        "macs": per_path(macs),
        "latency": per_path(costs.seconds) + once,
    }
    if costs.joules:
        found["energy"] = per_path(costs.joules)
    return replace(table, costs=found)


def base_costs(bundle: Bundle, costs: StageCosts, variants: Mapping[str, str]) -> dict[str, float]:
    """What the last exit alone costs, by column as of `with_costs`.

    Args:
        bundle: The bundle.
        costs: Of its stages.
        variants: Stage name -> precision.
    """
    plan = bundle.cascade.plan([len(bundle.cascade.exits) - 1])
    keys = [(stage.name, bundle.precision(stage.name, variants)) for stage in plan.stages]
    every = float(sum(costs.macs.values()))
    found = {
        "bit_operations": sum(costs.macs[s] * bits(p) / 32 for s, p in keys) / every,
        "macs": sum(costs.macs[s] for s, _ in keys) / every,
        "latency": sum(costs.seconds[key] for key in keys) + costs.frame_s + costs.decide_s,
    }
    if costs.joules:
        found["energy"] = sum(costs.joules[key] for key in keys)
    return found


def bits(precision: str) -> int:
    """Bit width that a precision's name holds: 8 of "int8"; 32 where it holds none."""
    found = _BITS.search(precision)
    return int(found.group()) if found else 32


class _Timer:
    """Runs all variants of all stages, block by block."""

    def __init__(self, bundle: Bundle, plan: Plan, backend: Backend, gate: Gate) -> None:
        self._plan = plan
        self._gate = gate
        self._backend = backend
        self._rng = np.random.default_rng(0)
        #: What the backend calls each variant.
        self._names: dict[Variant, str] = {}
        for stage in plan.stages:
            for name, key in _called(bundle, stage):
                self._names[key] = name
        self.forget()

    @property
    def loaded(self) -> Plan:
        """The plan with every variant as a stage of its own."""
        steps = [
            replace(
                step,
                stages=tuple(
                    replace(stage, name=self._names[key])
                    for stage in step.stages
                    for key in self._variants(stage)
                ),
            )
            for step in self._plan.steps
        ]
        return replace(self._plan, steps=tuple(steps))

    def forget(self) -> None:
        """Begin anew."""
        self.seconds: dict[Variant, list[float]] = {key: [] for key in self._names}
        self.deciding: list[float] = []
        self.feeding: list[float] = []
        self.gating: list[float] = []

    def round(self, image: NDArray[np.uint8]) -> None:
        """Run every variant once, those of a stage in an order drawn anew."""
        begin = time.perf_counter()
        self._backend.feed(image)
        self.feeding.append(time.perf_counter() - begin)
        before = None
        for step in self._plan.steps:
            for stage in step.stages:
                keys = self._variants(stage)
                for i in self._rng.permutation(len(keys)).tolist():
                    self.seconds[keys[i]].append(self._timed(keys[i]))
            begin = time.perf_counter()
            self._backend.decide(step.exit.logits, "max_softmax", 1.0)
            self.deciding.append(time.perf_counter() - begin)
            if step is not self._plan.steps[-1]:
                before = self._gated(step, before)
        self._backend.done()

    def _gated(self, step: Step, before: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Let the gate decide about a sample that came at the highest level."""
        begin = time.perf_counter()
        now = confidence.probabilities(self._backend.read(step.exit.logits)[0])
        self._gate.route(step.position, (0,) * (step.position + 1), now, before)
        self.gating.append(time.perf_counter() - begin)
        return now

    def energy(
        self, image: NDArray[np.uint8], found: Found, console: Console
    ) -> tuple[dict[Variant, float], str]:
        """Joules of every variant, from windows in which it runs alone; or why there are none."""
        if not found.sources:
            return {}, "; ".join(f"{name}: {why}" for name, why in found.missing.items())
        joules: dict[Variant, float] = {}
        with ExitStack() as stack:
            for source in found.sources:
                stack.enter_context(source)
            self._backend.feed(image)
            self._run_all()
            for key in console.progress(list(self._names), "measuring energy"):
                with EnergyWindow(found.sources) as window:
                    runs = self._repeat(key)
                told = [one.joules for one in window.results]
                if None in told:
                    problem = next(one.problem for one in window.results if one.problem)
                    return {}, problem
                joules[key] = sum(one for one in told if one is not None) / runs
            self._backend.done()
        return joules, ""

    def _run_all(self) -> None:
        for name in self._names.values():
            self._backend.run(name)

    def _repeat(self, key: Variant) -> int:
        end, runs = time.perf_counter() + _WINDOW_S, 0
        while time.perf_counter() < end:
            self._backend.run(self._names[key])
            runs += 1
        return runs

    def _variants(self, stage: Stage) -> Sequence[Variant]:
        return [key for key in self._names if key[0] == stage.name]

    def _timed(self, key: Variant) -> float:
        begin = time.perf_counter()
        measured = self._backend.run(self._names[key])
        return time.perf_counter() - begin if measured is None else measured


def _called(bundle: Bundle, stage: Stage) -> Iterator[tuple[str, Variant]]:
    """The variants of a stage that people choose, and what a backend calls each."""
    own = bundle.precision(stage.name, {})
    yield stage.name, (stage.name, own)
    if stage.kind != "preprocess":
        for precision in bundle.record(stage.name).variants:
            if precision != own:
                yield f"{stage.name}.{precision}", (stage.name, precision)
