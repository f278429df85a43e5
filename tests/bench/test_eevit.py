"""The comparison with the thesis's export, on a tiny transformer, and the published setup."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from bench import eevit
from edge_runtime.console import Console

pytestmark = pytest.mark.torch

TINY = eevit.Setup(
    model="vit_tiny_patch16_224",
    options={"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2},
    image=32,
    classes=5,
    exits=((0, "lph", {"kernel": 3}), (1, "gah", {"stride": 2})),
)


def test_every_path_is_compared_and_the_forms_agree(capsys: pytest.CaptureFixture[str]) -> None:
    found = eevit.compare(TINY, 8, 0, Console(None))
    bars = {name: value["bar"] for name, value in found["ratios"].items()}
    assert bars == {
        "exit_0": 0.90,
        "exit_1": None,
        "full": 0.95,
        "full_to_plain": 1.12,
        "no_heads_to_plain": None,
        "graph_to_plain": None,
        "first_exit_to_plain": None,
        "graph_first_exit_to_plain": None,
    }
    for value in found["ratios"].values():
        assert 0 < value["low"] <= value["value"] <= value["high"]
    paths = ("exit_0", "exit_1", "all heads")
    measured = {f"{form} {path}" for path in paths for form in ("staged", "graph")}
    assert set(found["median_ms"]) == {*measured, "staged no heads", "plain"}
    assert 0 <= found["logits_max_relative_error"] <= 1e-4
    assert found["parameters"]["exits"] == sum(found["parameters"][f"exit_{i}"] for i in (0, 1))
    shown = capsys.readouterr().out
    assert all(f"staged {path}" in shown and f"graph {path}" in shown for path in paths)


def test_the_defaults_have_the_parameters_of_the_published_model() -> None:
    """Table 4 of the thesis: exits, and the plain ViT-B/16 with 100 classes."""
    import torch

    with torch.device("meta"):
        counts = eevit.early_exit(eevit.Setup()).parameter_counts()
    assert counts["exits"] == 14_810_912
    plain = counts["patch embeddings"] + counts["encoder"] + counts["classifier"]
    assert plain == 85_875_556
