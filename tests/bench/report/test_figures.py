"""Charts that agree with the numbers that they show, whatever a result lacks or is called."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.report import figures
from bench.report.figures import charts, write_pngs
from bench.report.flow import exit_flow
from bench.report.waterfall import waterfall
from bench.result import Distribution, ExitFigures, Point, Result, Throughput
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.timing import Ratio
from tests.bench.results import (
    ACCURACIES,
    EXITS,
    SECONDS,
    SHARES,
    frame,
    made_up_energy,
    made_up_result,
)

pytest.importorskip("matplotlib")

NAMES = [
    "exit-flow",
    "latency",
    "ratios",
    "accuracy-latency",
    "latency-per-exit",
    "waterfall",
    "energy",
    "throughput",
]


def reference() -> Result:
    """What a published table of means tells, and nothing else."""
    return Result(
        kind="reference",
        name="Jetson Nano",
        command="a thesis, table 1",
        created="2025-05-01",
        method="published means",
        bundle="ViT",
        bundle_name="vit",
        end_to_end=Distribution(
            count=1000, mean=0.04, p50=None, p90=None, p99=None, p999=None, max=0.09
        ),
        exits=tuple(
            ExitFigures(name=name, evaluated=True, count=0, share=share, accuracy=accuracy)
            for name, share, accuracy in zip(EXITS, SHARES, ACCURACIES, strict=True)
        ),
        accuracy=0.81,
    )


def words(figure) -> list[str]:
    """All texts of a picture's axes."""
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_bands_are_as_thick_as_the_shares_at_both_ends_and_fill_the_whole():
    figure = exit_flow([made_up_result()])
    (axes,) = figure.axes
    at_entry, at_exit = [], []
    for band in axes.patches:
        corners = band.get_path().vertices
        entering = corners[np.isclose(corners[:, 0], 0), 1]
        leaving = corners[np.isclose(corners[:, 1], corners[:, 1].min()), 0]
        at_entry.append((entering.min(), entering.max()))
        at_exit.append(np.ptp(leaving))
    assert [high - low for low, high in at_entry] == pytest.approx(SHARES)
    assert at_exit == pytest.approx(SHARES)
    assert [low for low, _ in at_entry] == pytest.approx([0, 0.6, 0.9])
    assert [band.get_label() for band in axes.patches] == list(EXITS)
    assert {"60 % of frames", "99.0 % right", "80.0 % right"} <= set(words(figure))


def test_a_pruned_exit_is_named_but_has_no_band():
    result = made_up_result()
    saver, middle, final = result.exits
    pruned = replace(middle, evaluated=False, share=0.0, count=0, accuracy=None, latency=None)
    figure = exit_flow([replace(result, exits=(saver, pruned, replace(final, share=0.4)))])
    (axes,) = figure.axes
    assert [band.get_label() for band in axes.patches] == ["saver", "final"]
    assert "middle\nnot evaluated" in words(figure)


def test_shares_that_do_not_add_up_stay_within_the_picture():
    result = made_up_result()
    exits = tuple(
        replace(one, share=share) for one, share in zip(result.exits, (1.0, 1.0, 0.0), strict=True)
    )
    (axes,) = exit_flow([replace(result, exits=exits)]).axes
    tops = [band.get_path().vertices[:, 1].max() for band in axes.patches]
    assert tops == pytest.approx([0.5, 1.0])


def test_latency_lines_are_the_curves_in_milliseconds_with_median_and_p99():
    result = made_up_result()
    (axes,) = figures.latency([result]).axes
    cascade, p50, p99, base = axes.lines[:4]
    assert cascade.get_xdata() == pytest.approx(1e3 * np.array(result.end_to_end.curve))
    assert cascade.get_ydata()[[0, 100, 200]] == pytest.approx([0, 50, 100])
    assert base.get_xdata() == pytest.approx(1e3 * np.array(result.subject("base").latency.curve))
    assert (*p50.get_xdata(), *p50.get_ydata()) == pytest.approx((1e3 * result.end_to_end.p50, 50))
    assert (*p99.get_xdata(), *p99.get_ydata()) == pytest.approx((1e3 * result.end_to_end.p99, 99))
    assert axes.get_xscale() == "log"


def test_each_exit_has_a_line_and_each_result_a_panel():
    figure = figures.latency_per_exit([made_up_result(), made_up_result("slow", 10)])
    fast, slow = figure.axes
    assert len(fast.get_legend().get_texts()) == len(slow.get_legend().get_texts()) == len(EXITS)
    assert fast.get_xlim() == slow.get_xlim()


def test_accuracy_is_drawn_where_it_was_measured_and_simulated():
    result = made_up_result()
    (axes,) = figures.accuracy_latency([result]).axes
    marks = {
        line.get_marker(): (line.get_xdata()[0], line.get_ydata()[0])
        for line in axes.lines
        if line.get_marker() in ("D", "s", "o")
    }
    base = result.subject("base").latency.mean
    assert marks["D"] == pytest.approx((1e3 * result.end_to_end.mean, 100 * result.accuracy))
    assert marks["s"] == pytest.approx((1e3 * base, 96))
    assert marks["o"] == pytest.approx((1e3 * result.points[2].seconds, 95))
    assert {"zero_loss", "base", "drop_1"} == set(words(figures.accuracy_latency([result])))


