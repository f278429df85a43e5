"""edge-runtime train CONFIG.yaml --out DIR."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from edge_runtime.manifest import Bundle  # noqa: E402
from engines.training.config import load_training  # noqa: E402
from engines.training.job import JobOptions, build_model, train  # noqa: E402
from tests.engines.conftest import chain  # noqa: E402
from tests.engines.training.trainings import log, phases, run, weights, write  # noqa: E402

pytestmark = pytest.mark.torch

#: Every kind of phase; learns in a second or two.
EVERYTHING = phases(
    "train: saver, epochs: 6, batch: 16, rate: 0.02",
    "train: all, epochs: 6, batch: 16, rate: 0.02, augment: {shift: 1}",
    "train: exits, epochs: 2, batch: 16, rate: 0.01, distill: 0.5, temperature: 2.0",
    "train: esn, epochs: 3, batch: 16, rate: 0.01",
)
SHORT = phases("train: backbone, epochs: 1, batch: 64, rate: 0.02")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    report = folder / "report.json"
    assert run(write(folder), folder / "out", EVERYTHING, "--json", str(report)) == 0
    return folder


def test_it_learns(trained: Path) -> None:
    result = json.loads((trained / "report.json").read_text())
    accuracy = result["accuracy"]
    assert list(accuracy) == ["saver", "exit_0", "esn_0", "final"]
    assert result["validation_images"] == 90
    assert accuracy["final"] > 0.8
    assert min(accuracy.values()) > 0.3  # chance is 0.1
    assert accuracy["esn_0"] > accuracy["saver"]
    assert [phase["train"] for phase in result["phases"]] == ["saver", "all", "exits", "esn"]
    assert set(result["parameters"]) == {"saver", "backbone", "exits", "esn"}
    assert result["macs"]["segment1"] > result["macs"]["saver"] > 0


def test_the_bundle_answers_as_the_torch_model_does(trained: Path) -> None:
    bundle = Bundle.open(trained / "out/digits.bundle")
    recipe = load_training(trained / "training.yaml", [EVERYTHING])
    model = build_model(recipe, 10).eval()
    from safetensors.torch import load_file

    for name, modules in model.components().items():
        tensors = load_file(trained / "out/weights" / f"{name}.safetensors")
        for i, module in enumerate(modules):
            own = {
                n.removeprefix(f"{i}."): t
                for n, t in tensors.items()
                if name != "exits" or n.startswith(f"{i}.")
            }
            module.load_state_dict(own)
    with np.load(trained / "out/thresholds.npz") as data:
        images = data["images"][:16]
    found = chain(bundle, images)
    with torch.no_grad():
        expected = model(
            torch.from_numpy((images / np.float32(255) - 0.5) / 0.25).permute(0, 3, 1, 2).float()
        )
    for exit_ in bundle.cascade.exits:
        assert np.allclose(found[exit_.logits], expected[exit_.name].numpy(), atol=1e-4)


def test_what_it_leaves(trained: Path) -> None:
    out = trained / "out"
    lines = log(out)
    assert [(line["phase"], line["epoch"]) for line in lines] == [
        (phase, epoch) for phase, count in enumerate((6, 6, 2, 3)) for epoch in range(1, count + 1)
    ]
    assert lines[6]["accuracy"].keys() == {"exit_0", "final"}
    assert lines[0]["images_per_second"] > 0
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob(".*"))  # neither locks nor files half written
    provenance = Bundle.open(out / "digits.bundle").manifest.provenance
    assert provenance["model"]["exits"]["exit_0"]["neck"] == "pool"
    assert provenance["training"]["phases"][2]["distill"] == 0.5
    assert str(trained) not in json.dumps(provenance)


def test_a_finished_training_says_so_and_only_exports(trained, capsys) -> None:
    config, out = trained / "training.yaml", trained / "out"
    before = weights(out), log(out), Bundle.open(out / "digits.bundle").hash
    assert run(config, out, EVERYTHING) == 0
    said = capsys.readouterr().err
    assert "the training is finished" in said and "is there already; --force" in said
    assert run(config, out, EVERYTHING, "--force", "--json", "-") == 0
    captured = capsys.readouterr()
    assert "exporting" in captured.err
    assert json.loads(captured.out)["already_finished"] is True
    assert (weights(out), log(out), Bundle.open(out / "digits.bundle").hash) == before


def test_a_bundle_in_the_way_is_told_before_the_training(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    (out / "digits.bundle").mkdir(parents=True)
    assert run(write(tmp_path), out, SHORT) == 2
    assert "digits.bundle exists. Choose another --out, or give --force" in capsys.readouterr().err
    assert not (out / "log.jsonl").exists()


def test_a_checkpoint_of_another_training_is_named_and_kept(tmp_path, capsys) -> None:
    config, out = write(tmp_path), tmp_path / "out"
    assert run(config, out, SHORT, "--no-export") == 0
    state = (out / "training/state.json").read_bytes()
    capsys.readouterr()
    for override, message in (
        ("phases.0.rate=0.01", "phases[0].rate was 0.02, is 0.01"),
        ("data.validation=0.3", "data.share was 0.2, is 0.3"),
        ("base.options.widths=[8, 20]", "base.options.widths[1] was 16, is 20"),
    ):
        assert run(config, out, SHORT, override, "--no-export") == 2
        said = capsys.readouterr().err
        assert message in said and "Give --restart to begin again, or another --out" in said
        assert (out / "training/state.json").read_bytes() == state
    assert run(config, out, SHORT, "phases.0.rate=0.01", "--no-export", "--restart") == 0
    assert (out / "training/state.json").read_bytes() != state


def test_a_damaged_checkpoint_is_an_error_of_one_line(tmp_path, capsys) -> None:
    config, out = write(tmp_path), tmp_path / "out"
    assert run(config, out, SHORT, "--no-export") == 0
    capsys.readouterr()
    state = out / "training/state.json"
    (tensors,) = (out / "training").glob("state.*.safetensors")
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    assert run(config, out, SHORT, "--no-export") == 1
    assert "has changed. Give --restart" in capsys.readouterr().err
    tensors.unlink()
    assert run(config, out, SHORT, "--no-export") == 1
    assert "can't be read" in capsys.readouterr().err
    text = state.read_text()
    state.write_text(text.replace(tensors.name, f"../{tensors.name}"))
    assert run(config, out, SHORT, "--no-export") == 1
    assert "expected a plain name" in capsys.readouterr().err
    state.write_text(text[:100])
    assert run(config, out, SHORT, "--no-export") == 1
    assert "is not whole" in capsys.readouterr().err


def test_weights_of_one_training_begin_another(tmp_path, capsys) -> None:
    config, first = write(tmp_path), tmp_path / "first"
    assert run(config, first, SHORT, "--no-export") == 0
    capsys.readouterr()
    more = [
        f"base.weights={first / 'weights/backbone.safetensors'}",
        phases("train: exits, epochs: 1, batch: 64, rate: 0.01"),
    ]
    assert run(config, tmp_path / "second", *more, "--no-export") == 0
    assert weights(tmp_path / "second")["backbone"] == weights(first)["backbone"]
    assert "no phase trains the saver" in capsys.readouterr().err


def test_two_trainings_in_one_folder_exclude_each_other(tmp_path) -> None:
    from edge_runtime.console import Console
    from edge_runtime.errors import ConfigError
    from edge_runtime.file_lock import file_lock

    recipe = load_training(write(tmp_path), [SHORT])
    (tmp_path / "out/training").mkdir(parents=True)
    with (
        file_lock(tmp_path / "out/training/.lock"),
        pytest.raises(ConfigError, match="another process trains in"),
    ):
        train(recipe, tmp_path / "out", JobOptions(device="cpu"), Console())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--threads", "0"], 2, "--threads: got 0, expected 1..1024"),
        (["--workers", "-1"], 2, "--workers: got -1, expected 0..1024"),
        (["--checkpoint-minutes", "-1"], 2, "--checkpoint-minutes: got -1.0, expected >= 0"),
        (["classes=9"], 2, "label of a sample: got 9, expected 0..8"),
        (["base.model=residuall"], 2, "unknown backbone 'residuall'. Did you mean 'residual'"),
        (["exits=[[7, pool]]"], 2, "7"),
        (["exits=[[0, pol]]"], 2, "'pool'"),
        (["base.weights=none.safetensors"], 2, "there is no such file"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_no_folder(
    tmp_path, capsys, arguments, code, message
) -> None:
    assert run(write(tmp_path), tmp_path / "out", SHORT, *arguments) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_exits_with_3(tmp_path, capsys) -> None:
    assert run(write(tmp_path), tmp_path / "out", "--device", "cuda") == 3
    assert "torch finds no CUDA device" in capsys.readouterr().err
