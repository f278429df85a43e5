"""What a gate is worth: its curve beside those of thresholds, all on the same test samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from calib.quee.baselines import threshold_curve, thresholds
from calib.quee.routing import RoutedTable, route_table
from calib.quee.sweep import CurvePoint, Resampling, curve
from calib.quee.table import PathTable
from calib.quee.targets import TargetError, calibration_error
from edge_runtime.errors import CalibrationError, ConfigError
from edge_runtime.gate import Gate
from edge_runtime.gate_model import GateModel
from edge_runtime.paths import Paths

#: The gate's curve, weighing the cost that the curve shows.
GATE = "gate"
#: The curve of gates that look one step ahead, each fitted for one lambda.
ONE_STEP = "one-step gate"
#: Values of lambda, where nobody says which.
TRADE_OFFS: tuple[float, ...] = (0.0, *np.geomspace(0.003, 3.0, 19).round(4).tolist())
#: Shares of right answers that may be lost against the reference's best accuracy.
DROPS = (0.0, 0.005, 0.01, 0.02)

_TAIL = 0.025
#: Rounding of a mean.
_TOLERANCE = 1e-12


@dataclass(frozen=True, eq=False)
class Curve:
    """Accuracy against one cost, of one rule at several settings.

    Attributes:
        name: For people.
        points: In the order of settings.
        paths: Those of the table, in the order of the points' shares.
        right: Whether each sample's answer is right, at each setting, shape (N, points), bool.
        costs: Cost of each sample at each setting, shape (N, points), float64, in the column's
            unit.
    """

    name: str
    points: tuple[CurvePoint, ...]
    paths: Paths
    right: NDArray[np.bool_]
    costs: NDArray[np.float64]

    def leaving(self, point: CurvePoint) -> dict[str, float]:
        """Exit -> share of the samples that leave there."""
        shares = dict.fromkeys(self.paths.exits, 0.0)
        for path, share in zip(self.paths.paths, point.shares, strict=True):
            shares[self.paths.exits[len(path) - 1]] += share
        return shares

    def cheapest(self, accuracy: float) -> int | None:
        """Index of the cheapest point that is as accurate, None where none is."""
        reaching = [
            i for i, p in enumerate(self.points) if p.accuracy.mean >= accuracy - _TOLERANCE
        ]
        return min(reaching, key=lambda i: self.points[i].cost.mean, default=None)


@dataclass(frozen=True)
class FixedPoint:
    """One precision without exits.

    Attributes:
        name: Of the precision.
        accuracy: Share of right answers.
        cost: Of each sample, in the column's unit.
        gate_cost: What the gate costs at least where it is as accurate; None where it never is.
    """

    name: str
    accuracy: float
    cost: float
    gate_cost: float | None


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % paired-bootstrap interval; both curves see the same resamples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class AtAccuracy:
    """The cheapest point of a curve that reaches an accuracy, against that of a reference.

    Settings are chosen on the test samples, for both curves alike; intervals don't have that choice
    in them, and each stands for itself: of twenty such comparisons one looks clear by chance.

    Attributes:
        curve: Name of the curve.
        reference: Name of the reference.
        target: Share of right answers to be reached.
        setting: Of the curve's point; None, as the next two, where the curve never gets there.
        accuracy: Of that point.
        cost: Mean cost of that point.
        ratio: Cost divided by the reference's; None where one of both never gets there.
        gain: Accuracy minus the reference's, as a share; None as the ratio.
    """

    curve: str
    reference: str
    target: float
    setting: float | None
    accuracy: float | None
    cost: float | None
    ratio: Interval | None
    gain: Interval | None

    @property
    def verdict(self) -> Literal["cheaper", "dearer", "unclear", "out of reach", "only one"]:
        """Whether the interval of the ratio excludes 1.

        It stays unclear where what looks cheaper is surely less accurate, or what looks dearer
        surely more: settings are steps, and one curve may reach more than it had to. "only one"
        where the reference never gets there, "out of reach" where the curve doesn't.
        """
        if self.setting is None:
            return "out of reach"
        if self.ratio is None or self.gain is None:
            return "only one"
        if self.ratio.high < 1 and self.gain.high >= 0:
            return "cheaper"
        if self.ratio.low > 1 and self.gain.low <= 0:
            return "dearer"
        return "unclear"


@dataclass(frozen=True)
class ColumnStudy:
    """All curves against one cost.

    Attributes:
        column: Name of the cost.
        curves: The gate first, then the reference, thresholds at the gate's highest level.
        fixed: Precisions without exits.
        at_accuracy: Every curve against the reference, for accuracies that fall.
        rivals: The gate against every other curve of thresholds, at the same accuracies.
    """

    column: str
    curves: tuple[Curve, ...]
    fixed: tuple[FixedPoint, ...]
    at_accuracy: tuple[AtAccuracy, ...]
    rivals: tuple[AtAccuracy, ...]

    @property
    def reference(self) -> Curve:
        """Thresholds at the gate's highest level."""
        return self.curves[1]

    @property
    def against(self) -> dict[str, tuple[AtAccuracy, ...]]:
        """Curve of thresholds -> the gate against it, at each accuracy."""
        compared = [one for one in self.at_accuracy if one.curve == GATE] + list(self.rivals)
        names = dict.fromkeys(one.reference for one in compared)
        return {name: tuple(one for one in compared if one.reference == name) for name in names}


