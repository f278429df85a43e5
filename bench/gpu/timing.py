"""What the modes cost: per frame, per exit, per branch, per launch; and what overlap saves."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.gpu import kernel_stages
from bench.gpu.lab import Lab, Times, leaving_at, line_through, microseconds
from edge_runtime.backends.cuda import decide
from edge_runtime.backends.cuda.base import Body, Condition, ExecutableGraph, Kernel
from edge_runtime.backends.cuda.judge import Judge
from edge_runtime.backends.cuda.slots import NO_DEADLINE, Slot
from edge_runtime.backends.cuda.stages import Work
from edge_runtime.cascade import Cascade
from edge_runtime.errors import CudaError
from edge_runtime.policy import Never
from edge_runtime.prediction import Prediction
from edge_runtime.scheduler import Scheduler
from edge_runtime.timing import Ratio, ratio

#: Exits of the deepest synthetic cascade, and the steps that keep its segments busy: some 10 us.
_DEPTH = 12
_STEPS = 5000
#: The bound on a frame in the mode graph: factor on the plain graph, and microseconds beside c * k.
_FACTOR, _MARGIN_US = 1.05, 15.0
#: More per exit that is passed would be no small thing, and without a bound every line fits.
_MOST_PER_EXIT_US = 25.0
#: Time in which the branches behind an exit that answered are passed over.
_PAUSE_S = 50e-6
_BRANCHES = (0, 1, 2, 4, 8, 16, 32)
#: Bytes between words that should not share a line of the device's cache.
_LINE = 128
#: Resamples of an interval; there are many of them.
_RESAMPLES = 400
#: Rows of 64 numbers in the image of the overlap check: one MiB.
_LARGE_ROWS = 4096


def depth(lab: Lab) -> dict[str, Any]:
    """Wall time per frame by mode, for 1 to 12 exits, leaving at the first and at the last."""
    names = ("graph", "graph nested", "polling", "sync", "run_all")
    rows: list[dict[str, Any]] = []
    share_s = lab.left_s / _DEPTH
    for exits in range(1, _DEPTH + 1):
        of = kernel_stages.cascade(exits)
        image = kernel_stages.images(of, 1)[0]
        row: dict[str, Any] = {"exits": exits}
        with ExitStack() as stack:
            schedulers: dict[str, Scheduler] = {}
            for name in names:
                try:
                    made = lab.schedulers(stack, of, leaving_at(of, 0), name, steps=_STEPS)
                except CudaError as error:
                    row.setdefault("refused", {})[name] = str(error)
                else:
                    schedulers |= made
            for where, k in {"first": 0, "last": exits - 1}.items():
                for scheduler in schedulers.values():
                    scheduler.switch(leaving_at(of, k))
                subjects = {m: functools.partial(s, image) for m, s in schedulers.items()}
                times = lab.measure(
                    subjects,
                    rounds=lab.count(300, least=4),
                    seconds=share_s * 0.4,
                    pause_s=_PAUSE_S,
                )
                row[where] = {
                    **_medians(times),
                    "rounds": len(times["sync"]),
                    "over_sync": _over(times, "sync"),
                }
        rows.append(row)
    deepest = rows[-1]
    refused = sorted({mode for row in rows for mode in row.get("refused", ())})
    return {
        "ok": not refused,
        "summary": f"us per frame through {_DEPTH} exits: "
        + ", ".join(f"{mode} {us:g}" for mode, us in deepest["last"]["us"].items())
        + (f"; refused: {', '.join(refused)}" if refused else ""),
        "steps_per_segment": _STEPS,
        "by_exits": rows,
        "not_run": lab.missing(*names),
    }


def cost_per_exit(lab: Lab) -> dict[str, Any]:
    """A frame that leaves at exit k of 12, against a plain graph of exactly the stages up to k."""
    lab.need_graphs()
    of = kernel_stages.cascade(_DEPTH)
    image = kernel_stages.images(of, 1)[0]
    rows: list[dict[str, Any]] = []
    share_s = lab.left_s / _DEPTH
    with ExitStack() as stack:
        scheduler = stack.enter_context(lab.scheduler(of, leaving_at(of, 0), "graph", steps=_STEPS))
        prefixes = Prefixes(lab, of, stack)
        for k in range(_DEPTH):
            scheduler.switch(leaving_at(of, k))
            with prefixes.graph(k, decided=False) as plain, prefixes.graph(k, decided=True) as one:
                subjects: dict[str, Callable[[], object]] = {
                    "frame": functools.partial(scheduler, image),
                    "backend": functools.partial(_backend_frame, scheduler, image[None], k),
                    "plain": functools.partial(prefixes.run, plain, image[None]),
                    "plain_and_one_decide": functools.partial(prefixes.poll, one, image[None]),
                }
                times = lab.measure(
                    subjects,
                    rounds=lab.count(500, least=4),
                    seconds=share_s * 0.9,
                    pause_s=_PAUSE_S,
                )
            rows.append(
                {
                    "exits_judged": k + 1,
                    **_medians(times),
                    "over_plain": _over(times, "plain"),
                    "rounds": len(times["plain"]),
                }
            )
    verdicts = {name: bound_of(rows, name) for name in ("frame", "backend")}
    frame, backend = verdicts["frame"], verdicts["backend"]
    return {
        "ok": frame["ok"],
        "summary": f"a frame costs {frame['a_us']:.1f} us + {frame['c_us']:.2f} us per exit more "
        f"than the plain graph, without the scheduler {backend['a_us']:.1f} + "
        f"{backend['c_us']:.2f}; bound {_MARGIN_US:g} us, worst {frame['worst_us']:.1f}, without "
        f"the scheduler {backend['worst_us']:.1f}",
        "bound": f"{_FACTOR:g} x plain + {_MARGIN_US:g} us + c x exits judged, with plain the "
        f"quicker of waiting and polling, and c at most {_MOST_PER_EXIT_US:g} us",
        "whole_call": frame,
        "without_the_scheduler": backend,
        "steps_per_segment": _STEPS,
        "by_exit": rows,
    }


def bound_of(rows: list[dict[str, Any]], subject: str) -> dict[str, Any]:
    """Whether a subject keeps the bound at every exit, with the cost per exit that fits best.

    Args:
        rows: Of each exit: `exits_judged`, and the medians `us` of the subject, of "plain", which
            waits for its stream, and of "plain_and_one_decide", which polls as the frame does.
        subject: Its name in `us`.

    Returns:
        The line a + c k through its extra cost over the quicker of the two, and the largest excess
        over 1.05 of that + c k, which may be 15 us.
    """
    judged = [row["exits_judged"] for row in rows]
    plain = [min(row["us"]["plain"], row["us"]["plain_and_one_decide"]) for row in rows]
    taken = [row["us"][subject] for row in rows]
    a, c = line_through(judged, [t - p for t, p in zip(taken, plain, strict=True)])
    excess = [t - _FACTOR * p - c * k for t, p, k in zip(taken, plain, judged, strict=True)]
    ok = max(excess) <= _MARGIN_US and c <= _MOST_PER_EXIT_US
    return {"ok": ok, "a_us": a, "c_us": c, "worst_us": max(excess)}


def _backend_frame(scheduler: Scheduler, images: NDArray[Any], exit: int) -> None:
    """A frame as the scheduler runs it, without the scheduler."""
    backend = scheduler.backend
    backend.feed(images)
    backend.launch(_DEPTH - 1)
    found = backend.collect()
    backend.done()
    if found.last != exit:
        raise CudaError(f"a frame left at exit {found.last} instead of {exit}")


class Prefixes:
    """Plain CUDA graphs of the first stages of a cascade, without branches.

    Args:
        lab: Where.
        of: The cascade, of kernels.
        stack: Takes what must be closed.
    """

    def __init__(self, lab: Lab, of: Cascade, stack: ExitStack) -> None:
        keep = stack.enter_context
        self._lab = lab
        self._cuda = cuda = lab.cuda
        self._plan = of.plan(range(len(of.exits)))
        self.stream = keep(cuda.stream())
        self._slot = Slot(0, cuda, of.image, 1, len(of.exits), keep)
        specs = {spec.name: spec for stage in of.stages for spec in stage.outputs}
        exits = [specs[step.exit.logits] for step in self._plan.steps]
        self._judge = Judge(cuda, exits, batch=1, conditionals=True, keep=keep)
        rules = decide.rules(Never(), "logits_margin", [1.0] * len(exits), range(len(exits)))
        self._judge.write(rules, self.stream)
        self._stages = kernel_stages.KernelStages(steps=_STEPS)
        stack.callback(self._stages.close)
        work = Work(
            stages=self._plan.stages,
            variants={},
            batch=1,
            image=of.image,
            images=(self._slot.image,),
            ahead=frozenset(),
        )
        self._stages.open(cuda, work, self.stream)
        self._frames = 0

    def graph(self, exit: int, *, decided: bool) -> ExecutableGraph:
        """The image's way to the device and all stages up to an exit, and its decision or not."""
        with self._cuda.graph() as graph:
            self._slot.bring(graph)
            for step in self._plan.steps[: exit + 1]:
                for stage in step.stages:
                    graph.embed(self._stages.captured(stage.name, 0))
            if decided:
                logits = self._stages.address(self._plan.steps[exit].exit.logits, 0)
                graph.launch(*self._judge.call(exit, self._slot, logits, on_device=True))
            executable: ExecutableGraph = graph.instantiate()
        executable.upload(self.stream)
        return executable

    def run(self, graph: ExecutableGraph, images: NDArray[Any]) -> None:
        """Bring an image, launch, wait for the stream."""
        self._launch(graph, images)
        self.stream.synchronize()

    def poll(self, graph: ExecutableGraph, images: NDArray[Any]) -> None:
        """Bring an image, launch, poll until the decision is there."""
        self._launch(graph, images)
        records, frame = self._slot.records, self._frames
        self._lab.spin(self.stream, lambda: records.answer(frame) is not None)

    def _launch(self, graph: ExecutableGraph, images: NDArray[Any]) -> None:
        self._frames += 1
        self._slot.write(images, self._frames)
        self._slot.limit(NO_DEADLINE)
        graph.launch(self.stream)


