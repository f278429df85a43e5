"""Choosing precisions through the command line, and what ends up in the bundle."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import edge_runtime as er
from calib import precision_report, precision_work
from edge_runtime import Bundle, OperatingPoint, cli
from engines.bundle import BuiltStage, with_variants, write_bundle
from engines.quantize import activations, quantize
from engines.verify import run_stages
from tests.calib import conv_toys
from tests.calib.precision_toys import (
    ruined,
    scaled,
    slow,
    toy_data,
    trained_models,
    write_toy,
)
from tests.toys import CLASSES, toy_cascade


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Data, and a bundle whose slow stages have fast variants: one scaled, one as it was."""
    models = trained_models()
    write_toy(
        tmp_path / "toy.bundle",
        {"saver": scaled(models["saver"], 0.7), "segment1": models["segment1"]},
        # The saver pays: what it spares takes much longer.
        defaults={"saver": slow(models["saver"]), "segment1": slow(models["segment1"], 40)},
    )
    return with_data(tmp_path)


@pytest.fixture
def slower(tmp_path: Path) -> Path:
    """Data, and a bundle whose only variant is slower than what it would replace."""
    write_toy(tmp_path / "toy.bundle", {"segment1": slow(trained_models()["segment1"])})
    return with_data(tmp_path)


def with_data(folder: Path) -> Path:
    images, labels = next(toy_data().batches(1000))
    np.savez(folder / "data.npz", images=images, labels=labels)
    return folder


def precision(folder: Path, *more: str, code: int = 0) -> dict:
    target = folder / "result.json"
    arguments = ["precision", str(folder / "toy.bundle"), "--data", str(folder / "data.npz")]
    assert cli.main([*arguments, "--repeats", "2", "--json", str(target), *more]) == code
    found: dict = json.loads(target.read_text()) if code == 0 else {}
    return found


def test_the_point_is_written_and_runs_as_expected(toy: Path, capsys) -> None:
    found = precision(toy)
    bundle = Bundle.open(toy / "toy.bundle")
    assert list(bundle.operating_points()) == ["int8"]
    assert found["files"] == [str(bundle.path / "operating_points" / "int8.json")]
    point = bundle.operating_point("int8")
    assert point.variants == found["variants"] == {"saver": "int8", "segment1": "int8"}
    assert point.thresholds == found["after"]["thresholds"]
    assert point.thresholds["saver"] < found["before"]["thresholds"]["saver"]
    assert point.chosen_on["data"] == found["data"]
    assert point.chosen_on["samples"] == 400
    assert point.chosen_on["stage_time_ratios"]["saver"]["high"] < 1
    assert point.expected["old_thresholds"]["thresholds"] == found["before"]["thresholds"]
    assert set(point.expected["cross_validation"]) >= {"drop", "interval", "below"}
    images, labels = next(toy_data().batches(1000))
    with er.load(bundle, operating_point="int8", image_size=(5, 7)) as cascade:
        predictions = cascade(images)
    ran = {(run.stage, run.precision) for p in predictions for run in p.trace.stages}
    assert ("saver", "int8") in ran
    assert ("head1", "int8") not in ran
    in_sample = point.expected["in_sample"]
    correct = np.mean([p.label == y for p, y in zip(predictions, labels, strict=True)])
    assert correct == pytest.approx(in_sample["accuracy"])
    for name, rate in in_sample["exit_rates"].items():
        assert np.mean([p.exit == name for p in predictions]) == pytest.approx(rate)
    out = capsys.readouterr().out
    assert "INT8: saver, segment1." in out
    assert "Not considered: preprocess, head1, segment2, head2." in out
    assert "With the old thresholds it would be right on" in out
    command = f"evaluate {bundle.path} --operating-point int8 --data "
    assert f"edge-runtime {command}OTHER" in out
    assert cli.main([*command.split(), str(toy / "data.npz")]) == 0