@dataclass(frozen=True)
class Study:
    """What a gate is worth.

    Attributes:
        bundle: Hash of the bundle that the gate was fitted for.
        levels: The gate's precisions, the highest first.
        samples: Number of test samples.
        columns: One entry per cost.
        calibration: Expected calibration error of the gate's targets for some numbers of clusters.
        resampling: How intervals were found.
    """

    bundle: str
    levels: tuple[str, ...]
    samples: int
    columns: tuple[ColumnStudy, ...]
    calibration: tuple[TargetError, ...]
    resampling: Resampling


def make_study(
    gate: GateModel,
    tables: Mapping[str, PathTable],
    validation: Mapping[str, PathTable],
    *,
    base: Mapping[str, Mapping[str, float]],
    columns: Sequence[str],
    reference: tuple[PathTable, PathTable] | None = None,
    trade_offs: Sequence[float] = TRADE_OFFS,
    one_step: Sequence[GateModel] = (),
    clusters: Sequence[int] = (),
    drops: Sequence[float] = DROPS,
    resampling: Resampling | None = None,
) -> Study:
    """Draw the curve of a gate and of all that it is compared with.

    The gate has a curve against every cost for every cost that it weighs. Thresholds have one at
    the gate's highest level, and one per further table, except one of that very level.

    Args:
        gate: Of the kind "paths".
        tables: Name -> test samples, the same in all, each column in the same unit. One table has
            the gate's paths; the others have one level each, at which all blocks run.
        validation: The same names; thresholds are chosen there.
        base: Precision without exits -> its cost in every column, and its "accuracy".
        columns: Costs that are shown.
        reference: Validation and test table of thresholds at the gate's highest level, whose costs
            hold no gate; the gate's own tables where None.
        trade_offs: Values of lambda.
        one_step: Gates of the kind "one_step", fitted for one of the columns each.
        clusters: Numbers of clusters whose calibration error is found.
        drops: Shares of right answers below the reference's best accuracy, >= 0, at which costs
            are compared.
        resampling: How intervals are found; None for the defaults.

    Raises:
        ConfigError: The gate is of another kind or bundle, a table, cost or lambda is missing or
            does not fit.
        CalibrationError: Tables of different samples, or too few samples for the splits or
            clusters.
        BackendUnavailable: `clusters` are given and scikit-learn is not installed.
    """
    how = resampling or Resampling()
    own = _check(gate, tables, validation, columns)
    for model in one_step:
        _check_one_step(model, gate, columns)
    if not trade_offs:
        raise ConfigError("values of lambda", got="none", expected="one at least")
    if not drops or not all(0 <= drop < 1 for drop in drops):
        raise ConfigError("drops of accuracy", got=list(drops), expected="numbers in [0, 1)")
    table = tables[own]
    gates = {
        weighed: [
            route_table(Gate(gate, table.path_costs(weighed), value), table) for value in trade_offs
        ]
        for weighed in columns
    }
    rivals = _thresholds(gate, reference or (validation[own], table), own, tables, validation)
    studies = []
    for column in columns:
        rules: dict[str, tuple[Sequence[float], Sequence[RoutedTable]]] = {
            GATE: (trade_offs, gates[column]),
            **rivals,
            **{
                f"{GATE}, weighing {other}": (trade_offs, routed)
                for other, routed in gates.items()
                if other != column
            },
        }
        ahead = [one for one in one_step if one.figures.get("column") == column]
        if ahead:
            rules[ONE_STEP] = _one_step(ahead, table, column)
        curves = _curves(rules, column, how)
        studies.append(_compared(column, curves, len(rivals), base, drops, how))
    found = [calibration_error(validation[own], table, count) for count in clusters]
    return Study(gate.bundle, gate.paths.levels, len(table), tuple(studies), tuple(found), how)