def conditional_node(lab: Lab) -> dict[str, Any]:
    """What a branch costs, taken or not, flat or nested: the slope over their number."""
    lab.need_graphs()
    times: dict[str, dict[int, float]] = {}
    rounds: list[int] = []
    refused: dict[str, str] = {}
    wrong: list[str] = []
    share_s = lab.left_s / len(_BRANCHES)
    with ExitStack() as stack:
        ladder = _Ladder(lab, stack)
        for n in _BRANCHES:
            with ExitStack() as inner:
                graphs = {"plain": inner.enter_context(ladder.plain(n))}
                for name in ("flat taken", "flat not", "nested taken", "nested not"):
                    try:
                        graph = ladder.branches(n, nested="nested" in name, go="taken" in name)
                        graphs[name] = inner.enter_context(graph)
                        wrong += ladder.wrong(graphs[name], n, name)
                    except CudaError as error:
                        refused[f"{n} {name}"] = str(error)
                found = lab.measure(
                    {name: functools.partial(ladder.run, graph) for name, graph in graphs.items()},
                    rounds=lab.count(500, least=4),
                    seconds=share_s * 0.9,
                )
            rounds.append(len(found["plain"]))
            for name, seconds in found.items():
                times.setdefault(name, {})[n] = microseconds(seconds)
    slopes = {
        name: line_through(list(us), list(us.values()))[1]
        for name, us in times.items()
        if len(us) > 1
    }
    refused_early = [name for name in refused if int(name.split()[0]) <= _DEPTH]
    return {
        "ok": not wrong and not refused_early,
        "summary": "us per branch, kernel included if taken: "
        + ", ".join(f"{name} {us:.2f}" for name, us in slopes.items() if name != "plain")
        + f"; the kernel alone {slopes['plain']:.2f}"
        + "".join(f"; {name} refused" for name in refused),
        "us_per_branch": slopes,
        "us_by_branches": {
            name: {str(n): us for n, us in of.items()} for name, of in times.items()
        },
        "rounds": rounds,
        "refused": refused,
        "wrong": wrong,
        "bound": {"wrong": [], "refused": f"none up to {_DEPTH} branches"},
    }