def test_names_of_many_near_points_do_not_cover_each_other():
    points = tuple(
        Point(name=f"point_{i}", accuracy=0.95 + 1e-4 * i, seconds=1e-3 + 1e-6 * i)
        for i in range(40)
    )
    figure = figures.accuracy_latency([made_up_result(points=points)])
    figure.canvas.draw()
    boxes = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    assert 0 < len(boxes) <= 12
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[i + 1 :])


def test_waterfall_bars_are_the_spans_in_order():
    (axes,) = waterfall([made_up_result()]).axes
    spans = frame().spans
    assert [bar.get_x() for bar in axes.patches] == pytest.approx([1e3 * s.begin for s in spans])
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([1e3 * s.seconds for s in spans])
    heights = {s.kind: bar.get_height() for s, bar in zip(spans, axes.patches, strict=True)}
    assert heights["decide"] < heights["segment"]
    assert "2.90" in words(waterfall([made_up_result()]))


def test_waterfall_of_one_result_has_all_frames_and_of_several_the_longest_of_each():
    short = replace(frame(), what="median frame", exit="saver", spans=frame().spans[:3])
    one = made_up_result(frames=(short, frame()))
    two = made_up_result("Desktop", 0.5, frames=(short, frame(0.5)))
    longest = len(frame().spans)
    assert len(waterfall([one]).axes[0].patches) == 3 + longest
    assert len(waterfall([one, two]).axes[0].patches) == 2 * longest


def test_ratios_have_their_intervals():
    result = made_up_result()
    (axes,) = figures.ratios([result]).axes
    whisker, dot = axes.lines[:2]
    ratio = result.subject("base").over_cascade
    assert list(whisker.get_xdata()) == pytest.approx([ratio.low, ratio.high])
    assert list(dot.get_xdata()) == pytest.approx([ratio.value])


def test_energy_and_throughput_bars_are_the_results_numbers():
    (axes,) = figures.energy([made_up_result()]).axes
    mean = float(np.dot(SHARES, SECONDS))
    joules = [8 * s for s in (*SECONDS, mean, SECONDS[-1])]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([1e3 * j for j in joules])
    (axes,) = figures.throughput([made_up_result()]).axes
    assert [bar.get_width() for bar in axes.patches] == [900, 300]
    assert "900\n3.00 times base [2.90, 3.10]" in words(figures.throughput([made_up_result()]))


def test_several_results_share_every_chart():
    results = [made_up_result(f"board {i}", 1 + i) for i in range(5)]
    drawn = {chart.name: chart.figure for chart in charts(results)}
    assert list(drawn) == NAMES
    assert len(drawn["exit-flow"].axes) == 5
    assert len(drawn["energy"].axes[0].patches) == 5 * 5


def test_what_was_not_measured_is_not_drawn():
    assert [chart.name for chart in charts([reference()])] == ["exit-flow"]
    both = [chart.name for chart in charts([made_up_result(), reference()])]
    assert both == NAMES


@pytest.mark.parametrize("seconds", [0.0, 1e300])
def test_times_of_another_world_are_left_out(seconds):
    damaged = Distribution(
        count=5, mean=seconds, p50=seconds, p90=None, p99=None, p999=None, max=seconds
    )
    curved = replace(damaged, curve=(seconds,) * 201)
    whole = made_up_result()
    broken = replace(
        whole,
        end_to_end=curved,
        exits=tuple(replace(one, latency=curved, joules=seconds) for one in whole.exits),
        subjects=tuple(
            replace(one, latency=curved, over_cascade=Ratio(seconds, 2.0, 1.0))
            for one in whole.subjects
        ),
        points=(Point(name="base", accuracy=0.5, seconds=seconds),),
        frames=(replace(frame(), seconds=seconds),),
        energy=(),
        throughput=(
            Throughput(
                batch=1, calls=1, cascade=seconds, base=seconds, speed_up=Ratio(seconds, 0, 0)
            ),
        ),
    )
    assert [chart.name for chart in charts([broken])] == ["exit-flow"]


def test_png_files_are_pictures_even_with_names_that_look_like_formulas(tmp_path: Path):
    name = "$x_{ \\frac^} \n\t\x00 \ud800 日本 " + "m" * 400
    exits = tuple(
        replace(one, name=f"{one.name}{name}{one.name}") for one in made_up_result().exits
    )
    hostile = made_up_result(
        name,
        exits=exits,
        frames=(replace(frame(), what=name),),
        energy=(made_up_energy(), replace(made_up_energy(), reader=name)),
        points=(Point(name=name, accuracy=0.9, seconds=1e-3),),
    )
    paths = write_pngs(tmp_path / "new", [hostile, made_up_result()])
    assert [path.name for path in paths] == [f"{name}.png" for name in NAMES]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    with pytest.raises(EdgeRuntimeError, match="parent exists"):
        write_pngs(tmp_path / "no" / "folder", [made_up_result()])
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgeRuntimeError, match="can't be made"):
        write_pngs(tmp_path / "file", [made_up_result()])
