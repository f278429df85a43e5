"""`edge-runtime gate fit`: from labelled images to a gate in the bundle."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from calib.quee.collect import (
    NewBackend,
    collect_paths,
    family_of,
    precisions_of,
)
from calib.quee.costs import measure_costs, with_costs
from calib.quee.fit import FitOptions, fit_gate
from calib.quee.routing import route_table
from calib.quee.table import PathTable
from edge_runtime import device, options
from edge_runtime.console import Console, milliseconds, percent
from edge_runtime.dataset import ImageDataset, overlap
from edge_runtime.errors import ConfigError
from edge_runtime.files import sha256
from edge_runtime.gate import Gate
from edge_runtime.gate_model import GateModel
from edge_runtime.load import new_backend
from edge_runtime.manifest import OPERATING_POINTS, Bundle
from edge_runtime.operating_point import GateChoice, OperatingPoint
from edge_runtime.power.find import find
from edge_runtime.schema import nearest, plain

#: Accuracy of the last exit that the highest level may lose, and that lower ones may, in shares.
#: The paper keeps "the accuracy"; half a point is what a thousand images can tell at best.
_KEPT, _WITHIN = 0.005, 0.05
_TRADE_OFFS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
NAME, COST, TRADE_OFF, MOST_PATHS = "gate", "latency", 0.1, 50


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Collect path tables, fit, measure what paths cost, write gate and operating point."""
    bundle = Bundle.open(args.bundle)
    _check_precisions(bundle)
    train, val = (open_images(args, bundle, name) for name in ("train", "val"))
    if shared := overlap(train, val):
        raise ConfigError(
            "--train and --val have images in common",
            got=shared,
            expected=0,
            remedy="Targets would come from images that the predictors know: take others",
        )
    wanted = FitOptions(clusters=args.clusters or 20, hidden=args.hidden or 32, seed=args.seed)
    make = backend_maker(args, bundle)
    rule = levels_by_rule(bundle, make, val, console)
    levels = tuple(args.levels.split(",")) if args.levels else rule
    if len(levels) < 2:
        console.note(
            f"one level, {levels[0]}: this gate decides about exits only. For several: --levels "
            f"{','.join(precisions_of(bundle))}"
        )
    family = family_of(bundle, levels, most=args.most_paths or MOST_PATHS, seed=args.seed)
    known, targets = (collect_paths(bundle, family, make, data, console) for data in (train, val))
    model = fit_gate(known, targets, wanted, console=console)
    gate = Gate(model, dict.fromkeys(family.paths.paths, 1.0), TRADE_OFF)
    costs = measure_costs(bundle, make, val, console, find(gpu=gpu_of(args)), gate)
    table = with_costs(targets, bundle, family, costs, gated=True)
    if (args.cost or COST) not in table.costs:
        raise ConfigError(
            f"--cost {args.cost}", remedy=f"{nearest(args.cost, table.costs)}. {costs.no_energy}"
        )
    named = {
        column: {family.paths.name(path): cost for path, cost in table.path_costs(column).items()}
        for column in table.costs
    }
    figures = {
        **model.figures,
        "costs": named,
        "levels_by_the_rule": list(rule),
        "data": {"train": train.hash, "val": val.hash},
        "device": device.fingerprint(),
        "gate_s": costs.gate_s,
    }
    point = _write(args, bundle, replace(model, figures=figures))
    _show(bundle, point, model, table, console)
    console.line(
        f"levels {', '.join(levels)}; by the paper's rule {', '.join(rule)}. A gate's decision "
        f"takes {costs.gate_s * 1e6:.1f} us."
    )
    if not costs.joules:
        console.line(f"Energy of paths: not measurable here: {costs.no_energy}")
    console.line(f"wrote {point.name} into {bundle.path}")
    return {
        "bundle": bundle.hash,
        "operating_point": plain(point),
        "paths": [family.paths.name(path) for path in family.paths.paths],
        "figures": figures,
    }


