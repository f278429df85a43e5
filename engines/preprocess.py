"""The preprocess stage: from a camera image to what a model reads, as one ONNX graph.

Centre crop, linear resize, normalise. The crop comes first and the arithmetic last, so that the
full-resolution image is touched once, as uint8, and only inside the box.

The stage has two variants that compute the same numbers, bit for bit:

- "fp32" crops the uint8 image and casts the box: the cheap order on a CPU (medians on 2 cores:
  640 x 480 to 128 in 0.17 ms against 0.23, 1920 x 1080 to 224 in 1.3 ms against 2.7).
- "fp32_cast_first" casts the whole image and crops then: TensorRT allows no layer but a cast on a
  uint8 input (NVIDIA/TensorRT#3985), and fuses the two anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends.tensorrt.keys import CAST_FIRST
from edge_runtime.cascade import Stage
from edge_runtime.errors import ConfigError
from edge_runtime.tensors import BATCH, TensorSpec
from engines.bundle import BuiltStage

if TYPE_CHECKING:
    import onnx

Layout = Literal["NCHW", "NHWC"]

#: Name of the variant that ONNX Runtime runs; `CAST_FIRST` is the one that TensorRT can build.
CPU_VARIANT = "fp32"

#: The first opsets whose Resize has half_pixel coordinates, and antialias.
MIN_OPSET = 11
ANTIALIAS_OPSET = 18


@dataclass(frozen=True)
class PreprocessSpec:
    """What a model expects of its input.

    Attributes:
        size: Height and width that the model reads.
        channels: Channels of the camera image and of the model's input, 1 or 3.
        layout: Axis order of the model's input.
        crop: Share of the largest centred box of the target's aspect ratio that is kept, in (0, 1].
        mean: Mean of x / 255 per channel (or one for all); with `std`.
        std: Standard deviation of x / 255 per channel (or one for all); with `mean`.
        range: What 0 and 255 become; instead of `mean` and `std`.
        antialias: Whether shrinking filters first, as Pillow does; most training code for mobile
            models did not. Needs opset 18, and TensorRT can't build it.

    Raises:
        ConfigError: From the constructor, for values that no model could expect.
    """

    size: tuple[int, int]
    channels: int = 3
    layout: Layout = "NCHW"
    crop: float = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    range: tuple[float, float] | None = None
    antialias: bool = False

    def __post_init__(self) -> None:
        """Refuse what no model could expect."""
        if min(self.size) < 1:
            raise ConfigError("size", got=list(self.size), expected="[height, width], both >= 1")
        if self.channels not in (1, 3):
            raise ConfigError("channels", got=self.channels, expected="1 or 3")
        if not 0 < self.crop <= 1:
            raise ConfigError("crop", got=self.crop, expected="a share in (0, 1]")
        self._check_normalisation()

    def _check_normalisation(self) -> None:
        if (self.mean is None) != (self.std is None) or (self.mean is None) == (self.range is None):
            given = [n for n in ("mean", "std", "range") if getattr(self, n) is not None]
            raise ConfigError(
                "normalisation",
                got=" and ".join(given) or "nothing",
                expected="either mean and std (of x / 255), or range (what 0 and 255 become)",
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in (1, self.channels):
                raise ConfigError(
                    name, got=f"{len(values)} values", expected=f"1 or {self.channels}"
                )
        if self.std is not None and min(self.std) <= 0:
            raise ConfigError("std", got=list(self.std), expected="> 0")
        if self.range is not None and self.range[0] >= self.range[1]:
            raise ConfigError("range", got=list(self.range), expected="[low, high], low < high")

    def output(self, name: str) -> TensorSpec:
        """Spec of the tensor that the stage writes: float32, in the model's layout."""
        height, width = self.size
        if self.layout == "NCHW":
            return TensorSpec(name, (BATCH, self.channels, height, width), "float32")
        return TensorSpec(name, (BATCH, height, width, self.channels), "float32")

    def crop_box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The box that is kept of an image of this size: (top, left, height, width).

        A graph for images of any size computes the same integers.
        """
        share = _share(self.crop)
        rows, columns = self.size
        reach = min(height * columns, width * rows) * share.numerator
        box = [_rounded(reach, share.denominator * side) for side in (columns, rows)]
        return (height - box[0]) // 2, (width - box[1]) // 2, box[0], box[1]

    def scale_and_offset(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What x in 0..255 is multiplied with, and what is added then; each of 1 or C values."""
        if self.range is not None:
            low, high = self.range
            scale, offset = np.array([(high - low) / 255]), np.array([low])
        else:
            mean, std = np.array(self.mean), np.array(self.std)
            scale, offset = 1 / (255 * std), -mean / std
        return scale.astype(np.float32), offset.astype(np.float32)


