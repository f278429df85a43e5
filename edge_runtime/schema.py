"""From plain JSON or YAML data to frozen dataclasses, strictly.

One reader for everything that comes from outside: manifest, operating points and YAML. Types are
those of the dataclass's annotations; nothing is coerced except an int where a float is asked for.
An unknown key is an error that names the nearest valid one. Where the data's mappings and lists
carry `origins` (the YAML loader's do), an error names the line.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args, get_origin

from edge_runtime.errors import ConfigError

T = TypeVar("T")

#: A message lists this many valid names; a classifier may have thousands of classes.
_SHOWN = 20


def read(kind: type[T], data: object, where: str) -> T:
    """Read `data` as the dataclass `kind`.

    Args:
        kind: A frozen dataclass; its `__post_init__` may raise `ConfigError` of its own.
        data: What `json.load` or the YAML loader returned.
        where: The place that error messages name, such as "cascade.yaml".

    Returns:
        An instance of `kind`.

    Raises:
        ConfigError: A key is unknown or missing, or a value has the wrong type.
    """
    value: T = _read(kind, data, _Place(where))
    return value


def plain(value: object) -> Any:
    """The JSON form of what `read` reads: dataclasses to dicts, tuples to lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def nearest(name: str, valid: Iterable[str]) -> str:
    """A remedy that lists the valid names, the nearest first where one is near."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    shown = [item if item.isprintable() else repr(item) for item in names[:_SHOWN]]
    if len(names) > _SHOWN:
        shown.append(f"and {len(names) - _SHOWN} more")
    return f"{hint}Valid: {', '.join(shown) or 'none'}"


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where a value stands: the file or line, and the path of keys that leads there."""

    origin: str
    path: str = ""

    def key(self, data: object, key: object) -> _Place:
        """The place of `data[key]`."""
        shown = key if isinstance(key, str) and key.isprintable() else repr(key)
        return _Place(self._origin(data, key), f"{self.path}: {shown}" if self.path else shown)

    def item(self, data: object, index: int) -> _Place:
        """The place of `data[index]`."""
        return _Place(self._origin(data, index), f"{self.path}[{index}]")

    def _origin(self, data: object, key: object) -> str:
        origin: str = getattr(data, "origins", {}).get(key, self.origin)
        return origin

    def __str__(self) -> str:
        return f"{self.origin}: {self.path}" if self.path else self.origin


def _read(kind: Any, data: object, where: _Place) -> Any:
    origin = get_origin(kind)
    if kind is Any or kind is object:
        return data
    if origin in (typing.Union, types.UnionType):
        return _read_union(get_args(kind), data, where)
    if origin is typing.Literal:
        return _read_literal(get_args(kind), data, where)
    if origin is tuple:
        return _read_tuple(get_args(kind), data, where)
    if origin in (dict, Mapping):
        value_kind = get_args(kind)[1]
        if not isinstance(data, Mapping):
            raise _mismatch(where, data, "a mapping")
        return {
            _key(key, where): _read(value_kind, value, where.key(data, key))
            for key, value in data.items()
        }
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, data, where)
    return _read_scalar(kind, data, where)


def _read_dataclass(kind: Any, data: object, where: _Place) -> Any:
    if not isinstance(data, Mapping):
        raise _mismatch(where, data, "a mapping")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    for key in data:
        if key not in fields:
            place = _Place(where.key(data, key).origin, where.path)
            raise ConfigError(f"{place}: unknown key {key!r}", remedy=nearest(str(key), fields))
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _read(hints[name], data[name], where.key(data, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: the key {name!r} is missing")
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _read_union(kinds: tuple[Any, ...], data: object, where: _Place) -> Any:
    if data is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) == 1:
        return _read(kinds[0], data, where)
    for kind in kinds:
        if _fits(kind, data):
            return _read(kind, data, where)
    raise _mismatch(where, data, _alternatives(kinds))


def _read_tuple(kinds: tuple[Any, ...], data: object, where: _Place) -> tuple[Any, ...]:
    if not isinstance(data, list | tuple):
        raise _mismatch(where, data, "a list")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_read(kinds[0], item, where.item(data, i)) for i, item in enumerate(data))
    if len(data) != len(kinds):
        raise ConfigError(str(where), got=f"{len(data)} values", expected=len(kinds))
    return tuple(
        _read(kind, item, where.item(data, i))
        for i, (kind, item) in enumerate(zip(kinds, data, strict=True))
    )


def _read_literal(valid: tuple[Any, ...], data: object, where: _Place) -> Any:
    if any(type(data) is type(item) and data == item for item in valid):
        return data
    near = difflib.get_close_matches(str(data)[:80], [str(item) for item in valid], n=1)
    raise ConfigError(
        str(where),
        got=repr(data)[:80],
        expected=" or ".join(repr(item) for item in valid),
        remedy=f"Did you mean {near[0]!r}?" if near else None,
    )


def _read_scalar(kind: Any, data: object, where: _Place) -> Any:
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        try:
            return float(data)
        except OverflowError as error:
            raise _mismatch(where, data, "a number that a float can hold") from error
    if not _fits(kind, data):
        raise _mismatch(where, data, kind.__name__)
    if isinstance(data, float) and not math.isfinite(data):
        raise ConfigError(str(where), got=data, expected="a finite number")
    return data


def _fits(kind: Any, data: object) -> bool:
    origin = get_origin(kind)
    if origin is tuple:
        return isinstance(data, list | tuple)
    if origin in (dict, Mapping) or dataclasses.is_dataclass(kind):
        return isinstance(data, Mapping)
    if origin is typing.Literal:
        return data in get_args(kind)
    if isinstance(data, bool):
        return kind is bool
    if kind is float:
        return isinstance(data, int | float)
    return isinstance(data, kind)


def _key(key: object, where: _Place) -> str:
    if not isinstance(key, str):
        raise _mismatch(f"{where}: a key", key, "str")
    return key


def _mismatch(where: object, data: object, expected: str) -> ConfigError:
    if data is None:
        got = "null"
    elif isinstance(data, Mapping):
        got = f"a mapping {data!r}"
    else:
        got = f"{type(data).__name__.lstrip('_').lower()} {data!r}"
    return ConfigError(str(where), got=got[:80], expected=expected)


def _alternatives(kinds: Iterable[Any]) -> str:
    return " or ".join(getattr(kind, "__name__", repr(kind)) for kind in kinds)