class _Ladder:
    """Graphs of counting kernels, each of which may open the next branch.

    In device memory are the counter, a word that says yes and one that says no, a line each.
    """

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        self._cuda = lab.cuda
        self._stream = stack.enter_context(lab.cuda.stream())
        self._words = stack.enter_context(lab.cuda.memory(3 * _LINE))
        self._host = stack.enter_context(lab.cuda.mapped_memory(3 * _LINE))
        self._kernels: dict[str, Kernel] = lab.cuda.kernels(
            kernel_stages.SOURCE, kernel_stages.BRANCH_KERNELS, conditionals=True
        )
        self._write(yes=1)

    def plain(self, more: int) -> ExecutableGraph:
        """Kernels in a row, without branches."""
        with self._cuda.graph() as graph:
            for _ in range(1 + more):
                self._put(graph, None, go=True)
            executable: ExecutableGraph = graph.instantiate()
        executable.upload(self._stream)
        return executable

    def branches(self, count: int, *, nested: bool, go: bool) -> ExecutableGraph:
        """A kernel, and branches with a kernel each, all of which are taken or none."""
        with self._cuda.graph() as graph:
            body: Body = graph
            for left in range(count, -1, -1):
                condition = graph.condition() if left else None
                self._put(body, condition, go=go)
                if condition is not None:
                    body = (body if nested else graph).branch(condition)
            executable: ExecutableGraph = graph.instantiate()
        executable.upload(self._stream)
        return executable

    def _put(self, body: Body, condition: Condition | None, *, go: bool) -> None:
        counter, yes, no = (np.uint64(self._words.address + i * _LINE) for i in range(3))
        if condition is None:
            body.launch(self._kernels["count"], 1, 1, (counter,))
        else:
            body.launch(self._kernels["count_next"], 1, 1, (counter, yes if go else no, condition))

    def run(self, graph: ExecutableGraph) -> None:
        """Launch and wait."""
        graph.launch(self._stream)
        self._stream.synchronize()

    def wrong(self, graph: ExecutableGraph, branches: int, name: str) -> list[str]:
        """What is wrong with a graph: too few or too many kernels run, also after another run."""
        found = []
        for yes in (1, 0, 1):
            self._write(yes)
            self.run(graph)
            self._stream.copy(self._host.address, self._words.address, 4)
            self._stream.synchronize()
            ran = int(self._host.host[:4].view(np.uint32)[0])
            expected = 1 + (branches if yes and "taken" in name else 0)
            if ran != expected:
                found.append(f"{branches} {name}: {ran} kernels ran, expected {expected}")
        return found

    def _write(self, yes: int) -> None:
        """Begin to count, and let `yes` mean what it says or not."""
        self._host.host[:] = 0
        self._host.host[_LINE] = yes
        self._stream.copy(self._words.address, self._host.address, 3 * _LINE)
        self._stream.synchronize()


