"""The scheduler, its modes, the real kernels and the real cuda-core, on the emulated driver.

With `-m gpu` the same runs on a device.
"""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.gpu import kernel_stages
from edge_runtime import BackendError, BackendUnavailable, CudaError, OperatingPoint, Scheduler
from edge_runtime.backends.cuda import decide
from edge_runtime.backends.cuda.backend import CudaBackend, CudaOptions
from edge_runtime.backends.cuda.base import Cuda
from edge_runtime.backends.cuda.core import CudaCore
from edge_runtime.backends.cuda.fake import FakeCuda
from edge_runtime.backends.cuda.pycuda import PyCuda
from tests import host_kernels
from tests.cuda_without_gpu import Emulated
from tests.cuda_without_gpu.driver import ILLEGAL_ADDRESS, OUT_OF_MEMORY

CASCADE = kernel_stages.cascade(exits=5, classes=12)
POINT = OperatingPoint("p", thresholds={f"exit{k}": 0.7 - 0.05 * k for k in range(4)})
FRAMES = kernel_stages.images(CASCADE, 20)
DECIDE = [
    decide.kernel_name(dtype, conditional)
    for dtype in ("float32", "float16")
    for conditional in (False, True)
]
WAYS = [
    CudaOptions(mode=mode, overlap=overlap, nested=nested)
    for mode, overlap, nested in itertools.product(
        ("graph", "polling", "sync", "run_all"), (False, True), (False, True)
    )
    if mode == "graph" or not nested
]
TIMED = [CudaOptions(mode=mode, time_stages=True) for mode in ("polling", "sync")]


@pytest.fixture(scope="session")
def emulated_driver(emulated_driver: Emulated) -> Emulated:
    names = [*DECIDE, *kernel_stages.STAGE_KERNELS, *kernel_stages.BRANCH_KERNELS]
    library = host_kernels.compile_host([decide.SOURCE, kernel_stages.SOURCE], names)
    emulated_driver.register(library, names)
    return emulated_driver


@pytest.fixture(params=["emulated", pytest.param("device", marks=pytest.mark.gpu)])
def make(request: pytest.FixtureRequest) -> Callable[[], Cuda]:
    if request.param == "emulated":
        request.getfixturevalue("emulated")
    return CudaCore


def opened(
    cuda: Cuda, options: CudaOptions, point: OperatingPoint = POINT, of: Any = CASCADE
) -> Scheduler:
    backend = CudaBackend(kernel_stages.KernelStages(steps=3), options, cuda=cuda)
    return Scheduler(of, backend, point)


def said(prediction: Any) -> tuple[Any, ...]:
    exits = [run[:4] for run in prediction.trace.exits]
    return prediction.label, prediction.exit, prediction.trace.ended, exits


def reference(point: OperatingPoint = POINT, of: Any = CASCADE, frames: Any = FRAMES) -> list[Any]:
    """By numpy alone."""
    with opened(FakeCuda(kernel_stages.FAKE), CudaOptions(mode="run_all"), point, of) as cascade:
        return [said(cascade(frame)) for frame in frames]


