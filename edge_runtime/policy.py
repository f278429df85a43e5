"""The rule by which a sample leaves: threshold, patience, patient-and-confident, never.

A policy is immutable and works on batches; what it must remember between the exits of one frame is
a `Streak`, which the scheduler carries along. Exits are counted from 0 in the order of the cascade;
the last one always answers, whatever the policy says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from edge_runtime.confidence import Decision
from edge_runtime.errors import ConfigError

PolicyKind = Literal["threshold", "patience", "patient_and_confident", "never"]
POLICIES: tuple[PolicyKind, ...] = get_args(PolicyKind)


@dataclass(slots=True)
class Streak:
    """What a policy remembers of the samples that are still in flight.

    Attributes:
        labels: Label at the previous evaluated exit, -1 before the first; shape (batch,), int64.
        length: Number of exits in a row that agreed (or were confident), shape (batch,), int64.
    """

    labels: NDArray[np.int64]
    length: NDArray[np.int64]

    @classmethod
    def start(cls, batch: int) -> Streak:
        """The state before the first exit of `batch` samples."""
        return cls(np.full(batch, -1, np.int64), np.zeros(batch, np.int64))

    def keep(self, rows: NDArray[np.intp]) -> None:
        """Drop the samples that left; `rows` are the indices of those that stay."""
        self.labels = self.labels[rows]
        self.length = self.length[rows]


class Policy(Protocol):
    """The contract of a rule; add one by writing a class and naming it in `OperatingPoint`."""

    def evaluated(self, exits: int) -> tuple[int, ...]:
        """Indices of the exits worth evaluating, of a cascade with `exits` exits.

        The last entry is the one that always answers: where an exit is certain to fire, nothing
        after it is evaluated.
        """
        ...

    def leaves(self, position: int, decision: Decision, streak: Streak) -> NDArray[np.bool_]:
        """Which samples leave at exit `position`, shape (batch,); updates `streak`."""
        ...


@dataclass(frozen=True, slots=True)
class Never:
    """No early exit: every sample goes to the last one."""

    def evaluated(self, exits: int) -> tuple[int, ...]:
        """Only the last exit."""
        return (exits - 1,)

    def leaves(self, position: int, decision: Decision, streak: Streak) -> NDArray[np.bool_]:
        """Nobody leaves early."""
        return np.zeros(len(decision.labels), bool)


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

    def leaves(self, position: int, decision: Decision, streak: Streak) -> NDArray[np.bool_]:
        """Samples whose signal reaches the threshold of this exit."""
        threshold = self.thresholds[position]
        if threshold is None:
            return np.zeros(len(decision.labels), bool)
        leaves: NDArray[np.bool_] = decision.signal >= np.float32(threshold)
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

    def leaves(self, position: int, decision: Decision, streak: Streak) -> NDArray[np.bool_]:
        """Samples whose label was repeated often enough."""
        streak.length = np.where(decision.labels == streak.labels, streak.length + 1, 0)
        streak.labels = decision.labels.copy()
        return streak.length >= self.patience


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

    def leaves(self, position: int, decision: Decision, streak: Streak) -> NDArray[np.bool_]:
        """Samples that were confident often enough in a row."""
        threshold = self.thresholds[position]
        if threshold is None:
            return np.zeros(len(decision.labels), bool)
        confident = decision.signal >= np.float32(threshold)
        streak.length = np.where(confident, streak.length + 1, 0)
        return streak.length >= self.patience


def check_patience(patience: int) -> None:
    """Refuse a patience that would let samples leave before anything was seen."""
    if patience < 1:
        raise ConfigError("patience", got=patience, expected=">= 1")
