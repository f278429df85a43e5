"""Every implementation of the small CUDA interface does the same.

cuda-core and pycuda run on the emulated driver of tests/cuda_without_gpu, with kernels that the
real compilers made; the tests marked `gpu` run them on a device. The fake is held to the same.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from edge_runtime.backends.cuda import core, decide, probe
from edge_runtime.backends.cuda.base import Body, Cuda, Kernel, MappedMemory, Stream
from edge_runtime.backends.cuda.core import CudaCore
from edge_runtime.backends.cuda.fake import FakeCuda
from edge_runtime.backends.cuda.pycuda import PyCuda
from edge_runtime.errors import BackendUnavailable, CudaError
from tests import host_kernels
from tests.cuda_without_gpu import Emulated
from tests.cuda_without_gpu.driver import (
    ILLEGAL_ADDRESS,
    INVALID_IMAGE,
    NO_DEVICE,
    NOT_READY,
    OUT_OF_MEMORY,
    UNKNOWN,
)

SOURCE = """
#if defined(GRAPH_CONDITIONALS) && defined(__CUDACC__)
typedef unsigned long long cudaGraphConditionalHandle;
extern "C" __device__ __cudart_builtin__ void CUDARTAPI
cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned int value);
#endif

extern "C" __global__ void scale(float* data, int n, float factor) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) data[i] *= factor;
}

// Arguments of many widths, which must not get out of step.
extern "C" __global__ void add(float* data, signed char n, double a, short b, unsigned c) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) data[i] += (float)(a + b + c);
}