def agree(got: list[Any], want: list[Any]) -> None:
    for (label, exit_, ended, exits), (label_, exit_2, ended_, exits_) in zip(
        got, want, strict=True
    ):
        assert (label, exit_, ended) == (label_, exit_2, ended_)
        assert [run[:2] for run in exits] == [run[:2] for run in exits_]
        np.testing.assert_allclose(
            [run[2:] for run in exits], [run[2:] for run in exits_], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("options", [*WAYS, *TIMED], ids=str)
def test_every_mode_answers_as_numpy_does(make: Callable[[], Cuda], options: CudaOptions) -> None:
    with opened(make(), options) as cascade:
        assert cascade.backend.mode == options.mode
        agree([said(cascade(frame)) for frame in FRAMES], reference())
        agree([said(p) for p in cascade.each(FRAMES)], reference())


@pytest.mark.parametrize("options", TIMED, ids=str)
def test_timed_stages_took_some_of_the_frame(
    make: Callable[[], Cuda], options: CudaOptions
) -> None:
    with opened(make(), options) as cascade:
        for frame in FRAMES:
            prediction = cascade(frame)
            runs = prediction.trace.stages
            assert all(run.start_s > 0 and run.duration_s >= 0 for run in runs)
            assert 0 < sum(run.duration_s for run in runs) < prediction.latency_s


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("policy", ["threshold", "patience", "patient_and_confident"])
def test_modes_are_identical_bit_for_bit(make: Callable[[], Cuda], dtype: str, policy: Any) -> None:
    of = kernel_stages.cascade(exits=5, classes=300, dtype=dtype)
    frames = kernel_stages.images(of, 10, seed=4)
    point = OperatingPoint(
        "p",
        policy=policy,
        metric="softmax_margin",
        thresholds={f"exit{k}": 0.03 for k in range(4)},
        temperatures={"exit1": 1.7},
        patience=1 if policy == "threshold" else 2,
    )
    found = []
    for options in WAYS:
        with opened(make(), options, point, of) as cascade:
            found.append([said(cascade(frame)) for frame in frames])
    assert all(one == found[0] for one in found)
    agree(found[0], reference(point, of, frames))


def test_the_best_mode_is_the_graph(make: Callable[[], Cuda]) -> None:
    with opened(make(), CudaOptions()) as cascade:
        assert cascade.backend.mode == "graph"
        before = cascade.backend.waits
        cascade(FRAMES[0])
        assert cascade.backend.waits - before == 1


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_logits_that_are_no_numbers(make: Callable[[], Cuda], options: CudaOptions) -> None:
    frames = FRAMES[:3].copy()
    frames[1, 2, 5] = kernel_stages.NAN
    point = OperatingPoint.all_exits(CASCADE)
    with opened(make(), options, point) as cascade:
        want = [said(cascade(frames[i])) for i in (0, 2)]
        with pytest.raises(BackendError, match="exit 'exit2'"):
            cascade(frames[1])
        assert [said(cascade(frames[i])) for i in (0, 2)] == want


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_another_operating_point(make: Callable[[], Cuda], options: CudaOptions) -> None:
    other = OperatingPoint(
        "other", metric="entropy", thresholds={f"exit{k}": -1.0 for k in range(4)}
    )
    with opened(make(), options) as cascade:
        for point in (other, POINT, other):
            cascade.switch(point)
            agree([said(cascade(frame)) for frame in FRAMES], reference(point))


@pytest.mark.parametrize("mode", ["polling", "sync", "run_all"])
def test_batches(make: Callable[[], Cuda], mode: Any) -> None:
    with opened(make(), CudaOptions(mode=mode, batch=8)) as cascade:
        for size in (8, 3):
            got = [said(prediction) for prediction in cascade(FRAMES[:size])]
            agree(got, reference(frames=FRAMES[:size]))


@pytest.mark.pycuda
def test_pycuda_runs_what_needs_no_graph(emulated: Emulated) -> None:
    for options in WAYS:
        if options.mode != "graph":
            with opened(PyCuda(), options) as cascade:
                agree([said(cascade(frame)) for frame in FRAMES], reference())
                agree([said(p) for p in cascade.each(FRAMES)], reference())
    with opened(PyCuda(), CudaOptions()) as cascade:
        assert cascade.backend.mode == "polling"
        assert "cuda-core has" in cascade.backend.passed_over["graph"]


class TestOnTheEmulatedDriverOnly:
    """What a real one can't be asked for."""

    @pytest.mark.parametrize("options", WAYS, ids=str)
    def test_nothing_is_left_behind(self, emulated: Emulated, options: CudaOptions) -> None:
        with opened(CudaCore(), options) as cascade:
            live = emulated.live_bytes()
            for _ in range(3):
                list(cascade.each(FRAMES))
            assert emulated.live_bytes() == live
        del cascade
        gc.collect()
        left = emulated.live_objects()
        del left["library"]  # cuda-core keeps what it has loaded.
        assert not left
        assert emulated.live_bytes() == 0

    def test_opening_again_loads_no_kernel_again(self, emulated: Emulated) -> None:
        """cuda-core keeps what it has loaded until the process ends."""
        counts = []
        for _ in range(3):
            with opened(CudaCore(), CudaOptions()) as cascade:
                cascade(FRAMES[0])
            counts.append(emulated.live_objects()["library"])
        assert counts[0] == counts[1] == counts[2] > 0

    def test_threads_that_come_and_go(self, emulated: Emulated) -> None:
        """Their numbers are given out again, their contexts are not."""
        with opened(CudaCore(), CudaOptions()) as cascade:
            found = []
            for _ in range(4):
                thread = threading.Thread(target=lambda: found.append(said(cascade(FRAMES[0]))))
                thread.start()
                thread.join()
            agree(found, reference(frames=FRAMES[:1]) * 4)

    def test_a_stage_that_captures_nothing_is_left_out(self, emulated: Emulated) -> None:
        device = CudaCore().open()
        with (
            device.stream() as stream,
            stream.capture(lambda: None) as nothing,
            device.graph() as graph,
        ):
            branch = graph.branch(graph.condition())
            emulated.clear_log()
            branch.embed(nothing.handle)
            assert "cuGraphAddChildGraphNode" not in emulated.log()
        device.close()

    def test_on_a_jetson_images_are_not_copied(self, emulated: Emulated) -> None:
        emulated.set_integrated(True)
        with opened(CudaCore(), CudaOptions(mode="polling")) as cascade:
            agree([said(cascade(frame)) for frame in FRAMES], reference())
            emulated.clear_log()
            cascade(FRAMES[0])
            assert not [call for call in emulated.log() if "Memcpy" in call]

    def test_a_driver_without_conditional_nodes_polls(self, emulated: Emulated) -> None:
        emulated.set_driver_version(12, 2)
        with opened(CudaCore(), CudaOptions()) as cascade:
            assert cascade.backend.mode == "polling"
            assert "conditional nodes need 12.4" in cascade.backend.passed_over["graph"]
            agree([said(cascade(frame)) for frame in FRAMES], reference())
        with pytest.raises(BackendUnavailable, match=r"12\.4.*Modes that are: polling, sync"):
            opened(CudaCore(), CudaOptions(mode="graph")).open()

    @pytest.mark.parametrize("mode", ["graph", "polling"])
    @pytest.mark.parametrize("code", [OUT_OF_MEMORY, ILLEGAL_ADDRESS])
    def test_a_fault_at_any_native_call_is_one_error(
        self, begun: Emulated, mode: Any, code: int
    ) -> None:
        """The first and the last call of each function fails, in opening and running a frame."""

        def use() -> None:
            with opened(CudaCore(), CudaOptions(mode=mode)) as cascade:
                cascade(FRAMES[0])

        begun.clear_log()
        use()
        log = begun.log()
        last = {name: nth for nth, name in enumerate(log, 1)}
        first = {name: nth for nth, name in reversed(list(enumerate(log, 1)))}
        failed = 0
        for nth in sorted({*first.values(), *last.values()}):
            begun.reset()
            begun.fail("*", nth, code)
            try:
                use()
            except (CudaError, BackendUnavailable) as error:
                failed += 1
                assert "\n" not in str(error)
            begun.forget_failures()
            gc.collect()
            assert begun.live_bytes() == 0, nth
        assert failed > len(first) / 2
