"""Which layers and necks the stages of a bundle hold, as its provenance says.

The manifest's `provenance["model"]` has the number of layers, per segment its layers, per early
exit its layer and neck: what `engines.models.early_exit` describes. It is read like any part of an
untrusted file; keys that are not needed here are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_runtime.cascade import Stage
from edge_runtime.errors import ManifestError
from edge_runtime.manifest import MANIFEST, Bundle

#: Exits of an Exit Sequence Network are named so; their stage is the neck.
_ESN = "esn_"


@dataclass(frozen=True)
class LayerExit:
    """An early exit behind a layer.

    Attributes:
        name: Of the exit.
        neck: Name of its neck.
        layer: Index of the layer that it stands behind, from 0.
        segment: Stage that holds the layer, as its last one.
        head: Stage that makes its logits; None where the segment does.
    """

    name: str
    neck: str
    layer: int
    segment: str
    head: str | None


@dataclass(frozen=True)
class Layers:
    """The layers of a bundle's base model.

    Attributes:
        count: L, layers of the whole.
        segments: Segment stage -> indices of its layers, ascending; may be empty.
        exits: Early exits behind layers, in order of evaluation; a saver is none of them.
    """

    count: int
    segments: Mapping[str, tuple[int, ...]]
    exits: tuple[LayerExit, ...]

    def plain(self, segment: str) -> int:
        """How many layers of a segment have no exit behind them."""
        with_exit = {one.layer for one in self.exits}
        return sum(layer not in with_exit for layer in self.segments[segment])


def layers_of(bundle: Bundle) -> Layers | None:
    """Read them from the manifest.

    Returns:
        None where the manifest says nothing of layers.

    Raises:
        ManifestError: It says something else than what the bundle has, or an exit has a head of
            which it names no neck.
    """
    model = bundle.manifest.provenance.get("model")
    if model is None:
        return None
    reader = _Reader(bundle)
    model = reader.mapping(model, "model")
    if not {"layers", "segments", "exits"} <= set(model):
        return None
    count = reader.whole(model["layers"], "layers", 1)
    segments = reader.segments(reader.mapping(model["segments"], "segments"), count)
    described = reader.mapping(model["exits"], "exits")
    names = [exit_.name for exit_ in bundle.cascade.exits[:-1]]
    for name in described:
        if name not in names:
            raise reader.wrong(f"exits.{name}", "an exit", ", ".join(names) or "no early exit")
    exits = []
    for exit_ in bundle.cascade.exits[:-1]:
        stage = reader.producer(exit_.logits)
        if stage.kind != "saver":
            exits.append(reader.exit(exit_.name, stage, segments, described))
    return Layers(count, segments, tuple(exits))


def span(layers: tuple[int, ...]) -> str:
    """Indices as people write them: 0-3, or 0, 2, 5."""
    if not layers:
        return "none"
    if len(layers) > 1 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))


class _Reader:
    """Reads parts of the description; errors name the manifest and the key."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._producers = {
            spec.name: stage for stage in bundle.cascade.stages for spec in stage.outputs
        }

    def wrong(self, key: str, got: object, expected: str) -> ManifestError:
        where = key if key == "model" else f"model.{key}"
        return ManifestError(
            f"manifest {self._bundle.path / MANIFEST}: provenance.{where}",
            got=str(got)[:80],
            expected=expected,
            remedy="Export the bundle again",
        )

    def mapping(self, value: object, key: str) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self.wrong(key, repr(value), "a mapping")
        return value

    def whole(self, value: object, key: str, least: int, below: int | None = None) -> int:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not fits or (below is not None and int(str(value)) >= below):
            limit = f">= {least}" if below is None else f"{least}..{below - 1}"
            raise self.wrong(key, repr(value), f"a whole number {limit}")
        return int(str(value))

    def producer(self, tensor: str) -> Stage:
        return self._producers[tensor]

    def segments(self, described: Mapping[str, Any], count: int) -> dict[str, tuple[int, ...]]:
        """Layers of each segment stage, all of the bundle's, no layer twice."""
        names = [stage.name for stage in self._bundle.cascade.stages if stage.kind == "segment"]
        if set(described) != set(names):
            raise self.wrong("segments", ", ".join(described), ", ".join(names))
        found: dict[str, tuple[int, ...]] = {}
        last = -1
        for name in names:
            key = f"segments.{name}.layers"
            layers = self.mapping(described[name], f"segments.{name}").get("layers")
            if not isinstance(layers, list | tuple):
                raise self.wrong(key, repr(layers), "a list of layers")
            found[name] = tuple(self.whole(layer, key, 0, count) for layer in layers)
            for layer in found[name]:
                if layer <= last:
                    raise self.wrong(key, list(layers), f"layers that ascend from {last + 1}")
                last = layer
        return found

    def exit(
        self,
        name: str,
        stage: Stage,
        segments: Mapping[str, tuple[int, ...]],
        described: Mapping[str, Any],
    ) -> LayerExit:
        """An exit that no saver makes, and the layer before it."""
        if stage.kind == "segment":
            segment, head = stage.name, None
        else:
            before = [
                self._producers[spec.name] for spec in stage.inputs if spec.name in self._producers
            ]
            before = [one for one in before if one.kind == "segment"]
            if not before:
                raise self.wrong(f"exits.{name}", "a head behind no segment", "one behind a layer")
            segment, head = before[-1].name, stage.name
        neck = self._neck(name, described)
        layers = segments[segment]
        if not layers:
            raise self.wrong(f"segments.{segment}.layers", "none", f"some before the exit {name}")
        if name in described:
            layer = self.whole(described[name].get("layer"), f"exits.{name}.layer", 0)
            if layer != layers[-1]:
                last = f"{layers[-1]}, the last one of {segment}"
                raise self.wrong(f"exits.{name}.layer", layer, last)
        return LayerExit(name, neck, layers[-1], segment, head)

    def _neck(self, name: str, described: Mapping[str, Any]) -> str:
        if name not in described and name.startswith(_ESN):
            return "esn"
        if name not in described:
            raise self.wrong(f"exits.{name}", "nothing", "its layer and neck")
        entry = self.mapping(described[name], f"exits.{name}")
        neck = entry.get("neck")
        if not isinstance(neck, str) or not neck or neck == "none":
            raise self.wrong(f"exits.{name}.neck", repr(neck), "the name of a neck")
        return neck
