"""Fits a gate: predictors of the error of each path, from tables of what every path says.

Two tables are needed. On the validation data targets are made and training is stopped; the training
data should be neither that nor what the exits were trained on, whose answers look too good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.quee.table import PathTable
from calib.quee.targets import find_clusters, targets
from edge_runtime.console import Console
from edge_runtime.errors import CalibrationError, ConfigError, missing_package
from edge_runtime.gate import check_trade_off
from edge_runtime.gate_model import ErrorPredictor, GateKind, GateModel, input_features
from edge_runtime.paths import Levels, Paths

#: Inputs are standardised while training; one that hardly varies is not blown up further than this.
_LEAST_SPREAD = 0.05
#: Keeps the first guess of an error within what a sigmoid says easily.
_LEAST_ERROR = 0.01


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How predictors are trained; the defaults are the paper's where it has any.

    Attributes:
        clusters: K, for the targets; >= 1. The paper's best are 20 to 70.
        hidden: Hidden units, >= 1; 16 or 32 in the paper.
        seed: Of K-means, first weights and order of samples.
        max_epochs: The most passes over the training data, >= 1.
        patience: Epochs without a better validation loss after which a predictor is done, >= 1.
        batch: Samples per step, >= 1.
        learning_rate: Of Adam, > 0.
        weight_decay: Of Adam, >= 0.
    """

    clusters: int = 20
    hidden: int = 32
    seed: int = 0
    max_epochs: int = 200
    patience: int = 15
    batch: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        """Refuse what can't be trained with."""
        for name in ("clusters", "hidden", "max_epochs", "patience", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(name, got=getattr(self, name), expected=">= 1")
        if not 0 < self.learning_rate < 1 or not 0 <= self.weight_decay < 1:
            raise ConfigError(
                "learning rate and weight decay",
                got=f"{self.learning_rate} and {self.weight_decay}",
                expected="in (0, 1) and [0, 1)",
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError("seed", got=self.seed, expected="0..2^32 - 1")


def fit_gate(
    train: PathTable, val: PathTable, options: FitOptions, *, console: Console
) -> GateModel:
    """Fit a gate that takes any costs and any lambda at run time.

    Ctrl-C ends the training early; the best so far is kept.

    Args:
        train: What predictors are trained on.
        val: What targets are made from, and training is stopped by; of the same paths.
        options: How.
        console: Shows progress.

    Returns:
        The gate; its figures have the options, the sizes of the tables, and of each exit the
        validation loss (mean squared error) with the one of constant predictions beside it.

    Raises:
        CalibrationError: Too few validation samples for the clusters.
        ConfigError: One exit only, tables of different paths or bundles, or a level
            without a bit width.
        BackendUnavailable: torch or scikit-learn is not installed.
        KeyboardInterrupt: On Ctrl-C before every predictor had an epoch.

    Reference:
        Regol et al., QuEE, 2024, sections 4.2 and 5.2.
    """
    wanted, val_wanted = _targets(train, val, options)
    tasks = [
        _Task.of(train.paths, position, lambda begin: _whole_paths(train.paths, begin))
        for position in range(len(train.paths.exits) - 1)
    ]
    return _fit(train, val, tasks, (wanted, val_wanted), options, console, None)


def fit_one_step(
    train: PathTable,
    val: PathTable,
    options: FitOptions,
    *,
    column: str,
    trade_off: float,
    console: Console,
) -> GateModel:
    """Fit the variant that predicts the least loss behind each next step, for one lambda.

    Args:
        train: As of `fit_gate`.
        val: As of `fit_gate`.
        options: As of `fit_gate`.
        column: The cost in the tables that losses have in them; divided by the largest.
        trade_off: lambda.
        console: As of `fit_gate`.

    Raises:
        ConfigError: As of `fit_gate`, or lambda is negative or not finite, or there is no such
            cost.

    Reference:
        QuEE, appendix 7.3, Eq. 19-24.
    """
    check_trade_off(trade_off)
    wanted, val_wanted = _targets(train, val, options)
    costs = train.column(column)
    losses, val_losses = (
        (part + trade_off * costs / costs.max()).astype(np.float32) for part in (wanted, val_wanted)
    )
    tasks = [
        _Task.of(train.paths, position, lambda begin: _next_steps(train.paths, begin))
        for position in range(len(train.paths.exits) - 1)
    ]
    return _fit(train, val, tasks, (losses, val_losses), options, console, (column, trade_off))


@dataclass(frozen=True)
class _Task:
    """What the predictor of one exit has to learn: pairs of a beginning and an end.

    Attributes:
        position: The exit.
        begins: Beginnings that end there, R of them.
        begin: Index of each pair's beginning, shape (M,).
        codes: Code of each pair's end, shape (M, exits + 1), float32.
        groups: Paths of which the least target is each pair's target, M of them.
    """

    position: int
    begins: tuple[Levels, ...]
    begin: NDArray[np.int64]
    codes: NDArray[np.float32]
    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls,
        paths: Paths,
        position: int,
        ends: Callable[[Levels], Sequence[tuple[Levels, tuple[int, ...]]]],
    ) -> _Task:
        begins = tuple(path for path in paths.paths if len(path) == position + 1)
        pairs = [(i, *end) for i, begin in enumerate(begins) for end in ends(begin)]
        return cls(
            position,
            begins,
            np.array([i for i, _, _ in pairs]),
            paths.codes([end for _, end, _ in pairs]),
            tuple(group for _, _, group in pairs),
        )

    def data(
        self, table: PathTable, wanted: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Features, shape (N, R, 2 * classes + 4), and targets, shape (N, M), float32."""
        features = []
        for begin in self.begins:
            now = table.probabilities[:, table.paths.index(begin)]
            before = None
            if len(begin) > 1:
                before = table.probabilities[:, table.paths.index(begin[:-1])]
            features.append(input_features(now, before))
        least = [wanted[:, list(group)].min(axis=1) for group in self.groups]
        return np.stack(features, axis=1), np.stack(least, axis=1)


def _whole_paths(paths: Paths, begin: Levels) -> list[tuple[Levels, tuple[int, ...]]]:
    return [(paths.paths[i], (i,)) for i in paths.beginning_with(begin)]


def _next_steps(paths: Paths, begin: Levels) -> list[tuple[Levels, tuple[int, ...]]]:
    """To leave, and every next level; behind a level the best of the paths that go on there."""
    ends = sorted({paths.paths[i][: len(begin) + 1] for i in paths.beginning_with(begin)})
    return [
        (end, (paths.index(end),) if end == begin else paths.beginning_with(end)) for end in ends
    ]


def _targets(
    train: PathTable, val: PathTable, options: FitOptions
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Targets of both tables, shapes (N, P)."""
    paths = train.paths
    if len(paths.exits) < 2:
        raise ConfigError("a gate needs exits", got="one", expected="two at least")
    val.check_names(paths)
    if val.paths.paths != paths.paths or val.classes != train.classes:
        raise ConfigError(
            "the validation table has other paths or classes",
            got=f"{len(val.paths)} paths, {val.classes} classes",
            expected=f"the {len(paths)} paths and {train.classes} classes of the training table",
        )
    if val.bundle != train.bundle:
        raise ConfigError(
            "the validation table is of another bundle",
            got=val.bundle[:12] or "none",
            expected=train.bundle[:12] or "none",
        )
    clusters = find_clusters(val, options.clusters, seed=options.seed)
    return targets(clusters, train), targets(clusters, val)


def _fit(
    train: PathTable,
    val: PathTable,
    tasks: Sequence[_Task],
    wanted: tuple[NDArray[np.float32], NDArray[np.float32]],
    options: FitOptions,
    console: Console,
    one_step: tuple[str, float] | None,
) -> GateModel:
    """Train all predictors, an epoch of each in turn, so that Ctrl-C leaves none behind."""
    runs = [
        _Run(
            task, task.data(train, wanted[0]), task.data(val, wanted[1]), options, one_step is None
        )
        for task in tasks
    ]
    interrupted = False
    with console.status("fitting the gate") as show:
        for epoch in range(options.max_epochs):
            try:
                for run in runs:
                    run.epoch()
            except KeyboardInterrupt:
                if epoch == 0:
                    raise
                interrupted = True
                break
            show(f"epoch {epoch + 1}/{options.max_epochs}, " + _said(runs))
            if all(run.done for run in runs):
                break
    if interrupted:
        console.note(f"interrupted: the gate keeps its best so far, {_said(runs)}")
    kind: GateKind = "paths" if one_step is None else "one_step"
    return GateModel(
        bundle=train.bundle,
        classes=train.classes,
        paths=train.paths,
        predictors=tuple(run.predictor() for run in runs),
        figures=_figures(train, val, runs, options, one_step, interrupted),
        kind=kind,
        trade_off=None if one_step is None else float(one_step[1]),
    )


def _said(runs: Sequence[_Run]) -> str:
    return "validation loss " + ", ".join(f"{run.best:.4f}" for run in runs)


def _figures(
    train: PathTable,
    val: PathTable,
    runs: Sequence[_Run],
    options: FitOptions,
    one_step: tuple[str, float] | None,
    interrupted: bool,
) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "options": asdict(options),
        "training_samples": len(train),
        "validation_samples": len(val),
        "interrupted": interrupted,
        "exits": {
            train.paths.exits[run.task.position]: {
                "epochs": run.epochs,
                "best_epoch": run.best_epoch,
                "validation_loss": run.best,
                "constant_loss": run.constant,
            }
            for run in runs
        },
    }
    if one_step is not None:
        figures["column"] = one_step[0]
    return figures


class _Run:
    """The training of one predictor.

    Inputs are standardised, which the predictor's weights undo in the end: at run time it reads
    the features as they are.
    """

    def __init__(
        self,
        task: _Task,
        train: tuple[NDArray[np.float32], NDArray[np.float32]],
        val: tuple[NDArray[np.float32], NDArray[np.float32]],
        options: FitOptions,
        sigmoid: bool,
    ) -> None:
        self.task = task
        self._torch = _import_torch()
        self._options = options
        self._sigmoid = sigmoid
        features, wanted = train
        self._mean, self._spread = _moments(features.reshape(-1, features.shape[-1]))
        self._code_mean, self._code_spread = _moments(task.codes)
        self._train = self._tensors(features, wanted)
        self._val = self._tensors(*val)
        self._codes = self._torch.from_numpy((task.codes - self._code_mean) / self._code_spread)
        self._begin = self._torch.from_numpy(task.begin)
        self._random = self._torch.Generator().manual_seed(options.seed * 1009 + task.position)
        self._weights = self._first_weights(float(wanted.mean()))
        self._optimizer = self._torch.optim.Adam(
            self._weights, lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self._kept = [weight.detach().clone() for weight in self._weights]
        self.constant = float(np.square(val[1] - wanted.mean()).mean())
        self.best = math.inf
        self.best_epoch = 0
        self.epochs = 0

    @property
    def done(self) -> bool:
        """Whether another epoch is not worth it."""
        return self.epochs - self.best_epoch >= self._options.patience

    def epoch(self) -> None:
        """Train once on all samples, and keep the weights if they are the best."""
        if self.done:
            return
        features, wanted = self._train
        order = self._torch.randperm(len(features), generator=self._random)
        for rows in order.split(self._options.batch):
            self._optimizer.zero_grad()
            loss = self._torch.nn.functional.mse_loss(self._predict(features[rows]), wanted[rows])
            loss.backward()
            self._optimizer.step()
        loss = self._validation_loss()
        self.epochs += 1
        if not math.isfinite(loss):
            raise CalibrationError(
                f"the training of the predictor at exit {self.task.position} diverged",
                got=f"validation loss {loss}",
                remedy="Lower the learning rate",
            )
        if loss < self.best:
            self._kept = [weight.detach().clone() for weight in self._weights]
            self.best, self.best_epoch = loss, self.epochs

    def predictor(self) -> ErrorPredictor:
        """The best weights, for features as they are."""
        features, codes, bias, output, output_bias = (w.double().numpy() for w in self._kept)
        features = features / self._spread[:, None]
        codes = codes / self._code_spread[:, None]
        bias = bias - self._mean @ features - self._code_mean @ codes
        arrays = (features, codes, bias, output, output_bias)
        return ErrorPredictor(*(np.ascontiguousarray(a, np.float32) for a in arrays))

    def _tensors(self, features: NDArray[np.float32], wanted: NDArray[np.float32]) -> Any:
        standard = ((features - self._mean) / self._spread).astype(np.float32)
        return self._torch.from_numpy(standard), self._torch.from_numpy(wanted)

    def _predict(self, features: Any) -> Any:
        """Predictions for standardised features (n, R, F), shape (n, M)."""
        weights, code_weights, bias, output, output_bias = self._weights
        own = (features @ weights)[:, self._begin]
        hidden = self._torch.relu(own + (self._codes @ code_weights + bias))
        scores = hidden @ output + output_bias
        return self._torch.sigmoid(scores) if self._sigmoid else scores

    def _validation_loss(self) -> float:
        features, wanted = self._val
        total = 0.0
        with self._torch.no_grad():
            for begin in range(0, len(features), 1024):
                part = slice(begin, begin + 1024)
                total += float((self._predict(features[part]) - wanted[part]).square().sum())
        return total / int(wanted.numel())

    def _first_weights(self, mean: float) -> list[Any]:
        """Uniform as torch's linear layers begin; at first all predictions are near the mean."""
        torch, hidden = self._torch, self._options.hidden
        inputs = len(self._mean) + len(self._code_mean)

        def uniform(bound: float, *shape: int) -> Any:
            return (2 * torch.rand(shape, generator=self._random) - 1) * bound

        if self._sigmoid:
            mean = min(max(mean, _LEAST_ERROR), 1 - _LEAST_ERROR)
            mean = math.log(mean / (1 - mean))
        bound = inputs**-0.5
        weights = [
            uniform(bound, len(self._mean), hidden),
            uniform(bound, len(self._code_mean), hidden),
            uniform(bound, hidden),
            uniform(hidden**-0.5, hidden),
            torch.tensor([mean], dtype=torch.float32),
        ]
        return [weight.requires_grad_() for weight in weights]


def _moments(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and spread of each column, float32."""
    spread = np.maximum(rows.std(axis=0, dtype=np.float64), _LEAST_SPREAD)
    return rows.mean(axis=0, dtype=np.float64).astype(np.float32), spread.astype(np.float32)


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise missing_package("torch", "export") from error
    return torch
