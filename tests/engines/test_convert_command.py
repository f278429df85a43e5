"""edge-runtime convert BUNDLE|MODEL.onnx --precision fp16 --out NEW."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edge_runtime import Exit, Stage, TensorSpec, load
from edge_runtime.cli import main
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from engines import bundle as bundles
from engines import convert_command
from engines.bundle import BuiltStage, write_bundle
from tests.engines.classifiers import SIZE, classifier, residual_classifier
from tests.toys import CLASSES, toy_bundle, toy_images

DIGITS = Path(__file__).parents[2] / "examples/digits"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """toy.bundle with an operating point, and images.npz with 24 images."""
    folder = tmp_path_factory.mktemp("toy")
    bundle = toy_bundle(folder / "toy.bundle")
    point = OperatingPoint("half", thresholds={"saver": 0.5}, bundle=bundle.hash)
    bundle.write_operating_point(point)
    labels = np.arange(24) % len(CLASSES)
    np.savez(folder / "images.npz", images=toy_images(24), labels=labels)
    return folder


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments), "--precision", "fp16"])


def loud_model(up: float = 3e4) -> bytes:
    """The values of x, times `up` and back: (batch, 8) float32 to the same."""
    steps = [("Mul", ["x", "up"], "loud"), ("Abs", ["loud"], "abs"), ("Mul", ["abs", "down"], "y")]
    shape = ["batch", 8]
    graph = helper.make_graph(
        [helper.make_node(kind, reads, [writes], name=writes) for kind, reads, writes in steps],
        "loud",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info("y", 1, shape)],
        [
            numpy_helper.from_array(np.array(value, np.float32), name)
            for name, value in (("up", up), ("down", 1 / up))
        ],
    )
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def loud_bundle(out: Path) -> Bundle:
    x, y = (TensorSpec(name, ("batch", 8), "float32") for name in "xy")
    return write_bundle(
        out,
        name="loud",
        classes=tuple("abcdefgh"),
        image=x,
        stages=[BuiltStage(Stage("loud", "segment", (x,), (y,)), {"fp32": loud_model()})],
        exits=[Exit("only", "y")],
        provenance={},
    )


def loud_data(folder: Path) -> Path:
    values = np.random.default_rng(0).uniform(1, 100, (20, 8)).astype(np.float32)
    np.savez(folder / "data.npz", x=values)
    return folder / "data.npz"


# Bundles ----------------------------------------------------------------------------------------


def test_a_new_bundle_with_fp16_beside_fp32(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = tmp_path / "new", tmp_path / "report.json"
    source, data = toy / "toy.bundle", toy / "images.npz"
    assert convert(source, "--data", data, "--out", out, "--json", report) == 0
    old, new = Bundle.open(source), Bundle.open(out)
    variants = {record.name: list(record.variants) for record in new.manifest.stages}
    assert variants.pop("preprocess") == ["fp32"]
    assert set(map(tuple, variants.values())) == {("fp32", "fp16")}
    said = capsys.readouterr().out
    assert new.hash in said and "24 samples of the data" in said and "NOT CHECKED" not in said
    assert all(name in said for name in variants)

    result = json.loads(report.read_text())
    assert (result["bundle"], result["hash"]) == (str(out), new.hash)
    assert result["made_of"] == old.hash != new.hash
    assert result["samples"] == 24
    assert list(result["stages"]) == list(variants)
    stage = result["stages"]["head2"]
    assert stage["kept"] == {} and stage["overflows"] == {} and stage["casts"] == 2
    assert stage["bytes"] == new.record("head2").variants["fp16"].size
    assert 0 < stage["relative_error"] < 5e-3
    assert list(result["exits"]) == ["saver", "middle", "final"]
    assert all(exit_["same_class"] > 0.9 for exit_ in result["exits"].values())

    made = new.manifest.provenance
    assert made["made_by"] == "tests" and made["made_of"] == old.hash
    (conversion,) = made["conversions"]
    assert conversion["stages"]["head2"]["relative_error"] == stage["relative_error"]
    assert len(conversion["data"]["hash"]) == 64
    point = new.operating_point("half")
    assert point.thresholds == {"saver": 0.5} and point.chosen_on["carried_from"] == old.hash


def test_both_precisions_run(toy: Path, tmp_path: Path) -> None:
    assert convert(toy / "toy.bundle", "--data", toy / "images.npz", "--out", tmp_path / "b") == 0
    bundle = Bundle.open(tmp_path / "b")
    stages = [s.name for s in bundle.cascade.stages if s.kind != "preprocess"]
    images = toy_images(6)
    logits = []
    for variants in ({}, dict.fromkeys(stages, "fp16")):
        point = OperatingPoint.all_exits(bundle.cascade, variants=variants)
        with load(bundle, operating_point=point, image_size=(5, 7)) as scheduler:
            logits.append(scheduler.logits(images)["final"])
    np.testing.assert_allclose(logits[1], logits[0], atol=0.05)


def test_without_data_it_says_so(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    assert convert(toy / "toy.bundle", "--out", tmp_path / "new", "--json", report) == 0
    assert "NOT CHECKED ON DATA" in capsys.readouterr().out
    result = json.loads(report.read_text())
    assert result["data"] is None
    assert Bundle.open(tmp_path / "new").manifest.provenance["conversions"][0]["data"] is None


def test_some_stages_then_the_others(toy: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert convert(toy / "toy.bundle", "--stages", "saver, head1", "--out", first) == 0
    counts = {r.name: len(r.variants) for r in Bundle.open(first).manifest.stages}
    assert [name for name, count in counts.items() if count == 2] == ["saver", "head1"]
    assert convert(first, "--stages", "segment2", "--out", second) == 0
    made = Bundle.open(second).manifest.provenance
    assert made["made_of"] == Bundle.open(first).hash
    assert [c["made_of"] for c in made["conversions"]] == [
        Bundle.open(toy / "toy.bundle").hash,
        Bundle.open(first).hash,
    ]
    assert [list(c["stages"]) for c in made["conversions"]] == [["saver", "head1"], ["segment2"]]


def test_samples_are_of_all_classes(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data", toy / "images.npz", "--samples", 8, "--out", tmp_path / "b")
    assert convert(toy / "toy.bundle", *arguments) == 0
    assert "8 samples of the data" in capsys.readouterr().out


def test_values_beyond_fp16_need_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Noise stays below 3 and would pass; the data does not, unless its ranges are looked at."""
    source, data, out = loud_bundle(tmp_path / "loud"), loud_data(tmp_path), tmp_path / "new"
    report = tmp_path / "report.json"
    assert convert(source.path, "--data", data, "--out", out, "--json", report) == 0
    (stage,) = json.loads(report.read_text())["stages"].values()
    assert stage["kept"] == dict.fromkeys(("loud", "abs", "y"), "values beyond FP16 on the data")
    assert stage["overflows"] == {"loud": pytest.approx(3e6, 0.1), "abs": pytest.approx(3e6, 0.1)}
    assert stage["casts"] == 0
    assert "3 values beyond FP16" in " ".join(capsys.readouterr().out.split())