def cost_at_accuracy(
    curves: Iterable[Curve], reference: Curve, targets: Sequence[float], how: Resampling
) -> tuple[AtAccuracy, ...]:
    """Compare what curves cost at least where they reach an accuracy.

    Test samples are drawn with replacement, the same for both curves; settings stay.

    Args:
        curves: On the samples of the reference.
        reference: What their costs are divided by.
        targets: Shares of right answers.
        how: Number of draws and their seed.

    Returns:
        For each target in turn, one entry per curve.

    Raises:
        ConfigError: The reference costs nothing at a target.
        CalibrationError: A curve of another number of samples.
    """
    pairs = [
        (one, target, one.cheapest(target), reference.cheapest(target))
        for target in targets
        for one in curves
    ]
    compared = [
        (i, one, here, there)
        for i, (one, _, here, there) in enumerate(pairs)
        if here is not None and there is not None
    ]
    intervals: dict[int, tuple[Interval, Interval]] = {}
    if compared:
        parts = [
            part
            for _, one, here, there in compared
            for part in (
                one.costs[:, here],
                reference.costs[:, there],
                one.right[:, here],
                reference.right[:, there],
            )
        ]
        if len({len(part) for part in parts}) > 1:
            raise CalibrationError(
                "curves over different samples", got=sorted({len(part) for part in parts})
            )
        means = _resample(np.stack(parts, axis=1).astype(np.float64), how)
        for k, (i, *_) in enumerate(compared):
            cost, reference_cost, right, reference_right = means[:, 4 * k : 4 * k + 4].T
            if reference_cost.min() <= 0:
                raise ConfigError(
                    f"cost of {reference.name}", got=0, expected="> 0, to divide others by"
                )
            intervals[i] = (_interval(cost / reference_cost), _interval(right - reference_right))
    return tuple(
        _at_accuracy(one, reference, target, here, intervals.get(i))
        for i, (one, target, here, _) in enumerate(pairs)
    )


def verdict(study: Study) -> tuple[str, ...]:
    """What the comparisons say, in sentences: per cost, the gate against each rival.

    Each sentence says what the intervals of `AtAccuracy` say, one by one.
    """
    said = []
    for column in study.columns:
        for name, compared in column.against.items():
            said.append(f"{column.column}: {_sentence(name, compared)}")
        for fixed in column.fixed:
            said.append(f"{column.column}: {_fixed_sentence(fixed)}")
    return tuple(said)


