"""A cascade as one model with If nodes answers as the scheduler does."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import helper

from edge_runtime.backends.onnxrt import OnnxRuntimeBackend, new_session
from edge_runtime.backends.tensorrt.keys import precision_of
from edge_runtime.cascade import Exit, Stage
from edge_runtime.cli import main
from edge_runtime.confidence import METRICS, Metric, decide
from edge_runtime.errors import ConfigError, EngineBuildError
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.scheduler import Scheduler
from edge_runtime.tensors import TensorSpec
from engines.bundle import BuiltStage, write_bundle
from engines.monolith import if_model
from engines.one_piece import one_piece
from engines.onnx_graph import subgraphs, value_info
from tests.engines.test_one_piece import X, bundle_of, run, stage
from tests.meta.repository import ROOT
from tests.tensorrt_without_gpu import parse_and_build

DIGITS = ROOT / "examples" / "digits"
MIX = {"saver": "fp16", "segment1": "int8", "head1": "fp16", "segment2": "int8"}
IMAGE = TensorSpec("image", ("batch", 2), "float32")
# Segments of which the last reads the image and what both others wrote.
SEGMENTS = ["s1", "image", "a"], ["s2", "image a", "b"], ["s3", "image a b", "c"]


@pytest.fixture(scope="module")
def digits() -> Bundle:
    return Bundle.open(DIGITS / "digits.bundle")


@pytest.fixture(scope="module")
def digit_images() -> np.ndarray:
    with np.load(DIGITS / "test.npz") as data:
        return data["images"][:200]


@pytest.fixture(scope="module")
def mixed_digits(digits: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With INT8 and FP16 variants."""
    folder = tmp_path_factory.mktemp("mixed")
    data = ["--data", str(DIGITS / "test.npz"), "--samples", "32"]
    int8, mixed = str(folder / "int8.bundle"), str(folder / "mixed.bundle")
    assert main(["quantize", str(digits.path), *data, "--out", int8]) == 0
    assert main(["convert", int8, "--precision", "fp16", *data, "--out", mixed]) == 0
    return Bundle.open(mixed)


def opened(bundle: Bundle, point: OperatingPoint, images: np.ndarray) -> Scheduler:
    named = any(isinstance(axis, str) for axis in bundle.cascade.image.shape[1:])
    size = (images.shape[1], images.shape[2]) if named else None
    return Scheduler(bundle.cascade, OnnxRuntimeBackend(bundle), point, image_size=size)


def spread(bundle: Bundle, images: np.ndarray, metric: Metric, **options) -> OperatingPoint:
    """A point at which samples leave everywhere: thresholds halfway between two signals."""
    point = OperatingPoint.all_exits(bundle.cascade, variants=options.get("variants", {}))
    with opened(bundle, point, images) as scheduler:
        logits = scheduler.logits(images)
    stay = np.full(len(images), True)
    thresholds = {}
    for name in scheduler.exits[:-1]:
        temperature = options.get("temperatures", {}).get(name, 1.0)
        signals = np.sort(decide(logits[name][stay], metric, temperature).signal)
        middle = len(signals) // 2
        thresholds[name] = float(signals[middle - 1 : middle + 1].mean())
        stay &= decide(logits[name], metric, temperature).signal < thresholds[name]
    return OperatingPoint("spread", metric=metric, thresholds=thresholds, **options)


def check_answers(
    bundle: Bundle, point: OperatingPoint, images: np.ndarray, *, atol: float = 1e-5, **options
) -> set[str]:
    """Compare the model with the scheduler, image by image; returns the exits that answered."""
    model = if_model(bundle, point, **options)
    onnx.checker.check_model(onnx.load_model_from_string(model), full_check=True)
    session, used = new_session(model), set()
    with opened(bundle, point, images) as scheduler:
        for image in images:
            want = scheduler(image)
            logits, exit_ = session.run(
                ["logits", "exit"], {bundle.cascade.image.name: image[None]}
            )
            assert (exit_.shape, exit_.dtype, logits.dtype) == ((1,), np.int64, np.float32)
            assert scheduler.exits[exit_[0]] == want.exit
            assert logits.argmax() == want.label
            expected = scheduler.logits(image[None])[want.exit]
            np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=atol)
            used.add(want.exit)
    return used


