"""How long the variants of stages take on this device, measured in turn.

The variants of a stage differ in speed, which no file shows: one is worth its loss only where it is
clearly faster, and that is a matter of the device.

```
times = variant_times(bundle, "int8", data, console, open_scheduler)
times.faster                    # ("segment1",)
times.not_faster                # {"head1": "not clearly faster here: ..."}
```
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calib.sensitivity import Open, stages_with
from calib.tables import around_seconds, deciding_seconds, durations
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.prediction import Prediction
from edge_runtime.timing import Clock, Ratio, ratio, warm_up

#: Rounds in which both precisions are timed.
_ROUNDS = 400


@dataclass(frozen=True)
class VariantTimes:
    """What stages take at two precisions on this device, measured in turn.

    Attributes:
        precision: The precision that was compared with the base.
        base: Stage name -> its precision in the base, of every stage that an exit needs.
        seconds: Stage name -> precision -> median seconds for one image.
        ratios: Stage name -> time at the precision over that in the base, with its interval; of
            the stages that were compared.
        decide_s: Median seconds per exit that go to deciding.
        frame_s: Median seconds of a frame besides.
        rounds: Number of images that each was timed on.
    """

    precision: str
    base: Mapping[str, str]
    seconds: Mapping[str, Mapping[str, float]]
    ratios: Mapping[str, Ratio]
    decide_s: float = 0.0
    frame_s: float = 0.0
    rounds: int = 0

    @property
    def faster(self) -> tuple[str, ...]:
        """Stages whose whole interval is below 1, in order of execution."""
        return tuple(name for name, one in self.ratios.items() if one.high < 1)

    @property
    def not_faster(self) -> dict[str, str]:
        """Why the other stages are not worth another precision."""
        found = {}
        for name, one in self.ratios.items():
            if one.low > 1:
                found[name] = f"slower here: {one} of its time"
            elif not one.high < 1:
                found[name] = f"not clearly faster here: {one} of its time"
        return found

    def saved(self, stage: str) -> float:
        """Seconds that a stage saves whenever it runs."""
        return self.seconds[stage][self.base[stage]] - self.seconds[stage][self.precision]

    def stage_seconds(self, variants: Mapping[str, str]) -> dict[str, float]:
        """Seconds of each stage when some run at other precisions than in the base."""
        return {
            name: times[variants.get(name, self.base[name])] for name, times in self.seconds.items()
        }


def variant_times(
    bundle: Bundle,
    precision: str,
    data: ImageDataset,
    console: Console,
    open_scheduler: Open,
    *,
    base: Mapping[str, str] | None = None,
    stages: Sequence[str] | None = None,
    rounds: int = _ROUNDS,
    clock: Clock = time.perf_counter,
) -> VariantTimes:
    """Time every stage at two precisions, image by image in turn.

    Both cascades are open at once and run all their exits, so each stage finds the caches as the
    other left them.

    Args:
        bundle: The bundle.
        precision: The precision to compare with the base.
        data: Images.
        console: Shows progress.
        open_scheduler: Opens the bundle at an operating point.
        base: Stage name -> precision, for stages that do not run at their first variant.
        stages: Which stages to compare; None for all that have the variant.
        rounds: How often each is run.
        clock: Monotonic seconds, for the warm-up.

    Raises:
        ConfigError: See `stages_with`.
        BackendError: The backend does not know what a stage takes.
    """
    base = dict(base or {})
    compared = stages_with(bundle, precision, base, stages)
    images = [data.image(i) for i in range(min(len(data), rounds))]
    mixes = (base, {**base, **dict.fromkeys(compared, precision)})
    points = [OperatingPoint.all_exits(bundle.cascade, variants=mix) for mix in mixes]
    with open_scheduler(points[0]) as a, open_scheduler(points[1]) as b:
        some = itertools.cycle(images)

        def each() -> tuple[Prediction, Prediction, float]:
            image = next(some)[None]
            begin = time.perf_counter()
            first = a.classify(image)[0]
            call_s = time.perf_counter() - begin
            return first, b.classify(image)[0], around_seconds(first, call_s)

        warm_up(each, clock=clock)
        names = [stage.name for stage in a.plan.stages]
        took = np.empty((2, len(names), rounds))
        deciding, around = np.empty(rounds), np.empty(rounds)
        for i in console.progress(range(rounds), "timing both precisions"):
            first, second, around[i] = each()
            for which, prediction in enumerate((first, second)):
                took[which, :, i] = list(durations(prediction.trace).values())
            deciding[i] = sum(deciding_seconds(a.plan, first.trace))
        exits = len(a.exits)
    medians = np.median(took, axis=2)
    own = {name: bundle.precision(name, base) for name in names}
    seconds = {name: {own[name]: float(medians[0, i])} for i, name in enumerate(names)}
    for name in compared:
        seconds[name][precision] = float(medians[1, names.index(name)])
    return VariantTimes(
        precision,
        own,
        seconds,
        {name: ratio(took[1, names.index(name)], took[0, names.index(name)]) for name in compared},
        decide_s=float(np.median(deciding)) / exits,
        frame_s=float(np.median(around)),
        rounds=rounds,
    )