#ifdef GRAPH_CONDITIONALS
extern "C" __global__ void choose(const int* flags, int index, unsigned long long condition) {
    if (threadIdx.x == 0) cudaGraphSetConditional(condition, flags[index]);
}
#endif
"""
KERNELS = ("scale", "add")
N = 16


def _fake_scale(cuda: FakeCuda, grid: int, arguments: Any) -> None:
    data, n, factor = arguments
    cuda.array(data, "float32", int(n))[:] *= factor


def _fake_add(cuda: FakeCuda, grid: int, arguments: Any) -> None:
    data, n, a, b, c = arguments
    cuda.array(data, "float32", int(n))[:] += np.float32(a + b + c)


def _fake_choose(cuda: FakeCuda, grid: int, arguments: Any) -> None:
    flags, index, condition = arguments
    cuda.set_condition(condition, int(cuda.array(flags, "int32", int(index) + 1)[int(index)]))


def _fake() -> FakeCuda:
    return FakeCuda({"scale": _fake_scale, "add": _fake_add, "choose": _fake_choose})


MAKERS: dict[str, Callable[[], Cuda]] = {"cuda-core": CudaCore, "pycuda": PyCuda}
#: Those that a driver, emulated or real, stands behind.
EMULATED = ("cuda-core", pytest.param("pycuda", marks=pytest.mark.pycuda))
REAL = (
    *EMULATED,
    pytest.param("cuda-core on the GPU", marks=pytest.mark.gpu),
    pytest.param("pycuda on the GPU", marks=[pytest.mark.gpu, pytest.mark.pycuda]),
)
real = pytest.mark.parametrize("cuda", REAL, indirect=True)
#: For what nobody has asked a real driver yet, which may refuse later or by another code.
on_the_cpu = pytest.mark.parametrize("cuda", ["fake", *EMULATED], indirect=True)
#: What cuda-core 1.2 never gives back: it loads a library once and keeps it.
KEPT = {"cuda-core": {"library"}, "pycuda": set[str]()}


@pytest.fixture(scope="session")
def emulated_driver(emulated_driver: Emulated) -> Emulated:
    names = (*KERNELS, "choose")
    emulated_driver.register(host_kernels.compile_host([SOURCE], names), names)
    return emulated_driver


def _left(emulated: Emulated, name: str) -> Counter[str]:
    """What is alive though nobody holds it."""
    gc.collect()
    left = emulated.live_objects()
    for kind in KEPT[name]:
        del left[kind]
    if emulated.live_bytes():
        left["bytes"] = emulated.live_bytes()
    return left


@pytest.fixture(params=["fake", *REAL])
def cuda(request: pytest.FixtureRequest) -> Iterator[Cuda]:
    """An open device of each implementation; nothing may be left when it is closed."""
    name = request.param
    if name == "fake":
        with_device = _fake().open()
        yield with_device
        with_device.close()
        return
    package = name.removesuffix(" on the GPU")
    if name != package:
        device = MAKERS[package]().open()
        yield device
        device.close()
        return
    emulated: Emulated = request.getfixturevalue("emulated")
    references = emulated.primary_references()
    device = MAKERS[name]().open()
    yield device
    device.close()
    device.close()
    assert not _left(emulated, name)
    # cuda-core keeps one reference for each thread.
    assert emulated.primary_references() - references <= (1 if name == "cuda-core" else 0)


@pytest.fixture(params=EMULATED)
def name(request: pytest.FixtureRequest, emulated: Emulated) -> str:
    """The implementations that a driver can refuse."""
    return str(request.param)


@pytest.fixture
def bench(cuda: Cuda) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(cuda, stack)


class Bench:
    """A stream, kernels, and two numbers of arrays."""

    def __init__(self, cuda: Cuda, stack: ExitStack) -> None:
        self.cuda = cuda
        self.keep = stack.enter_context
        self.graphs = not cuda.why_no_graphs()
        self.stream: Stream = self.keep(cuda.stream())
        names = (*KERNELS, "choose") if self.graphs else KERNELS
        self.kernels = cuda.kernels(SOURCE, names, conditionals=self.graphs)
        self.host: MappedMemory = self.keep(cuda.mapped_memory(N * 4))
        self.device = self.keep(cuda.memory(N * 4))
        self.flags: MappedMemory = self.keep(cuda.mapped_memory(N * 4))

    def write(self, value: float) -> None:
        """Fill the host's array."""
        self.host.host.view(np.float32)[:] = value

    def read(self) -> float:
        """Wait, and look at the host's array, which must be of one value."""
        self.stream.synchronize()
        values = self.host.host.view(np.float32)
        assert (values == values[0]).all(), values
        return float(values[0])

    def choose(self, *flags: int) -> None:
        """Set what the kernel `choose` reads."""
        self.flags.host.view(np.int32)[: len(flags)] = flags

    def scale(self, to: Stream | Body, factor: float) -> None:
        """Multiply the host's array by a number."""
        to.launch(
            self.kernels["scale"],
            2,
            8,
            [np.uint64(self.host.address), np.int32(N), np.float32(factor)],
        )

    def increase(self, to: Stream | Body, by: float) -> None:
        """Add a number to the host's array."""
        arguments = [np.int8(N), np.float64(by), np.int16(0), np.uint32(0)]
        to.launch(self.kernels["add"], 1, 4, [np.uint64(self.host.address), *arguments])

    def branch(self, body: Body, condition: Any, index: int) -> Body:
        """A branch that is entered if the flag is set."""
        arguments = [np.uint64(self.flags.address), np.int32(index), condition]
        body.launch(self.kernels["choose"], 1, 1, arguments)
        return body.branch(condition)

    def need_graphs(self) -> None:
        if not self.graphs:
            pytest.skip(f"no graphs: {self.cuda.why_no_graphs()}")


def test_facts(cuda: Cuda) -> None:
    assert cuda.facts.name
    assert (5, 0) <= cuda.facts.compute_capability < (30, 0)
    assert (12, 0) <= cuda.facts.driver < (30, 0)
    assert cuda.facts.memory_bytes > 0
    assert isinstance(cuda.facts.integrated, bool)


def test_memory_is_zeroed_and_aligned(bench: Bench) -> None:
    for nbytes in (1, 4, 257, N * 4):
        with bench.cuda.memory(nbytes) as memory, bench.cuda.mapped_memory(nbytes) as mapped:
            assert memory.nbytes == mapped.nbytes == mapped.host.size == nbytes
            assert memory.address % 256 == mapped.address % 256 == 0
            assert not mapped.host.any()
            mapped.host[:] = 1
            bench.stream.copy(mapped.address, memory.address, nbytes)
            bench.stream.synchronize()
            assert not mapped.host.any()


def test_everything_closes_twice(cuda: Cuda) -> None:
    for resource in (cuda.memory(8), cuda.mapped_memory(8), cuda.stream(), cuda.event()):
        resource.close()
        resource.close()
    if not cuda.why_no_graphs():
        with cuda.stream() as stream:
            captured = stream.capture(lambda: None)
            graph = cuda.graph()
            executable = graph.instantiate()
            for resource in (captured, graph, executable):
                resource.close()
                resource.close()


