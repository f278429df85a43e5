"""Arrays and the JSON that describes them, in one npz file that may come from anywhere.

The npz is a plain one, which `numpy.load` reads too: uncompressed arrays, and `meta`, the JSON as
UTF-8 bytes. Equal contents are equal bytes. The reader never unpickles and believes no size that
the file itself doesn't bear out.
"""

from __future__ import annotations

import io
import math
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError, ManifestError
from edge_runtime.files import json_text, parse_json, write_bytes
from edge_runtime.image_sources import BROKEN

_META = "meta"
_DTYPES = ("<f4", "<f8", "<i8", "|u1")
#: Members get one date, so that equal contents are equal files.
_DATE = (1980, 1, 1, 0, 0, 0)


def write_npz(path: Path, meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays so that a reader sees the old file or the new one, never a part.

    Args:
        path: The npz.
        meta: Plain JSON data.
        arrays: Name -> array, float32, float64, int64 or uint8; no name is "meta".

    Raises:
        ConfigError: A number in `meta` is not finite, or something in it is not JSON.
        EdgeRuntimeError: The file can't be written; the old one is still there.
    """
    try:
        text = json_text(meta)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} can't be written: its description is no JSON: {error}"
        ) from error
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in {_META: np.frombuffer(text, np.uint8), **arrays}.items():
            info = zipfile.ZipInfo(f"{name}.npy", _DATE)
            info.external_attr = 0o644 << 16
            with archive.open(info, "w", force_zip64=True) as member:
                whole = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
                np.lib.format.write_array(member, whole, version=(1, 0), allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def read_npz(path: Path, what: str, *, most: int) -> tuple[Any, dict[str, NDArray[Any]]]:
    """Read a file that `write_npz` wrote.

    Args:
        path: The npz.
        what: What it is, for the message, such as "gate".
        most: Bytes that it may have.

    Returns:
        What `meta` says, as JSON data, and name -> array, read-only, in the machine's byte order.

    Raises:
        ManifestError: The file is missing, larger than that, damaged, compressed, or has something
            else in it than plain arrays of numbers.
    """
    where = f"{what} {path}"
    _check_file(path, where, most)
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > most:
                raise ManifestError(where, got="a file that unpacks to more", expected=_size(most))
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name in arrays or name == member.filename:
                    raise _not_ours(where, f"{member.filename!r}, which is twice there or no array")
                arrays[name] = _read_array(archive, member, f"{where}: array {name!r}")
    except ManifestError:
        raise
    except (*BROKEN, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ManifestError(
            f"{where} can't be read: {reason}", remedy="Restore it, or make it again"
        ) from error
    meta = arrays.pop(_META, None)
    if meta is None or meta.dtype != np.uint8 or meta.ndim != 1:
        raise _not_ours(where, "no description in it")
    return parse_json(meta.tobytes(), f"the description in {where}"), arrays


def take(
    arrays: dict[str, NDArray[Any]], name: str, dtype: type, shape: tuple[int, ...], where: str
) -> NDArray[Any]:
    """Remove one array from what `read_npz` returned, as it has to be.

    Args:
        arrays: Name -> array.
        name: The array.
        dtype: Its dtype.
        shape: Its shape.
        where: The file, for the message.

    Raises:
        ManifestError: It is missing, has another dtype or shape, or a value that is not finite.
    """
    if name not in arrays:
        raise _not_ours(where, f"no array {name!r}")
    array = arrays.pop(name)
    if array.dtype != dtype or array.shape != shape:
        raise ManifestError(
            f"{where}: array {name!r}",
            got=f"{array.dtype} {array.shape}",
            expected=f"{np.dtype(dtype)} {shape}",
            remedy="Restore the file, or make it again",
        )
    if not np.isfinite(array).all():
        raise ManifestError(
            f"{where}: array {name!r} has values that are NaN or infinite",
            remedy="Restore the file, or make it again",
        )
    return array


def check_nothing_else(arrays: Mapping[str, NDArray[Any]], where: str) -> None:
    """Refuse arrays that nobody took.

    Raises:
        ManifestError: There is one.
    """
    if arrays:
        raise _not_ours(where, f"an unknown array {min(arrays)!r}")


def _check_file(path: Path, where: str, most: int) -> None:
    try:
        info = path.stat()
    except FileNotFoundError as error:
        raise ManifestError(f"{where} does not exist") from error
    except (OSError, ValueError) as error:
        raise ManifestError(f"{where} can't be read: {error}") from error
    if not stat.S_ISREG(info.st_mode):
        raise ManifestError(f"{where} is not a plain file")
    if info.st_size > most:
        raise ManifestError(where, got=f"a file of {info.st_size} bytes", expected=_size(most))


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, where: str) -> NDArray[Any]:
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise _not_ours(where, "a compressed array")
    with archive.open(member) as stream:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise _not_ours(where, "another version of npy")
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype.str not in _DTYPES or (by_column and len(shape) > 1):
            order = " in Fortran order" if by_column else ""
            raise _not_ours(where, f"{dtype} {shape}{order}")
        size = member.file_size - stream.tell()
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size:
            raise _not_ours(where, f"{size} bytes for {dtype} {shape}")
        array = np.frombuffer(stream.read(), dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def _not_ours(where: str, got: str) -> ManifestError:
    return ManifestError(
        where, got=got, expected="plain arrays as edge-runtime writes them", remedy="Make it again"
    )


def _size(most: int) -> str:
    return f"at most {most / 2**20:.0f} MiB"
