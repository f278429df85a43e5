"""The error tree: what its docstring draws, exit codes, and the form of a message."""

import inspect
import re

import pytest

from edge_runtime import errors
from edge_runtime.errors import BackendError, BackendUnavailable, CudaError, EdgeRuntimeError

ALL = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, EdgeRuntimeError)
]


def test_the_docstring_draws_every_error_with_its_bases():
    drawn = {
        match[1]: set(re.findall(r"\w+", match[2] or ""))
        for match in re.finditer(r"─ (\w+)(?: \((\w+)\))?", errors.__doc__)
    }
    assert drawn.keys() == {kind.__name__ for kind in ALL} - {"EdgeRuntimeError"}
    for kind in ALL[1:]:
        others = {
            base.__name__ for base in kind.__bases__ if not issubclass(base, EdgeRuntimeError)
        }
        assert drawn[kind.__name__] == others


@pytest.mark.parametrize("kind", ALL)
def test_every_error_has_an_exit_code_that_the_command_line_knows(kind):
    assert kind.exit_code in (1, 2, 3)


@pytest.mark.parametrize(
    ("kind", "code"),
    [("ConfigError", 2), ("InputError", 2), ("BackendUnavailable", 3), ("ManifestError", 1)],
)
def test_exit_codes(kind, code):
    assert getattr(errors, kind).exit_code == code


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "stage 'a'"),
        ({"got": 1}, "stage 'a': got 1"),
        ({"expected": 2}, "stage 'a': expected 2"),
        ({"got": 0, "expected": 2}, "stage 'a': got 0, expected 2"),
        ({"got": False, "remedy": "Mend it"}, "stage 'a': got False. Mend it"),
        ({"remedy": "Mend it"}, "stage 'a'. Mend it"),
    ],
)
@pytest.mark.parametrize("kind", ALL)
def test_a_message_says_what_got_expected_and_remedy(kind, fields, message):
    error = kind("stage 'a'", **fields)
    assert str(error) == message
    assert error.what == "stage 'a'"
    for name, value in fields.items():
        assert getattr(error, name) == value


def test_a_sentence_keeps_one_full_stop():
    assert str(EdgeRuntimeError("It broke.", remedy="Mend it")) == "It broke. Mend it"


@pytest.mark.parametrize("kind", [BackendError, CudaError])
def test_a_backend_error_names_its_stage(kind):
    assert kind("it failed", stage="head").stage == "head"
    assert kind("it failed").stage is None


def test_a_missing_package_names_its_extra():
    error = errors.missing_package("PyYAML", "cpu")
    assert isinstance(error, BackendUnavailable)
    assert isinstance(error, ImportError)
    assert "PyYAML" in str(error)
    assert "pip install 'edge-runtime[cpu]'" in str(error)
