"""TensorRT's names in source text, held against the lists of its versions.

TensorRT can't be imported where our code is checked, and its objects have no types there. So two
conventions tell what is TensorRT's: the module is called `trt` (`self._trt` too), and in a file
that knows `trt`, or has "tensorrt" in its path, the names in `OBJECTS` are its objects (`config`,
`self._config`), unless they are imported or annotated as something else than `Any`.

Every name must be in every version that can reach it. Guards narrow the versions:
`hasattr(config, "build_route")` and `has(trt, "a capability")` in an `if`, an `and`, a conditional
expression, or with `not` before an early return. `getattr(trt.BuilderFlag, "TF32", None)` wants a
version that has the name. What is not seen: objects under other names, names that are no literals,
and the arguments of calls.
"""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tests.tensorrt_api.listing import READ_ONLY, Listing

OBJECTS = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "builder_config": "IBuilderConfig",
    "context": "IExecutionContext",
    "execution_context": "IExecutionContext",
    "engine": "ICudaEngine",
    "host_memory": "IHostMemory",
    "inspector": "EngineInspector",
    "network": "INetworkDefinition",
    "optimization_profile": "IOptimizationProfile",
    "profile": "IOptimizationProfile",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "runtime": "Runtime",
    "runtime_config": "IRuntimeConfig",
    "serialization_config": "ISerializationConfig",
    "timing_cache": "ITimingCache",
}
MODULES = ("tensorrt", "tensorrt_rtx")

# Whether a TensorRT version, "10.3.0", has a capability that our code names; KeyError: unknown.
Has = Callable[[str, str], bool]
# A class ("" is the module), and the names that are looked up from there.
Chain = tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """A name that TensorRT lacks.

    Attributes:
        file: File that uses it.
        line: Its line there.
        what: The name, and the versions that lack it.
    """

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


def find_missing(
    source: str, file: str, listings: Mapping[str, Listing], has: Has
) -> list[Finding]:
    """Return the uses of names that a TensorRT version lacks.

    Args:
        source: Text of a Python file.
        file: Its name, for the findings.
        listings: The versions' names.
        has: Answers for `has(trt, "a capability")`.
    """
    tree = ast.parse(source)
    checker = _Checker(
        file, listings, has, _own_names(tree) if _knows(tree, file) else set(OBJECTS)
    )
    checker.visit(tree)
    return checker.findings


def uses_tensorrt(source: str) -> bool:
    """Whether a file has the module as `trt`."""
    return any(_names_module(node) for node in ast.walk(ast.parse(source)))


def _knows(tree: ast.Module, file: str) -> bool:
    return "tensorrt" in file or any(_names_module(node) for node in ast.walk(tree))


def _names_module(node: ast.AST) -> bool:
    return _plain_name(node) == "trt" or (isinstance(node, ast.arg) and node.arg == "trt")


def _plain_name(node: ast.AST) -> str:
    """`config` of `config` and of `self._config`, else ""."""
    name = {ast.Name: "id", ast.Attribute: "attr"}.get(type(node))
    return str(getattr(node, name)).lstrip("_") if name else ""


