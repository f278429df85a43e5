r"""Compare precisions of the network: all stages at one, thresholds as they were and chosen anew.

    python examples/cifar10/compare.py cifar10/cifar10.bundle cifar10/minmax.bundle:int8 \
        cifar10/mse.bundle:int8 --thresholds cifar10/thresholds.npz --test cifar10_val

The first bundle gives the old thresholds and the times of the stages, so that all rows are chosen
alike. ONNX Runtime's CPU provider computes FP16 in FP32.
"""

from __future__ import annotations

import argparse

from calib.exit_table import CostModel, ExitTable
from calib.tables import collect, exit_table, stage_seconds
from calib.thresholds import AccuracyDrop, choose
from edge_runtime import Bundle, OperatingPoint, load
from edge_runtime.confidence import Metric
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset

METRIC: Metric = "max_softmax"
DROP = AccuracyDrop(0.01)


def main() -> None:
    """Print a row per bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE[:PRECISION]")
    parser.add_argument("--thresholds", required=True, help="images that thresholds are chosen on")
    parser.add_argument("--test", required=True, help="images of the figures")
    args = parser.parse_args()
    console = Console()
    costs, old, rows = None, None, []
    for name in args.bundles:
        path, _, precision = name.partition(":")
        bundle = Bundle.open(path)
        stages = bundle.manifest.stages if precision else ()
        variants = {stage.name: precision for stage in stages if precision in stage.variants}
        classes = bundle.cascade.classes
        chosen_on, test = (ImageDataset.open(p, classes) for p in (args.thresholds, args.test))
        point = OperatingPoint.all_exits(bundle.cascade, variants=variants)
        with load(bundle, operating_point=point, image_size=(32, 32)) as cascade:
            if costs is None:
                times = stage_seconds(cascade, chosen_on, console)
                costs = CostModel.from_stages(bundle.cascade, *times)
            known, new = (
                exit_table(collect(cascade, data, console), METRIC) for data in (chosen_on, test)
            )
        anew = choose(known, costs, DROP, repeats=0).point.thresholds
        old = anew if old is None else old
        rows.append(
            [
                name,
                f"{new.correct[:, -1].mean():.2%}",
                f"{accuracy(new, old):.2%}",
                f"{accuracy(new, anew):.2%}",
                f"{(new.leave_at(anew) == 0).mean():.2%}",
            ]
        )
    console.table(
        f"{len(test)} images",
        ["bundle", "last exit", "old thresholds", "chosen anew", "leaving at the first"],
        rows,
    )


def accuracy(table: ExitTable, thresholds: tuple[float | None, ...]) -> float:
    """Share of samples that are right where they leave."""
    leave_at = table.leave_at(thresholds)
    return float(table.correct[range(table.samples), leave_at].mean())


if __name__ == "__main__":
    main()
