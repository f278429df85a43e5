"""The contract of everything that runs a stage.

A backend owns the named tensors of one cascade: the scheduler feeds an image, asks for stages to be
run and exits to be decided, and never sees a buffer. Tensors stay where the backend keeps them
(host arrays, device memory) and are reused by the next frame, so whatever `decide` or `read` hands
out is a copy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime import confidence
from edge_runtime.cascade import Plan, Stage
from edge_runtime.confidence import Decision, Metric
from edge_runtime.errors import BackendError
from edge_runtime.policy import Policy
from edge_runtime.prediction import Ended
from edge_runtime.tensors import TensorSpec

#: Bytes; also the width of the widest vector registers.
_CACHE_LINE = 64


class Collected(Protocol):
    """A frame of one image that the backend brought to its end by itself.

    Attributes:
        last: Index of the evaluated exit that answered.
        ended: Why it ended there.
    """

    last: int
    ended: Ended | Literal["not finite"]

    def decision(self, index: int) -> Decision:
        """What an exit said, up to the last one."""
        ...

    def seconds_to_end(self, index: int) -> float:
        """Time from an exit's decision to that of the last one."""
        ...


class Backend(ABC):
    """Runs the stages of a plan on named tensors.

    The constructor stores; `open` loads, and leaves nothing behind when it fails; `close` may be
    called at any time, any number of times.
    """

    #: Name as users write it.
    name: str
    #: Execution mode as the trace shows it: who decides what runs next, and how it waits.
    mode: str
    #: Whether `run` returns before the stage has run, so that its time can't be told.
    asynchronous: bool = False
    #: Whether a frame may be fed ahead, while another is in flight.
    ahead: bool = False
    #: Set before it is opened: what runs next is for the host to say, exit by exit.
    host_decides: bool = False
    #: Largest number of images per call; None for any.
    largest_batch: int | None = None

    @property
    def decides(self) -> bool:
        """Whether it decides itself where a frame ends (`launch`, `collect`)."""
        return False

    def open(self, plan: Plan, axes: Mapping[str, int], variants: Mapping[str, str]) -> None:
        """Load every stage of `plan`.

        Args:
            plan: What will be run.
            axes: Lengths of the image's named axes ("height", "width").
            variants: Stage name -> precision, for stages that don't run at their first variant.

        Raises:
            BackendError: A stage can't be loaded, or its file disagrees with the manifest.
            ConfigError: An axis has no length, or a variant does not exist.
        """
        try:
            self._open(plan, axes, variants)
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _open(self, plan: Plan, axes: Mapping[str, int], variants: Mapping[str, str]) -> None:
        """Load; on failure `open` closes what was loaded so far."""

    @abstractmethod
    def close(self) -> None:
        """Free everything."""

    @abstractmethod
    def feed(self, image: NDArray[Any]) -> None:
        """Begin a frame: copy in a checked batch of images, shape (batch, ...)."""

    def use(  # noqa: B027 - nothing to do for most backends
        self, policy: Policy, metric: Metric, temperatures: Sequence[float]
    ) -> None:
        """Take over an operating point, before the first frame or between two of them.

        Args:
            policy: Tells where samples leave; only a backend that decides needs it.
            metric: The signal of all exits.
            temperatures: Of each evaluated exit.

        Raises:
            ConfigError: It decides, and can't follow the policy.
        """

    def feed_ahead(self, image: NDArray[Any]) -> None:
        """Bring in the next batch while frames are in flight; needs `ahead`."""
        raise BackendError(f"the backend {self.name!r} takes one frame at a time")

    def done(self) -> None:  # noqa: B027 - nothing to do for most backends
        """The current frame is over; the one that was fed ahead becomes the current one."""

    def launch(self, deepest: int) -> None:
        """Start the frame that was fed last; needs `decides`.

        Args:
            deepest: Index of the evaluated exit that answers at the latest.
        """
        raise BackendError(f"the backend {self.name!r} does not decide by itself")

    def collect(self) -> Collected:
        """Wait for the oldest frame that was launched; needs `decides`.

        Raises:
            BackendError: The frame failed.
        """
        raise BackendError(f"the backend {self.name!r} does not decide by itself")

    @abstractmethod
    def run(self, stage: str) -> float | None:
        """Run one stage on the current tensors.

        Returns:
            Seconds that the stage took on the device, where the backend measures that, for every
            stage; None where the host's clock is to tell, or nothing can (`asynchronous`).

        Raises:
            BackendError: The stage failed; `.stage` names it.
        """

    @abstractmethod
    def decide(self, logits: str, metric: Metric, temperature: float) -> Decision:
        """Judge the logits tensor of an exit; see `confidence.decide`.

        Returns:
            Scalars for a frame that was fed with one image, else arrays of shape (batch,).
        """

    @abstractmethod
    def keep(self, rows: NDArray[np.intp], tensors: Sequence[str]) -> None:
        """Drop samples that left.

        Args:
            rows: Indices of the samples that stay, ascending.
            tensors: Tensors to compact to these rows; all others become undefined.
        """

    @abstractmethod
    def read(self, tensor: str) -> NDArray[Any]:
        """A copy of a tensor of the current frame, shape (batch, ...)."""

    @abstractmethod
    def precision(self, stage: str) -> str:
        """The precision at which a stage was loaded."""

    def __enter__(self) -> Backend:
        """The backend itself; open it explicitly."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


class HostBackend(Backend):
    """A backend whose tensors are numpy arrays: one buffer per tensor, grown to the largest batch.

    Buffers keep their address between frames of the same batch size, so a subclass may bind them
    once; `_moved` tells it when they have changed.
    """

    mode = "host"

    def __init__(self) -> None:
        self._specs: dict[str, TensorSpec] = {}
        self._buffers: dict[str, NDArray[Any]] = {}
        # The first row of each buffer: slicing anew for every frame costs ten microseconds.
        self._first: dict[str, NDArray[Any]] = {}
        self._capacity = 0
        self._batch = 0
        self._alone = False
        self._image = ""

    def _declare(self, plan: Plan, axes: Mapping[str, int]) -> dict[str, Stage]:
        """Take over the plan's tensors; returns its stages with every axis but the batch known."""
        stages = {}
        for stage in plan.stages:
            inputs = tuple(spec.resolve(axes) for spec in stage.inputs)
            outputs = tuple(spec.resolve(axes) for spec in stage.outputs)
            stages[stage.name] = Stage(stage.name, stage.kind, inputs, outputs)
            for spec in outputs:
                self._specs[spec.name] = spec
        self._image = plan.image.name
        self._specs[self._image] = plan.image.resolve(axes)
        for spec in self._specs.values():
            spec.sample_shape()
        return stages

    def close(self) -> None:
        """Forget the buffers."""
        self._specs = {}
        self._buffers = {}
        self._first = {}
        self._capacity = self._batch = 0

    def feed(self, image: NDArray[Any]) -> None:
        """Copy the batch in; a larger one than ever before makes every buffer grow."""
        if not self._specs:
            raise BackendError(f"the backend {self.name!r} is not open")
        self._batch = len(image)
        self._alone = self._batch == 1
        if self._batch > self._capacity:
            self._capacity = self._batch
            self._buffers = {
                spec.name: _aligned_zeros((self._capacity, *spec.sample_shape()), spec.dtype)
                for spec in self._specs.values()
            }
            self._first = {name: buffer[0] for name, buffer in self._buffers.items()}
            self._moved()
        np.copyto(self._view(self._image), image, casting="no")

    def _moved(self) -> None:
        """Called when the buffers were allocated anew."""

    def _view(self, tensor: str) -> NDArray[Any]:
        """The rows of a tensor that belong to the current frame, without a copy."""
        rows: NDArray[Any] = self._buffers[tensor][: self._batch]
        return rows

    def decide(self, logits: str, metric: Metric, temperature: float) -> Decision:
        """Judge the logits with numpy."""
        values = self._first[logits] if self._alone else self._view(logits)
        return confidence.decide(values, metric, temperature)

    def keep(self, rows: NDArray[np.intp], tensors: Sequence[str]) -> None:
        """Move the rows that stay to the front of each buffer."""
        for tensor in tensors:
            buffer = self._buffers[tensor]
            buffer[: len(rows)] = buffer[rows]
        self._batch = len(rows)

    def read(self, tensor: str) -> NDArray[Any]:
        """A copy of the current rows."""
        return np.array(self._view(tensor))


def _aligned_zeros(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Zeros that begin on a cache line, which vector loads want and numpy does not promise."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + _CACHE_LINE, np.uint8)
    first = -raw.ctypes.data % _CACHE_LINE
    return raw[first : first + size].view(dtype).reshape(shape)
