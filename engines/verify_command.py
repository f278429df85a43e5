"""Compare the engines of this device with ONNX Runtime, on labelled images.

Stage by stage on the inputs that the engines themselves have made, and from image to answer at the
operating point: how many samples leave at the same exit with the same label. The same INT8 ranges
can be good on one GPU and poor on another; where samples leave elsewhere, thresholds are to be
chosen anew on the engines of this device.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from typing import Any

from edge_runtime import device, options
from edge_runtime.backends.cuda.backend import CudaBackend
from edge_runtime.backends.tensorrt.stages import TensorRTStages
from edge_runtime.console import Console, percent
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import BackendError
from edge_runtime.load import DEFAULT_POINT, load, new_backend
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.prediction import Prediction
from edge_runtime.scheduler import Scheduler, image_axes
from edge_runtime.schema import plain
from engines.device_parity import AnswerParity, StageParity, answer_parity, backend_parity

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
    point = bundle.operating_point(args.operating_point or DEFAULT_POINT)
    stages = _stages(args, bundle, data, point.variants, console)
    _show_stages(stages, args.backend, console)
    result = {
        "bundle": bundle.hash,
        "data": data.hash,
        "backend": args.backend,
        "operating_point": plain(point),
        "stages": {name: {**_plain(one), "ok": one.ok} for name, one in stages.items()},
        "device": device.fingerprint(),
    }
    bad = [name for name, one in stages.items() if not one.ok]
    if bad:
        console.finish(result)
        raise BackendError(
            f"{', '.join(bad)}: outputs are further from ONNX Runtime's than their precision "
            "explains",
            stage=bad[0],
            remedy=f"Build the engines anew: edge-runtime build {_path(bundle)} --force. If it "
            "stays, run these stages at another precision",
        )
    parity = _answers(args, bundle, data, point, console)
    _show_answers(parity, point, bundle, args.backend, console)
    return {**result, "answers": {**plain(parity), "refit": parity.refit}}


def _stages(
    args: argparse.Namespace,
    bundle: Bundle,
    data: ImageDataset,
    variants: Mapping[str, str],
    console: Console,
) -> dict[str, StageParity]:
    """Every stage of the bundle on its own, on some of the images."""
    height, width, _ = data.image(0).shape
    plan = bundle.cascade.plan(range(len(bundle.cascade.exits)))
    axes = image_axes(plan, (height, width))
    some = data.balanced(args.samples, args.seed)
    images = (some.image(i)[None] for i in range(len(some)))
    shown = console.progress(images, "comparing stages", len(some))
    with new_backend(args.backend, bundle, options.backend_options(args)) as backend:
        backend.open(plan, axes, variants)
        if isinstance(backend, CudaBackend) and isinstance(backend.stages, TensorRTStages):
            console.line(str(backend.stages.scratch))
        return backend_parity(bundle, backend, plan, axes, shown)


def _answers(
    args: argparse.Namespace,
    bundle: Bundle,
    data: ImageDataset,
    point: OperatingPoint,
    console: Console,
) -> AnswerParity:
    """From image to answer, on all images."""
    with options.open_cascade(args, bundle, data, point) as cascade:
        answers = _classify(cascade, data, f"answers of {args.backend}", console)
        exits = cascade.exits
    height, width, _ = data.image(0).shape
    with load(bundle, operating_point=point, image_size=(height, width)) as reference:
        references = _classify(reference, data, "answers of ONNX Runtime", console)
    return answer_parity(answers, references, data.labels, exits)


def _classify(
    cascade: Scheduler, data: ImageDataset, title: str, console: Console
) -> list[Prediction]:
    indices = console.progress(range(len(data)), title)
    return [cascade.classify(data.image(i)[None])[0] for i in indices]


def _plain(one: StageParity) -> dict[str, Any]:
    names = ("precision", "tolerance", "worst", "mean", "finite", "count")
    return {name: getattr(one, name) for name in names}


def _path(bundle: Bundle) -> str:
    return shlex.quote(str(bundle.path))


def _show_stages(stages: Mapping[str, StageParity], backend: str, console: Console) -> None:
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
                _verdict(one),
            )
            for one in stages.values()
        ],
    )


def _verdict(one: StageParity) -> str:
    if not one.count:
        return "not compared"
    return "ok" if one.ok else "TOO FAR"


def _show_answers(
    parity: AnswerParity, point: OperatingPoint, bundle: Bundle, backend: str, console: Console
) -> None:
    console.table(
        f"at operating point {point.name!r}, {parity.samples} images",
        ("exit", f"leaving on {backend}", "on ONNX Runtime"),
        [(name, percent(a), percent(b)) for name, (a, b) in parity.rates.items()],
    )
    console.line(f"same exit and label: {percent(parity.same)}")
    accuracies = percent(parity.accuracy), percent(parity.reference_accuracy)
    console.line("accuracy: {}, on ONNX Runtime {}".format(*accuracies))
    if parity.refit:
        console.line(
            "Thresholds should be chosen anew on this device: "
            f"edge-runtime thresholds {_path(bundle)} --backend {backend} --data DIR"
        )
    else:
        console.line("The thresholds hold on this device.")
