"""Programs of the system that are asked what it is, or told what to do.

```
answer = run(["nvpmodel", "-q"])
answer.output       # the power mode's name and number, one per line
answer.why_not      # "", or "there is no nvpmodel"
```
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Seconds after which a program counts as hanging.
TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Answer:
    """What a program said.

    Attributes:
        output: Its standard output; empty where it did not run.
        why_not: Why it did not do what it was asked; empty where it did.
        absent: Whether there is no such program.
        unfinished: Whether it was ended before it was done.
    """

    output: str = ""
    why_not: str = ""
    absent: bool = False
    unfinished: bool = False


#: Runs a command and waits for its answer.
Run = Callable[[Sequence[str]], Answer]


def run(command: Sequence[str], timeout_s: float = TIMEOUT_S) -> Answer:
    """Run a program without a terminal and in English.

    It does not see a Ctrl-C that is meant for us: it is ended when the wait for it is.

    Args:
        command: The program's name, looked up in PATH, and its arguments.
        timeout_s: Seconds after which it is ended, with whatever it started.
    """
    name = command[0]
    program = shutil.which(name)
    if program is None:
        return Answer(why_not=f"there is no {name}", absent=True)
    try:
        process = subprocess.Popen(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
            start_new_session=True,
        )
    except OSError as error:
        return Answer(why_not=f"{name} can't be run: {error.strerror or error}")
    with process:
        try:
            output, complaint = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            _end(process)
            return Answer(why_not=f"{name} took longer than {timeout_s:g} s", unfinished=True)
        except BaseException:
            _end(process)
            raise
    if process.returncode != 0:
        # Some complain on standard output: jetson_clocks and nvidia-smi do.
        said = first_line(complaint) or first_line(output) or f"exit code {process.returncode}"
        return Answer(output, f"{name}: {said}")
    return Answer(output)


def first_line(text: str) -> str:
    """The first line that is not blank."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a program and what it started, which may hold its pipes open."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
