"""Single frames as a file for Perfetto or chrome://tracing: JSON of the Trace Event Format.

Each frame is a process of its own with one row of stages and one of decisions, so that frames of
different length can be laid side by side.

Reference:
    Google, Trace Event Format, "Complete Events" and "Metadata Events".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.result import FrameTrace, Result

_FRAME, _STAGES, _DECISIONS = 0, 1, 2
_ROWS = {_FRAME: "frame", _STAGES: "stages", _DECISIONS: "decisions"}


def trace_events(result: Result) -> dict[str, Any]:
    """The recorded frames of a result as JSON data; times in microseconds."""
    events = [
        event for i, frame in enumerate(result.frames, start=1) for event in _events(frame, i)
    ]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "bundle": result.bundle,
            "command": result.command,
            "machine": result.name,
            "backend": f"{result.backend}, {result.mode}",
        },
    }


def _events(frame: FrameTrace, process: int) -> Iterator[dict[str, Any]]:
    yield _named("process_name", process, _FRAME, frame.what)
    for row, name in _ROWS.items():
        yield _named("thread_name", process, row, name)
    yield _bar(frame.what, "frame", process, _FRAME, 0.0, frame.seconds)
    for span in frame.spans:
        row = _DECISIONS if span.kind.startswith(("decide", "until")) else _STAGES
        yield _bar(span.name, span.kind, process, row, span.begin, span.seconds)


def _named(what: str, process: int, row: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": row, "args": {"name": name}}


def _bar(
    name: str, kind: str, process: int, row: int, begin: float, seconds: float
) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "cat": kind,
        "pid": process,
        "tid": row,
        "ts": begin * 1e6,
        "dur": seconds * 1e6,
    }
