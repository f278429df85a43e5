"""A backbone with exits: highways of neck and linear head after some of its layers.

Any torch classifier that `engines.split` can cut serves as the backbone. What leaves is one module
for training, and a list of stages for a bundle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edge_runtime import schema
from edge_runtime.errors import ConfigError
from engines.eval_mode import evaluating
from engines.models.backbones import classifier_modules
from engines.models.features import Layout
from engines.models.necks import build_neck, read_options
from engines.split import Taps, equal_macs, layers, split

if TYPE_CHECKING:
    from edge_runtime.cascade import Exit
    from engines.export import TorchStage

_FORM = "[layer, neck, {options}], [layer, neck] or [layer]"


@dataclass(frozen=True)
class ExitSpec:
    """An exit as it is asked for.

    Attributes:
        layer: After which layer: an index into `engines.split.layers`, from 0, or a module's name.
        neck: Name of the neck, see `engines.models.necks`.
        options: Of the neck.
    """

    layer: int | str
    neck: str = "pool"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EqualMacs:
    """Exits that share the backbone's operations equally, all with the same neck.

    Attributes:
        count: Number of exits; the backbone's own answer is not counted.
        neck: Name of the neck.
        options: Of the neck.

    Reference:
        Thesis, section 4.3: exits are placed at about equal distances in MACs.
    """

    count: int
    neck: str = "pool"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse no exits."""
        if self.count < 1:
            raise ConfigError("count", got=self.count, expected=">= 1")


def parse_exits(data: Any, where: str = "exits") -> tuple[ExitSpec, ...] | EqualMacs:
    """Read exits from plain data.

    Args:
        data: A list of `[layer, neck, {options}]`, `[layer, neck]` or `[layer]`; or a mapping
            `{count: 4, neck: lph, options: {...}}` for exits at equal shares of the MACs.
        where: The place that messages name.

    Returns:
        What `EarlyExit` takes. Whether the layers exist shows there.

    Raises:
        ConfigError: The form is another, a neck is unknown, or an option of it.
    """
    if isinstance(data, Mapping):
        shares = schema.read(EqualMacs, data, where)
        read_options(shares.neck, shares.options, where)
        return shares
    if not isinstance(data, list | tuple):
        raise ConfigError(
            where,
            got=f"{type(data).__name__.lstrip('_').lower()} {data!r}"[:80],
            expected=f"a list of {_FORM}, or a mapping with count",
        )
    origins = getattr(data, "origins", {})
    return tuple(
        _parse_exit(entry, f"{origins[i]}: {where}[{i}]" if i in origins else f"{where}[{i}]")
        for i, entry in enumerate(data)
    )


def _parse_exit(entry: Any, where: str) -> ExitSpec:
    if not isinstance(entry, list | tuple) or not 1 <= len(entry) <= 3:
        raise ConfigError(where, got=f"{entry!r}"[:80], expected=_FORM)
    named = dict(zip(("layer", "neck", "options"), entry, strict=False))
    spec = schema.read(ExitSpec, named, where)
    read_options(spec.neck, spec.options, where)
    return spec


class Highway(nn.Module):
    """An exit: from a layer's output to logits.

    Args:
        spec: Of the exit.
        layout: Of the layer's output.
        classes: Number of logits.
        where: The place that messages name.

    Raises:
        ConfigError: The neck does not fit the layout.

    Reference:
        Thesis, section 5.2.3: a highway is a neck and a head.
    """

    def __init__(self, spec: ExitSpec, layout: Layout, classes: int, where: str) -> None:
        super().__init__()
        self.layout = layout
        self.neck = build_neck(spec.neck, spec.options, layout, where)
        self.head = nn.Linear(self.neck.width, classes)

    def forward(self, feature: Tensor) -> Tensor:
        """Classify.

        Args:
            feature: The layer's output, as `layout` says.

        Returns:
            Logits, shape (batch, classes).
        """
        logits: Tensor = self.head(self.neck(*self.layout.read(feature)))
        return logits


