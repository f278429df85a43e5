"""A cascade of small CUDA kernels: its images carry the logits of every exit, so nothing is learnt.

It lets the execution modes be checked and timed with nothing but a driver. The preprocessing takes
the first rows of the image, segments hand them on and keep the device busy for as many steps as
they are told, and head k reads row k. The kernels are written in the subset of CUDA C++ that
`decide.cu` uses; `FAKE` has the same semantics for the fake device.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends.cuda.base import Argument, Kernel, Memory, Stream
from edge_runtime.backends.cuda.fake import FakeCuda, Function
from edge_runtime.backends.cuda.stages import LaunchedStages
from edge_runtime.cascade import Cascade, Exit, Stage
from edge_runtime.tensors import TensorSpec

#: A value in the image that a head turns into NaN: images themselves must be finite. Float16 and
#: float32 both hold it exactly.
NAN = 60000.0

#: Threads of a block; a stage is launched on one block per sample.
THREADS = 256

SOURCE = r"""
#if defined(__CUDACC_RTC__) && defined(GRAPH_CONDITIONALS)
typedef unsigned long long cudaGraphConditionalHandle;
extern "C" __device__ __cudart_builtin__ void CUDARTAPI
cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned int value);
#endif

// Copy the first `count` elements of this block's sample, then take `steps` steps that depend on
// each other; where they lead is stored, so that no compiler leaves them out.
template <typename T>
__device__ void hand_on(const T* source, T* target, unsigned source_stride,
                        unsigned target_stride, unsigned count, unsigned steps, unsigned* led_to) {
    const unsigned long long sample = blockIdx.x;
    for (unsigned i = threadIdx.x; i < count; i += blockDim.x) {
        target[sample * target_stride + i] = source[sample * source_stride + i];
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        unsigned x = 1;
#pragma unroll 1
        for (unsigned i = 0; i < steps; ++i) x = x * 1664525u + 1013904223u;
        *led_to = x;
    }
}

// Copy one row of this block's sample; values are compared and replaced by their bits.
template <typename T>
__device__ void take_row(const T* source, T* target, unsigned row, unsigned rows,
                         unsigned classes, T marked, T nan) {
    const unsigned long long sample = blockIdx.x;
    const T* values = source + (sample * rows + row) * classes;
    for (unsigned i = threadIdx.x; i < classes; i += blockDim.x) {
        target[sample * classes + i] = values[i] == marked ? nan : values[i];
    }
}

#define HAND_ON(T)                                                                        \
    const T *source, T *target, unsigned source_stride, unsigned target_stride,           \
        unsigned count, unsigned steps, unsigned *led_to
#define TAKE_ROW(T) const T *source, T *target, unsigned row, unsigned rows, unsigned classes

extern "C" __global__ void hand_on_float32(HAND_ON(unsigned)) {
    hand_on(source, target, source_stride, target_stride, count, steps, led_to);
}
extern "C" __global__ void hand_on_float16(HAND_ON(unsigned short)) {
    hand_on(source, target, source_stride, target_stride, count, steps, led_to);
}
extern "C" __global__ void take_row_float32(TAKE_ROW(unsigned)) {
    take_row(source, target, row, rows, classes, 0x476a6000u, 0x7fc00000u);
}
extern "C" __global__ void take_row_float16(TAKE_ROW(unsigned short)) {
    const unsigned short marked = 0x7b53, nan = 0x7e00;
    take_row(source, target, row, rows, classes, marked, nan);
}

// What the timings of launches and branches are made with.
extern "C" __global__ void tell(unsigned* word, unsigned value) {
    if (threadIdx.x == 0) *(volatile unsigned*)word = value;
}
extern "C" __global__ void count(unsigned* counter) {
    if (threadIdx.x == 0) *counter += 1;
}

