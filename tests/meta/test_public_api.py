"""What `edge_runtime` exports is what it says it exports."""

import __future__

from types import ModuleType

import pytest

import edge_runtime


def test_all_is_sorted_and_complete():
    public = {
        name
        for name, value in vars(edge_runtime).items()
        if not name.startswith("_")
        and not isinstance(value, ModuleType)
        and value is not __future__.annotations
    }
    assert list(edge_runtime.__all__) == sorted(public)


@pytest.mark.parametrize("name", getattr(edge_runtime, "__all__", []))
def test_every_public_name_says_what_it_is(name):
    assert getattr(edge_runtime, name).__doc__
