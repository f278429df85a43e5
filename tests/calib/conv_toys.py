"""A small residual network in stages, in float and in INT8: what tests of single layers run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

import edge_runtime as er
from calib.int8 import histograms, ranges_of
from calib.sensitivity import Mixes
from edge_runtime import Bundle, Exit, OperatingPoint, Stage, TensorSpec
from edge_runtime.dataset import ImageDataset
from edge_runtime.scheduler import Scheduler
from engines.bundle import BuiltStage, with_variants, write_bundle
from engines.parts import bundle_parts
from engines.preprocess import PreprocessSpec, camera_image, preprocess_stage
from engines.quantize import activations, quantize
from engines.verify import run_stages
from tests.calib.precision_toys import quiet
from tests.engines.classifiers import SIZE, Net
from tests.toys import CLASSES

SAMPLES = 400
WIDTH = 5
PIXELS = TensorSpec("pixels", ("batch", 3, SIZE, SIZE), "float32")
FEATURES = TensorSpec("features", ("batch", WIDTH, SIZE, SIZE), "float32")
DEEP = TensorSpec("deep", ("batch", WIDTH, SIZE, SIZE), "float32")
STAGES = {
    "segment1": Stage("segment1", "segment", (PIXELS,), (FEATURES,)),
    "head1": Stage(
        "head1", "head", (FEATURES,), (TensorSpec("early/logits", ("batch", 4), "float32"),)
    ),
    "segment2": Stage("segment2", "segment", (FEATURES,), (DEEP,)),
    "head2": Stage(
        "head2", "head", (DEEP,), (TensorSpec("final/logits", ("batch", 4), "float32"),)
    ),
}
#: The layers of each stage in order, by their names.
LAYERS = {
    "segment1": ("Conv0", "Conv2", "Conv4", "Add5"),
    "head1": ("MatMul2",),
    "segment2": ("Conv0", "Conv2"),
    "head2": ("MatMul2",),
}


def images(count: int = SAMPLES) -> np.ndarray:
    """Smooth pictures of different colours, shape (count, 8, 8, 3) uint8."""
    rng = np.random.default_rng(4)
    ramp = np.linspace(-1, 1, SIZE)
    colour, across, down = rng.uniform(-1, 1, (3, count, 1, 1, 3))
    picture = colour + across * ramp[None, None, :, None] + down * ramp[None, :, None, None]
    return np.clip(128 + 45 * picture, 0, 255).astype(np.uint8)


def float_bundle(out: Path) -> Bundle:
    """The network in FP32, with logits that are neither too sure nor all of one class."""
    spec = PreprocessSpec((SIZE, SIZE), range=(-1.0, 1.0))
    before = preprocess_stage(
        spec, camera_image(3, (SIZE, SIZE)), name="preprocess", output="pixels"
    )
    models = {"segment1": _segment1(), "segment2": _segment2()}
    models |= {name: _head(name, np.eye(WIDTH)) for name in ("head1", "head2")}
    facts = {"name": "conv", "classes": CLASSES, "image": before.stage.inputs[0]}
    exits = (Exit("early", "early/logits"), Exit("final", "final/logits"))

    def write() -> Bundle:
        stages = [before, *(BuiltStage(STAGES[name], {"fp32": models[name]}) for name in STAGES)]
        return write_bundle(out, stages=stages, exits=exits, provenance={}, overwrite=True, **facts)

    bundle = write()
    known = run_stages(bundle.cascade, {"preprocess": before.default, **models}, images())
    for name in ("head1", "head2"):
        models[name] = _head(name, known[STAGES[name].inputs[0].name].mean(axis=(2, 3)))
    return write()


def int8_bundle(folder: Path, wrong: Mapping[tuple[str, str], float] | None = None) -> Bundle:
    """The network with INT8 variants made by the quantiser.

    Args:
        folder: Where to write it.
        wrong: (stage, tensor) -> factor that its range is multiplied with.
    """
    bundle = float_bundle(folder / "float.bundle")
    parts = bundle_parts(bundle, None, "int8")
    tensors = {part.stage: activations(part.model) for part in parts if part.chosen}
    ranges = ranges_of(histograms(parts, [{"image": images()}], tensors), "minmax", {}).stages
    made = {}
    for part in parts:
        if part.chosen:
            own = dict(ranges[part.stage])
            for (stage, tensor), factor in (wrong or {}).items():
                if stage == part.stage:
                    own[tensor] *= factor
            made[part.stage] = {"int8": quantize(part.model, own).model}
    return with_variants(bundle, made, folder / "int8.bundle", provenance={})


def data_of(bundle: Bundle) -> ImageDataset:
    """Images labelled by the last exit in FP32, with every tenth label wrong."""
    models = {r.name: bundle.stage_model(r.name, "fp32") for r in bundle.manifest.stages}
    labels = run_stages(bundle.cascade, models, images())["final/logits"].argmax(axis=1)
    labels[::10] = (labels[::10] + 1) % 4
    return ImageDataset.from_arrays(images(), labels, CLASSES)


def open_bundle(bundle: Bundle, point: OperatingPoint) -> Scheduler:
    return er.load(bundle, operating_point=point)


def mixes_of(bundle: Bundle, **options) -> Mixes:
    data = data_of(bundle)
    return Mixes(bundle, data, quiet(), lambda point: open_bundle(bundle, point), **options)


def _segment1() -> bytes:
    """Conv; two convolutions with a skip around them."""
    net = Net(3)
    a = net.conv("pixels", 3, WIDTH)
    b = net.conv(a, WIDTH, WIDTH, out="b")
    weight = net.constant(net.rng.standard_normal((WIDTH, WIDTH, 3, 3)).astype(np.float32) / 4)
    branch = net.add("Conv", b, weight, pads=[1, 1, 1, 1])
    net.add("Add", a, branch, out="features")
    return _file(net, "segment1")


def _segment2() -> bytes:
    net = Net(5)
    net.conv(net.conv("features", WIDTH, WIDTH), WIDTH, WIDTH, out="deep")
    return _file(net, "segment2")


def _head(name: str, pooled: np.ndarray) -> bytes:
    """Pooling, and four of the features, centred and scaled, as logits."""
    net = Net(7)
    spread = pooled.std(axis=0)[1:]
    weights = np.eye(WIDTH, 4, -1) * 3 / np.maximum(spread, spread.max() / 3)
    raw = net.add("MatMul", net.pool(STAGES[name].inputs[0].name), net.constant(_single(weights)))
    mean = net.constant(_single(pooled.mean(axis=0) @ weights))
    net.add("Sub", raw, mean, out=STAGES[name].outputs[0].name)
    return _file(net, name)


def _single(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)


def _file(net: Net, stage: str) -> bytes:
    for number, node in enumerate(net.nodes):
        node.name = f"{node.op_type}{number}"
    values = [
        [helper.make_tensor_value_info(s.name, TensorProto.FLOAT, s.shape) for s in specs]
        for specs in (STAGES[stage].inputs, STAGES[stage].outputs)
    ]
    graph = helper.make_graph(net.nodes, stage, *values, net.constants)
    opset = helper.make_opsetid("", 18)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()
