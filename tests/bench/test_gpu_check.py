"""The GPU check on the fake device: it passes there, and finds what is broken on purpose."""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import gpu_check
from bench.gpu import endurance as gpu_endurance
from bench.gpu import environment as gpu_environment
from bench.gpu import inputs as gpu_inputs
from bench.gpu import kernel_stages
from bench.gpu import results as gpu_results
from bench.gpu import tensorrt as gpu_tensorrt
from bench.gpu import timing as gpu_timing
from bench.gpu import torch as gpu_torch
from bench.gpu.lab import Lab, NotRun, SharedCuda
from bench.gpu_check import Check
from edge_runtime import cli
from edge_runtime.backends.cuda import decide
from edge_runtime.backends.cuda.backend import CudaBackend
from edge_runtime.backends.cuda.fake import FakeCuda, FakeKernel, FakeStream
from edge_runtime.backends.cuda.fake_stages import FakeStages
from edge_runtime.backends.cuda.stages import Work
from edge_runtime.backends.tensorrt import api
from edge_runtime.console import Console
from edge_runtime.errors import BackendError, BackendUnavailable, ConfigError, CudaError
from edge_runtime.files import read_json
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.scheduler import Scheduler
from tests.host_kernels import compile_host
from tests.meta.repository import ROOT

KERNELS = [*kernel_stages.STAGE_KERNELS, *kernel_stages.BRANCH_KERNELS]
#: Checks that run on the fake device.
NEED_MORE = ("models", "contract", "tensorrt", "engines")
ON_THE_FAKE = [n for n in gpu_check.CHECKS if n not in NEED_MORE]


def fake(kernels: dict[str, Any] | None = None, **options: Any) -> FakeCuda:
    return FakeCuda({**kernel_stages.FAKE, **(kernels or {})}, **options)


def lab_on(cuda: FakeCuda | None = None, scale: float = 0.003) -> Lab:
    """A lab with small counts; whatever it leaves on the device is an error at the end of a run."""
    shared = SharedCuda(cuda or fake())
    lab = Lab(shared.open(), fake, scale=scale)
    lab.begin(5.0)
    return lab


def arguments(out: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gpu_check.configure(parser)
    return parser.parse_args(["--out", str(out), *more])


def check(out: Path, *more: str, cuda: Any = fake, **options: Any) -> dict[str, Any]:
    settings = {"scale": 0.001, "patience": 0.5, **options}
    return gpu_check.run(arguments(out, *more), Console(), make=cuda, **settings)


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Three exits instead of twelve, and so on: the fake device is slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_timing, "_DEPTH", 3)
        patch.setattr(gpu_timing, "_BRANCHES", (0, 1, 3))
        patch.setattr(gpu_timing, "_LARGE_ROWS", 8)
        patch.setattr(gpu_timing, "_RESAMPLES", 20)
        patch.setattr(gpu_torch, "_RESAMPLES", 20)
        patch.setattr(gpu_endurance, "_LOOKS", 5)
        yield


