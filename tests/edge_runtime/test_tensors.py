"""TensorSpec: what it refuses, what meets, and arrays at run time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError, InputError
from edge_runtime.tensors import DTYPES, TensorSpec
from tests.edge_runtime.bundles import refused

axes = st.one_of(st.integers(1, 5), st.sampled_from(["height", "width"]))
specs = st.builds(
    TensorSpec,
    st.just("x"),
    st.tuples(st.sampled_from(["batch", 1])).flatmap(
        lambda first: st.lists(axes, max_size=3).map(lambda rest: (*first, *rest))
    ),
    st.sampled_from(DTYPES),
)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        ("", ("batch",), "float32", "empty name"),
        ("x", ("batch",), "float64", "dtype: got 'float64', expected bool, uint8"),
        ("x", (), "float32", "first axis"),
        ("x", (2, 3), "float32", "first axis: got [2, 3], expected 'batch'"),
        ("x", ("height", 3), "float32", "first axis"),
        ("x", ("batch", 0), "float32", "shape: got ['batch', 0], expected lengths >= 1"),
        ("x", ("batch", -3), "float32", "shape"),
        ("x", ("batch", ""), "float32", "shape"),
    ],
)
def test_refuses_what_no_stage_could_have(name, shape, dtype, message):
    with refused(ConfigError, message):
        TensorSpec(name, shape, dtype)


def test_resolve_names_lengths():
    spec = TensorSpec("image", ("batch", "height", "width", 3), "uint8")
    assert spec.resolve({"height": 4, "width": 6}).shape == ("batch", 4, 6, 3)
    assert spec.resolve({"height": 4}).shape == ("batch", 4, "width", 3)
    assert spec.resolve({"height": 4, "width": 6}).sample_shape() == (4, 6, 3)


def test_a_sample_shape_needs_lengths():
    with refused(ConfigError, "the length of axis 'width' is not known"):
        TensorSpec("image", ("batch", 4, "width", 3), "uint8").sample_shape()


@pytest.mark.parametrize(
    ("producer", "consumer", "meet"),
    [
        (("batch", 3), ("batch", 3), True),
        (("batch", 3), (1, 3), True),
        (("batch", 3), ("batch", 4), False),
        (("batch", 3), ("batch", 3, 1), False),
        (("batch", "height"), ("batch", 4), True),
        (("batch", 4), ("batch", "height"), True),
    ],
)
def test_meets(producer, consumer, meet):
    found = TensorSpec("x", producer, "float32").meets(TensorSpec("x", consumer, "float32"))
    assert found is meet
    assert not TensorSpec("x", producer, "float32").meets(TensorSpec("x", consumer, "float16"))


@settings(deadline=None)
@given(specs, specs)
def test_meeting_is_symmetric_and_everything_meets_itself(a, b):
    assert a.meets(a)
    assert a.meets(b) == b.meets(a)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ([[1.0, 2.0]], "got list, expected a numpy.ndarray"),
        (np.zeros((1, 2)), "dtype: got float64, expected float32"),
        (np.zeros((1, 2), ">f4"), "dtype: got >f4, expected float32"),
        (np.zeros((1, 3), np.float32), "shape: got (1, 3), expected (batch, 2) float32"),
        (np.zeros(2, np.float32), "shape: got (2,)"),
        (np.float32(1), "got float32"),
        (np.array(1, np.float32), "shape: got ()"),
        (np.zeros((1, 2, 1), np.float32), "shape"),
        (np.zeros((0, 2), np.float32), "the batch is empty"),
        (np.array([[0, np.nan]], np.float32), "NaN or infinite"),
        (np.array([[0, np.inf]], np.float32), "NaN or infinite"),
    ],
)
def test_check_refuses_arrays_that_do_not_fit(array, message):
    with refused(InputError, "input 'x'", message):
        TensorSpec("x", ("batch", 2), "float32").check(array)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 7])
def test_check_returns_the_array_itself(dtype, batch):
    array = np.ones((batch, 4, 2), dtype)
    assert TensorSpec("x", ("batch", "height", 2), dtype).check(array) is array


def test_people_read_shape_and_dtype():
    assert str(TensorSpec("x", ("batch", 3), "uint8")) == "(batch, 3) uint8"
