"""Strict YAML -> frozen dataclasses, with overrides from the command line.

YAML is for people, so what people get wrong is an error with file, line and remedy instead of
another value: a key twice, an unknown key, and the plain scalars that YAML 1.1 reads otherwise than
they look (`1e-3` is text, `on` is true, `010` is eight, `16:9` is 969).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edge_runtime import schema
from edge_runtime.errors import ConfigError, missing_package

if TYPE_CHECKING:
    import yaml

T = TypeVar("T")

#: Configurations are a handful of levels deep; PyYAML recurses on every one.
_MAX_DEPTH = 64

_NULL = re.compile(r"|~|null|Null|NULL")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?")

# An exponent without "." or sign, which YAML 1.1 takes for text.
_EXPONENT = re.compile(r"([-+]?[0-9]+)(\.[0-9]*)?[eE]([-+]?)([0-9]+)")

# What looks like something that it is not: pattern, what it is, how to write what was meant.
_TRAPS = (
    (
        re.compile(r"(?i)on|off|yes|no|y|n"),
        "is true or false for some YAML readers and text for others",
        "Write true or false, or quote it",
    ),
    (
        re.compile(r"[-+]?0[0-9_]+|0[oO][0-7_]+"),
        "is octal for some YAML readers and decimal or text for others",
        "Write it without the leading 0, or quote it",
    ),
    (
        re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"),
        "is a number in base 60 for some YAML readers and text for others",
        "Write one number, or quote it",
    ),
    (
        re.compile(r"(?i)[-+]?\.?(inf|infinity|nan)"),
        "is not a finite number",
        "Write a number, or quote it",
    ),
    (
        re.compile(r"\d{4}-\d\d?-\d\d?([Tt\s].*)?"),
        "is a date for some YAML readers and text for others",
        "Quote it",
    ),
    (re.compile(r"=|<<"), "has a meaning of its own in YAML", "Quote it, or write the keys out"),
)

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}")


class _Mapping(dict[str, Any]):
    """A mapping that knows where each of its values stands."""

    def __init__(self) -> None:
        super().__init__()
        self.origins: dict[str, str] = {}


class _List(list[Any]):
    """A list that knows where each of its values stands."""

    def __init__(self) -> None:
        super().__init__()
        self.origins: dict[int, str] = {}


def load(path: Path, kind: type[T], overrides: Sequence[str] = ()) -> T:
    """Read a YAML file as the dataclass `kind`.

    `${NAME}` and `${NAME:-default}` in a text value stand for an environment variable. Where the
    text begins with a variable that holds a relative path, the path is taken from the current
    folder, as the shell in which it was set would; a default is taken as written.

    Args:
        path: The file, UTF-8.
        kind: A frozen dataclass; see `schema.read`.
        overrides: "key.sub=value" each, the value written as in YAML. A number stands for the
            place in a list, from 0.

    Returns:
        An instance of `kind`.

    Raises:
        ConfigError: The file is missing or not strict YAML, or a key or value does not fit `kind`.
        BackendUnavailable: PyYAML is not installed.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"the configuration {path} does not exist") from error
    except OSError as error:
        raise ConfigError(f"the configuration {path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: the text is not UTF-8") from error
    data = _Reader(str(path)).read(text)
    if not isinstance(data, _Mapping):
        got = "nothing" if data is None else f"{type(data).__name__.strip('_').lower()}"
        raise ConfigError(f"{path}: the whole file", got=got, expected="a mapping: key: value")
    for override in overrides:
        _override(data, override)
    return schema.read(kind, data, str(path))


def _override(data: _Mapping, override: str) -> None:
    """Put one "key.sub=value" into `data`."""
    origin = f"override {override!r}"
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(origin, expected="key=value or key.sub=value")
    value = _Reader(origin, numbered=False).read(text)
    if value is None and not text.strip().lower().startswith(("~", "null")):
        raise ConfigError(f"{origin}: the value is empty", remedy="Write null or ''")
    parent: Any = data
    for key in keys[:-1]:
        parent = _child(parent, key, origin)
    last = _place(parent, keys[-1], origin)
    parent[last] = value
    parent.origins[last] = origin


def _child(parent: _Mapping | _List, key: str, origin: str) -> _Mapping | _List:
    """The mapping or list at `key`, an empty mapping where there is none."""
    place: Any = _place(parent, key, origin)
    found = parent[place] if isinstance(parent, _List) else parent.get(place)
    if found is None:
        found = _Mapping()
        parent[place] = found
        parent.origins[place] = origin
    if not isinstance(found, _Mapping | _List):
        raise ConfigError(f"{origin}: {key!r} has no keys", got=repr(found)[:80])
    return found


def _place(parent: _Mapping | _List, key: str, origin: str) -> str | int:
    """The key of a mapping, or the index into a list."""
    if isinstance(parent, _Mapping):
        return key
    if not re.fullmatch("[0-9]+", key) or int(key) >= len(parent):
        raise ConfigError(
            f"{origin}: place in a list",
            got=repr(key),
            expected=f"a number in 0..{len(parent) - 1}" if parent else "no place: it is empty",
        )
    return int(key)


