"""Baselines in a process of their own, which is driven over pipes and frozen between its turns.

ONNX Runtime with a thread pool per session can't share a process with our sessions, and torch's
threads should not. Both keep threads that spin after a call, in case another one follows. Measured
on 2 cores: a pool spins for 24 ms, those of ten sessions for 100 ms, torch's for 4 ms. Whoever had
the next turn would be slowed down by them, so the process stops itself (SIGSTOP) when it has
answered. It is continued at its next turn and finds its threads as if the frames had followed each
other: a ViT-Tiny with a pool per session takes 69 ms so, and 68 ms in a process that is never
stopped.

Our own pool spins too, and made PyTorch take 10 ms instead of 3 for a frame of the CIFAR-10
cascade. The other process gets its turn when our threads have gone to sleep.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime import errors, schema
from edge_runtime.device import usable_cores
from edge_runtime.errors import BackendError, ConfigError, EdgeRuntimeError, InputError
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.prediction import Prediction
from edge_runtime.scheduler import Scheduler
from edge_runtime.schema import nearest

#: What a process may run: sessions that share a pool, with a pool each, or PyTorch eagerly.
KINDS = ("shared", "naive", "eager")

#: Run by the child. A folder named bench where the user stands must not be taken for ours.
_START = """
import sys
sys.path = [folder for folder in sys.path if folder]
sys.path.append(sys.argv[1])
from bench.latency.other_process import main
main()
"""
#: What the child may raise by name.
_ERRORS = {
    kind.__name__: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, EdgeRuntimeError)
}
#: Lines of the child's stderr that an error quotes.
_QUOTED = 5
#: Seconds that the end of a dying process is waited for.
_PATIENCE_S = 5.0
#: How long our threads are waited for at most; measured on 2 cores, they spin for 20 to 30 ms.
_LONGEST_SPIN_S = 0.2
#: How often they are looked at.
_LOOK_EVERY_S = 0.001
#: prctl: the signal that a process gets when its parent dies.
_PR_SET_PDEATHSIG = 1
_TASKS = Path("/proc/self/task")


class Timed(NamedTuple):
    """One image that another process has classified.

    Attributes:
        seconds: How long it took, measured there.
        exit: Name of the exit where it left.
        label: Class index.
    """

    seconds: float
    exit: str
    label: int


@dataclass(frozen=True)
class _Settings:
    """What the child is told first; the fields are those of `OtherProcess`."""

    bundle: str
    point: OperatingPoint
    image_size: tuple[int, int] | None
    kind: Literal["shared", "naive", "eager"]
    threads: int


class OtherProcess:
    """A bundle at an operating point, run by another process.

    Args:
        bundle_path: The bundle's folder.
        point: Where images leave, and at which variants stages run.
        image_size: (height, width) of every image; None where the bundle fixes it.
        kind: "shared" (ONNX Runtime as it is run everywhere here), "naive" (with a thread pool per
            session) or "eager" (PyTorch).
        threads: Of each pool; None or 0 is one per core.

    Raises:
        ConfigError: From the constructor: there is no such kind.
    """

    def __init__(
        self,
        bundle_path: str | os.PathLike[str],
        point: OperatingPoint,
        image_size: tuple[int, int] | None,
        *,
        kind: str,
        threads: int | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ConfigError(f"there is no process of kind {kind!r}", remedy=nearest(kind, KINDS))
        self._settings = {
            "bundle": str(Path(bundle_path).resolve()),
            "point": schema.plain(point),
            "image_size": None if image_size is None else list(image_size),
            "kind": kind,
            "threads": threads or 0,
        }
        self._name = f"the process of the baseline {kind!r}"
        self._process: subprocess.Popen[bytes] | None = None
        self._said: deque[str] = deque(maxlen=_QUOTED)
        self._listener: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None while none is running."""
        return None if self._process is None else self._process.pid

    def open(self) -> OtherProcess:
        """Start the process and wait until it has opened the bundle.

        On Linux the process ends with the thread that calls this, whatever ends that.

        Raises:
            BackendError: It is open already, the process can't be started, or it died.
            EdgeRuntimeError: What opening the bundle raises there: `ManifestError`,
                `BackendUnavailable`, `EngineBuildError` and others.
        """
        if self._process is not None:
            raise BackendError(f"{self._name} is running already", remedy="Close it first")
        root = str(Path(__file__).resolve().parents[2])
        try:
            # Of a session of its own: Ctrl-C is for us, and we end it.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, root],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise BackendError(f"{self._name} can't be started: {error.strerror}") from error
        self._said.clear()
        self._listener = threading.Thread(
            target=_relay, args=(self._process.stderr, self._said), daemon=True
        )
        self._listener.start()
        try:
            self._ask(_line(self._settings))
        except BaseException:
            self.close()
            raise
        return self

    def classify(self, image: NDArray[np.uint8]) -> Timed:
        """Let the process classify one image twice, the second time timed; our threads sleep.

        The first time makes up for the rest that it had: it is timed as if frames followed each
        other.

        Args:
            image: Shape (height, width, channels), uint8.

        Returns:
            The answer, with the seconds from the image at hand to the answer.

        Raises:
            InputError: The image has another shape or dtype.
            BackendError: The process is not open, died, or a stage failed there.
        """
        if self._process is None:
            raise BackendError(f"{self._name} is not running", remedy="Open it first")
        if image.dtype != np.uint8 or image.ndim != 3:
            raise InputError(
                f"an image for {self._name}",
                got=f"{image.shape} {image.dtype}",
                expected="(height, width, channels) uint8",
            )
        message = _line({"shape": image.shape}) + image.tobytes()
        wait_until_idle()
        try:
            self._process.send_signal(signal.SIGCONT)
            found = self._ask(message)
        except BaseException as error:
            if not isinstance(error, InputError):
                # An answer that nobody took would be taken for that of the next image.
                self.close()
            raise
        return Timed(found["seconds"], found["exit"], found["label"])

    def close(self) -> None:
        """End the process; it may be opened again."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        # It may be frozen or at work, and has nothing to save.
        process.kill()
        process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        if self._listener is not None:
            self._listener.join(_PATIENCE_S)

    def __enter__(self) -> OtherProcess:
        """Open, unless it is open already."""
        return self if self._process is not None else self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _ask(self, message: bytes) -> dict[str, Any]:
        """Send a message, take the answer to it, and wait until the process is frozen or over."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(message)
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer.endswith(b"\n"):
            raise self._died(process)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise _ERRORS.get(found["error"], BackendError)(found["message"])
        return found

    def _died(self, process: subprocess.Popen[bytes]) -> BackendError:
        """What is known of a process that does not answer any more."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE_S)
        if self._listener is not None:
            self._listener.join(_PATIENCE_S)
        code = process.poll()
        how = "closed its pipe" if code is None else f"ended with code {code}"
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        said = " / ".join(self._said)
        return BackendError(f"{self._name} {how}" + (f"; it said: {said}" if said else ""))


def wait_until_idle(
    sleep: Callable[[float], object] = time.sleep, running: Callable[[], bool] | None = None
) -> None:
    """Wait until no other thread of this process runs, 0.2 s at most.

    Args:
        sleep: Takes seconds.
        running: Tells whether another thread runs or wants to; looks at /proc where None.
    """
    running = running or _others_run
    for _ in range(round(_LONGEST_SPIN_S / _LOOK_EVERY_S)):
        if not running():
            return
        sleep(_LOOK_EVERY_S)


def _others_run() -> bool:
    """Whether the kernel has another thread of this process as running; True where it can't say."""
    me = str(threading.get_native_id())
    try:
        return any(_state(task) == "R" for task in os.listdir(_TASKS) if task != me)
    except OSError:
        return True