@pytest.mark.parametrize("metric", METRICS)
def test_digits_answer_as_the_scheduler_does(
    digits: Bundle, digit_images: np.ndarray, metric: Metric
) -> None:
    temperatures = {"saver": 2.5, "middle": 0.4}
    point = spread(digits, digit_images, metric, temperatures=temperatures)
    assert check_answers(digits, point, digit_images) == {"saver", "middle", "final"}


def test_a_point_of_the_bundle(digits: Bundle, digit_images: np.ndarray) -> None:
    point = digits.operating_point("zero_loss")
    assert "saver" in check_answers(digits, point, digit_images)


def test_stages_may_differ_in_precision(mixed_digits: Bundle, digit_images: np.ndarray) -> None:
    images = digit_images[:100]
    point = spread(mixed_digits, images, "max_softmax", variants=MIX)
    assert check_answers(mixed_digits, point, images) == {"saver", "middle", "final"}


def test_variants_can_be_chosen_beside_the_point_s(
    digits: Bundle, digit_images: np.ndarray
) -> None:
    point = spread(digits, digit_images[:40], "max_softmax")
    first = [
        onnx.load_model_from_string(model).graph.node[0].op_type
        for model in (
            if_model(digits, replace(point, variants={"preprocess": "fp32"})),
            if_model(
                digits,
                replace(point, variants={"preprocess": "fp32"}),
                {"preprocess": "fp32_cast_first"},
            ),
        )
    ]
    assert first == ["Transpose", "Cast"]
    check_answers(digits, point, digit_images[:40], variants={"preprocess": "fp32_cast_first"})


@pytest.mark.torch
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("fixture", ["convolutional_bundle", "transformer_bundle"])
def test_exported_cascades(request: pytest.FixtureRequest, fixture: str, metric: Metric) -> None:
    bundle: Bundle = request.getfixturevalue(fixture)
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (24, 33, 21, 3), dtype=np.uint8)
    if bundle.cascade.image.dtype == "float32":
        images = rng.standard_normal((24, 3, 16, 16)).astype(np.float32)
    point = spread(bundle, images, metric)
    assert check_answers(bundle, point, images) == {e.name for e in bundle.cascade.exits}


def levels(folder: Path, **options) -> Bundle:
    """Three exits, whose inner tensors are named alike, and whose later stages read early ones."""
    stages = [stage(*names, factor=0.4, **options) for names in SEGMENTS]
    heads = [stage(f"h{t}", t, f"{t}.logits", factor=k, **options) for k, t in enumerate("abc", 1)]
    return bundle_of(folder / "b", [*stages, *heads], "a.logits", "b.logits", "c.logits")


