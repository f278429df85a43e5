"""The bench and the simulation of a point with a gate: what can't be forced is left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.latency.lineup import EAGER, IF_GRAPH, NAIVE, ONE_SESSION
from bench.result import read_result
from edge_runtime import Bundle, OperatingPoint, cli
from tests.edge_runtime.gated_toys import gate_model, gate_point, gated_bundle
from tests.toys import toy_images


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp("gate")
    bundle = gated_bundle(folder)
    gate_point(bundle, gate_model(bundle))
    point = OperatingPoint("zero_loss", thresholds={"saver": 0.49}, bundle=bundle.hash)
    bundle.write_operating_point(point)
    np.savez(folder / "data.npz", images=toy_images(40), labels=np.arange(40) % 4)
    return bundle


def run(bundle: Bundle, command: str, *more: str, data: bool = True) -> int:
    own = ["--data", str(bundle.path.parent / "data.npz")] if data else []
    return cli.main([command, str(bundle.path), *own, *more])


def bench(bundle: Bundle, *more: str, data: bool = True) -> int:
    own = ("--operating-point", "gate", "--duration", "0.2", "--warmup", "5")
    return run(bundle, "bench", *own, *more, data=data)


def test_what_can_t_be_forced_is_left_out_and_the_table_is_of_its_own_frames(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bundle.path.parent
    files = ["--json", str(folder / "out.json"), "--html", str(folder / "out.html")]
    files += ["--trace", str(folder / "frames.json"), "--batch", "4", "--deadline-ms", "1000"]
    assert bench(bundle, *files) == 0
    result = read_result(folder / "out.json")
    names = [one.name for one in result.subjects]
    assert names == ["cascade", "base", "all exits in turn", ONE_SESSION]
    assert result.not_measured.keys() == {
        *(IF_GRAPH, EAGER, NAIVE, "cascade at other precisions"),
    }
    assert result.expectation is None
    assert [one.forced for one in result.exits] == [None] * 3
    assert sum(one.count for one in result.exits) == result.end_to_end.count
    precisions = {one.name: one.precision for one in result.stages}
    assert precisions["segment1"] == "fp32/fp16/int8"
    assert precisions["saver"] == "fp32"
    table = result.latency_table
    assert table is not None
    assert np.array(table.stage_us).min() > 0
    assert set(table.precisions) == {"fp32"}
    assert [one.name for one in result.points] == ["base", "zero_loss"]
    assert result.throughput[0].cascade > 0
    assert result.operating_point is not None
    assert result.operating_point.gate is not None

    # The table simulates the other points; the gate is left out, and refused by name.
    simulate = ("--latency-table", str(folder / "out.json"))
    capsys.readouterr()
    assert run(bundle, "simulate", *simulate) == 0
    assert run(bundle, "simulate", *simulate, "--operating-point", "gate") == 2
    assert "'gate' has a gate, which can't be simulated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "data", "message"),
    [
        ((), False, "noise can't be made to leave where images leave at a gate"),
        (("--precision", "int8"), True, "--precision int8: the gate of operating point 'gate'"),
    ],
)
def test_noise_and_a_precision_are_refused(
    bundle: Bundle,
    more: tuple[str, ...],
    data: bool,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = (*more, *(() if data else ("--image-size", "5x7")))
    assert bench(bundle, *more, data=data) == 2
    assert message in capsys.readouterr().err
