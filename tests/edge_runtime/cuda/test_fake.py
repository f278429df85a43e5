"""The fake device refuses what CUDA forbids, and shows what a race would do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edge_runtime import BackendUnavailable, CudaError
from edge_runtime.backends.cuda.fake import FakeCuda, FakeKernel, Fault


def set_condition(cuda: FakeCuda, grid: int, arguments: Any) -> None:
    cuda.set_condition(int(arguments[0]), 1)


def nothing(cuda: FakeCuda, grid: int, arguments: Any) -> None:
    pass


SET = FakeKernel("set", set_condition)
NOTHING = FakeKernel("nothing", nothing)


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    device = FakeCuda().open()
    yield device
    for resource in list(device.live):
        with contextlib.suppress(CudaError):  # The test may have lost the device.
            resource.close()
    device.close()


def test_work_runs_when_the_host_waits_and_not_before(cuda: FakeCuda) -> None:
    stream, one, two = cuda.stream(), cuda.mapped_memory(8), cuda.mapped_memory(8)
    stream.copy(two.address, one.address, 8)
    one.host[:] = 7  # Too early to change it: the copy has not run.
    stream.synchronize()
    assert (two.host == 7).all()


def test_streams_advance_in_another_order_for_another_seed() -> None:
    def order(seed: int) -> str:
        cuda, ran = FakeCuda(seed=seed), []
        streams = [cuda.stream() for _ in range(2)]
        for _ in range(4):
            for name, stream in zip("ab", streams, strict=True):
                kernel = FakeKernel(name, lambda c, g, a, n=name: ran.append(n))
                stream.launch(kernel, 1, 1, ())
        streams[0].synchronize()
        return "".join(ran)

    assert len({order(seed) for seed in range(8)}) > 2
    assert order(3) == order(3)


def test_a_wait_holds_back_its_stream(cuda: FakeCuda) -> None:
    first, second, event = cuda.stream(), cuda.stream(), cuda.event()
    ran: list[str] = []
    for name, stream in (("first", first), ("second", second)):
        if stream is first:
            stream.launch(FakeKernel(name, lambda c, g, a: ran.append("first")), 1, 1, ())
            stream.record(event)
        else:
            stream.wait(event)
            stream.launch(FakeKernel(name, lambda c, g, a: ran.append("second")), 1, 1, ())
    second.synchronize()
    assert ran == ["first", "second"]


def test_a_wait_for_nothing_is_no_wait(cuda: FakeCuda) -> None:
    stream = cuda.stream()
    stream.wait(cuda.event())
    stream.synchronize()


def test_events_tell_time_once_they_are_reached(cuda: FakeCuda) -> None:
    stream, start, end = cuda.stream(), cuda.event(), cuda.event()
    stream.record(start)
    stream.launch(NOTHING, 1, 1, ())
    stream.record(end)
    with pytest.raises(CudaError, match="NOT_READY"):
        cuda.seconds_between(start, end)
    stream.synchronize()
    assert cuda.seconds_between(start, end) > 0


def test_events_tell_what_stands_between_them(cuda: FakeCuda) -> None:
    stream, one, two = cuda.stream(), cuda.memory(8), cuda.memory(8)
    slow = FakeKernel("slow", nothing, 7000)
    before, start, end = (cuda.event() for _ in range(3))
    stream.record(before)
    stream.copy(two.address, one.address, 8)
    stream.record(start)
    stream.launch(slow, 1, 1, ())
    stream.launch(NOTHING, 1, 1, ())
    stream.record(end)
    stream.launch(slow, 1, 1, ())
    stream.synchronize()
    assert cuda.seconds_between(start, end) == pytest.approx(8e-6)
    assert cuda.seconds_between(before, end) == pytest.approx(9e-6)
    with pytest.raises(CudaError, match="INVALID_HANDLE"):
        cuda.seconds_between(start, cuda.event())


class TestMemory:
    """Only live allocations may be touched."""

    def test_it_is_zeroed_and_aligned(self, cuda: FakeCuda) -> None:
        for memory in (cuda.memory(1000), cuda.mapped_memory(3)):
            assert memory.address % 256 == 0
            assert not cuda.view(memory.address, memory.nbytes).any()

    def test_beyond_its_end_the_device_is_lost(self, cuda: FakeCuda) -> None:
        stream, memory = cuda.stream(), cuda.memory(16)
        stream.copy(memory.address + 8, memory.address, 16)
        with pytest.raises(CudaError, match=r"ILLEGAL_ADDRESS.*start it anew"):
            stream.synchronize()
        with pytest.raises(CudaError, match="lost before"):
            cuda.memory(16)

    def test_freed_while_work_is_queued(self, cuda: FakeCuda) -> None:
        stream, memory = cuda.stream(), cuda.memory(16)
        stream.copy(memory.address, memory.address, 16)
        memory.close()
        memory.close()
        with pytest.raises(CudaError, match="nobody's"):
            stream.synchronize()

    def test_the_hosts_own_memory_is_not_the_devices(self, cuda: FakeCuda) -> None:
        stream, memory, mine = cuda.stream(), cuda.memory(16), np.zeros(16, np.uint8)
        stream.copy(memory.address, mine.ctypes.data, 16)
        with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
            stream.synchronize()

    def test_no_bytes_are_refused(self, cuda: FakeCuda) -> None:
        with pytest.raises(CudaError, match="INVALID_VALUE"):
            cuda.memory(0)


class TestCapture:
    """What a stream records instead of running it."""

    def test_it_runs_when_it_is_launched_and_reads_memory_then(self, cuda: FakeCuda) -> None:
        stream, one, two = cuda.stream(), cuda.mapped_memory(8), cuda.mapped_memory(8)
        captured = stream.capture(lambda: stream.copy(two.address, one.address, 8))
        graph = cuda.graph()
        graph.embed(captured.handle)
        executable = graph.instantiate()
        captured.close()
        stream.synchronize()
        assert not two.host.any()
        for value in (3, 5):
            one.host[:] = value
            executable.launch(stream)
            stream.synchronize()
            assert (two.host == value).all()

    @pytest.mark.parametrize(
        "forbidden",
        [
            lambda cuda, stream: stream.synchronize(),
            lambda cuda, stream: stream.is_done(),
            lambda cuda, stream: cuda.memory(8),
            lambda cuda, stream: cuda.mapped_memory(8),
            lambda cuda, stream: stream.capture(lambda: None),
            lambda cuda, stream: cuda.stream().capture(lambda: None),
        ],
        ids=["synchronize", "is_done", "memory", "mapped_memory", "capture", "another capture"],
    )
    def test_what_can_t_be_captured_ends_the_capture(self, cuda: FakeCuda, forbidden: Any) -> None:
        stream = cuda.stream()
        with pytest.raises(CudaError, match="STREAM_CAPTURE_UNSUPPORTED"):
            stream.capture(lambda: forbidden(cuda, stream))

        def swallowing() -> None:
            with contextlib.suppress(CudaError):
                forbidden(cuda, stream)

        with pytest.raises(CudaError, match="STREAM_CAPTURE_INVALIDATED"):
            stream.capture(swallowing)
        stream.capture(lambda: stream.launch(NOTHING, 1, 1, ()))

    def test_other_streams_go_on_beside_it(self, cuda: FakeCuda) -> None:
        stream, other, ran = cuda.stream(), cuda.stream(), []
        kernel = FakeKernel("other", lambda c, g, a: ran.append(1))

        def work() -> None:
            other.launch(kernel, 1, 1, ())
            other.synchronize()

        stream.capture(work)
        assert ran == [1]

    def test_events_in_it_are_no_nodes(self, cuda: FakeCuda) -> None:
        stream, event = cuda.stream(), cuda.event()

        def work() -> None:
            stream.record(event)
            stream.wait(event)

        captured = stream.capture(work)
        assert cuda.captured[captured.handle] == []

    def test_a_graph_with_conditions_can_t_be_a_child(self, cuda: FakeCuda) -> None:
        stream, graph = cuda.stream(), cuda.graph()
        condition = graph.condition()
        graph.branch(condition)
        executable = graph.instantiate()
        with pytest.raises(CudaError, match="child graph with conditions"):
            stream.capture(lambda: executable.launch(stream))


class TestConditions:
    """A handle belongs to one branch of one graph, and begins at 0."""

    def test_a_branch_runs_if_its_condition_was_set_in_this_launch(self, cuda: FakeCuda) -> None:
        stream, ran, sets = cuda.stream(), [], [True]
        graph = cuda.graph()
        condition = graph.condition()
        maybe = FakeKernel("maybe", lambda c, g, a: sets[0] and c.set_condition(int(a[0]), 1))
        graph.launch(maybe, 1, 1, (condition,))
        branch = graph.branch(condition)
        branch.launch(FakeKernel("in", lambda c, g, a: ran.append(1)), 1, 1, ())
        executable = graph.instantiate()
        for sets[0] in (True, False, True):
            executable.launch(stream)
            stream.synchronize()
        assert ran == [1, 1]

    def test_one_handle_for_two_branches_is_refused(self, cuda: FakeCuda) -> None:
        graph = cuda.graph()
        condition = graph.condition()
        graph.branch(condition)
        with pytest.raises(CudaError, match="has a branch"):
            graph.branch(condition)

    def test_a_handle_of_another_graph_is_refused(self, cuda: FakeCuda) -> None:
        graph, other = cuda.graph(), cuda.graph()
        with pytest.raises(CudaError, match="of another graph"):
            graph.branch(other.condition())
        with pytest.raises(CudaError, match="of another graph"):
            graph.launch(SET, 1, 1, (other.condition(),))

    def test_setting_one_outside_of_its_graph_loses_the_device(self, cuda: FakeCuda) -> None:
        stream = cuda.stream()
        stream.launch(SET, 1, 1, (np.uint64(cuda.graph().condition().handle),))
        with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
            stream.synchronize()

    @pytest.mark.parametrize("nested", [False, True])
    def test_a_host_node_is_refused_in_a_branch_and_taken_outside(
        self, cuda: FakeCuda, nested: bool
    ) -> None:
        stream, graph = cuda.stream(), cuda.graph()
        captured = stream.capture(lambda: stream.host_function(lambda: None))
        graph.embed(captured.handle)
        body = graph.branch(graph.condition())
        if nested:
            body = body.branch(graph.condition())
        with pytest.raises(CudaError, match="host node can't be in a branch"):
            body.embed(captured.handle)

    def test_a_graph_that_does_not_exist_can_t_be_embedded(self, cuda: FakeCuda) -> None:
        with pytest.raises(CudaError, match="no such graph"):
            cuda.graph().embed(12345)


def test_without_graphs_there_are_none() -> None:
    cuda = FakeCuda(graphs="the driver is too old")
    for call in (cuda.graph, lambda: cuda.stream().capture(lambda: None)):
        with pytest.raises(BackendUnavailable, match=r"the driver is too old.*mode='polling'"):
            call()


def test_what_is_closed_or_foreign_is_refused(cuda: FakeCuda) -> None:
    stream, event = cuda.stream(), cuda.event()
    event.close()
    with pytest.raises(CudaError, match="INVALID_HANDLE"):
        stream.record(event)
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        stream.launch(NOTHING, 1, 2048, ())


def test_a_fault_comes_at_its_call_and_only_there() -> None:
    cuda = FakeCuda(fault=Fault(2, "OUT_OF_MEMORY")).open()
    memory = cuda.memory(8)
    with pytest.raises(CudaError, match=r"OUT_OF_MEMORY.*Close other programs") as caught:
        cuda.memory(8)
    assert "CUDA says" in str(caught.value)
    cuda.memory(8).close()
    with pytest.raises(AssertionError, match="1 resources alive"):
        cuda.close()
    memory.close()
    cuda.close()


def test_a_deadlock_is_found() -> None:
    cuda = FakeCuda().open()
    stream, event = cuda.stream(), cuda.event()
    event.recorded = 1
    stream.wait(event)
    with pytest.raises(AssertionError, match="deadlock"):
        stream.synchronize()
