"""`edge-runtime gate sweep`: what a gate is worth on test images, told and measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.quee import plot, report
from calib.quee.collect import (
    Family,
    collect_paths,
    family_of,
    mixed_family,
    precisions_of,
)
from calib.quee.costs import StageCosts, base_costs, measure_costs, with_costs
from calib.quee.fit import FitOptions, fit_one_step
from calib.quee.fit_command import NAME, backend_maker, gpu_of, open_images
from calib.quee.routing import route_table
from calib.quee.study import TRADE_OFFS, make_study
from calib.quee.table import PathTable
from edge_runtime import device, options
from edge_runtime.console import Console, milliseconds, percent
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import ConfigError
from edge_runtime.evaluate import classify_in_turn
from edge_runtime.gate import Gate, check_trade_off
from edge_runtime.gate_model import GateModel
from edge_runtime.gated import GatedScheduler
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.power.find import find
from edge_runtime.timing import Latency, ratio
from engines.plot_file import check_plot

_COLUMNS = ("bit_operations", "latency")
_CLUSTERS = (5, 10, 20, 30, 50, 70)
_MEASURED = (0.01, 0.1, 1.0)
_TIMED = 1000


@dataclass(frozen=True)
class _Tables:
    """Path tables of one family."""

    family: Family
    val: PathTable
    test: PathTable


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Collect the tables of all families, draw the curves, measure some points."""
    check_plot(args.plot)
    bundle = Bundle.open(args.bundle)
    point = bundle.operating_point(args.operating_point or NAME)
    if point.gate is None:
        raise ConfigError(
            f"operating point {point.name!r} has no gate",
            remedy=f"Fit one: edge-runtime gate fit {bundle.path} --train PATH --val PATH",
        )
    model = bundle.gate(point.gate)
    lambdas = _lambdas(args.lambdas)
    val, test = (open_images(args, bundle, name) for name in ("val", "data"))
    found = _collect(args, bundle, model, val, test, console)
    gate = Gate(model, model.costs(point.gate.cost), point.gate.trade_off)
    costs = measure_costs(
        bundle, backend_maker(args, bundle), val, console, find(gpu=gpu_of(args)), gate
    )
    tables = {name: _priced(bundle, one, costs, gated=name == _GATE) for name, one in found.items()}
    top = tables[f"all {model.paths.levels[0]}"]
    compared = {name: one for name, one in tables.items() if one is not top}
    study = make_study(
        model,
        {name: one.test for name, one in compared.items()},
        {name: one.val for name, one in compared.items()},
        reference=(top.val, top.test),
        base=_bases(bundle, tables, costs),
        columns=[*_COLUMNS, *(["energy"] if costs.joules else [])],
        trade_offs=lambdas,
        one_step=_one_step(args, bundle, tables[_GATE], costs, console),
        clusters=[k for k in _CLUSTERS if 4 * k <= len(val)],
    )
    report.show(study, console)
    measured = _measure(args, bundle, point, tables[_GATE].test, test, console)
    if args.plot:
        plot.draw(study, args.plot)
        console.note(f"wrote {args.plot}")
    return {
        **report.plain(study),
        "operating_point": point.name,
        "levels_by_the_rule": model.figures.get("levels_by_the_rule"),
        "data": {"val": val.hash, "test": test.hash},
        "measured": measured,
        "gate_s": costs.gate_s,
        "no_energy": costs.no_energy,
        "device": device.fingerprint(),
    }


_GATE = "gate"


def _lambdas(text: str | None) -> tuple[float, ...]:
    if text is None:
        return TRADE_OFFS
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError("--lambdas", got=text, expected="numbers, as in 0,0.1,1") from error
    for value in values:
        check_trade_off(value)
    return values


def _collect(
    args: argparse.Namespace,
    bundle: Bundle,
    model: GateModel,
    val: ImageDataset,
    test: ImageDataset,
    console: Console,
) -> dict[str, _Tables]:
    """Tables of the gate's paths, of each precision alone, and of mixed precision."""
    make = backend_maker(args, bundle)
    families = {_GATE: Family("the gate's", model.paths, {})}
    for name in precisions_of(bundle):
        families[f"all {name}"] = family_of(bundle, (name,), name=f"all {name}")
    if args.mixed:
        families["mixed"] = mixed_family(bundle, bundle.operating_point(args.mixed).variants)
    return {
        name: _Tables(
            family,
            collect_paths(bundle, family, make, val, console),
            collect_paths(bundle, family, make, test, console),
        )
        for name, family in families.items()
    }


