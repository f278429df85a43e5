"""From labelled images to a gate in a bundle, and its curves, on the toy bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import edge_runtime as er
from calib.quee.collect import collect_paths, family_of
from calib.quee.costs import StageCosts, base_costs, bits, with_costs
from calib.quee.routing import route_table
from edge_runtime import Bundle, cli
from edge_runtime.backends.onnxrt import OnnxRuntimeBackend
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset
from edge_runtime.gate import Gate
from tests.edge_runtime.gated_toys import gated_bundle
from tests.toys import toy_images

SIZE = ["--image-size", "5x7"]


def data(path: Path, count: int, seed: int) -> Path:
    np.savez(path, images=toy_images(count, seed), labels=np.arange(count) % 4)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gate")
    gated_bundle(made)  # and plain.bundle, which has one precision
    for i, name in enumerate(("train", "val", "test")):
        data(made / f"{name}.npz", 120, i)
    return made


@pytest.fixture(scope="module")
def fitted(folder: Path) -> dict:
    assert fit(folder, "--levels", "fp32,int8", "--json", str(folder / "fit.json")) == 0
    found: dict = json.loads((folder / "fit.json").read_text())
    return found


def fit(folder: Path, *more: str, bundle: str = "toy.bundle") -> int:
    own = ["--train", str(folder / "train.npz"), "--val", str(folder / "val.npz"), *SIZE]
    return cli.main(["gate", "fit", str(folder / bundle), *own, "--clusters", "8", *more])


def images(folder: Path, bundle: Bundle, name: str) -> ImageDataset:
    return ImageDataset.open(str(folder / f"{name}.npz"), bundle.cascade.classes)


def test_a_fitted_gate_runs_from_the_bundle(folder: Path, fitted: dict) -> None:
    with er.load(folder / "toy.bundle", operating_point="gate", image_size=(5, 7)) as cascade:
        traces = [cascade(image).trace for image in toy_images(20, 7)]
    precisions = {run.precision for trace in traces for run in trace.stages}
    assert precisions <= {"fp32", "int8"}
    assert all(trace.stages[0].stage == "preprocess" for trace in traces)


def test_info_says_what_the_gate_weighs(
    folder: Path, fitted: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["info", str(folder / "toy.bundle")]) == 0
    assert "gate: gate gate.npz, weighing latency, lambda 0.1" in capsys.readouterr().out


def test_every_path_has_every_cost(fitted: dict) -> None:
    costs = fitted["figures"]["costs"]
    assert {"bit_operations", "macs", "latency"} <= costs.keys()
    for column in costs.values():
        assert sorted(column) == sorted(fitted["paths"])
    macs, operations = costs["macs"], costs["bit_operations"]
    # Eight bits instead of 32, in all but the first block.
    assert operations["fp32 -> fp32"] == pytest.approx(macs["fp32 -> fp32"])
    assert operations["fp32 -> int8"] < operations["fp32 -> fp32"]


def test_routing_while_running_is_the_table_s(folder: Path, fitted: dict) -> None:
    bundle = Bundle.open(folder / "toy.bundle")
    point = bundle.operating_point("gate")
    assert point.gate is not None
    model = bundle.gate(point.gate)
    test = images(folder, bundle, "test")
    family = family_of(bundle, model.paths.levels)
    console = Console()
    table = collect_paths(bundle, family, lambda: OnnxRuntimeBackend(bundle), test, console)
    routed = route_table(Gate(model, model.costs("latency"), point.gate.trade_off), table)
    with er.load(bundle, operating_point=point, image_size=(5, 7)) as cascade:
        answers = [cascade(test.image(i)) for i in range(len(test))]
    names = [model.paths.exits[len(model.paths.paths[i]) - 1] for i in routed.path]
    same = [answer.exit == name for answer, name in zip(answers, names, strict=True)]
    assert all(s or near for s, near in zip(same, routed.near, strict=True))
    right = [a.label == label for a, label in zip(answers, test.labels, strict=True)]
    assert np.mean(right) == pytest.approx(routed.accuracy, abs=routed.near_ties / len(test))


def test_a_sweep_has_curves_measurements_and_a_picture(folder: Path, fitted: dict) -> None:
    target, picture = folder / "sweep.json", folder / "sweep.png"
    files = [f"--{name}={folder / file}.npz" for name, file in (("val", "val"), ("data", "test"))]
    more = ["--train", str(folder / "train.npz"), "--lambdas", "0,0.1,1", "--timed", "40"]
    more += ["--plot", str(picture), "--json", str(target), *SIZE]
    assert cli.main(["gate", "sweep", str(folder / "toy.bundle"), *files, *more]) == 0
    found = json.loads(target.read_text())
    assert picture.stat().st_size > 10_000
    assert [one["subject"] for one in found["measured"]] == [
        "base",
        "gate, lambda 0.01",
        "gate, lambda 0.1",
        "gate, lambda 1",
    ]
    assert found["samples"] == 120
    assert found["gate_s"] > 0


def test_costs_add_up_over_the_blocks(folder: Path) -> None:
    bundle = Bundle.open(folder / "toy.bundle")
    names = [stage.name for stage in bundle.cascade.stages]
    seconds = {(name, p): 1.0 if p == "fp32" else 0.5 for name in names for p in ("fp32", "int8")}
    costs = StageCosts(dict.fromkeys(names, 10), seconds, decide_s=0.1, frame_s=0.2, gate_s=0.01)
    family = family_of(bundle, ("fp32", "int8"))
    test = images(folder, bundle, "test").subset(range(3))
    table = collect_paths(bundle, family, lambda: OnnxRuntimeBackend(bundle), test, Console())
    priced = with_costs(table, bundle, family, costs, gated=True).path_costs("latency")
    assert priced[0,] == pytest.approx(2 + 0.2 + 0.1 + 0.01)
    # A path of all three exits meets two gates.
    assert priced[0, 0, 0] == pytest.approx(6 + 0.2 + 0.3 + 0.02)
    assert base_costs(bundle, costs, {})["macs"] == pytest.approx(4 / 6)
    assert (bits("int8"), bits("fp16"), bits("mixed")) == (8, 16, 32)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--levels", "fp32,int4"], "level 'int4': no stage of"),
        (["--levels", "int8,fp32"], "int8"),
        (["--clusters", "40"], "clusters"),
        (["--trade-off", "-1"], "expected a finite number >= 0"),
        (["--trade-off", "nan"], "expected a finite number >= 0"),
        (["--cost", "energie"], "--cost energie"),
        (["--lambdas", "0,1"], "--lambdas is an option of gate sweep"),
    ],
)
def test_what_can_t_be_fitted_is_refused(
    folder: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    levels = [] if "--levels" in arguments else ["--levels", "fp32,int8"]
    assert fit(folder, *levels, *arguments) in (1, 2)
    assert expected in capsys.readouterr().err


def test_a_bundle_with_one_precision_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(folder, bundle="plain.bundle") == 2
    assert "has one precision: got fp32, expected two or more" in capsys.readouterr().err


def test_images_that_are_in_both_parts_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--train", str(folder / "val.npz"), "--val", str(folder / "val.npz"), *SIZE]
    assert cli.main(["gate", "fit", str(folder / "toy.bundle"), *own]) == 2
    assert "--train and --val have images in common" in capsys.readouterr().err


def test_a_gate_of_another_bundle_is_refused(
    folder: Path, fitted: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.bundle"
    shutil.copytree(folder / "plain.bundle", other)
    (other / "operating_points").mkdir(exist_ok=True)
    points = folder / "toy.bundle/operating_points"
    for name in ("gate.npz", "gate.json"):
        shutil.copy(points / name, other / "operating_points" / name)
    own = ["--val", str(folder / "val.npz"), "--data", str(folder / "test.npz"), *SIZE]
    assert cli.main(["gate", "sweep", str(other), *own]) == 1
    assert "was chosen on another bundle" in capsys.readouterr().err
