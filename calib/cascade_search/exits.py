"""What the exits of a cascade say, given the models that have run before them.

Without ensembling an exit is its model. An ensembling exit answers with all models up to its own:
with the most confident prediction of them (`MostConfident`), or with the mean of their logits or
probabilities (`Mean`), and its signal is that of the ensemble.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from calib.cascade_search.signals import Judgement

T = TypeVar("T")

Ensemble = Literal["none", "comparison", "mean_logits", "mean_softmax"]
ENSEMBLES: tuple[Ensemble, ...] = get_args(Ensemble)

#: Models of a cascade in the order in which they run, up to one of its exits.
Models = tuple[str, ...]


class Exits(Protocol):
    """The exits of all cascades that can be made of some models."""

    @property
    def models(self) -> Mapping[str, Judgement]:
        """Each model by itself: the first exit of a cascade, or a cascade of one."""
        ...

    def after(self, models: Models) -> Judgement:
        """What the exit says that is reached when `models` have run.

        Args:
            models: One to three names.
        """
        ...

    def key(self, models: Models) -> Models:
        """The models on which that exit depends: equal keys, equal judgements."""
        ...

    def rows(self, index: NDArray[np.intp]) -> Exits:
        """The same of some of the samples."""
        ...


@dataclass(frozen=True)
class Alone:
    """No ensembling: an exit is its own model.

    Attributes:
        models: Each model by itself.
    """

    models: Mapping[str, Judgement]

    def after(self, models: Models) -> Judgement:
        """What the last of the models says."""
        return self.models[models[-1]]

    def key(self, models: Models) -> Models:
        """The last model."""
        return models[-1:]

    def rows(self, index: NDArray[np.intp]) -> Alone:
        """The same of some of the samples."""
        return Alone(_rows(self.models, index))


@dataclass(frozen=True)
class MostConfident:
    """Comparison ensembling: the most confident prediction wins.

    Attributes:
        models: Each model by itself.

    Reference:
        Lebovitz et al., TMLR 2023, section 3 ("Ensemble").
    """

    models: Mapping[str, Judgement]

    def after(self, models: Models) -> Judgement:
        """What the most confident of the models says; of equally confident ones the last."""
        best = self.models[models[0]]
        for name in models[1:]:
            other = self.models[name]
            wins = other.signal >= best.signal
            best = Judgement(
                np.maximum(best.signal, other.signal), np.where(wins, other.correct, best.correct)
            )
        return best

    def key(self, models: Models) -> Models:
        """All of them."""
        return models

    def rows(self, index: NDArray[np.intp]) -> MostConfident:
        """The same of some of the samples."""
        return MostConfident(_rows(self.models, index))


@dataclass(frozen=True)
class Mean:
    """Mean ensembling; `calib.cascade_search.means` makes one.

    Attributes:
        models: Each model by itself.
        together: Models -> what the exit after them says; for two and, where cascades of three are
            searched, three models. The signal of a cascade's last exit is not needed and may be
            empty.
    """

    models: Mapping[str, Judgement]
    together: Mapping[Models, Judgement]

    def after(self, models: Models) -> Judgement:
        """What the mean of the models says."""
        return self.models[models[0]] if len(models) == 1 else self.together[models]

    def key(self, models: Models) -> Models:
        """All of them."""
        return models

    def rows(self, index: NDArray[np.intp]) -> Mean:
        """The same of some of the samples."""
        return Mean(_rows(self.models, index), _rows(self.together, index))


def _rows(judgements: Mapping[T, Judgement], index: NDArray[np.intp]) -> dict[T, Judgement]:
    return {
        key: Judgement(one.signal[index] if len(one.signal) else one.signal, one.correct[index])
        for key, one in judgements.items()
    }