def _check(
    gate: GateModel,
    tables: Mapping[str, PathTable],
    validation: Mapping[str, PathTable],
    columns: Sequence[str],
) -> str:
    """Refuse tables that can't be compared; returns the name of the gate's own."""
    if gate.kind != "paths":
        raise ConfigError(
            "kind of the gate", got=gate.kind, expected="paths, which takes any lambda"
        )
    if not columns or len(set(columns)) < len(columns):
        raise ConfigError(
            "costs to show", got=list(columns), expected="distinct names, one or more"
        )
    if set(tables) != set(validation):
        raise ConfigError(
            "validation tables", got=", ".join(validation) or "none", expected=", ".join(tables)
        )
    wide = [name for name, table in tables.items() if len(table.paths.levels) > 1]
    if len(gate.paths.levels) == 1:
        wide += [name for name, table in tables.items() if table.paths == gate.paths]
    if len(wide) != 1:
        raise ConfigError(
            "tables of several levels, or of the gate's one",
            got=", ".join(wide) or "none",
            expected="the gate's own; the others have one level each",
        )
    own = wide[0]
    labels = tables[own].labels
    for name, table in tables.items():
        if not np.array_equal(table.labels, labels):
            raise CalibrationError(
                f"the table {name!r} has other samples than {own!r}",
                got=len(table),
                expected=f"the same {len(labels)}, in the same order",
            )
        if table.paths.exits != gate.paths.exits or validation[name].paths != table.paths:
            raise ConfigError(
                f"the table {name!r} has other exits than the gate, or other paths than its "
                "validation table",
                remedy="Collect both from the gate's bundle",
            )
        for column in columns:
            table.column(column)
    for which, table in (("test", tables[own]), ("validation", validation[own])):
        if table.bundle != gate.bundle:
            raise ConfigError(
                f"the gate was fitted for another bundle than that of the {which} table",
                got=gate.bundle[:12] or "none",
                expected=table.bundle[:12] or "none",
            )
    return own


def _check_one_step(model: GateModel, gate: GateModel, columns: Sequence[str]) -> None:
    column = model.figures.get("column")
    if model.kind != "one_step" or column not in columns:
        raise ConfigError(
            "one-step gate",
            got=f"kind {model.kind!r}, fitted for the cost {column!r}",
            expected=f"kind 'one_step', fitted for one of {', '.join(columns)}",
        )
    if model.bundle != gate.bundle:
        raise ConfigError(
            "the one-step gate was fitted for another bundle",
            got=model.bundle[:12] or "none",
            expected=gate.bundle[:12] or "none",
        )


def _thresholds(
    gate: GateModel,
    reference: tuple[PathTable, PathTable],
    own: str,
    tables: Mapping[str, PathTable],
    validation: Mapping[str, PathTable],
) -> dict[str, tuple[Sequence[float], Sequence[RoutedTable]]]:
    """Curves of thresholds; the reference is the first."""
    highest = gate.paths.levels[0]
    named = [(f"thresholds, {highest}", *reference)] + [
        (f"thresholds, {name}", validation[name], table)
        for name, table in tables.items()
        if name != own and table.paths.levels != (highest,)
    ]
    twice, count = Counter(name for name, *_ in named).most_common(1)[0]
    if count > 1:
        raise ConfigError(
            f"two curves would be named {twice!r}", remedy="Name the tables otherwise"
        )
    curves: dict[str, tuple[Sequence[float], Sequence[RoutedTable]]] = {}
    for name, known, table in named:
        values = thresholds(known)
        curves[name] = (values, threshold_curve(table, values))
    return curves


def _one_step(
    models: Sequence[GateModel], table: PathTable, column: str
) -> tuple[Sequence[float], Sequence[RoutedTable]]:
    costs = table.path_costs(column)
    ordered = sorted(models, key=lambda model: model.trade_off or 0.0)
    values = [model.trade_off or 0.0 for model in ordered]
    gates = [Gate(model, costs, value) for model, value in zip(ordered, values, strict=True)]
    return values, [route_table(one, table) for one in gates]


def _curves(
    rules: Mapping[str, tuple[Sequence[float], Sequence[RoutedTable]]],
    column: str,
    how: Resampling,
) -> tuple[Curve, ...]:
    """All curves from one lot of resamples, which takes most of the time."""
    settings = [value for values, _ in rules.values() for value in values]
    routed = [one for _, many in rules.values() for one in many]
    points = iter(curve(settings, routed, column=column, resampling=how))
    return tuple(
        Curve(
            name,
            tuple(next(points) for _ in many),
            many[0].table.paths,
            np.stack([one.right for one in many], axis=1),
            np.stack([one.sample_costs(column) for one in many], axis=1),
        )
        for name, (_, many) in rules.items()
    )


