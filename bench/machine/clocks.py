"""``--lock-clocks``: hold the clocks at their highest for a run, and give them back afterwards.

A Jetson's by jetson_clocks (CPU, GPU and memory), an NVIDIA GPU's by nvidia-smi (that GPU alone).
Both want root. Nothing here runs unless it was asked for.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from bench.machine import programs
from bench.machine.programs import Answer, Run, first_line
from edge_runtime.console import Console
from edge_runtime.errors import BackendUnavailable, ConfigError

_Handler = Callable[[int, FrameType | None], Any] | int | None

_REMEDY = (
    'Clocks are root\'s to set: run it as sudo "$(command -v edge-runtime)", '
    "or leave --lock-clocks out"
)
#: What ends a process, besides Ctrl-C.
_ENDINGS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


@dataclass(frozen=True)
class _Lock:
    """How clocks are locked and given back.

    Attributes:
        what: What is locked, for people.
        do: The command that locks.
        undo: The command that gives back.
        worked: Tells from its output whether `do` locked: nvidia-smi may fail with exit code 0.
        folder: Where the state from before is kept; None where it is not.
    """

    what: str
    do: Sequence[str]
    undo: Sequence[str]
    worked: Callable[[str], bool]
    folder: Path | None = None


@contextmanager
def locked(
    wanted: bool, console: Console, *, run: Run = programs.run, gpu: int = 0
) -> Iterator[bool]:
    """Lock the clocks while the body runs; they are given back however it ends, by Ctrl-C too.

    Args:
        wanted: Whether to; if not, nothing is run at all.
        console: Is told what is locked, and how to give clocks back by hand where that failed.
        run: Runs a program.
        gpu: Index of the NVIDIA GPU as nvidia-smi counts; not for a Jetson.

    Yields:
        Whether clocks were locked, by this.

    Raises:
        BackendUnavailable: There is neither jetson_clocks nor nvidia-smi.
        ConfigError: The program refused; nothing is left locked.
    """
    if not wanted:
        yield False
        return
    lock = _jetson(run) or _desktop(run, gpu)
    console.note(f"--lock-clocks: {lock.what}")
    with _endings_raise():
        undone = False
        try:
            answer = run(lock.do)
            if answer.why_not or not lock.worked(answer.output):
                undone = not _may_have_locked(lock, answer)
                raise _refused(lock.do, answer)
            yield True
        finally:
            if not undone:
                _give_back(lock, console, run)
            elif lock.folder is not None:
                shutil.rmtree(lock.folder, ignore_errors=True)


def _jetson(run: Run) -> _Lock | None:
    """Store the clocks of a Jetson; None where there is no jetson_clocks."""
    folder = Path(tempfile.mkdtemp(prefix="edge-runtime-clocks-"))
    # It must not be there yet: jetson_clocks asks before it overwrites a file.
    file = folder / "clocks.conf"
    store = ["jetson_clocks", "--store", str(file)]
    try:
        answer = run(store)
        stored = not answer.why_not and file.is_file() and file.stat().st_size > 0
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if not stored:
        shutil.rmtree(folder, ignore_errors=True)
        if answer.absent:
            return None
        raise _refused(store, answer)
    return _Lock(
        "CPU, GPU and memory at the highest clocks of the power mode, by jetson_clocks",
        ["jetson_clocks"],
        ["jetson_clocks", "--restore", str(file)],
        lambda output: True,
        folder,
    )


def _desktop(run: Run, gpu: int) -> _Lock:
    smi = ["nvidia-smi", "-i", str(gpu)]
    query = [*smi, "--query-gpu=clocks.max.graphics", "--format=csv,noheader,nounits"]
    answer = run(query)
    if answer.absent:
        raise BackendUnavailable(
            "nothing here can lock clocks",
            got="neither jetson_clocks nor nvidia-smi",
            remedy="Leave --lock-clocks out",
        )
    told = first_line(answer.output)
    if answer.why_not or not (told.isdecimal() and int(told) > 0):
        raise ConfigError(
            f"--lock-clocks: the highest clock of GPU {gpu}",
            got=answer.why_not or f"{told or 'nothing'} from nvidia-smi",
            expected="a number of MHz",
            remedy="Leave --lock-clocks out",
        )
    return _Lock(
        f"GPU {gpu} at {told} MHz by nvidia-smi, afterwards as the driver likes; "
        "CPU clocks stay as they are",
        [*smi, f"--lock-gpu-clocks={told},{told}"],
        [*smi, "--reset-gpu-clocks"],
        lambda output: "clocks set to" in output,
    )


def _may_have_locked(lock: _Lock, answer: Answer) -> bool:
    """Whether something may be locked although the command failed.

    jetson_clocks sets one clock after another; nvidia-smi sets one, unless it refuses to.
    """
    return answer.unfinished or (lock.folder is not None and not answer.absent)


def _refused(command: Sequence[str], answer: Answer) -> ConfigError:
    said = answer.why_not or f"{command[0]}: {first_line(answer.output) or 'it did nothing'}"
    return ConfigError(f"--lock-clocks: {said}", remedy=_REMEDY)


def _give_back(lock: _Lock, console: Console, run: Run) -> None:
    """Undo a lock; a failure is told and not raised, since what was measured is whole."""
    with _endings_ignored():
        answer = run(lock.undo)
        if answer.why_not:
            console.note(
                f"warning: the clocks may still be locked ({answer.why_not}). "
                f"Give them back with: sudo {shlex.join(lock.undo)}"
            )
        elif lock.folder is not None:
            shutil.rmtree(lock.folder, ignore_errors=True)


@contextmanager
def _endings_raise() -> Iterator[None]:
    """Let what ends a process unwind it, so that clocks are given back on the way."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with _handling(leave, _ENDINGS):
        yield


@contextmanager
def _endings_ignored() -> Iterator[None]:
    """Finish what must not be left half done."""
    with _handling(signal.SIG_IGN, (signal.SIGINT, *_ENDINGS)):
        yield


@contextmanager
def _handling(handler: _Handler, signals: Sequence[int]) -> Iterator[None]:
    """Handle signals otherwise for a while; those that are ignored, as under nohup, stay so."""
    before: dict[int, _Handler] = {}
    if threading.current_thread() is threading.main_thread():
        for number in signals:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)