@pytest.fixture
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two operating points and one metric instead of all: the fake device is slow."""
    points = gpu_inputs.operating_points

    def few(*values: Any) -> Any:
        wanted = ("max_softmax-middle", "patience-1")
        return (point for point in points(*values) if point.name in wanted)

    monkeypatch.setattr(gpu_results, "operating_points", few)
    monkeypatch.setattr(gpu_results, "METRICS", ("softmax_margin",))


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return compile_host([kernel_stages.SOURCE], KERNELS)


@pytest.fixture(scope="module")
def compiled(library: ctypes.CDLL) -> dict[str, Any]:
    """The kernels' very source, for the fake device, whose memory is the host's."""
    handler = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint32)

    def run(name: str, cuda: FakeCuda, grid: int, values: Any) -> None:
        types_ = {np.uint64: ctypes.c_uint64, np.uint32: ctypes.c_uint32, int: ctypes.c_uint64}
        held = [types_[type(value)](int(value)) for value in values]
        pointers = (ctypes.c_void_p * len(held))(*[ctypes.addressof(x) for x in held])
        tell = handler(cuda.set_condition)
        library.host_on_conditional(tell)
        getattr(library, f"host_{name}")(pointers, grid, 32)
        library.host_on_conditional(None)

    return {name: functools.partial(run, name) for name in KERNELS}


class TestKernels:
    @pytest.mark.parametrize("architecture", ["sm_87", "sm_90", "sm_110"])
    @pytest.mark.parametrize("conditionals", [False, True])
    def test_the_compiler_of_the_device_takes_them(self, architecture, conditionals):
        core = pytest.importorskip("cuda.core", reason="cuda-core brings the compiler")
        options = core.ProgramOptions(
            arch=architecture,
            std="c++17",
            define_macro="GRAPH_CONDITIONALS" if conditionals else None,
        )
        code = core.Program(kernel_stages.SOURCE, "c++", options).compile("cubin").code
        found = [name for name in KERNELS if f"\0.text.{name}\0".encode() in code]
        assert found == [name for name in KERNELS if conditionals or name != "count_next"]

    def test_the_busy_loop_is_not_left_out(self):
        """The compiler of the device keeps a multiplication whose result is stored."""
        nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="it is the compiler")

        def call(name: str, *values: Any) -> Any:
            status, *answer = getattr(nvrtc, f"nvrtc{name}")(*values)
            assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS
            return answer[0] if answer else None

        source = kernel_stages.SOURCE.encode()
        program = call("CreateProgram", source, b"stages.cu", 0, [], [])
        call("CompileProgram", program, 2, [b"--gpu-architecture=compute_87", b"--std=c++17"])
        ptx = bytearray(call("GetPTXSize", program))
        call("GetPTX", program, ptx)
        text = ptx.decode()
        body = text.partition(".entry hand_on_float32")[2].partition(".entry")[0]
        assert "1664525" in body

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    @pytest.mark.parametrize(("rows", "batch", "steps"), [(3, 1, 0), (7, 2, 1000)])
    @pytest.mark.parametrize("which", ["twins", "compiled"])
    def test_stages_compute_what_they_say(self, compiled, dtype, rows, batch, steps, which):
        of = kernel_stages.cascade(3, 6, rows=rows, dtype=dtype)
        images = kernel_stages.images(of, batch)
        images[0, 1, 2] = kernel_stages.NAN
        images[0, 0] = -0.0
        with ExitStack() as stack:
            cuda = fake(compiled if which == "compiled" else None).open()
            stream = stack.enter_context(cuda.stream())
            image = stack.enter_context(cuda.memory(images.nbytes))
            image.bytes[:] = images.view(np.uint8).reshape(-1)
            plan = of.plan(range(3))
            work = Work(
                stages=plan.stages,
                variants={},
                batch=batch,
                image=of.image,
                images=(image.address,),
                ahead=frozenset(),
            )
            stages = kernel_stages.KernelStages(steps=steps)
            stack.callback(stages.close)
            stages.open(cuda, work, stream)
            for k in range(3):
                got = cuda.array(stages.address(f"logits{k}", 0), dtype, batch, 6)
                want = np.stack([kernel_stages.logits(one, k) for one in images])
                np.testing.assert_array_equal(got, want)
                assert (np.signbit(got) == np.signbit(want))[~np.isnan(want)].all()
            arrived = cuda.array(stages.led_to.address, "uint32", len(plan.stages)).tolist()
            segments = [s.kind == "segment" for s in plan.stages]
            want = kernel_stages.led_to(steps)
            assert [arrived[i] for i, one in enumerate(segments) if one] == [want] * 3
        cuda.close()

    def test_where_the_busy_loop_leads(self):
        x = 1
        for steps in range(200):
            assert kernel_stages.led_to(steps) == x
            x = (x * 1664525 + 1013904223) % 2**32

    @pytest.mark.usefixtures("few_points")
    def test_whole_frames_of_the_compiled_kernels(self, compiled):
        assert gpu_results.identical(lab_on(fake(compiled)))["ok"]

    def test_branches_of_the_compiled_kernels(self, compiled):
        found = gpu_timing.conditional_node(lab_on(fake(compiled)))
        assert found["ok"], found
        assert set(found["us_per_branch"]) == {
            "plain", "flat taken", "flat not", "nested taken", "nested not",
        }  # fmt: skip


class TestInputs:
    def test_a_third_is_adversarial(self):
        of = kernel_stages.cascade()
        images = gpu_inputs.hard_images(of, 300)
        assert np.isfinite(images).all()
        marked = (images == kernel_stages.NAN).any(axis=(1, 2)).sum()
        assert 15 <= marked <= 25
        equal = (images == images[:, :1, :1]).all(axis=(1, 2)).sum()
        assert equal >= 10

    def test_points_have_thresholds_at_0_at_1_and_every_policy(self):
        of = kernel_stages.cascade()
        points = list(gpu_inputs.operating_points(of, gpu_inputs.hard_images(of, 20)))
        assert {p.policy for p in points} == {
            "threshold", "patience", "patient_and_confident", "never",
        }  # fmt: skip
        assert {p.metric for p in points} == set(gpu_inputs.METRICS)
        for value in (0.0, 1.0):
            assert any(set(p.thresholds.values()) == {value} for p in points)
        assert len({p.name for p in points}) == len(points)

    def test_thresholds_on_the_signal(self):
        of = kernel_stages.cascade(3)
        cases = list(gpu_inputs.exact_cases(of, {5: [0.5, 0.25], 6: [0.5, 1.0]}, "max_softmax"))
        on, above = cases
        assert (on.image, on.exit, above.exit) == (5, "exit0", "exit2")
        assert on.point.thresholds["exit0"] == 0.5
        assert above.point.thresholds["exit0"] == float(
            np.nextafter(np.float32(0.5), np.float32(1))
        )


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("gpu") / "result.json"
    only = [name for name in ON_THE_FAKE if name != "cost_per_exit"]
    check(out, "--only", *only)
    return read_json(out, "result")


class TestOnTheFake:
    @pytest.mark.parametrize("name", [n for n in ON_THE_FAKE if n != "cost_per_exit"])
    def test_a_check_is_ok(self, result, name):
        assert result["checks"][name]["ok"] is True, result["checks"][name]

    def test_the_file_is_stamped_and_complete(self, result):
        assert result["complete"] is True
        assert result["environment"]["gpu"]["name"] == "a device made of numpy"
        assert result["environment"]["gpu"]["compute_capability"] == [8, 7]
        assert result["environment"]["host"]["cores"] >= 1
        assert result["seconds"] > 0
        assert "closing" not in result

    def test_figures_by_mode(self, result):
        found = result["checks"]
        assert found["waits"]["waits_per_frame_by_exit"]["graph"] == [1.0] * 6
        assert found["waits"]["waits_per_frame_by_exit"]["sync"] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
        assert len(found["identical"]["modes"]) == 9
        assert found["identical"]["frames_with_thresholds_on_the_signal"] > 0
        assert [row["exits"] for row in found["depth"]["by_exits"]] == [1, 2, 3]
        assert set(found["depth"]["by_exits"][0]["first"]["us"]) == {
            "graph", "graph nested", "polling", "sync", "run_all",
        }  # fmt: skip
        assert found["endurance"]["errors_among_them"] >= 1
        assert found["overlap"]["modes"]["graph"]["overlapped_over_alone"][0] > 0

    @pytest.mark.usefixtures("few_points")
    def test_every_kind_of_input_is_compared(self):
        found = gpu_results.identical(lab_on(scale=0.03))
        assert found["ok"], found
        assert (found["inputs"], found["operating_points"], found["different"]) == (33, 2, 0)
        assert found["errors_raised_alike"] > 0
        assert set(found["left_at"]) == {"exit0", "exit1", "exit2", "exit3", "error"}

    def test_cost_per_exit_measures_every_exit(self):
        found = gpu_timing.cost_per_exit(lab_on())
        assert [row["exits_judged"] for row in found["by_exit"]] == [1, 2, 3]
        for row in found["by_exit"]:
            assert set(row["us"]) == {"frame", "backend", "plain", "plain_and_one_decide"}
            assert set(row["over_plain"]) == {"frame", "backend", "plain_and_one_decide"}
        assert found["ok"] == found["whole_call"]["ok"]
        assert {"a_us", "c_us", "worst_us"} <= set(found["without_the_scheduler"])

    def test_without_graphs_their_checks_are_not_run(self, tmp_path):
        def old() -> FakeCuda:
            return fake(graphs="the driver is for CUDA 12.2")

        only = ["probe", "waits", "switch", "launch", "conditional_node", "cost_per_exit"]
        found = check(tmp_path / "r.json", "--only", *only, cuda=old)["checks"]
        assert {name: one["ok"] for name, one in found.items()} == {
            "probe": True,
            "waits": True,
            "switch": True,
            "launch": True,
            "conditional_node": None,
            "cost_per_exit": None,
        }
        assert "the driver is for CUDA 12.2" in found["cost_per_exit"]["summary"]
        assert found["waits"]["not_run"]["graph"].startswith("not run: the driver is for CUDA 12.2")


def wrong_decide(*_: Any) -> None:
    """Judges nothing, and lets everybody go on."""


def signal_is_off(right: Any, cuda: FakeCuda, grid: int, values: Any) -> None:
    right(cuda, grid, values)
    word = cuda.array(values[5], "uint64", 2)[1:]
    word += np.uint64(1 << 40)


def threshold_is_up(right: Any, cuda: FakeCuda, grid: int, values: Any) -> None:
    rule = cuda.array(values[2], decide.RULE, 1)[0]
    before = rule["threshold"]
    with np.errstate(over="ignore"):
        rule["threshold"] = np.nextafter(before, np.float32(np.inf))
    right(cuda, grid, values)
    rule["threshold"] = before


class TestFaultsAreFound:
    @pytest.mark.usefixtures("few_points")
    def test_a_graph_that_leaves_above_the_threshold_only(self):
        name = decide.kernel_name("float32", True)
        wrong = functools.partial(threshold_is_up, FakeCuda()._functions[name])
        found = gpu_results.identical(lab_on(fake({name: wrong})))
        assert not found["ok"]
        assert any("on-the-signal graph" in one for one in found["differences"])
        assert all(" graph" in one for one in found["differences"])

    @pytest.mark.usefixtures("few_points")
    def test_a_signal_that_is_off_in_every_mode(self):
        kernels = {}
        for conditional in (False, True):
            name = decide.kernel_name("float32", conditional)
            kernels[name] = functools.partial(signal_is_off, FakeCuda()._functions[name])
        found = gpu_results.identical(lab_on(fake(kernels)))
        assert found["largest_difference_from_numpy"] > 1e-5
        assert not found["ok"]

    @pytest.mark.usefixtures("few_points")
    def test_a_head_that_reads_another_row(self):
        def wrong(cuda: FakeCuda, grid: int, values: Any) -> None:
            source, target, _, rows, classes = values
            kernel_stages.FAKE["take_row_float32"](
                cuda, grid, (source, target, np.uint32(0), rows, classes)
            )

        assert not gpu_results.identical(lab_on(fake({"take_row_float32": wrong})))["ok"]

    @pytest.mark.usefixtures("few_points")
    def test_streams_that_do_not_wait_for_each_other(self, monkeypatch):
        monkeypatch.setattr(FakeStream, "wait", lambda self, event: None)
        for function in (gpu_results.identical, gpu_timing.overlap):
            assert gpu_check._guarded(functools.partial(function, lab_on()))["ok"] is False

    def test_a_mode_that_waits_twice(self, monkeypatch):
        collect = CudaBackend.collect

        def twice(self: CudaBackend) -> Any:
            self._ready.main.synchronize()
            self.waits += 1
            return collect(self)

        monkeypatch.setattr(CudaBackend, "collect", twice)
        found = gpu_results.waits(lab_on())
        assert not found["ok"]
        assert found["waits_per_frame_by_exit"]["graph"][0] == 2

    def test_a_switch_that_builds_anew(self, monkeypatch):
        use = CudaBackend.use

        def anew(self: CudaBackend, *values: Any) -> None:
            use(self, *values)
            self.cuda.graph().close()

        monkeypatch.setattr(CudaBackend, "use", anew)
        found = gpu_results.switch(lab_on())
        assert found["made_anew"] > 0
        assert not found["ok"]

    def test_a_switch_without_effect(self, monkeypatch):
        monkeypatch.setattr(Scheduler, "switch", lambda self, point: None)
        assert gpu_results.switch(lab_on())["wrong_results"] > 0

    def test_a_branch_that_is_always_taken(self):
        def wrong(cuda: FakeCuda, grid: int, values: Any) -> None:
            cuda.array(values[0], "uint32", 1)[0] += 1
            cuda.set_condition(int(values[2]), 1)

        found = gpu_timing.conditional_node(lab_on(fake({"count_next": wrong})))
        assert not found["ok"]
        assert found["wrong"]

    def test_branches_that_can_not_be_nested(self, monkeypatch):
        branches = gpu_timing._Ladder.branches

        def refuse(self: Any, count: int, *, nested: bool, go: bool) -> Any:
            if nested and count > 1:
                raise CudaError("too deep")
            return branches(self, count, nested=nested, go=go)

        monkeypatch.setattr(gpu_timing._Ladder, "branches", refuse)
        found = gpu_timing.conditional_node(lab_on())
        assert found["refused"] == {"3 nested taken": "too deep", "3 nested not": "too deep"}
        assert not found["ok"]

    def test_what_a_kernel_writes_is_never_seen(self):
        with pytest.raises(CudaError, match="does not see"):
            gpu_timing.launch(lab_on(fake({"tell": lambda *_: None})))

    @pytest.mark.parametrize("leak", ["objects", "bytes"])
    def test_a_leak(self, monkeypatch, leak):
        done, kept = CudaBackend.done, []
        kind = {"objects": lambda: [[] for _ in range(4)], "bytes": lambda: bytearray(2**17)}[leak]

        def leaking(self: CudaBackend) -> None:
            done(self)
            kept.append(kind())

        monkeypatch.setattr(CudaBackend, "done", leaking)
        found = gpu_endurance.endurance(lab_on())
        assert not found["ok"]
        name = "python_blocks" if leak == "objects" else "process_bytes"
        assert name in found["grown"]

    def test_memory_of_the_device_that_grows(self, monkeypatch):
        grown = iter(range(0, 1000, 10))
        readers = {"device_bytes": lambda: next(grown) * 2**20}
        monkeypatch.setattr(gpu_endurance, "memory_readers", lambda lab: readers)
        assert gpu_endurance.endurance(lab_on())["grown"] == ["device_bytes"]

    def test_a_frame_that_allocates(self, monkeypatch):
        done = CudaBackend.done

        def allocating(self: CudaBackend) -> None:
            done(self)
            self.cuda.memory(16).close()

        monkeypatch.setattr(CudaBackend, "done", allocating)
        found = gpu_endurance.endurance(lab_on())
        assert found["made_anew"] == found["frames"]
        assert not found["ok"]

    def test_other_results_in_another_thread(self, monkeypatch):
        import threading

        call = Scheduler.__call__

        def strange(self: Scheduler, image: Any, **options: Any) -> Any:
            main = threading.current_thread() is threading.main_thread()
            return call(self, image if main else -image, **options)

        monkeypatch.setattr(Scheduler, "__call__", strange)
        assert not gpu_results.second_thread(lab_on())["ok"]

    def test_what_should_be_refused_and_is_not(self, monkeypatch):
        monkeypatch.setattr("edge_runtime.tensors.np.isfinite", lambda values: np.array(True))
        found = gpu_results.refusals(lab_on())
        assert not found["ok"]
        assert found["answers"]["NaN in the image"].startswith("NOT REFUSED")

    def test_a_mode_that_fails_its_probe(self):
        broken = dict.fromkeys([decide.kernel_name("float32", True)], wrong_decide)
        found = gpu_results.modes(lab_on(fake(broken)))
        assert not found["ok"]
        assert "a conditional graph ended at exit" in found["why_not"]["one image"]["graph"]


class TestBounds:
    @pytest.mark.parametrize(
        ("a", "c", "factor", "ok"), [(14, 3, 1, True), (14, 3, 1.05, True), (16, 3, 1, False)]
    )
    def test_the_bound_on_a_frame(self, a, c, factor, ok):
        rows = [
            {
                "exits_judged": k,
                "us": {
                    "plain": 5.0 + 10 * k,
                    "plain_and_one_decide": 6.0 + 10 * k,
                    "frame": factor * 10 * k + 5 + a + c * k,
                },
            }
            for k in range(1, 13)
        ]
        found = gpu_timing.bound_of(rows, "frame")
        assert found["a_us"] == pytest.approx(a, abs=0.1)
        assert found["c_us"] == pytest.approx(c + (factor - 1) * 10, abs=0.1)
        assert found["ok"] is ok

    @staticmethod
    def rows(extra: Callable[[int], float]) -> list[dict[str, Any]]:
        return [
            {
                "exits_judged": k,
                "us": {
                    "plain": 10.0 * k,
                    "plain_and_one_decide": 10.0 * k + 1,
                    "frame": 10.0 * k + 5 + extra(k),
                },
            }
            for k in range(1, 13)
        ]

    def test_one_slow_exit_is_not_hidden_by_the_line(self):
        assert not gpu_timing.bound_of(self.rows(lambda k: 100 * (k == 6)), "frame")["ok"]

    def test_a_large_cost_per_exit_is_not_hidden_by_the_line(self):
        assert gpu_timing.bound_of(self.rows(lambda k: 20 * k), "frame")["ok"]
        assert not gpu_timing.bound_of(self.rows(lambda k: 30 * k), "frame")["ok"]

    def test_polling_is_what_counts_where_it_is_quicker(self):
        rows = self.rows(lambda k: 0)
        for row in rows:
            row["us"]["plain_and_one_decide"] -= 40
        assert not gpu_timing.bound_of(rows, "frame")["ok"]

    def figures(self, graph: float, label: int = 3) -> dict[str, Any]:
        noise = 1 + np.random.default_rng(0).standard_normal(200) * 0.01
        times = {
            "graph": 1e-3 * graph * noise,
            "sync": 1e-3 * noise[::-1],
            "torch eager": 2e-3 * noise,
        }
        return gpu_torch.figures(times, {"graph": label, "sync": 3, "torch eager": 5})

    def test_graph_below_sync(self):
        found = {"m": {"first exit": self.figures(0.9), "no exit": self.figures(1.2)}}
        assert gpu_torch.judge(found)["ok"]
        for place, figures in (("last exit", self.figures(1.0)), ("last exit", self.figures(1.1))):
            judged = gpu_torch.judge({"m": {**found["m"], place: figures}})
            assert not judged["ok"]
            assert len(judged["graph_not_below_sync"]) == 1

    def test_modes_that_disagree(self):
        judged = gpu_torch.judge({"m": {"first exit": self.figures(0.9, label=4)}})
        assert not judged["ok"]
        assert judged["labels_differ"] == ["m first exit"]


def works(lab: Lab) -> dict[str, Any]:
    return {"ok": True, "summary": "fine", "value": np.float32(1.5), "none": float("nan")}


def interrupts(lab: Lab) -> dict[str, Any]:
    raise KeyboardInterrupt


def crashes(lab: Lab) -> dict[str, Any]:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")


def misses(lab: Lab) -> dict[str, Any]:
    raise NotRun("no torch")


def finds(lab: Lab) -> dict[str, Any]:
    return {"ok": False, "summary": "12 differ"}


class TestRun:
    def test_a_check_that_fails_or_crashes_does_not_stop_the_others(self, tmp_path, capsys):
        out, json_out = tmp_path / "r.json", tmp_path / "j.json"
        functions = {"a": crashes, "b": finds, "c": misses, "d": works}
        checks = {name: Check(function, 5) for name, function in functions.items()}
        with pytest.raises(gpu_check.ChecksFailed, match="not ok: a, b") as caught:
            gpu_check.run(
                arguments(out), Console(str(json_out)), make=fake, checks=checks, scale=0.1
            )
        assert caught.value.exit_code == 1
        found = read_json(out, "result")
        assert read_json(json_out, "result") == found
        assert {n: c["ok"] for n, c in found["checks"].items()} == {
            "a": False, "b": False, "c": None, "d": True,
        }  # fmt: skip
        assert found["checks"]["a"]["error"].startswith("CUDA error: an illegal memory access")
        assert found["checks"]["a"]["where"][-1].startswith("test_gpu_check.py:")
        assert found["checks"]["d"]["value"] == 1.5
        assert found["checks"]["d"]["none"] is None
        shown = capsys.readouterr()
        for words in ("a: RuntimeError: CUDA error", "12 differ", "no torch", "NOT OK", "not run"):
            assert words in shown.out
        assert "[4/4] d ..." in shown.err

    def test_modes_can_be_forced(self, tmp_path):
        found = check(tmp_path / "r.json", "--mode", "polling", "--only", "waits", "switch")
        assert found["checks"]["waits"]["waits_per_frame_by_exit"].keys() == {"polling", "run_all"}
        assert found["checks"]["switch"]["not_run"] == {
            "graph": "not run: not asked for",
            "sync": "not run: not asked for",
        }

    def test_models_need_the_mode_that_they_are_compared_with(self):
        lab = lab_on()
        lab._only = ["graph"]
        with pytest.raises(NotRun, match="compares with the mode sync, which is not run"):
            gpu_torch.models(lab)

    def test_the_repository_s_own_tests_are_found(self, monkeypatch):
        ran = []

        def run(command, **options):
            ran.append((command, options["cwd"]))
            return subprocess.CompletedProcess(command, 0, "3 passed", "")

        monkeypatch.setattr(gpu_endurance.subprocess, "run", run)
        assert gpu_endurance.contract(lab_on())["summary"] == "3 passed"
        ((command, folder),) = ran
        assert folder == ROOT
        assert "tests/edge_runtime/cuda" in command

    def test_a_forced_mode_that_does_not_work_is_refused(self, tmp_path):
        old = fake(graphs="the driver is for CUDA 12.2")
        with pytest.raises(BackendUnavailable, match=r"'graph' is not available: .*12\.2"):
            check(tmp_path / "r.json", "--mode", "graph", cuda=lambda: old)

    def test_an_interruption_keeps_what_was_found(self, tmp_path, capsys):
        out = tmp_path / "r.json"
        checks = {"a": Check(works, 5), "b": Check(interrupts, 5), "c": Check(works, 5)}
        with pytest.raises(KeyboardInterrupt):
            gpu_check.run(arguments(out), Console(), make=fake, checks=checks, scale=0.1)
        found = read_json(out, "result")
        assert found["complete"] is False
        assert [c["ok"] for c in found["checks"].values()] == [True, None, None]
        assert found["checks"]["c"]["summary"] == "not run: interrupted"
        assert "interrupted" in capsys.readouterr().out

    def test_the_file_is_written_after_every_check(self, tmp_path):
        out = tmp_path / "r.json"
        seen = []

        def looks(lab: Lab) -> dict[str, Any]:
            seen.append(list(read_json(out, "result")["checks"]))
            return works(lab)

        checks = {"a": Check(works, 5), "b": Check(looks, 5)}
        gpu_check.run(arguments(out), Console(), make=fake, checks=checks, scale=0.1)
        assert seen == [["a"]]

    def test_a_lost_device_fails_its_checks_and_is_written(self, tmp_path):
        def lost() -> FakeCuda:
            return fake(lose_device_after=60)

        with pytest.raises(gpu_check.ChecksFailed):
            check(tmp_path / "r.json", "--only", "waits", "switch", "launch", cuda=lost)
        found = read_json(tmp_path / "r.json", "result")
        assert [c["ok"] for c in found["checks"].values()] == [False] * 3
        assert "LAUNCH_FAILED" in found["checks"]["waits"]["summary"]

    def test_when_time_is_up_the_rest_is_not_run(self, tmp_path):
        checks = {"a": Check(works, 5), "b": Check(works, 5)}
        found = gpu_check.run(
            arguments(tmp_path / "r.json"), Console(), make=fake, checks=checks, patience=0.0
        )
        assert [c["ok"] for c in found["checks"].values()] == [None, None]

    def test_budgets_end_loops(self):
        lab = lab_on(scale=1.0)
        lab.begin(0.2)
        found = gpu_endurance.endurance(lab)
        assert 0 < found["frames"] < found["wanted"] == 100_000
        assert found["ok"]

    def test_all_budgets_fit_into_nine_minutes(self):
        assert sum(check.seconds for check in gpu_check.CHECKS.values()) <= 520
        assert gpu_check._TOTAL_S <= 510

    def test_the_default_file(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        first = gpu_check._default_path("NVIDIA GeForce RTX 4090 (Laptop)")
        assert str(first).startswith("gpu_check-nvidia-geforce-rtx-4090-laptop-2")
        first.touch()
        assert gpu_check._default_path("NVIDIA GeForce RTX 4090 (Laptop)").stem == f"{first.stem}-2"
        (tmp_path / "bench" / "results").mkdir(parents=True)
        assert gpu_check._default_path("Orin").parent == Path("bench/results")

    def test_what_can_not_be_is_refused_before_anything_runs(self, tmp_path):
        with pytest.raises(ConfigError, match=r"no check 'dept'\. Did you mean 'depth'"):
            check(tmp_path / "r.json", "--only", "dept")
        with pytest.raises(ConfigError, match="not a file in a folder that exists"):
            check(tmp_path / "missing" / "r.json")

    def test_json_is_clean(self):
        value = {"a": (np.int64(1), np.array([1.0, np.inf])), 2: Path("x"), "b": Check(works, 1)}
        text = json.dumps(gpu_check.clean(value), allow_nan=False)
        assert json.loads(text)["a"] == [1, [1.0, None]]

    def test_without_a_gpu_it_says_so_and_exits_with_3(self, tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", "bench.gpu_check", "--out", str(tmp_path / "r.json")],
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 3, done.stderr
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert not (tmp_path / "r.json").exists()

    def test_codes_of_the_command(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(gpu_check, "open_cuda", lambda package, device: fake())
        monkeypatch.setattr(gpu_check, "CHECKS", {"a": Check(works, 5), "b": Check(finds, 5)})

        def code(*more: str) -> int:
            out = str(tmp_path / "r.json")
            return cli.run_command("x", gpu_check, ["--out", out, "--quick", *more])

        assert code("--only", "a") == 0
        assert code() == 1
        assert "error: not ok: b. See" in capsys.readouterr().err
        assert code("--only", "c") == 2


class TestEnvironment:
    def test_without_nvml_it_says_unknown(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pynvml", None)
        found = gpu_environment.environment(lab_on())
        assert found["ok"]
        assert found["clocks"] == "unknown"
        assert "not installed" in found["state"]["nvml"]

    def test_what_nvml_tells(self, monkeypatch):
        class NVMLError(Exception):
            pass

        def no(*_: Any) -> Any:
            raise NVMLError

        nvml = types.SimpleNamespace(
            NVMLError=NVMLError,
            NVML_CLOCK_SM=1,
            NVML_CLOCK_MEM=2,
            NVML_TEMPERATURE_GPU=0,
            nvmlInit=lambda: None,
            nvmlShutdown=lambda: None,
            nvmlSystemGetDriverVersion=lambda: "580.65",
            nvmlDeviceGetCount=lambda: 2,
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetName=lambda handle: [b"another", b"a device made of numpy"][handle],
            nvmlDeviceGetClockInfo=lambda handle, kind: [0, 1410, 1593][kind],
            nvmlDeviceGetMaxClockInfo=no,
            nvmlDeviceGetTemperature=lambda handle, kind: 41,
            nvmlDeviceGetCurrentClocksThrottleReasons=no,
        )
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        assert gpu_environment.gpu_state(lab_on()) == {
            "driver": "580.65",
            "sm_mhz": 1410,
            "memory_mhz": 1593,
            "celsius": 41,
        }

    def test_what_memory_is_read(self):
        readers = gpu_environment.memory_readers(lab_on())
        assert "device_bytes" not in readers  # the fake has none
        assert all(read() > 0 for read in readers.values())


class TestContract:
    def repository(self, tmp_path: Path, body: str) -> Path:
        (tmp_path / "tests").mkdir()
        (tmp_path / "tests" / "conftest.py").write_text("")
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n")
        (tmp_path / "tests" / "test_it.py").write_text(f"import pytest\n{body}")
        return tmp_path

    @pytest.mark.parametrize("passes", [True, False])
    def test_its_summary_is_taken_over(self, tmp_path, passes):
        body = f"@pytest.mark.gpu\ndef test_it():\n    assert {passes}\n"
        found = gpu_endurance.contract(lab_on(), self.repository(tmp_path, body))
        assert found["ok"] is passes
        assert found["summary"].startswith("1 passed" if passes else "1 failed")

    def test_no_test_is_for_a_gpu(self, tmp_path):
        root = self.repository(tmp_path, "def test_it():\n    pass\n")
        with pytest.raises(NotRun, match="no test is marked gpu"):
            gpu_endurance.contract(lab_on(), root)

    def test_no_tests(self, tmp_path):
        with pytest.raises(NotRun, match="no tests beside this installation"):
            gpu_endurance.contract(lab_on(), tmp_path)

    def test_it_takes_too_long(self, tmp_path):
        body = "import time\n@pytest.mark.gpu\ndef test_it():\n    time.sleep(30)\n"
        lab = lab_on()
        lab.begin(1)
        with pytest.raises(NotRun, match="not done in 1 s; run it alone: python -m pytest -m gpu"):
            gpu_endurance.contract(lab, self.repository(tmp_path, body))


class Recording:
    """A CUDA graph on the CPU: operations are recorded, and done again into the same tensors."""

    def __init__(self) -> None:
        self.operations: list[Any] = []

    def replay(self) -> None:
        import torch

        with torch.inference_mode():
            for function, values, options, out in self.operations:
                again = function(*values, **options)
                for old, new in zip(tensors_of(out), tensors_of(again), strict=True):
                    old.copy_(new)

    def reset(self) -> None:
        self.operations.clear()


def tensors_of(value: Any) -> list[Any]:
    import torch

    return [one for one in torch.utils._pytree.tree_leaves(value) if isinstance(one, torch.Tensor)]


def torch_on_the_cpu() -> Any:
    """The torch module, with as much of `torch.cuda` as the per-stage graphs need."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __init__(self, graph: Recording) -> None:
            super().__init__()
            self.graph = graph

        def __torch_dispatch__(self, function, types_, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            self.graph.operations.append((function, args, kwargs or {}, out))
            return out

    class Stream:
        def __init__(self, device: str) -> None:
            assert device == "cuda:0"

        def synchronize(self) -> None:
            pass

    cuda = types.SimpleNamespace(
        Stream=Stream,
        CUDAGraph=Recording,
        stream=lambda stream: nullcontext(),
        graph=lambda graph, **options: Recorder(graph),
        graph_pool_handle=lambda: None,
        empty_cache=lambda: None,
    )

    class Torch:
        def __getattr__(self, name: str) -> Any:
            return cuda if name == "cuda" else getattr(torch, name)

        def zeros(
            self, shape: Any, *, pin_memory: bool = False, device: str = "", **more: Any
        ) -> Any:
            return torch.zeros(shape, **more)

    return Torch()


def modules_on_the_fake(cuda: FakeCuda, modules: Any) -> Any:
    """Torch modules as stages of the fake device."""
    import torch

    class Stages(FakeStages):
        def open(self, shared: Any, work: Any, stream: Any) -> None:
            specs = {stage.name: stage.outputs[0].name for stage in work.stages}
            self._functions = {
                name: functools.partial(run, modules[name], target)
                for name, target in specs.items()
            }
            super().open(cuda, work, stream)

    def run(module: Any, target: str, inputs: Any) -> Any:
        (source,) = inputs.values()
        with torch.inference_mode():
            return {target: module(torch.from_numpy(source.copy())).numpy()}

    return Stages()


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    pytest.importorskip("torch")
    from bench import vit
    from bench.gpu import models as gpu_models

    size = vit.Size(width=24, heads=3, blocks=4, patch=8, image=32, classes=7)
    return {
        "vit": gpu_models.vit_with_exits(size, after=(1, 2, 4)),
        "resnet": gpu_models.resnet_with_exits(width=8, image=64, classes=7, layers=(1, 2, 1, 1)),
    }


@pytest.mark.torch
class TestModels:
    @pytest.mark.parametrize(("name", "exits"), [("vit", 3), ("resnet", 4)])
    def test_cascade_and_modules_fit(self, made, name, exits):
        from edge_runtime.backends.torch import TorchBackend

        model = made[name]
        side = model.cascade.image.shape[1]
        images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
        assert len(model.cascade.exits) == exits
        point = OperatingPoint.all_exits(model.cascade)
        with Scheduler(model.cascade, TorchBackend(model.modules), point) as scheduler:
            logits = scheduler.logits(images)
            for k in range(exits):
                scheduler.switch(gpu_timing.leaving_at(model.cascade, k))
                prediction = scheduler(images[0])
                assert prediction.exit == f"exit{k + 1}"
                assert prediction.label == logits[prediction.exit][0].argmax()
        for values in logits.values():
            assert values.shape == (2, 7)
            assert np.isfinite(values).all()
            # It depends on the image.
            assert (values[0] != values[1]).any()

    def test_the_sizes_of_the_papers(self):
        pytest.importorskip("torch")
        import torch

        from bench import vit
        from bench.gpu import models as gpu_models

        with torch.device("meta"):
            transformer = gpu_models.vit_with_exits()
            residual = gpu_models.resnet_with_exits()
        assert (vit.SMALL.width, vit.SMALL.blocks, vit.SMALL.heads) == (384, 12, 6)
        assert len(transformer.cascade.exits) == 8
        assert len(residual.cascade.exits) == 4

        def count(model: Any, but: tuple[str, ...]) -> int:
            parts = {n: m for n, m in model.modules.items() if n not in but}
            return sum(p.numel() for m in parts.values() for p in m.parameters())

        # torchvision's and timm's counts, which have one head.
        assert count(transformer, tuple(f"head{k}" for k in range(1, 8))) == 22_050_664
        assert count(residual, tuple(f"head{k}" for k in range(1, 4))) == 25_557_032

    def test_every_subject_at_every_place(self, made, monkeypatch):
        """On the CPU: captures are recorded and run again, stages are the fake device's."""
        from bench.gpu import models as gpu_models
        from edge_runtime.backends.torch import TorchBackend

        cuda = fake()
        monkeypatch.setattr(gpu_torch, "import_torch", lambda device: torch_on_the_cpu())
        monkeypatch.setattr(
            gpu_torch, "TorchBackend", lambda modules, device: TorchBackend(modules)
        )
        monkeypatch.setattr(
            gpu_torch, "TorchStages", lambda modules, device: modules_on_the_fake(cuda, modules)
        )
        monkeypatch.setattr(gpu_models, "vit_with_exits", lambda: made["vit"])
        monkeypatch.setattr(gpu_models, "resnet_with_exits", lambda: made["resnet"])
        lab = lab_on(cuda)
        found = gpu_torch.models(lab)
        assert list(found["models"]) == ["ViT-S/16, 8 exits", "ResNet-50, 4 exits"]
        subjects = {"graph", "polling", "sync", "torch eager", "torch graph per stage"}
        for places in found["models"].values():
            assert list(places) == ["first exit", "middle exit", "last exit", "no exit"]
            for figures in places.values():
                assert set(figures["us"]) == subjects
                assert set(figures["over_sync"]) == subjects - {"sync"}
                assert len(set(figures["labels"].values())) == 1, figures["labels"]
                assert set(figures["labels"]) == subjects
        assert found["labels_differ"] == []
        # Nothing is left on the device.
        lab.cuda.close_device()

    def test_without_a_gpu_they_are_not_run(self, tmp_path):
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        found = check(tmp_path / "r.json", "--only", "models")["checks"]["models"]
        assert found["ok"] is None
        assert "torch has no device 'cuda:0'" in found["summary"]


class FakeTrt:
    """As much of TensorRT as the check calls, on the fake device."""

    __name__ = "tensorrt"
    __version__ = "11.0"
    float32 = "float32"
    Weights = staticmethod(np.array)
    ElementWiseOperation = types.SimpleNamespace(SUM="sum")
    NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=0)

    class ILogger:
        WARNING = 2

    def __init__(self, cuda: FakeCuda, *, node: str = "kernel", added: float = 3.0) -> None:
        self._cuda, self._node, self._added = cuda, node, added
        self._addresses: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        # Builder, network, layers, config, runtime, engine and context are one object.
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_: self

    def build_serialized_network(self, network: Any, config: Any) -> bytes:
        return b"plan"

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, handle: int) -> bool:
        (stream,) = [s for s in self._cuda._streams if s.handle == handle]

        def add(*_: Any) -> None:
            source, target = (
                self._cuda.array(self._addresses[name], "float32", 8)
                for name in ("source", "target")
            )
            target[:] = source + np.float32(self._added)

        if self._node == "kernel":
            stream.launch(FakeKernel("add", add), 1, 1, ())
        else:
            stream.host_function(add)
        return True