def pairs(count: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((count, 2)).astype(np.float32)


def test_a_branch_reads_tensors_of_every_level_above(tmp_path: Path) -> None:
    bundle = levels(tmp_path)
    point = spread(bundle, pairs(40), "logits_margin")
    assert check_answers(bundle, point, pairs(40)) == {"a", "b", "c"}


def test_a_signal_that_equals_the_threshold_leaves(tmp_path: Path) -> None:
    stages = [stage("h1", "image", "a.logits"), stage("h2", "image", "b.logits")]
    bundle = bundle_of(tmp_path / "b", stages, "a.logits", "b.logits")
    options = {"metric": "logits_margin", "temperatures": {"a": 2.0}}
    images = np.array([[1, 5]], np.float32)
    for threshold, used in ((2.0, "a"), (np.nextafter(np.float32(2), 3).item(), "b")):
        point = OperatingPoint("p", thresholds={"a": threshold}, **options)
        assert check_answers(bundle, point, images) == {used}


def test_exits_nest_and_hold_only_what_comes_after_them(tmp_path: Path) -> None:
    point = OperatingPoint("p", thresholds={"a": 0.9, "b": 0.8})
    graph = onnx.load_model_from_string(if_model(levels(tmp_path), point)).graph
    found = []
    while True:
        found.append(sorted(v for node in graph.node for v in node.output if v in {*"abc"}))
        branches = {a.name: a.g for n in graph.node if n.op_type == "If" for a in n.attribute}
        if not branches:
            break
        assert [n.op_type for n in branches["then_branch"].node] == ["Identity", "Constant"]
        graph = branches["else_branch"]
    assert found == [["a"], ["b"], ["c"]]


def test_exits_that_cannot_fire_are_not_in_the_model(tmp_path: Path) -> None:
    bundle = levels(tmp_path)
    point = replace(spread(bundle, pairs(40), "max_softmax"), thresholds={"a": None, "b": 0.6})
    graph = onnx.load_model_from_string(if_model(bundle, point)).graph
    assert "a.logits" not in {value for node in graph.node for value in node.output}
    assert sum(bool(subgraphs(node)) for node in graph.node) == 1
    assert check_answers(bundle, point, pairs(40)) == {"b", "c"}


@pytest.mark.parametrize(
    ("point", "exit_name"),
    [
        (OperatingPoint("base", policy="never", thresholds={"a": 0.6}), "c"),
        (OperatingPoint("unreachable", thresholds={"a": 1.5}), "c"),
        (OperatingPoint("certain", thresholds={"a": None, "b": 0.0}), "b"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_without_a_choice_it_is_the_model_in_one_piece(
    tmp_path: Path, point: OperatingPoint, exit_name: str
) -> None:
    bundle = levels(tmp_path)
    model, whole = if_model(bundle, point), one_piece(bundle, exit_name)
    operators = [
        [n.op_type for n in onnx.load_model_from_string(m).graph.node] for m in (model, whole)
    ]
    assert operators[0] == [*operators[1], "Identity", "Constant"]
    logits, exit_ = new_session(model).run(["logits", "exit"], {"image": X[:1]})
    np.testing.assert_array_equal(logits, run(whole, X[:1]))
    assert exit_.tolist() == [0]


def cast(name: str, output: str, dtype: str) -> BuiltStage:
    """Hands out the image as another tensor."""
    spec = TensorSpec(output, IMAGE.shape, dtype)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        [helper.make_node("Cast", ["image"], [output], to=kind)],
        "cast",
        [value_info(IMAGE)],
        [value_info(spec)],
    )
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return BuiltStage(Stage(name, "segment", (IMAGE,), (spec,)), {"fp32": model})


def test_boundary_tensors_may_be_named_like_the_outputs(tmp_path: Path) -> None:
    stages = [stage("s", "image", "exit"), stage("h", "exit", "logits", factor=3)]
    stages.append(stage("h2", "exit image", "last.logits", factor=2))
    bundle = bundle_of(tmp_path / "b", stages, "logits", "last.logits")
    point = spread(bundle, pairs(20), "softmax_margin")
    assert check_answers(bundle, point, pairs(20)) == {"logits", "last"}


def test_a_boundary_tensor_may_be_named_like_one_inside_a_stage(tmp_path: Path) -> None:
    stages = [stage("h", "image", "early.logits"), cast("h2", "inner", "float32")]
    bundle = bundle_of(tmp_path / "b", stages, "early.logits", "inner")
    point = spread(bundle, pairs(20), "max_softmax")
    assert check_answers(bundle, point, pairs(20)) == {"early", "inner"}


def test_logits_in_half_precision_come_out_as_float32(tmp_path: Path) -> None:
    names = ("early.logits", "late.logits")
    bundle = write_bundle(
        tmp_path / "b",
        name="half",
        classes=("a", "b"),
        image=IMAGE,
        stages=[cast(name, name, "float16") for name in names],
        exits=[Exit(name, name) for name in names],
        provenance={},
        boundary_dtype="float16",
    )
    point = spread(bundle, pairs(20), "entropy")
    assert check_answers(bundle, point, pairs(20)) == {*names}


def test_it_takes_one_image(digits: Bundle) -> None:
    session = new_session(if_model(digits, digits.operating_point("zero_loss")))
    shapes = [v.shape for v in (*session.get_inputs(), *session.get_outputs())]
    assert shapes == [[1, 8, 8, 1], [1, 10], [1]]


@pytest.mark.parametrize(
    ("point", "variants", "message"),
    [
        (
            OperatingPoint("p", policy="patience"),
            {},
            "operating point 'p': policy of a model with If nodes: got 'patience', expected "
            "threshold or never",
        ),
        (OperatingPoint("p"), {"ha": "int8"}, "stage 'ha': variant: got 'int8', expected fp32"),
        (OperatingPoint("p"), {"s0": "fp32"}, "the bundle has no stage 's0'"),
        (OperatingPoint("p", thresholds={"z": 0.5}), {}, "the cascade has no exit 'z'"),
    ],
    ids=["policy", "variant", "stage", "exit"],
)
def test_refuses_what_the_bundle_lacks(
    tmp_path: Path, point: OperatingPoint, variants: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        if_model(levels(tmp_path), point, variants)
    assert message in str(error.value)


def test_an_old_opset_is_good_for_one_exit_only(tmp_path: Path) -> None:
    bundle = levels(tmp_path, opset=11)
    assert if_model(bundle, OperatingPoint("base", policy="never"))
    with pytest.raises(EngineBuildError, match="If nodes: got opset 11, expected opset 12 or"):
        if_model(bundle, OperatingPoint("p", thresholds={"a": 0.5}))


def test_the_oldest_opset_works(tmp_path: Path) -> None:
    bundle = levels(tmp_path, opset=12)
    for metric in METRICS:
        assert check_answers(bundle, spread(bundle, pairs(20), metric), pairs(20)) == {*"abc"}


def build_engine(
    bundle: Bundle, point: OperatingPoint, shapes: dict[str, tuple[int, ...]] | None = None
) -> bytes:
    """What TensorRT makes of the model, with preprocessing as TensorRT needs it."""
    stages = bundle.cascade.stages
    variants = {s.name: precision_of(bundle, s, point.variants) for s in stages}
    return parse_and_build(if_model(bundle, point, variants), shapes)


@pytest.mark.tensorrt
@pytest.mark.parametrize("metric", METRICS)
def test_tensorrt_builds_it(tensorrt: ModuleType, digits: Bundle, metric: Metric) -> None:
    thresholds = {"saver": -0.5, "middle": -0.25} if metric == "entropy" else {"saver": 0.5}
    point = OperatingPoint("p", metric=metric, thresholds=thresholds, temperatures={"saver": 1.5})
    assert build_engine(digits, point)


@pytest.mark.tensorrt
def test_tensorrt_builds_a_mix_of_precisions(tensorrt: ModuleType, mixed_digits: Bundle) -> None:
    point = OperatingPoint("p", thresholds={"saver": 0.9, "middle": 0.9}, variants=MIX)
    assert build_engine(mixed_digits, point)


@pytest.mark.tensorrt
@pytest.mark.torch
def test_tensorrt_builds_exported_cascades(
    tensorrt: ModuleType, convolutional_bundle: Bundle, transformer_bundle: Bundle
) -> None:
    point = OperatingPoint("p", thresholds={"saver": 0.9, "early": 0.9})
    assert build_engine(convolutional_bundle, point, {"image": (1, 48, 64, 3)})
    assert build_engine(transformer_bundle, OperatingPoint("p", thresholds={"one": 0.9}))


@pytest.mark.tensorrt
def test_tensorrt_refuses_the_cpu_s_preprocessing(tensorrt: ModuleType, digits: Bundle) -> None:
    with pytest.raises(EngineBuildError, match=r"Transpose .* has type UInt8"):
        parse_and_build(if_model(digits, digits.operating_point("zero_loss")))
