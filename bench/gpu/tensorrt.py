"""TensorRT inside a CUDA graph, and inside a conditional branch of one.

A tiny strongly typed network is built, run on a stream of ours, captured, embedded into a graph and
then into a branch of a graph. It runs in a process of its own, since a driver or library that can't
do this may take the process with it: `check` starts ``python -m bench.gpu.tensorrt``.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu import kernel_stages
from bench.gpu.lab import Lab, NotRun, SharedCuda, microseconds
from edge_runtime import options
from edge_runtime.backends.cuda.backend import open_cuda
from edge_runtime.backends.cuda.base import Body, Cuda, ExecutableGraph, Stream
from edge_runtime.backends.tensorrt import api
from edge_runtime.cli import run_command
from edge_runtime.console import Console
from edge_runtime.errors import BackendError, EngineBuildError

_ELEMENTS = 8
_NBYTES = 4 * _ELEMENTS
_ADDED = 3.0


def check(lab: Lab) -> dict[str, Any]:
    """TensorRT where it is installed, in a process of its own."""
    if not api.is_installed():
        raise NotRun("neither tensorrt nor tensorrt_rtx is installed")
    command = [sys.executable, "-m", "bench.gpu.tensorrt", "--json", "-"]
    command += ["--device", str(lab.device), "--package", lab.package]
    command += ["--seconds", f"{max(lab.left_s * 0.3, 0.1):.1f}"]
    return run_alone(command, timeout_s=max(lab.left_s, 1))


def run_alone(command: list[str], timeout_s: float) -> dict[str, Any]:
    """What a command of this project writes as JSON, whatever becomes of it.

    Raises:
        NotRun: It says that something is missing, or is not done in time.
        BackendError: It failed, or a signal ended it.
    """
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise NotRun(f"it was not done in {timeout_s:.0f} s") from error
    last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1].removeprefix("error: ")
    if done.returncode == 3:
        raise NotRun(last)
    if done.returncode < 0:
        raise BackendError(f"signal {-done.returncode} ended the process; it said last: {last}")
    if done.returncode != 0:
        raise BackendError(last)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``python -m bench.gpu.tensorrt``."""
    parser.add_argument("--device", type=options.whole, default=0)
    parser.add_argument("--package", choices=("any", "cuda-core", "pycuda"), default="any")
    parser.add_argument("--seconds", type=options.positive, default=5.0, help="of timing")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Build, run, capture, embed; print what happened."""
    trt = api.import_tensorrt()
    make = functools.partial(open_cuda, args.package, args.device)
    cuda = SharedCuda(make())
    lab = Lab(cuda.open(), make, device=args.device, package=args.package)
    try:
        found = try_tensorrt(lab, trt, args.seconds)
    finally:
        cuda.close_device()
    console.line(found["summary"])
    return found


def try_tensorrt(lab: Lab, trt: Any, seconds: float) -> dict[str, Any]:
    """The whole way, step by step; what the last step that worked was, where one does not."""
    found: dict[str, Any] = {"module": trt.__name__, "version": trt.__version__, "steps": {}}
    steps: dict[str, str] = found["steps"]

    def step(name: str, work: Callable[[], bool]) -> bool:
        begin = time.perf_counter()
        try:
            right = work()
        except (BackendError, EngineBuildError) as error:
            steps[name] = f"failed: {error}"
            return False
        took = time.perf_counter() - begin
        steps[name] = f"ok, {took:.1f} s" if right else "wrong numbers came out"
        return right

    with ExitStack() as stack:
        log = api.Log(trt)
        tiny = TinyEngine(lab.cuda, trt, log, stack)
        ok = step("build", tiny.build) and step("run on a stream", tiny.run_on_stream)
        if ok and lab.cuda.why_no_graphs():
            steps["as a graph"] = f"not run: {lab.cuda.why_no_graphs()}"
        elif ok:
            ok = step("capture", tiny.capture) and step("as a graph", tiny.run_as_graph)
            ok = ok and step("in a branch", tiny.run_in_branch)
            if ok:
                found["us"] = {
                    name: microseconds(values)
                    for name, values in lab.measure(
                        tiny.subjects(), rounds=lab.count(500, least=4), seconds=seconds
                    ).items()
                }
    found["log"] = log.lines[-20:]
    name, last = list(steps.items())[-1]
    return {
        "ok": ok,
        "summary": f"{trt.__name__} {trt.__version__}: {name}: {last}",
        **found,
    }


def build_tiny(trt: Any, log: api.Log) -> bytes:
    """A strongly typed network that adds a constant and is otherwise the identity.

    Raises:
        EngineBuildError: TensorRT refused; its log is in the message.
    """
    builder: Any = log.checked_call(
        lambda: trt.Builder(log.native), "TensorRT made no builder", error=EngineBuildError
    )
    flags = 0
    if api.has(trt, "strongly typed by a flag"):
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    source = network.add_input("source", trt.float32, (1, _ELEMENTS))
    added = np.full((1, _ELEMENTS), _ADDED, np.float32)
    constant = network.add_constant((1, _ELEMENTS), trt.Weights(added)).get_output(0)
    total = network.add_elementwise(source, constant, trt.ElementWiseOperation.SUM).get_output(0)
    target = network.add_identity(total).get_output(0)
    target.name = "target"
    network.mark_output(target)
    config = builder.create_builder_config()
    # Streams of TensorRT's own would make the capture more than a row of kernels.
    config.max_aux_streams = 0
    plan = builder.build_serialized_network(network, config)
    return bytes(log.check(plan, "TensorRT refused the network", error=EngineBuildError))


class TinyEngine:
    """The tiny network on the device.

    Args:
        cuda: The device.
        trt: TensorRT.
        log: Its logger.
        stack: Takes what must be closed.
    """

    def __init__(self, cuda: Cuda, trt: Any, log: api.Log, stack: ExitStack) -> None:
        self._cuda, self._trt, self._log, self._stack = cuda, trt, log, stack
        keep = stack.enter_context
        self._stream: Stream = keep(cuda.stream())
        self._source, self._target = keep(cuda.memory(_NBYTES)), keep(cuda.memory(_NBYTES))
        self._inbox, self._outbox = keep(cuda.mapped_memory(256)), keep(cuda.mapped_memory(256))
        self._words = keep(cuda.mapped_memory(256))
        self._numbers = 0.0
        self._graphs: dict[str, ExecutableGraph] = {}

    def build(self) -> bool:
        """Build the engine and its context."""
        plan = build_tiny(self._trt, self._log)
        check = functools.partial(self._log.check, error=EngineBuildError)
        self._runtime = self._trt.Runtime(self._log.native)
        engine = self._runtime.deserialize_cuda_engine(plan)
        self._engine: Any = check(engine, "the engine can't be loaded")
        context = self._engine.create_execution_context()
        self._context: Any = check(context, "no execution context")
        # In this order they go before the memory that they use.
        self._stack.callback(self._release)
        for name, memory in (("source", self._source), ("target", self._target)):
            done = self._context.set_tensor_address(name, memory.address)
            check(done, f"TensorRT refused the address of {name!r}")
        return True

    def _release(self) -> None:
        self._context = self._engine = self._runtime = None

    def _enqueue(self) -> None:
        self._log.check(self._context.execute_async_v3(self._stream.handle), "TensorRT did not run")

    def _bring(self, to: Stream | Body) -> None:
        to.copy(self._source.address, self._inbox.address, _NBYTES)

    def _fetch(self, to: Stream | Body) -> None:
        to.copy(self._outbox.address, self._target.address, _NBYTES)

    def _is_right(self, launch: Callable[[], object], *, changed: bool = True) -> bool:
        """Whether a launch brings the sum of new numbers, or leaves the old one."""
        old = self._outbox.host[:_NBYTES].view(np.float32).copy()
        self._numbers += 1
        values = np.arange(_ELEMENTS, dtype=np.float32) + np.float32(self._numbers)
        self._inbox.host[:_NBYTES].view(np.float32)[:] = values
        launch()
        self._stream.synchronize()
        got = self._outbox.host[:_NBYTES].view(np.float32)
        return bool(np.array_equal(got, values + np.float32(_ADDED) if changed else old))

    def run_on_stream(self) -> bool:
        """Run it as usual, which TensorRT wants once before a capture."""

        def launch() -> None:
            self._bring(self._stream)
            self._enqueue()
            self._fetch(self._stream)

        return self._is_right(launch)

    def capture(self) -> bool:
        """Record what it does on a stream."""
        graph = self._stack.enter_context(self._stream.capture(self._enqueue))
        self._captured = graph.handle
        return True

    def run_as_graph(self) -> bool:
        """Embed it into a graph."""
        with self._cuda.graph() as graph:
            self._bring(graph)
            graph.embed(self._captured)
            self._fetch(graph)
            self._graphs["graph"] = self._stack.enter_context(graph.instantiate())
        launch = functools.partial(self._graphs["graph"].launch, self._stream)
        return self._is_right(launch) and self._is_right(launch)

    def run_in_branch(self) -> bool:
        """Embed it into a branch: it must run when the branch is taken, and not otherwise."""
        kernels = self._cuda.kernels(
            kernel_stages.SOURCE, kernel_stages.BRANCH_KERNELS, conditionals=True
        )
        counter, go = np.uint64(self._words.address), np.uint64(self._words.address + 128)
        with self._cuda.graph() as graph:
            self._bring(graph)
            condition = graph.condition()
            graph.launch(kernels["count_next"], 1, 1, (counter, go, condition))
            body = graph.branch(condition)
            body.embed(self._captured)
            self._fetch(body)
            self._graphs["branch"] = self._stack.enter_context(graph.instantiate())
        launch = functools.partial(self._graphs["branch"].launch, self._stream)
        right = []
        for taken in (True, False, True):
            self._words.host[128] = taken
            right.append(self._is_right(launch, changed=taken))
        return all(right)

    def subjects(self) -> dict[str, Callable[[], object]]:
        """The three ways, each with its wait, to be timed."""

        def stream() -> None:
            self._bring(self._stream)
            self._enqueue()
            self._fetch(self._stream)
            self._stream.synchronize()

        def launched(graph: ExecutableGraph) -> None:
            graph.launch(self._stream)
            self._stream.synchronize()

        graphs = {n: functools.partial(launched, graph) for n, graph in self._graphs.items()}
        return {"stream": stream, **graphs}


if __name__ == "__main__":
    sys.exit(run_command("python -m bench.gpu.tensorrt", sys.modules[__name__], sys.argv[1:]))
