"""Rows of logits that outlast a kill, and the npz that they become.

While a table is collected, a hidden folder beside it has an npy per model and a JSON that says what
the rows are and how many of them are safely on the disk. Rows are appended and never held, so that
memory does not grow with the table; what a kill left half written is written again.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError, EdgeRuntimeError, ManifestError
from edge_runtime.files import json_text, parse_json, read_json, write_bytes

_STATE = "state.json"
_TABLE = "table.npz"
_VERSION = 1
#: Bytes that are copied at a time.
_CHUNK = 2**20
#: Members of the npz get one date, so that equal tables are equal files.
_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Block:
    """Arrays that are filled together, row by row.

    Attributes:
        names: Names of the arrays in the npz.
        columns: Length of each row.
    """

    names: tuple[str, ...]
    columns: int


@dataclass
class Store:
    """The rows of a table in the making; `open` makes one.

    Attributes:
        folder: Where they are kept.
        samples: Rows of the whole table.
        dtype: Of the logits.
        blocks: What the table consists of.
        provenance: What the rows depend on, plain JSON data.
        rows: Rows of each block that are done.
    """

    folder: Path
    samples: int
    dtype: np.dtype[Any]
    blocks: tuple[Block, ...]
    provenance: Mapping[str, Any]
    rows: list[int] = field(init=False)
    _files: list[IO[bytes]] = field(init=False, default_factory=list)

    @classmethod
    def open(
        cls,
        out: Path,
        blocks: Sequence[Block],
        samples: int,
        dtype: str,
        provenance: Mapping[str, Any],
        *,
        anew: bool = False,
    ) -> Store:
        """Begin, or go on with what an earlier run with equal provenance has left.

        Args:
            out: The npz to write.
            blocks: What it consists of, besides the labels.
            samples: Its rows.
            dtype: "float32" or "float16".
            provenance: All that the logits depend on, plain JSON data.
            anew: Whether to forget what an earlier run has left.

        Raises:
            ConfigError: There are rows of another provenance, or they are damaged.
            EdgeRuntimeError: The folder can't be written.
        """
        folder = out.with_name(f".{out.name}.collect")
        described = {
            "version": _VERSION,
            "samples": samples,
            "dtype": dtype,
            "arrays": [name for block in blocks for name in block.names],
            **provenance,
        }
        # As it will be read again: tuples become lists.
        plain = parse_json(json_text(described), "provenance")
        store = cls(folder, samples, np.dtype(dtype), tuple(blocks), plain)
        with _writing(folder):
            if anew and folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(exist_ok=True)
        store.rows = store._kept()
        if not (folder / _STATE).exists():
            store._write_state()
        return store

    @property
    def total(self) -> int:
        """Rows of all blocks."""
        return self.samples * len(self.blocks)

    @contextlib.contextmanager
    def appending(self, index: int) -> Iterator[Callable[[Sequence[NDArray[Any]]], None]]:
        """Add rows to a block; all that was added is on the disk when this is left.

        Args:
            index: Which block.

        Yields:
            A function that takes the next rows: an array (n, columns) per name of the block.

        Raises:
            ConfigError: What is kept of the block is damaged.
            EdgeRuntimeError: The disk is full, or the files can't be written.
        """
        with contextlib.ExitStack() as stack:
            with _writing(self.folder):
                self._files = [
                    stack.enter_context(self._positioned(index, place))
                    for place in range(len(self.blocks[index].names))
                ]

            def append(arrays: Sequence[NDArray[Any]]) -> None:
                with _writing(self.folder):
                    for file, array in zip(self._files, arrays, strict=True):
                        _write(file, np.ascontiguousarray(array, self.dtype))
                self.rows[index] += len(arrays[0])

            try:
                yield append
            finally:
                self.keep()

    def keep(self) -> None:
        """Bring what was appended to the disk, then the number of rows.

        Raises:
            EdgeRuntimeError: It can't be written.
        """
        with _writing(self.folder):
            for file in self._files:
                os.fsync(file.fileno())
        self._write_state()

    def finish(self, out: Path, labels: NDArray[np.int64], check: Callable[[Path], object]) -> None:
        """Write the npz, uncompressed, and remove the folder.

        Args:
            out: The npz; it appears whole, or the old one stays.
            labels: Shape (samples,).
            check: Called with the npz before it is moved in place.

        Raises:
            EdgeRuntimeError: The disk is full, or the file can't be written; all rows are kept.
        """
        if self.rows != [self.samples] * len(self.blocks):
            raise EdgeRuntimeError("rows of the table", got=self.rows, expected=self.samples)
        table = self.folder / _TABLE
        with _writing(out):
            with table.open("wb") as file:
                self._write_npz(file, labels)
                file.flush()
                os.fsync(file.fileno())
            check(table)
            table.replace(out)
        self.discard()

    def discard(self) -> None:
        """Remove the folder, as far as that is possible."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_npz(self, file: Any, labels: NDArray[np.int64]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with _member(archive, "labels") as target:
                np.lib.format.write_array(target, labels, version=(1, 0), allow_pickle=False)
            for index, block in enumerate(self.blocks):
                for place, name in enumerate(block.names):
                    with (
                        self._path(index, place).open("rb") as source,
                        _member(archive, name) as target,
                    ):
                        shutil.copyfileobj(source, target, _CHUNK)

    def _path(self, index: int, place: int) -> Path:
        return self.folder / f"{index}-{place}.npy"

    def _header(self, index: int) -> bytes:
        """What stands before the rows of the whole array."""
        buffer = io.BytesIO()
        shape = (self.samples, self.blocks[index].columns)
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(buffer, header)
        return buffer.getvalue()

    @contextlib.contextmanager
    def _positioned(self, index: int, place: int) -> Iterator[IO[bytes]]:
        """A file behind the last row that counts; what follows that is cut off."""
        path, header, rows = self._path(index, place), self._header(index), self.rows[index]
        # Without a buffer of its own, which would be written once more when the disk is full.
        with path.open("r+b" if rows else "w+b", buffering=0) as file:
            if not rows:
                file.write(header)
            elif file.read(len(header)) != header:
                raise self._damaged(f"{path.name} is another array")
            end = len(header) + rows * self.blocks[index].columns * self.dtype.itemsize
            if os.fstat(file.fileno()).st_size < end:
                raise self._damaged(f"{path.name} has fewer than {rows} rows")
            file.seek(end)
            file.truncate()
            yield file

    def _kept(self) -> list[int]:
        """Rows per block of an earlier run; none where there was none."""
        path = self.folder / _STATE
        if not path.exists():
            return [0] * len(self.blocks)
        try:
            state = read_json(path, "the state")
        except ManifestError as error:
            raise self._damaged(str(error)) from error
        if not isinstance(state, dict) or not isinstance(state.get("provenance"), dict):
            raise self._damaged(f"{_STATE} says nothing of their provenance")
        self._check_provenance(state["provenance"])
        rows: Any = state.get("rows")
        if not self._are_rows(rows):
            raise self._damaged(f"{_STATE} has no number of rows per model")
        for index, count in enumerate(rows):
            for place in range(len(self.blocks[index].names)):
                if count and not self._path(index, place).is_file():
                    raise self._damaged(f"{self._path(index, place).name} is missing")
        return list(rows)

    def _are_rows(self, rows: Any) -> bool:
        return (
            isinstance(rows, list)
            and len(rows) == len(self.blocks)
            and all(type(count) is int and 0 <= count <= self.samples for count in rows)
        )

    def _check_provenance(self, kept: Mapping[str, Any]) -> None:
        for key in (*self.provenance, *kept):
            if kept.get(key) != self.provenance.get(key):
                raise ConfigError(
                    f"{self.folder} has the rows of an earlier run that differs in {key!r}",
                    got=_shown(self.provenance.get(key)),
                    expected=f"{_shown(kept.get(key))} to go on with them",
                    remedy="To forget them and start anew give --anew",
                )

    def _damaged(self, why: str) -> ConfigError:
        return ConfigError(
            f"the rows that an earlier run has left in {self.folder} are damaged: {why}",
            remedy="To forget them and start anew give --anew",
        )

    def _write_state(self) -> None:
        state = {"rows": self.rows, "provenance": self.provenance}
        write_bytes(self.folder / _STATE, json_text(state))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EdgeRuntimeError(f"{path} can't be written: {error.strerror or error}") from error


def _write(file: IO[bytes], array: NDArray[Any]) -> None:
    view = memoryview(array.reshape(-1).view(np.uint8).data)
    while view:
        view = view[file.write(view) :]


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    info = zipfile.ZipInfo(f"{name}.npy", _DATE)
    info.external_attr = 0o644 << 16
    return archive.open(info, "w", force_zip64=True)


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
