"""The command shows what a device that isn't here would take, and refuses what can't tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.result import Deadline, Result, SubjectFigures, write_result
from bench.simulate import command
from edge_runtime import Bundle, OperatingPoint
from edge_runtime.cli import run_command
from edge_runtime.dataset import ImageDataset
from tests.bench.results import distribution, latency_table, made_up_result
from tests.toys import toy_bundle, toy_images

STAGES = ("preprocess", "saver", "segment1", "head1", "segment2", "head2")
THRESHOLDS = {"saver": 0.5, "middle": 0.4}


@dataclass
class Desk:
    """A bundle, images, and the file of a device."""

    bundle: Bundle
    data: Path
    result: Result
    folder: Path

    def simulate(self, *more: str | Path, result: Result | None = None, code: int = 0) -> Any:
        """Run the command; returns its JSON where it worked."""
        table, target = self.folder / "device.json", self.folder / "found.json"
        write_result(result or self.result, table)
        arguments = [self.bundle.path, "--data", self.data, "--latency-table", table, *more]
        arguments += ["--json", target]
        words = [str(one) for one in arguments]
        assert run_command("edge-runtime simulate", command, words) == code
        return json.loads(target.read_text()) if code == 0 else None


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("simulate")
    bundle = toy_bundle(folder / "toy.bundle")
    point = OperatingPoint("zero_loss", thresholds=THRESHOLDS, bundle=bundle.hash)
    for name in ("zero_loss", "twin"):
        bundle.write_operating_point(replace(point, name=name))
    bundle.write_operating_point(OperatingPoint("entropy", metric="entropy", bundle=bundle.hash))
    data = folder / "data.npz"
    np.savez(data, images=toy_images(40), labels=np.arange(40) % 4)
    rng = np.random.default_rng(0)
    table = replace(
        latency_table(),
        stages=STAGES,
        precisions=("fp32",) * len(STAGES),
        stage_us=tuple(map(tuple, rng.gamma(9, 10, (200, len(STAGES))).round(2).tolist())),
        watts=dict.fromkeys(STAGES, 8.0),
    )
    result = made_up_result(
        bundle=bundle.hash,
        data=ImageDataset.open(data, bundle.cascade.classes).hash,
        operating_point=point,
        latency_table=table,
    )
    return Desk(bundle, data, result, folder)


def test_all_points_and_the_base_are_shown_with_what_was_measured_there(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    found = desk.simulate("--deadline-ms", "0.3")
    text = capsys.readouterr().out
    points = {one["simulated"]["point"]: one for one in found["points"]}
    assert list(points) == ["base", "entropy", "twin", "zero_loss"]
    assert "toy on Orin NX (onnxrt), simulated on 40 images" in text
    assert "mJ" in text and "late" in text and "p99 needs 299 rows" in text
    for name in ("twin", "zero_loss"):
        assert points[name]["simulated"]["early"] > 0
        assert points[name]["speed_up"] > 1 and points[name]["best"]
        measured = points[name]["measured"]
        assert measured["latency"]["mean"] == desk.result.end_to_end.mean
        mean = points[name]["simulated"]["latency"]["mean"]
        assert measured["mean_ratio"] == pytest.approx(mean / desk.result.end_to_end.mean)
    # A point without thresholds is the base.
    for name in ("base", "entropy"):
        assert points[name]["simulated"]["early"] == 0 and points[name]["speed_up"] == 1
        measured = points[name]["measured"]["latency"]["mean"]
        assert measured == next(s.latency.mean for s in desk.result.subjects if s.name == "base")
    ratio = points["zero_loss"]["measured"]["mean_ratio"]
    assert f"(simulated / measured = {ratio:.2f})" in text


def test_named_points_are_simulated_in_their_order(desk: Desk) -> None:
    own = desk.folder / "mine.json"
    OperatingPoint("mine", policy="patience", patience=1).write(own)
    found = desk.simulate("--operating-point", own, "base", "zero_loss", "base")
    points = found["points"]
    assert [one["simulated"]["point"] for one in points] == ["mine", "base", "zero_loss"]
    assert [one["measured"] is None for one in points] == [True, False, False]


def test_what_makes_a_measurement_differ_is_said(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = Deadline(seconds=1e-3, missed=1, cut_short=3, frames=1000)
    desk.simulate(result=replace(desk.result, data="", deadline=cut, unstable=("it was hot",)))
    text = capsys.readouterr().out
    assert "zero_loss measured there on noise, 3 frames cut short by a deadline: mean" in text
    assert "base measured there on noise: mean" in text
    assert "the run on the device was unstable: it was hot" in text


def test_points_that_the_table_lacks_are_left_out_unless_they_are_named(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    table = desk.result.latency_table
    assert table is not None
    other = replace(table, stages=("preprocess", "nothing", *STAGES[2:]))
    result = replace(desk.result, latency_table=other)
    found = desk.simulate(result=result)
    assert [one["simulated"]["point"] for one in found["points"]] == ["base", "entropy"]
    assert list(found["left_out"]) == ["twin", "zero_loss"]
    assert "twin: not simulated: operating point 'twin': the latency table's times of stage" in (
        capsys.readouterr().out
    )
    desk.simulate("--operating-point", "zero_loss", result=result, code=2)
    error = capsys.readouterr().err
    assert "stage 'saver': got none, expected fp32. Measure it on the device with:" in error
    assert "--operating-point zero_loss" in error


def no_table(desk: Desk) -> Result:
    return replace(desk.result, latency_table=None)


def published(desk: Desk) -> Result:
    return replace(desk.result, kind="reference", name="the thesis")


def of_another_bundle(desk: Desk) -> Result:
    return replace(desk.result, bundle="c" * 64, bundle_name="theirs")


def of_other_exits(desk: Desk) -> Result:
    assert desk.result.latency_table is not None
    table = replace(desk.result.latency_table, exits=("saver", "centre", "final"))
    return replace(desk.result, latency_table=table)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (no_table, 1, "device.json has no latency table. Measure again"),
        (published, 1, "kind: got reference, figures of the thesis that somebody published"),
        (of_another_bundle, 1, "another bundle: got cccccccccccc (theirs), expected"),
        (of_other_exits, 2, "got saver, centre, final, expected saver, middle, final"),
    ],
)
def test_a_file_that_says_nothing_of_the_bundle_is_refused(
    desk: Desk,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Desk], Result],
    code: int,
    message: str,
) -> None:
    desk.simulate(result=change(desk), code=code)
    assert message in capsys.readouterr().err


def test_bad_options_are_refused(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.simulate("--operating-point", "zero_los", code=1)
    assert "has no operating point 'zero_los'" in capsys.readouterr().err
    desk.simulate("--deadline-ms", "0", code=2)
    assert "got '0', expected a number > 0" in capsys.readouterr().err
    foreign = desk.folder / "foreign.json"
    OperatingPoint("foreign", bundle="c" * 64).write(foreign)
    desk.simulate("--operating-point", foreign, code=1)
    assert "was chosen on another bundle: got cccccccccccc" in capsys.readouterr().err


def test_the_picture_is_drawn(desk: Desk) -> None:
    pytest.importorskip("matplotlib")
    picture = desk.folder / "points.svg"
    desk.simulate("--plot", picture)
    assert "<svg" in picture.read_text()
    desk.simulate("--plot", desk.folder / "points.bmp", code=2)


def test_only_a_point_that_runs_alike_is_compared(desk: Desk) -> None:
    other = OperatingPoint(
        "fast", thresholds=THRESHOLDS, variants={"saver": "fp32"}, bundle=desk.bundle.hash
    )
    base = SubjectFigures(name="base", what="the last exit alone", latency=distribution(1e-3))
    result = replace(desk.result, operating_point=other, subjects=(base,))
    found = desk.simulate("--operating-point", "base", "zero_loss", result=result)
    # The first variant, named or not, is the same precision.
    assert found["points"][0]["measured"]["latency"]["mean"] == base.latency.mean
    assert found["points"][1]["measured"] is not None
    colder = replace(other, temperatures={"saver": 2.0})
    result = replace(result, operating_point=colder)
    found = desk.simulate("--operating-point", "zero_loss", result=result)
    assert found["points"][0]["measured"] is None
