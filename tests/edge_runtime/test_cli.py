"""The command line as a user meets it: exit codes, JSON, one-line errors, no tracebacks."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import Bundle, OperatingPoint, cli
from tests.toys import toy_bundle, toy_images

POINT = OperatingPoint("zero_loss", thresholds={"saver": 0.49, "middle": 0.45})


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, an operating point in it, and labelled images."""
    folder = tmp_path_factory.mktemp("cli")
    bundle = toy_bundle(folder / "toy.bundle")
    bundle.write_operating_point(
        OperatingPoint("zero_loss", thresholds=POINT.thresholds, bundle=bundle.hash)
    )
    labels = np.arange(40) % 4
    np.savez(folder / "data.npz", images=toy_images(40), labels=labels)
    np.savez(folder / "wide.npz", images=toy_images(40, width=9), labels=labels)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and message of a command that must fail, on one line and without output."""
    code, out, err = run(capsys, *arguments)
    messages = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, err
    assert "Traceback" not in err
    assert out == ""
    return code, messages[0]


def test_help_lists_every_command(capsys) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(f"  {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(capsys, name) -> None:
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert "--json PATH" in out


def test_no_command_is_a_usage_error(capsys) -> None:
    code, out, _ = run(capsys)
    assert code == 2
    assert "usage:" in out


def test_an_unknown_command_names_the_nearest(capsys) -> None:
    code, message = error_of(capsys, "evalute")
    assert code == 2
    assert "'evalute'. Did you mean 'evaluate'?" in message


def test_an_unknown_option_is_a_usage_error(capsys, toy) -> None:
    code, _, err = run(capsys, "info", toy / "toy.bundle", "--colour")
    assert code == 2
    assert "--colour" in err


def test_info_as_table_and_json(capsys, toy) -> None:
    code, out, _ = run(capsys, "info", toy / "toy.bundle")
    assert code == 0
    assert "segment2 (segment; fp32" in out
    assert "zero_loss: threshold, max_softmax: saver >= 0.49, middle >= 0.45" in out
    code, out, err = run(capsys, "info", toy / "toy.bundle", "--json", "-")
    found = json.loads(out)
    assert found["hash"] == Bundle.open(toy / "toy.bundle").hash
    assert [stage["name"] for stage in found["manifest"]["stages"]][1] == "saver"
    assert "segment2" in err


def test_doctor_reports_json(capsys, tmp_path) -> None:
    code, out, _ = run(capsys, "doctor", "--json", tmp_path / "doctor.json")
    assert code == 0
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert found["device"]["cores"] >= 1
    assert set(found["missing"]) <= {"torch"}
    assert "onnxruntime" in out


def test_doctor_shows_the_gpu_and_its_modes(capsys, monkeypatch, tmp_path) -> None:
    from edge_runtime import doctor
    from edge_runtime.backends.cuda.fake import FakeCuda

    device = FakeCuda(graphs="the driver is for CUDA 12.2")
    monkeypatch.setattr(doctor, "open_cuda", lambda package, index: device)
    code, out, _ = run(capsys, "doctor", "--json", tmp_path / "doctor.json")
    assert code == 0
    assert "device name: a device made of numpy" in out
    assert "mode graph: the driver is for CUDA 12.2" in out
    assert "mode polling: available" in out
    assert json.loads((tmp_path / "doctor.json").read_text())["gpu"]["mode"]["sync"] == ""
    assert not device.live


def test_doctor_says_why_there_is_no_gpu(capsys, monkeypatch) -> None:
    from edge_runtime import doctor
    from edge_runtime.backends.cuda.fake import FakeCuda, Fault

    device = FakeCuda(fault=Fault(0, "NO_DEVICE"))
    monkeypatch.setattr(doctor, "open_cuda", lambda package, index: device)
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "none: open: CUDA says: NO_DEVICE" in out
    device = FakeCuda(fault=Fault(4, "OUT_OF_MEMORY"))
    code, out, _ = run(capsys, "doctor")
    assert "  failed: " in out
    assert "CUDA says: OUT_OF_MEMORY" in out


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_rtx"])
def test_doctor_shows_tensorrt_and_its_cache(capsys, monkeypatch, tmp_path, module) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    fake = types.SimpleNamespace(__name__=module, __version__="10.13.3")
    monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path))
    _, out, _ = run(capsys, "doctor")
    assert f"  {module}: 10.13.3\n  engines in: {tmp_path}\n" in out


def test_doctor_says_why_there_is_no_tensorrt(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    _, out, _ = run(capsys, "doctor")
    assert "none: TensorRT can't be imported" in out


def test_doctor_names_what_is_missing(capsys, monkeypatch) -> None:
    from importlib import util

    real = util.find_spec
    monkeypatch.setattr(
        util, "find_spec", lambda name, *rest: None if name == "torch" else real(name, *rest)
    )
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "missing  torch: exports torch modules; pip install 'edge-runtime[export]'" in out


def test_evaluate(capsys, toy, tmp_path) -> None:
    target = tmp_path / "evaluation.json"
    code, out, _ = run(
        capsys, "evaluate", toy / "toy.bundle", "--data", toy / "data.npz", "--json", target
    )
    assert code == 0
    found = json.loads(target.read_text())["evaluation"]
    shares = [exit_["share"] for exit_ in found["exits"]]
    assert sum(shares) == pytest.approx(1)
    assert found["samples"] == 40
    assert found["latency"]["count"] == 40
    ratio = found["time_ratio"]
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert "zero_loss on 40 images" in out
    assert "of the base's time" in out


def test_evaluate_agrees_with_the_cascade(capsys, toy) -> None:
    import edge_runtime as er

    code, out, _ = run(
        capsys, "evaluate", toy / "toy.bundle", "--data", toy / "data.npz", "--json", "-"
    )
    assert code == 0
    found = json.loads(out)["evaluation"]
    with er.load(toy / "toy.bundle", image_size=(5, 7)) as cascade:
        predictions = cascade(toy_images(40))
    correct = [p.label == i % 4 for i, p in enumerate(predictions)]
    assert found["accuracy"] == pytest.approx(np.mean(correct))
    for exit_ in found["exits"]:
        here = [p.exit == exit_["exit"] for p in predictions]
        assert exit_["share"] == pytest.approx(np.mean(here))


def test_a_part_of_the_data(capsys, toy) -> None:
    samples = []
    for part in ("1/2", "2/2"):
        arguments = ("--data", toy / "data.npz", "--part", part, "--json", "-")
        _, out, _ = run(capsys, "evaluate", toy / "toy.bundle", *arguments)
        samples.append(json.loads(out)["evaluation"]["samples"])
    assert sum(samples) == 40


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("info", "nowhere.bundle"), 1, "the bundle nowhere.bundle does not exist"),
        (("evaluate", "{toy}/toy.bundle", "--data", "nowhere"), 2, "does not exist"),
        (
            ("evaluate", "{toy}/toy.bundle", "--data", "{toy}/data.npz", "--part", "3/2"),
            2,
            "--part: got '3/2'",
        ),
        (
            ("evaluate", "{toy}/toy.bundle", "--data", "{toy}/data.npz", "--operating-point", "x"),
            1,
            "no operating point 'x'",
        ),
        (
            ("evaluate", "{toy}/toy.bundle", "--data", "{toy}/data.npz", "--provider", "X"),
            3,
            "execution provider: got 'X'",
        ),
        (("info", "{toy}/toy.bundle", "--json", "/no/such/folder/x.json"), 2, "--json"),
        (("export", "nowhere.yaml", "--out", "{toy}/new.bundle"), 2, "nowhere.yaml"),
    ],
)
def test_errors_are_one_line_with_their_code(capsys, toy, arguments, code, message) -> None:
    found, text = error_of(capsys, *(argument.format(toy=toy) for argument in arguments))
    assert found == code
    assert message in text
    assert not (toy / "new.bundle").exists()


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("evaluate", "--passes", "0"),
        ("evaluate", "--threads", "-1"),
        ("evaluate", "--seed", "-1"),
        ("bench", "--duration", "nan"),
        ("bench", "--duration", "-1"),
        ("thresholds", "--seed", "1.5"),
        ("thresholds", "--folds", "0"),
        ("thresholds", "--repeats", "-1"),
        ("thresholds", "--latency-budget-ms", "0"),
    ],
)
def test_a_number_that_can_t_be_is_a_usage_error(capsys, toy, command, option, value) -> None:
    arguments = (command, toy / "toy.bundle", "--data", toy / "data.npz", f"{option}={value}")
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert f"argument {option}: got '{value}', expected a" in err


def test_ctrl_c_is_quiet(capsys, monkeypatch, toy) -> None:
    from edge_runtime import info

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupted)
    code, _, err = run(capsys, "info", toy / "toy.bundle")
    assert code == 130
    assert err == "interrupted\n"


def test_a_missing_package_is_exit_code_3(capsys, monkeypatch, toy) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, message = error_of(
        capsys, "evaluate", toy / "toy.bundle", "--data", toy / "data.npz", "--backend", "onnxrt"
    )
    assert code == 3
    assert "pip install 'edge-runtime[cpu]'" in message


def test_another_image_size_than_the_bundle_s(capsys, toy, tmp_path) -> None:
    """A bundle with a fixed size refuses other images; the toy one takes any, but one per run."""
    code, _, _ = run(capsys, "evaluate", toy / "toy.bundle", "--data", toy / "wide.npz")
    assert code == 0
