"""A whole early-exit classifier: a saver, a base with exits, and an exit sequence network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edge_runtime.cascade import Exit
from edge_runtime.errors import ConfigError
from edge_runtime.schema import nearest
from engines.eval_mode import evaluating
from engines.models.early_exit import EarlyExit
from engines.models.esn import Esn, check_logits
from engines.torch_exporter import MODULE_ERRORS, torch_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_runtime.manifest import Bundle
    from engines.export import TorchStage
    from engines.preprocess import PreprocessSpec

SAVER = "saver"
SAVER_LOGITS = "saver_logits"


class StagedModel(nn.Module):
    """Saver, base and exit sequence network on the same input.

    Exits in order of evaluation: "saver"; then behind each segment of the base its exit
    "exit_<label>" and the network's "esn_<label>"; the base's own "final" last. What is not there
    has no exit.

    Args:
        base: The model with exits.
        saver: A small classifier of the same classes, input to logits; its answer comes first.
        esn: Corrects the saver behind each segment of the base; needs a saver.

    Attributes:
        base: As given.
        saver: As given.
        esn: As given.

    Raises:
        ConfigError: From the constructor: an exit sequence network without a saver, or one that was
            made for another base.
    """

    def __init__(
        self, base: EarlyExit, saver: nn.Module | None = None, esn: Esn | None = None
    ) -> None:
        super().__init__()
        if esn is not None and saver is None:
            raise ConfigError(
                "an exit sequence network without a saver",
                remedy="It corrects a saver's logits: name a saver, or leave the network out",
            )
        if esn is not None and (esn.layouts, esn.classes) != (base.layouts, base.classes):
            raise ConfigError(
                "the exit sequence network was made for another base",
                got=f"{len(esn.layouts)} segments and {esn.classes} classes",
                expected=f"{len(base.layouts)} and {base.classes}, and the same layouts",
                remedy="Make it with Esn(base.layouts, base.classes)",
            )
        self.base, self.saver, self.esn = base, saver, esn
        self._trained = frozenset(self.components())

    @property
    def exit_names(self) -> tuple[str, ...]:
        """Names of the exits in order of evaluation."""
        kinds = ("exit", "esn") if self.esn is not None else ("exit",)
        behind = [f"{kind}_{label}" for label in self.base.labels for kind in kinds]
        return (*([] if self.saver is None else [SAVER]), *behind, "final")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the logits of every exit; nothing is computed twice.

        Args:
            x: Input of base and saver, first axis the batch, float.

        Returns:
            Exit name -> logits, shape (batch, classes), in order of evaluation.

        Raises:
            ConfigError: The saver does not answer with the base's classes.
        """
        found: dict[str, Tensor] = {}
        features = self.base.features(x)
        exits = self.base.heads_on(features)
        found |= {f"exit_{n}": one for n, one in zip(self.base.labels, exits, strict=True)}
        found["final"] = features[-1]
        if self.saver is not None:
            found[SAVER] = self.saver(x)
            check_logits("logits of the saver", found[SAVER], self.base.classes)
            if self.esn is not None:
                later = self.esn(features[:-1], found[SAVER])
                found |= {f"esn_{n}": one for n, one in zip(self.base.labels, later, strict=True)}
        return {name: found[name] for name in self.exit_names}

    def components(self) -> dict[str, tuple[nn.Module, ...]]:
        """The parts that are trained or frozen as one.

        Returns:
            "saver", "backbone", "exits" and "esn" -> modules; what is not there is left out.
        """
        parts = {
            "saver": () if self.saver is None else (self.saver,),
            "backbone": (self.base.backbone,),
            "exits": tuple(self.base.heads),
            "esn": () if self.esn is None else (self.esn,),
        }
        return {name: modules for name, modules in parts.items() if modules}

    def train_only(self, components: Sequence[str]) -> list[nn.Parameter]:
        """Freeze all components but some.

        Frozen ones get no gradient, and stay in eval mode whatever `train` is called with, so that
        their statistics and answers stay as they are.

        Args:
            components: Names from `components`.

        Returns:
            The parameters that are trained, each once.

        Raises:
            ConfigError: There is no such component, or none is named.
        """
        parts = self.components()
        for name in components:
            if name not in parts:
                raise ConfigError(
                    f"the model has no component {name!r}", remedy=nearest(name, parts)
                )
        if not components:
            raise ConfigError("components to train: none", remedy=nearest("", parts))
        self._trained = frozenset(components)
        self.requires_grad_(False)
        chosen = [module for name in components for module in parts[name]]
        for module in chosen:
            module.requires_grad_(True)
        self.train(self.training)
        return list(dict.fromkeys(p for module in chosen for p in module.parameters()))

    def train(self, mode: bool = True) -> StagedModel:
        """Set the mode of what is trained; frozen components stay in eval mode."""
        super().train(mode)
        for name, modules in self.components().items():
            if name not in self._trained:
                for module in modules:
                    module.eval()
        return self

    def parameter_counts(self) -> dict[str, int]:
        """Parameters per component, named as in `components`."""
        return {
            name: sum(p.numel() for module in modules for p in module.parameters())
            for name, modules in self.components().items()
        }

    def stages(
        self, example: Tensor, source: str = "pixels"
    ) -> tuple[list[TorchStage], list[Exit]]:
        """Everything as stages that share this model's weights.

        Args:
            example: Input of base and saver, any batch size, float.
            source: Name of the input tensor.

        Returns:
            The stages in order of execution: the saver, then each segment of the base, the head
            behind it and the stage of the network; and the exits in order of evaluation.

        Raises:
            ConfigError: The saver does not answer with the base's classes.
            EngineBuildError: The saver fails, or torch can't capture the base.
        """
        from engines.export import TorchStage

        self._check_saver(example)
        stages, exits = self.base.stages(example, source)
        if self.esn is not None:
            steps, corrected = self.esn.stages(self.base.labels, saver=SAVER_LOGITS)
            for label, step in zip(self.base.labels, steps, strict=True):
                at = next(i for i, stage in enumerate(stages) if stage.name == f"head_{label}")
                stages = [*stages[: at + 1], step, *stages[at + 1 :]]
            exits = [*exits, *corrected]
        if self.saver is not None:
            first = TorchStage("saver", "saver", self.saver, (source,), (SAVER_LOGITS,))
            stages, exits = [first, *stages], [Exit(SAVER, SAVER_LOGITS), *exits]
        known = {exit_.name: exit_ for exit_ in exits}
        return stages, [known[name] for name in self.exit_names]

    def _check_saver(self, example: Tensor) -> None:
        """Refuse a saver that does not answer with the base's classes."""
        if self.saver is None:
            return
        try:
            with evaluating(self.saver), torch.no_grad():
                logits = self.saver(example[:1])
        except MODULE_ERRORS as error:
            raise torch_error("stage 'saver' failed", error) from error
        check_logits("logits of the saver", logits, self.base.classes)

    def describe(self) -> dict[str, Any]:
        """What a bundle's provenance says of the model, as plain JSON data.

        Returns:
            What `EarlyExit.describe` returns; "parameters" per component; and of the network its
            sizes and "exits": {"esn_3": {"layer": 3, "macs": n}}.
        """
        found: dict[str, Any] = {**self.base.describe(), "parameters": self.parameter_counts()}
        if self.esn is not None:
            esn = self.esn
            found["esn"] = {
                "layers": esn.layers,
                "width": esn.width,
                "heads": esn.attention_heads,
                "parameters": esn.parameter_counts(),
                "exits": {
                    f"esn_{label}": {"layer": spec.layer, "macs": macs}
                    for label, spec, macs in zip(
                        self.base.labels, self.base.exits, esn.macs(), strict=True
                    )
                },
            }
        return found

    def export(
        self,
        out: Path,
        *,
        example_images: NDArray[Any] | Tensor,
        classes: Sequence[str],
        name: str,
        preprocess: PreprocessSpec | None = None,
        image_size: tuple[int, int] | None = None,
        provenance: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Bundle:
        """Write a bundle of the whole model.

        Args:
            out: The bundle's folder.
            example_images: Samples of the bundle's input, any batch size: camera images, shape
                (batch, height, width, channels) uint8, where `preprocess` is given; else the
                model's input itself, float32.
            classes: Class names in the order of the logits.
            name: Name of the bundle.
            preprocess: What the model expects of its input.
            image_size: Height and width of the camera image, None for any.
            provenance: Added to the manifest's provenance; "model" is what `describe` returns.
            overwrite: Whether a bundle at `out` may be replaced.

        Returns:
            The bundle.

        Raises:
            ConfigError: The parts don't fit together, or the images or classes to them.
            EngineBuildError: A stage can't be exported, or its ONNX differs from torch.
            BackendUnavailable: A package is missing.
        """
        from engines.export import export_stages

        if preprocess is None:
            example = torch.as_tensor(example_images)
        else:
            shape = preprocess.output("pixels").sample_shape()
            example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        device = next(self.parameters()).device
        stages, exits = self.stages(example.to(device))
        return export_stages(
            stages,
            exits,
            example=example_images,
            classes=classes,
            out=out,
            name=name,
            preprocess=preprocess,
            image_size=image_size,
            provenance={**(provenance or {}), "model": self.describe()},
            overwrite=overwrite,
        )