def _compared(
    column: str,
    curves: tuple[Curve, ...],
    rivals: int,
    base: Mapping[str, Mapping[str, float]],
    drops: Sequence[float],
    how: Resampling,
) -> ColumnStudy:
    gate, reference = curves[:2]
    best = max(point.accuracy.mean for point in reference.points)
    targets = [best - drop for drop in sorted(drops)]
    others = [one for one in curves if one is not reference]
    return ColumnStudy(
        column,
        curves,
        tuple(_fixed_point(name, figures, column, gate) for name, figures in base.items()),
        cost_at_accuracy(others, reference, targets, how),
        tuple(
            found
            for rival in curves[2 : rivals + 1]
            for found in cost_at_accuracy([gate], rival, targets, how)
        ),
    )


def _fixed_point(name: str, figures: Mapping[str, float], column: str, gate: Curve) -> FixedPoint:
    for needed, most in (("accuracy", 1.0), (column, np.inf)):
        if needed not in figures:
            raise ConfigError(f"the precision {name!r} without exits has no {needed!r}")
        if not 0 <= figures[needed] <= most or np.isinf(figures[needed]):
            raise ConfigError(
                f"{needed!r} of the precision {name!r} without exits",
                got=figures[needed],
                expected="in [0, 1]" if needed == "accuracy" else "a finite number >= 0",
            )
    found = gate.cheapest(figures["accuracy"])
    return FixedPoint(
        name,
        float(figures["accuracy"]),
        float(figures[column]),
        None if found is None else gate.points[found].cost.mean,
    )


def _resample(values: NDArray[np.float64], how: Resampling) -> NDArray[np.float64]:
    """Column means of the samples, then of each resample, shape (1 + draws, k)."""
    samples = len(values)
    generator = np.random.default_rng(how.seed)
    means = np.empty((1 + how.draws, values.shape[1]))
    means[0] = values.mean(axis=0)
    for draw in range(how.draws):
        count = np.bincount(generator.integers(samples, size=samples), minlength=samples)
        means[1 + draw] = count @ values / samples
    return means


def _interval(values: NDArray[np.float64]) -> Interval:
    """Of a figure of all samples, followed by that of each resample."""
    low, high = np.quantile(values[1:], [_TAIL, 1 - _TAIL])
    return Interval(float(values[0]), float(low), float(high))


def _at_accuracy(
    one: Curve,
    reference: Curve,
    target: float,
    here: int | None,
    found: tuple[Interval, Interval] | None,
) -> AtAccuracy:
    point = None if here is None else one.points[here]
    return AtAccuracy(
        one.name,
        reference.name,
        float(target),
        None if point is None else point.setting,
        None if point is None else point.accuracy.mean,
        None if point is None else point.cost.mean,
        *(found or (None, None)),
    )


def _sentence(name: str, compared: Sequence[AtAccuracy]) -> str:
    groups: dict[str, list[str]] = {}
    for one in compared:
        groups.setdefault(one.verdict, []).append(_at(one))
    words = {
        "cheaper": "the gate is cheaper than {name} at {at}",
        "dearer": "the gate is dearer than {name} at {at}",
        "unclear": "the gate is neither clearly cheaper nor clearly dearer than {name} at {at}",
        "only one": "{name} never reach {at}, the gate does",
        "out of reach": "the gate, compared with {name}, never reaches {at}",
    }
    return "; ".join(
        words[found].format(name=name, at=", ".join(at)) for found, at in groups.items()
    )


def _at(one: AtAccuracy) -> str:
    text = f"{one.target * 100:.2f} %"
    if one.ratio is not None:
        text += f" ({one.ratio.value:.2f} x [{one.ratio.low:.2f}, {one.ratio.high:.2f}])"
    return text


def _fixed_sentence(fixed: FixedPoint) -> str:
    what = f"{fixed.name} without exits ({fixed.accuracy * 100:.2f} %)"
    if fixed.gate_cost is None:
        return f"the gate never gets as accurate as {what}"
    if not fixed.cost:
        return f"{what} costs nothing"
    return (
        f"where as accurate as {what} the gate costs {fixed.gate_cost / fixed.cost:.2f} x as much"
    )