def _state(task: str) -> str:
    """A thread's state; empty for one that has just ended."""
    try:
        text = (_TASKS / task / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return text.rpartition(")")[2].split()[0]


def _relay(source: IO[bytes], said: deque[str]) -> None:
    """Hand on the child's stderr line by line, and keep the last ones."""
    with source:
        for line in source:
            text = line.decode(errors="replace")
            if text.strip():
                said.append(text.strip())
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(text)
                sys.stderr.flush()


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def main() -> None:
    """The child: serve until the pipe is closed."""
    _end_with_parent()
    requests, answers = _take_pipes()
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        _serve(requests, answers)


def _end_with_parent() -> None:
    """Ask Linux to end this process with its parent, even while it is stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Stdin and stdout for the protocol alone: what a library prints goes to stderr."""
    pipes = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return pipes


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Open what the first line names, then classify image after image; freeze after each answer."""

    def answer(message: dict[str, Any]) -> None:
        answers.write(_line(message))
        answers.flush()
        # From here, not by the parent: this thread runs already, and need not wait for those that
        # spin to take the signal.
        os.kill(os.getpid(), signal.SIGSTOP)

    first = requests.readline()
    if not first:
        return
    try:
        settings = schema.read(_Settings, json.loads(first), "settings")
        scheduler = _scheduler(settings).open()
    except EdgeRuntimeError as error:
        answer({"error": type(error).__name__, "message": str(error)})
        return
    with scheduler:
        answer({"ready": True})
        while header := requests.readline():
            image = _image(requests, json.loads(header)["shape"])
            try:
                answer(_timed(scheduler, image))
            except EdgeRuntimeError as error:
                answer({"error": type(error).__name__, "message": str(error)})


def _image(requests: IO[bytes], shape: Sequence[int]) -> NDArray[np.uint8]:
    data = requests.read(int(np.prod(shape)))
    return np.frombuffer(data, np.uint8).reshape(shape)


def _timed(scheduler: Scheduler, image: NDArray[np.uint8]) -> dict[str, Any]:
    scheduler(image)
    begin = time.perf_counter()
    prediction = scheduler(image)
    seconds = time.perf_counter() - begin
    assert isinstance(prediction, Prediction)
    return {"seconds": seconds, "exit": prediction.exit, "label": prediction.label}


def _scheduler(settings: _Settings) -> Scheduler:
    """What the child runs, not opened."""
    bundle = Bundle.open(settings.bundle)
    if settings.kind == "eager":
        from engines.eager import eager_scheduler  # says how to get torch, where it is missing

        import torch  # isort: skip

        torch.set_num_threads(settings.threads or usable_cores())
        return eager_scheduler(bundle, settings.point, image_size=settings.image_size)
    from edge_runtime.backends.onnxrt import OnnxRuntimeBackend, OnnxRuntimeOptions

    options = OnnxRuntimeOptions(
        threads=settings.threads,
        threading="per_session" if settings.kind == "naive" else "shared",
    )
    backend = OnnxRuntimeBackend(bundle, options)
    return Scheduler(bundle.cascade, backend, settings.point, image_size=settings.image_size)


if __name__ == "__main__":
    main()
