"""Named tensors at the boundaries between stages: the only checker of names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError, InputError

#: The dtypes that may cross a boundary, each of which NumPy, ONNX and TensorRT know.
DTYPES = ("bool", "uint8", "int8", "int32", "int64", "float16", "float32")

# Made once: `TensorSpec.check` is called for every frame.
_NUMPY = {name: np.dtype(name) for name in DTYPES}

#: The name of the first axis of every tensor that can carry more than one sample.
BATCH = "batch"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and dtype of one tensor.

    Attributes:
        name: Unique within a cascade.
        shape: Axis lengths; a str names an axis whose length is known later. The first axis is
            the batch: "batch", or 1 for a stage that takes one sample at a time. A camera image
            is ("batch", "height", "width", 3).
        dtype: One of `DTYPES`.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    def __post_init__(self) -> None:
        """Refuse what no stage could have."""
        if not self.name:
            raise ConfigError("a tensor has an empty name")
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"tensor {self.name!r}: dtype", got=repr(self.dtype), expected=", ".join(DTYPES)
            )
        if not self.shape or self.shape[0] not in (BATCH, 1):
            raise ConfigError(
                f"tensor {self.name!r}: first axis",
                got=list(self.shape),
                expected=f"{BATCH!r}, or 1 for one sample at a time",
            )
        for axis in self.shape:
            if axis == "" or (isinstance(axis, int) and axis < 1):
                raise ConfigError(
                    f"tensor {self.name!r}: shape",
                    got=list(self.shape),
                    expected="lengths >= 1 or names",
                )

    def resolve(self, axes: Mapping[str, int]) -> TensorSpec:
        """The same tensor with the named axes of `axes` replaced by their lengths."""
        shape = tuple(axes.get(a, a) if isinstance(a, str) else a for a in self.shape)
        return TensorSpec(self.name, shape, self.dtype)

    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample, without the batch axis.

        Raises:
            ConfigError: An axis still has a name instead of a length.
        """
        lengths = []
        for axis in self.shape[1:]:
            if isinstance(axis, str):
                raise ConfigError(f"tensor {self.name!r}: the length of axis {axis!r} is not known")
            lengths.append(axis)
        return tuple(lengths)

    def meets(self, consumer: TensorSpec) -> bool:
        """Whether a consumer that declares `consumer` can take what this spec's producer writes.

        A named axis meets any length; lengths and dtypes must be equal.
        """
        return (
            self.dtype == consumer.dtype
            and len(self.shape) == len(consumer.shape)
            and all(
                a == b or isinstance(a, str) or isinstance(b, str)
                for a, b in zip(self.shape[1:], consumer.shape[1:], strict=True)
            )
        )

    def check(self, array: object) -> NDArray[Any]:
        """Check an array that somebody hands in at run time.

        Args:
            array: Batch of any size >= 1.

        Returns:
            The same array.

        Raises:
            InputError: Not an array, another dtype or shape, an empty batch, or non-finite values.
        """
        if not isinstance(array, np.ndarray):
            raise InputError(
                f"input {self.name!r}", got=type(array).__name__, expected="a numpy.ndarray"
            )
        if array.dtype != _NUMPY[self.dtype]:
            # A dtype of foreign byte order has the same name, but not the same str().
            raise InputError(f"input {self.name!r}: dtype", got=array.dtype, expected=self.dtype)
        if array.shape[1:] != self.shape[1:] and not self._fits(array.shape):
            raise InputError(f"input {self.name!r}: shape", got=array.shape, expected=str(self))
        if array.shape[0] == 0:
            raise InputError(f"input {self.name!r}: the batch is empty", got=array.shape)
        if self.dtype in ("float16", "float32") and not np.isfinite(array).all():
            raise InputError(f"input {self.name!r} has NaN or infinite values")
        return array

    def _fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array's shape has the lengths that are known, whatever its batch."""
        return len(shape) == len(self.shape) and all(
            isinstance(want, str) or have == want
            for have, want in zip(shape[1:], self.shape[1:], strict=True)
        )

    def __str__(self) -> str:
        """The shape and dtype as people write them: (batch, 3, 224, 224) float32."""
        return f"({', '.join(str(axis) for axis in self.shape)}) {self.dtype}"
