"""A guarantee for a cascade of a table, through the command line."""

import json
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that are right where they are sure; the large one nearly always."""
    folder = tmp_path_factory.mktemp("table")
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 2000)
    arrays = {"labels": labels}
    for name, sure in (("small", 0.8), ("large", 0.98)):
        right = random.random(2000) < sure
        shown = np.where(right, labels, (labels + 1) % 3)
        logits = random.random((2000, 3)) * 0.1
        logits[np.arange(2000), shown] += np.where(right, 6, 0.5)
        arrays[name] = logits.astype(np.float32)
    np.savez(folder / "T.npz", **arrays)
    (folder / "C.csv").write_text("model,cost\nsmall,1\nlarge,20\n")
    return folder


def certify(folder: Path, *more: str) -> int:
    table = ["--logits", str(folder / "T.npz"), "--costs", str(folder / "C.csv")]
    return cli.main(["certify", *table, *more])


def test_a_promise_is_given_and_replayed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    assert certify(folder, "--models", "small,large", "--json", str(out)) == 0
    found = json.loads(out.read_text())
    with np.load(folder / "T.npz") as table:
        small, large, labels = table["small"], table["large"], table["labels"]
    powers = np.exp(small.astype(np.float64))
    leaves = (powers / powers.sum(1, keepdims=True)).max(1) >= found["thresholds"]["small"]
    said = np.where(leaves, small.argmax(1), large.argmax(1))
    assert found["exit_rates"]["small"] == pytest.approx(leaves.mean())
    assert found["accuracy"] == pytest.approx((said == labels).mean())
    assert found["cost"] < 0.5 * found["base_cost"]
    assert "With 95 % confidence the cascade is at most 1 point less" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--models", "small"], "--models: got small, expected two or more"),
        (["--models", "small,small"], "two or more, each once"),
        (["--models", "small,huge"], "has no model 'huge'"),
        (["--models", "small,large", "--epsilon", "0"], "epsilon"),
        (["--models", "small,large", "--cost-column", "macs"], "macs"),
    ],
)
def test_what_does_not_fit(
    folder: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert certify(folder, *more) == 2
    assert message in capsys.readouterr().err
