"""Tables of predictions: what several models say about the same labelled samples, in one npz.

```
labels            integers (N,)
<model>           logits, float16, float32 or float64, (N, K)
<model>.pred      or, for a predictor whose logits nobody has: class indices, integers (N,)
<model>.conf      and how sure it is, float (N,)
```

Names may contain dots; only the two suffixes mean something. Logits are read a block of samples at
a time, straight from the file, so that a table may be larger than the memory.
"""

from __future__ import annotations

import hashlib
import lzma
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError
from edge_runtime.image_sources import BROKEN
from edge_runtime.schema import nearest

PRED, CONF = ".pred", ".conf"
_LABELS = "labels"
_LOGITS_DTYPES = ("float16", "float32", "float64")
#: Bytes of logits per block: with what is computed from them they stay in a core's cache.
_BLOCK_BYTES = 2**20
#: No classifier has more classes; a block holds a row at least.
_MOST_CLASSES = 2**20

_BROKEN = (*BROKEN, lzma.LZMAError)


@dataclass(frozen=True)
class _Array:
    """One array of the npz, as its header describes it."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ModelTable:
    """Predictions of several models on the same labelled samples; `open` makes one.

    Attributes:
        path: The npz.
        labels: True class indices, shape (N,), int64, read-only; of at least two classes.
        names: The models, in the order of the file.
        classes: Number of classes of the logits, None where no model has any.
        hash: Hex digest of names and checksums of the arrays, as the file states them.
    """

    path: Path
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    classes: int | None
    hash: str
    _arrays: dict[str, _Array]

    @classmethod
    def open(cls, path: str | Path) -> ModelTable:
        """Open a table: every header and the labels are checked, no logits are read.

        Args:
            path: An npz as `numpy.savez` and `numpy.savez_compressed` write it.

        Returns:
            The table.

        Raises:
            ConfigError: There is no such npz, it has no labels, no sample, no model or labels of
                one class only, or an array has another name, shape or dtype than it should; the
                message names the array.
        """
        path = Path(path)
        if not path.is_file() or not zipfile.is_zipfile(path):
            what = "is no npz" if path.exists() else "does not exist"
            raise ConfigError(f"the table {path} {what}", remedy="Write it with numpy.savez")
        with _reading(path, "its list of arrays"), zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        _check_distinct(path, [member.filename for member in members])
        arrays = {}
        for member in members:
            array = _header(path, member)
            arrays[array.name] = array
        if _LABELS not in arrays:
            raise ConfigError(f"table {path}: there is no array 'labels'")
        names = _model_names(path, arrays)
        facts = sorted(f"{m.filename}\0{m.file_size}\0{m.CRC}" for m in members)
        table = cls(
            path=path,
            labels=_labels(path, arrays[_LABELS]),
            names=names,
            classes=_classes(path, arrays, names),
            hash=hashlib.sha256("\0".join(facts).encode("utf-8", "surrogateescape")).hexdigest(),
            _arrays=arrays,
        )
        table._check_shapes()
        return table

    def __len__(self) -> int:
        """N, the number of samples."""
        return len(self.labels)

    @property
    def with_logits(self) -> tuple[str, ...]:
        """Models whose logits the table has; of the others it has predictions."""
        return tuple(name for name in self.names if name in self._arrays)

    @property
    def block_rows(self) -> int:
        """Samples per block of logits by default."""
        return max(1, _BLOCK_BYTES // (4 * (self.classes or 1)))

    def logits(self, name: str, rows: int | None = None) -> Iterator[NDArray[np.float32]]:
        """Logits of one model, a block of samples after the other.

        Args:
            name: The model, one of `with_logits`.
            rows: Samples per block, >= 1; by default about 1 MiB of them.

        Yields:
            Blocks in order, shape (n, K), float32, finite; the caller's own.

        Raises:
            ConfigError: The table has no logits of this model, the array can't be read, or a logit
                is NaN or infinite, also once it is float32.
        """
        if name not in self.with_logits:
            raise ConfigError(
                f"table {self.path}: there are no logits of the model {name!r}",
                remedy=nearest(name, self.with_logits),
            )
        begin = 0
        for block in _blocks(self.path, self._arrays[name], rows or self.block_rows):
            with np.errstate(over="ignore"):
                values = block.astype(np.float32, copy=False)
            if not np.isfinite(values).all():
                row, column = np.argwhere(~np.isfinite(values))[0]
                raise ConfigError(
                    f"table {self.path}: array {name!r}, row {begin + row}, class {column}",
                    got=block[row, column],
                    expected="a finite float32 number",
                )
            yield values
            begin += len(values)

    def labelled(self, name: str) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Logits of one model with their labels; blocks as of `logits`."""
        begin = 0
        for block in self.logits(name):
            yield block, self.labels[begin : begin + len(block)]
            begin += len(block)

    def blocks(self, names: Sequence[str], rows: int) -> Iterator[list[NDArray[np.float32]]]:
        """Logits of several models on the same samples, a block of samples after the other.

        Args:
            names: Models, each one of `with_logits`.
            rows: Samples per block, >= 1.

        Yields:
            For each model a block as of `logits`.

        Raises:
            ConfigError: As for `logits`.
        """
        for blocks in zip(*(self.logits(name, rows) for name in names), strict=True):
            yield list(blocks)

    def predictions(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """What a model without logits predicts, and how sure it is.

        Args:
            name: The model, not one of `with_logits`.

        Returns:
            Class indices, shape (N,), int64, and confidences, shape (N,), float32.

        Raises:
            ConfigError: The table has logits of this model or does not know it, an array can't be
                read, an index is negative, or a confidence NaN or infinite.
        """
        if name not in self.names or name in self._arrays:
            raise ConfigError(
                f"table {self.path}: there are no predictions of the model {name!r}",
                remedy=nearest(name, set(self.names) - set(self.with_logits)),
            )
        predicted = _indices(self.path, self._arrays[name + PRED])
        outside = (predicted < 0) | (predicted >= (self.classes or _MOST_CLASSES))
        self._check_rows(name + PRED, predicted, outside, self._expected_classes)
        confidence = _whole(self.path, self._arrays[name + CONF])
        with np.errstate(over="ignore"):
            values = confidence.astype(np.float32)
        expected = "a finite float32 number"
        self._check_rows(name + CONF, confidence, ~np.isfinite(values), expected)
        return predicted, values

    def check_same_models(self, other: ModelTable) -> None:
        """Refuse another table that does not have the same models over the same classes.

        Raises:
            ConfigError: It has not; the message names the model.
        """
        mine, others = set(self.names), set(other.names)
        for name in (*other.names, *self.names):
            if name not in mine & others:
                has, lacks = (other, self) if name in others else (self, other)
                raise ConfigError(
                    f"the tables differ: {has.path} has the model {name!r}, {lacks.path} has not",
                    remedy=nearest(name, lacks.names),
                )
        for name in self.names:
            if (name in self._arrays) != (name in other._arrays):
                has, lacks = (self, other) if name in self._arrays else (other, self)
                raise ConfigError(
                    f"the tables differ: {has.path} has logits of {name!r}, {lacks.path} has not"
                )
        if self.classes != other.classes:
            first = self.with_logits[0]
            raise ConfigError(
                f"table {other.path}: classes of the array {first!r}",
                got=other.classes,
                expected=f"{self.classes} as in {self.path}",
            )

    @property
    def _expected_classes(self) -> str:
        last = (self.classes or _MOST_CLASSES) - 1
        return f"a class index 0..{last}"

    def _check_shapes(self) -> None:
        """Hold arrays against the labels, and labels against the classes."""
        outside = (self.labels < 0) | (self.labels >= (self.classes or _MOST_CLASSES))
        self._check_rows(_LABELS, self.labels, outside, self._expected_classes)
        if len(np.unique(self.labels)) < 2:
            raise ConfigError(
                f"table {self.path}: array 'labels' is of a single class",
                got=f"{len(self)} samples of class {self.labels[0]}",
                expected="at least two classes",
            )
        for array in self._arrays.values():
            if array.shape[0] != len(self):
                raise ConfigError(
                    f"table {self.path}: samples of the array {array.name!r}",
                    got=array.shape[0],
                    expected=f"{len(self)} as in 'labels'",
                )

    def _check_rows(
        self, name: str, values: NDArray[Any], bad: NDArray[np.bool_], expected: str
    ) -> None:
        if bad.any():
            row = int(bad.argmax())
            raise ConfigError(
                f"table {self.path}: array {name!r}, row {row}", got=values[row], expected=expected
            )


def _check_distinct(path: Path, members: Sequence[str]) -> None:
    seen = set()
    for member in members:
        if member in seen:
            raise ConfigError(f"table {path}: {_shown(member)} appears twice")
        seen.add(member)


def _shown(member: str) -> str:
    return f"the array {member.removesuffix('.npy')!r}"


def _header(path: Path, member: zipfile.ZipInfo) -> _Array:
    """Read an array's header; checks everything that it alone tells."""
    if not member.filename.endswith(".npy"):
        raise ConfigError(
            f"table {path}: {member.filename!r} is no array", remedy="Write it with numpy.savez"
        )
    name = member.filename.removesuffix(".npy")
    with (
        _reading(path, f"the array {name!r}"),
        zipfile.ZipFile(path) as archive,
        archive.open(member) as stream,
    ):
        shape, by_column, dtype = _read_header(stream)
        size = stream.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize
    array = _Array(name, dtype, shape)
    _check_kind(path, array)
    if by_column and len(shape) > 1 and min(shape) > 1:
        raise ConfigError(
            f"table {path}: array {name!r} is stored class by class (Fortran order)",
            remedy="Save numpy.ascontiguousarray of it",
        )
    if member.file_size != size:
        raise ConfigError(
            f"table {path}: bytes of the array {name!r}", got=member.file_size, expected=size
        )
    return array


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether it is in Fortran order, and dtype; leaves the stream at the data."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _check_kind(path: Path, array: _Array) -> None:
    """Number of axes and dtype, as the array's name asks for them."""
    if array.name == _LABELS or array.name.endswith(PRED):
        axes, kind, expected = 1, array.dtype.kind in "iu", "shape (N,), integers"
    elif array.name.endswith(CONF):
        axes, kind, expected = 1, array.dtype.kind == "f", "shape (N,), float"
    else:
        axes, kind = 2, array.dtype.name in _LOGITS_DTYPES
        expected = f"logits, shape (N, K), {', '.join(_LOGITS_DTYPES)}"
    if len(array.shape) != axes or not kind:
        raise ConfigError(
            f"table {path}: array {array.name!r}",
            got=f"shape {array.shape}, {array.dtype}",
            expected=expected,
        )


def _model_names(path: Path, arrays: dict[str, _Array]) -> tuple[str, ...]:
    """The models in the order of the file; each has logits, or both predictions and confidence."""
    names: dict[str, None] = {}
    for name in arrays:
        if name == _LABELS:
            continue
        suffix = next((end for end in (PRED, CONF) if name.endswith(end)), "")
        model = name.removesuffix(suffix)
        if model in ("", _LABELS):
            raise ConfigError(
                f"table {path}: the array {name!r} names no model",
                remedy="'labels' is reserved, and a name has more than a suffix",
            )
        other = model + (CONF if suffix == PRED else PRED)
        if suffix and other not in arrays:
            raise ConfigError(f"table {path}: there is {name!r} but no array {other!r}")
        if suffix and model in arrays:
            raise ConfigError(
                f"table {path}: the model {model!r} has both logits and the array {name!r}",
                remedy="Leave out one of them",
            )
        names[model] = None
    if not names:
        raise ConfigError(f"table {path}: there is no model beside 'labels'")
    return tuple(names)


def _labels(path: Path, array: _Array) -> NDArray[np.int64]:
    if array.shape[0] < 1:
        raise ConfigError(f"table {path}: array 'labels' is empty", expected="a sample at least")
    labels = _indices(path, array)
    labels.flags.writeable = False
    return labels


def _classes(path: Path, arrays: dict[str, _Array], names: Sequence[str]) -> int | None:
    """Number of classes, the same in all logits."""
    logits = [arrays[name] for name in names if name in arrays]
    for array in logits:
        classes = array.shape[1]
        if not 2 <= classes <= _MOST_CLASSES:
            raise ConfigError(
                f"table {path}: classes of the array {array.name!r}",
                got=classes,
                expected=f"2..{_MOST_CLASSES}",
            )
        if classes != logits[0].shape[1]:
            raise ConfigError(
                f"table {path}: classes of the array {array.name!r}",
                got=classes,
                expected=f"{logits[0].shape[1]} as in {logits[0].name!r}",
            )
    return logits[0].shape[1] if logits else None


def _indices(path: Path, array: _Array) -> NDArray[np.int64]:
    """Class indices, the caller's own."""
    values = _whole(path, array)
    if values.dtype == np.uint64:
        # What int64 can't hold is no class either.
        values = np.minimum(values, np.uint64(_MOST_CLASSES))
    return values.astype(np.int64)


def _whole(path: Path, array: _Array) -> NDArray[Any]:
    (values,) = _blocks(path, array, max(1, array.shape[0]))
    return values


def _blocks(path: Path, array: _Array, rows: int) -> Iterator[NDArray[Any]]:
    """The array, some rows at a time, in the machine's byte order.

    The file's checksum is compared when the last block has been read.
    """
    native = array.dtype.newbyteorder("=")
    with (
        _reading(path, f"the array {array.name!r}"),
        zipfile.ZipFile(path) as archive,
        archive.open(f"{array.name}.npy") as stream,
    ):
        _read_header(stream)
        for begin in range(0, array.shape[0], rows):
            block = np.empty((min(rows, array.shape[0] - begin), *array.shape[1:]), array.dtype)
            _fill(stream, block)
            yield block.astype(native, copy=False)


def _fill(stream: IO[bytes], block: NDArray[Any]) -> None:
    view = memoryview(block.view(np.uint8).reshape(-1).data)
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError("it ends too early")
        done += count


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turn what a damaged file raises into one line."""
    try:
        yield
    except ConfigError:
        raise
    except _BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"table {path}: {what} can't be read: {reason}") from error
