"""Runs ``edge-runtime study`` in this process, as the command line does."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import study_command
from edge_runtime.cli import run_command
from edge_runtime.scheduler import Scheduler

PNG = b"\x89PNG\r\n\x1a\n"


def study(*arguments: str | Path, code: int = 0) -> None:
    program = "edge-runtime study"
    assert run_command(program, study_command, [str(one) for one in arguments]) == code


def result(out: Path, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"{kind}.json").read_text())
    return found


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def names(out: Path) -> set[str]:
    """Files of a study; its pictures are pictures."""
    for picture in out.glob("*.png"):
        assert picture.read_bytes()[:8] == PNG
    return {path.name for path in out.iterdir()}


def interrupt_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C during a later call of any scheduler."""
    classify: Callable[..., Any] = Scheduler.classify
    done = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal done
        done += 1
        if done > calls:
            raise KeyboardInterrupt
        return classify(*args, **options)

    monkeypatch.setattr(Scheduler, "classify", counted)
