"""Imports between the four packages go one way."""

import ast

import pytest

from tests.meta.repository import ROOT

LAYERS = ["edge_runtime", "engines", "calib", "bench"]


def imported_packages(source: str) -> set[str]:
    """Return the top-level names of every absolute import in a file, however deep it stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_package_imports_only_what_stands_left_of_it(layer):
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    forbidden = {*LAYERS[LAYERS.index(layer) + 1 :], "tests"}
    found = {
        str(file.relative_to(ROOT)): sorted(wrong)
        for file in files
        if (wrong := imported_packages(file.read_text(encoding="utf-8")) & forbidden)
    }
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import bench",
        "import numpy, bench.latency as latency",
        "from bench.latency import measure",
        "def f():\n    if True:\n        from bench import latency",
        "try:\n    import bench\nexcept ImportError:\n    pass",
    ],
)
def test_every_form_of_import_counts(source):
    assert "bench" in imported_packages(source)


def test_a_relative_import_stays_in_its_package():
    assert imported_packages("from . import bench\nfrom .bench import x") == set()