def levels_by_rule(
    bundle: Bundle, make: NewBackend, val: ImageDataset, console: Console
) -> tuple[str, ...]:
    """Levels as the paper chooses them.

    The highest is the lowest precision whose last exit loses at most half a point against the
    highest precision of the bundle; lower ones follow while they lose at most five points.

    Args:
        bundle: The bundle.
        make: Makes what runs the stages.
        val: Labelled images.
        console: Shows progress.

    Reference:
        Regol et al., QuEE, 2024, section 5.1.
    """
    names = precisions_of(bundle)
    last = len(bundle.cascade.exits)
    accuracy = []
    for name in names:
        family = family_of(bundle, (name,), name=f"all {name}")
        table = collect_paths(bundle, family, make, val, console)
        accuracy.append(float(table.right[:, family.paths.index((0,) * last)].mean()))
    keeps = [i for i, one in enumerate(accuracy) if one >= accuracy[0] - _KEPT]
    first = max(keeps)
    return tuple(
        name
        for i, name in enumerate(names)
        if i == first or (i > first and accuracy[i] >= accuracy[0] - _WITHIN)
    )


def open_images(args: argparse.Namespace, bundle: Bundle, name: str) -> ImageDataset:
    """The images of one of the options."""
    own = {**vars(args), "data": getattr(args, name), "part": None}
    return options.open_data(argparse.Namespace(**own), bundle)


def backend_maker(args: argparse.Namespace, bundle: Bundle) -> NewBackend:
    """Makes backends of `args` that tell how long a stage takes."""
    settings = options.backend_options(args, time_stages=args.backend == "tensorrt")
    return functools.partial(new_backend, args.backend, bundle, settings)


def gpu_of(args: argparse.Namespace) -> int | None:
    """The GPU that the backend of `args` uses."""
    return (args.device or 0) if args.backend == "tensorrt" else None


def _check_precisions(bundle: Bundle) -> None:
    """Refuse a bundle whose stages run at one precision alone.

    Raises:
        ConfigError: See above.
    """
    names = precisions_of(bundle)
    if len(names) < 2:
        raise ConfigError(
            f"the bundle {bundle.path} has one precision",
            got=", ".join(names) or "none that is known",
            expected="two or more of fp32, fp16, int8",
            remedy="Make another with: edge-runtime quantize, or convert",
        )
    if len(bundle.cascade.exits) < 2:
        raise ConfigError(
            f"the bundle {bundle.path} has no early exit",
            got=f"one exit, {bundle.cascade.exits[0].name}",
            expected="two or more",
        )


def _write(args: argparse.Namespace, bundle: Bundle, model: GateModel) -> OperatingPoint:
    """The gate's file first, then the point that names it by its hash."""
    name = args.name or NAME
    choice = GateChoice(f"{name}.npz", "0" * 64, args.cost or COST, _trade_off(args))
    folder = bundle.path / OPERATING_POINTS
    folder.mkdir(exist_ok=True)
    path = folder / choice.file
    model.write(path)
    point = OperatingPoint(
        name=name,
        policy="gate",
        gate=replace(choice, sha256=sha256(path.read_bytes())),
        bundle=bundle.hash,
        chosen_on={"data": model.figures["data"], "device": model.figures["device"]},
    )
    bundle.write_operating_point(point)
    return point


def _trade_off(args: argparse.Namespace) -> float:
    return TRADE_OFF if args.trade_off is None else float(args.trade_off)


def _show(
    bundle: Bundle,
    point: OperatingPoint,
    model: GateModel,
    table: PathTable,
    console: Console,
) -> None:
    """What the gate does on the validation images, for some lambdas."""
    assert point.gate is not None
    column = point.gate.cost
    values: Sequence[float] = sorted({*_TRADE_OFFS, point.gate.trade_off})
    rows = []
    for value in values:
        routed = route_table(Gate(model, table.path_costs(column), value), table)
        lengths = np.array([len(path) for path in table.paths.paths])[routed.path]
        rows.append(
            (
                f"{value:g}",
                percent(routed.accuracy),
                milliseconds(routed.cost("latency")),
                f"{routed.cost('bit_operations'):.3f}",
                *(percent(float((lengths == k + 1).mean())) for k in range(len(table.paths.exits))),
            )
        )
    console.table(
        f"the gate on {len(table)} validation images, weighing {column}",
        ("lambda", "accuracy", "ms", "BitOPS", *table.paths.exits),
        rows,
    )
