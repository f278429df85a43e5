"""TensorRT's parser and builder work without a GPU, and their limits that our stages respect."""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx.parser
import pytest

from edge_runtime.errors import EngineBuildError
from tests.tensorrt_without_gpu import make_module, parse_and_build

pytestmark = [pytest.mark.tensorrt, pytest.mark.usefixtures("tensorrt")]

ROOT = Path(__file__).parents[1]


def stage(body: str, opset: int = 18) -> bytes:
    """Return a checked, serialized model from ONNX's text format."""
    header = f'<ir_version: 8, opset_import: ["": {opset}]>\n'
    model = onnx.parser.parse_model(header + textwrap.dedent(body))
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def head(batch: str) -> bytes:
    return stage(f"""
        head (float[{batch}, 4] features) => (float[{batch}, 2] logits)
        <float[4, 2] weight = {{1, 2, 3, 4, 5, 6, 7, 8}}> {{ logits = MatMul(features, weight) }}
    """)


def preprocess(image: str, opset: int) -> bytes:
    """Centre crop of 7/8 of the short side, resized to 32 x 32, normalised."""
    batch = image.split(",")[0]
    return stage(
        f"""
        preprocess (uint8[{image}] image) => (float[{batch}, 3, 32, 32] pixels)
        <
            int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}},
            int64[2] axes = {{1, 2}}, int64[1] seven = {{7}}, int64[1] eight = {{8}},
            int64[3] rest = {{3, 32, 32}}, float[3, 1, 1] scale = {{0.1, 0.2, 0.3}},
            float[3, 1, 1] offset = {{-1, -2, -3}}
        > {{
            values = Cast <to = 1> (image)
            shape = Shape (image)
            size = Gather (shape, axes)
            height = Gather (shape, one)
            width = Gather (shape, two)
            short = Min (height, width)
            sevenths = Mul (short, seven)
            side = Div (sevenths, eight)
            margin = Sub (size, side)
            start = Div (margin, two)
            end = Add (start, side)
            crop = Slice (values, start, end, axes)
            channels_first = Transpose <perm = [0, 3, 1, 2]> (crop)
            batch = Slice (shape, zero, one)
            target = Concat <axis = 0> (batch, rest)
            resized = Resize <mode = "linear"> (channels_first, , , target)
            scaled = Mul (resized, scale)
            pixels = Add (scaled, offset)
        }}
        """,
        opset,
    )


def test_the_module_is_tensorrt(tensorrt):
    assert int(tensorrt.__version__.split(".")[0]) >= 10
    assert tensorrt.OnnxParser
    assert tensorrt.Runtime


def test_a_static_stage_builds_without_shapes():
    assert parse_and_build(head("1"))


def test_a_dynamic_stage_builds_for_its_shape():
    assert parse_and_build(head("N"), {"features": (1, 4)})


@pytest.mark.parametrize("shapes", [{}, {"features": (1, 4), "other": (1, 4)}, {"other": (1, 4)}])
def test_the_shapes_name_exactly_the_dynamic_inputs(shapes):
    with pytest.raises(EngineBuildError, match=r"the dynamic inputs are \['features'\]"):
        parse_and_build(head("N"), shapes)


def test_a_shape_that_does_not_fit_is_refused():
    with pytest.raises(EngineBuildError, match="TensorRT"):
        parse_and_build(head("N"), {"features": (1, 5)})


def test_bytes_that_are_no_model_are_refused():
    with pytest.raises(EngineBuildError, match="TensorRT's parser refused the model"):
        parse_and_build(b"not a model")


def test_half_precision_is_in_the_graph():
    model = stage("""
        head (float[1, 4] features) => (float[1, 2] logits)
        <float16[4, 2] weight = {1, 2, 3, 4, 5, 6, 7, 8}> {
            half = Cast <to = 10> (features)
            product = MatMul (half, weight)
            logits = Cast <to = 1> (product)
        }
    """)
    assert parse_and_build(model)


