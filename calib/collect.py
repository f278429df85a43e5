"""Fill a table of predictions: every model on every sample, resumable, in constant memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.collect_store import Block, Store
from calib.model_table import CONF, PRED, ModelTable
from calib.time_left import time_left
from edge_runtime.console import Console
from edge_runtime.errors import CalibrationError, ConfigError
from edge_runtime.file_lock import file_lock
from edge_runtime.files import sha256

#: Dtypes that a table may have; the first is the default.
DTYPES = ("float32", "float16")
#: Seconds between two moments at which rows are brought to the disk.
_KEEP_EVERY_S = 2.0

#: Makes batches from a row on: per batch one array of logits (n, classes) per name of the source.
Batches = Callable[[int], Iterator[Sequence[NDArray[Any]]]]


@dataclass(frozen=True)
class Source:
    """Models that are run together.

    Attributes:
        title: What people call it.
        names: Names of its models in the table.
        classes: Logits of each.
        origin: What the logits depend on besides the data, plain JSON data.
        batches: Called with the row to begin at, which is the beginning of a batch.
    """

    title: str
    names: tuple[str, ...]
    classes: int
    origin: Mapping[str, Any]
    batches: Batches


@dataclass(frozen=True)
class Collected:
    """A table that was written.

    Attributes:
        path: The npz.
        names: Its models.
        samples: Its rows.
        classes: Logits of each model.
        found: Rows per source that an earlier run had left.
        hash: As of `calib.model_table.ModelTable`.
    """

    path: Path
    names: tuple[str, ...]
    samples: int
    classes: int
    found: tuple[int, ...]
    hash: str


def collect(
    sources: Sequence[Source],
    labels: NDArray[np.int64],
    out: Path,
    console: Console,
    *,
    data: Mapping[str, Any],
    dtype: str = DTYPES[0],
    overwrite: bool = False,
    anew: bool = False,
) -> Collected:
    """Run every source on every sample and write their logits as a table.

    Rows are kept in a hidden folder beside `out`, on the disk every two seconds. After a kill the
    same call goes on where the disk is, and the table is, bit for bit, that of an undisturbed run.
    Memory holds a batch at a time.

    Args:
        sources: What is run, one after the other.
        labels: True class indices, shape (samples,).
        out: The npz to write; `calib.model_table.ModelTable` reads it.
        console: Shows progress with the time left.
        data: What tells the data from others, plain JSON data.
        dtype: Of the logits in the table, "float32" or "float16".
        overwrite: Whether a file at `out` may be replaced; it stays until the new one is whole.
        anew: Whether to forget the rows of an earlier run.

    Returns:
        What was written.

    Raises:
        ConfigError: Names or classes don't fit, `out` exists, or an earlier run, of other data or
            models, has left rows there.
        CalibrationError: A logit is not finite, in the table's dtype too.
        EdgeRuntimeError: The disk is full, or the files can't be written.
    """
    check_out(out, overwrite=overwrite)
    if dtype not in DTYPES:
        raise ConfigError("dtype of the table", got=repr(dtype), expected=" or ".join(DTYPES))
    labels = np.ascontiguousarray(labels, np.int64)
    classes = _classes(sources, labels)
    check_names([name for source in sources for name in source.names])
    provenance: dict[str, Any] = {
        "models": [dict(source.origin) for source in sources],
        "classes": classes,
        "labels": sha256(labels.tobytes()),
        **{f"data {key}": value for key, value in data.items()},
    }
    blocks = [Block(source.names, classes) for source in sources]
    lock = out.with_name(f".{out.name}.collect.lock")
    with file_lock(lock, lambda: console.note(f"waiting for another run that writes {out}")):
        check_out(out, overwrite=overwrite)
        store = Store.open(out, blocks, len(labels), dtype, provenance, anew=anew)
        found = tuple(store.rows)
        if any(found):
            console.note(f"going on with {sum(found)} of {store.total} rows of an earlier run")
        try:
            for index, source in enumerate(sources):
                _fill(store, index, source, console)
            # Opened there, it is whole before it has its name.
            store.finish(out, labels, ModelTable.open)
        except BaseException:
            if not any(store.rows):
                store.discard()
                raise
            console.note(
                f"{sum(store.rows)} of {store.total} rows are kept in {store.folder}: the same "
                "command goes on from there, with --anew it begins anew"
            )
            raise
    table = ModelTable.open(out)
    return Collected(out, table.names, len(labels), classes, found, table.hash)


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse a table to write, before any long work.

    Raises:
        ConfigError: Its folder does not exist, or it exists and may not be replaced.
    """
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"the folder {out.parent} does not exist", remedy="Create it first")
    if out.exists() and not out.is_file():
        raise ConfigError(f"{out} is not replaced: it is no file", remedy="Choose another --out")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists", remedy="Choose another --out, or give --overwrite")


def check_names(names: Sequence[str]) -> None:
    """Refuse names that a table can't have.

    Raises:
        ConfigError: A name is reserved, has a suffix that means something else, or appears twice.
    """
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(
                f"two models have the name {name!r}", remedy="Rename a file or a bundle"
            )
        if name in ("", "labels") or name.endswith((PRED, CONF)):
            raise ConfigError(
                f"the model {name!r} can't have this name in a table",
                expected=f"not 'labels', and no {PRED} or {CONF} at its end",
            )


def _classes(sources: Sequence[Source], labels: NDArray[np.int64]) -> int:
    """Number of classes, which all sources share and the labels fit."""
    if not sources:
        raise ConfigError("there is no model to collect from")
    first = sources[0]
    for source in sources:
        if source.classes != first.classes:
            raise ConfigError(
                f"classes of {source.title}",
                got=source.classes,
                expected=f"{first.classes} as of {first.title}",
            )
    if not len(labels):
        raise ConfigError("there is no sample to collect")
    outside = (labels < 0) | (labels >= first.classes)
    if outside.any():
        row = int(outside.argmax())
        raise ConfigError(
            f"label of sample {row}", got=labels[row], expected=f"0..{first.classes - 1}"
        )
    if len(np.unique(labels)) < 2:
        raise ConfigError("the data has samples of a single class", got=labels[0])
    return first.classes


def _fill(store: Store, index: int, source: Source, console: Console) -> None:
    """Append what a source still lacks."""
    begin = store.rows[index]
    left = store.samples - begin
    if not left:
        return
    with (
        time_left(console, f"collecting {source.title}", left, "samples") as step,
        store.appending(index) as append,
    ):
        kept_at = time.monotonic()
        for arrays in source.batches(begin):
            row = store.rows[index]
            for name, array in zip(source.names, arrays, strict=True):
                _check(name, array, row, store)
            append([array.astype(store.dtype, copy=False) for array in arrays])
            step(len(arrays[0]))
            if time.monotonic() - kept_at >= _KEEP_EVERY_S:
                store.keep()
                kept_at = time.monotonic()


def _check(name: str, array: NDArray[Any], row: int, store: Store) -> None:
    """Refuse logits that no table may have."""
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(array.astype(store.dtype, copy=False))
    if bad.any():
        sample, column = np.argwhere(bad)[0]
        value = array[sample, column]
        raise CalibrationError(
            f"model {name!r}, sample {row + sample}, class {column}: a logit",
            got=value,
            expected=f"a finite {store.dtype} number",
            remedy="Give --dtype float32" if np.isfinite(value) else None,
        )
