"""What people read, in files and on terminals, and what programs read."""

from __future__ import annotations

import io
import json
import os

import pytest

from edge_runtime.console import Console, milliseconds, percent

COLUMNS = ("point", "accuracy drop, points", "folds below base", "mean ms", "leaving at")
ROW = ("zero_loss", "0.33 [-1.14, 1.81]", "40.0 %", "0.096", "saver 97%, middle 3%, final 0%")


class Terminal(io.StringIO):
    """Says that somebody watches."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_narrow_terminal_wraps_but_cuts_nothing(monkeypatch, width) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    Console(stdout=out, stderr=io.StringIO()).table("a table", COLUMNS, [ROW])
    text = out.getvalue()
    assert "\u2026" not in text
    for word in " ".join((*COLUMNS, *ROW)).split():
        assert word in text


def test_files_are_written_when_the_reader_goes_away(tmp_path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as unread:
        console = Console(str(tmp_path / "a.json"), stdout=unread, stderr=io.StringIO())
        console.line("for nobody")
        console.table("a table", ("a",), [("b",)])
        console.finish({"answer": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"answer": 1}


def test_json_on_stdout_is_alone(monkeypatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console("-", stdout=out, stderr=err)
    console.line("for people")
    console.table("a table", ("a",), [("b",)])
    console.finish({"answer": (1, 2.5)})
    assert json.loads(out.getvalue()) == {"answer": [1, 2.5]}
    assert "for people" in err.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_yields_everything_in_order(stream) -> None:
    console = Console(stdout=io.StringIO(), stderr=stream())
    assert list(console.progress(range(5), "counting")) == [0, 1, 2, 3, 4]
    assert list(console.progress(iter("abc"), "spelling", 3)) == ["a", "b", "c"]


def test_a_bar_shows_how_far_it_is() -> None:
    err = Terminal()
    for _ in Console(stdout=io.StringIO(), stderr=err).progress(range(3), "counting"):
        pass
    assert "counting" in err.getvalue()


def test_progress_stops_with_its_consumer() -> None:
    progress = Console(stdout=io.StringIO(), stderr=Terminal()).progress(range(9), "counting")
    assert next(progress) == 0
    progress.close()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0000871, "0.087"), (0.0015, "1.500"), (0.0123, "12.3")]
)
def test_milliseconds(seconds, text) -> None:
    assert milliseconds(seconds) == text


def test_percent() -> None:
    assert percent(0.9599) == "96.0 %"


def test_a_status_is_shown_in_place_and_wiped_out(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    err = Terminal()
    with Console(stderr=err).status("building") as show:
        show("step 1 of a thousand steps")
        show("step 2")
    assert err.getvalue() == ("\r\x1b[Kbuilding: step 1 of\r\x1b[Kbuilding: step 2\r\x1b[K")


def test_a_status_in_a_file_is_a_line_now_and_then(monkeypatch) -> None:
    err, now = io.StringIO(), [0.0]
    monkeypatch.setattr("edge_runtime.console.time.monotonic", lambda: now[0])
    with Console(stderr=err).status("building") as show:
        for now[0] in (1.0, 11.0, 12.0, 25.0):
            show(f"{now[0]:.0f} s")
    assert err.getvalue() == "building: 11 s\nbuilding: 25 s\n"
