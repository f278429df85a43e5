"""What each phase computes, with what is frozen, and what its loss is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from engines.models.esn import esn_loss
from engines.models.staged import SAVER, StagedModel
from engines.training.config import PhaseRecipe


class Objective(ABC):
    """One way to train a `StagedModel`.

    Args:
        model: The model; `components` of it are trained, the others frozen.
        phase: The phase.

    Attributes:
        model: As given.
        phase: As given.
        exits: Names of the exits that are measured, in order of evaluation.
    """

    #: Components that are trained, as `StagedModel.components` names them.
    components: ClassVar[tuple[str, ...]]

    def __init__(self, model: StagedModel, phase: PhaseRecipe) -> None:
        self.model = model
        self.phase = phase
        self.exits = self._exits()

    @abstractmethod
    def _exits(self) -> tuple[str, ...]:
        """Names of the exits that `logits` gives."""

    @abstractmethod
    def logits(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Run what the phase needs; what is frozen runs without gradients.

        Args:
            x: Input of the models, first axis the batch.

        Returns:
            Logits of `exits`, shape (batch, classes) each; and those of the frozen part that the
            loss refers to, None where it refers to none.
        """

    def loss(self, logits: Sequence[Tensor], reference: Tensor | None, targets: Tensor) -> Tensor:
        """Sum of the exits' cross entropies, each a mean over the batch.

        Args:
            logits: What `logits` returned.
            reference: What `logits` returned.
            targets: Classes, shape (batch,), int64, or shares of them, shape (batch, classes).

        Returns:
            float32, without axes.
        """
        return _total([nn.functional.cross_entropy(one.float(), targets) for one in logits])


class _Saver(Objective):
    components = ("saver",)

    def _exits(self) -> tuple[str, ...]:
        return (SAVER,)

    def logits(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        assert self.model.saver is not None  # the configuration was checked
        return (self.model.saver(x),), None


class _Backbone(Objective):
    components = ("backbone",)

    def _exits(self) -> tuple[str, ...]:
        return ("final",)

    def logits(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        return (self.model.base.backbone(x),), None


class _EndToEnd(Objective):
    """Stage 1 of EEVIT: backbone and exits at once.

    Reference:
        EEVIT thesis, section 4.4; Xu et al., LGViT, 2023.
    """

    components = ("backbone", "exits")

    def _exits(self) -> tuple[str, ...]:
        return (*(f"exit_{label}" for label in self.model.base.labels), "final")

    def logits(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        return self.model.base(x), None


class _Exits(Objective):
    """Stage 2 of EEVIT: the backbone is frozen and teaches its exits.

    Reference:
        EEVIT thesis, section 4.4; Hinton et al., Distilling the Knowledge in a Neural Network.
    """

    components = ("exits",)

    def _exits(self) -> tuple[str, ...]:
        return tuple(f"exit_{label}" for label in self.model.base.labels)

    def logits(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        with torch.no_grad():
            features = self.model.base.features(x)
        return self.model.base.heads_on(features), features[-1]

    def loss(self, logits: Sequence[Tensor], reference: Tensor | None, targets: Tensor) -> Tensor:
        """Cross entropy, and for `distill` of it the divergence from the backbone's answer."""
        own = super().loss(logits, reference, targets)
        share, temperature = self.phase.distill, self.phase.temperature
        if not share:
            return own
        assert reference is not None
        teacher = (reference.float() / temperature).log_softmax(1)
        learned = _total(
            [
                nn.functional.kl_div(
                    (one.float() / temperature).log_softmax(1),
                    teacher,
                    reduction="batchmean",
                    log_target=True,
                )
                for one in logits
            ]
        )
        return (1 - share) * own + share * temperature**2 * learned


class _Sequence(Objective):
    """The exit sequence network, with saver and base frozen."""

    components = ("esn",)

    def _exits(self) -> tuple[str, ...]:
        return tuple(f"esn_{label}" for label in self.model.base.labels)

    def logits(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        assert self.model.saver is not None and self.model.esn is not None
        with torch.no_grad():
            saver = self.model.saver(x)
            features = self.model.base.features(x)
        return self.model.esn(features[:-1], saver), saver

    def loss(self, logits: Sequence[Tensor], reference: Tensor | None, targets: Tensor) -> Tensor:
        """Eq. 11 of TinySaver: less weight where the saver is sure."""
        assert reference is not None
        return esn_loss(logits, targets, reference)


_OBJECTIVES: dict[str, type[Objective]] = {
    "saver": _Saver,
    "backbone": _Backbone,
    "all": _EndToEnd,
    "exits": _Exits,
    "esn": _Sequence,
}


def objective(model: StagedModel, phase: PhaseRecipe) -> Objective:
    """The objective of a phase."""
    return _OBJECTIVES[phase.train](model, phase)


def _total(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()
