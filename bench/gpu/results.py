"""Checks of what comes out: that all modes agree, wait once, and refuse what they must."""

from __future__ import annotations

import functools
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.gpu import kernel_stages
from bench.gpu.inputs import exact_cases, hard_images, judge, operating_points
from bench.gpu.lab import MODES, Lab, leaving_at, microseconds
from edge_runtime.backends.cuda import probe
from edge_runtime.backends.cuda.backend import CudaBackend, CudaOptions
from edge_runtime.cascade import Cascade
from edge_runtime.confidence import METRICS, bounds
from edge_runtime.errors import (
    BackendError,
    BackendUnavailable,
    CudaError,
    EdgeRuntimeError,
    InputError,
)
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.prediction import Prediction
from edge_runtime.scheduler import Pending, Scheduler

#: The mode that all others are compared with: every stage runs, the host decides at the end.
_REFERENCE = "run_all"
#: The device's signals may differ from numpy's by so much, relative to the larger of 1 and theirs.
_FROM_NUMPY = 1e-5
#: Images of one turn of all points and modes.
_CHUNK = 50
#: So many differences are written out.
_SHOWN = 10

#: What a frame gave, comparable bit by bit.
Outcome = tuple[Any, ...]


def modes(lab: Lab) -> dict[str, Any]:
    """Which execution modes work here, and why not the others."""
    one, two = (probe.why_not(lab.cuda, batch) for batch in (1, 2))
    # An old driver has no conditional graphs; whatever else is missing should not be.
    unexpected = {mode: why for mode, why in one.items() if why and why != lab.cuda.why_no_graphs()}
    works = [mode for mode, why in one.items() if not why]
    return {
        "ok": not unexpected,
        "summary": f"{', '.join(works)} work"
        + "".join(f"; {mode}: {why}" for mode, why in one.items() if why),
        "best": works[0],
        "why_not": {"one image": one, "two images": two},
    }


