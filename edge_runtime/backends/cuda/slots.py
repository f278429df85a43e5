"""The memory of one frame: how its image gets to the device, and what its exits said back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends.cuda import base, decide
from edge_runtime.backends.cuda.stages import sample_nbytes
from edge_runtime.tensors import TensorSpec

#: The control record stands before the image, so that one copy brings both; device memory is read
#: in lines of this size.
_HEADER = 256
#: `Control.deepest` where no exit is forced to answer.
NO_DEADLINE = 2**32 - 1

#: Keeps a resource and closes it later.
Keep = Callable[[Any], Any]


class Slot:
    """One frame's memory, used again only when the host has the frame's answer.

    Attributes:
        number: Its index among the slots.
        image: Device address of the image, shape (batch, ...).
        control: Device address of the control record.
        records: What the exits said, for the host.
        arrived: The image has been brought to the device and the stages run ahead are done.
    """

    def __init__(
        self, number: int, cuda: base.Cuda, spec: TensorSpec, batch: int, exits: int, keep: Keep
    ) -> None:
        self.number = number
        self.samples = 0
        self.sequence = 0
        self._bytes = _HEADER + batch * sample_nbytes(spec)
        inbox: base.MappedMemory = keep(cuda.mapped_memory(self._bytes))
        self._control = inbox.host[: decide.CONTROL.itemsize].view(decide.CONTROL)
        self._images = inbox.host[_HEADER:].view(spec.dtype).reshape(batch, *spec.sample_shape())
        self._source = inbox.address
        # A Jetson's GPU shares the host's memory. Preprocessing reads the image about once, so
        # copying it first would read it once more; which is faster has not been measured yet.
        self._copied = not cuda.facts.integrated
        self.control = keep(cuda.memory(self._bytes)).address if self._copied else inbox.address
        self.image = self.control + _HEADER

        stride = batch * decide.RECORD_BYTES
        outbox: base.MappedMemory = keep(cuda.mapped_memory(_HEADER + exits * stride))
        self.answer = outbox.address
        self._record_bytes = outbox.host[_HEADER:].reshape(exits, stride)
        self.records = decide.Records(outbox.host[_HEADER:], exits, batch, outbox.host[:8])
        self.record = [outbox.address + _HEADER + k * stride for k in range(exits)]
        self.arrived: base.Event = keep(cuda.event())

    def write(self, images: NDArray[Any], sequence: int) -> None:
        """Take in a frame; the device must be done with the one before."""
        self.samples = len(images)
        self.sequence = sequence
        np.copyto(self._images[: self.samples], images, casting="no")

    def limit(self, deepest: int) -> None:
        """From the exit `deepest` on, every sample leaves; to be called before `bring`."""
        self._control[0] = (self.sequence, deepest, self.samples, 0)

    def bring(self, to: base.Stream | base.Body) -> None:
        """Copy control record and image to the device, where it has memory of its own."""
        if self._copied:
            to.copy(self.control, self._source, self._bytes)

    def forget(self, k: int) -> None:
        """Make the record of exit `k` unread, before the same frame is judged there again."""
        self._record_bytes[k] = 0
