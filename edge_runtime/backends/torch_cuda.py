"""Live torch modules on a GPU, each captured once as a CUDA graph.

What `backends.torch` runs eagerly runs here through the execution modes of `backends.cuda`, as
TensorRT engines do. torch's allocator gives each capture its memory from a pool; stages that run
one after another share one, since none of them reads what another one keeps for itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.backends.cuda.base import Cuda, ExecutableGraph, Stream
from edge_runtime.backends.cuda.stages import DeviceStages, Work
from edge_runtime.backends.torch import (
    PRECISION,
    freeze,
    import_torch,
    module_of,
    restore,
    run_module,
    torch_error,
)
from edge_runtime.cascade import Stage
from edge_runtime.errors import BackendError, BackendUnavailable, ConfigError
from edge_runtime.tensors import TensorSpec

if TYPE_CHECKING:
    import torch

#: Eager runs before a capture: libraries choose their algorithms and allocate workspaces in them.
_WARM_UPS = 3


class TorchStages(DeviceStages):
    """Runs the stages of a cascade as captured torch modules.

    Modules are run in eval mode, without gradients. They are not copied, and the captures refer to
    the memory of their parameters: train them further only after `close`.

    Args:
        modules: Stage name -> module; moved to the device by `open`.
        device: Index of the GPU.
    """

    name = "torch"

    def __init__(self, modules: Mapping[str, torch.nn.Module], *, device: int = 0) -> None:
        self._modules = dict(modules)
        self._index = device
        self._device = f"cuda:{device}"
        self._training: dict[torch.nn.Module, bool] = {}
        self._tensors: dict[tuple[str, int], torch.Tensor] = {}
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        self._executables: dict[tuple[str, int], ExecutableGraph] = {}
        self._stack = ExitStack()

    def open(self, cuda: Cuda, work: Work, stream: Stream) -> None:
        """Move, warm up and capture every stage."""
        if cuda.facts.index != self._index:
            raise ConfigError(
                "the modules' GPU",
                got=self._index,
                expected=f"{cuda.facts.index}, which the cascade is opened on",
            )
        self._torch = torch_ = import_torch(self._device)
        if not hasattr(torch_.cuda.CUDAGraph, "raw_cuda_graph"):
            raise BackendUnavailable(
                "torch",
                got=torch_.__version__,
                expected="2.8 or later, whose graphs can be embedded",
            )
        self._work = work
        self._tensors, self._graphs = {}, {}
        self._by_name = {stage.name: stage for stage in work.stages}
        for slot, address in enumerate(work.images):
            self._tensors[work.image.name, slot] = self._view(address, work)
        # Stages that run beside the others need memory of their own, and a stream of their own
        # while they are captured: libraries keep a workspace per stream.
        beside = self._stack.enter_context(cuda.stream())
        external, pool = torch_.cuda.ExternalStream, torch_.cuda.graph_pool_handle
        places = {
            ahead: (external(one.handle, device=self._device), pool())
            for ahead, one in ((False, stream), (True, beside))
        }
        for stage in work.stages:
            freeze(module_of(stage, self._modules, work.variants), self._device, self._training)
        for stage in work.stages:
            for slot in work.slots_of(stage):
                self._capture(stage, slot, *places[stage.name in work.ahead])
                if not cuda.why_no_graphs():
                    self._executables[stage.name, slot] = self._embedded(cuda, stage.name, slot)

    def close(self) -> None:
        """Free the captures; the modules get their mode back."""
        self._executables = {}
        try:
            self._stack.close()
        finally:
            for graph in self._graphs.values():
                graph.reset()
            self._graphs, self._tensors = {}, {}
            restore(self._training)

    def enqueue(self, stage: str, slot: int, stream: Stream) -> None:
        """Launch the captured stage."""
        key = self._key(stage, slot)
        executable = self._executables.get(key)
        if executable is not None:
            executable.launch(stream)
            return
        outer = self._torch.cuda.ExternalStream(stream.handle, device=self._device)
        with self._torch.cuda.stream(outer):
            self._graphs[key].replay()

    def captured(self, stage: str, slot: int) -> int:
        """The capture's native graph."""
        return int(self._graphs[self._key(stage, slot)].raw_cuda_graph())

    def address(self, tensor: str, slot: int) -> int:
        """Where the capture left the tensor."""
        found = self._tensors[tensor, slot if tensor in self._work.slotted else 0]
        return int(found.data_ptr())

    def precision(self, stage: str) -> str:
        """Always "fp32", whatever the module computes in."""
        return PRECISION

    def _key(self, stage: str, slot: int) -> tuple[str, int]:
        return stage, slot if slot in self._work.slots_of(self._by_name[stage]) else 0

    def _view(self, address: int, work: Work) -> torch.Tensor:
        """The image at an address of ours as a tensor, without a copy."""
        view = _DeviceArray(address, work.batch, work.image)
        tensor: torch.Tensor = self._torch.as_tensor(view, device=self._device)
        if tensor.data_ptr() != address:
            raise BackendError("torch has copied the image's memory instead of sharing it")
        return tensor

    def _capture(self, stage: Stage, slot: int, stream: torch.cuda.Stream, pool: Any) -> None:
        """Run a stage eagerly, then once more while its stream is captured."""
        inputs = [self._tensors[self._place(spec, slot)] for spec in stage.inputs]
        module, torch_ = self._modules[stage.name], self._torch
        with torch_.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run_module(torch_, stage, module, inputs)
        stream.synchronize()
        graph = torch_.cuda.CUDAGraph(keep_graph=True)
        failed: list[Exception] = []
        try:
            # The outer context gives the stream back even where ending the capture fails.
            with (
                torch_.cuda.stream(stream),
                torch_.cuda.graph(
                    graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                ),
            ):
                outputs = self._captured_outputs(stage, slot, inputs, failed)
            graph.instantiate()
        except (RuntimeError, BackendError) as error:
            first = failed[0] if failed else error
            raise BackendError(
                f"{torch_error(first, f'stage {stage.name!r} can not be captured')}",
                stage=stage.name,
                remedy="A stage must not wait, allocate outside of torch, or look at values. "
                "torch can't be relied on after this: start the process anew",
            ) from first
        self._graphs[stage.name, slot] = graph
        for spec, output in zip(stage.outputs, outputs, strict=True):
            # Holding the tensor keeps the pool from giving its memory to the next capture.
            self._tensors[self._place(spec, slot)] = output
        with torch_.cuda.stream(stream):
            graph.replay()
        stream.synchronize()

    def _captured_outputs(
        self,
        stage: Stage,
        slot: int,
        inputs: Sequence[torch.Tensor],
        failed: list[Exception],
    ) -> list[torch.Tensor]:
        """Run the module once for the capture; its outputs are where later stages read them."""
        try:
            made = run_module(self._torch, stage, self._modules[stage.name], inputs)
            own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
            with self._torch.inference_mode():
                return [
                    self._put(spec, slot, output, own)
                    for spec, output in zip(stage.outputs, made, strict=True)
                ]
        except (RuntimeError, BackendError) as error:
            # What torch raises when the capture ends would hide this.
            failed.append(error)
            raise

    def _put(
        self, spec: TensorSpec, slot: int, output: torch.Tensor, own: set[int]
    ) -> torch.Tensor:
        """An output in its place: where it is, or where the first slot's capture has put it.

        Args:
            spec: The tensor.
            slot: The slot that is captured.
            output: What the module returned.
            own: Addresses of the memory of its inputs: an output that is a view of one would
                change with it. One that a module keeps would be the same for both slots.
        """
        known = self._tensors.get(self._place(spec, slot))
        if known is not None:
            return known.copy_(output)
        slots = len(self._work.images) if spec.name in self._work.slotted else 1
        if slots > 1 or output.untyped_storage().data_ptr() in own:
            return output.clone().contiguous()
        return output.contiguous()

    def _place(self, spec: TensorSpec, slot: int) -> tuple[str, int]:
        """Where a tensor stands: the slots share those that are computed after the image's."""
        return spec.name, slot if spec.name in self._work.slotted else 0

    def _embedded(self, cuda: Cuda, stage: str, slot: int) -> ExecutableGraph:
        """The stage as a graph of ours, which is launched without going through torch."""
        with cuda.graph() as graph:
            graph.embed(self.captured(stage, slot))
            executable: ExecutableGraph = self._stack.enter_context(graph.instantiate())
        return executable


class _DeviceArray:
    """Device memory as the CUDA array interface describes it (version 3)."""

    def __init__(self, address: int, batch: int, spec: TensorSpec) -> None:
        self.__cuda_array_interface__ = {
            "shape": (batch, *spec.sample_shape()),
            "typestr": np.dtype(spec.dtype).str,
            "data": (address, False),
            "version": 3,
        }