def _priced(bundle: Bundle, one: _Tables, costs: StageCosts, *, gated: bool) -> _Tables:
    val, test = (
        with_costs(table, bundle, one.family, costs, gated=gated) for table in (one.val, one.test)
    )
    return _Tables(one.family, val, test)


def _bases(
    bundle: Bundle, tables: Mapping[str, _Tables], costs: StageCosts
) -> dict[str, dict[str, float]]:
    """The last exit alone, at every precision."""
    found = {}
    for name, one in tables.items():
        if name == _GATE:
            continue
        level = one.family.paths.levels[0]
        variants = dict(one.family.variants)
        for record in bundle.manifest.stages:
            if record.kind != "preprocess" and level in record.variants:
                variants[record.name] = level
        last = one.test.paths.index(one.test.paths.dearest)
        found[name] = {
            **base_costs(bundle, costs, variants),
            "accuracy": float(one.test.right[:, last].mean()),
        }
    return found


def _one_step(
    args: argparse.Namespace,
    bundle: Bundle,
    own: _Tables,
    costs: StageCosts,
    console: Console,
) -> list[GateModel]:
    """Gates that look one step ahead, where there are images to train them on."""
    if args.train is None:
        return []
    data = open_images(args, bundle, "train")
    table = collect_paths(bundle, own.family, backend_maker(args, bundle), data, console)
    train = with_costs(table, bundle, own.family, costs, gated=True)
    how = FitOptions(seed=args.seed)
    return [
        fit_one_step(train, own.val, how, column=_COLUMNS[0], trade_off=value, console=console)
        for value in _MEASURED
    ]


def _measure(
    args: argparse.Namespace,
    bundle: Bundle,
    point: OperatingPoint,
    table: PathTable,
    test: ImageDataset,
    console: Console,
) -> list[dict[str, Any]]:
    """Run the gate at some lambdas, and the base model, in turn on this device."""
    count = min(len(test), _TIMED if args.timed is None else args.timed)
    if count == 0 or point.gate is None:
        return []
    model = bundle.gate(point.gate)
    rng = np.random.default_rng(args.seed)
    chosen = np.sort(rng.permutation(len(test))[:count])
    data = test.subset(chosen)
    top = table.paths.levels[0]
    variants = {
        record.name: top
        for record in bundle.manifest.stages
        if record.kind != "preprocess" and top in record.variants
    }
    choices = {f"gate, lambda {value:g}": value for value in _MEASURED}
    with ExitStack() as stack:
        base = options.open_cascade(
            args, bundle, data, OperatingPoint("base", policy="never", variants=variants)
        )
        subjects: dict[str, Callable[[NDArray[Any]], object]] = {"base": stack.enter_context(base)}
        gates: dict[str, GatedScheduler] = {}
        for name, value in choices.items():
            own = replace(point, gate=replace(point.gate, trade_off=value))
            opened = stack.enter_context(options.open_cascade(args, bundle, data, own))
            assert isinstance(opened, GatedScheduler)
            gates[name] = subjects[name] = opened
        spent: dict[str, list[float]] = {name: [] for name in gates}
        for name, scheduler in gates.items():
            subjects[name] = _recorded(scheduler, spent[name])
        series = classify_in_turn(data, subjects, console)
    rows, found = [], []
    base_s = series["base"].seconds.ravel()
    for name, one in series.items():
        times = Latency.of(one.seconds)
        accuracy = float((one.labels == data.labels).mean())
        over = ratio(one.seconds.ravel(), base_s, statistic=np.mean)
        share = float(np.median(spent[name]) / np.median(base_s)) if name in spent else None
        told = None
        if name in choices:
            gate = Gate(model, model.costs(point.gate.cost), choices[name])
            told = route_table(gate, table.samples(chosen)).cost("latency")
        found.append(
            {
                "subject": name,
                "accuracy": accuracy,
                "mean_s": times.mean,
                "over_base": [over.value, over.low, over.high],
                "gate_over_base_median": share,
                "told_s": told,
            }
        )
        rows.append(
            (
                name,
                percent(accuracy),
                milliseconds(times.mean),
                "-" if told is None else milliseconds(told),
                "1" if name == "base" else str(over),
                "-" if share is None else percent(share),
            )
        )
    console.table(
        f"measured in turn on {count} images, weighing {point.gate.cost}",
        ("subject", "accuracy", "mean ms", "told by the table", "over the base", "gate's own"),
        rows,
    )
    return found


def _recorded(scheduler: GatedScheduler, spent: list[float]) -> Callable[[NDArray[Any]], object]:
    """The scheduler, noting what its gate took."""

    def classify(image: NDArray[Any]) -> object:
        answer = scheduler(image)
        spent.append(scheduler.gate_s)
        return answer

    return classify