def camera_image(channels: int, size: tuple[int, int] | None = None) -> TensorSpec:
    """Spec of a camera's image: uint8 NHWC, of any size or of a fixed one."""
    height, width = size or ("height", "width")
    return TensorSpec("image", (BATCH, height, width, channels), "uint8")


def preprocess_stage(
    spec: PreprocessSpec,
    image: TensorSpec,
    *,
    name: str,
    output: str,
    opset: int = 18,
    ir_version: int = 10,
) -> BuiltStage:
    """The stage in both variants.

    Args:
        spec: What the model expects.
        image: Spec of the camera image, see `camera_image`.
        name: Name of the stage.
        output: Name of the tensor that it writes.
        opset: ONNX operator set; that of the model it feeds, so that both can be merged.
        ir_version: ONNX file format version.

    Raises:
        BackendUnavailable: The onnx package is missing.
        ConfigError: As `preprocess_model`.
    """
    models = {
        variant: preprocess_model(
            spec, image, output, opset, ir_version, cast_first=variant == CAST_FIRST
        ).SerializeToString()
        for variant in (CPU_VARIANT, CAST_FIRST)
    }
    return BuiltStage(Stage(name, "preprocess", (image,), (spec.output(output),)), models)


def preprocess_model(
    spec: PreprocessSpec,
    image: TensorSpec,
    output: str,
    opset: int = 18,
    ir_version: int = 10,
    *,
    cast_first: bool = False,
) -> onnx.ModelProto:
    """Build the graph.

    Args:
        spec: What the model expects.
        image: Spec of the camera image, shape (batch, height, width, channels), uint8; height and
            width are both lengths or both names.
        output: Name of the tensor that it writes, spec `spec.output(output)`.
        opset: ONNX operator set.
        ir_version: ONNX file format version.
        cast_first: The order that TensorRT accepts; see the module's docstring.

    Raises:
        BackendUnavailable: The onnx package is missing.
        ConfigError: The image has other channels, its name is taken, or the opset lacks something.
    """
    _check(spec, image, output, opset)
    graph = _Graph(opset)
    tensor = image.name
    if cast_first:
        tensor = graph.cast(tensor)
    corners = _corners(graph, spec, image)
    if corners is not None:
        tensor = graph.slice(tensor, *corners, [1, 2])
    if spec.layout == "NCHW":
        tensor = graph.add("Transpose", [tensor], perm=[0, 3, 1, 2])
    if not cast_first:
        tensor = graph.cast(tensor)
    tensor = graph.resize(tensor, spec.output(output), spec.antialias)
    shape = (1, -1, 1, 1) if spec.layout == "NCHW" else (1, 1, 1, -1)
    scale, offset = (values.reshape(shape) for values in spec.scale_and_offset())
    tensor = graph.add("Mul", [tensor, graph.constant(scale)])
    graph.add("Add", [tensor, graph.constant(offset)], output=output)
    return graph.model(image, spec.output(output), ir_version)


def _check(spec: PreprocessSpec, image: TensorSpec, output: str, opset: int) -> None:
    expected = camera_image(spec.channels)
    named = [isinstance(axis, str) for axis in image.shape[1:3]]
    if not image.meets(expected) or image.shape[3] != spec.channels or len(set(named)) != 1:
        raise ConfigError("the camera image", got=str(image), expected=str(expected))
    if output == image.name:
        raise ConfigError(
            f"preprocessing reads and writes a tensor {output!r}",
            remedy="Name the model's input otherwise, such as 'pixels'",
        )
    needed = ANTIALIAS_OPSET if spec.antialias else MIN_OPSET
    if opset < needed:
        raise ConfigError(
            "preprocessing with antialias" if spec.antialias else "preprocessing",
            got=f"opset {opset}",
            expected=f"opset {needed} or later",
            remedy="Convert the model with onnx.version_converter.convert_version",
        )


def _corners(graph: _Graph, spec: PreprocessSpec, image: TensorSpec) -> tuple[str, str] | None:
    """Tensors with the first and the last row and column of the box; None for the whole image."""
    height, width = image.shape[1:3]
    if isinstance(height, str) or isinstance(width, str):
        return _corners_at_run_time(graph, spec, image.name)
    top, left, rows, columns = spec.crop_box(height, width)
    if min(rows, columns) < 1:
        raise ConfigError("crop: nothing is left of the image", got=f"{rows} x {columns} pixels")
    if (rows, columns) == (height, width):
        return None
    return graph.integers(top, left), graph.integers(top + rows, left + columns)