def test_a_stage_that_is_too_far_off_fails_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data, out = loud_bundle(tmp_path / "loud"), loud_data(tmp_path), tmp_path / "new"
    monkeypatch.setattr(convert_command, "_ranges", lambda *_: {})
    assert convert(source.path, "--data", data, "--out", out) == 1
    said = capsys.readouterr()
    assert "stage 'loud' in fp16: relative error of its output 'y': got inf" in said.err
    assert "expected <= 0.02" in said.err and "with --stages" in said.err
    assert "relative error" in said.out and not out.exists()

    assert convert(source.path, "--out", out, "--tolerance", "1e-6") == 1
    assert "Give --data: values beyond FP16 are found on it" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "saver,preprocess"], "'preprocess' is a preprocess stage"),
        (["--stages", "savr"], "no stage 'savr'. Did you mean 'saver'?"),
        (["--stages", ","], "no stage to convert"),
        (["--tolerance", "0"], "--tolerance"),
        (["--samples", "0"], "--samples"),
        (["--data", "nowhere"], "the data nowhere does not exist"),
    ],
)
def test_refuses_options(
    toy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert convert(toy / "toy.bundle", "--out", tmp_path / "new", *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_refuses_what_is_converted_already(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(toy / "toy.bundle", "--out", tmp_path / "a", "--stages", "saver") == 0
    assert convert(tmp_path / "a", "--out", tmp_path / "b") == 2
    assert "stage 'saver' has fp16 already: got fp32, fp16" in capsys.readouterr().err
    assert convert(toy / "toy.bundle", "--out", tmp_path / "a", "--stages", "saver") == 2
    assert f"{tmp_path / 'a'} exists" in capsys.readouterr().err
    before = Bundle.open(tmp_path / "a").hash
    command = (toy / "toy.bundle", "--out", tmp_path / "a", "--stages", "head1", "--overwrite")
    assert convert(*command) == 0
    assert Bundle.open(tmp_path / "a").hash != before


def test_a_bundle_that_takes_no_camera_images_says_what_it_wants(
    tmp_path: Path, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loud_bundle(tmp_path / "loud")
    (tmp_path / "folder").mkdir()
    for data, message in (
        (tmp_path / "folder", "takes none from a camera: got x (batch, 8) float32"),
        (toy / "images.npz", "arrays: got images, labels, expected x (batch, 8) float32"),
        (Path(__file__), "is no npz"),
    ):
        assert convert(tmp_path / "loud", "--data", data, "--out", tmp_path / "new") == 2
        assert message in capsys.readouterr().err
    np.savez(tmp_path / "other.npz", x=np.zeros((2, 9), np.float32))
    arguments = ("--data", tmp_path / "other.npz", "--out", tmp_path / "new")
    assert convert(tmp_path / "loud", *arguments) == 2
    assert "input 'x': shape: got (2, 9)" in capsys.readouterr().err


# Nothing half-written ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (convert_command, "_compare"),
        (convert_command, "_ranges"),
        (bundles, "write_json"),
        (os, "fsync"),
    ],
)
def test_ctrl_c_leaves_nothing(
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: object,
    name: str,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, name, interrupted)
    arguments = ("--data", toy / "images.npz", "--out", tmp_path / "new")
    assert convert(toy / "toy.bundle", *arguments) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", ["bundle", "file"])
def test_a_full_disk_leaves_nothing(
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
) -> None:
    model = toy / "model.onnx"
    onnx.save(classifier(), model)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = toy / "toy.bundle" if source == "bundle" else model
    assert convert(path, "--out", tmp_path / "new") == 1
    error = capsys.readouterr().err
    assert "written" in error and "No space left on device" in error
    assert list(tmp_path.iterdir()) == []


def test_progress_is_shown(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    original = Console.progress

    def progress(self: Console, items, description: str, total: int | None = None):
        shown.append((description, total or len(items)))
        return original(self, items, description, total)

    monkeypatch.setattr(Console, "progress", progress)
    assert convert(toy / "toy.bundle", "--data", toy / "images.npz", "--out", tmp_path / "b") == 0
    assert shown == [
        ("looking for values beyond FP16", 3),
        ("converting", 5),
        ("comparing FP16 with FP32", 3),
    ]


# Bare files -------------------------------------------------------------------------------------


def test_a_bare_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out, report = (tmp_path / name for name in ("m.onnx", "m.fp16.onnx", "report.json"))
    onnx.save(residual_classifier(exits=True), model)
    images = np.random.default_rng(0).standard_normal((9, 3, SIZE, SIZE)).astype(np.float32)
    np.savez(tmp_path / "data.npz", image=images)
    arguments = ("--data", tmp_path / "data.npz", "--out", out, "--json", report)
    assert convert(model, *arguments) == 0
    kinds = {t.name: t.data_type for t in onnx.load(out).graph.initializer}
    assert kinds["scale"] == onnx.TensorProto.FLOAT16
    result = json.loads(report.read_text())
    assert result["file"] == str(out) and len(result["sha256"]) == 64
    assert list(result["exits"]) == ["early", "later/exit", "final"]
    (stage,) = result["stages"].values()
    assert stage["casts"] == 4 and stage["relative_error"] < 5e-3
    assert "9 samples of the data" in capsys.readouterr().out

    assert convert(model, "--out", out) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert convert(model, "--out", out, "--overwrite") == 0
    assert "NOT CHECKED ON DATA" in capsys.readouterr().out
    assert convert(model, "--out", model, "--overwrite") == 2
    assert "is not replaced" in capsys.readouterr().err


def test_a_bare_file_of_one_sample_at_a_time(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    onnx.save(classifier(batch=1, reshape=(1, 4)), model)
    assert convert(model, "--out", tmp_path / "new.onnx") == 0


def test_a_bare_file_that_takes_camera_images(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from engines.one_piece import one_piece

    model = tmp_path / "m.onnx"
    model.write_bytes(one_piece(Bundle.open(toy / "toy.bundle"), "final"))
    assert convert(model, "--data", toy / "images.npz", "--out", tmp_path / "a.onnx") == 0
    for i, image in enumerate(toy_images(6)):
        folder = tmp_path / "data" / f"{i % 2}_thing"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    assert convert(model, "--data", tmp_path / "data", "--out", tmp_path / "b.onnx") == 0
    said = capsys.readouterr().out
    assert "24 samples of the data" in said and "6 samples of the data" in said


@pytest.mark.parametrize(
    ("change", "arguments", "code", "message"),
    [
        (None, ["--stages", "a"], 2, "--stages is for bundles"),
        (None, ["--out", "{folder}/no/new.onnx"], 2, "does not exist"),
        (None, ["--data", "{folder}"], 2, "Give an npz with an array named as each input"),
        ("garbage", [], 1, "is no valid ONNX file"),
        ("batch", [], 2, "expected the batch as its first axis, 1 or symbolic"),
        ("open", [], 2, "nobody knows what noise would suit it"),
        ("fp16", [], 1, "m.onnx: the model has tensors in half precision already"),
    ],
)
def test_refuses_bare_files(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: str | None,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    model, out = tmp_path / "m.onnx", tmp_path / "new.onnx"
    proto = classifier(batch=4 if change == "batch" else "N")
    if change == "open":
        proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "rows"
    onnx.save(proto, model)
    if change == "garbage":
        model.write_bytes(b"garbage")
    if change == "fp16":
        assert convert(model, "--out", out) == 0
        out.replace(model)
        capsys.readouterr()
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    assert convert(model, "--out", out, *arguments) == code
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" and not out.exists()


def test_a_source_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(tmp_path / "no.bundle", "--out", tmp_path / "new") == 1
    assert "does not exist" in capsys.readouterr().err


# Digits -----------------------------------------------------------------------------------------


def test_digits_keep_their_classes(tmp_path: Path) -> None:
    """The acceptance of FP16: 99.9 % of the test images keep their class at every exit."""
    report = tmp_path / "report.json"
    arguments = ("--data", DIGITS / "test.npz", "--out", tmp_path / "new", "--json", report)
    assert convert(DIGITS / "digits.bundle", *arguments) == 0
    result = json.loads(report.read_text())
    classes = tuple(map(str, range(10)))
    assert result["samples"] == len(ImageDataset.open(DIGITS / "test.npz", classes, channels=1))
    assert all(exit_["same_class"] >= 0.999 for exit_ in result["exits"].values())
    assert all(stage["relative_error"] < 2e-3 for stage in result["stages"].values())
    assert [stage["casts"] for stage in result["stages"].values()] == [2, 2, 2, 2]