def test_copies_go_both_ways_in_order(bench: Bench) -> None:
    bench.write(3)
    bench.stream.copy(bench.device.address, bench.host.address, N * 4)
    bench.scale(bench.stream, 0)
    bench.stream.copy(bench.host.address, bench.device.address, N * 4)
    bench.scale(bench.stream, 2)
    assert bench.read() == 6


def test_host_and_device_see_mapped_memory(bench: Bench) -> None:
    for value in (1, 2):
        bench.write(value)
        bench.scale(bench.stream, 10)
        assert bench.read() == 10 * value


def test_part_of_memory_is_copied(bench: Bench) -> None:
    bench.write(1)
    bench.choose(0, 0, 1065353216)  # the third is 1.0
    bench.stream.copy(bench.device.address, bench.flags.address + 8, 4)
    bench.stream.copy(bench.host.address + 4, bench.device.address, 8)
    bench.stream.synchronize()
    assert bench.host.host.view(np.float32)[:4].tolist() == [1, 1, 0, 1]


def test_arguments_of_all_widths(bench: Bench) -> None:
    bench.write(1)
    arguments = [np.int8(N), np.float64(0.5), np.int16(-3), np.uint32(70000)]
    bench.stream.launch(bench.kernels["add"], 1, 4, [np.uint64(bench.host.address), *arguments])
    assert bench.read() == 1 + 0.5 - 3 + 70000


def test_events_order_streams_and_give_time(bench: Bench) -> None:
    with ExitStack() as stack:
        other = stack.enter_context(bench.cuda.stream())
        first, second = (stack.enter_context(bench.cuda.event()) for _ in range(2))
        bench.write(1)
        bench.stream.record(first)
        bench.scale(bench.stream, 2)
        bench.stream.record(second)
        other.wait(second)
        bench.scale(other, 3)
        other.synchronize()
        assert bench.read() == 6
        assert 0 <= bench.cuda.seconds_between(first, second) < 10
        assert bench.stream.handle != other.handle


def test_done_without_waiting(bench: Bench) -> None:
    bench.scale(bench.stream, 2)
    while not bench.stream.is_done():
        pass
    assert bench.stream.is_done()


def test_a_second_thread_works_after_make_current(bench: Bench) -> None:
    def work() -> float:
        bench.cuda.make_current()
        bench.cuda.make_current()
        bench.write(1)
        with bench.cuda.memory(N * 4) as memory, bench.cuda.stream() as stream:
            stream.copy(memory.address, bench.host.address, N * 4)
            stream.synchronize()
        bench.scale(bench.stream, 5)
        return bench.read()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == 5


@pytest.mark.parametrize("cuda", [pytest.param("pycuda", marks=pytest.mark.pycuda)], indirect=True)
def test_without_graphs_it_says_so(cuda: Cuda) -> None:
    assert cuda.why_no_graphs()
    with cuda.stream() as stream:
        for attempt in (cuda.graph, lambda: stream.capture(lambda: None)):
            with pytest.raises(BackendUnavailable, match=r"can't build CUDA graphs here: .*core"):
                attempt()
    with pytest.raises(BackendUnavailable, match="can't build CUDA graphs"):
        cuda.kernels(SOURCE, ["choose"], conditionals=True)


def test_a_capture_runs_nothing_and_its_graph_does(bench: Bench) -> None:
    bench.need_graphs()
    bench.write(1)

    def work() -> None:
        bench.scale(bench.stream, 2)
        bench.stream.copy(bench.device.address, bench.host.address, N * 4)
        bench.scale(bench.stream, 100)
        bench.stream.copy(bench.host.address, bench.device.address, N * 4)

    with bench.stream.capture(work) as captured:
        assert bench.read() == 1
        with bench.cuda.graph() as graph:
            graph.embed(captured.handle)
            bench.scale(graph, 3)
            graph.embed(captured.handle)
            executable = graph.instantiate()
    with executable:
        executable.upload(bench.stream)
        for expected in (12, 144, 1728):
            executable.launch(bench.stream)
            assert bench.read() == expected
        bench.write(-1)
        executable.launch(bench.stream)
        assert bench.read() == -12


