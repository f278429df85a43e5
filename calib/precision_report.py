"""What ``edge-runtime precision`` prints: tables, and line by line what to make of them."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence

from calib.layer_advice import NOTEWORTHY, STANDS_OUT, Remedy, exclusion
from calib.layer_sensitivity import LayerEffect, worst_first
from calib.precision import Figures, PrecisionChoice
from calib.precision_work import Layers, Work
from calib.sensitivity import StageEffect
from edge_runtime.console import Console, milliseconds, percent
from edge_runtime.manifest import Bundle
from edge_runtime.timing import Ratio

#: Layers that are shown; the JSON has all of them.
_SHOWN = 20
_ELSEWHERE = "For another device than this one: --at-any-speed chooses by accuracy alone."
_BY_ACCURACY = (
    "Chosen by accuracy alone, for another device: which exits and precisions save time there is "
    "to be measured there, with the same command."
)
#: Characters of a node's name that are shown: its beginning and its end.
_NAME = 28


def show(work: Work, bundle: Bundle, console: Console) -> None:
    """Print the tables."""
    found, times = work.found, work.times
    precision = times.precision
    console.table(
        f"what {precision} does to each exit, stage by stage, at the thresholds of {work.name!r}",
        (
            "stage",
            "exit",
            "accuracy drop, points",
            "same label",
            "signal moves by",
            "leaving here, points",
            "same exit and label",
        ),
        [row for effect in work.effects for row in _effect_rows(effect)],
    )
    if work.layers is not None:
        _show_layers(work.layers, work.name, console)
    console.table(
        f"time per stage and image, measured in turn on {times.rounds} images",
        ("stage", "now ms", f"{precision} ms", "ratio [95 %]", "verdict"),
        [
            (
                name,
                milliseconds(times.seconds[name][times.base[name]]),
                milliseconds(times.seconds[name][precision]),
                one,
                "faster" if name in times.faster else times.not_faster[name].partition(":")[0],
            )
            for name, one in times.ratios.items()
        ],
    )
    before = f"{work.name}: as it is now"
    rows = [_figure_row(before, found.before)]
    if found.variants:
        rows.append(_figure_row(f"{precision}, old thresholds", found.forgotten))
        rows.append(_figure_row(f"{precision}, new thresholds", found.after))
    if found.rival is not None:
        rows.append(_figure_row("as accurate without it", found.rival))
    console.table(
        f"on the {len(work.mixes.data)} images of the choice; times add up from the stages'",
        ("cascade", "accuracy", "cross-validated", "last exit alone", "mean ms"),
        rows,
    )
    if found.variants:
        console.table(
            "exit by exit",
            (
                "exit",
                "leaving now",
                "old thresholds",
                "new thresholds",
                "threshold now",
                "new threshold",
            ),
            [_exit_row(found, name) for name in found.before.exits],
        )


def _effect_rows(effect: StageEffect) -> list[tuple[str, ...]]:
    name = effect.stages[0] if len(effect.stages) == 1 else "all of them"
    return [
        (
            "" if i else name,
            one.exit,
            f"{one.accuracy_drop * 100:.2f}",
            percent(one.agreement),
            f"{one.signal_shift:.4f}",
            f"{one.rate_shift * 100:+.1f}",
            "" if i else percent(effect.exit_agreement),
        )
        for i, one in enumerate(effect.exits)
    ]


def _figure_row(name: str, figures: Figures) -> tuple[str, ...]:
    held_out = figures.held_out_accuracy
    return (
        name,
        percent(figures.point.accuracy),
        "-" if held_out is None else percent(held_out),
        percent(figures.base.accuracy),
        milliseconds(figures.point.cost),
    )


def _exit_row(found: PrecisionChoice, name: str) -> tuple[str, ...]:
    last = name == found.before.exits[-1]

    def threshold(figures: Figures) -> str:
        value = None if last else figures.thresholds[name]
        return "-" if last else "never" if value is None else f"{value:.4g}"

    return (
        name,
        *(percent(f.exit_rates[name]) for f in (found.before, found.forgotten, found.after)),
        threshold(found.before),
        threshold(found.after),
    )


def verdict(work: Work, bundle: Bundle) -> list[str]:
    """Which stages change, why others don't, and whether it pays; line by line."""
    found = work.found
    what = found.precision.upper()
    without = [s.name for s in bundle.manifest.stages if s.name not in work.times.ratios]
    lines = [f"{name} stays at {work.times.base[name]}: {why}." for name, why in found.left.items()]
    if without:
        lines.append(f"Not considered: {', '.join(without)}.")
    if not found.variants:
        return [
            f"{what} does NOT pay here: no stage is worth it, and no operating point is written.",
            *lines,
            *([] if found.at_any_speed else [_ELSEWHERE]),
        ]
    lines.insert(0, f"{what}: {', '.join(found.variants)}.")
    low, high = (100 * end for end in found.interval)
    lines.append(
        f"Against {work.name!r} the cascade loses {100 * found.loss:.2f} points of accuracy "
        f"[{low:.2f}, {high:.2f}]; {100 * found.budget:g} are allowed."
    )
    if high > 100 * found.budget:
        lines.append(
            f"{len(work.mixes.data)} images can't tell for sure that it stays within the budget."
        )
    old = found.forgotten.point
    lines.append(
        f"With the old thresholds it would be right on {percent(old.accuracy)} in "
        f"{milliseconds(old.cost)} ms, with the new ones on "
        f"{percent(found.after.point.accuracy)} in {milliseconds(found.after.point.cost)} ms."
    )
    lines.append(_pays(what, work.measured))
    if found.at_any_speed:
        lines.append(_BY_ACCURACY)
    if work.given and work.start.chosen_on.get("data") != work.mixes.data.hash:
        lines.append(
            f"{work.start.name!r} was chosen on other images and the new thresholds on these, "
            "which favours the new ones."
        )
    return lines


