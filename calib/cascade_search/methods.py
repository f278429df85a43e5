"""Ways to run a cascade: metric, ensemble, temperature; and the twelve of the paper's Figure 3."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from calib.cascade_search.exits import Alone, Ensemble, Exits, Models, MostConfident
from calib.cascade_search.means import mean_exits
from calib.cascade_search.signals import JudgedModels, Metric, Signal
from calib.model_table import ModelTable
from edge_runtime import confidence
from edge_runtime.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """How exits judge and answer.

    Attributes:
        metric: The signal.
        ensemble: How a later exit uses the models before it.
        scaled: Whether each model's logits are divided by its temperature; "TS" in a name.
    """

    metric: Metric = "max_softmax"
    ensemble: Ensemble = "none"
    scaled: bool = False

    @property
    def signal(self) -> Signal:
        """The kind of signal of each model by itself."""
        return Signal(self.metric, self.scaled)

    @property
    def means(self) -> bool:
        """Whether logits or probabilities of several models are averaged."""
        return self.ensemble.startswith("mean_")

    def __str__(self) -> str:
        how = "" if self.ensemble == "none" else f"{self.ensemble} by "
        return f"{how}{self.metric}{', TS' if self.scaled else ''}"

    def check(self, table: ModelTable) -> None:
        """Refuse a method that averages logits which the table lacks.

        Raises:
            ConfigError: A model has none.
        """
        if not self.means:
            return
        for name in table.names:
            if name not in table.with_logits:
                raise ConfigError(
                    f"table {table.path}: the model {name!r} has no logits",
                    remedy=f"{self.ensemble} needs them: use --ensemble none or comparison",
                )


#: The twelve methods of Figure 3, in its order: the four metrics alone, the same compared, means.
COMPARED: tuple[Method, ...] = (
    *(Method(metric) for metric in confidence.METRICS),
    *(Method(metric, "comparison", True) for metric in confidence.METRICS),
    Method(ensemble="mean_logits"),
    Method(ensemble="mean_logits", scaled=True),
    Method(ensemble="mean_softmax"),
    Method(ensemble="mean_softmax", scaled=True),
)


def exits_of(
    method: Method,
    table: ModelTable,
    judged: JudgedModels,
    cascades: Collection[Models],
    *,
    top: int = 1,
    temperatures: Mapping[str, float] | None = None,
    averaged: Callable[[int], None] = lambda _: None,
) -> Exits:
    """What the exits of cascades say by a method.

    Args:
        method: How they judge and answer.
        table: Logits, which only means need again.
        judged: Each model by itself, by `method.signal` among others.
        cascades: Those that will be asked for; for means it takes long to judge them.
        top: As of `judge`.
        temperatures: As of `judge`.
        averaged: Called with the number of samples that were averaged since the last call.

    Raises:
        ConfigError: An array can't be read.
    """
    models = judged.of(method.signal)
    if method.ensemble == "none":
        return Alone(models)
    if method.ensemble == "comparison":
        return MostConfident(models)
    return mean_exits(
        table,
        models,
        cascades,
        softmax=method.ensemble == "mean_softmax",
        metric=method.metric,
        top=top,
        temperatures=temperatures if method.scaled else None,
        judged=averaged,
    )


def signals_of(methods: Sequence[Method]) -> list[Signal]:
    """The kinds of signal that some methods need, each once."""
    return list(dict.fromkeys(method.signal for method in methods))