@real
def test_two_streams_in_one_capture(bench: Bench) -> None:
    bench.need_graphs()
    bench.write(1)
    with ExitStack() as stack:
        other = stack.enter_context(bench.cuda.stream())
        fork, join = (stack.enter_context(bench.cuda.event()) for _ in range(2))

        def work() -> None:
            bench.scale(bench.stream, 2)
            bench.stream.record(fork)
            other.wait(fork)
            bench.scale(other, 3)
            other.record(join)
            bench.stream.wait(join)
            bench.scale(bench.stream, 0.5)

        captured = stack.enter_context(bench.stream.capture(work))
        graph = stack.enter_context(bench.cuda.graph())
        graph.embed(captured.handle)
        executable = stack.enter_context(graph.instantiate())
        executable.launch(bench.stream)
        assert bench.read() == 3


@pytest.mark.parametrize("forbidden", ["synchronize", "is_done", "memory"])
def test_what_a_capture_forbids(bench: Bench, forbidden: str) -> None:
    is_memory = forbidden == "memory"
    call = functools.partial(bench.cuda.memory, 8) if is_memory else None
    _forbidden_in_a_capture(bench, call or getattr(bench.stream, forbidden))


@on_the_cpu
def test_pinned_memory_in_a_capture(bench: Bench) -> None:
    _forbidden_in_a_capture(bench, functools.partial(bench.cuda.mapped_memory, 8))


def _forbidden_in_a_capture(bench: Bench, call: Callable[[], object]) -> None:
    bench.need_graphs()

    def work() -> None:
        bench.scale(bench.stream, 2)
        call()

    with pytest.raises(CudaError, match=r"STREAM_CAPTURE_.*it waits, or allocates"):
        bench.stream.capture(work)
    bench.write(1)
    bench.scale(bench.stream, 2)
    assert bench.read() == 2