def launch(lab: Lab) -> dict[str, Any]:
    """What it costs to start something tiny and to learn that it is done."""
    cuda = lab.cuda
    with ExitStack() as stack:
        stream = stack.enter_context(cuda.stream())
        words = stack.enter_context(cuda.mapped_memory(512))
        there = stack.enter_context(cuda.memory(256))
        tell = cuda.kernels(kernel_stages.SOURCE, kernel_stages.PLAIN_KERNELS)["tell"]
        word, address = memoryview(words.host[:4]).cast("I"), np.uint64(words.address)
        numbers = itertools.count(1)

        def kernel_and_wait() -> None:
            stream.launch(tell, 1, 1, (address, np.uint32(next(numbers))))
            stream.synchronize()

        def kernel_and_poll() -> None:
            number = next(numbers)
            stream.launch(tell, 1, 1, (address, np.uint32(number)))
            lab.spin(stream, lambda: word[0] == number)

        def copy_and_wait() -> None:
            stream.copy(there.address, words.address + 256, 256)
            stream.synchronize()

        subjects: dict[str, Callable[[], object]] = {
            "kernel, wait": kernel_and_wait,
            "kernel, poll": kernel_and_poll,
            "copy of 256 bytes, wait": copy_and_wait,
            "wait for nothing": stream.synchronize,
            "ask whether it is done": stream.is_done,
            "one poll": lambda: word[0],
        }
        if not cuda.why_no_graphs():
            with cuda.graph() as building:
                building.launch(tell, 1, 1, (address, np.uint32(0)))
                graph: ExecutableGraph = stack.enter_context(building.instantiate())
            graph.upload(stream)

            def graph_and_wait() -> None:
                graph.launch(stream)
                stream.synchronize()

            def graph_and_poll() -> None:
                word[0] = 1
                graph.launch(stream)
                lab.spin(stream, lambda: word[0] == 0)

            subjects |= {"graph, wait": graph_and_wait, "graph, poll": graph_and_poll}
        times = lab.measure(subjects, rounds=lab.count(2000, least=4), seconds=lab.left_s * 0.9)
    shown = [name for name in times if name.startswith(("graph", "kernel"))]
    return {
        "ok": True,
        "summary": "us: " + ", ".join(f"{name} {microseconds(times[name]):g}" for name in shown),
        **_medians(times),
        "rounds": len(times["one poll"]),
    }


