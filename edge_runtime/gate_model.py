"""What a gate has learnt, and its file: predictors of the error of paths not yet taken.

A predictor is two small layers. It reads what the last two exits said of a sample and the code of a
path, and tells how probable it is that the path's answer is wrong. It is fitted by
`edge-runtime gate fit`; running it takes numpy alone.

Reference:
    Regol et al., QuEE, 2024, sections 4.1 and 4.2, appendix 7.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edge_runtime import schema
from edge_runtime.cascade import Cascade
from edge_runtime.errors import ConfigError, ManifestError
from edge_runtime.npz import check_nothing_else, read_npz, take, write_npz
from edge_runtime.paths import Levels, Paths

SCHEMA_VERSION = 1

#: "paths": the error of every path. "one_step": the least loss behind each next step (7.3).
GateKind = Literal["paths", "one_step"]

#: A gate of 1000 classes and 12 exits at width 128 has 12 MiB.
_MOST_BYTES = 64 * 2**20
#: Keeps the logarithm of a probability of 0 finite; far below what changes an entropy.
TINY = np.float32(1e-30)


@dataclass(frozen=True, eq=False)
class ErrorPredictor:
    """The two layers of one exit: output(relu(features u + codes p + bias)).

    Attributes:
        features: Weights of the input u, shape (2 * classes + 4, hidden), float32.
        codes: Weights of the path's code, shape (exits + 1, hidden), float32.
        bias: Of the hidden units, shape (hidden,), float32.
        output: Weights of the second layer, shape (hidden,), float32.
        output_bias: Shape (1,), float32.

    Reference:
        QuEE, Eq. 15.
    """

    features: NDArray[np.float32]
    codes: NDArray[np.float32]
    bias: NDArray[np.float32]
    output: NDArray[np.float32]
    output_bias: NDArray[np.float32]

    @property
    def hidden(self) -> int:
        """Number of hidden units."""
        return len(self.bias)

    @staticmethod
    def shapes(classes: int, exits: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each array."""
        return {
            "features": (2 * classes + 4, hidden),
            "codes": (exits + 1, hidden),
            "bias": (hidden,),
            "output": (hidden,),
            "output_bias": (1,),
        }

    def scores(
        self, features: NDArray[np.float32], codes: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """What the second layer says, before the sigmoid.

        Args:
            features: From `input_features`, shape (n, 2 * classes + 4), float32.
            codes: From `Paths.codes`, shape (k, exits + 1), float32.

        Returns:
            Shape (n, k), float32.
        """
        first = features @ self.features + self.bias
        hidden = np.maximum(first[:, None, :] + codes @ self.codes, 0)
        scores: NDArray[np.float32] = hidden @ self.output + self.output_bias
        return scores

    def errors(
        self, features: NDArray[np.float32], codes: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Probabilities that paths are wrong, shape (n, k), float32; arguments as of `scores`."""
        half = np.float32(0.5)
        errors: NDArray[np.float32] = half + half * np.tanh(half * self.scores(features, codes))
        return errors


@dataclass(frozen=True, eq=False)
class GateModel:
    """A fitted gate.

    Attributes:
        bundle: Hash of the bundle whose exits it was fitted to.
        classes: Number of classes.
        paths: The paths that it knows, with the names of levels and exits.
        predictors: One per exit but the last.
        figures: What it was fitted on and how well: plain JSON data.
        kind: "paths", or "one_step" for the variant that predicts losses instead of errors.
        trade_off: Of the kind "one_step": the lambda that it was fitted for; else None.

    Raises:
        ConfigError: From the constructor, where the parts don't fit or a weight is not finite.
    """

    bundle: str
    classes: int
    paths: Paths
    predictors: tuple[ErrorPredictor, ...]
    figures: Mapping[str, Any] = field(default_factory=dict)
    kind: GateKind = "paths"
    trade_off: float | None = None

    def __post_init__(self) -> None:
        """Check that arrays, paths and classes fit."""
        _check_facts(self.kind, self.classes, self.trade_off)
        exits = len(self.paths.exits)
        if len(self.predictors) != exits - 1:
            raise ConfigError(
                "predictors of a gate",
                got=len(self.predictors),
                expected=f"{exits - 1}, one per exit but the last",
            )
        for position, predictor in enumerate(self.predictors):
            shapes = ErrorPredictor.shapes(self.classes, exits, predictor.hidden)
            for name, shape in shapes.items():
                _check_weights(self.paths.exits[position], name, getattr(predictor, name), shape)
        # A code for every path, or none.
        self.paths.codes([self.paths.dearest])

    def check(self, bundle: str, cascade: Cascade) -> None:
        """Refuse a bundle that the gate was not fitted for.

        Args:
            bundle: Hash of the bundle.
            cascade: Its cascade, with all of its exits.

        Raises:
            ConfigError: It is another one.
        """
        remedy = "Fit one for this bundle: edge-runtime gate fit BUNDLE"
        if bundle != self.bundle:
            raise ConfigError(
                "the gate was fitted for another bundle",
                got=self.bundle[:12],
                expected=bundle[:12],
                remedy=remedy,
            )
        exits = tuple(exit_.name for exit_ in cascade.exits)
        for what, got, expected in (
            ("exits of the gate", ", ".join(self.paths.exits), ", ".join(exits)),
            ("classes of the gate", self.classes, len(cascade.classes)),
        ):
            if got != expected:
                raise ConfigError(what, got=got, expected=expected, remedy=remedy)

    def costs(self, column: str) -> dict[Levels, float]:
        """Path -> cost, as `Gate` takes them, of a column that was measured when it was fitted.

        Args:
            column: "bit_operations", "macs", "latency" or "energy".

        Raises:
            ConfigError: The gate has no such column, or it lacks a path.
        """
        columns = self.figures.get("costs")
        known = columns if isinstance(columns, Mapping) else {}
        if column not in known:
            raise ConfigError(
                f"the gate has no costs {column!r}", remedy=schema.nearest(column, known)
            )
        values = known[column]
        if not isinstance(values, Mapping):
            raise ConfigError(f"costs {column!r} of the gate", got=repr(values)[:80])
        named = {self.paths.name(path): path for path in self.paths.paths}
        numbers = (int, float)
        return {
            path: float(values[name])
            for name, path in named.items()
            if isinstance(values.get(name), numbers)
        }

    def write(self, path: Path) -> None:
        """Write the gate as one npz of plain arrays; equal gates are equal files.

        Raises:
            ConfigError: The figures are no plain JSON data.
            EdgeRuntimeError: The file can't be written; the old one is still there.
        """
        meta = _Meta(
            schema_version=SCHEMA_VERSION,
            kind=self.kind,
            bundle=self.bundle,
            classes=self.classes,
            levels=self.paths.levels,
            exits=self.paths.exits,
            paths=self.paths.paths,
            hidden=tuple(predictor.hidden for predictor in self.predictors),
            trade_off=self.trade_off,
            figures=self.figures,
        )
        arrays = {
            f"{position}.{part.name}": getattr(predictor, part.name)
            for position, predictor in enumerate(self.predictors)
            for part in fields(ErrorPredictor)
        }
        write_npz(path, schema.plain(meta), arrays)

    @classmethod
    def read(cls, path: Path) -> GateModel:
        """Read a gate that `write` wrote; the file may come from anywhere.

        Raises:
            ManifestError: The file is missing, over 64 MiB, damaged, of another version, or has
                arrays of other shapes or with values that are not finite.
        """
        where = f"gate {path}"
        data, arrays = read_npz(path, "gate", most=_MOST_BYTES)
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise ManifestError(
                f"{where}: schema version",
                got=repr(version)[:80],
                expected=SCHEMA_VERSION,
                remedy="It was written by another version of edge-runtime: fit it again",
            )
        try:
            meta = schema.read(_Meta, data, where)
            _check_facts(meta.kind, meta.classes, meta.trade_off)
            paths = Paths(meta.levels, meta.exits, meta.paths)
            predictors = tuple(
                ErrorPredictor(
                    **{
                        name: take(arrays, f"{position}.{name}", np.float32, shape, where)
                        for name, shape in ErrorPredictor.shapes(
                            meta.classes, len(meta.exits), hidden
                        ).items()
                    }
                )
                for position, hidden in enumerate(meta.hidden)
            )
            check_nothing_else(arrays, where)
            return cls(
                bundle=meta.bundle,
                classes=meta.classes,
                paths=paths,
                predictors=predictors,
                figures=meta.figures,
                kind=meta.kind,
                trade_off=meta.trade_off,
            )
        except ConfigError as error:
            raise ManifestError(
                str(error) if where in str(error) else f"{where}: {error}",
                remedy="Restore the file, or fit the gate again",
            ) from error


@dataclass(frozen=True)
class _Meta:
    """The description in a gate's file."""

    schema_version: int
    kind: GateKind
    bundle: str
    classes: int
    levels: tuple[str, ...]
    exits: tuple[str, ...]
    paths: tuple[Levels, ...]
    hidden: tuple[int, ...]
    trade_off: float | None
    figures: Mapping[str, Any]


def input_features(
    probabilities: NDArray[np.float32], previous: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """What a predictor reads of samples: p_j, p_{j-1}, both entropies, both largest values.

    Args:
        probabilities: What the exit says, shape (n, classes), float32.
        previous: What the exit before it said, same shape; None at the first exit, where zeros
            stand for it.

    Returns:
        [p_j, p_{j-1}, H(p_j), H(p_{j-1}), max p_{j-1}, max p_j], shape (n, 2 * classes + 4),
        float32; entropies in nats.

    Reference:
        QuEE, Eq. 13, in the order printed there.
    """
    before = np.zeros_like(probabilities) if previous is None else previous
    columns = [
        *(-np.add.reduce(p * np.log(p + TINY), axis=1) for p in (probabilities, before)),
        *(p.max(axis=1) for p in (before, probabilities)),
    ]
    return np.concatenate([probabilities, before, np.stack(columns, axis=1)], axis=1)


def _check_facts(kind: str, classes: int, trade_off: float | None) -> None:
    if kind not in get_args(GateKind):
        raise ConfigError("kind of a gate", got=repr(kind), expected=", ".join(get_args(GateKind)))
    if not 2 <= classes <= _MOST_BYTES:
        raise ConfigError("classes of a gate", got=classes, expected=">= 2")
    if (trade_off is None) != (kind == "paths"):
        raise ConfigError(
            "lambda of a gate",
            got=trade_off,
            expected="a number for the kind one_step, none for the kind paths",
        )


def _check_weights(exit_name: str, name: str, array: object, shape: tuple[int, ...]) -> None:
    what = f"{name} of the predictor of exit {exit_name!r}"
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.shape != shape:
        kind = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array)
        raise ConfigError(what, got=kind, expected=f"float32 {shape}")
    if not np.isfinite(array).all():
        raise ConfigError(f"{what}: a weight is NaN or infinite")
