"""The baseline PyTorch eager: the same numbers and exits as ONNX Runtime, or a named refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")

from edge_runtime.backends.onnxrt import OnnxRuntimeOptions, new_session  # noqa: E402
from edge_runtime.cascade import Stage  # noqa: E402
from edge_runtime.errors import ConfigError, EngineBuildError  # noqa: E402
from edge_runtime.load import load  # noqa: E402
from edge_runtime.manifest import Bundle  # noqa: E402
from edge_runtime.operating_point import OperatingPoint  # noqa: E402
from edge_runtime.tensors import TensorSpec  # noqa: E402
from engines.eager import EagerStage, eager_modules, eager_scheduler  # noqa: E402
from engines.preprocess import PreprocessSpec, camera_image, preprocess_model  # noqa: E402
from tests.engines.classifiers import Net, classifier, mobilenet  # noqa: E402
from tests.engines.test_quantize import quantized, residual_net  # noqa: E402
from tests.meta.repository import ROOT  # noqa: E402
from tests.toys import toy_bundle, toy_images  # noqa: E402

pytestmark = pytest.mark.torch

#: Largest relative difference of two libraries that add up in float32.
NEAR = 2e-5
AS_WRITTEN = OnnxRuntimeOptions(optimization="none")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stage_of(model: onnx.ModelProto) -> Stage:
    """A stage with the model's inputs and outputs; shapes are those of the samples."""
    specs = [
        tuple(TensorSpec(value.name, ("batch", 1), "float32") for value in values)
        for values in (model.graph.input, model.graph.output)
    ]
    return Stage("part", "segment", *specs)


def differs(model: onnx.ModelProto, *samples: np.ndarray) -> float:
    """Largest difference from ONNX Runtime over the largest magnitude; shapes have to be equal."""
    blob = model.SerializeToString()
    feeds = dict(zip([value.name for value in model.graph.input], samples, strict=True))
    wanted = new_session(blob, AS_WRITTEN).run(None, feeds)
    module = EagerStage(stage_of(model), blob)
    with torch.inference_mode():
        found = module(*(torch.from_numpy(sample) for sample in samples))
    worst = 0.0
    for want, have in zip(wanted, found, strict=True):
        assert (have.shape, have.numpy().dtype) == (want.shape, want.dtype)
        gap = np.abs(have.numpy().astype(float) - want.astype(float)).max()
        worst = max(worst, float(gap / max(1e-9, np.abs(want.astype(float)).max())))
    return worst


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


IMAGE = random(2, 4, 8, 6)
MATRIX = random(3, 6)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def case(operator: str, sample: np.ndarray, *inputs: np.ndarray | None, **attributes):
    """One node on a sample, with constant inputs behind it."""
    shown = {name: value for name, value in attributes.items() if name != "opset"}
    return pytest.param(operator, sample, inputs, attributes, id=f"{operator} {shown}")


