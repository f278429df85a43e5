"""Phases, epochs and steps: what is learned, what stays, and what is the same again."""

import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from edge_runtime.console import Console  # noqa: E402
from engines.training import loop  # noqa: E402
from engines.training.checkpoint import Checkpoints, State  # noqa: E402
from engines.training.config import PhaseRecipe, load_training  # noqa: E402
from engines.training.data import Images, open_data  # noqa: E402
from engines.training.job import build_model  # noqa: E402
from tests.engines.training.trainings import log, phases, run, timeless, weights, write  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed"),
]

#: All that draws at random, in two phases.
VARIED = phases(
    "train: all, epochs: 2, batch: 64, rate: 0.02, label_smoothing: 0.1, clip_norm: 1.0, "
    "augment: {flip: true, shift: 1, auto: rand-m5-mstd0.5, crop: [0.7, 1.0], mixup: 0.8, "
    "cutmix: 1.0}",
    "train: exits, epochs: 2, batch: 64, rate: 0.01, distill: 0.5, temperature: 2.0, "
    "augment: {shift: 1}",
)
OFTEN = ("--checkpoint-minutes", "0", "--no-export")

#: Trains, and kills itself before the step whose number is given.
KILLED = """
import os, signal, sys
from engines.training import loop
from tests.engines.training.trainings import run
from pathlib import Path
config, out, at, signalled = sys.argv[1:5]
steps, step = [], loop._Phase._step
def dying(*arguments):
    if len(steps) == int(at):
        os.kill(os.getpid(), int(signalled))
    steps.append(0)
    return step(*arguments)
loop._Phase._step = dying
sys.exit(run(Path(config), Path(out), *sys.argv[5:]))
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run(write(folder), folder / "out", VARIED, "--no-export") == 0
    return folder


@pytest.mark.parametrize("at", [9, 15])
def test_a_killed_training_goes_on_to_the_same_bits(uninterrupted, tmp_path, capsys, at) -> None:
    config, out = uninterrupted / "training.yaml", tmp_path / "out"
    child = [sys.executable, "-c", KILLED, config, out, str(at), str(int(signal.SIGKILL))]
    killed = subprocess.run([*child, VARIED, *OFTEN], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "weights").exists()
    assert run(config, out, VARIED, *OFTEN) == 0
    assert f"goes on in phase {at // 12 + 1}" in capsys.readouterr().err
    assert weights(out) == weights(uninterrupted / "out")
    assert timeless(log(out)) == timeless(log(uninterrupted / "out"))


def test_ctrl_c_writes_a_checkpoint_that_the_same_command_goes_on_from(
    uninterrupted, tmp_path, capsys, monkeypatch
) -> None:
    config, out = uninterrupted / "training.yaml", tmp_path / "out"
    step, steps = loop._Phase._step, []
    before = signal.getsignal(signal.SIGINT)

    def interrupted(*arguments):
        steps.append(0)
        if len(steps) == 8:
            signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(loop._Phase, "_step", interrupted)
        assert run(config, out, VARIED, "--no-export") == 130
    said = capsys.readouterr().err
    assert len(steps) == 8
    assert "stopped in phase 1/2 (all), epoch 2" in said and "the same command goes on" in said
    assert signal.getsignal(signal.SIGINT) is before
    assert run(config, out, VARIED, "--no-export") == 0
    assert "goes on in phase 1, epoch 2, step 3" in capsys.readouterr().err
    assert weights(out) == weights(uninterrupted / "out")


def test_workers_change_nothing(uninterrupted, tmp_path) -> None:
    out = tmp_path / "out"
    config = uninterrupted / "training.yaml"
    assert run(config, out, VARIED, "--no-export", "--workers", "1") == 0
    assert weights(out) == weights(uninterrupted / "out")


def test_what_does_not_fit_in_memory_gives_the_same(uninterrupted, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("engines.training.data.Images.__init__.__defaults__", (1,))
    assert run(uninterrupted / "training.yaml", out, VARIED, "--no-export") == 0
    assert weights(out) == weights(uninterrupted / "out")


def test_another_seed_gives_other_weights(uninterrupted, tmp_path) -> None:
    out = tmp_path / "out"
    assert run(uninterrupted / "training.yaml", out, VARIED, "seed=1", "--no-export") == 0
    assert all(data != weights(uninterrupted / "out")[name] for name, data in weights(out).items())


def test_frozen_parts_stay_bit_for_bit(tmp_path) -> None:
    parts = ("backbone", "saver", "exits", "esn")
    lines = [f"train: {part}, epochs: 1, batch: 32, rate: 0.02" for part in parts]
    recipe = load_training(write(tmp_path), [phases(*lines), "amp=bfloat16"])
    model = build_model(recipe, 10)

    def snapshot() -> dict[str, bytes]:
        return {
            name: b"".join(
                tensor.numpy().tobytes()
                for module in modules
                for tensor in module.state_dict().values()
            )
            for name, modules in model.components().items()
        }

    images = [Images(data, recipe.input.spec(1)) for data in open_data(recipe)]
    options = loop.LoopOptions(torch.device("cpu"))
    trainer = loop.Trainer(recipe, model, *images, Checkpoints(tmp_path), Console(), options)
    seen = [snapshot()]
    trainer.run(State(identity={}), lambda _: seen.append(snapshot()))
    assert len(seen) == 5
    for before, after, part in zip(seen, seen[1:], parts, strict=False):
        assert [name for name in before if before[name] != after[name]] == [part]


def test_early_stopping_stops(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    still = phases("train: backbone, epochs: 50, batch: 64, rate: 1.0e-12, patience: 2")
    assert run(write(tmp_path), out, still, "--no-export") == 0
    lines = log(out)
    assert len(lines) < 50
    assert [line["best"] for line in lines[-2:]] == [False, False]
    assert "no better validation in 2 epochs" in capsys.readouterr().err


def test_the_next_phase_starts_from_the_best_epoch(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    worse = "train: backbone, epochs: 4, batch: 32, rate: 2.0, warmup_epochs: 4, weight_decay: 1.0"
    assert run(write(tmp_path), out, phases(worse), "--no-export", "--json", "-") == 0
    shares = [line["mean_accuracy"] for line in log(out)]
    assert max(shares) > shares[-1]
    assert f'"final": {max(shares)}' in capsys.readouterr().out


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    # The decay multiplies weights by 1 - rate in each step: stable below a rate of 2.
    wild = phases(
        "train: backbone, epochs: 9, batch: 8, rate: 10.0, warmup_epochs: 6, weight_decay: 1.0"
    )
    config = write(tmp_path)
    assert run(config, out, wild, "--no-export") == 1
    said = capsys.readouterr().err
    assert "error: phase 1/1 (backbone), epoch " in said
    assert ", step " in said and "Make phases.0.rate smaller (10 now)" in said
    good = len(log(out))
    assert good >= 1
    # What is left is whole: the same command goes on from it, and fails in the same place.
    assert run(config, out, wild, "--no-export") == 1
    again = capsys.readouterr().err
    assert f"goes on in phase 1, epoch {good + 1}, step 1" in again
    assert said.splitlines()[-1] == again.splitlines()[-1]


def test_the_rate_rises_over_the_warm_up_and_falls_to_its_end() -> None:
    phase = PhaseRecipe("all", epochs=10, rate=0.1, warmup_epochs=2, final_rate=0.01)
    rates = [loop.rate_at(phase, step, 10) for step in range(100)]
    assert rates[:20] == sorted(rates[:20]) and rates[0] < 0.01
    assert max(rates) == rates[20] == 0.1
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert 0.001 < rates[-1] < 0.0011
