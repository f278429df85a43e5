"""Long runs: many frames without growth of memory; and the repository's own tests on this GPU."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.gpu import kernel_stages
from bench.gpu.environment import memory_readers
from bench.gpu.lab import Lab, NotRun, leaving_at
from edge_runtime.errors import BackendError, CudaError
from edge_runtime.scheduler import Pending, Scheduler

#: Where the repository has its tests for a GPU.
_CONTRACT = ("tests/edge_runtime/cuda", "tests/edge_runtime/test_backends.py")
_FRAMES = 100_000
#: Memory is read so often, the first time after a tenth of the frames.
_LOOKS = 10
_MIB = 2**20
#: Growth that is none: the device's memory is that of all programs, the process's has its noise.
_MOST = {"device_bytes": 16 * _MIB, "process_bytes": 8 * _MIB}
_MOST_BLOCKS, _BLOCKS_PER_FRAME = 500, 0.02


def endurance(lab: Lab) -> dict[str, Any]:
    """100,000 frames in the best mode, errors and switches among them, memory read in between."""
    of = kernel_stages.cascade(exits=4)
    images = kernel_stages.images(of, 16)
    mode = lab.modes("graph overlap", "polling overlap", "sync overlap", "run_all")[0]
    readers = memory_readers(lab)
    wanted = lab.count(_FRAMES, least=_LOOKS)
    looks: dict[str, list[int]] = {name: [] for name in readers}
    at: list[int] = []
    with ExitStack() as stack:
        scheduler = stack.enter_context(lab.scheduler(of, leaving_at(of, 0), mode))
        made = sum(lab.cuda.made.values())
        run = _Endless(scheduler, images)
        for _ in range(_LOOKS):
            run.frames_more(wanted // _LOOKS, lab)
            gc.collect()
            at.append(run.frames)
            for name, read in readers.items():
                looks[name].append(read())
            if lab.left_s < 0:
                break
        made_anew = sum(lab.cuda.made.values()) - made
    growth = {name: _growth(values) for name, values in looks.items()}
    counted = at[-1] - at[0]
    most = {
        name: _MOST.get(name, _MOST_BLOCKS + round(_BLOCKS_PER_FRAME * counted)) for name in growth
    }
    if lab.cuda.facts.integrated:
        most.pop("device_bytes", None)  # the whole system's memory there
    grown = [name for name in growth if growth[name] > most.get(name, growth[name])]
    return {
        "ok": not grown and made_anew == 0 and run.wrong == 0,
        "summary": f"{run.frames} of {wanted} frames ({mode}), {run.wrong} wrong; growth "
        + ", ".join(f"{name} {value}" for name, value in growth.items()),
        "mode": mode,
        "frames": run.frames,
        "wanted": wanted,
        "errors_among_them": run.errors,
        "wrong": run.wrong,
        "made_anew": made_anew,
        "growth": growth,
        "grown": grown,
        "bound": {**most, "made_anew": 0, "wrong": 0},
        "looks_after_frames": at,
        "looks": looks,
    }


def _growth(values: list[int]) -> int:
    """From the early looks to the late ones, each by its median, which forgives an outlier."""
    part = max(1, len(values) // 3)
    return int(np.median(values[-part:]) - np.median(values[:part]))


class _Endless:
    """Frames without end: ordinary ones, some that fail, other operating points now and then."""

    def __init__(self, scheduler: Scheduler, images: NDArray[Any]) -> None:
        self._scheduler = scheduler
        self._images = list(images)
        self._bad = np.full_like(images[0], kernel_stages.NAN)
        of = scheduler.cascade
        self._points = [leaving_at(of, k) for k in range(len(of.exits))]
        self._exit = self._points[0].name
        self.frames = self.errors = self.wrong = 0

    def frames_more(self, count: int, lab: Lab) -> None:
        """Run so many frames, or until the time is up."""
        before: tuple[Pending, str] | None = None
        for _ in range(count):
            if self.frames % 256 == 0:
                if lab.left_s < 0:
                    break
                point = self._points[self.frames // 256 % len(self._points)]
                self._scheduler.switch(point)
                self._exit = point.name
            bad = self.frames % 100 == 99
            image = self._bad if bad else self._images[self.frames % len(self._images)]
            expected = "error" if bad else self._exit.removeprefix("leave-at-")
            pending = self._scheduler.submit(image)
            if before is not None:
                self._take(*before)
            before = pending, expected
            self.frames += 1
        if before is not None:
            self._take(*before)

    def _take(self, pending: Pending, expected: str) -> None:
        try:
            prediction = pending.result()
        except CudaError:
            raise
        except BackendError:
            self.errors += 1
            self.wrong += expected != "error"
        else:
            self.wrong += getattr(prediction, "exit", "") != expected


def contract(lab: Lab, root: Path | None = None) -> dict[str, Any]:
    """The repository's tests that need a GPU, in a process of their own."""
    root = root or Path(__file__).parents[2]
    if not (root / "tests" / "conftest.py").is_file():
        raise NotRun("there are no tests beside this installation")
    if importlib.util.find_spec("pytest") is None:
        raise NotRun("pytest is not installed: pip install pytest hypothesis")
    # Warnings of the libraries on this machine are not what is asked for here.
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "-W", "default"]
    tests = [name for name in _CONTRACT if (root / name).exists()]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    shown = f"python -m pytest -m gpu {' '.join(tests)}".strip()
    try:
        done = subprocess.run(
            command,
            cwd=root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=max(lab.left_s, 1),
        )
    except subprocess.TimeoutExpired as error:
        raise NotRun(f"it was not done in {error.timeout:.0f} s; run it alone: {shown}") from error
    lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
    if done.returncode == 5:
        raise NotRun("no test is marked gpu")
    return {
        "ok": done.returncode == 0,
        "summary": lines[-1].strip("= "),
        "command": shown,
        "exit_code": done.returncode,
        "output": [] if done.returncode == 0 else lines[-40:],
    }
