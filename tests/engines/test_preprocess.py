"""The preprocess stage against references that share no code with it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.backends.onnxrt import new_session
from edge_runtime.backends.tensorrt.keys import CAST_FIRST
from edge_runtime.errors import ConfigError
from edge_runtime.tensors import TensorSpec
from engines.preprocess import (
    CPU_VARIANT,
    PreprocessSpec,
    camera_image,
    preprocess_model,
    preprocess_stage,
)


def images(count: int, height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def run(model: bytes, image: np.ndarray) -> np.ndarray:
    return new_session(model).run(None, {"image": image})[0]


def run_spec(
    spec: PreprocessSpec, image: np.ndarray, *, fixed: bool = False, opset: int = 18
) -> np.ndarray:
    size = image.shape[1:3] if fixed else None
    camera = camera_image(spec.channels, size)
    return run(preprocess_model(spec, camera, "pixels", opset).SerializeToString(), image)


def centre_box(height: int, width: int, size: tuple[int, int], crop: float) -> tuple[int, ...]:
    """The largest centred box of the target's aspect ratio, times the crop, in floating point."""
    scale = min(height / size[0], width / size[1]) * crop
    rows, columns = (int(side * scale + 0.5) for side in size)
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def interpolate(values: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Linear, half_pixel, edges repeated, in float64."""
    old = values.shape[axis]
    places = (np.arange(length) + 0.5) * old / length - 0.5
    return np.apply_along_axis(lambda line: np.interp(places, np.arange(old), line), axis, values)


def reference(spec: PreprocessSpec, image: np.ndarray) -> np.ndarray:
    top, left, rows, columns = centre_box(*image.shape[1:3], spec.size, spec.crop)
    box = image[:, top : top + rows, left : left + columns].astype(np.float64)
    small = interpolate(interpolate(box, spec.size[0], 1), spec.size[1], 2)
    if spec.range is not None:
        values = small / 255 * (spec.range[1] - spec.range[0]) + spec.range[0]
    else:
        values = (small / 255 - np.array(spec.mean)) / np.array(spec.std)
    return values if spec.layout == "NHWC" else values.transpose(0, 3, 1, 2)


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.mark.parametrize(
    "spec",
    [
        PreprocessSpec((16, 16), crop=0.875, range=(-1, 1)),
        PreprocessSpec((16, 16), layout="NHWC", range=(0, 1)),
        PreprocessSpec((12, 20), crop=0.9, **IMAGENET),
        PreprocessSpec((20, 12), crop=0.5, mean=(0.5,), std=(0.25,)),
        PreprocessSpec((9, 9), channels=1, mean=(0.1307,), std=(0.3081,)),
        PreprocessSpec((64, 80), crop=0.875, **IMAGENET),
    ],
    ids=lambda spec: f"{spec.size}-{spec.layout}-{spec.crop}-{spec.channels}",
)
@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("fixed", [False, True], ids=["any-size", "fixed-size"])
def test_equals_the_reference(spec: PreprocessSpec, opset: int, fixed: bool) -> None:
    for height, width in [(40, 56), (57, 33), (16, 16)]:
        image = images(2, height, width, spec.channels)
        have = run_spec(spec, image, fixed=fixed, opset=opset)
        want = reference(spec, image)
        assert have.dtype == np.float32
        assert have.shape == (2, *spec.output("pixels").sample_shape())
        np.testing.assert_allclose(have, want, atol=1e-5 * np.abs(want).max())


def pillow(image: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    """Pillow's bilinear resize of each channel as float, shape (h, w, channels), 0..255."""
    from PIL import Image

    top, left, rows, columns = centre_box(*image.shape[:2], spec.size, spec.crop)
    box = image[top : top + rows, left : left + columns].astype(np.float32)
    planes = [Image.fromarray(box[..., i]) for i in range(box.shape[2])]
    size = spec.size[::-1]
    return np.stack([plane.resize(size, Image.Resampling.BILINEAR) for plane in planes], axis=-1)


@pytest.mark.parametrize(("size", "antialias"), [((64, 64), False), ((11, 11), True)])
def test_equals_pillow(size: tuple[int, int], antialias: bool) -> None:
    """Pillow always filters when it shrinks, and needs no filter to enlarge."""
    spec = PreprocessSpec(size, crop=0.875, range=(0, 255), layout="NHWC", antialias=antialias)
    image = images(1, 48, 60)
    np.testing.assert_allclose(run_spec(spec, image)[0], pillow(image[0], spec), atol=1e-3)


def test_antialias_changes_a_shrunk_image() -> None:
    image = images(1, 48, 48)
    plain, filtered = (
        run_spec(PreprocessSpec((12, 12), range=(0, 1), antialias=a), image) for a in (False, True)
    )
    assert np.abs(plain - filtered).max() > 0.1


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_variants_compute_the_same_bits(layout: str) -> None:
    spec = PreprocessSpec((16, 20), layout=layout, crop=0.875, **IMAGENET)
    built = preprocess_stage(spec, camera_image(3), name="preprocess", output="pixels")
    assert list(built.models) == [CPU_VARIANT, CAST_FIRST]
    image = images(3, 50, 41)
    first, second = (run(model, image) for model in built.models.values())
    np.testing.assert_array_equal(first, second)


def test_the_cpu_variant_crops_before_it_casts() -> None:
    spec = PreprocessSpec((16, 16), crop=0.875, range=(0, 1))
    operators = {
        first: [
            n.op_type
            for n in preprocess_model(
                spec, camera_image(3, (40, 50)), "p", cast_first=first
            ).graph.node
        ]
        for first in (False, True)
    }
    assert operators[False][:3] == ["Slice", "Transpose", "Cast"]
    assert operators[True][:3] == ["Cast", "Slice", "Transpose"]


def test_a_whole_image_of_fixed_size_is_not_cropped() -> None:
    model = preprocess_model(PreprocessSpec((8, 8), range=(0, 1)), camera_image(3, (16, 16)), "p")
    whole = [n for n in model.graph.node if n.op_type == "Slice" and n.input[0] == "image"]
    assert whole == []


def test_any_batch_size_gives_the_same_numbers() -> None:
    spec = PreprocessSpec((16, 16), crop=0.875, **IMAGENET)
    image = images(3, 40, 50)
    singles = np.concatenate([run_spec(spec, image[i : i + 1]) for i in range(3)])
    np.testing.assert_array_equal(run_spec(spec, image), singles)


sides = st.integers(8, 4000)


@settings(max_examples=300, deadline=None)
@given(
    sides, sides, st.integers(1, 600), st.integers(1, 600), st.sampled_from([0.3, 0.875, 0.95, 1.0])
)
def test_the_box_is_inside_centred_and_of_the_target_s_shape(
    height: int, width: int, rows: int, columns: int, crop: float
) -> None:
    top, left, h, w = PreprocessSpec((rows, columns), crop=crop, range=(0, 1)).crop_box(
        height, width
    )
    assert top >= 0 and left >= 0 and top + h <= height and left + w <= width
    assert abs((height - h) - 2 * top) <= 1 and abs((width - w) - 2 * left) <= 1
    exact = min(height / rows, width / columns) * crop
    assert abs(h - exact * rows) <= 0.51 and abs(w - exact * columns) <= 0.51


def test_the_graph_computes_the_box_as_the_spec_does() -> None:
    """For many sizes the graph for any size equals the graph that was made for the size."""
    rng = np.random.default_rng(1)
    for target, crop in itertools.product([(16, 16), (7, 13)], [0.875, 1.0]):
        spec = PreprocessSpec(target, crop=crop, range=(0, 1))
        session = new_session(preprocess_model(spec, camera_image(3), "p").SerializeToString())
        for _ in range(12):
            image = images(1, *rng.integers(14, 70, 2))
            np.testing.assert_array_equal(
                session.run(None, {"image": image})[0], run_spec(spec, image, fixed=True)
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (0, 4), "range": (0, 1)}, "size: got [0, 4]"),
        ({"channels": 4, "range": (0, 1)}, "channels: got 4, expected 1 or 3"),
        ({"crop": 0.0, "range": (0, 1)}, "crop: got 0.0"),
        ({"crop": 1.5, "range": (0, 1)}, "crop: got 1.5"),
        ({}, "normalisation: got nothing, expected either mean and std"),
        ({"mean": (0.5,)}, "normalisation: got mean,"),
        ({"mean": (0.5,), "std": (1.0,), "range": (0, 1)}, "normalisation: got mean and std and"),
        ({"mean": (0.5, 0.5), "std": (1.0,)}, "mean: got 2 values, expected 1 or 3"),
        ({"mean": (0.5,), "std": (0.0,)}, "std: got [0.0]"),
        ({"range": (1, 1)}, "range: got [1, 1]"),
    ],
)
def test_refuses_what_no_model_expects(options: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        PreprocessSpec(**({"size": (8, 8)} | options))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "image", "opset", "message"),
    [
        ({}, camera_image(1), 18, "the camera image: got (batch, height, width, 1) uint8"),
        ({}, TensorSpec("image", ("batch", 8, "width", 3), "uint8"), 18, "the camera image"),
        ({}, TensorSpec("image", ("batch", 8, 8, 3), "float32"), 18, "the camera image"),
        ({}, camera_image(3), 10, "preprocessing: got opset 10, expected opset 11 or later"),
        ({"antialias": True}, camera_image(3), 17, "preprocessing with antialias: got opset 17"),
        ({"crop": 0.1}, camera_image(3, (4, 4)), 18, "crop: nothing is left of the image"),
    ],
)
def test_refuses_what_it_can_t_build(
    options: dict, image: TensorSpec, opset: int, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        preprocess_model(PreprocessSpec((8, 8), range=(0, 1), **options), image, "pixels", opset)
    assert str(error.value).startswith(message)