def test_int8_is_in_the_graph():
    model = stage("""
        head (float[1, 4] features) => (float[1, 2] logits)
        <
            int8[4, 2] weight = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] scales = {0.1, 0.2},
            int8[2] zeros = {0, 0}, float scale = {0.1}, int8 zero = {0}
        > {
            quantized = QuantizeLinear (features, scale, zero)
            dequantized = DequantizeLinear (quantized, scale, zero)
            floats = DequantizeLinear <axis = 1> (weight, scales, zeros)
            logits = MatMul (dequantized, floats)
        }
    """)
    assert parse_and_build(model)


@pytest.mark.parametrize("opset", [13, 18, 21])
@pytest.mark.parametrize("image", ["1, 48, 64, 3", "N, 48, 64, 3", "N, H, W, 3"])
def test_a_preprocessing_stage_builds(image, opset):
    shapes = {"image": (1, 48, 64, 3)} if "N" in image else {}
    assert parse_and_build(preprocess(image, opset), shapes)


@pytest.mark.parametrize(
    "operation",
    [
        "Transpose <perm = [0, 3, 1, 2]> (image)",
        "Reshape (image, shape)",
        "Slice (image, start, end)",
    ],
)
def test_a_uint8_input_takes_nothing_but_a_cast(operation):
    model = stage(f"""
        preprocess (uint8[1, 8, 6, 3] image) => (float[a, b, c, d] pixels)
        <int64[4] shape = {{1, 3, 8, 6}}, int64[4] start = {{0, 0, 0, 0}},
         int64[4] end = {{1, 8, 6, 3}}> {{
            moved = {operation}
            pixels = Cast <to = 1> (moved)
        }}
    """)
    with pytest.raises(EngineBuildError, match=r"(?i)uint8"):
        parse_and_build(model)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ('mode = "linear", antialias = 1', "Antialiasing is not supported"),
        ('mode = "linear", keep_aspect_ratio_policy = "not_smaller"', "stretch"),
        ('mode = "linear", coordinate_transformation_mode = "half_pixel_symmetric"', "half_pixel"),
    ],
)
def test_a_resize_that_tensorrt_lacks_is_refused(attributes, reason):
    opset = 19 if "symmetric" in attributes else 18
    model = stage(
        f"""
        resize (float[1, 3, 8, 8] image) => (float[a, b, c, d] pixels)
        <int64[4] size = {{1, 3, 4, 4}}> {{ pixels = Resize <{attributes}> (image, , , size) }}
        """,
        opset,
    )
    with pytest.raises(EngineBuildError, match=reason):
        parse_and_build(model)


@pytest.mark.parametrize("first", ["onnxruntime", "tensorrt"])
def test_onnx_runtime_works_in_the_same_process(first):
    program = f"""
        import numpy
        from tests.test_tensorrt_without_gpu import head
        from tests.tensorrt_without_gpu import load, parse_and_build

        model = head("N")
        if {first!r} == "tensorrt":
            load()
        import onnxruntime

        for _ in range(2):
            session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
            (logits,) = session.run(None, {{"features": numpy.ones((1, 4), numpy.float32)}})
            assert logits.tolist() == [[16.0, 20.0]], logits
            assert parse_and_build(model, {{"features": (1, 4)}})
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_several_processes_make_the_module_at_once(tmp_path):
    program = (
        "import pathlib, sys; from tests.tensorrt_without_gpu import make_module; "
        "sys.path.insert(0, str(make_module(pathlib.Path(sys.argv[1])))); "
        "import tensorrt; print(tensorrt.__file__)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]

    def run(_: int) -> str:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(run, range(4)))

    folder = make_module(tmp_path)
    assert made == {f"{folder / 'tensorrt' / '__init__.py'}\n"}
    assert list(tmp_path.iterdir()) == [folder], "temporary folders remain"
