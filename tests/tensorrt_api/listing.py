"""The list of a TensorRT version's names: made from its module, read from its file.

As a program it prints the list of the module `tensorrt` in a folder: `listing.py FOLDER WHEEL`.
"""

import importlib
import inspect
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).parent

READ_ONLY = "read-only property"


@dataclass(frozen=True)
class Listing:
    """The public names of one TensorRT version.

    Attributes:
        wheel: Distribution and exact version that the list was made from.
        python: Python version of that wheel, e.g. "3.11".
        names: Dotted name, such as `BuilderFlag.TF32` -> the value of an enum's member, or what it
            is: `class`, `class(ILayer)` with its bases, `enum`, `method`, `property`, `read-only
            property`, `function`, `constant`, or `= Name` for a second name of something.
    """

    wheel: str
    python: str
    names: dict[str, int | str]

    @property
    def version(self) -> str:
        """TensorRT's exact version."""
        return self.wheel.partition(" ")[2]

    def find(self, owner: str, name: str) -> str | None:
        """Return where `owner.name` stands in the list, None if this version has no such name.

        Args:
            owner: Dotted name of a class, or "" for the module.
            name: One name; a class has those of its bases too.
        """
        dotted = f"{owner}.{name}" if owner else name
        if dotted in self.names:
            what = str(self.names[dotted])
            return what.removeprefix("= ") if what.startswith("= ") else dotted
        bases = str(self.names.get(owner, "")).partition("(")[2].rstrip(")")
        found = (self.find(base, name) for base in bases.split(", ") if base)
        return next((place for place in found if place is not None), None)

    def is_class(self, dotted: str) -> bool:
        """Whether a name of the list is a class or an enum."""
        return str(self.names[dotted]).partition("(")[0] in ("class", "enum")


def read_listings() -> dict[str, Listing]:
    """Return the committed lists by their minor versions, oldest first: 10.3, 10.13, ..."""
    files = sorted(FOLDER.glob("*.json"), key=lambda file: [*map(int, file.stem.split("."))])
    return {file.stem: Listing(**json.loads(file.read_text(encoding="utf-8"))) for file in files}


def list_module(trt: ModuleType) -> dict[str, int | str]:
    """Return the names of a TensorRT module, sorted.

    Left out are names with an underscore in front, modules, and the properties `name` and `value`
    that all enums have.
    """
    names: dict[str, int | str] = {}
    for name, value in vars(trt).items():
        if not name.startswith("_") and not inspect.ismodule(value):
            _add(names, name, value)
    return dict(sorted(names.items()))


def _add(names: dict[str, int | str], dotted: str, value: Any) -> None:
    """Add one name, and those of the class that it may be."""
    if not inspect.isclass(value):
        names[dotted] = _describe(dotted, value)
    elif value.__qualname__ != dotted:
        names[dotted] = f"= {value.__qualname__}"
    else:
        bases = ", ".join(base.__qualname__ for base in value.__bases__ if _is_ours(base))
        names[dotted] = ("enum" if _is_enum(value) else "class") + (f"({bases})" if bases else "")
        for name, member in vars(value).items():
            usual = name in ("name", "value") and _is_enum(value) and isinstance(member, property)
            if not name.startswith("_") and not usual:
                _add(names, f"{dotted}.{name}", member)


def _describe(dotted: str, value: Any) -> int | str:
    """Return what the list says of a name that is no class."""
    if _is_enum(type(value)):
        owner, _, name = dotted.rpartition(".")
        enum, members = type(value).__qualname__, type(value).__members__
        if owner == enum and name in members:
            return int(value)
        return f"= {enum}.{next(name for name, member in members.items() if member == value)}"
    if isinstance(value, property):
        return READ_ONLY if value.fset is None else "property"
    if callable(value) or isinstance(value, staticmethod):
        return "method" if "." in dotted else "function"
    return "constant"


def _is_enum(value: type) -> bool:
    return _is_ours(value) and hasattr(value, "__members__")


def _is_ours(value: type) -> bool:
    return value.__module__.partition(".")[0] == "tensorrt"


def main(folder: str, wheel: str) -> None:
    """Print the list of the module `tensorrt` in a folder."""
    sys.path.insert(0, folder)
    names = list_module(importlib.import_module("tensorrt"))
    python = ".".join(map(str, sys.version_info[:2]))
    content = {"wheel": wheel, "python": python, "names": names}
    sys.stdout.write(json.dumps(content, indent=0) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