CASES = [
    case("Conv", IMAGE, random(6, 2, 3, 3), random(6), group=2, strides=[2, 1], pads=[1, 1, 1, 1]),
    case("Conv", IMAGE, random(5, 4, 3, 2), pads=[0, 1, 2, 0], dilations=[2, 1]),
    case("Conv", IMAGE, random(5, 4, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2]),
    case("Conv", IMAGE, random(5, 4, 3, 3), auto_pad="SAME_LOWER", strides=[2, 2]),
    case("Conv", random(2, 4, 9), random(5, 4, 3), random(5)),
    case("Gemm", MATRIX, random(5, 6), random(5), transB=1),
    case("Gemm", MATRIX, random(6, 5), random(5)),
    case("Gemm", MATRIX, random(5, 3), random(6, 5), transA=1, transB=1, alpha=0.5, beta=2.0),
    case("Gemm", MATRIX, random(6, 5), alpha=0.5),
    case("MatMul", random(2, 3, 6), random(6, 5)),
    case("MaxPool", IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("MaxPool", IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
    case("MaxPool", IMAGE, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    case("AveragePool", IMAGE, kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    case("AveragePool", IMAGE, kernel_shape=[3, 2], pads=[1, 0, 1, 0], count_include_pad=1),
    case("AveragePool", IMAGE, kernel_shape=[3, 3], pads=[0, 0, 1, 1], count_include_pad=1),
    case("GlobalAveragePool", IMAGE),
    case("BatchNormalization", IMAGE, random(4), random(4), random(4), random(4) ** 2 + 0.1),
    case("LayerNormalization", IMAGE, random(6), random(6), epsilon=1e-3),
    case("LayerNormalization", IMAGE, random(8, 6), axis=2),
    case("InstanceNormalization", IMAGE, random(4), random(4)),
    case("Softmax", IMAGE, axis=1),
    case("LogSoftmax", IMAGE),
    case("Relu", IMAGE),
    case("Gelu", IMAGE, opset=20),
    case("Gelu", IMAGE, approximate="tanh", opset=20),
    case("Erf", IMAGE),
    case("Tanh", IMAGE),
    case("Sigmoid", IMAGE),
    case("HardSigmoid", IMAGE),
    case("HardSigmoid", IMAGE, alpha=1 / 6),
    case("HardSwish", IMAGE),
    case("LeakyRelu", IMAGE, alpha=0.3),
    case("PRelu", IMAGE, random(4, 1, 1)),
    case("Elu", IMAGE),
    case("Softplus", IMAGE),
    case("Clip", IMAGE, floats(-0.5).reshape(()), floats(0.7).reshape(())),
    case("Clip", IMAGE, None, floats(0.7).reshape(())),
    case("Add", IMAGE, random(6)),
    case("Sub", IMAGE, random(6)),
    case("Mul", IMAGE, random(6)),
    case("Div", IMAGE, random(6)),
    case("Div", ints(-7, 7, 9).reshape(3, 1), ints(2)),
    case("Pow", IMAGE, ints(3).reshape(())),
    case("Sqrt", np.abs(IMAGE)),
    case("Max", IMAGE, random(6), floats(0.1)),
    case("Sum", IMAGE, random(6), floats(0.1)),
    case("ReduceMean", IMAGE, ints(2, -1), keepdims=0),
    case("ReduceMean", IMAGE),
    case("ReduceMean", IMAGE, noop_with_empty_axes=1),
    case("ReduceMean", IMAGE, axes=[1], opset=13),
    case("ReduceSum", IMAGE, ints(1)),
    case("ReduceMax", IMAGE, ints(1), keepdims=0),
    case("ReduceL2", IMAGE, ints(1)),
    case("Concat", IMAGE, random(2, 1, 8, 6), axis=1),
    case("Slice", IMAGE, ints(1, -2), ints(2**62, 9), ints(2, -1), ints(2, 1)),
    case("Split", IMAGE, ints(3, 1, 4), axis=2),
    case("Split", IMAGE, axis=2, num_outputs=3),
    case("Split", IMAGE, axis=2, num_outputs=1, outputs=1),
    case("Gather", IMAGE, ints(-1).reshape(()), axis=1),
    case("Gather", IMAGE, ints(2, 0, -1), axis=2),
    case("Gather", IMAGE, ints(2, 0, -1, 1).reshape(2, 2), axis=2),
    case("Reshape", IMAGE, ints(0, -1, 6)),
    case("Flatten", IMAGE, axis=2),
    case("Flatten", IMAGE, axis=-1),
    case("Transpose", IMAGE, perm=[0, 2, 3, 1]),
    case("Transpose", MATRIX),
    case("Squeeze", random(2, 1, 3, 1), ints(-1)),
    case("Squeeze", random(2, 1, 3, 1)),
    case("Unsqueeze", MATRIX, ints(-1, 1)),
    case("Expand", MATRIX, ints(2, 1, 6)),
    case("Pad", IMAGE, ints(0, 0, 1, 2, 0, 1, 0, 3), floats(0.5).reshape(())),
    case("Pad", IMAGE, ints(1, 2, 0, 1), None, ints(2, 3), mode="reflect"),
    case("Pad", IMAGE, ints(1, -1), None, ints(-1)),
    case("Pad", IMAGE, ints(0, 0, 1, 2, 0, 0, 0, 3), mode="edge"),
    case("Cast", IMAGE * 5, to=TensorProto.INT32),
    case("Resize", IMAGE, None, None, ints(2, 4, 5, 9), mode="linear"),
    case("Resize", IMAGE, None, floats(1, 1, 1.7, 0.6), mode="linear"),
    case("Resize", IMAGE, None, None, ints(5, 9), mode="linear", axes=[1, 2]),
    case(
        "Resize",
        IMAGE,
        None,
        None,
        ints(2, 4, 5, 9),
        mode="linear",
        coordinate_transformation_mode="align_corners",
    ),
    case("Resize", IMAGE, None, None, ints(2, 4, 5, 9), mode="cubic"),
    case("Resize", IMAGE, None, floats(1, 1, 2, 3), mode="nearest"),
    case(
        "Resize",
        IMAGE,
        None,
        floats(1, 1, 0.6, 1.3),
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    ),
    case(
        "Resize",
        IMAGE,
        None,
        None,
        ints(2, 4, 5, 4),
        mode="cubic",
        antialias=1,
        exclude_outside=1,
        cubic_coeff_a=-0.5,
    ),
    case("QuantizeLinear", IMAGE, floats(0.02).reshape(()), np.array(3, np.int8)),
    case("QuantizeLinear", IMAGE, floats(0.02, 0.03, 0.1, 0.2), np.zeros(4, np.uint8), axis=1),
    case("DequantizeLinear", (IMAGE * 40).astype(np.int8), floats(0.1).reshape(())),
    case(
        "DequantizeLinear",
        (IMAGE * 40).astype(np.int8),
        floats(0.1, 0.2, 0.3, 0.4),
        np.arange(4, dtype=np.int8),
        axis=1,
    ),
    # At opset 11 it normalises all axes from this one on.
    case("Softmax", IMAGE, axis=1, opset=11),
]


def one_node(
    operator: str,
    sample: np.ndarray,
    inputs: Sequence[np.ndarray | None],
    attributes: dict,
) -> onnx.ModelProto:
    attributes = dict(attributes)
    version = attributes.pop("opset", 18)
    names = ["" if value is None else f"constant{i}" for i, value in enumerate(inputs)]
    count = attributes.pop("outputs", 3 if operator == "Split" else 1)
    node = helper.make_node(
        operator, ["image", *names], [f"y{i}" for i in range(count)], "the node", **attributes
    )
    kind = helper.np_dtype_to_tensor_dtype(sample.dtype)
    graph = helper.make_graph(
        [node],
        "one node",
        [helper.make_tensor_value_info("image", kind, sample.shape)],
        [onnx.ValueInfoProto(name=name) for name in node.output],
        [
            numpy_helper.from_array(value, name)
            for name, value in zip(names, inputs, strict=True)
            if value is not None
        ],
    )
    opsets = [helper.make_opsetid("", version)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    model = onnx.shape_inference.infer_shapes(model)
    for value in model.graph.output:
        if not value.type.tensor_type.HasField("shape"):
            value.CopyFrom(helper.make_tensor_value_info(value.name, kind, ["any"]))
    return model


@pytest.mark.parametrize(("operator", "sample", "inputs", "attributes"), CASES)
def test_an_operator_computes_what_onnx_runtime_does(
    operator: str, sample: np.ndarray, inputs: Sequence[np.ndarray | None], attributes: dict
) -> None:
    assert differs(one_node(operator, sample, inputs, attributes), sample) <= NEAR


@pytest.mark.parametrize(
    ("operator", "sample", "inputs", "attributes", "said"),
    [
        ("NonZero", MATRIX, (), {}, "there is no call of torch for it"),
        ("MaxPool", IMAGE, (), {"kernel_shape": [2] * 2, "auto_pad": "x"}, "attribute auto_pad"),
        ("AveragePool", IMAGE, (), {"kernel_shape": [3, 3], "pads": [0, 0, 1, 1]}, "uneven"),
        ("Slice", IMAGE, (ints(-1), ints(0), ints(3), ints(-1)), {}, "steps: got -1"),
        (
            "Resize",
            IMAGE,
            (None, None, ints(2, 4, 5, 9)),
            {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"},
            "got tf_crop_and_resize, expected half_pixel or align_corners",
        ),
        ("Resize", IMAGE, (None, None, ints(2, 4, 5, 9)), {"mode": "nearest"}, "mode nearest"),
        ("Conv", IMAGE, (random(5, 3, 3, 3),), {}, "RuntimeError"),
    ],
)
def test_what_it_can_t_run_is_refused_by_stage_node_and_operator(
    operator: str, sample: np.ndarray, inputs: Sequence, attributes: dict, said: str
) -> None:
    model = one_node(operator, sample, inputs, attributes)
    with pytest.raises(EngineBuildError) as caught, torch.inference_mode():
        EagerStage(stage_of(model), model.SerializeToString())(torch.from_numpy(sample))
    message = str(caught.value)
    assert message.startswith(
        f"stage 'part': PyTorch eager can't run node 'the node' ({operator}): "
    )
    assert said in message


def test_a_shape_that_comes_from_the_image_s_values_is_refused() -> None:
    net = Net()
    shape = net.add("Cast", net.add("ReduceMax", "image", keepdims=0), to=TensorProto.INT64)
    shape = net.add("Unsqueeze", shape, net.constant(ints(0)))
    net.add("Reshape", "image", shape, out="y")
    model = net.model({"y": ["n"]}, image=[4])
    with pytest.raises(EngineBuildError, match=r"\(Reshape\): input .* computed from the image"):
        EagerStage(stage_of(model), model.SerializeToString())(torch.ones(4))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (b"no model", "can't read its model"),
        (classifier().SerializeToString()[:-9], "can't read its model"),
        (classifier().SerializeToString(), "inputs: got image, expected pixels"),
    ],
)
def test_a_model_that_is_not_the_stage_s_is_refused(model: bytes, said: str) -> None:
    pixels, scores = (TensorSpec(name, ("batch", 1), "float32") for name in ("pixels", "scores"))
    with pytest.raises(EngineBuildError, match=f"^stage 'saver': .*{said}"):
        EagerStage(Stage("saver", "saver", (pixels,), (scores,)), model)


@pytest.mark.parametrize("size", [(32, 32), (40, 56)])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_preprocessing_of_any_camera_is_the_same(size: tuple[int, int], layout: str) -> None:
    spec = PreprocessSpec((16, 24), layout=layout, crop=0.875, mean=(0.5,) * 3, std=(0.2,) * 3)
    model = preprocess_model(spec, camera_image(3), "pixels")
    image = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    assert differs(model, image) <= NEAR


@pytest.mark.parametrize("make", [lambda: mobilenet(2, 0.25, 32, "logits"), classifier])
def test_networks_of_others_are_the_same(make: Callable[[], onnx.ModelProto]) -> None:
    model = make()
    lengths = [d.dim_value or 2 for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert differs(model, random(*lengths)) <= NEAR


def test_int8_is_rounded_where_the_model_rounds() -> None:
    """And its weights are widened once, not in every call."""
    plain, rounded = residual_net(), quantized(residual_net()).model
    models = [onnx.load_model_from_string(blob) for blob in (plain, rounded)]
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in models[1].graph.node}
    image = random(2, 3, 8, 8)
    assert differs(models[1], image) <= NEAR
    modules = [EagerStage(stage_of(model), model.SerializeToString()) for model in models]
    with torch.inference_mode():
        float_answer, answer = (module(torch.from_numpy(image))[0] for module in modules)
    assert not torch.allclose(answer, float_answer, rtol=1e-3, atol=1e-3)
    assert all(value.dtype == torch.float32 for value in modules[1].buffers() if value.ndim == 4)


def bundle_and_images(name: str) -> tuple[Bundle, np.ndarray]:
    if name.startswith("digits"):
        bundle = Bundle.open(ROOT / "examples" / name / f"{name}.bundle")
        images = np.load(ROOT / "examples" / "digits" / "test.npz")["images"]
        return bundle, images
    coarse = np.random.default_rng(1).integers(0, 256, (12, 4, 4, 3), np.uint8)
    images = np.kron(coarse, np.ones((1, 8, 8, 1), np.uint8))
    return Bundle.open(ROOT / "examples/cifar10/cifar10.bundle"), images


@pytest.mark.parametrize("name", ["digits", "digits_vit", "cifar10"])
def test_committed_bundles_leave_at_the_same_exits(name: str) -> None:
    bundle, images = bundle_and_images(name)
    point = bundle.operating_point("zero_loss")
    with (
        eager_scheduler(bundle, point) as eager,
        load(bundle, operating_point=point) as session,
    ):
        found, wanted = (one.logits(images[:12]) for one in (eager, session))
        for exit_name, logits in wanted.items():
            gap = np.abs(found[exit_name] - logits).max() / np.abs(logits).max()
            assert gap <= NEAR, exit_name
        have, want = ([(p.exit, p.label) for p in one.classify(images)] for one in (eager, session))
        assert have == want
        assert [(eager(image).exit, eager(image).label) for image in images[:9]] == want[:9]


def test_a_stage_that_takes_one_sample_at_a_time_runs_in_a_batch(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path / "toy.bundle")
    point = OperatingPoint("half", thresholds={"saver": 0.45, "middle": 0.5})
    images = toy_images(40)
    size = images.shape[1:3]
    with (
        eager_scheduler(bundle, point, image_size=size) as eager,
        load(bundle, operating_point=point, image_size=size) as session,
    ):
        have, want = ([(p.exit, p.label) for p in one.classify(images)] for one in (eager, session))
    assert have == want
    assert len({exit_name for exit_name, _ in want}) == 3


def test_another_variant_of_a_stage_is_run_where_the_point_names_it() -> None:
    bundle, images = bundle_and_images("digits")
    point = OperatingPoint("base", policy="never", variants={"preprocess": "fp32_cast_first"})
    with eager_scheduler(bundle, point) as eager:
        assert eager(images[0]).exit == bundle.cascade.exits[-1].name
    with pytest.raises(ConfigError, match="stage 'preprocess': variant: got 'int4'"):
        eager_modules(bundle, bundle.cascade.stages[:1], {"preprocess": "int4"})


def test_the_size_of_images_has_to_be_known(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path / "toy.bundle")
    with pytest.raises(ConfigError, match="the length of axis 'height' is not known"):
        eager_modules(bundle, bundle.cascade.stages, {})
