"""A whole model as one TensorRT engine, run as people do: copy in, enqueue, copy out, wait."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends.cuda.base import Cuda, MappedMemory
from edge_runtime.backends.tensorrt import api

_BYTES = {"FLOAT": 4, "INT64": 8, "UINT8": 1}


class WholeEngine:
    """An engine from an image to a few outputs.

    Args:
        cuda: The device.
        trt: TensorRT.
        plan: The engine.
        image: Name of its input.
        shape: Shape of its input, uint8.
    """

    def __init__(
        self, cuda: Cuda, trt: Any, plan: bytes, image: str, shape: tuple[int, ...]
    ) -> None:
        self._cuda, self._trt, self._plan = cuda, trt, plan
        self._name, self._shape = image, shape
        self._stack = ExitStack()

    def __enter__(self) -> WholeEngine:
        """Load it, and allocate its tensors."""
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _open(self) -> None:
        keep = self._stack.enter_context
        self._log = api.Log(self._trt)
        self._stream = keep(self._cuda.stream())
        nbytes = int(np.prod(self._shape))
        inbox: MappedMemory = keep(self._cuda.mapped_memory(nbytes))
        self._inbox, self._image = inbox, keep(self._cuda.memory(nbytes))
        self._host = inbox.host.reshape(self._shape)
        self._runtime: Any = self._trt.Runtime(self._log.native)
        engine = self._runtime.deserialize_cuda_engine(self._plan)
        self._engine: Any = self._log.check(engine, "the engine can't be loaded")
        context = self._engine.create_execution_context()
        self._context: Any = self._log.check(context, "no execution context")
        self._stack.callback(self._release)
        if -1 in tuple(self._engine.get_tensor_shape(self._name)):
            self._context.set_input_shape(self._name, self._shape)
        self._context.set_tensor_address(self._name, self._image.address)
        self._outputs = []
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            if name != self._name:
                self._outputs.append(self._output(name))

    def _output(self, name: str) -> tuple[MappedMemory, int, int]:
        """Where an output goes on the host, where it is on the device, and its size."""
        keep = self._stack.enter_context
        width = _BYTES[self._engine.get_tensor_dtype(name).name]
        nbytes = width * int(np.prod(tuple(self._context.get_tensor_shape(name))))
        there, here = keep(self._cuda.memory(nbytes)), keep(self._cuda.mapped_memory(nbytes))
        self._context.set_tensor_address(name, there.address)
        return here, there.address, nbytes

    def _release(self) -> None:
        self._context = self._engine = self._runtime = None

    def __call__(self, image: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Run one image; returns the bytes of each output."""
        self._host[0] = image
        stream = self._stream
        stream.copy(self._image.address, self._inbox.address, self._host.nbytes)
        self._log.check(self._context.execute_async_v3(stream.handle), "TensorRT did not run")
        for here, there, nbytes in self._outputs:
            stream.copy(here.address, there, nbytes)
        stream.synchronize()
        return [here.host for here, _, _ in self._outputs]

    def __exit__(self, *_: object) -> None:
        """Free it."""
        self._stack.close()
