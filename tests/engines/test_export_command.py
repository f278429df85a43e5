"""edge-runtime export CONFIG.yaml --out DIR."""

import json
from pathlib import Path

import pytest

from edge_runtime.cli import main
from edge_runtime.manifest import Bundle
from tests.engines.classifiers import SIZE, classifier, residual_classifier, save


@pytest.fixture
def config(tmp_path: Path) -> Path:
    save(classifier(), tmp_path / "small.onnx")
    save(residual_classifier(), tmp_path / "large.onnx")
    path = tmp_path / "cascade.yaml"
    path.write_text(
        f"""
name: test
classes: [north, east, south, west]
models:
  - name: small
    file: small.onnx
    input: {{size: [{SIZE}, {SIZE}], range: [-1, 1]}}
  - name: large
    file: large.onnx
    input: {{size: [{SIZE}, {SIZE}], range: [-1, 1], crop: 0.5}}
    cut_at: [sum]
"""
    )
    return path


def test_writes_a_bundle_and_says_what_is_in_it(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my.bundle"
    report = tmp_path / "report.json"
    assert main(["export", str(config), "--out", str(out), "--json", str(report)]) == 0
    bundle = Bundle.open(out)
    said = capsys.readouterr().out
    for record in bundle.manifest.stages:
        assert record.name in said
    assert bundle.hash in said
    result = json.loads(report.read_text())
    assert result["bundle"] == str(out)
    assert result["hash"] == bundle.hash
    assert result["exits"] == ["small", "large"]
    assert [stage["name"] for stage in result["stages"]] == [
        "small.preprocess",
        "small",
        "large.preprocess",
        "large.1",
        "large.2",
    ]
    segment = result["stages"][3]
    assert segment["outputs"] == {"large/sum": f"(batch, 5, {SIZE}, {SIZE}) float32"}
    assert segment["bytes"] == {"fp32": bundle.record("large.1").variants["fp32"].size}
    assert segment["worst_relative_error"] <= 1e-4
    assert result["stages"][0]["worst_relative_error"] is None


def test_values_can_be_replaced(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "my.bundle"
    assert main(["export", str(config), "models.1.cut_at=[]", "--out", str(out)]) == 0
    assert [e.name for e in Bundle.open(out).manifest.stages][-1] == "large"


def test_force_replaces(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(config), "--out", str(tmp_path / "my.bundle")]
    assert main(command) == 0
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("name: x\n", 2, "the key 'classes' is missing"),
        ("- a\n", 2, "expected a mapping"),
        (None, 2, "does not exist"),
    ],
)
def test_a_bad_file_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    code: int,
    message: str,
) -> None:
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["export", str(path), "--out", str(tmp_path / "out")]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_model_fails_with_1(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.onnx").write_bytes(b"no model")
    assert main(["export", str(config), "--out", str(tmp_path / "out")]) == 1
    assert "small.onnx is no valid ONNX file" in capsys.readouterr().err


def test_help_says_how_torch_models_are_exported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    assert "engines.export.export_stages" in capsys.readouterr().out