class EarlyExit(nn.Module):
    """A backbone and its exits.

    The exits are made in the backbone's dtype and on its device; on "meta" they cost no memory.

    Args:
        backbone: A classifier: one tensor -> logits (batch, classes).
        exits: In order of the layers; none leaves the backbone's own answer.
        example: A valid input of the backbone, any batch, float.

    Attributes:
        backbone: As given; trained with the exits.
        heads: A `Highway` per exit.
        exits: The exits with their layers as indices.
        labels: What names of stages, tensors and exits end with: "3" for a layer that was given as
            an index, "layer2_1" for the name "layer2.1".
        layer_names: Names of all layers, in order of execution.
        layouts: Of the output of each exit's layer.
        classes: Number of logits.

    Raises:
        ConfigError: A layer does not exist, is used twice, out of order or the last, or a neck
            does not fit it.
    """

    def __init__(
        self, backbone: nn.Module, exits: Sequence[ExitSpec] | EqualMacs, example: Tensor
    ) -> None:
        super().__init__()
        self.backbone = backbone
        weights = next((p for p in backbone.parameters()), example)
        example = example.to(weights.device, weights.dtype)
        with evaluating(backbone):
            self.layer_names = tuple(layers(backbone, example))
            specs = _placed(backbone, exits, example, self.layer_names)
            self.exits, self.labels = _resolved(specs, self.layer_names)
            self._tapped = tuple(self.layer_names[int(spec.layer)] for spec in self.exits)
            with torch.no_grad():
                *features, logits = self.features(example)
        if logits.ndim != 2:
            raise ConfigError(
                "the backbone's answer", got=f"shape {tuple(logits.shape)}", expected="2 axes"
            )
        self.classes = int(logits.shape[1])
        size = (int(example.shape[-2]), int(example.shape[-1]))
        self.layouts = tuple(Layout.of(backbone, feature, size) for feature in features)
        with torch.device(weights.device):
            self.heads = nn.ModuleList(
                Highway(spec, layout, self.classes, f"exit {label}")
                for spec, layout, label in zip(self.exits, self.layouts, self.labels, strict=True)
            ).to(weights.dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Answer at every exit.

        Args:
            x: Input of the backbone, any batch.

        Returns:
            Logits (batch, classes) of each exit in order, the backbone's own last.
        """
        features = self.features(x)
        return (*self.heads_on(features), features[-1])

    def features(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the exits read.

        Args:
            x: Input of the backbone, any batch.

        Returns:
            The output of each exit's layer, then the backbone's logits.
        """
        outputs: tuple[Tensor, ...] = Taps(self.backbone, self._tapped)(x)
        return outputs

    def heads_on(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Answer at the early exits.

        Args:
            features: What `features` returned; the backbone's logits at its end are not read.

        Returns:
            Logits (batch, classes) of each early exit in order.
        """
        return tuple(head(feature) for head, feature in zip(self.heads, features, strict=False))

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of each component.

        Returns:
            "patch embeddings" (or "stem"): what stands before the modules that hold the layers;
            "encoder": these modules, and all that follows but the classifier; "exits": all of
            them; "exit_<label>": each; "classifier": the backbone's own.
        """
        first = {name.partition(".")[0] for name in self.layer_names}
        heads = classifier_modules(self.backbone).values()
        classifier = {id(p) for head in heads for p in head.parameters()}
        inside = False
        whole = sum(p.numel() for p in self.backbone.parameters())
        own = sum(p.numel() for p in self.backbone.parameters() if id(p) in classifier)
        front = sum(p.numel() for p in self.backbone.parameters(recurse=False))
        for name, child in self.backbone.named_children():
            inside = inside or name in first
            if not inside:
                front += sum(p.numel() for p in child.parameters() if id(p) not in classifier)
        exits = [sum(p.numel() for p in head.parameters()) for head in self.heads]
        embeds = hasattr(self.backbone, "patch_embed")
        return {
            "patch embeddings" if embeds else "stem": front,
            "encoder": whole - own - front,
            "exits": sum(exits),
            **{f"exit_{label}": n for label, n in zip(self.labels, exits, strict=True)},
            "classifier": own,
        }

    def stages(
        self, example: Tensor, source: str = "pixels"
    ) -> tuple[list[TorchStage], list[Exit]]:
        """Cut into stages for `engines.export.export_stages`.

        Args:
            example: A valid input of the backbone.
            source: Name of the tensor that the first segment reads.

        Returns:
            Stages "segment1", "head_<label>", "segment2", ... in order of execution, and exits
            "exit_<label>", ..., "final". Tensors are "features_<label>", "logits_<label>" and
            "final_logits". Weights are those of this module; segments are in eval mode.

        Raises:
            EngineBuildError: torch can't capture the backbone.
        """
        from edge_runtime.cascade import Exit
        from engines.export import TorchStage

        stages, exits, before = [], [], source
        segments = split(self.backbone, example, self._tapped)
        for i, (segment, label, head) in enumerate(
            zip(segments[:-1], self.labels, self.heads, strict=True), 1
        ):
            feature, logits = f"features_{label}", f"logits_{label}"
            stages += [
                TorchStage(f"segment{i}", "segment", segment, (before,), (feature,)),
                TorchStage(f"head_{label}", "head", head, (feature,), (logits,)),
            ]
            exits.append(Exit(f"exit_{label}", logits))
            before = feature
        last = f"segment{len(segments)}"
        stages.append(TorchStage(last, "segment", segments[-1], (before,), ("final_logits",)))
        return stages, [*exits, Exit("final", "final_logits")]

    def describe(self) -> dict[str, Any]:
        """What the model is made of, as plain JSON data for a bundle's provenance.

        Returns:
            "layers": their number; "exits": name -> layer, neck, options and parameters;
            "segments": name -> indices of the layers that it runs.
        """
        exits = {
            f"exit_{label}": {
                "layer": spec.layer,
                "neck": spec.neck,
                "options": schema.plain(spec.options),
                "parameters": sum(p.numel() for p in head.parameters()),
            }
            for label, spec, head in zip(self.labels, self.exits, self.heads, strict=True)
        }
        ends = [int(spec.layer) + 1 for spec in self.exits] + [len(self.layer_names)]
        starts = [0, *ends[:-1]]
        segments = {
            f"segment{i}": {"layers": list(range(start, end))}
            for i, (start, end) in enumerate(zip(starts, ends, strict=True), 1)
        }
        return {"layers": len(self.layer_names), "exits": exits, "segments": segments}


def _placed(
    backbone: nn.Module,
    exits: Sequence[ExitSpec] | EqualMacs,
    example: Tensor,
    names: Sequence[str],
) -> Sequence[ExitSpec]:
    """The exits, each with its layer."""
    if not isinstance(exits, EqualMacs):
        return exits
    among = names[:-1]
    if exits.count > len(among):
        raise ConfigError(
            "count of exits",
            got=exits.count,
            expected=f"at most {len(among)}, for a backbone of {len(names)} layers",
        )
    chosen = equal_macs(backbone, example, exits.count, among)
    return [ExitSpec(names.index(name), exits.neck, exits.options) for name in chosen]


def _resolved(
    specs: Sequence[ExitSpec], names: Sequence[str]
) -> tuple[tuple[ExitSpec, ...], tuple[str, ...]]:
    """The exits with their layers as indices, and their labels."""
    resolved: list[ExitSpec] = []
    labels = []
    for spec in specs:
        index = _index(spec.layer, names)
        if resolved and index <= int(resolved[-1].layer):
            wrong = "a layer twice" if index == resolved[-1].layer else "an earlier layer"
            raise ConfigError(
                f"exit {spec.layer}: it stands after exit {resolved[-1].layer}",
                got=wrong,
                expected="exits in order of their layers, one after each",
            )
        if index == len(names) - 1:
            raise ConfigError(
                f"exit {spec.layer}: this is the last layer",
                remedy=f"The backbone's own answer follows it; the last exit can be {index - 1}",
            )
        resolved.append(replace(spec, layer=index, options=dict(spec.options)))
        labels.append(str(spec.layer).replace(".", "_"))
    return tuple(resolved), tuple(labels)


def _index(layer: int | str, names: Sequence[str]) -> int:
    if not names:
        raise ConfigError(
            f"layer of an exit: {layer!r}: the backbone can't be cut after any of its modules",
            remedy="Leave it without exits, or take another backbone",
        )
    if isinstance(layer, int):
        if not 0 <= layer < len(names):
            raise ConfigError("layer of an exit", got=layer, expected=f"0..{len(names) - 1}")
        return layer
    if layer not in names:
        raise ConfigError(
            f"layer of an exit: the backbone can't be cut after {layer!r}",
            remedy=schema.nearest(layer, names),
        )
    return names.index(layer)