def _corners_at_run_time(graph: _Graph, spec: PreprocessSpec, image: str) -> tuple[str, str]:
    """`PreprocessSpec.crop_box` as int64 nodes on the image's shape.

    Of operators that every opset has; measured on a CPU they cost 7 microseconds.
    """
    share = _share(spec.crop)
    sides = (spec.size[1], spec.size[0])
    lengths = graph.shape(image, 1, 3)
    products = graph.add("Mul", [lengths, graph.integers(*sides)])
    first = graph.slice(products, graph.integers(0), graph.integers(1), [0])
    second = graph.slice(products, graph.integers(1), graph.integers(2), [0])
    smaller = graph.add("Where", [graph.add("Less", [first, second]), first, second])
    reach = graph.add("Mul", [smaller, graph.integers(share.numerator)])
    divisors = [share.denominator * side for side in sides]
    halves = graph.integers(*(divisor // 2 for divisor in divisors))
    box = graph.add("Div", [graph.add("Add", [reach, halves]), graph.integers(*divisors)])
    margin = graph.add("Sub", [lengths, box])
    starts = graph.add("Div", [margin, graph.integers(2)])
    return starts, graph.add("Add", [starts, box])


def _share(crop: float) -> Fraction:
    """The crop as a small fraction, so that boxes are exact integers: 0.875 is 7/8."""
    return Fraction(crop).limit_denominator(1000)


def _rounded(numerator: int, denominator: int) -> int:
    return (numerator + denominator // 2) // denominator


class _Graph:
    """Nodes and constants in the making; every method returns the name of the tensor it adds."""

    def __init__(self, opset: int) -> None:
        from engines.onnx_package import onnx

        self._onnx = onnx
        self._opset = opset
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def add(
        self, operator: str, inputs: Sequence[str], *, output: str | None = None, **attributes: Any
    ) -> str:
        output = output or f"{operator.lower()}_{len(self._nodes)}"
        node = self._onnx.helper.make_node(operator, inputs, [output], name=output, **attributes)
        self._nodes.append(node)
        return output

    def constant(self, values: NDArray[np.generic]) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants.append(self._onnx.numpy_helper.from_array(values, name))
        return name

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def cast(self, tensor: str) -> str:
        return self.add("Cast", [tensor], to=self._onnx.TensorProto.FLOAT)

    def slice(self, tensor: str, starts: str, ends: str, axes: Sequence[int]) -> str:
        return self.add("Slice", [tensor, starts, ends, self.integers(*axes)])

    def shape(self, tensor: str, start: int, end: int) -> str:
        """Lengths of the axes from `start` to `end`, exclusive."""
        whole = self.add("Shape", [tensor])
        return self.slice(whole, self.integers(start), self.integers(end), [0])

    def resize(self, tensor: str, to: TensorSpec, antialias: bool) -> str:
        """Linear, half_pixel, to the shape of `to`.

        Given as sizes, because a scale in float32 can miss the size by one; and for all axes,
        because TensorRT's parser takes the attribute `axes` for a batch of -1 samples.
        """
        sizes = self.add(
            "Concat", [self.shape(tensor, 0, 1), self.integers(*to.sample_shape())], axis=0
        )
        nothing = self.constant(np.zeros(0, np.float32))
        # exclude_outside makes it what Pillow and torch do at the edges.
        filters: dict[str, Any] = {"antialias": 1, "exclude_outside": 1} if antialias else {}
        return self.add(
            "Resize",
            [tensor, nothing, nothing, sizes],
            mode="linear",
            coordinate_transformation_mode="half_pixel",
            **filters,
        )

    def model(self, image: TensorSpec, output: TensorSpec, ir_version: int) -> onnx.ModelProto:
        helper = self._onnx.helper
        types = self._onnx.TensorProto
        graph = helper.make_graph(
            self._nodes,
            "preprocess",
            [helper.make_tensor_value_info(image.name, types.UINT8, image.shape)],
            [helper.make_tensor_value_info(output.name, types.FLOAT, output.shape)],
            self._constants,
        )
        model: onnx.ModelProto = helper.make_model(
            graph,
            producer_name="edge-runtime",
            ir_version=ir_version,
            opset_imports=[helper.make_opsetid("", self._opset)],
        )
        self._onnx.checker.check_model(model, full_check=True)
        return model