class TestTensorRT:
    def trying(self, **options: Any) -> dict[str, Any]:
        cuda = fake()
        return gpu_tensorrt.try_tensorrt(lab_on(cuda), FakeTrt(cuda, **options), 0.1)

    def test_the_whole_way(self):
        found = self.trying()
        assert found["ok"], found
        assert list(found["steps"]) == [
            "build", "run on a stream", "capture", "as a graph", "in a branch",
        ]  # fmt: skip
        assert set(found["us"]) == {"stream", "graph", "branch"}

    def test_a_node_that_no_branch_may_hold(self):
        found = self.trying(node="host")
        assert not found["ok"]
        assert "NOT_SUPPORTED" in found["steps"]["in a branch"]
        assert found["steps"]["as a graph"].startswith("ok")

    def test_wrong_numbers(self):
        found = self.trying(added=4.0)
        assert not found["ok"]
        assert found["steps"] == {
            "build": found["steps"]["build"],
            "run on a stream": "wrong numbers came out",
        }

    @pytest.mark.tensorrt
    def test_the_network_builds(self, tensorrt):
        assert gpu_tensorrt.build_tiny(tensorrt, api.Log(tensorrt))

    def test_without_tensorrt(self, monkeypatch):
        monkeypatch.setattr(api, "OLDEST", {"no_such_tensorrt": (1, 0)})
        with pytest.raises(NotRun, match="neither"):
            gpu_tensorrt.check(lab_on())

    @pytest.mark.parametrize(
        ("body", "error", "message"),
        [
            ("import os; os.kill(os.getpid(), 11)", BackendError, "signal 11 ended the process"),
            ("import sys; sys.exit('error: no TensorRT')", BackendError, "no TensorRT"),
            ("import sys; print('error: no GPU', file=sys.stderr); sys.exit(3)", NotRun, "no GPU"),
            ("import time; time.sleep(9)", NotRun, "not done in"),
        ],
    )
    def test_a_process_that_ends_badly(self, body, error, message):
        timeout_s = 0.5 if "sleep" in body else 20
        with pytest.raises(error, match=message):
            gpu_tensorrt.run_alone([sys.executable, "-c", body], timeout_s)

    def test_what_a_process_found(self):
        body = "print('{\"ok\": true}')"
        assert gpu_tensorrt.run_alone([sys.executable, "-c", body], 20) == {"ok": True}
