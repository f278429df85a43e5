"""The rule by which a sample leaves: threshold, patience, patient-and-confident, never.

A policy is immutable and works on batches; what it must remember between the exits of one frame is
a `Streak`, which the scheduler carries along. Exits are counted from 0 in the order of the cascade;
the last one always answers, whatever the policy says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from edge_runtime.confidence import Decision
from edge_runtime.errors import ConfigError

PolicyKind = Literal["threshold", "patience", "patient_and_confident", "never", "gate"]
POLICIES: tuple[PolicyKind, ...] = get_args(PolicyKind)

#: One value per sample of a batch, shape (batch,), or that of one sample as a numpy scalar.
Labels: TypeAlias = "NDArray[np.int64] | np.int64"
Mask: TypeAlias = "NDArray[np.bool_] | np.bool_"


class Streak:
    """What a policy remembers of the samples in flight: nothing, until it asks."""

    def __init__(self) -> None:
        self._labels: Any = None
        self._length: Any = 0

    def repeats(self, labels: Labels) -> Mask:
        """Which samples have the label that they had at the last call; none at the first.

        Args:
            labels: Of the samples in flight, shape (batch,) or ().
        """
        before, self._labels = self._labels, labels.copy()
        return nobody(labels) if before is None else labels == before

    def count(self, goes_on: Mask) -> Any:
        """How many calls in a row went on, this one included, shape (batch,) or (), int64."""
        self._length = (self._length + 1) * goes_on
        return self._length

    def keep(self, rows: NDArray[np.intp]) -> None:
        """Drop the samples that left; `rows` are the indices of those that stay."""
        if self._labels is not None:
            self._labels = self._labels[rows]
        if np.ndim(self._length):
            self._length = self._length[rows]


def nobody(like: Labels) -> Mask:
    """False for each sample."""
    return np.zeros(np.shape(like), bool)


class Policy(Protocol):
    """The contract of a rule; add one by writing a class and naming it in `OperatingPoint`."""

    def evaluated(self, exits: int) -> tuple[int, ...]:
        """Indices of the exits worth evaluating, of a cascade with `exits` exits.

        The last entry is the one that always answers: where an exit is certain to fire, nothing
        after it is evaluated.
        """
        ...

    def leaves(self, position: int, decision: Decision, streak: Streak) -> Mask:
        """Which samples leave at exit `position`, shape as the decision's; updates `streak`."""
        ...


@dataclass(frozen=True, slots=True)
class Never:
    """No early exit: every sample goes to the last one."""

    def evaluated(self, exits: int) -> tuple[int, ...]:
        """Only the last exit."""
        return (exits - 1,)

    def leaves(self, position: int, decision: Decision, streak: Streak) -> Mask:
        """Nobody leaves early."""
        return nobody(decision.labels)


@dataclass(frozen=True, slots=True)
class Threshold:
    """Leave at the first exit whose signal is at least its threshold.

    Attributes:
        thresholds: Per exit but the last; None where an exit can't fire.
        lowest: Smallest value of the signal; a threshold <= it is certain to fire.

    Reference:
        Lebovitz et al., TMLR 2023, Algorithm 1.
    """

    thresholds: tuple[float | None, ...]
    lowest: float

    def evaluated(self, exits: int) -> tuple[int, ...]:
        """Exits with a threshold, up to the first that is certain to fire."""
        chosen = []
        for position, threshold in enumerate(self.thresholds):
            if threshold is None:
                continue
            chosen.append(position)
            if threshold <= self.lowest:
                return tuple(chosen)
        return (*chosen, exits - 1)

    def leaves(self, position: int, decision: Decision, streak: Streak) -> Mask:
        """Samples whose signal reaches the threshold of this exit."""
        threshold = self.thresholds[position]
        if threshold is None:
            return nobody(decision.labels)
        leaves: Mask = decision.signal >= np.float32(threshold)
        return leaves


@dataclass(frozen=True, slots=True)
class Patience:
    """Leave once `patience` exits in a row repeated the label of the exit before them.

    Attributes:
        patience: Number of repetitions, >= 1; patience 2 needs three exits that agree.

    Reference:
        Zhou et al., BERT Loses Patience, NeurIPS 2020, section 3.3 (PABEE).
    """

    patience: int

    def evaluated(self, exits: int) -> tuple[int, ...]:
        """Every exit, or only the last where the cascade is too short for this patience."""
        return tuple(range(exits)) if self.patience <= exits - 2 else (exits - 1,)

    def leaves(self, position: int, decision: Decision, streak: Streak) -> Mask:
        """Samples whose label was repeated often enough."""
        leaves: Mask = streak.count(streak.repeats(decision.labels)) >= self.patience
        return leaves


@dataclass(frozen=True, slots=True)
class PatientAndConfident:
    """Leave once `patience` evaluated exits in a row were confident, whatever they predicted.

    Attributes:
        thresholds: As in `Threshold`; an exit with None is not evaluated and breaks no streak.
        patience: Number of confident exits in a row, >= 1; 1 is `Threshold`.

    Reference:
        Zhang et al., PCEE-BERT, Findings of NAACL 2022, section 3.
    """

    thresholds: tuple[float | None, ...]
    patience: int

    def evaluated(self, exits: int) -> tuple[int, ...]:
        """Exits with a threshold, and the last; only the last where they are too few."""
        chosen = [i for i, threshold in enumerate(self.thresholds) if threshold is not None]
        return (*chosen, exits - 1) if len(chosen) >= self.patience else (exits - 1,)

    def leaves(self, position: int, decision: Decision, streak: Streak) -> Mask:
        """Samples that were confident often enough in a row."""
        threshold = self.thresholds[position]
        if threshold is None:
            return nobody(decision.labels)
        confident: Mask = decision.signal >= np.float32(threshold)
        leaves: Mask = streak.count(confident) >= self.patience
        return leaves


@dataclass(frozen=True, slots=True)
class Gated:
    """A learned rule: it reads probabilities, and chooses a precision too (`edge_runtime.gate`)."""

    def evaluated(self, exits: int) -> tuple[int, ...]:
        """Every exit."""
        return tuple(range(exits))

    def leaves(self, position: int, decision: Decision, streak: Streak) -> Mask:
        """Nobody is told by label and signal alone.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "a gate decides by all probabilities of an exit, which are not at hand here",
            remedy="Run it with edge_runtime.load, or edge-runtime evaluate and bench",
        )


def check_patience(patience: int) -> None:
    """Refuse a patience that would let samples leave before anything was seen."""
    if patience < 1:
        raise ConfigError("patience", got=patience, expected=">= 1")
