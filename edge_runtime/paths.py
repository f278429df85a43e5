"""Ways through a cascade that combine early exits with a precision per block.

A *block* is what is run for one exit beyond those before it. A *level* is a precision at which a
block's stages run. A path (b_1, ..., b_e) runs e blocks, block j at level b_j, and leaves at exit
e - 1, counted from 0. Levels are counted from 0, the highest precision; a path never returns to a
higher one, and its first block always runs at the highest.

Reference:
    Regol et al., Predicting Probabilities of Error to Combine Quantization and Early Exiting: QuEE,
    2024, sections 4 and 5.2.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError

#: A path: the level of each of its blocks.
Levels: TypeAlias = tuple[int, ...]

_BITS = re.compile(r"\d+")
#: Longer and more paths than any cascade has; checking them takes a moment.
_MOST_EXITS = 256
_MOST_PATHS = 10_000


@dataclass(frozen=True)
class Paths:
    """The paths that a gate knows.

    Attributes:
        levels: Names of the precisions, the highest first, such as ("fp32", "fp16", "int8").
        exits: Names of the exits, in order of evaluation.
        paths: Each a tuple of indices into `levels`. With a path all its beginnings are there, so
            that a sample under way may always leave where it is; and so is the path through all
            blocks at the highest level.

    Raises:
        ConfigError: From the constructor; the message names the path.
    """

    levels: tuple[str, ...]
    exits: tuple[str, ...]
    paths: tuple[Levels, ...]

    def __post_init__(self) -> None:
        """Check everything once, so that nothing later has to."""
        _check_names("level", self.levels)
        _check_names("exit", self.exits)
        if not len(self.exits) <= _MOST_EXITS or not len(self.paths) <= _MOST_PATHS:
            raise ConfigError(
                "exits and paths",
                got=f"{len(self.exits)} and {len(self.paths)}",
                expected=f"at most {_MOST_EXITS} and {_MOST_PATHS}",
            )
        for path in self.paths:
            self._check_path(path)
        known = set(self.paths)
        if len(known) < len(self.paths):
            twice, _ = Counter(self.paths).most_common(1)[0]
            raise ConfigError(f"the path {self.name(twice)!r} is listed twice")
        for path in (*self.paths, self.dearest):
            if path not in known:
                raise ConfigError(
                    f"the path {self.name(path)!r} is missing",
                    remedy="The highest level at all blocks is always among the paths",
                )
            if len(path) > 1 and path[:-1] not in known:
                raise ConfigError(
                    f"the path {self.name(path[:-1])!r} is missing, with which "
                    f"{self.name(path)!r} begins",
                    remedy="List every beginning of a path too",
                )

    def __len__(self) -> int:
        """Number of paths."""
        return len(self.paths)

    @property
    def dearest(self) -> Levels:
        """All blocks at the highest level."""
        return (0,) * len(self.exits)

    def name(self, path: Levels) -> str:
        """A path for people: "fp32 -> int8" leaves at the second exit."""
        return " -> ".join(self.levels[level] for level in path)

    def index(self, path: Levels) -> int:
        """Position of a path in `paths`.

        Raises:
            ConfigError: It is not among them.
        """
        if path not in self._index:
            raise ConfigError(
                f"the path {self.name(path)!r} is not known",
                remedy=f"Known are {len(self)} paths, among them {self.name(self.dearest)!r}",
            )
        return self._index[path]

    def beginning_with(self, begin: Levels) -> tuple[int, ...]:
        """Positions in `paths` of a path itself and of all that continue it, in order."""
        return tuple(i for i, path in enumerate(self.paths) if path[: len(begin)] == begin)

    def codes(self, paths: Sequence[Levels]) -> NDArray[np.float32]:
        """What tells a predictor which path is meant.

        Entry j is the bit width of block j's level divided by that of the highest, 0 where the
        path has no such block; the last entry is the number of blocks divided by that of exits.
        The paper has the same numbers undivided; all of ours are in [0, 1], as probabilities are.

        Args:
            paths: Any paths, known or not.

        Returns:
            Shape (len(paths), exits + 1), float32.

        Raises:
            ConfigError: The name of a level has no bit width, or one that is not below the level's
                before it.

        Reference:
            QuEE, Eq. 14.
        """
        shares = [bits / self.bits[0] for bits in self.bits]
        codes = np.zeros((len(paths), len(self.exits) + 1), np.float32)
        for row, path in zip(codes, paths, strict=True):
            row[: len(path)] = [shares[level] for level in path]
            row[-1] = len(path) / len(self.exits)
        return codes

    @cached_property
    def bits(self) -> tuple[int, ...]:
        """Bit width of each level, the first number in its name.

        Raises:
            ConfigError: As for `codes`.
        """
        found = []
        for level in self.levels:
            match = _BITS.search(level)
            if match is None or len(match[0]) > 4 or int(match[0]) < 1:
                raise ConfigError(
                    f"the level {level!r} has no bit width in its name",
                    expected="a name such as fp32, fp16 or int8",
                )
            found.append(int(match[0]))
        for higher, lower in zip(range(len(found)), range(1, len(found)), strict=False):
            if found[lower] >= found[higher]:
                raise ConfigError(
                    "levels",
                    got=", ".join(self.levels),
                    expected="the highest precision first, each of fewer bits than the one before",
                )
        return tuple(found)

    @cached_property
    def _index(self) -> dict[Levels, int]:
        return {path: i for i, path in enumerate(self.paths)}

    def _check_path(self, path: Levels) -> None:
        if not 1 <= len(path) <= len(self.exits):
            raise ConfigError(
                f"the path {list(path)}",
                got=f"{len(path)} blocks",
                expected=f"1..{len(self.exits)}, one per exit up to where it leaves",
            )
        if not all(0 <= level < len(self.levels) for level in path):
            raise ConfigError(
                f"the path {list(path)}",
                expected=f"indices of levels, 0..{len(self.levels) - 1}",
            )
        if path[0] != 0:
            raise ConfigError(
                f"the path {self.name(path)!r}: its first block",
                got=self.levels[path[0]],
                expected=f"{self.levels[0]}, the highest level",
            )
        if list(path) != sorted(path):
            raise ConfigError(
                f"the path {self.name(path)!r} returns to a higher precision",
                expected="the same or a lower level at each next block",
            )


def _check_names(what: str, names: tuple[str, ...]) -> None:
    if not names:
        raise ConfigError(f"paths need at least one {what}")
    if len(set(names)) < len(names) or not all(name and name.isprintable() for name in names):
        raise ConfigError(
            f"names of the {what}s", got=", ".join(map(repr, names)), expected="distinct names"
        )
