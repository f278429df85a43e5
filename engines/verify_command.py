"""Compare the engines of this device with ONNX Runtime, on labelled images.

Stage by stage on the inputs that the engines themselves have made, and from image to answer at the
operating point: how many samples leave at the same exit with the same label. The same INT8 ranges
can be good on one GPU and poor on another; where samples leave elsewhere, thresholds are to be
chosen anew on the engines of this device.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from edge_runtime import device, options
from edge_runtime.console import Console, percent
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import BackendError
from edge_runtime.load import load
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.prediction import Prediction
from edge_runtime.scheduler import Scheduler
from edge_runtime.schema import plain
from engines.device_parity import AnswerParity, StageParity, answer_parity, stage_parity

#: Images on which stages are compared; answers are compared on all.
_STAGE_SAMPLES = 64


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime verify``."""
    options.add_bundle(parser, backend="tensorrt")
    options.add_operating_point(parser)
    options.add_data(parser)
    parser.add_argument(
        "--samples",
        type=options.count,
        default=_STAGE_SAMPLES,
        help=f"images on which stages are compared (default {_STAGE_SAMPLES}); the answers are "
        "compared on all",
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Compare, show, fail where a stage is out of its tolerance.

    Raises:
        BackendError: A stage failed, or is out of its tolerance.
        BackendUnavailable: There is no TensorRT, or no GPU.
    """
    bundle = Bundle.open(args.bundle)
    data = options.open_data(args, bundle)
    with options.open_cascade(args, bundle, data, args.operating_point) as cascade:
        point = cascade.point
        answers = _answers(cascade, data, f"answers of {args.backend}", console)
    everything = OperatingPoint.all_exits(bundle.cascade, variants=point.variants)
    with options.open_cascade(args, bundle, data, everything, time_stages=True) as cascade:
        some = data.balanced(min(args.samples, len(data)), args.seed)
        images = (some.image(i)[None] for i in range(len(some)))
        stages = stage_parity(
            bundle, cascade, console.progress(images, "comparing stages", len(some))
        )
    height, width, _ = data.image(0).shape
    with load(bundle, operating_point=point, image_size=(height, width)) as cascade:
        references = _answers(cascade, data, "answers of ONNX Runtime", console)
    parity = answer_parity(answers, references, data.labels)
    _show(stages, parity, point, bundle, args.backend, console)
    bad = [name for name, one in stages.items() if not one.ok]
    result = {
        "bundle": bundle.hash,
        "data": data.hash,
        "backend": args.backend,
        "operating_point": plain(point),
        "stages": {name: {**_plain(one), "ok": one.ok} for name, one in stages.items()},
        "answers": {**plain(parity), "refit": parity.refit},
        "device": device.fingerprint(),
    }
    if bad:
        console.finish(result)
        raise BackendError(
            f"{', '.join(bad)}: outputs are further from ONNX Runtime's than the precision explains",
            stage=bad[0],
            remedy=f"Build the engines anew (edge-runtime build {bundle.path} --force); if it "
            "stays, run these stages at another precision",
        )
    return result


def _answers(
    cascade: Scheduler, data: ImageDataset, title: str, console: Console
) -> list[Prediction]:
    indices = console.progress(range(len(data)), title)
    return [cascade.classify(data.image(i)[None])[0] for i in indices]


def _plain(one: StageParity) -> dict[str, Any]:
    return {name: getattr(one, name) for name in ("precision", "tolerance", "worst", "mean")}


def _show(
    stages: Mapping[str, StageParity],
    parity: AnswerParity,
    point: OperatingPoint,
    bundle: Bundle,
    backend: str,
    console: Console,
) -> None:
    console.table(
        f"{backend} against ONNX Runtime, each stage on the same inputs",
        ("stage", "precision", "worst relative error", "mean", "allowed", "verdict"),
        [
            (
                one.stage,
                one.precision,
                f"{one.worst:.1e}" if one.finite else "not finite",
                f"{one.mean:.1e}",
                f"{one.tolerance:.0e}",
                "ok" if one.ok else "TOO FAR",
            )
            for one in stages.values()
        ],
    )
    console.table(
        f"at operating point {point.name!r}, {parity.samples} images",
        ("exit", f"leaving on {backend}", "on ONNX Runtime"),
        [(name, percent(a), percent(b)) for name, (a, b) in parity.rates.items()],
    )
    console.line(f"same exit and label: {percent(parity.same)}")
    console.line(
        f"accuracy: {percent(parity.accuracy)}, on ONNX Runtime {percent(parity.reference_accuracy)}"
    )
    if parity.refit:
        console.line(
            "Thresholds should be chosen anew on this device: "
            f"edge-runtime thresholds {bundle.path} --backend {backend} --data DIR"
        )
    else:
        console.line("The thresholds hold on this device.")