def _pays(what: str, measured: Mapping[str, Ratio]) -> str:
    """Whether the chosen cascade takes less time than one without it that is as accurate."""
    text = f"measured as a whole it takes {measured['before']} of the time before"
    decisive = measured["before"]
    if "rival" in measured:
        decisive = measured["rival"]
        text += f", and {decisive} of what the stages as they are take when they are as accurate"
    if decisive.high < 1:
        return f"{what} pays here: {text}."
    if decisive.low > 1:
        return f"{what} does NOT pay here: {text}."
    return f"{what} does not clearly pay here: {text}."


def _show_layers(layers: Layers, point: str, console: Console) -> None:
    shown = worst_first(layers.effects)[:_SHOWN]
    console.table(
        f"what each layer alone does in int8, at the thresholds of {point!r}, to the exit that "
        "suffers most",
        (
            "layer",
            "stage",
            "exit",
            "accuracy drop, points",
            "same label, %",
            "signal moves by",
            "leaving here, points",
            "same exit and label, %",
            "cascade's drop, points",
        ),
        [_layer_row(effect) for effect in shown],
    )
    if len(layers.effects) > len(shown):
        console.line(f"{len(layers.effects) - len(shown)} more that do less are in the JSON.")


def _layer_row(effect: LayerEffect) -> tuple[str, ...]:
    one = effect.suffering
    return (
        _readable(effect.node),
        effect.stages[0],
        one.exit,
        f"{one.accuracy_drop * 100:.2f}",
        f"{one.agreement * 100:.2f}",
        f"{one.signal_shift:.4f}",
        f"{one.rate_shift * 100:+.2f}",
        f"{effect.exit_agreement * 100:.2f}",
        f"{effect.accuracy_drop * 100:.2f}",
    )


def layer_advice(layers: Layers) -> list[str]:
    """Which layers hurt and how to keep them float; line by line."""
    worst = worst_first(layers.effects)[0]
    median = statistics.median(effect.agreement_loss for effect in layers.effects)
    if not layers.remedies:
        return [
            f"No layer stands out: none alone surely changes more than {NOTEWORTHY:.0%} of an "
            f"exit's labels and {STANDS_OUT:g} times as many as the median of the others. "
            f"{_readable(worst.node)} of {worst.stages[0]} changes most, "
            f"{_percent(worst.agreement_loss)}; the median layer {_percent(median)}."
        ]
    lines = []
    for remedy in layers.remedies:
        lines += [
            f"{_readable(one.node)} of {remedy.stage} hurts: alone it changes "
            f"{_percent(one.agreement_loss)} of the labels of exit {one.suffering.exit}, the "
            f"median layer {_percent(median)}."
            for one in remedy.worst
        ]
        them = "it" if len(remedy.worst) == 1 else "them"
        lines.append(
            f"Keeping {them} float {'helps' if remedy.helps else 'does NOT help'}: "
            f"{remedy.stage} in int8 then changes {_percent(remedy.after.agreement_loss)} of an "
            f"exit's labels instead of {_percent(remedy.before.agreement_loss)}."
        )
    return [*lines, *_commands([remedy for remedy in layers.remedies if remedy.helps])]


def _commands(helpful: Sequence[Remedy]) -> list[str]:
    """How to quantise without them: in one call where no expression finds other nodes."""
    lines = [
        f"{remedy.stage} has no other layer: leave it out of --stages when you quantise."
        for remedy in helpful
        if remedy.whole
    ]
    begin = "Quantise the bundle without int8 again, with:"
    some = [remedy for remedy in helpful if not remedy.whole]
    if any(remedy.elsewhere for remedy in some):
        lines += [
            f"{begin} --stages {remedy.stage} --exclude-nodes {shlex.quote(remedy.exclude_nodes)}, "
            "and the other stages in a second call, since some have nodes of the same name."
            for remedy in some
        ]
    elif some:
        nodes = [one.node for remedy in some for one in remedy.worst]
        lines.append(f"{begin} --exclude-nodes {shlex.quote(exclusion(nodes))}")
    return lines


def _percent(share: float) -> str:
    """A share as percent with two decimals: single layers do little."""
    return f"{share * 100:.2f} %"


def _readable(name: str) -> str:
    """A node's name from an untrusted file, without its middle where it is long."""
    name = "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)
    half = _NAME // 2 - 1
    return name if len(name) <= _NAME else f"{name[:half]}..{name[-half:]}"
