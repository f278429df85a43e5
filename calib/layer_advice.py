"""Which layers are better kept float, and what that is worth.

A layer hurts where it alone surely changes more than `NOTEWORTHY` of an exit's labels (95 % Wilson
interval), and at least `STANDS_OUT` times as many as the median of the other layers: where all
layers are alike there is none whose exclusion is the cure. Labels are what counts, whether they
were right or not: on some thousand images they tell far smaller effects apart than accuracy does.
What the cure is worth is measured too: the INT8 variant of the stage without the layers that hurt.

```
for remedy in remedies(mixes, effects, thresholds, open_bundle):
    remedy.exclude_nodes                                        # "^(node_Conv_90)$"
    remedy.before.agreement_loss, remedy.after.agreement_loss   # 0.071, 0.012
```
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from calib.layer_sensitivity import (
    FLOAT,
    INT8,
    LayerEffect,
    OpenBundle,
    layer_models,
    run_model,
    worst_first,
)
from calib.sensitivity import Mixes, StageEffect, compare
from edge_runtime.manifest import Bundle, StageRecord

#: Share of an exit's labels that a layer may change, and how far above the others one stands out.
NOTEWORTHY, STANDS_OUT = 0.02, 3.0


@dataclass(frozen=True, slots=True)
class Remedy:
    """What a stage gains where the layers that hurt stay float.

    Attributes:
        stage: The stage.
        worst: Effects of these layers, the worst first.
        exclude_nodes: Regular expression of their names, for ``edge-runtime quantize``.
        whole: Whether the stage has no other layer.
        elsewhere: Other stages of which the expression would exclude something, too.
        before: What the stage's INT8 variant does.
        after: What it does without these layers.
    """

    stage: str
    worst: tuple[LayerEffect, ...]
    exclude_nodes: str
    whole: bool
    elsewhere: tuple[str, ...]
    before: StageEffect
    after: StageEffect

    @property
    def helps(self) -> bool:
        """Whether the variant changes fewer labels without these layers."""
        return self.after.agreement_loss < self.before.agreement_loss


def hurting(effects: Collection[LayerEffect], samples: int) -> tuple[LayerEffect, ...]:
    """The layers that hurt, by this module's criterion, the worst first.

    Args:
        effects: Of all layers that were looked at.
        samples: Number of images that they were measured on.
    """
    found = []
    for one in worst_first(effects):
        others = [other.agreement_loss for other in effects if other is not one]
        bound = STANDS_OUT * statistics.median(others) if others else 0.0
        surely = _surely(one.agreement_loss, samples)
        if surely > NOTEWORTHY and one.agreement_loss >= bound:
            found.append(one)
    return tuple(found)


def remedies(
    mixes: Mixes,
    effects: Collection[LayerEffect],
    thresholds: Mapping[str, float | None],
    open_bundle: OpenBundle,
) -> tuple[Remedy, ...]:
    """Measure what stages gain where the layers that hurt stay float.

    Args:
        mixes: Bundle, data, signal and base.
        effects: Of all layers that were looked at.
        thresholds: Exit name -> threshold at which the base runs.
        open_bundle: Opens a bundle at an operating point.

    Returns:
        One remedy per stage that has a layer which hurts; empty where there is none.
    """
    worst = hurting(effects, len(mixes.data))
    found = []
    for stage in dict.fromkeys(effect.stages[0] for effect in effects):
        own = tuple(effect for effect in worst if effect.stages[0] == stage)
        if own:
            found.append(_remedy(mixes, stage, own, thresholds, open_bundle))
    return tuple(found)


def exclusion(nodes: Collection[str]) -> str:
    """A regular expression that is found in these names of nodes and in no other."""
    names = (
        "".join(re.escape(c) if c.isprintable() else repr(c)[1:-1] for c in node) for node in nodes
    )
    return f"^({'|'.join(names)})$"


def _remedy(
    mixes: Mixes,
    stage: str,
    worst: tuple[LayerEffect, ...],
    thresholds: Mapping[str, float | None],
    open_bundle: OpenBundle,
) -> Remedy:
    nodes = [effect.node for effect in worst]
    models = layer_models(mixes.bundle, stage, mixes.base)
    rest = [layer.node for layer in models.layers if layer.node not in nodes]
    without = run_model(mixes, stage, models.build(rest), open_bundle)
    tables = mixes.judged({stage: INT8}), without
    before, after = (
        StageEffect((stage,), INT8, *compare(mixes, table, thresholds)) for table in tables
    )
    expression = exclusion(nodes)
    elsewhere = tuple(
        record.name
        for record in mixes.bundle.manifest.stages
        if record.name != stage
        and record.kind != "preprocess"
        and any(re.search(expression, name) for name in _quantizable(mixes.bundle, record))
    )
    return Remedy(stage, worst, expression, not rest, elsewhere, before, after)


def _quantizable(bundle: Bundle, record: StageRecord) -> Iterator[str]:
    """Names of the nodes that an expression could keep float."""
    from engines.onnx_package import onnx
    from engines.quantize import OP_TYPES, node_names

    if FLOAT in record.variants:
        graph = onnx.load_model_from_string(bundle.stage_model(record.name, FLOAT)).graph
        for name, node in zip(node_names(graph), graph.node, strict=True):
            if node.op_type in OP_TYPES:
                yield name


def _surely(share: float, samples: int) -> float:
    """Lower end of the 95 % Wilson interval of a share.

    Reference:
        Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    z = 1.96
    middle = share + z * z / (2 * samples)
    half = z * math.sqrt(share * (1 - share) / samples + (z / (2 * samples)) ** 2)
    return (middle - half) / (1 + z * z / samples)
