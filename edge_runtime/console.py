"""What a command shows: results on stdout, progress and notes on stderr, JSON on request.

With ``--json -`` stdout carries the JSON alone, and what people read goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, TextIO, TypeVar

from edge_runtime.errors import ConfigError, missing_package
from edge_runtime.files import write_json
from edge_runtime.schema import plain

T = TypeVar("T")

#: Seconds between progress lines where stderr is no terminal.
_PROGRESS_EVERY_S = 10.0
#: Seconds between two drawings of a bar.
_BAR_EVERY_S = 0.25
#: Width of tables where stdout is no terminal.
_PIPE_WIDTH = 120


class Console:
    """Where a command writes.

    Args:
        json_path: File for the result as JSON, "-" for stdout, None for none.
        stdout: Defaults to `sys.stdout`.
        stderr: Defaults to `sys.stderr`.
    """

    def __init__(
        self,
        json_path: str | None = None,
        *,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
    ) -> None:
        self._json_path = json_path
        self._stdout = stdout or sys.stdout
        self._stderr = stderr or sys.stderr
        self._people = self._stderr if json_path == "-" else self._stdout

    def check(self) -> None:
        """Refuse a JSON path that can't be written, before anything long begins.

        Raises:
            ConfigError: The folder does not exist, or the path is a folder.
        """
        if self._json_path in (None, "-"):
            return
        path = Path(str(self._json_path))
        if path.is_dir() or not path.parent.is_dir():
            raise ConfigError(f"--json {path}: not a file in a folder that exists")

    def line(self, text: str = "") -> None:
        """Write one line of the result."""
        self._write(text + "\n")

    def note(self, text: str) -> None:
        """Write one line about the work, not its result."""
        self._stderr.write(text + "\n")
        self._stderr.flush()

    def facts(self, facts: Mapping[str, object]) -> None:
        """Write names and values in two columns."""
        width = max((len(name) for name in facts), default=0)
        for name, value in facts.items():
            self.line(f"{name:<{width}}  {value}")

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Write a table; the first column is left-aligned, the others right-aligned.

        Raises:
            BackendUnavailable: rich is not installed.
        """
        try:
            from rich.box import SIMPLE_HEAD
            from rich.console import Console as RichConsole
            from rich.table import Table
            from rich.text import Text
        except ImportError as error:
            raise missing_package("rich", "cpu") from error
        table = Table(title=Text(title), box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
        cells = [[str(cell) for cell in row] for row in rows]
        for i, column in enumerate(columns):
            # On a narrow terminal text wraps between words; numbers stay whole.
            words = " ".join([column, *(row[i] for row in cells)]).split()
            longest = max(map(len, words))
            table.add_column(Text(column), justify="right" if i else "left", min_width=longest)
        for row in cells:
            table.add_row(*map(Text, row))
        width = None if self._people.isatty() else _PIPE_WIDTH
        console = RichConsole(file=self._people, width=width, highlight=False)
        with console.capture() as text:
            console.print(table)
        self._write(text.get())

    def _write(self, text: str) -> None:
        """Write for people, and go on when they go away (head, less): files may be to come."""
        try:
            self._people.write(text)
            self._people.flush()
        except BrokenPipeError:
            # Python must not complain either when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._people.fileno())

    def progress(
        self, items: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]:
        """Yield `items`, showing how far it is: a bar on a terminal, else a line now and then."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        if self._stderr.isatty():
            yield from self._bar(items, description, total)
            return
        begin = shown = time.monotonic()
        for done, item in enumerate(items):
            yield item
            now = time.monotonic()
            if now - shown >= _PROGRESS_EVERY_S:
                shown = now
                self.note(f"{description}: {done + 1}/{total or '?'}, {now - begin:.0f} s")

    def _bar(self, items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        try:
            from rich.console import Console as RichConsole
            from rich.progress import Progress
        except ImportError as error:
            raise missing_package("rich", "cpu") from error
        # No thread of its own, which would run into whatever is being timed: the bar is drawn
        # between two items.
        console = RichConsole(file=self._stderr)
        with Progress(console=console, transient=True, auto_refresh=False) as progress:
            task = progress.add_task(description, total=total)
            drawn = 0.0
            for item in items:
                yield item
                progress.advance(task)
                if time.monotonic() - drawn >= _BAR_EVERY_S:
                    progress.refresh()
                    drawn = time.monotonic()

    @contextlib.contextmanager
    def status(self, title: str) -> Iterator[Callable[[str], None]]:
        """Show how far something is that tells it in words.

        Args:
            title: What is done; begins the line.

        Yields:
            A function that takes the text: shown in place on a terminal, else now and then.
        """
        terminal = self._stderr.isatty()
        shown = time.monotonic()

        def show(text: str) -> None:
            nonlocal shown
            line = f"{title}: {text}"
            if terminal:
                width = shutil.get_terminal_size().columns - 1
                self._stderr.write(f"\r\x1b[K{line[:width]}")
                self._stderr.flush()
            elif time.monotonic() - shown >= _PROGRESS_EVERY_S:
                shown = time.monotonic()
                self.note(line)

        try:
            yield show
        finally:
            if terminal:
                self._stderr.write("\r\x1b[K")
                self._stderr.flush()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the command's result as JSON, where it was asked for."""
        if self._json_path == "-":
            self._stdout.write(json.dumps(plain(result), indent=2, allow_nan=False) + "\n")
            self._stdout.flush()
        elif self._json_path is not None:
            write_json(Path(self._json_path), plain(result))
            self.note(f"wrote {self._json_path}")


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds with three significant digits."""
    value = seconds * 1e3
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def percent(share: float) -> str:
    """A share in [0, 1] as percent with one decimal."""
    return f"{share * 100:.1f} %"
