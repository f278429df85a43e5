"""A CUDA device made of numpy: executes on the CPU, records every call, refuses what CUDA forbids.

Work that is put on a stream does not run then. Whenever the host asks (waits, or looks whether a
stream is done), one operation of a stream drawn by a seeded generator runs, so that a missing event
or a buffer that is reused too early gives another result for some seed, as it would on a GPU for
some timing. A graph runs node by node in between. Its clock stands still but for the time that each
kernel and each copy is said to take, so that events tell which of them stand between two others.
"""

from __future__ import annotations

import bisect
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends.cuda import base, decide
from edge_runtime.backends.cuda.base import Argument, Cuda, DeviceFacts
from edge_runtime.errors import CudaError

#: What a kernel does: gets the device, the number of blocks and the arguments.
Function = Callable[["FakeCuda", int, Sequence[Argument]], None]
#: One operation: runs to its next node, or to its end.
_Operation = Iterator[None]

_ALIGNMENT = 256
#: What a copy, a branch, a host function and an ordinary kernel take on the fake's clock.
TICK_NS = 1000


@dataclass(frozen=True, slots=True)
class Fault:
    """A native call that fails.

    Attributes:
        call: Its index in `FakeCuda.log`.
        code: The driver's name of the error.
    """

    call: int
    code: str


