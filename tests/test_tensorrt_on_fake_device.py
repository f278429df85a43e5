"""The stand-in for TensorRT offers what TensorRT has, refuses what it refuses, and sees misuse."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import pytest

from edge_runtime.backends.cuda.fake import FakeCuda, FakeEvent, FakeStream
from edge_runtime.errors import CudaError
from tests.tensorrt_api.listing import read_listings
from tests.tensorrt_on_fake_device import FakeTensorRT, Misuse, make_plan
from tests.toys import dense_model

LISTINGS = read_listings()
SCRATCH = 1000
MODEL = dense_model("source", "target", 3, 4, seed=1)
PLAN = make_plan(MODEL, {"source": (2, 3)}, scratch_bytes=SCRATCH)
FIXED = make_plan(dense_model("source", "target", 3, 4, seed=1, batch=1), {"source": (1, 3)})


class Bench:
    """A device with memory, and engines on it.

    Args:
        stack: Takes what must be closed.
        seed: Of the device.
    """

    def __init__(self, stack: ExitStack, seed: int = 0) -> None:
        self.fake = FakeTensorRT(seed=seed)
        self.trt = self.fake.module
        self.cuda: FakeCuda = self.fake.open_cuda()
        self.cuda.open()
        stack.callback(self.cuda.close)
        self._keep = stack.enter_context
        self.said: list[str] = []
        said = self.said

        class Log(self.trt.ILogger):
            def log(self, severity: Any, message: str) -> None:
                said.append(f"{severity.name}: {message}")

        self.runtime = self.trt.Runtime(Log())
        self.source, self.target = self.memory(64), self.memory(64)
        self.scratch = self.memory(1024)
        values = np.arange(6, dtype=np.float32)
        self.cuda.array(self.source.address, "float32", 6)[:] = values

    def memory(self, nbytes: int) -> Any:
        return self._keep(self.cuda.memory(nbytes))

    def stream(self) -> FakeStream:
        return self._keep(self.cuda.stream())

    def engine(self, plan: bytes = PLAN) -> Any:
        return self.runtime.deserialize_cuda_engine(plan)

    def context(self, plan: bytes = PLAN) -> Any:
        """A context to which nothing has been told."""
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return self.engine(plan).create_execution_context(strategy)

    def ready(self, target: int | None = None) -> Any:
        """A context that can run."""
        context = self.context()
        assert context.set_input_shape("source", (2, 3))
        assert context.set_tensor_address("source", self.source.address)
        assert context.set_tensor_address("target", target or self.target.address)
        context.set_device_memory(self.scratch.address, SCRATCH)
        assert self.said == []
        return context

    def has_run(self) -> Any:
        """A context that has run once."""
        context, stream = self.ready(), self.stream()
        assert context.execute_async_v3(stream.handle)
        stream.synchronize()
        return context


@pytest.fixture
def bench() -> Iterator[Bench]:
    # What is lost can't be freed.
    with suppress(CudaError), ExitStack() as stack:
        yield Bench(stack)


def offered() -> dict[str, Any]:
    """Dotted name of everything public that the module has -> the thing."""
    found = {}
    for name, thing in vars(FakeTensorRT().module).items():
        if not name.startswith("_"):
            found[name] = thing
            found |= {f"{name}.{inner}": value for inner, value in members(thing).items()}
    return found


def members(of: type) -> dict[str, Any]:
    if hasattr(of, "__members__"):
        return dict(of.__members__)
    names = (name for name in dir(of) if not name.startswith("_"))
    return {name: inspect.getattr_static(of, name) for name in names}


@pytest.mark.parametrize("version", LISTINGS)
def test_everything_it_offers_is_in_tensorrt(version: str) -> None:
    listing = LISTINGS[version]
    things = offered()
    assert {"Runtime.deserialize_cuda_engine", "DataType.HALF", "ILogger.Severity"} <= set(things)
    for name, thing in things.items():
        owner, _, last = name.rpartition(".")
        place = listing.find(owner, last)
        assert place is not None, name
        assert listing.names[place] == kind(thing), name


def kind(thing: Any) -> str | int:
    if inspect.isclass(thing):
        return "enum" if hasattr(thing, "__members__") else "class"
    if isinstance(thing, property):
        return "read-only property"
    return int(thing) if isinstance(thing, int) else "method"


def test_it_computes_what_the_model_does(bench: Bench) -> None:
    context, stream = bench.ready(), bench.stream()
    for _ in range(2):
        bench.cuda.array(bench.source.address, "float32", 6)[:] += 1
        values = bench.cuda.array(bench.source.address, "float32", 2, 3)
        assert context.execute_async_v3(stream.handle)
        stream.synchronize()
        got = bench.cuda.array(bench.target.address, "float32", 2, 4)
        weights = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
        np.testing.assert_allclose(got, np.tanh(values @ weights) * 3, rtol=1e-5)


def test_shapes_are_known_once_those_of_the_inputs_are(bench: Bench) -> None:
    context = bench.context()
    assert tuple(context.get_tensor_shape("target")) == (-1, 4)
    assert context.infer_shapes() == ["source"]
    assert context.set_input_shape("source", (2, 3))
    assert tuple(context.get_tensor_shape("target")) == (2, 4)
    assert context.infer_shapes() == []
    assert tuple(bench.engine().get_tensor_shape("source")) == (-1, 3)
    assert bench.context(FIXED).infer_shapes() == []


REFUSALS: dict[str, tuple[Callable[[Bench], Any], str]] = {
    "another file": (lambda b: b.engine(b"ftrt" + PLAN), "another magic tag"),
    "half a plan": (lambda b: b.engine(PLAN[: len(PLAN) // 2]), "the plan is corrupt"),
    "no header": (lambda b: b.engine(PLAN[:40]), "the plan is corrupt"),
    "of another version": (
        lambda b: b.engine(make_plan(MODEL, {"source": (2, 3)}, version="11.0")),
        "the engine is of version 11.0",
    ),
    "a shape outside the profile": (
        lambda b: b.context().set_input_shape("source", (1, 3)),
        "the profile has (2, 3)",
    ),
    "the shape of an output": (
        lambda b: b.context().set_input_shape("target", (2, 4)),
        "the profile has (2, 4)",
    ),
    "the shape of nothing": (
        lambda b: b.context().set_input_shape("sauce", (2, 3)),
        "no input or output is called 'sauce'",
    ),
    "the address of nothing": (
        lambda b: b.context().set_tensor_address("sauce", 256),
        "no input or output is called 'sauce'",
    ),
    "an address between two lines": (
        lambda b: b.context().set_tensor_address("source", b.source.address + 64),
        "is not aligned",
    ),
    "no shape": (
        lambda b: b.context().execute_async_v3(b.stream().handle),
        "the shapes of ['source'] are not known",
    ),
    "no address": (
        lambda b: b.context(FIXED).execute_async_v3(b.stream().handle),
        "the addresses of ['source', 'target'] are not set",
    ),
    "no such stream": (lambda b: b.ready().execute_async_v3(1), "no such stream"),
    "a name at no index": (lambda b: b.engine().get_tensor_name(2), "no tensor 2"),
}


@pytest.mark.parametrize(("call", "why"), REFUSALS.values(), ids=REFUSALS)
def test_it_refuses(bench: Bench, call: Callable[[Bench], Any], why: str) -> None:
    assert call(bench) in (None, False)
    (line,) = bench.said
    assert line.startswith("ERROR: ")
    assert why in line


def test_without_a_device_it_loads_nothing(bench: Bench) -> None:
    bench.cuda.is_open = False
    assert bench.engine() is None
    assert "CUDA initialization failure" in bench.said[0]
    bench.cuda.is_open = True


@pytest.mark.parametrize("what", ["too small", "not aligned"])
def test_bad_device_memory_is_in_the_log_alone_and_then_nothing_runs(
    bench: Bench, what: str
) -> None:
    context = bench.ready()
    context._scratch = None
    offset, size = (0, SCRATCH - 1) if what == "too small" else (16, SCRATCH)
    assert context.set_device_memory(bench.scratch.address + offset, size) is None
    assert "1000 are needed" in bench.said[0]
    assert context.execute_async_v3(bench.stream().handle) is False
    assert "device memory is not set" in bench.said[1]


def test_what_cuda_refuses_is_told_as_tensorrt_tells_it(bench: Bench) -> None:
    context, stream = bench.ready(), bench.stream()
    bench.cuda.lose("ECC_UNCORRECTABLE", "a test")
    assert context.execute_async_v3(stream.handle) is False
    assert "ECC_UNCORRECTABLE" in bench.said[0]


def test_any_call_can_be_made_to_fail() -> None:
    fake = FakeTensorRT(refuse=0)
    with pytest.raises(TypeError, match="factory function returned nullptr"):
        fake.module.Runtime(type("Log", (fake.module.ILogger,), {"log": lambda *_: None})())


class TestMisuse:
    """What a device would not tell."""

    def test_the_first_run_of_a_context_is_not_captured(self, bench: Bench) -> None:
        context, stream = bench.ready(), bench.stream()
        with pytest.raises(Misuse, match="must not be captured"):
            stream.capture(lambda: context.execute_async_v3(stream.handle))

    def test_memory_that_was_freed(self, bench: Bench) -> None:
        context, stream = bench.has_run(), bench.stream()
        assert context.execute_async_v3(stream.handle)
        bench.target.close()
        with pytest.raises(Misuse, match="'target' in memory that was freed"):
            stream.synchronize()

    def test_memory_that_is_nobody_s(self, bench: Bench) -> None:
        context, stream = bench.ready(target=1 << 40), bench.stream()
        assert context.execute_async_v3(stream.handle)
        with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
            stream.synchronize()

    def test_a_graph_that_outlives_its_context(self, bench: Bench) -> None:
        contexts, stream = [bench.has_run()], bench.stream()
        with (
            stream.capture(lambda: contexts[0].execute_async_v3(stream.handle)) as captured,
            bench.cuda.graph() as graph,
        ):
            graph.embed(captured.handle)
            with graph.instantiate() as executable:
                executable.launch(stream)
                stream.synchronize()
                contexts.clear()
                executable.launch(stream)
                with pytest.raises(Misuse, match="after its context was destroyed"):
                    stream.synchronize()
        assert bench.fake.problems == []

    def test_a_context_that_goes_while_it_works(self, bench: Bench) -> None:
        context, stream = bench.ready(), bench.stream()
        assert context.execute_async_v3(stream.handle)
        del context
        assert bench.fake.problems == ["a context was destroyed before its work was done"]

    @pytest.mark.parametrize("shared", ["scratch memory", "target"])
    def test_two_engines_in_one_memory_at_the_same_time(self, shared: str) -> None:
        def goes_wrong(seed: int, *, ordered: bool) -> bool:
            with ExitStack() as stack:
                bench = Bench(stack, seed)
                streams = [bench.stream(), bench.stream()]
                other = bench.target if shared == "target" else bench.memory(64)
                contexts = [bench.ready(), bench.ready(other.address)]
                if shared == "target":
                    contexts[1].set_device_memory(bench.memory(1024).address, SCRATCH)
                event: FakeEvent = stack.enter_context(bench.cuda.event())
                for context, stream in zip(contexts, streams, strict=True):
                    assert context.execute_async_v3(stream.handle)
                    if ordered and stream is streams[0]:
                        streams[0].record(event)
                        streams[1].wait(event)
                try:
                    for stream in streams:
                        stream.synchronize()
                except Misuse as error:
                    assert f"{shared!r} was written to by another" in str(error)
                    return True
            return False

        assert any(goes_wrong(seed, ordered=False) for seed in range(20))
        assert not any(goes_wrong(seed, ordered=True) for seed in range(20))

    def test_an_input_that_changes_while_it_is_read(self, bench: Bench) -> None:
        context, stream = bench.ready(), bench.stream()
        assert context.execute_async_v3(stream.handle)
        assert bench.cuda.advance()
        bench.cuda.array(bench.source.address, "float32", 6)[0] = 9
        with pytest.raises(Misuse, match="'source' was written to by another"):
            stream.synchronize()