def test_where_int8_is_slower_nothing_is_written(slower: Path, capsys) -> None:
    found = precision(slower)
    out = capsys.readouterr().out
    assert found["variants"] == {}
    assert found["operating_point"] is None
    assert found["files"] == []
    assert Bundle.open(slower / "toy.bundle").operating_points() == {}
    assert "INT8 does NOT pay here: no stage is worth it" in out
    assert "segment1 stays at fp32: slower here: " in out
    assert "edge-runtime evaluate" not in out
    assert "--at-any-speed chooses by accuracy alone" in out


def test_at_any_speed_a_slower_variant_is_chosen_and_said_to_be(slower: Path, capsys) -> None:
    found = precision(slower, "--at-any-speed")
    out = capsys.readouterr().out
    assert found["variants"] == {"segment1": "int8"}
    point = Bundle.open(slower / "toy.bundle").operating_point("int8")
    assert "variants of any speed" in point.chosen_on["method"]
    assert "Chosen by accuracy alone, for another device" in out


def test_a_ruined_stage_stays(tmp_path: Path, capsys) -> None:
    models = trained_models()
    variants = {"saver": models["saver"], "segment2": ruined(models["segment2"])}
    write_toy(
        tmp_path / "toy.bundle", variants, defaults={name: slow(models[name]) for name in variants}
    )
    found = precision(with_data(tmp_path), "--dry-run")
    assert found["variants"] == {"saver": "int8"}
    assert "segment2 stays at fp32: with it the cascade loses" in capsys.readouterr().out