#ifdef GRAPH_CONDITIONALS
extern "C" __global__ void count_next(unsigned* counter, const unsigned* go,
                                      unsigned long long next) {
    if (threadIdx.x != 0) return;
    *counter += 1;
    if (*go) cudaGraphSetConditional(next, 1);
}
#endif
"""

#: The kernels of the stages, and those that need GRAPH_CONDITIONALS.
STAGE_KERNELS = ("hand_on_float32", "hand_on_float16", "take_row_float32", "take_row_float16")
PLAIN_KERNELS = ("tell", "count")
BRANCH_KERNELS = (*PLAIN_KERNELS, "count_next")


def cascade(
    exits: int = 4, classes: int = 10, *, rows: int | None = None, dtype: str = "float32"
) -> Cascade:
    """Preprocess, then a segment and a head per exit.

    Args:
        exits: Number of exits.
        classes: Logits per exit.
        rows: Rows of the image; the first `exits` are logits, further ones only take time to copy.
        dtype: "float32" or "float16", of everything.
    """
    image = TensorSpec("image", ("batch", rows or exits, classes), dtype)
    before = TensorSpec("pixels", ("batch", exits, classes), dtype)
    stages = [Stage("preprocess", "preprocess", (image,), (before,))]
    found = []
    for k in range(exits):
        after = TensorSpec(f"features{k}", ("batch", exits, classes), dtype)
        logits = TensorSpec(f"logits{k}", ("batch", classes), dtype)
        stages.append(Stage(f"segment{k}", "segment", (before,), (after,)))
        stages.append(Stage(f"head{k}", "head", (after,), (logits,)))
        found.append(Exit(f"exit{k}", logits.name))
        before = after
    names = tuple(f"class{i}" for i in range(classes))
    return Cascade(names, image, tuple(stages), tuple(found))


def images(of: Cascade, count: int, *, seed: int = 0, scale: float = 3.0) -> NDArray[Any]:
    """Random logits for every exit, shape (count, rows, classes)."""
    shape = (count, *of.image.sample_shape())
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return values.astype(of.image.dtype)


def logits(image: NDArray[Any], exit: int) -> NDArray[Any]:
    """What a head makes of an image, shape (classes,)."""
    row: NDArray[Any] = image[exit].copy()
    row[row == image.dtype.type(NAN)] = np.nan
    return row


@functools.lru_cache(maxsize=1024)
def led_to(steps: int) -> int:
    """Where the busy loop arrives, without walking there."""
    factor, offset, a, c, left = 1, 0, 1664525, 1013904223, steps
    while left:
        if left & 1:
            factor, offset = factor * a % 2**32, (offset * a + c) % 2**32
        a, c, left = a * a % 2**32, (c * a + c) % 2**32, left >> 1
    return (factor + offset) % 2**32


class KernelStages(LaunchedStages):
    """Runs the stages of `cascade` as kernels.

    Args:
        steps: Steps that each segment keeps the device busy for; some nanoseconds each.
        preprocess_steps: The same for the preprocessing.
    """

    name = "kernels"

    def __init__(self, *, steps: int = 0, preprocess_steps: int = 0) -> None:
        super().__init__()
        self._steps = {"segment": steps, "preprocess": preprocess_steps}

    def _load(self) -> None:
        self._kernels = self._cuda.kernels(SOURCE, STAGE_KERNELS)
        words = len(self._work.stages) * len(self._work.images)
        self.led_to: Memory = self._stack.enter_context(self._cuda.memory(4 * words))

    def enqueue(self, stage: str, slot: int, stream: Stream) -> None:
        """Launch the stage's kernel."""
        kernel, arguments = self._call(stage, slot)
        stream.launch(kernel, self._work.batch, THREADS, arguments)

    def _call(self, stage: str, slot: int) -> tuple[Kernel, Sequence[Argument]]:
        known = self._stages[stage]
        (source,), (target,) = known.inputs, known.outputs
        dtype = target.dtype
        addresses = [np.uint64(self.address(spec.name, slot)) for spec in (source, target)]
        if known.kind == "head":
            row = int(stage.removeprefix("head"))
            numbers = [row, *self._specs[source.name].sample_shape()]
            return self._kernels[f"take_row_{dtype}"], [*addresses, *map(np.uint32, numbers)]
        strides = [int(np.prod(spec.sample_shape())) for spec in (source, target)]
        numbers = [*strides, strides[1], self._steps[known.kind]]
        place = list(self._stages).index(stage) * len(self._work.images) + slot
        arrived = np.uint64(self.led_to.address + 4 * place)
        return self._kernels[f"hand_on_{dtype}"], [*addresses, *map(np.uint32, numbers), arrived]


def _hand_on(bits: str, cuda: FakeCuda, grid: int, arguments: Sequence[Argument]) -> None:
    source, target, source_stride, target_stride, count, steps, arrived = arguments
    values = cuda.array(source, bits, grid, int(source_stride))
    cuda.array(target, bits, grid, int(target_stride))[:, :count] = values[:, :count]
    cuda.array(arrived, "uint32", 1)[0] = led_to(int(steps))


def _take_row(
    bits: str, marked: int, nan: int, cuda: FakeCuda, grid: int, arguments: Sequence[Argument]
) -> None:
    source, target, row, rows, classes = arguments
    values = cuda.array(source, bits, grid, int(rows), int(classes))[:, int(row)]
    made = np.where(values == marked, np.array(nan, bits), values)
    cuda.array(target, bits, grid, int(classes))[:] = made


def _tell(cuda: FakeCuda, grid: int, arguments: Sequence[Argument]) -> None:
    word, value = arguments
    cuda.array(word, "uint32", 1)[0] = value


def _count(cuda: FakeCuda, grid: int, arguments: Sequence[Argument]) -> None:
    cuda.array(arguments[0], "uint32", 1)[0] += 1


def _count_next(cuda: FakeCuda, grid: int, arguments: Sequence[Argument]) -> None:
    counter, go, condition = arguments
    cuda.array(counter, "uint32", 1)[0] += 1
    if cuda.array(go, "uint32", 1)[0]:
        cuda.set_condition(int(condition), 1)


#: The kernels for `FakeCuda(kernels=...)`.
FAKE: Mapping[str, Function] = {
    "hand_on_float32": functools.partial(_hand_on, "uint32"),
    "hand_on_float16": functools.partial(_hand_on, "uint16"),
    "take_row_float32": functools.partial(_take_row, "uint32", 0x476A6000, 0x7FC00000),
    "take_row_float16": functools.partial(_take_row, "uint16", 0x7B53, 0x7E00),
    "tell": _tell,
    "count": _count,
    "count_next": _count_next,
}
