"""What a bundle says of its layers is read, and checked against what it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.studies.layers import LayerExit, layers_of, span
from edge_runtime.errors import ManifestError
from tests.bench.studies.bundles import description, layered_bundle
from tests.edge_runtime.bundles import refused


def test_layers_and_necks_are_read(tmp_path: Path) -> None:
    layers = layers_of(layered_bundle(tmp_path / "a.bundle", saver=True))
    assert layers is not None
    assert layers.count == 6
    assert layers.segments == {
        "segment1": (0, 1),
        "segment2": (2,),
        "segment3": (3, 4),
        "segment4": (5,),
    }
    assert layers.exits[2] == LayerExit("exit_4", "gah", 4, "segment3", "head_4")
    assert [layers.plain(name) for name in layers.segments] == [1, 0, 1, 1]


def test_exits_of_the_exit_sequence_network_need_no_entry(tmp_path: Path) -> None:
    layers = layers_of(layered_bundle(tmp_path / "a.bundle", exits=((1, "lph"), (2, "esn"))))
    assert layers is not None
    assert [(one.name, one.neck, one.layer) for one in layers.exits] == [
        ("exit_1", "lph", 1),
        ("esn_2", "esn", 2),
    ]


@pytest.mark.parametrize("model", [None, {"backbone": "vit"}], ids=["nothing", "something else"])
def test_a_bundle_that_says_nothing_of_layers_has_none(tmp_path: Path, model: Any) -> None:
    assert layers_of(layered_bundle(tmp_path / "a.bundle", model=model)) is None


def changed(path: str, value: Any) -> dict[str, Any]:
    """The right description with one value replaced, or removed."""
    model = description()
    *parents, last = path.split(".")
    place = model
    for parent in parents:
        place = place[parent]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (["layers"], "provenance.model: got ['layers'], expected a mapping"),
        (changed("layers", "six"), "model.layers: got 'six', expected a whole number >= 1"),
        (changed("layers", True), "model.layers: got True"),
        (changed("segments.segment2", None), "model.segments: got segment1, segment3, segment4, e"),
        (changed("segments.segment2.layers", [6]), "expected a whole number 0..5"),
        (changed("segments.segment2.layers", [1]), "got [1], expected layers that ascend from 2"),
        (changed("segments.segment2.layers", []), "expected some before the exit exit_2"),
        (changed("segments.segment2.layers", "2"), "got '2', expected a list of layers"),
        (changed("exits.exit_9", {}), "model.exits.exit_9: got an exit, expected exit_1, exit_2"),
        (changed("exits.exit_1", None), "model.exits.exit_1: got nothing, expected its layer and"),
        (changed("exits.exit_1.neck", 3), "exit_1.neck: got 3, expected the name of a neck"),
        (changed("exits.exit_1.neck", "none"), "exit_1.neck: got 'none'"),
        (changed("exits.exit_1.layer", 0), "got 0, expected 1, the last one of segment1"),
        (changed("exits.exit_1", "lph"), "exits.exit_1: got 'lph', expected a mapping"),
    ],
)
def test_a_description_that_does_not_fit_the_bundle_is_refused(
    tmp_path: Path, model: Any, message: str
) -> None:
    bundle = layered_bundle(tmp_path / "a.bundle", model=model)
    with refused(ManifestError, "manifest.json: provenance.", message):
        layers_of(bundle)


@pytest.mark.parametrize(
    ("layers", "text"), [((), "none"), ((3,), "3"), ((0, 1, 2), "0-2"), ((0, 2), "0, 2")]
)
def test_layers_are_written_as_people_do(layers: tuple[int, ...], text: str) -> None:
    assert span(layers) == text
