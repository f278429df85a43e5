"""The `decide` kernels of a cascade's exits, with their rules in device memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends.cuda import decide
from edge_runtime.backends.cuda.base import Condition, Cuda, Kernel, MappedMemory, Memory, Stream
from edge_runtime.backends.cuda.slots import Keep, Slot
from edge_runtime.tensors import TensorSpec


class Call(NamedTuple):
    """What `Stream.launch` and `Body.launch` take."""

    kernel: Kernel
    grid: int
    block: int
    arguments: tuple[Any, ...]


class Judge:
    """Puts exits' decisions on a stream or into a graph.

    Args:
        cuda: The device.
        exits: Specs of the logits of the evaluated exits, in order.
        batch: Samples of every run.
        conditionals: Whether decisions can open a branch of a graph.
        keep: Takes what must be closed later.
    """

    def __init__(
        self,
        cuda: Cuda,
        exits: Sequence[TensorSpec],
        *,
        batch: int,
        conditionals: bool,
        keep: Keep,
    ) -> None:
        self._exits = exits
        self._batch = batch
        kinds = (False, True) if conditionals else (False,)
        names = sorted({decide.kernel_name(spec.dtype, kind) for spec in exits for kind in kinds})
        self._kernels = cuda.kernels(decide.source(), names, conditionals=conditionals)
        size = len(exits) * decide.RULE.itemsize
        self._rules: Memory = keep(cuda.memory(size))
        self._source: MappedMemory = keep(cuda.mapped_memory(size))
        self.rules = self._source.host.view(decide.RULE)
        self._state: Memory = keep(cuda.memory(batch * decide.STATE.itemsize))

    def write(self, rules: NDArray[Any], stream: Stream) -> None:
        """Replace the rules, behind all frames that are on `stream`, and wait until it is done.

        Args:
            rules: One per exit, as `decide.rules` makes them.
            stream: The one that frames run on.
        """
        self.rules[:] = rules
        stream.copy(self._rules.address, self._source.address, self._rules.nbytes)
        stream.synchronize()

    def call(
        self,
        k: int,
        slot: Slot,
        logits: int,
        *,
        record: int | None = None,
        on_device: bool = False,
        condition: Condition | None = None,
    ) -> Call:
        """How exit `k` is judged for the frame in a slot.

        Args:
            k: Index of the exit among the evaluated ones.
            slot: The frame's memory.
            logits: Their device address.
            record: Where the verdict goes; the slot's own record where None.
            on_device: Whether the device ends the frame here, rather than the host.
            condition: Of the branch that runs if the sample goes on.
        """
        spec = self._exits[k]
        arguments = (
            np.uint64(logits),
            np.int32(spec.shape[1]),
            np.uint64(self._rules.address + k * decide.RULE.itemsize),
            np.uint64(slot.control),
            np.uint64(self._state.address),
            np.uint64(slot.record[k] if record is None else record),
            np.uint64(slot.answer if on_device else 0),
            np.int32(k),
            np.int32(k == 0),
            np.int32(on_device and condition is None),
        )
        kernel = self._kernels[decide.kernel_name(spec.dtype, condition is not None)]
        more = () if condition is None else (condition,)
        return Call(kernel, self._batch, decide.THREADS, (*arguments, *more))