class FakeCuda(Cuda):
    """The fake device.

    Args:
        kernels: Name -> function, beside those of `decide`.
        seed: Of the order in which streams advance.
        facts: What the device says it is.
        fault: A call that fails.
        lose_device_after: Number of operations after which the device is lost.
        graphs: Whether it can build graphs; if not, why.
    """

    name = "fake"

    def __init__(
        self,
        kernels: Mapping[str, Function] | None = None,
        *,
        seed: int = 0,
        facts: DeviceFacts | None = None,
        fault: Fault | None = None,
        lose_device_after: int | None = None,
        graphs: str = "",
    ) -> None:
        self.facts = facts or DeviceFacts(
            name="a device made of numpy",
            compute_capability=(8, 7),
            driver=(13, 0),
            integrated=False,
            memory_bytes=1 << 30,
        )
        self._functions: dict[str, Function] = {**_DECIDE, **(kernels or {})}
        self._random = np.random.default_rng(seed)
        self._fault = fault
        self._operations_left = lose_device_after
        self._graphs = graphs
        #: Names of the native calls, in order.
        self.log: list[str] = []
        #: Everything that was made and not closed.
        self.live: set[base.Resource] = set()
        self.now_ns = 0
        self.is_open = False
        self._lost = ""
        self._streams: list[FakeStream] = []
        self._starts: list[int] = []
        self._memories: dict[int, FakeMemory] = {}
        self._conditions: dict[int, int] = {}
        #: Handle -> nodes of every captured graph that is not closed.
        self.captured: dict[int, list[_Node]] = {}
        self._next_handle = 1
        self._capturing: FakeStream | None = None

    def open(self) -> FakeCuda:
        """Make the device usable."""
        self.call("open")
        self.is_open = True
        return self

    def close(self) -> None:
        """Check that nothing is left."""
        if self.is_open and self.live and not self._lost:
            raise AssertionError(f"closed with {len(self.live)} resources alive: {self.live}")
        self.is_open = False

    def make_current(self) -> None:
        """Recorded only."""
        self.call("make_current")

    def why_no_graphs(self) -> str:
        """What the constructor was given."""
        return self._graphs

    def memory(self, nbytes: int) -> FakeMemory:
        """Allocate."""
        return self._allocate("memory", nbytes, mapped=False)

    def mapped_memory(self, nbytes: int) -> FakeMemory:
        """Allocate memory that the host may touch."""
        return self._allocate("mapped_memory", nbytes, mapped=True)

    def _allocate(self, call: str, nbytes: int, *, mapped: bool) -> FakeMemory:
        self.call(call)
        self._not_while_capturing("allocating")
        if nbytes < 1:
            raise base.native_error(f"allocating {nbytes} bytes", "INVALID_VALUE", "bad size")
        memory = FakeMemory(self, nbytes, mapped)
        bisect.insort(self._starts, memory.address)
        self._memories[memory.address] = memory
        return memory

    def stream(self) -> FakeStream:
        """A queue."""
        self.call("stream")
        stream = FakeStream(self)
        self._streams.append(stream)
        return stream

    def event(self) -> FakeEvent:
        """A moment."""
        self.call("event")
        return FakeEvent(self)

    def seconds_between(self, start: base.Event, end: base.Event) -> float:
        """Time by the fake's own clock."""
        self.call("seconds_between")
        first: FakeEvent = _own(start, FakeEvent)
        second: FakeEvent = _own(end, FakeEvent)
        if not (first.recorded and second.recorded):
            raise base.native_error("measuring time", "INVALID_HANDLE", "an event has no record")
        if not (first.is_done() and second.is_done()):
            raise base.native_error("measuring time", "NOT_READY", "an event is not complete")
        return (second.done_ns - first.done_ns) * 1e-9

    def kernels(
        self, source: str, names: Sequence[str], *, conditionals: bool = False
    ) -> dict[str, base.Kernel]:
        """The functions of these names, whatever the source says."""
        self.call("kernels")
        return {name: FakeKernel(name, self._functions[name]) for name in names}

    def graph(self) -> FakeGraph:
        """A graph."""
        if self._graphs:
            raise base.no_graphs(self)
        self.call("graph")
        return FakeGraph(self)

    def view(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        """The bytes at a device address; for kernels.

        Raises:
            CudaError: They are not, or no longer, all in one allocation.
        """
        at = bisect.bisect_right(self._starts, address) - 1
        if at >= 0:
            memory = self._memories[self._starts[at]]
            first = address - memory.address
            if first + nbytes <= memory.nbytes:
                return memory.bytes[first : first + nbytes]
        raise self.lose("ILLEGAL_ADDRESS", f"{nbytes} bytes at {address:#x} are nobody's")

    def array(self, address: Argument, dtype: np.dtype[Any] | str, *shape: int) -> NDArray[Any]:
        """An array at a device address; for kernels."""
        of = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * of.itemsize
        return self.view(int(address), size).view(of).reshape(shape)

    def set_condition(self, handle: int, value: int) -> None:
        """`cudaGraphSetConditional`; for kernels."""
        if handle not in self._conditions:
            raise self.lose("ILLEGAL_ADDRESS", "no running graph has this condition")
        self._conditions[handle] = value

    def call(self, name: str) -> None:
        """Record a native call, or let it fail."""
        self.log.append(name)
        if self._lost:
            raise base.native_error(name, self._lost, "the device was lost before")
        if self._fault is not None and self._fault.call == len(self.log) - 1:
            raise base.native_error(name, self._fault.code, "a fault that a test asked for")

    def lose(self, code: str, why: str) -> CudaError:
        """Every later call fails; returns the error of this one."""
        self._lost = code
        return base.native_error("running", code, why)

    def advance(self) -> bool:
        """Run one operation of one stream; False where nothing can run."""
        if self._lost:
            raise base.native_error("waiting", self._lost, "the device was lost")
        ready = [stream for stream in self._streams if stream.is_ready()]
        if not ready:
            return False
        if self._operations_left is not None:
            if self._operations_left == 0:
                raise self.lose("LAUNCH_FAILED", "a loss that a test asked for")
            self._operations_left -= 1
        ready[int(self._random.integers(len(ready)))].step()
        return True

    def handle(self) -> int:
        """A number that nothing else has."""
        self._next_handle += 1
        return self._next_handle

    def _not_while_capturing(self, what: str) -> None:
        if self._capturing is not None:
            self._capturing.invalidate()
            raise base.native_error(what, "STREAM_CAPTURE_UNSUPPORTED", "a stream is capturing")

    def run_nodes(self, nodes: Sequence[_Node]) -> _Operation:
        """Run the nodes of a graph or of one of its branches; time passes in nothing else."""
        for node in nodes:
            self.now_ns += node.ns
            if node.condition is None:
                node.run()
                yield
            elif self._conditions[node.condition]:
                yield from self.run_nodes(node.body)
            else:
                yield

    def launch_graph(self, graph: FakeExecutable) -> _Operation:
        """Run a whole graph; its conditions begin at 0."""
        self._conditions.update(dict.fromkeys(graph.conditions, 0))
        yield from self.run_nodes(graph.nodes)
        for condition in graph.conditions:
            del self._conditions[condition]

    def forget(self, resource: base.Resource) -> None:
        """A resource was closed."""
        self.live.discard(resource)
        if isinstance(resource, FakeMemory):
            self._starts.remove(resource.address)
            del self._memories[resource.address]
        if isinstance(resource, FakeStream):
            self._streams.remove(resource)


class _Resource(base.Resource):
    """Tracked from birth to `close`."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.closed = False
        cuda.live.add(self)

    def close(self) -> None:
        """Free it, once."""
        if not self.closed:
            self.closed = True
            self.cuda.forget(self)
            self.cuda.call(f"close {type(self).__name__}")


class FakeMemory(_Resource, base.MappedMemory):
    """An array on an aligned address; only mapped memory shows it to the host."""

    def __init__(self, cuda: FakeCuda, nbytes: int, mapped: bool) -> None:
        raw = np.zeros(nbytes + _ALIGNMENT, np.uint8)
        first = -raw.ctypes.data % _ALIGNMENT
        self.bytes = raw[first : first + nbytes]
        self.address = self.bytes.ctypes.data
        self.nbytes = nbytes
        if mapped:
            self.host = self.bytes
        super().__init__(cuda)


class FakeEvent(_Resource, base.Event):
    """Counts how often it was recorded, and which of the records has been reached."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.recorded = self.reached = self.done_ns = 0
        super().__init__(cuda)

    def is_done(self) -> bool:
        """Whether all work before its last record is done."""
        return self.reached == self.recorded


class FakeKernel(base.Kernel):
    """A named function.

    Args:
        name: Its name.
        function: What it does.
        ns: How long it takes on the fake's clock.
    """

    def __init__(self, name: str, function: Function, ns: int = TICK_NS) -> None:
        self.name = name
        self.function = function
        self.ns = ns


class FakeStream(_Resource, base.Stream):
    """A queue of operations; the first one may be half done."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.handle = cuda.handle()
        self._queue: deque[tuple[Callable[[], bool], _Operation]] = deque()
        self._captured: list[_Node] | None = None
        self._invalid = False
        super().__init__(cuda)

    def synchronize(self) -> None:
        """Let the device run until the queue is empty."""
        self.cuda.call("synchronize")
        self._not_captured("synchronize")
        while self._queue:
            if not self.cuda.advance():
                raise AssertionError("deadlock: a stream waits for an event that nobody records")

    def is_done(self) -> bool:
        """Let the device run one operation, and look."""
        self.cuda.call("is_done")
        self._not_captured("is_done")
        return not self._queue or (self.cuda.advance() and not self._queue)

    def record(self, event: base.Event) -> None:
        """Queue a record; inside a capture it is a dependency and no node."""
        self.cuda.call("record")
        own = _own(event, FakeEvent)
        if self._captured is None:
            own.recorded += 1
            self._put(_reach(own, own.recorded))

    def wait(self, event: base.Event) -> None:
        """Queue a wait for what the event stands for now."""
        self.cuda.call("wait")
        own = _own(event, FakeEvent)
        version = own.recorded
        if self._captured is None:
            self._put(iter(()), lambda: own.reached >= version)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Queue a copy."""
        self.cuda.call("copy")
        self._add(_copy_node(self.cuda, target, source, nbytes))

    def launch(
        self, kernel: base.Kernel, grid: int, block: int, arguments: Sequence[Argument]
    ) -> None:
        """Queue a kernel."""
        self.cuda.call("launch")
        self._add(_kernel_node(self.cuda, kernel, grid, block, arguments))

    def host_function(self, function: Callable[[], None]) -> None:
        """Queue a call of a host function, as some libraries do; no branch may hold one."""
        self._add(_Node("host", function))

    def capture(self, work: Callable[[], None]) -> FakeCaptured:
        """Record what `work` queues here."""
        if self.cuda.why_no_graphs():
            raise base.no_graphs(self.cuda)
        self.cuda.call("capture")
        self._not_captured("capture")
        self.cuda._not_while_capturing("capture")
        self._captured, self._invalid, self.cuda._capturing = [], False, self
        try:
            work()
            nodes, invalid = self._captured, self._invalid
        finally:
            self._captured, self.cuda._capturing = None, None
        if invalid:
            raise base.native_error("capture", "STREAM_CAPTURE_INVALIDATED", "see before")
        return FakeCaptured(self.cuda, nodes)

    def launch_graph(self, graph: FakeExecutable) -> None:
        """Queue a graph; a capture takes in its nodes."""
        if self._captured is None:
            self._put(self.cuda.launch_graph(graph))
        elif graph.conditions:
            raise base.native_error("launch", "NOT_SUPPORTED", "a child graph with conditions")
        else:
            self._captured += graph.nodes

    def invalidate(self) -> None:
        """A call that can't be captured was made."""
        self._invalid = True

    def is_ready(self) -> bool:
        """Whether the first operation could run now."""
        return bool(self._queue) and self._queue[0][0]()

    def step(self) -> None:
        """Run the first operation to its next node."""
        _, operation = self._queue[0]
        try:
            next(operation)
        except StopIteration:
            self._queue.popleft()

    def _add(self, node: _Node) -> None:
        if self._captured is not None:
            self._captured.append(node)
        else:
            self._put(self.cuda.run_nodes([node]))

    def _put(self, operation: _Operation, ready: Callable[[], bool] = lambda: True) -> None:
        self._queue.append((ready, operation))

    def _not_captured(self, what: str) -> None:
        if self._captured is not None:
            self.invalidate()
            raise base.native_error(what, "STREAM_CAPTURE_UNSUPPORTED", "the stream is capturing")


class _Node:
    """A node of a graph; a branch has a condition and nodes of its own."""

    def __init__(
        self,
        kind: str,
        run: Callable[[], None] = lambda: None,
        *,
        condition: int | None = None,
        ns: int = TICK_NS,
    ) -> None:
        self.kind = kind
        self.run = run
        self.condition = condition
        self.ns = ns
        self.body: list[_Node] = []


class FakeCaptured(_Resource, base.CapturedGraph):
    """Captured nodes, found again by their handle."""

    def __init__(self, cuda: FakeCuda, nodes: list[_Node]) -> None:
        self.handle = cuda.handle()
        cuda.captured[self.handle] = nodes
        super().__init__(cuda)

    def close(self) -> None:
        """Forget the nodes; graphs that embedded them keep theirs."""
        self.cuda.captured.pop(self.handle, None)
        super().close()


class FakeCondition(base.Condition):
    """A handle of one graph, for one branch."""

    def __init__(self, graph: FakeGraph, handle: int) -> None:
        self.graph = graph
        self.handle = handle
        self.used = False


class FakeBody(base.Body):
    """A list of nodes; those of a branch may be kernels, copies, children and branches only."""

    def __init__(self, cuda: FakeCuda, graph: FakeGraph | None, nodes: list[_Node]) -> None:
        self._cuda = cuda
        self._graph = graph
        self._nodes = nodes

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Add a copy."""
        self._cuda.call("graph copy")
        self._nodes.append(_copy_node(self._cuda, target, source, nbytes))

    def launch(
        self, kernel: base.Kernel, grid: int, block: int, arguments: Sequence[Argument]
    ) -> None:
        """Add a kernel, whose conditions must be of this graph."""
        self._cuda.call("graph launch")
        for argument in arguments:
            if isinstance(argument, FakeCondition):
                self._check_condition(argument)
        self._nodes.append(_kernel_node(self._cuda, kernel, grid, block, arguments))

    def embed(self, graph: int) -> None:
        """Add captured nodes."""
        self._cuda.call("graph embed")
        nodes = self._cuda.captured.get(graph)
        if nodes is None:
            raise base.native_error("embedding", "INVALID_VALUE", "there is no such graph")
        if self._graph is not None:
            self._check_branch(nodes)
        self._nodes += nodes

    def branch(self, condition: base.Condition) -> FakeBody:
        """Add a branch."""
        self._cuda.call("graph branch")
        own = _own(condition, FakeCondition)
        self._check_condition(own)
        if own.used:
            raise base.native_error("a branch", "INVALID_VALUE", "the condition has a branch")
        own.used = True
        node = _Node("branch", condition=own.handle)
        self._nodes.append(node)
        return FakeBody(self._cuda, own.graph, node.body)

    def _root(self) -> object:
        return self._graph

    def _check_condition(self, condition: FakeCondition) -> None:
        if condition.graph is not self._root():
            raise base.native_error("a condition", "INVALID_VALUE", "it is of another graph")

    @staticmethod
    def _check_branch(nodes: Sequence[_Node]) -> None:
        for node in nodes:
            if node.kind not in ("kernel", "copy", "branch"):
                raise base.native_error(
                    "a branch", "NOT_SUPPORTED", f"a {node.kind} node can't be in a branch"
                )


class FakeGraph(_Resource, FakeBody, base.Graph):
    """The root body, and the conditions of all branches."""

    def __init__(self, cuda: FakeCuda) -> None:
        FakeBody.__init__(self, cuda, None, [])
        self._conditions: list[int] = []
        _Resource.__init__(self, cuda)

    def _root(self) -> object:
        return self

    def condition(self) -> FakeCondition:
        """A new handle."""
        self.cuda.call("graph condition")
        condition = FakeCondition(self, self.cuda.handle())
        self._conditions.append(condition.handle)
        return condition

    def instantiate(self) -> FakeExecutable:
        """Freeze the nodes."""
        self.cuda.call("graph instantiate")
        return FakeExecutable(self.cuda, list(self._nodes), tuple(self._conditions))


class FakeExecutable(_Resource, base.ExecutableGraph):
    """Nodes that run in order."""

    def __init__(self, cuda: FakeCuda, nodes: list[_Node], conditions: tuple[int, ...]) -> None:
        self.nodes = nodes
        self.conditions = conditions
        super().__init__(cuda)

    def launch(self, stream: base.Stream) -> None:
        """Queue all nodes as one operation."""
        self.cuda.call("graph launch")
        _own(stream, FakeStream).launch_graph(self)

    def upload(self, stream: base.Stream) -> None:
        """Recorded only."""
        self.cuda.call("graph upload")


def _own(thing: Any, kind: type[Any]) -> Any:
    """Refuse what another implementation made, or what is closed."""
    if not isinstance(thing, kind) or getattr(thing, "closed", False):
        raise base.native_error("a call", "INVALID_HANDLE", f"{thing!r} is no live {kind.__name__}")
    return thing


def _reach(event: FakeEvent, version: int) -> _Operation:
    event.reached = max(event.reached, version)
    event.done_ns = event.cuda.now_ns
    return
    yield


def _copy_node(cuda: FakeCuda, target: int, source: int, nbytes: int) -> _Node:
    def run() -> None:
        cuda.view(target, nbytes)[:] = cuda.view(source, nbytes)

    return _Node("copy", run)


def _kernel_node(
    cuda: FakeCuda, kernel: base.Kernel, grid: int, block: int, arguments: Sequence[Argument]
) -> _Node:
    own: FakeKernel = _own(kernel, FakeKernel)
    if not (grid >= 1 and 1 <= block <= 1024):
        raise base.native_error(f"launching {kernel.name}", "INVALID_VALUE", f"{grid} x {block}")
    values = tuple(a.handle if isinstance(a, FakeCondition) else a for a in arguments)
    return _Node("kernel", functools.partial(own.function, cuda, grid, values), ns=own.ns)


def _decide(dtype: str, cuda: FakeCuda, grid: int, arguments: Sequence[Argument]) -> None:
    """The decide kernel by its twin, one block per sample."""
    logits, classes, rule, control, state, record, answer, exit_, first, last, *more = arguments
    status = decide.decide_twin(
        cuda.array(logits, dtype, grid, int(classes)),
        cuda.array(rule, decide.RULE, 1)[0],
        cuda.array(control, decide.CONTROL, 1)[0],
        cuda.array(state, decide.STATE, grid),
        int(exit_),
        bool(first),
        bool(last),
        cuda.array(record, "uint64", grid, decide.RECORD_WORDS),
        cuda.now_ns,
    )
    if status and answer:
        sequence = int(cuda.array(control, decide.CONTROL, 1)[0]["sequence"])
        cuda.array(answer, "uint64", 1)[0] = int(exit_) << 32 | sequence
    if more and not status:
        cuda.set_condition(int(more[0]), 1)


_DECIDE: dict[str, Function] = {
    decide.kernel_name(dtype, conditional): functools.partial(_decide, dtype)
    for dtype in ("float32", "float16")
    for conditional in (False, True)
}
