"""`edge-runtime quantize` on the digits bundle and on a bare file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib import quantize_command
from edge_runtime import Bundle, OperatingPoint, load
from edge_runtime.cli import main
from engines.qdq_lint import lint
from engines.verify import run_stages
from tests.meta.repository import ROOT

DIGITS = ROOT / "examples" / "digits"
BUNDLE = DIGITS / "digits.bundle"
STAGES = ("saver", "segment1", "head1", "segment2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits of scikit-learn, as training images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    path = tmp_path_factory.mktemp("data") / "train.npz"
    images = np.rint(digits.images[:200] * (255 / 16)).astype(np.uint8)
    np.savez(path, images=images, labels=digits.target[:200])
    return path


def quantize(*more: Any, source: Path = BUNDLE, data: Path, out: Path) -> int:
    return main(["quantize", str(source), "--data", str(data), "--out", str(out), *map(str, more)])


@pytest.fixture(scope="module")
def quantized(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("int8") / "int8.bundle"
    assert quantize(data=data, out=out) == 0
    return Bundle.open(out)


def test_every_stage_but_the_preprocessing_gets_a_variant(quantized: Bundle) -> None:
    found = {r.name: tuple(r.variants) for r in quantized.manifest.stages}
    assert {found[name] for name in STAGES} == {("fp32", "int8")}
    assert "int8" not in found["preprocess"]
    made = quantized.manifest.provenance["conversions"][-1]
    assert made["method"] == "mse"
    assert made["calibrated_on"]["samples"] == 200
    assert made["calibrated_on"]["bundle"] == Bundle.open(BUNDLE).hash


@pytest.mark.parametrize("stage", STAGES)
def test_the_rules_hold(quantized: Bundle, stage: str) -> None:
    assert lint(quantized.stage_model(stage, "int8")) == ()
    size = len(quantized.stage_model(stage, "int8"))
    assert size < 0.6 * len(quantized.stage_model(stage, "fp32"))


def test_classes_stay_what_they_were(quantized: Bundle) -> None:
    with np.load(DIGITS / "test.npz") as file:
        images, labels = file["images"], file["labels"]
    images = images.reshape(len(images), 8, 8, 1)
    found = []
    for variants in ({}, dict.fromkeys(STAGES, "int8")):
        point = OperatingPoint("base", policy="never", variants=variants)
        with load(quantized, operating_point=point, image_size=(8, 8)) as cascade:
            found.append(np.array([p.label for p in cascade(images)]))
    assert (found[0] == found[1]).mean() > 0.985
    assert (found[1] == labels).mean() > (found[0] == labels).mean() - 0.01


def test_variants_mix(quantized: Bundle) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
    models = {
        s.name: quantized.stage_model(s.name, "int8" if s.name == "segment1" else _first(s))
        for s in quantized.manifest.stages
    }
    known = run_stages(quantized.cascade, models, images)
    point = OperatingPoint.all_exits(quantized.cascade, variants={"segment1": "int8"})
    with load(quantized, operating_point=point, image_size=(8, 8)) as cascade:
        logits = cascade.logits(images)
    for exit_ in quantized.cascade.exits:
        np.testing.assert_allclose(logits[exit_.name], known[exit_.logits], rtol=1e-4, atol=1e-4)


def _first(record: Any) -> str:
    return next(iter(record.variants))


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_every_method(data: Path, tmp_path: Path, method: str) -> None:
    json_out = tmp_path / "out.json"
    more = ("--method", method, "--stages", "saver", "--json", json_out)
    assert quantize(*more, data=data, out=tmp_path / "b") == 0
    found = json.loads(json_out.read_text())
    assert found["method"] == method
    assert list(found["stages"]) == ["saver"]
    assert all(value > 0 for value in found["stages"]["saver"]["ranges"].values())
    assert len(Bundle.open(tmp_path / "b").record("segment1").variants) == 1


def test_ranges_are_kept_and_used_again(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges = tmp_path / "ranges.json"
    assert quantize("--ranges", ranges, data=data, out=tmp_path / "one") == 0
    monkeypatch.setattr(quantize_command, "histograms", None)
    assert quantize("--ranges", ranges, data=data, out=tmp_path / "two") == 0
    one, two = (Bundle.open(tmp_path / name) for name in ("one", "two"))
    assert one.hash == two.hash
    capsys.readouterr()
    for more in (("--seed", 1, "--samples", 100), ("--method", "entropy"), ("--stages", "saver")):
        assert quantize("--ranges", ranges, *more, data=data, out=tmp_path / "three") == 2
        assert "are stale" in capsys.readouterr().err
    assert not (tmp_path / "three").exists()


def test_nodes_can_be_left_float(data: Path, tmp_path: Path) -> None:
    json_out = tmp_path / "out.json"
    more = ("--stages", "saver", "--exclude-nodes", ".*", "--json", json_out)
    assert quantize(*more, data=data, out=tmp_path / "b") == 1
    more = ("--stages", "saver", "--per-tensor", "--json", json_out)
    assert quantize(*more, data=data, out=tmp_path / "b") == 0


class TestRefusals:
    """One line, the right exit code, nothing left over."""

    def refused(
        self,
        capsys: pytest.CaptureFixture,
        out: Path,
        code: int,
        words: str,
        *more: Any,
        data: Path,
    ) -> None:
        capsys.readouterr()
        assert quantize(*more, data=data, out=out) == code
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert words in err
        assert not out.exists()

    def test_the_thresholds_own_images(self, tmp_path: Path, capsys: Any) -> None:
        words = "the images that the thresholds of"
        self.refused(capsys, tmp_path / "b", 1, words, data=DIGITS / "thresholds.npz")

    def test_images_of_the_test(self, data: Path, tmp_path: Path, capsys: Any) -> None:
        more = ("--not-in", data)
        self.refused(capsys, tmp_path / "b", 1, "calibration images that are in", *more, data=data)

    def test_too_few(self, data: Path, tmp_path: Path, capsys: Any) -> None:
        more = ("--samples", 20)
        self.refused(capsys, tmp_path / "b", 1, "got 20, expected >= 32", *more, data=data)

    def test_noise(self, tmp_path: Path, capsys: Any) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 8, 8)).astype(np.uint8)
        np.savez(tmp_path / "noise.npz", images=noise, labels=np.arange(64) % 10)
        self.refused(capsys, tmp_path / "b", 1, "look like noise", data=tmp_path / "noise.npz")

    def test_no_such_data_or_stage(self, data: Path, tmp_path: Path, capsys: Any) -> None:
        self.refused(capsys, tmp_path / "b", 2, "does not exist", data=tmp_path / "no")
        more = ("--stages", "sever")
        self.refused(capsys, tmp_path / "b", 2, "no stage 'sever'", *more, data=data)
        more = ("--stages", "preprocess")
        self.refused(capsys, tmp_path / "b", 2, "left as it is", *more, data=data)

    def test_a_bad_expression(self, data: Path, tmp_path: Path, capsys: Any) -> None:
        more = ("--exclude-nodes", "(")
        self.refused(capsys, tmp_path / "b", 2, "exclude", *more, data=data)

    def test_a_bundle_that_is_quantised_already(
        self, data: Path, tmp_path: Path, capsys: Any, quantized: Bundle
    ) -> None:
        assert quantize(source=quantized.path, data=data, out=tmp_path / "b") == 2
        assert "has int8 already" in capsys.readouterr().err

    def test_ctrl_c_leaves_nothing(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def press(*args: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(quantize_command, "quantize", press)
        assert quantize(data=data, out=tmp_path / "b") == 130
        assert list(tmp_path.iterdir()) == []


class TestBareFile:
    """One ONNX file, without a bundle."""

    def files(self, tmp_path: Path, *, noise: bool = False) -> tuple[Path, Path]:
        model = tmp_path / "saver.onnx"
        bundle = Bundle.open(BUNDLE)
        model.write_bytes(bundle.stage_model("saver", "fp32"))
        (spec,) = bundle.record("saver").inputs
        shape = (64, *spec.sample_shape())
        values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        if not noise:
            values = np.cumsum(values, axis=-1) / 4
        np.savez(tmp_path / "inputs.npz", **{spec.name: values})
        return model, tmp_path / "inputs.npz"

    def test_it_becomes_an_int8_file(self, tmp_path: Path) -> None:
        model, inputs = self.files(tmp_path)
        out = tmp_path / "saver.int8.onnx"
        assert quantize(source=model, data=inputs, out=out) == 0
        assert lint(out.read_bytes()) == ()
        assert quantize(source=out, data=inputs, out=tmp_path / "again.onnx") == 1

    def test_noise_is_refused(self, tmp_path: Path, capsys: Any) -> None:
        model, inputs = self.files(tmp_path, noise=True)
        assert quantize(source=model, data=inputs, out=tmp_path / "o.onnx") == 1
        assert "look like noise" in capsys.readouterr().err

    def test_a_bundle_s_options_are_refused(self, tmp_path: Path, capsys: Any) -> None:
        model, inputs = self.files(tmp_path)
        assert quantize("--stages", "a", source=model, data=inputs, out=tmp_path / "o.onnx") == 2
        assert "are for bundles" in capsys.readouterr().err
