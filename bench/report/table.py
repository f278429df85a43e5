"""A table of text: the same on a terminal and on a page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edge_runtime.console import Console


@dataclass(frozen=True)
class Table:
    """Rows of text under a title.

    Attributes:
        title: What it shows, with the unit.
        columns: Heads; the first column is left-aligned, the others right-aligned.
        rows: One tuple of cells per row.
        notes: Sentences that belong under it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def show(tables: Iterable[Table], console: Console) -> None:
    """Print tables and their notes."""
    for table in tables:
        console.table(table.title, table.columns, table.rows)
        for note in table.notes:
            console.line(note)