def test_an_error_ends_a_capture(bench: Bench) -> None:
    bench.need_graphs()
    bench.write(1)

    def work() -> None:
        bench.scale(bench.stream, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.stream.capture(work)
    assert bench.read() == 1
    with bench.stream.capture(lambda: bench.scale(bench.stream, 2)):
        pass


@real
def test_other_threads_go_on_during_a_capture(bench: Bench) -> None:
    bench.need_graphs()

    def allocate() -> None:
        bench.cuda.make_current()
        bench.cuda.memory(8).close()

    def work() -> None:
        bench.scale(bench.stream, 2)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(allocate).result()

    bench.stream.capture(work).close()


@real
def test_a_stream_that_a_capture_leaves_behind(bench: Bench) -> None:
    bench.need_graphs()
    with bench.cuda.stream() as other, bench.cuda.event() as fork:

        def work() -> None:
            bench.scale(bench.stream, 2)
            bench.stream.record(fork)
            other.wait(fork)
            bench.scale(other, 3)

        with pytest.raises(CudaError, match="ending a capture: CUDA says: STREAM_CAPTURE_UNJOINED"):
            bench.stream.capture(work)
        bench.write(1)
        bench.scale(other, 2)
        other.synchronize()
        bench.scale(bench.stream, 2)
        assert bench.read() == 4


@pytest.mark.parametrize("seed", range(8))
def test_nodes_run_in_order(bench: Bench, seed: int) -> None:
    bench.need_graphs()
    random = np.random.default_rng(seed)
    bench.choose(*random.integers(2, size=N))
    flags = bench.flags.host.view(np.int32)
    values = {"host": 1.0, "device": 0.0}
    branches = iter(range(N))
    with ExitStack() as stack:
        captured = stack.enter_context(
            bench.stream.capture(lambda: bench.scale(bench.stream, 2)),
        )
        graph = stack.enter_context(bench.cuda.graph())

        def grow(body: Body, runs: bool, depth: int) -> None:
            for kind in random.integers(5 if depth < 3 else 4, size=7):
                if kind == 0:
                    bench.increase(body, 1)
                    values["host"] += runs
                elif kind == 1:
                    body.embed(captured.handle)
                    values["host"] *= 1 + runs
                elif kind == 2:
                    body.copy(bench.device.address, bench.host.address, N * 4)
                    values["device"] = values["host" if runs else "device"]
                elif kind == 3:
                    body.copy(bench.host.address, bench.device.address, N * 4)
                    values["host"] = values["device" if runs else "host"]
                elif (index := next(branches, None)) is not None:
                    branch = bench.branch(body, graph.condition(), index)
                    grow(branch, runs and bool(flags[index]), depth + 1)

        grow(graph, True, 0)
        executable = stack.enter_context(graph.instantiate())
        bench.write(1)
        executable.launch(bench.stream)
        assert bench.read() == values["host"]


@pytest.mark.parametrize("nested", [False, True])
def test_branches_are_taken_and_not_taken(bench: Bench, nested: bool) -> None:
    bench.need_graphs()
    with ExitStack() as stack:
        triple = bench.stream.capture(lambda: bench.scale(bench.stream, 3))
        stack.enter_context(triple)
        graph = stack.enter_context(bench.cuda.graph())
        bench.scale(graph, 2)
        first = bench.branch(graph, graph.condition(), 0)
        first.embed(triple.handle)
        bench.scale(first, 5)
        second = bench.branch(first if nested else graph, graph.condition(), 1)
        second.embed(triple.handle)
        second.copy(bench.device.address, bench.host.address, N * 4)
        bench.scale(second, 7)
        bench.scale(graph, 0.5)
        executable = stack.enter_context(graph.instantiate())
        for flags in ((0, 0), (1, 0), (0, 1), (1, 1), (0, 0), (1, 1)):
            bench.choose(*flags)
            bench.write(1)
            executable.launch(bench.stream)
            expected = 15 if flags[0] else 1
            if flags[1] and (flags[0] or not nested):
                expected *= 21
            assert bench.read() == expected, flags


def test_conditions_are_reset_at_each_launch(bench: Bench) -> None:
    bench.need_graphs()
    with bench.cuda.graph() as graph:
        first, second = graph.condition(), graph.condition()
        body = bench.branch(graph, first, 0)
        # Nobody sets the second one where the first branch is not taken.
        arguments = [np.uint64(bench.flags.address), np.int32(1), second]
        body.launch(bench.kernels["choose"], 1, 1, arguments)
        bench.scale(graph.branch(second), 2)
        executable = graph.instantiate()
    with executable:
        bench.write(1)
        for flags, expected in (((1, 1), 2), ((0, 1), 2), ((1, 0), 2), ((1, 1), 4), ((0, 0), 4)):
            bench.choose(*flags)
            executable.launch(bench.stream)
            assert bench.read() == expected, flags


def test_a_graph_begins_with_any_kind_of_node(bench: Bench) -> None:
    bench.need_graphs()
    with ExitStack() as stack:
        captured = bench.stream.capture(lambda: bench.scale(bench.stream, 3))
        stack.enter_context(captured)

        def copy(body: Body) -> None:
            body.copy(bench.device.address, bench.host.address, N * 4)

        begins: list[Callable[[Body], None]] = [
            lambda body: body.embed(captured.handle),
            lambda body: bench.scale(body, 3),
            copy,
        ]
        for begin, expected in zip(begins, (6, 6, 2), strict=True):
            graph = stack.enter_context(bench.cuda.graph())
            begin(graph)
            bench.scale(graph, 2)
            bench.write(1)
            stack.enter_context(graph.instantiate()).launch(bench.stream)
            assert bench.read() == expected


@on_the_cpu
def test_a_condition_belongs_to_one_branch_of_its_graph(bench: Bench) -> None:
    bench.need_graphs()
    with bench.cuda.graph() as graph, bench.cuda.graph() as other:
        condition = graph.condition()
        bench.branch(graph, condition, 0)
        with pytest.raises(CudaError, match=r"a branch.*: INVALID_VALUE"):
            graph.branch(condition)
        with pytest.raises(CudaError, match="INVALID_VALUE"):
            graph.branch(other.condition())


@real
def test_what_the_compiler_refuses(cuda: Cuda) -> None:
    with pytest.raises(
        CudaError, match=r'compiling the kernels: .*"nonsense" is undefined'
    ) as info:
        cuda.kernels('extern "C" __global__ void f(int* x) {\n *x = nonsense;\n}', ["f"])
    assert info.value.__cause__ is not None
    with pytest.raises(CudaError, match=r"loading the kernel g: CUDA says: NOT_FOUND: named sym"):
        cuda.kernels('extern "C" __global__ void f(int* x) {}', ["g"])


def test_the_compiler_is_missing(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    device = CudaCore().open()
    with monkeypatch.context() as patched:

        def find_no_library(*arguments: Any) -> None:
            raise RuntimeError("Failed to dlopen libnvrtc.so")

        patched.setattr("cuda.core.Program", find_no_library)
        with pytest.raises(BackendUnavailable, match=r"NVRTC is not found.*'cuda-core\[cu1[23]\]'"):
            device.kernels(SOURCE, KERNELS)
    device.close()


# ---- What only a driver can do: refuse. ----


def _use(name: str) -> None:
    """Everything, once; what was made is closed, whatever happens."""
    with ExitStack() as stack:
        device = MAKERS[name]().open()
        stack.callback(device.close)
        bench = Bench(device, stack)
        with device.event() as first, device.event() as second:
            bench.stream.record(first)
            bench.scale(bench.stream, 2)
            bench.stream.copy(bench.device.address, bench.host.address, N * 4)
            bench.stream.record(second)
            bench.stream.wait(second)
            assert bench.stream.is_done()
            bench.stream.synchronize()
            device.seconds_between(first, second)
        if bench.graphs:
            _use_graphs(bench, stack)


def _use_graphs(bench: Bench, stack: ExitStack) -> None:
    captured = bench.stream.capture(lambda: bench.scale(bench.stream, 2))
    stack.enter_context(captured)
    graph = stack.enter_context(bench.cuda.graph())
    graph.copy(bench.device.address, bench.host.address, N * 4)
    graph.embed(captured.handle)
    body = bench.branch(graph, graph.condition(), 0)
    body.embed(captured.handle)
    bench.scale(bench.branch(body, graph.condition(), 1), 2)
    executable = stack.enter_context(graph.instantiate())
    executable.upload(bench.stream)
    executable.launch(bench.stream)
    bench.stream.synchronize()


#: Calls whose refusal nobody is told: they are made where objects are destroyed, by the packages
#: themselves; and NVRTC, which looks for a driver to keep its cache in.
SILENT = {
    "cuda-core": {
        "cuGraphDestroy",
        "cuGraphExecDestroy",
        "cuGraphReleaseUserObject",
        "cuInit",
        "cuStreamDestroy",
        "cuUserObjectRelease",
    },
    "pycuda": {
        "cuCtxPushCurrent",  # to let go of the context; before that it is told
        "cuDevicePrimaryCtxRelease",
        "cuEventDestroy",
        "cuMemFree",
        "cuMemFreeHost",
        "cuModuleUnload",
        "cuStreamDestroy",
    },
}
#: A thread whose context can't be popped is lost to pycuda, and with it the process.
FATAL = {"cuda-core": set[str](), "pycuda": {"cuCtxPopCurrent"}}


@pytest.mark.parametrize("code", [OUT_OF_MEMORY, ILLEGAL_ADDRESS, UNKNOWN])
def test_every_refused_call_is_one_error_and_leaves_nothing(
    name: str, code: int, emulated: Emulated, capfd: pytest.CaptureFixture[str]
) -> None:
    _use(name)  # what the packages do only once
    assert not _left(emulated, name)
    emulated.clear_log()
    _use(name)
    calls = [call for call in emulated.log() if call not in FATAL[name]]
    assert len(calls) > 25
    counts: Counter[str] = Counter()
    told: set[str] = set()
    references = emulated.primary_references()
    for call in calls:
        counts[call] += 1
        emulated.fail(call, counts[call], code)
        if name == "pycuda" and code == OUT_OF_MEMORY and call == "cuMemAlloc":
            emulated.fail(call, counts[call], code)  # it collects garbage, and tries again
        try:
            _use(name)
        except (CudaError, BackendUnavailable) as error:
            told.add(call)
            assert error.__cause__ is not None, call
            assert "\n" not in str(error)
        else:
            assert call in SILENT[name], f"nobody heard that {call} no. {counts[call]} failed"
        assert not emulated.failures_left(), f"{call} no. {counts[call]} was not made"
        assert not _left(emulated, name), f"{call} no. {counts[call]}"
        assert emulated.primary_references() == references, f"{call} no. {counts[call]}"
    assert told >= set(calls) - SILENT[name]
    capfd.readouterr()  # warnings of the packages, on the silent ones


def test_an_error_has_the_drivers_words(name: str, emulated: Emulated) -> None:
    device = MAKERS[name]().open()
    emulated.fail("cuMemAlloc", 1)
    emulated.fail("cuMemAlloc", 1)
    emulated.fail("cuMemAlloc", 2)
    with pytest.raises(CudaError) as info:
        device.memory(512)
    assert str(info.value) == (
        "allocating 512 bytes: CUDA says: OUT_OF_MEMORY: out of memory. Close other programs on "
        "the GPU, or open fewer stages or a smaller batch"
    )
    assert "out of memory" in str(info.value.__cause__).lower()
    emulated.forget_failures()

    stream = device.stream()
    emulated.fail("cuStreamSynchronize", 1, ILLEGAL_ADDRESS)
    with pytest.raises(CudaError) as info:
        stream.synchronize()
    assert str(info.value) == (
        "waiting for a stream: CUDA says: ILLEGAL_ADDRESS: an illegal memory access was "
        "encountered. The device is lost to this process: start it anew"
    )
    emulated.fail("cuStreamQuery", 1, NOT_READY)
    assert not stream.is_done()
    assert stream.is_done()
    stream.close()
    device.close()


def test_a_call_from_another_context_is_refused(name: str, emulated: Emulated) -> None:
    device = MAKERS[name]().open()
    stream = device.stream()
    memory = device.memory(8)
    library = ctypes.CDLL("libcuda.so.1")
    foreign = ctypes.c_void_p()
    assert library.cuCtxCreate_v2(ctypes.byref(foreign), 0, 0) == 0
    with pytest.raises(CudaError, match="INVALID_HANDLE"):
        stream.copy(memory.address, memory.address, 8)
    with pytest.raises(CudaError, match="another CUDA context than the primary one"):
        device.make_current()
    with pytest.raises(CudaError, match=r"pycuda\.autoprimaryctx instead"):
        MAKERS[name]().open()
    assert library.cuCtxDestroy_v2(foreign) == 0
    stream.copy(memory.address, memory.address, 8)
    memory.close()
    stream.close()
    device.close()


def test_facts_are_the_drivers(name: str, emulated: Emulated) -> None:
    emulated.set_driver_version(12, 6)
    emulated.set_integrated(True)
    device = MAKERS[name]().open()
    assert device.facts.name == "Emulated GPU"
    assert device.facts.compute_capability == (8, 7)
    assert device.facts.driver == (12, 6)
    assert device.facts.integrated
    assert device.facts.memory_bytes == 8 << 30
    device.close()


def test_a_driver_that_is_too_old(name: str, emulated: Emulated) -> None:
    emulated.set_driver_version(11, 4)
    with pytest.raises(BackendUnavailable, match=r"got one for CUDA 11\.4, expected 12\.0 or new"):
        MAKERS[name]().open()


def test_a_driver_without_conditional_nodes(emulated: Emulated) -> None:
    emulated.set_driver_version(12, 2)
    device = CudaCore().open()
    assert device.why_no_graphs() == (
        "the driver is for CUDA 12.2; conditional nodes need 12.4 (JetPack 6.1)"
    )
    with pytest.raises(BackendUnavailable, match=r"cuda-core can't build .*12\.4 .*mode='polling'"):
        device.graph()
    device.memory(8).close()
    device.close()
    emulated.set_driver_version(12, 4)
    device = CudaCore().open()
    assert not device.why_no_graphs()
    device.close()


def test_kernels_of_a_newer_cuda_than_the_drivers(emulated: Emulated) -> None:
    if importlib.metadata.version("cuda-bindings").startswith("12."):
        pytest.skip("no driver that we support is older than this cuda-bindings")
    emulated.set_driver_version(12, 6)
    device = CudaCore().open()
    device.kernels(SOURCE, KERNELS)  # no judgement before the driver's
    core._loaded.clear()
    emulated.fail("cuLibraryLoadData", 1, INVALID_IMAGE)
    with pytest.raises(BackendUnavailable, match=r"driver for CUDA 12\.6.*'cuda-core\[cu12\]'"):
        device.kernels(SOURCE, KERNELS)
    device.close()


@pytest.mark.parametrize("through", ["cuInit", "cuDeviceGetCount"])
def test_no_device(name: str, emulated: Emulated, through: str) -> None:
    if through == "cuInit":
        emulated.set_device_count(0)
    else:
        emulated.fail("cuInit", 1, NO_DEVICE)
    with pytest.raises(BackendUnavailable, match=r"finds no GPU\. nvidia-smi lists"):
        MAKERS[name]().open()


def test_no_such_device(name: str, emulated: Emulated) -> None:
    make: Any = MAKERS[name]
    for index in (1, 7, -1):
        with pytest.raises(BackendUnavailable, match=f"got device {index}, expected 0 to 0"):
            make(index).open()


def test_the_second_device(name: str, emulated: Emulated) -> None:
    code = (
        "from tests.cuda_without_gpu import load; driver = load(); driver.reset();"
        "driver.set_device_count(2);"
        f"from tests.edge_runtime.cuda.test_drivers import MAKERS; make = MAKERS[{name!r}];"
        "device = make(1).open(); memory = device.memory(8); memory.close();"
        "references = driver.primary_references(0), driver.primary_references(1);"
        "device.close(); print(*references)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert first == 0
    assert second > 0


ENDS = {
    "a process, everything open": "thread.start(); leave.set(); thread.join()",
    "a thread, the device closed": "thread.start(); entered.wait();"
    "memory[0].close(); memory[1].close(); stream.close(); event.close(); device.close();"
    "leave.set(); thread.join(); again = make().open(); again.close()",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_what_may_end(name: str, end: str) -> None:
    code = (
        "import threading; from tests.cuda_without_gpu import load; load().reset()\n"
        f"from tests.edge_runtime.cuda.test_drivers import MAKERS; make = MAKERS[{name!r}]\n"
        "device = make().open(); stream, event = device.stream(), device.event()\n"
        "memory = device.memory(8), device.mapped_memory(8)\n"
        "entered, leave = threading.Event(), threading.Event()\n"
        "def work(): device.make_current(); entered.set(); leave.wait()\n"
        f"thread = threading.Thread(target=work); {end}\n"
        "print('end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.parametrize(
    ("module", "expected"), [("cuda.core", "cuda-core"), ("cuda.bindings.driver", "cuda-core")]
)
def test_cuda_core_is_missing(module: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendUnavailable, match=rf"{expected} is not.*edge-runtime\[tensorrt\]"):
        CudaCore().open()


def test_pycuda_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(BackendUnavailable, match="the package pycuda is not installed"):
        PyCuda().open()


def test_no_driver() -> None:
    code = (
        "import ctypes, sys\n"
        "from edge_runtime.backends.cuda.core import CudaCore\n"
        "try:\n    ctypes.CDLL('libcuda.so.1')\nexcept OSError:\n    pass\n"
        "else:\n    sys.exit(7)\n"
        "try:\n    CudaCore().open()\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode == 7:
        pytest.skip("this machine has an NVIDIA driver")
    assert done.returncode == 0, done.stderr
    assert "no NVIDIA driver is installed: libcuda.so.1 is missing" in done.stdout


def test_importing_them_imports_no_cuda() -> None:
    code = (
        "import sys; import edge_runtime.backends.cuda.core, edge_runtime.backends.cuda.pycuda;"
        "print([name for name in sys.modules if name.startswith(('cuda.', 'pycuda'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_modes_are_found_by_running_them(name: str, emulated: Emulated) -> None:
    kernels = [
        decide.kernel_name(dtype, conditional)
        for dtype in ("float32", "float16")
        for conditional in (False, True)
    ]
    emulated.register(host_kernels.compile_host([decide.SOURCE], kernels), kernels)
    device = MAKERS[name]().open()
    reasons = probe.why_not(device, batch=1)
    assert [mode for mode, why in reasons.items() if why] == (["graph"] if name == "pycuda" else [])
    device.close()
    assert not _left(emulated, name)


# ---- The emulated driver itself notices what it is there to notice. ----


def test_the_emulation_notices_freed_memory(begun: Emulated) -> None:
    device = CudaCore().open()
    stream, memory = device.stream(), device.memory(N * 4)
    kernels: dict[str, Kernel] = device.kernels(SOURCE, KERNELS)
    memory.close()
    arguments = [np.uint64(memory.address), np.int32(N), np.float32(2)]
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        stream.launch(kernels["scale"], 1, N, arguments)
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        stream.copy(memory.address, memory.address, 4)
    ctypes.memset(memory.address, 1, 1)
    assert begun.problems() == [
        "the kernel scale was given memory that had been freed",
        "memory was written after it was freed",
    ]
    stream.close()
    device.close()


def test_the_emulation_notices_what_is_left(begun: Emulated) -> None:
    device = CudaCore().open()
    memory, stream = device.memory(24), device.stream()
    assert _left(begun, "cuda-core") == {"bytes": 24, "stream": 1}
    memory.close()
    stream.close()
    device.close()
    assert not _left(begun, "cuda-core")