def identical(lab: Lab) -> dict[str, Any]:
    """All modes against run_all, bit by bit, on random and adversarial inputs."""
    found = _Comparison()
    count = lab.count(1000, least=3)
    half = kernel_stages.cascade(exits=4, classes=10, dtype="float16")
    whole = kernel_stages.cascade(exits=4, classes=10)
    for of, inputs, share in ((half, max(count // 10, 1), 0.1), (whole, count, 0.7)):
        end_s = lab.left_s * (1 - share)
        with ExitStack() as stack:
            _compare_points(lab, of, hard_images(of, inputs), end_s, found, stack)
    with ExitStack() as stack:
        _compare_exact(lab, whole, hard_images(whole, count, seed=1), found, stack)
    wanted = count + max(count // 10, 1)
    return {
        "ok": not found.differences and found.from_numpy <= _FROM_NUMPY and found.exact > 0,
        "summary": f"{found.inputs} inputs x {found.points} points x {len(lab.modes())} modes: "
        f"{len(found.differences)} differ; largest step from numpy {found.from_numpy:.1e}"
        + ("" if found.inputs == wanted else f" (time was up before {wanted} inputs)"),
        "inputs": found.inputs,
        "operating_points": found.points,
        "modes": lab.modes(),
        "not_run": lab.missing(),
        "frames": found.frames,
        "frames_with_thresholds_on_the_signal": found.exact,
        "errors_raised_alike": found.errors,
        "left_at": dict(found.left_at),
        "different": len(found.differences),
        "differences": found.differences[:_SHOWN],
        "largest_difference_from_numpy": found.from_numpy,
        "bound": {"different": 0, "largest_difference_from_numpy": _FROM_NUMPY},
    }


class _Comparison:
    """What was compared so far."""

    def __init__(self) -> None:
        self.inputs = self.points = self.frames = self.exact = self.errors = 0
        self.from_numpy = 0.0
        self.left_at: dict[str, int] = defaultdict(int)
        self.differences: list[str] = []

    def add(self, where: str, want: Outcome, got: Outcome) -> None:
        """Compare one frame of one mode with the reference."""
        self.frames += 1
        if got != want:
            self.differences.append(f"{where}: got {got}, expected {want}")

    def check(self, where: str, image: NDArray[Any], point: OperatingPoint, got: Outcome) -> None:
        """Compare the reference itself with numpy."""
        self.left_at[got[0]] += 1
        if got[0] == "error":
            self.errors += 1
            exit_ = int(got[1].partition("exit 'exit")[2].partition("'")[0] or -1)
            if exit_ < 0 or judge(image, exit_, point.metric, _temperature(point, exit_)):
                self.differences.append(f"{where}: an error without a reason: {got[1]}")
            return
        for name, label, signal, _ in got[4:]:
            k = int(name.removeprefix("exit"))
            want = judge(image, k, point.metric, _temperature(point, k))
            if want is None or want.labels != label:
                self.differences.append(f"{where}: {name} says {label}, numpy {want}")
            else:
                step = abs(float(want.signal) - signal) / max(1.0, abs(float(want.signal)))
                self.from_numpy = max(self.from_numpy, step)


def _temperature(point: OperatingPoint, exit: int) -> float:
    return point.temperatures.get(f"exit{exit}", 1.0)


def _compare_points(
    lab: Lab,
    of: Cascade,
    images: NDArray[Any],
    end_s: float,
    found: _Comparison,
    stack: ExitStack,
) -> None:
    """Every point in every mode, chunk by chunk until the time is up."""
    groups: dict[tuple[int, ...], list[OperatingPoint]] = defaultdict(list)
    for point in operating_points(of, images[:50]):
        groups[point.policy_for(of).evaluated(len(of.exits))].append(point)
    opened = [(points, lab.schedulers(stack, of, points[0], *MODES)) for points in groups.values()]
    found.points = max(found.points, sum(map(len, groups.values())))
    for first in range(0, len(images), _CHUNK):
        chunk = images[first : first + _CHUNK]
        for points, schedulers in opened:
            for point in points:
                _compare_chunk(of, point, schedulers, chunk, found)
        found.inputs += len(chunk)
        if lab.left_s < end_s:
            return


def _compare_chunk(
    of: Cascade,
    point: OperatingPoint,
    schedulers: dict[str, Scheduler],
    images: NDArray[Any],
    found: _Comparison,
) -> None:
    for scheduler in schedulers.values():
        scheduler.switch(point)
    wants = _outcomes(schedulers[_REFERENCE], images)
    for image, want in zip(images, wants, strict=True):
        found.check(f"{of.image.dtype} {point.name} run_all", image, point, want)
    for mode, scheduler in schedulers.items():
        gots = wants if mode == _REFERENCE else _outcomes(scheduler, images)
        for number, (want, got) in enumerate(zip(wants, gots, strict=True)):
            found.add(f"{of.image.dtype} {point.name} {mode}, image {number}", want, got)


def _compare_exact(
    lab: Lab, of: Cascade, images: NDArray[Any], found: _Comparison, stack: ExitStack
) -> None:
    """Thresholds that equal the device's own signal let the image leave; a step more does not."""
    share_s = lab.left_s / len(METRICS)
    for metric in METRICS:
        end_s = lab.left_s - share_s
        # All exits are evaluated whatever the thresholds, as long as none is certain to fire.
        highest = bounds(metric, len(of.classes))[1]
        unreached: dict[str, float | None] = {exit_.name: highest for exit_ in of.exits[:-1]}
        point = OperatingPoint(f"{metric}-highest", metric=metric, thresholds=unreached)
        schedulers = lab.schedulers(stack, of, point, *MODES)
        signals = {}
        for number, want in enumerate(_outcomes(schedulers[_REFERENCE], images)):
            if want[0] == of.exits[-1].name:
                signals[number] = [signal for _, _, signal, _ in want[4:-1]]
        for case in exact_cases(of, signals, metric):
            for mode, scheduler in schedulers.items():
                scheduler.switch(case.point)
                (got,) = _outcomes(scheduler, images[case.image : case.image + 1])
                found.exact += 1
                found.add(f"{case.point.name} {mode}, image {case.image}", (case.exit,), got[:1])
            if lab.left_s < end_s:
                break


def _outcomes(scheduler: Scheduler, images: NDArray[Any]) -> list[Outcome]:
    """What each image gives; where frames overlap, each begins before the one before has ended.

    Traces are read when all frames are over, so that one which later frames change is found.
    """
    answers = []
    if scheduler.backend.ahead:
        pending: deque[Pending] = deque()
        for image in images:
            pending.append(scheduler.submit(image))
            if len(pending) > 1:
                answers.append(_answer(pending.popleft().result))
        answers += [_answer(one.result) for one in pending]
    else:
        answers += [_answer(functools.partial(scheduler, image)) for image in images]
    return [_comparable(answer) for answer in answers]


def _outcome(run: Callable[[], Prediction | list[Prediction]]) -> Outcome:
    return _comparable(_answer(run))


def _answer(
    run: Callable[[], Prediction | list[Prediction]],
) -> Prediction | list[Prediction] | BackendError:
    try:
        return run()
    except CudaError:
        raise  # of the device, not of the image
    except BackendError as error:
        return error


def _comparable(answer: Prediction | list[Prediction] | BackendError) -> Outcome:
    if isinstance(answer, BackendError):
        return "error", str(answer), answer.stage
    assert isinstance(answer, Prediction)
    trace = answer.trace
    exits = [(e.exit, e.label, e.signal, e.confidence) for e in trace.exits]
    return answer.exit, answer.label, answer.confidence, trace.ended, *exits


def waits(lab: Lab) -> dict[str, Any]:
    """How often the host waits for the device in a frame: once in the mode graph."""
    of = kernel_stages.cascade(exits=6)
    image = kernel_stages.images(of, 1)[0]
    frames = lab.count(50, least=2)
    names = ("graph", "graph nested", "graph overlap", "polling", "sync", "run_all")
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        for mode, scheduler in lab.schedulers(stack, of, leaving_at(of, 0), *names).items():
            found[mode] = []
            for k in range(len(of.exits)):
                scheduler.switch(leaving_at(of, k))
                before = _waits(scheduler)
                for _ in range(frames):
                    scheduler(image)
                found[mode].append((_waits(scheduler) - before) / frames)
    per_exit = [float(k + 1) for k in range(len(of.exits))]
    once = [1.0] * len(of.exits)
    bound = {mode: per_exit if mode in ("polling", "sync") else once for mode in found}
    return {
        "ok": found == bound,
        "summary": "waits per frame at the last exit of 6: "
        + ", ".join(f"{mode} {counts[-1]:g}" for mode, counts in found.items()),
        "waits_per_frame_by_exit": found,
        "bound": bound,
        "not_run": lab.missing(*names),
    }


def _waits(scheduler: Scheduler) -> int:
    assert isinstance(scheduler.backend, CudaBackend)
    return scheduler.backend.waits


def switch(lab: Lab) -> dict[str, Any]:
    """Another operating point before every frame: right results, and nothing is made anew."""
    of = kernel_stages.cascade(exits=4)
    image = kernel_stages.images(of, 1)[0]
    points = [leaving_at(of, k) for k in range(len(of.exits))]
    names = ("graph", "polling", "sync")
    figures: dict[str, Any] = {}
    wrong, made_anew = 0, 0
    with ExitStack() as stack:
        schedulers = lab.schedulers(stack, of, points[0], *names)
        for mode, scheduler in schedulers.items():
            before = dict(lab.cuda.made)
            for frame in range(lab.count(2000, least=8)):
                k = frame * 7 % len(points)
                scheduler.switch(points[k])
                wrong += _outcome(functools.partial(scheduler, image))[0] != f"exit{k}"
            made_anew += sum(lab.cuda.made.values()) - sum(before.values())
            seconds = lab.measure(
                {"switch": functools.partial(scheduler.switch, points[1])},
                rounds=lab.count(500, least=4),
                seconds=lab.left_s / 6,
            )["switch"]
            figures[mode] = {"switch_us": microseconds(seconds)}
    return {
        "ok": wrong == 0 and made_anew == 0,
        "summary": f"{wrong} wrong, {made_anew} things made anew; a switch takes "
        + ", ".join(f"{f['switch_us']:g} us ({mode})" for mode, f in figures.items()),
        "wrong_results": wrong,
        "made_anew": made_anew,
        "bound": {"wrong_results": 0, "made_anew": 0},
        "modes": figures,
        "not_run": lab.missing(*names),
    }


def second_thread(lab: Lab) -> dict[str, Any]:
    """A cascade that one thread opened gives two others, at the same time, the same results."""
    of = kernel_stages.cascade(exits=4)
    images = kernel_stages.images(of, lab.count(200, least=4))
    point = OperatingPoint("middle", thresholds={"exit0": 0.7, "exit1": 0.7, "exit2": 0.7})
    names = ("graph", "graph overlap", "polling", "sync")
    different, figures = 0, {}
    with ExitStack() as stack:
        for mode, scheduler in lab.schedulers(stack, of, point, *names).items():
            want = [_outcome(functools.partial(scheduler, image)) for image in images]
            got = [*_in_threads(scheduler, images, 2), _outcomes(scheduler, images)]
            figures[mode] = sum(a != b for one in got for a, b in zip(one, want, strict=True))
            different += figures[mode]
    return {
        "ok": different == 0,
        "summary": f"{different} of {3 * len(images) * len(figures)} results differ",
        "different": figures,
        "bound": 0,
        "not_run": lab.missing(*names),
    }


def _in_threads(scheduler: Scheduler, images: NDArray[Any], threads: int) -> list[list[Outcome]]:
    found: list[list[Outcome]] = [[] for _ in range(threads)]
    failed: list[EdgeRuntimeError] = []

    def work(mine: list[Outcome]) -> None:
        try:
            for image in images:
                mine.append(_outcome(functools.partial(scheduler, image)))
        except EdgeRuntimeError as error:
            failed.append(error)

    running = [threading.Thread(target=work, args=(mine,)) for mine in found]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failed:
        raise failed[0]
    return found


def refusals(lab: Lab) -> dict[str, Any]:
    """What can't be done is refused with a reason, and the cascade works on."""
    of = kernel_stages.cascade(exits=3)
    point = leaving_at(of, 1)
    image = kernel_stages.images(of, 1)[0]
    best = lab.modes("graph", "polling", "sync", "run_all")[0]
    answers: dict[str, str] = {}

    def refused(name: str, kind: type[EdgeRuntimeError], call: Callable[[], object]) -> None:
        try:
            call()
        except kind as error:
            answers[name] = str(error)
        except EdgeRuntimeError as error:
            answers[name] = f"NOT REFUSED AS EXPECTED: {type(error).__name__}: {error}"
        else:
            answers[name] = "NOT REFUSED"

    with lab.scheduler(of, point, best).open() as scheduler:
        want = _outcome(functools.partial(scheduler, image))
        refused("two images at once", InputError, lambda: scheduler(np.stack([image] * 2)))
        refused("another shape", InputError, lambda: scheduler(image[:, 1:]))
        refused("NaN in the image", InputError, lambda: scheduler(image * np.float32(np.nan)))
        bad = np.full_like(image, kernel_stages.NAN)
        refused("NaN logits", BackendError, lambda: scheduler(bad))
        refused("a stage that does not exist", BackendError, lambda: scheduler.backend.run("x"))
        works_on = _outcome(functools.partial(scheduler, image)) == want
    refused("a frame after close", BackendError, lambda: scheduler(image))
    two = CudaBackend(
        kernel_stages.KernelStages(), CudaOptions(mode="graph", batch=2), cuda=lab.cuda
    )
    refused("a graph for two images", BackendUnavailable, Scheduler(of, two, point).open)
    pairs = _pairs_agree(lab, of, point)
    failed = [name for name, answer in answers.items() if answer.startswith("NOT REFUSED")]
    return {
        "ok": not failed and works_on and pairs,
        "summary": f"{len(answers) - len(failed)} of {len(answers)} refused"
        + ("" if works_on else "; the cascade did not work on")
        + ("" if pairs else "; two images together differ from them alone"),
        "mode": best,
        "works_on": works_on,
        "pairs_agree": pairs,
        "answers": answers,
    }


def _pairs_agree(lab: Lab, of: Cascade, point: OperatingPoint) -> bool:
    """Whether two images of one call get what they get alone."""
    images = kernel_stages.images(of, 8)
    with lab.scheduler(of, point, "sync", batch=2).open() as scheduler:
        alone = [scheduler(image) for image in images]
        together = [p for i in range(0, 8, 2) for p in scheduler.classify(images[i : i + 2])]
    return all(
        isinstance(a, Prediction)
        and (a.label, a.exit, a.confidence) == (b.label, b.exit, b.confidence)
        for a, b in zip(alone, together, strict=True)
    )
