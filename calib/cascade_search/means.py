"""Mean ensembling: one pass over the logits of all models at once, for all cascades of them.

A block of samples is read of every model; on it the mean of each pair, and of each triple, is
judged. So a table is read once however many cascades there are, and never is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from calib.cascade_search.exits import Mean, Models
from calib.cascade_search.signals import Judgement, Metric, judge_values, right_answers
from calib.model_table import ModelTable
from edge_runtime.errors import BackendError, ConfigError

#: Bytes of a model's logits per block: those of two models and their mean stay in a core's cache.
_BLOCK_BYTES = 2**18
_NO_SIGNAL = np.empty(0, np.float32)
_TINY = np.finfo(np.float32).tiny


def mean_exits(
    table: ModelTable,
    models: Mapping[str, Judgement],
    cascades: Collection[Models],
    *,
    softmax: bool,
    metric: Metric,
    top: int = 1,
    temperatures: Mapping[str, float] | None = None,
    judged: Callable[[int], None] = lambda _: None,
) -> Mean:
    """Judge the means of the models of cascades.

    The mean of logits is judged as the logits of one model are. Of a mean of probabilities the
    logarithm is: these are logits of which it is the softmax.

    Args:
        table: Logits of every model of the cascades.
        models: Each model by itself.
        cascades: Two or three models each; cascades of three bring those of their first two.
        softmax: Whether probabilities are averaged, not logits.
        metric: The signal of the exits before the last.
        top: An answer is right where the label is among so many of the largest values: 1 or 5.
        temperatures: Model -> temperature that divides its logits first; 1 where absent.
        judged: Called with the number of samples of each block.

    Returns:
        The exits after each of the cascades.

    Raises:
        ConfigError: An array can't be read, or a logit is NaN or infinite.
    """
    samples = len(table)
    together: dict[Models, Judgement] = {}
    thirds: dict[Models, dict[str, NDArray[np.bool_]]] = {}
    for cascade in cascades:
        thirds.setdefault(cascade[:2], {})
        if len(cascade) == 3:
            together[cascade] = Judgement(_NO_SIGNAL, np.empty(samples, bool))
            thirds[cascade[:2]][cascade[2]] = together[cascade].correct
    for pair, after in thirds.items():
        signal = np.empty(samples, np.float32) if after else _NO_SIGNAL
        together[pair] = Judgement(signal, np.empty(samples, bool))
    names = sorted({name for cascade in cascades for name in cascade})
    begin = 0
    for blocks in table.blocks(names, max(1, _BLOCK_BYTES // (4 * (table.classes or 1)))):
        rows = slice(begin, begin + len(blocks[0]))
        begin = rows.stop
        labels = table.labels[rows]
        # Sums beyond float32's range are refused where they are judged.
        with np.errstate(over="ignore"):
            values = {
                name: _values(block, softmax, (temperatures or {}).get(name, 1.0))
                for name, block in zip(names, blocks, strict=True)
            }
            for pair, after in thirds.items():
                two = values[pair[0]] + values[pair[1]]
                together[pair].correct[rows] = right_answers(two, labels, top)
                if after:
                    mean = two / np.float32(2)
                    together[pair].signal[rows] = _signal(table, pair, mean, softmax, metric)
                for third, correct in after.items():
                    correct[rows] = right_answers(two + values[third], labels, top)
        judged(len(labels))
    return Mean(models, together)


def _values(logits: NDArray[np.float32], softmax: bool, temperature: float) -> NDArray[np.float32]:
    """What is averaged."""
    if temperature != 1.0:
        logits = logits / np.float32(temperature)
    if not softmax:
        return logits
    exponent: NDArray[np.float32] = np.exp(logits - logits.max(axis=1, keepdims=True))
    exponent /= np.add.reduce(exponent, axis=1)[:, None]
    return exponent


def _signal(
    table: ModelTable, pair: Models, mean: NDArray[np.float32], softmax: bool, metric: Metric
) -> NDArray[np.float32]:
    try:
        return judge_values(np.log(np.maximum(mean, _TINY)) if softmax else mean, metric)
    except BackendError as error:
        raise ConfigError(
            f"table {table.path}: the mean of {pair[0]!r} and {pair[1]!r} differs between classes "
            "by more than float32 holds"
        ) from error
