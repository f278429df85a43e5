"""Everything of ``edge-runtime precision`` that takes long: times, effects, layers, the choice."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from calib.layer_advice import Remedy, remedies
from calib.layer_sensitivity import INT8, LayerEffect, layer_effects, stages_with_layers
from calib.precision import (
    PrecisionChoice,
    at_thresholds,
    choose_precisions,
    default_choice,
    usable_thresholds,
)
from calib.sensitivity import Mixes, Open, StageEffect, stage_effects, stages_with
from calib.thresholds import AccuracyDrop, Goal, ZeroLoss
from calib.variant_times import VariantTimes, variant_times
from edge_runtime import options
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import ConfigError
from edge_runtime.evaluate import classify_in_turn
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.scheduler import Scheduler
from edge_runtime.timing import Ratio, ratio

#: Images on which both cascades are timed as a whole.
_TIMED = 1000


@dataclass(frozen=True)
class Layers:
    """What single layers do.

    Attributes:
        effects: One per layer, in order of execution.
        remedies: Per stage with layers that hurt, what it gains without them.
    """

    effects: tuple[LayerEffect, ...]
    remedies: tuple[Remedy, ...]


@dataclass(frozen=True)
class Work:
    """What was measured and chosen.

    Attributes:
        start: The point to compare with, at the precision that stages have.
        given: Whether it was named, not chosen here.
        goal: What thresholds are chosen for.
        mixes: What the exits say.
        times: What each variant takes.
        effects: What each variant does.
        layers: What single layers do; None where nobody asked.
        found: The choice.
        measured: Mean time of the chosen cascade over that "before", and over that of its "rival"
            where it has one, measured as a whole; empty where nothing was chosen.
    """

    start: OperatingPoint
    given: bool
    goal: Goal
    mixes: Mixes
    times: VariantTimes
    effects: tuple[StageEffect, ...]
    layers: Layers | None
    found: PrecisionChoice
    measured: Mapping[str, Ratio]

    @property
    def name(self) -> str:
        """What people call the point to compare with."""
        return self.start.name if self.given else "default"


def measure_and_choose(
    args: argparse.Namespace, bundle: Bundle, data: ImageDataset, console: Console
) -> Work:
    """Time, collect, look at layers where asked, choose, compare.

    Args:
        args: The command's.
        bundle: The bundle.
        data: Labelled images.
        console: Shows progress.

    Raises:
        ConfigError: The options don't fit the bundle, or it has no such variants.
        CalibrationError: There is too little data.
    """
    given = args.operating_point is not None
    start = (
        bundle.operating_point(args.operating_point)
        if given
        else OperatingPoint(name="chosen here", metric=args.metric or "max_softmax")
    )
    goal = _goal(args, start if given else None)
    old = usable_thresholds(start, bundle)
    stages = args.stages.split(",") if args.stages else None
    layered = _layered(args, bundle, start)
    stages_with(bundle, args.precision, start.variants, stages)

    def open_bundle(bundle: Bundle, point: OperatingPoint) -> Scheduler:
        return options.open_cascade(args, bundle, data, point)

    open_scheduler = functools.partial(open_bundle, bundle)
    mixes = Mixes(
        bundle,
        data,
        console,
        open_scheduler,
        start.metric,
        temperatures=start.temperatures,
        base=start.variants,
    )
    times = variant_times(
        bundle,
        args.precision,
        data,
        console,
        lambda point: options.open_cascade(args, bundle, data, point, time_stages=True),
        base=start.variants,
        stages=stages,
    )
    checks = {"repeats": args.repeats, "folds": args.folds, "seed": args.seed}
    if given:
        before = at_thresholds(mixes, times, {}, old)
    else:
        before = default_choice(mixes, times, goal, **checks)
        start = replace(start, thresholds=before.thresholds)
    effects = stage_effects(mixes, args.precision, before.thresholds, stages=stages)
    layers = None
    if layered:
        alone = layer_effects(mixes, layered, before.thresholds, open_bundle)
        layers = Layers(alone, remedies(mixes, alone, before.thresholds, open_bundle))
    console.note("choosing thresholds")
    found = choose_precisions(
        mixes,
        times,
        effects,
        before,
        goal,
        budget=args.budget / 100,
        at_any_speed=args.at_any_speed,
        **checks,
    )
    measured = _measure(start, found, data, open_scheduler, args.seed, console)
    return Work(start, given, goal, mixes, times, effects, layers, found, measured)


def _layered(args: argparse.Namespace, bundle: Bundle, start: OperatingPoint) -> tuple[str, ...]:
    """Stages whose layers are asked for."""
    if args.layers is None:
        return ()
    if args.precision != INT8:
        raise ConfigError(
            "--layers: single layers can be looked at in INT8 only",
            got=f"--precision {args.precision}",
            remedy="`edge-runtime convert` tells what FP16 keeps in FP32 and why",
        )
    if args.backend != "onnxrt":
        raise ConfigError(
            "--layers: the models of single layers are run by ONNX Runtime only",
            got=f"--backend {args.backend}",
            expected="--backend onnxrt",
        )
    stages = args.stages.split(",") if args.stages else None
    return stages_with_layers(bundle, args.layers, start.variants, stages)


def _measure(
    start: OperatingPoint,
    found: PrecisionChoice,
    data: ImageDataset,
    open_scheduler: Open,
    seed: int,
    console: Console,
) -> dict[str, Ratio]:
    """Time the chosen cascade as a whole against those that it is compared with, in turn."""
    if not found.variants:
        return {}
    as_rule = replace(start, policy="threshold")
    points = {
        "before": start,
        "after": replace(
            as_rule,
            thresholds=found.after.thresholds,
            variants={**start.variants, **found.variants},
        ),
    }
    if found.rival is not None:
        points["rival"] = replace(as_rule, thresholds=found.rival.thresholds)
    some = data if len(data) <= _TIMED else data.balanced(_TIMED, seed)
    with ExitStack() as stack:
        subjects = {
            name: stack.enter_context(open_scheduler(point)) for name, point in points.items()
        }
        series = classify_in_turn(some, subjects, console)
    seconds = {name: one.seconds.ravel() for name, one in series.items()}
    after = seconds.pop("after")
    return {name: ratio(after, other, statistic=np.mean) for name, other in seconds.items()}


def _goal(args: argparse.Namespace, start: OperatingPoint | None) -> Goal:
    """What thresholds are chosen for: as asked, or as the point to compare with was."""
    if start is not None and args.metric not in (None, start.metric):
        raise ConfigError(
            "--metric",
            got=args.metric,
            expected=f"{start.metric}, the signal of operating point {start.name!r}",
        )
    if args.goal_drop is not None:
        return AccuracyDrop(args.goal_drop / 100)
    if start is None:
        return ZeroLoss()
    text = str(start.chosen_on.get("goal", ""))
    if text == str(ZeroLoss()):
        return ZeroLoss()
    match = re.search(r"[0-9.]+", text)
    goal = AccuracyDrop(float(match[0]) / 100) if match and float(match[0]) <= 100 else None
    if goal is None or str(goal) != text:
        raise ConfigError(
            f"operating point {start.name!r} was chosen for no bound on accuracy",
            got=text or "nothing",
            remedy="Say what the new thresholds may lose with --goal-drop POINTS",
        )
    return goal