def overlap(lab: Lab) -> dict[str, Any]:
    """Frames that are all at hand, with and without the next one being brought meanwhile."""
    of = kernel_stages.cascade(exits=2, classes=64, rows=_LARGE_ROWS)
    images = kernel_stages.images(of, 4)
    batch = [images[i % len(images)] for i in range(16)]
    figures: dict[str, Any] = {}
    same = True
    modes = lab.modes("graph", "polling", "sync")
    share_s = lab.left_s / max(len(modes), 1)
    point = leaving_at(of, 1)
    for mode in modes:
        with ExitStack() as stack:
            pair = {
                name: stack.enter_context(
                    # A preprocessing and two segments of some 100 us each.
                    lab.scheduler(
                        of, point, mode + more, steps=10 * _STEPS, preprocess_steps=10 * _STEPS
                    )
                )
                for name, more in {"alone": "", "overlapped": " overlap"}.items()
            }
            answers = {name: _answers(scheduler, batch) for name, scheduler in pair.items()}
            same &= answers["alone"] == answers["overlapped"]
            subjects = {n: functools.partial(_answers, s, batch) for n, s in pair.items()}
            times = lab.measure(subjects, rounds=lab.count(200, least=4), seconds=share_s * 0.8)
        figures[mode] = {
            "us_per_frame": {n: microseconds(t / len(batch)) for n, t in times.items()},
            "overlapped_over_alone": _interval(
                ratio(times["overlapped"], times["alone"], resamples=_RESAMPLES)
            ),
            "rounds": len(times["alone"]),
        }
    return {
        "ok": same,
        "summary": ("same results" if same else "OTHER RESULTS")
        + "; time with overlap over that without: "
        + ", ".join(f"{m} {f['overlapped_over_alone'][0]:.3f}" for m, f in figures.items()),
        "same_results": same,
        "image_bytes": int(images[0].nbytes),
        "modes": figures,
    }


def _answers(scheduler: Scheduler, images: list[NDArray[Any]]) -> list[tuple[str, int, float]]:
    return [
        (prediction.exit, prediction.label, prediction.confidence)
        for prediction in scheduler.each(images)
        if isinstance(prediction, Prediction)
    ]


def _medians(times: Times) -> dict[str, dict[str, float]]:
    """Median and 99th percentile of each subject."""
    return {
        "us": {name: microseconds(seconds) for name, seconds in times.items()},
        "us_99th_percentile": {
            name: microseconds(np.percentile(seconds, 99)) for name, seconds in times.items()
        },
    }


def _over(times: Times, base: str) -> dict[str, list[float]]:
    """Ratio of each subject to one of them, with its interval."""
    if base not in times:
        return {}
    return {
        name: _interval(ratio(seconds, times[base], resamples=_RESAMPLES))
        for name, seconds in times.items()
        if name != base
    }


def _interval(value: Ratio) -> list[float]:
    return [value.value, value.low, value.high]
