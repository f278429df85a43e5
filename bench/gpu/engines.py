"""TensorRT engines through the scheduler: their answers, times and memory.

FP32, FP16 and INT8 stages in every execution mode, beside the base model as one engine and the
whole cascade as one engine with `If`, all in one run. `bench.gpu_check` runs it on the digits, in a
process of its own; ``python -m bench.gpu.engines --models all`` adds a ResNet-50, whose engines
take minutes to build.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.gpu.lab import Lab, NotRun, SharedCuda, Times, leaving_at, microseconds
from bench.gpu.precisions import RESNET, Maker, digits, resnet, with_precisions
from bench.gpu.tensorrt import run_alone
from bench.gpu.whole_engine import WholeEngine
from edge_runtime import options
from edge_runtime.backends.cuda.backend import CudaBackend, CudaOptions, open_cuda
from edge_runtime.backends.tensorrt import api
from edge_runtime.backends.tensorrt.keys import engine_key, precision_of
from edge_runtime.backends.tensorrt.stages import TensorRTStages
from edge_runtime.cascade import Stage
from edge_runtime.cli import run_command
from edge_runtime.console import Console
from edge_runtime.engine_cache import EngineCache
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.prediction import Prediction
from edge_runtime.scheduler import Scheduler, image_axes
from edge_runtime.schema import plain
from edge_runtime.timing import ratio
from engines.tensorrt_build import BuiltEngine, build_engine

_MODES = ("graph", "polling", "sync")
_PRECISIONS = ("fp32", "fp16", "int8")
#: Images that every mode answers, and that stages are compared on.
_ANSWERED, _COMPARED = 64, 8
_ROUNDS, _RESAMPLES = 300, 1000
_PAUSE_S = 100e-6

#: Builds an engine of an ONNX model; another one may stand in where there is no builder.
Build = Callable[[bytes, Mapping[str, tuple[int, ...]], str], BuiltEngine]


def check(lab: Lab) -> dict[str, Any]:
    """Engines where TensorRT is installed, in a process of its own."""
    if not api.is_installed():
        raise NotRun("neither tensorrt nor tensorrt_rtx is installed")
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise NotRun(f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}")
    command = [sys.executable, "-m", "bench.gpu.engines", "--json", "-"]
    command += ["--device", str(lab.device), "--package", lab.package]
    command += ["--seconds", f"{max(lab.left_s * 0.4, 0.1):.1f}"]
    return run_alone(command, timeout_s=max(lab.left_s, 1))


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``python -m bench.gpu.engines``."""
    parser.add_argument("--device", type=options.whole, default=0)
    parser.add_argument("--package", choices=("any", "cuda-core", "pycuda"), default="any")
    parser.add_argument("--seconds", type=options.positive, default=30.0, help="of timing")
    parser.add_argument("--models", choices=("digits", "all"), default="digits")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Build, run, compare, time."""
    trt = api.import_tensorrt()
    make = functools.partial(open_cuda, args.package, args.device)
    cuda = SharedCuda(make())
    lab = Lab(cuda.open(), make, device=args.device, package=args.package)
    try:
        with tempfile.TemporaryDirectory() as folder:
            makers: dict[str, Maker] = {"digits": digits}
            if args.models == "all":
                makers[RESNET] = lambda: resnet(Path(folder) / "resnet.bundle")
            found = measure(lab, trt, makers, Path(folder), args.seconds, console)
    finally:
        cuda.close_device()
    console.line(found["summary"])
    return found


def measure(
    lab: Lab,
    trt: Any,
    makers: Mapping[str, Maker],
    folder: Path,
    seconds: float,
    console: Console,
    build: Build | None = None,
) -> dict[str, Any]:
    """All models, one after another.

    Args:
        lab: The device.
        trt: TensorRT.
        makers: Name -> what makes a bundle and images for it.
        folder: Where bundles and engines are written.
        seconds: Of timing.
        console: Shows what is being done.
        build: Builds an engine; TensorRT's builder where None.
    """
    own = build or functools.partial(_build, trt)
    found: dict[str, Any] = {}
    for name, make in makers.items():
        console.note(f"{name} ...")
        bundle, images = make()
        bundle = with_precisions(bundle, images, folder / f"{bundle.manifest.name}.all")
        model = _Model(lab, trt, own, bundle, images, EngineCache(folder / "cache"))
        found[name] = {"not_run": lab.missing(*_MODES)}
        for precision in _PRECISIONS:
            share = seconds / len(makers) / len(_PRECISIONS)
            found[name][precision] = model.at(precision, share)
    return {"module": api.module_name(trt), "version": trt.__version__, **judge(found)}


def judge(found: Mapping[str, Any]) -> dict[str, Any]:
    """Whether all modes agree, and every stage with ONNX Runtime as far as its precision allows."""
    disagree, far, said = [], [], []
    for name, by_precision in found.items():
        for precision, figures in by_precision.items():
            if precision == "not_run":
                continue
            if not figures["modes_agree"]:
                disagree.append(f"{name} {precision}")
            far += [
                f"{name} {precision} {stage}"
                for stage, one in figures["stages"].items()
                if not one["ok"]
            ]
            over = figures["last exit"]["over_one_engine"].get("graph")
            if over is not None:
                said.append(f"{name} {precision} {over[0]:.3f}")
    return {
        "ok": not disagree and not far,
        "summary": "graph at the last exit over the base as one engine: "
        + ("; ".join(said) or "no mode graph here")
        + "".join(f"; answers differ: {one}" for one in disagree)
        + "".join(f"; too far from ONNX Runtime: {one}" for one in far),
        "answers_differ": disagree,
        "too_far": far,
        "models": dict(found),
    }


def _build(
    trt: Any, model: bytes, shapes: Mapping[str, tuple[int, ...]], stage: str
) -> BuiltEngine:
    return build_engine(trt, model, shapes, stage=stage)


class _Model:
    """One bundle on the device."""

    def __init__(
        self,
        lab: Lab,
        trt: Any,
        build: Build,
        bundle: Bundle,
        images: NDArray[np.uint8],
        cache: EngineCache,
    ) -> None:
        self._lab, self._trt, self._build = lab, trt, build
        self._bundle, self._cache = bundle, cache
        self._images = images[:_ANSWERED]
        self._size = (images.shape[1], images.shape[2])
        cascade = bundle.cascade
        self._axes = image_axes(cascade.plan(range(len(cascade.exits))), self._size)

    def at(self, precision: str, seconds: float) -> dict[str, Any]:
        """All that is to be known of one precision.

        Args:
            precision: Of every stage that has it.
            seconds: Of timing.
        """
        bundle = self._bundle
        variants = {
            record.name: precision
            for record in bundle.manifest.stages
            if record.kind != "preprocess" and precision in record.variants
        }
        built = self._build_stages(variants)
        exits = len(bundle.cascade.exits)
        answers = self._answers(variants)
        found: dict[str, Any] = {
            "build": built,
            "modes_agree": len({str(said) for said in answers.values()}) <= 1,
            "same_as_onnxruntime": self._same_as_onnxruntime(variants, answers),
            "stages": self._stages(variants),
        }
        places = {"first exit": 0, "last exit": exits - 1}
        for place, k in places.items():
            found[place] = self._times(variants, k, seconds / len(places))
        found["scratch_bytes"] = self._scratch
        return found

    def _build_stages(self, variants: Mapping[str, str]) -> dict[str, Any]:
        """Engines of all stages, into the cache."""
        device = api.engine_device(self._trt, self._lab.cuda.facts)
        found = {}
        for stage in self._bundle.cascade.stages:
            resolved = Stage(
                stage.name,
                stage.kind,
                tuple(spec.resolve(self._axes) for spec in stage.inputs),
                tuple(spec.resolve(self._axes) for spec in stage.outputs),
            )
            precision = precision_of(self._bundle, resolved, variants)
            key = engine_key(self._bundle, resolved, precision, batch=1, device=device)
            if self._cache.find(key) is None:
                model = self._bundle.stage_model(stage.name, precision)
                built = self._build(model, key.shapes, f"{stage.name} {precision}")
                self._cache.store(key, built.plan, {})
                found[stage.name] = {
                    "seconds": built.seconds,
                    "layers": plain(built.layers),
                    "bytes": len(built.plan),
                }
        return found

    def _open(self, point: OperatingPoint, mode: str, **more: Any) -> Scheduler:
        stages = TensorRTStages(self._bundle, self._cache, module=self._trt)
        settings = CudaOptions(mode=mode, **more)  # type: ignore[arg-type]
        backend = CudaBackend(stages, settings, cuda=self._lab.cuda)
        return Scheduler(self._bundle.cascade, backend, point, image_size=self._size)

    def _point(self, variants: Mapping[str, str]) -> OperatingPoint:
        """Thresholds at which images leave everywhere: the middle of the signals."""
        names = [exit_.name for exit_ in self._bundle.cascade.exits]
        everything = OperatingPoint.all_exits(self._bundle.cascade, variants=variants)
        with self._open(everything, "sync") as scheduler:
            signals = [
                [run.signal for run in _one(scheduler(image)).trace.exits] for image in self._images
            ]
        middle = np.median(np.array(signals), axis=0)
        thresholds = {name: float(value) for name, value in zip(names[:-1], middle, strict=False)}
        return OperatingPoint(
            "middle", metric="logits_margin", thresholds=thresholds, variants=variants
        )

    def _answers(self, variants: Mapping[str, str]) -> dict[str, list[tuple[str, int]]]:
        """What every mode says: exit and label of each image."""
        self._middle = self._point(variants)
        found = {}
        for mode in self._lab.modes(*_MODES):
            with self._open(self._middle, mode) as scheduler:
                said = [_one(scheduler(image)) for image in self._images]
            found[mode] = [(one.exit, one.label) for one in said]
        return found

    def _same_as_onnxruntime(
        self, variants: Mapping[str, str], answers: Mapping[str, list[tuple[str, int]]]
    ) -> float:
        """Share of images with the same exit and label as on ONNX Runtime."""
        from edge_runtime.load import load

        with load(self._bundle, operating_point=self._middle, image_size=self._size) as cascade:
            said = [_one(cascade(image)) for image in self._images]
        own = next(iter(answers.values()))
        same = [(one.exit, one.label) == have for one, have in zip(said, own, strict=True)]
        return float(np.mean(same))

    def _stages(self, variants: Mapping[str, str]) -> dict[str, Any]:
        """Each stage against ONNX Runtime on the same inputs."""
        from engines.device_parity import stage_parity

        everything = OperatingPoint.all_exits(self._bundle.cascade, variants=variants)
        with self._open(everything, "sync", time_stages=True) as scheduler:
            images = (image[None] for image in self._images[:_COMPARED])
            found = stage_parity(self._bundle, scheduler, images)
            image = self._images[0]
            durations = [
                {run.stage: run.duration_s for run in _one(scheduler(image)).trace.stages}
                for _ in range(self._lab.count(50, least=2))
            ]
        return {
            name: {
                "worst": one.worst,
                "mean": one.mean,
                "allowed": one.tolerance,
                "ok": one.ok,
                "us": microseconds([took[name] for took in durations]),
            }
            for name, one in found.items()
        }

    def _times(self, variants: Mapping[str, str], k: int, seconds: float) -> dict[str, Any]:
        """Every way to run one image that leaves at an exit, in turn."""
        image = self._images[0]
        cascade = self._bundle.cascade
        leaving = replace(leaving_at(cascade, k), variants=variants)
        with ExitStack() as stack:
            subjects: dict[str, Callable[[], object]] = {}
            for mode in self._lab.modes(*_MODES):
                scheduler = stack.enter_context(self._open(leaving, mode))
                subjects[mode] = functools.partial(scheduler, image)
                assert isinstance(scheduler.backend, CudaBackend)
                stages = scheduler.backend.stages
                assert isinstance(stages, TensorRTStages)
                self._scratch = plain(stages.scratch)
            whole = functools.partial(self._whole, stack, variants)
            last = OperatingPoint("base", policy="never", variants=variants)
            base = whole(last, "one engine")
            subjects["one engine"] = functools.partial(base, image)
            with_if = whole(leaving, "one engine with If")
            subjects["one engine with If"] = functools.partial(with_if, image)
            times = self._lab.measure(
                subjects,
                rounds=self._lab.count(_ROUNDS, least=4),
                seconds=seconds,
                pause_s=_PAUSE_S,
            )
        return figures(times)

    def _whole(
        self, stack: ExitStack, variants: Mapping[str, str], point: OperatingPoint, name: str
    ) -> WholeEngine:
        """The cascade at a point as one engine."""
        from engines.monolith import if_model

        stages = self._bundle.cascade.stages
        own = {stage.name: precision_of(self._bundle, stage, variants) for stage in stages}
        spec = self._bundle.cascade.image.resolve(self._axes)
        shape = (1, *spec.sample_shape())
        model = if_model(self._bundle, point, own)
        plan = self._build(model, {spec.name: shape}, name).plan
        engine = WholeEngine(self._lab.cuda, self._trt, plan, spec.name, shape)
        return stack.enter_context(engine)


def figures(times: Times) -> dict[str, Any]:
    """Medians, and ratios to the base as one engine and to the cascade as one engine with If."""

    def over(name: str) -> dict[str, list[float]]:
        found = {
            one: ratio(seconds, times[name], resamples=_RESAMPLES)
            for one, seconds in times.items()
            if one != name
        }
        return {one: [r.value, r.low, r.high] for one, r in found.items()}

    return {
        "us": {name: microseconds(seconds) for name, seconds in times.items()},
        "over_one_engine": over("one engine"),
        "over_one_engine_with_if": over("one engine with If"),
        "rounds": len(times["one engine"]),
    }


def _one(prediction: Prediction | list[Prediction]) -> Prediction:
    assert isinstance(prediction, Prediction)
    return prediction


if __name__ == "__main__":
    sys.exit(run_command("python -m bench.gpu.engines", sys.modules[__name__], sys.argv[1:]))