class _Reader:
    """Reads one YAML document from text.

    Args:
        origin: What error messages name: a file, or an override.
        numbered: Whether messages name the line too.
    """

    def __init__(self, origin: str, *, numbered: bool = True) -> None:
        self._origin = origin
        self._numbered = numbered

    def read(self, text: str) -> Any:
        """The document as mappings, lists, str, int, float, bool and None.

        Raises:
            ConfigError: It is not strict YAML.
            BackendUnavailable: PyYAML is not installed.
        """
        try:
            import yaml
        except ImportError as error:
            raise missing_package("PyYAML", "cpu") from error

        fault = self._error

        class Loader(yaml.SafeLoader):
            depth = 0

            def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
                event: Any = self.peek_event()  # type: ignore[no-untyped-call]
                line = event.start_mark.line + 1
                if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                    raise fault(
                        line, "anchors and aliases are not supported", "Write the value out"
                    )
                if getattr(event, "tag", None) is not None:
                    raise fault(line, f"the tag {event.tag!r} is not supported", "Remove it")
                self.depth += 1
                if self.depth > _MAX_DEPTH:
                    raise fault(line, f"nested deeper than {_MAX_DEPTH} levels")
                node = super().compose_node(parent, index)
                self.depth -= 1
                return node

        try:
            loader = Loader(text)
            node = loader.get_single_node()
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            character = text[error.position]
            raise fault(line, f"the character {character!r} can't be in YAML") from error
        except yaml.MarkedYAMLError as error:
            raise self._syntax_error(error) from error
        return None if node is None else self._value(node)

    def _value(self, node: Any) -> Any:
        if node.id == "mapping":
            return self._mapping(node)
        if node.id == "sequence":
            items = _List()
            for item in node.value:
                items.origins[len(items)] = self._place(item)
                items.append(self._value(item))
            return items
        line = node.start_mark.line + 1
        if node.style is None:
            return self._plain(node.value, line)
        return self._text(node.value, line)

    def _mapping(self, node: Any) -> _Mapping:
        mapping = _Mapping()
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self._key(key_node, line)
            if key in mapping:
                first = f", first in line {lines[key]}" if self._numbered else ""
                raise self._error(line, f"the key {key!r} appears twice{first}")
            lines[key] = line
            mapping.origins[key] = self._place(key_node)
            mapping[key] = self._value(value_node)
        return mapping

    def _key(self, node: Any, line: int) -> str:
        if node.id != "scalar":
            raise self._error(line, "a key must be text")
        text: str = node.value
        if node.style is None:
            key = self._plain(text, line, variables=False)
            if not isinstance(key, str):
                raise self._error(line, f"the key {text!r} is not text for YAML", "Quote it")
        return text

    def _plain(self, text: str, line: int, *, variables: bool = True) -> Any:
        """The value of a scalar without quotes."""
        for pattern, value in ((_NULL, None), (_TRUE, True), (_FALSE, False)):
            if pattern.fullmatch(text):
                return value
        try:
            if _INT.fullmatch(text):
                return int(text)
            if _HEX.fullmatch(text):
                return int(text, 16)
        except ValueError as error:
            raise self._error(line, f"the number {text[:20]}... is too long") from error
        if _FLOAT.fullmatch(text):
            number = float(text)
            if not math.isfinite(number):
                raise self._error(line, f"the number {text} is too large")
            return number
        for pattern, what, remedy in _TRAPS:
            if pattern.fullmatch(text):
                raise self._error(line, f"{text!r} {what}", remedy)
        if (written := _as_number(text)) is not None:
            raise self._error(
                line,
                f"{text!r} is text for some YAML readers and a number for others",
                f"Write {written}, or quote it",
            )
        return self._text(text, line) if variables else text

    def _text(self, text: str, line: int) -> str:
        """A text value, with the environment's variables put in."""
        if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
            raise self._error(line, f"the text {text!r} has a character that is no text")
        return "".join(self._expanded(text, line)) if "${" in text else text

    def _expanded(self, text: str, line: int) -> Iterator[str]:
        at = 0
        while (start := text.find("${", at)) >= 0:
            yield text[at:start]
            match = _VARIABLE.match(text, start)
            if match is None:
                raise self._error(
                    line, f"no variable: {text!r}", "Write ${NAME} or ${NAME:-default}"
                )
            at = match.end()
            name, default = match.groups()
            value = os.environ.get(name, "")
            if value and start == 0 and _is_relative_path(value, text[at:]):
                value = os.path.abspath(value)  # as the shell in which it was set would
            if not value and default is None:
                raise self._error(
                    line,
                    f"the environment variable {name} is not set",
                    f"Set it, or write ${{{name}:-default}}",
                )
            yield value or default
        yield text[at:]

    def _place(self, node: Any) -> str:
        return f"{self._origin}:{node.start_mark.line + 1}" if self._numbered else self._origin

    def _error(self, line: int, what: str, remedy: str | None = None) -> ConfigError:
        where = f"{self._origin}:{line}" if self._numbered else self._origin
        return ConfigError(f"{where}: {what}", remedy=remedy)

    def _syntax_error(self, error: yaml.MarkedYAMLError) -> ConfigError:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        problem = " ".join(str(error.problem or error).split())
        if "\\t" in problem:
            return self._error(line, "a tab where YAML allows none", "Indent with spaces")
        if "but found another document" in problem:
            return self._error(line, "a second document begins here", "Write one document per file")
        return self._error(line, f"not YAML: {problem}", "Quote text that has other meanings")


def _as_number(text: str) -> str | None:
    """How to write the number that `text` is for people and for other YAML readers."""
    if match := _EXPONENT.fullmatch(text):
        digits, fraction, sign, exponent = match.groups()
        return f"{digits}{fraction or '.0'}e{sign or '+'}{exponent}"
    try:
        if re.match("(?i)[-+]?0[xb]", text):
            return str(int(text, 0))
        digits = text.replace("_", "") if re.match(r"[-+]?\.?[0-9]", text) else text
        return digits if math.isfinite(float(digits)) else None
    except (ValueError, OverflowError):
        return None


def _is_relative_path(value: str, rest: str) -> bool:
    """Whether a variable's value, followed by `rest`, is a path from the current folder."""
    if Path(value).is_absolute() or "://" in value:
        return False
    return rest.startswith("/") or "/" in value or value in (".", "..") or Path(value).exists()
