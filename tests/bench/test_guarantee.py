"""The count of broken guarantees, on tables of the digits."""

import json
from pathlib import Path

import pytest

from bench import guarantee
from edge_runtime import cli
from edge_runtime.cli import run_command

DIGITS = Path(__file__).parents[2] / "examples/digits"
BUNDLE = str(DIGITS / "digits.bundle")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("table") / "T.npz"
    command = ["collect", BUNDLE, "--data", str(DIGITS / "thresholds.npz"), "--out", str(out)]
    assert cli.main(command) == 0
    return str(out)


def run(*arguments: str) -> int:
    return run_command("python -m bench.guarantee", guarantee, [BUNDLE, *arguments])


def test_draws_are_counted(table: str, tmp_path: Path) -> None:
    out = str(tmp_path / "r.json")
    small = ["--samples", "100", "--epsilon", "0.02", "0.05", "--draws", "20"]
    size = ["--image-size", "8x8"]
    assert run("--logits", table, *size, *small, "--json", out) == 0
    tight, loose = json.loads(Path(out).read_text())["cases"]
    assert tight["certified"] == 0.0  # 100 images can't show so little
    assert tight["saved"] == tight["broken"] == 0.0
    assert loose["certified"] == 1.0
    assert loose["saved"] > 0.9
    assert loose["broken"] <= 0.1
    assert 0 < tight["zero_loss_saved"] == loose["zero_loss_saved"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", "500"], "--samples: got 500, expected fewer than 449"),
        (["--epsilon", "2"], "epsilon"),
    ],
)
def test_what_can_not_be(
    table: str, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--logits", table, "--image-size", "8x8", "--samples", "100", *more) == 2
    assert message in capsys.readouterr().err
