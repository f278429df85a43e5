"""The bench command on a small bundle: it measures what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.latency.lineup import APART, EAGER, IF_GRAPH, NAIVE, ONE_SESSION
from bench.result import Result, read_result
from edge_runtime import Bundle, OperatingPoint, cli
from tests.toys import toy_bundle, toy_images

IMAGES = 40


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp("bench")
    bundle = toy_bundle(folder / "toy.bundle")
    rates = {"saver": 0.5, "middle": 0.25, "final": 0.25}
    for name, thresholds in (
        ("zero_loss", {"saver": 0.49, "middle": 0.6}),
        ("saver_only", {"saver": 0.49}),
    ):
        bundle.write_operating_point(
            OperatingPoint(
                name,
                thresholds=thresholds,
                bundle=bundle.hash,
                expected={"in_sample": {"exit_rates": rates}} if name == "zero_loss" else {},
            )
        )
    np.savez(folder / "data.npz", images=toy_images(IMAGES), labels=np.arange(IMAGES) % 4)
    return bundle


def bench(bundle: Bundle, *arguments: str, data: bool = True) -> int:
    own = ["--data", str(bundle.path.parent / "data.npz")] if data else []
    return cli.main(
        ["bench", str(bundle.path), *own, "--duration", "0.3", "--warmup", "5", *arguments]
    )


@pytest.fixture(scope="module")
def files(bundle: Bundle) -> Path:
    """Everything that one run writes."""
    folder = bundle.path.parent
    more = ["--html", str(folder / "page.html"), "--trace", str(folder / "frames.json")]
    more += ["--batch", "1,8", "--deadline-ms", "1000", "--json", str(folder / "result.json")]
    assert bench(bundle, *more) == 0
    return folder


@pytest.fixture(scope="module")
def result(files: Path) -> Result:
    return read_result(files / "result.json")


def test_everything_takes_turns_equally_often(result: Result) -> None:
    names = [one.name for one in result.subjects]
    forced = ["exit saver always", "exit middle always", "exit final always"]
    others = [ONE_SESSION, IF_GRAPH, APART, EAGER, NAIVE]
    assert names == ["cascade", "base", *forced, "all exits in turn", *others]
    assert {one.latency.count for one in result.subjects} == {result.end_to_end.count}
    assert result.not_measured == {}


def test_shares_accuracies_and_counts_fit_together(result: Result) -> None:
    assert sum(one.count for one in result.exits) == result.end_to_end.count
    right = sum(one.count * (one.accuracy or 0) for one in result.exits)
    assert result.accuracy == pytest.approx(right / result.end_to_end.count)


def test_a_stage_is_run_by_the_frames_that_reach_it(result: Result) -> None:
    shares = {one.name: one.share for one in result.stages}
    saver = result.exit("saver").share
    assert shares["preprocess"] == shares["saver"] == 1
    assert shares["segment1"] == pytest.approx(1 - saver)
    assert 0 < saver < 1


def test_time_without_preprocessing_and_the_host_s_share_are_parts_of_the_whole(
    result: Result,
) -> None:
    assert result.inference is not None
    assert result.host_gap is not None
    assert 0 < result.inference.mean < result.end_to_end.mean
    assert 0 < result.host_gap.mean < result.end_to_end.mean


def test_the_expectation_comes_from_the_forced_exits(result: Result) -> None:
    assert result.expectation is not None
    means = [one.share * one.forced.mean for one in result.exits if one.forced]
    assert result.expectation.seconds == pytest.approx(sum(means))


def test_batches_above_one_have_a_throughput(result: Result) -> None:
    assert [one.batch for one in result.throughput] == [8]
    assert result.throughput[0].cascade > 0


def test_a_generous_deadline_is_met(result: Result) -> None:
    assert result.deadline is not None
    assert result.deadline.missed <= result.deadline.frames * 0.05
    assert result.deadline.frames == result.end_to_end.count


def test_the_result_says_where_and_how(result: Result) -> None:
    assert result.environment["stamp"]["machine"]["packages"]["onnxruntime"]
    assert result.environment["before"].keys() == result.environment["after"].keys()
    assert result.operating_point is not None
    assert result.operating_point.name == "zero_loss"
    assert result.command.startswith("edge-runtime bench")


def test_energy_is_measured_or_says_why_not(result: Result) -> None:
    assert bool(result.energy) != bool(result.no_energy)


def test_the_latency_table_has_all_stages_and_exits(result: Result, bundle: Bundle) -> None:
    table = result.latency_table
    assert table is not None
    assert table.stages == tuple(stage.name for stage in bundle.cascade.stages)
    assert table.exits == ("saver", "middle", "final")


def test_points_are_those_of_the_bundle_and_the_base(result: Result) -> None:
    assert [one.name for one in result.points] == ["base", "saver_only", "zero_loss"]


def test_a_trace_file_holds_complete_events_in_microseconds(files: Path, result: Result) -> None:
    events = json.loads((files / "frames.json").read_text())["traceEvents"]
    bars = [event for event in events if event["ph"] == "X"]
    frames = [event for event in bars if event["cat"] == "frame"]
    assert [event["dur"] / 1e6 for event in frames] == pytest.approx(
        [frame.seconds for frame in result.frames]
    )
    slowest = [event for event in bars if event["pid"] == len(frames)]
    assert max(e["ts"] + e["dur"] for e in slowest if e["cat"] != "frame") <= frames[-1]["dur"]


def test_the_page_shows_the_command(files: Path, result: Result) -> None:
    assert "edge-runtime bench" in (files / "page.html").read_text()


def test_noise_leaves_as_often_as_the_record_says(bundle: Bundle, tmp_path: Path) -> None:
    target = tmp_path / "noise.json"
    more = ["--image-size", "5x7", "--baselines", "none", "--json", str(target)]
    assert bench(bundle, *more, data=False) == 0
    result = read_result(target)
    shares = [one.share for one in result.exits]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.15)
    assert result.accuracy is None
    assert any("Noise" in note for note in result.notes)


def test_an_exit_that_is_not_evaluated_is_pruned(bundle: Bundle, tmp_path: Path) -> None:
    target = tmp_path / "pruned.json"
    more = ["--operating-point", "saver_only", "--baselines", "none", "--json", str(target)]
    assert bench(bundle, *more) == 0
    result = read_result(target)
    assert not result.exit("middle").evaluated
    assert result.exit("middle").forced is None
    assert result.pruned == ("head1",)
    assert result.latency_table is not None
    assert "head1" in result.latency_table.stages


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_a_duration_too_short_for_the_percentile_says_how_many_frames_are_missing(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(bundle, "--percentile", "99.999", "--baselines", "none") == 2
    message = error_of(capsys)
    assert "expected 299572, so " in message
    assert "frames are missing" in message
    assert "Give --duration" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--precision", "int8"], "--precision int8: no stage of"),
        (["--baselines", "one-sesion"], "Did you mean 'one-session'?"),
        (["--operating-point", "fast"], "has no operating point 'fast'"),
        (["--html", "absent/page.html"], "--html absent/page.html: expected a file in a folder"),
        (["--batch", "0"], "expected a whole number >= 1"),
        (["--percentile", "100"], "expected a number below 100"),
        (["--duration", "0"], "expected a number > 0"),
    ],
)
def test_what_can_t_be_measured_is_refused(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert bench(bundle, *arguments) in (1, 2)
    assert expected in error_of(capsys)


def test_noise_needs_a_record_of_where_images_leave(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--image-size", "5x7", "--operating-point", "saver_only"]
    assert bench(bundle, *more, data=False) == 2
    assert "does not record how many samples leave" in error_of(capsys)