def test_a_dry_run_of_one_stage_with_json_on_stdout(toy: Path, capsys) -> None:
    arguments = ["precision", str(toy / "toy.bundle"), "--data", str(toy / "data.npz")]
    more = ["--stages", "segment1", "--repeats", "0", "--dry-run", "--json", "-"]
    assert cli.main([*arguments, *more]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "time per stage and image" in err
    assert found["variants"] == found["operating_point"]["variants"] == {"segment1": "int8"}
    assert [effect["stages"] for effect in found["effects"]] == [["segment1"]]
    assert found["files"] == []
    assert Bundle.open(toy / "toy.bundle").operating_points() == {}


class TestOperatingPoint:
    """A point of the bundle to compare with."""

    def test_its_thresholds_signal_and_goal_are_taken(self, toy: Path, capsys) -> None:
        arguments = ["thresholds", str(toy / "toy.bundle"), "--data", str(toy / "data.npz")]
        assert cli.main([*arguments, "--metric", "entropy", "--repeats", "1"]) == 0
        point = Bundle.open(toy / "toy.bundle").operating_point("drop_0.5")
        found = precision(toy, "--operating-point", "drop_0.5", "--dry-run")
        assert found["goal"] == "an accuracy drop of at most 0.5 points"
        assert found["before"]["thresholds"] == point.thresholds
        assert found["before"]["accuracy"] == point.expected["in_sample"]["accuracy"]
        assert found["operating_point"]["metric"] == "entropy"
        assert "chosen on other images" not in capsys.readouterr().out
        precision(
            toy, "--operating-point", "drop_0.5", "--metric", "logits_margin", "--dry-run", code=2
        )
        assert "--metric: got logits_margin, expected entropy" in capsys.readouterr().err

    def test_one_made_by_hand_has_no_goal(self, toy: Path, capsys) -> None:
        bundle = Bundle.open(toy / "toy.bundle")
        point = OperatingPoint("mine", thresholds={"saver": 0.7}, bundle=bundle.hash)
        bundle.write_operating_point(point)
        precision(toy, "--operating-point", "mine", code=2)
        assert "--goal-drop POINTS" in capsys.readouterr().err
        found = precision(toy, "--operating-point", "mine", "--goal-drop", "2", "--dry-run")
        assert found["before"]["thresholds"] == {"saver": 0.7, "middle": None}
        assert "chosen on other images" in capsys.readouterr().out


class TestLayers:
    """Single layers, on demand."""

    @staticmethod
    def run(folder: Path, capsys, *more: str) -> tuple[dict, str]:
        conv_toys.int8_bundle(folder, {("segment1", "b"): 300.0}).path.rename(folder / "toy.bundle")
        data = conv_toys.data_of(Bundle.open(folder / "toy.bundle"))
        images, labels = next(data.batches(1000))
        np.savez(folder / "data.npz", images=images, labels=labels)
        found = precision(folder, "--repeats", "0", "--dry-run", *more)
        return found, capsys.readouterr().out

    def test_the_worst_come_first_and_what_to_do_last(
        self, tmp_path: Path, capsys, monkeypatch
    ) -> None:
        monkeypatch.setattr(precision_report, "_SHOWN", 3)
        found, out = self.run(tmp_path, capsys, "--layers", "all")
        layers = found["layers"]
        listed = [(effect["stages"][0], effect["node"]) for effect in layers["effects"]]
        assert listed == [(s, n) for s, names in conv_toys.LAYERS.items() for n in names]
        assert {"exit_agreement", "accuracy_drop", "operator"} <= set(layers["effects"][0])
        assert [one["exit"] for one in layers["effects"][0]["exits"]] == ["early", "final"]
        table = out[out.index("what each layer alone does in int8") :]
        rows = table[table.index("───") : table.index(" more that do less")].splitlines()[1:]
        assert rows[0].split()[:3] == ["Conv4", "segment1", "early"]
        assert [row.split()[:1] for row in rows[3:]] == [[], ["5"]]
        (remedy,) = layers["remedies"]
        assert remedy["exclude_nodes"] == "^(Conv4)$"
        end = "Quantise the bundle without int8 again, with: --exclude-nodes '^(Conv4)$'"
        assert layers["advice"][-1] == end
        assert out.endswith(f"{end}\n")
        assert "Conv4 of segment1 hurts: alone it changes " in layers["advice"][0]

    def test_where_none_stands_out_nothing_is_advised(self, tmp_path: Path, capsys) -> None:
        found, out = self.run(tmp_path, capsys, "--layers", "segment2")
        assert [e["node"] for e in found["layers"]["effects"]] == ["Conv0", "Conv2"]
        assert found["layers"]["remedies"] == []
        assert "No layer stands out: none alone surely changes more than 2% of" in out
        assert "--exclude-nodes" not in out

    def test_nobody_looks_at_them_unasked(self, slower: Path, capsys) -> None:
        assert precision(slower, "--dry-run")["layers"] is None
        assert "layer" not in capsys.readouterr().out


class TestRefusals:
    """Before anything long begins."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--precision", "fp16"], "convert"),
            (["--layers", "all", "--precision", "fp16"], "in INT8 only: got --precision fp16"),
            (["--layers", "all", "--backend", "fake"], "expected --backend onnxrt"),
            (["--layers", "head1"], "'head1' has no variant 'int8'"),
            (["--layers", "saver"], "stage 'saver': its int8 variant can't be split into layers"),
            (["--stages", "head1"], "--data DIR --out NEW"),
            (["--stages", "segment7"], "Did you mean 'segment"),
            (["--budget", "-1"], "--budget: got -1.0, expected points >= 0"),
            (["--budget", "nan"], "--budget: got nan"),
            (["--goal-drop", "200"], "accuracy drop"),
            (["--name", "a/b"], "name of an operating point"),
            (["--plot", "missing/out.png"], "in a folder that exists"),
            (["--plot", "out.txt"], "a file .pdf, .png, .svg"),
        ],
    )
    def test_what_can_not_be(
        self, toy: Path, capsys, monkeypatch, arguments: list[str], message: str
    ) -> None:
        monkeypatch.setattr(precision_work, "variant_times", None)
        precision(toy, *arguments, code=2)
        assert message in capsys.readouterr().err

    def test_one_exit(self, toy: Path, capsys) -> None:
        cascade, models = toy_cascade(), trained_models()
        one = {"fp32": models["saver"], "int8": models["saver"]}
        write_bundle(
            toy / "toy.bundle",
            name="one",
            classes=CLASSES,
            image=cascade.image,
            stages=[
                BuiltStage(cascade.stages[0], {"fp32": models["preprocess"]}),
                BuiltStage(cascade.stages[1], one),
            ],
            exits=cascade.exits[:1],
            provenance={},
            overwrite=True,
        )
        precision(toy, code=2)
        assert "has one exit" in capsys.readouterr().err


class TestPlot:
    """One picture."""

    def test_it_is_drawn(self, toy: Path) -> None:
        pytest.importorskip("matplotlib")
        found = precision(toy, "--plot", str(toy / "out.png"))
        assert str(toy / "out.png") in found["files"]
        assert (toy / "out.png").read_bytes().startswith(b"\x89PNG")
        assert not list(toy.glob(".*"))

    def test_where_nothing_is_chosen_too(self, slower: Path) -> None:
        pytest.importorskip("matplotlib")
        precision(slower, "--plot", str(slower / "out.svg"))
        assert b"measured, not chosen" in (slower / "out.svg").read_bytes()

    def test_without_matplotlib_the_extra_is_named(self, toy: Path, capsys, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        precision(toy, "--plot", str(toy / "out.png"), code=3)
        assert "pip install 'edge-runtime[calib]'" in capsys.readouterr().err


def test_an_interruption_leaves_nothing_behind(toy: Path, monkeypatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")

    def interrupted(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half a pict")
        raise KeyboardInterrupt

    before = sorted(toy.rglob("*"))
    monkeypatch.setattr(figure.Figure, "savefig", interrupted)
    precision(toy, "--plot", str(toy / "out.png"), code=130)
    assert sorted(toy.rglob("*")) == before


def test_variants_of_the_quantiser_hardly_change_the_answers(tmp_path: Path) -> None:
    """Ranges, Q/DQ, variants and effects in one chain."""
    bundle = write_toy(tmp_path / "float.bundle", {})
    models = {
        name: bundle.stage_model(name, "fp32")
        for name in ("saver", "segment1", "head1", "segment2", "head2")
    }
    images, _ = next(toy_data().batches(1000))
    known = run_stages(bundle.cascade, {**trained_models(), **models}, images)
    ranges = {
        stage: {name: float(np.abs(known[name]).max()) for name in activations(model)}
        for stage, model in models.items()
    }
    made = {name: {"int8": quantize(models[name], ranges[name]).model} for name in models}
    with_variants(bundle, made, tmp_path / "toy.bundle", provenance={})
    found = precision(with_data(tmp_path), "--dry-run")
    *alone, together = found["effects"]
    assert [effect["stages"] for effect in alone] == [[name] for name in models]
    assert together["stages"] == list(models)
    for one in together["exits"]:
        assert one["agreement"] > 0.9
        assert 0 < one["signal_shift"] < 0.05
    assert set(found["variants"]) | set(found["left"]) == set(models)


def test_fp16_on_a_processor_is_said_to_tell_little(slower: Path, capsys) -> None:
    bundle, out = slower / "toy.bundle", slower / "fp16.bundle"
    assert cli.main(["convert", str(bundle), "--precision", "fp16", "--out", str(out)]) == 0
    shutil.rmtree(bundle)
    out.rename(bundle)
    capsys.readouterr()
    found = precision(slower, "--precision", "fp16", "--dry-run")
    assert found["verdict"][-1].startswith(
        "ONNX Runtime's CPU provider computes FP16 graphs in FP32"
    )
    assert found["verdict"][-1].split(":")[0] in " ".join(capsys.readouterr().out.split())
    assert "ONNX Runtime" not in " ".join(precision(slower, "--dry-run")["verdict"])