def _own_names(tree: ast.AST) -> set[str]:
    """Names that are imported, or annotated as something else than a TensorRT object."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.AnnAssign) and not _is_any(node.annotation):
            names.add(_plain_name(node.target))
        elif isinstance(node, ast.arg) and node.annotation and not _is_any(node.annotation):
            names.add(node.arg)
    return names


def _is_any(annotation: ast.expr) -> bool:
    return ast.unparse(annotation) in ("Any", "Any | None", "object")


def _leaves(body: Sequence[ast.stmt]) -> bool:
    """Whether a block never reaches its end."""
    return isinstance(body[-1], ast.Return | ast.Raise | ast.Continue | ast.Break)


class _Checker(ast.NodeVisitor):
    """Walks a file; `_versions` are those that can reach the place where it is."""

    def __init__(
        self, file: str, listings: Mapping[str, Listing], has: Has, own_names: set[str]
    ) -> None:
        self.findings: list[Finding] = []
        self._file, self._listings, self._has = file, listings, has
        self._own_names = own_names
        self._versions = frozenset(listings)

    def generic_visit(self, node: ast.AST) -> None:
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                self._visit_block(value)
            else:
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        self.visit(child)

    def _visit_block(self, body: Sequence[ast.stmt]) -> None:
        with self._only(self._versions):
            for statement in body:
                self.visit(statement)
                if isinstance(statement, ast.If) and _leaves(statement.body):
                    self._versions &= self._split(statement.test)[1]

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        for body, versions in zip((node.body, node.orelse), self._split(node.test), strict=True):
            with self._only(versions):
                self._visit_block(body)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.visit(node.test)
        for value, versions in zip((node.body, node.orelse), self._split(node.test), strict=True):
            with self._only(versions):
                self.visit(value)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        goes_on_if = 0 if isinstance(node.op, ast.And) else 1
        with self._only(self._versions):
            for value in node.values:
                self.visit(value)
                self._versions &= self._split(value)[goes_on_if]

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name in MODULES and alias.asname != "trt":
                self._report(node, f"import {alias.name} as trt, or its names can't be checked")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module in MODULES and not node.level:
            self._report(node, f"import {node.module} as trt, or its names can't be checked")

    def visit_Name(self, node: ast.Name) -> None:
        """A name alone looks nothing up."""

    def visit_Attribute(self, node: ast.Attribute) -> None:
        chain = self._chain(node)
        if chain is None:
            self.generic_visit(node)
            return
        self._require(node, chain, stored=isinstance(node.ctx, ast.Store))
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            root = root.value
        self.visit(root)

    def visit_Call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" as function),
                args=[owner, ast.Constant(value=str(name)), *default],
            ) if (chain := self._chain(owner)) is not None:
                self.visit(owner)
                if function == "getattr" and not default:
                    self._require(node, (*chain, name))
                elif not any(self._having((*chain, name))):
                    self._report(node, f"{_text(chain, name)}: no TensorRT version has it")
                for value in default:
                    self.visit(value)
            case _:
                self.generic_visit(node)

    def _chain(self, node: ast.expr) -> Chain | None:
        """The class and the names that an expression looks up; None if it isn't TensorRT's."""
        if isinstance(node, ast.Attribute):
            chain = self._chain(node.value)
            if chain is not None:
                return (*chain, node.attr)
        name = _plain_name(node)
        if name == "trt":
            return ("",)
        if name in OBJECTS and name not in self._own_names:
            return (OBJECTS[name],)
        return None

    def _require(self, node: ast.AST, chain: Chain, *, stored: bool = False) -> None:
        """Report a chain that a version lacks, or can't assign to."""
        lacking: dict[str, list[str]] = {}
        fixed = []
        for version, listing in self._listings.items():
            if version not in self._versions:
                continue
            found, missing = _look_up(listing, chain)
            if missing:
                lacking.setdefault(missing, []).append(version)
            elif stored and listing.names.get(found) == READ_ONLY:
                fixed.append(version)
        for name, versions in lacking.items():
            self._report(node, f"{name} is not in TensorRT {', '.join(versions)}")
        if fixed:
            self._report(node, f"{_text(chain)} can't be assigned in TensorRT {', '.join(fixed)}")

    def _having(self, chain: Chain) -> frozenset[str]:
        return frozenset(
            v for v, listing in self._listings.items() if not _look_up(listing, chain)[1]
        )

    def _split(self, test: ast.expr) -> tuple[frozenset[str], frozenset[str]]:
        """The versions in which a condition may be true, and those in which it may be false."""
        everywhere = frozenset(self._listings)
        match test:
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                true, false = self._split(operand)
                return false, true
            case ast.BoolOp(op=op, values=values):
                trues, falses = zip(*map(self._split, values), strict=True)
                if isinstance(op, ast.And):
                    return everywhere.intersection(*trues), frozenset().union(*falses)
                return frozenset().union(*trues), everywhere.intersection(*falses)
            case ast.Call(
                func=ast.Name(id="hasattr"), args=[owner, ast.Constant(value=str(name))]
            ) if (chain := self._chain(owner)) is not None:
                having = self._having((*chain, name))
                return having, everywhere - having
            case ast.Call(
                func=ast.Name(id="has") | ast.Attribute(attr="has"),
                args=[module, ast.Constant(value=str(capability))],
            ) if self._chain(module) == ("",):
                having = self._capable(test, capability)
                return having, everywhere - having
        return everywhere, everywhere

    def _capable(self, node: ast.AST, capability: str) -> frozenset[str]:
        try:
            return frozenset(
                v for v, listing in self._listings.items() if self._has(listing.version, capability)
            )
        except KeyError:
            self._report(node, f"there is no capability {capability!r}")
            return frozenset(self._listings)

    @contextmanager
    def _only(self, versions: frozenset[str]) -> Iterator[None]:
        before = self._versions
        self._versions = before & versions
        yield
        self._versions = before

    def _report(self, node: ast.AST, what: str) -> None:
        finding = Finding(self._file, getattr(node, "lineno", 0), what)
        if finding not in self.findings:
            self.findings.append(finding)


def _look_up(listing: Listing, chain: Chain) -> tuple[str, str]:
    """Follow a chain of names; return where it leads, and the first name that is missing or ""."""
    owner, *names = chain
    for name in names:
        if name.startswith("__") or (owner and not listing.is_class(owner)):
            break  # every object has the first, and of a value's type the list says nothing
        found = listing.find(owner, name)
        if found is None:
            return owner, _text((owner, name))
        owner = found
    return owner, ""


def _text(chain: Chain, *names: str) -> str:
    return ".".join(filter(None, (*chain, *names)))
