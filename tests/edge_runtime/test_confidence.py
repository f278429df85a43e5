"""Signals against independent formulas in float64, and what `decide` promises of any logits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from scipy import special

from edge_runtime.confidence import METRICS, Decision, bounds, decide
from edge_runtime.errors import BackendError
from tests.edge_runtime.bundles import refused


def expected(logits: np.ndarray, metric: str, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """(signal, confidence) in float64, by SciPy."""
    scaled = logits.astype(np.float64) / temperature
    softmax = special.softmax(scaled, axis=1)
    top = np.sort(softmax, axis=1)
    if metric == "max_softmax":
        signal = top[:, -1]
    elif metric == "entropy":
        signal = -special.entr(softmax).sum(axis=1)
    elif metric == "softmax_margin":
        signal = top[:, -1] - top[:, -2]
    else:
        raw = np.sort(scaled, axis=1)
        signal = raw[:, -1] - raw[:, -2]
    return signal, top[:, -1]


logits_of = nps.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(2, 12)),
    elements=st.floats(-50, 50, width=32) | st.sampled_from([0.0, 1.0]),
)
finite = nps.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(2, 8)),
    elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
)
temperatures = st.floats(0.25, 20, width=32)


@pytest.mark.parametrize("metric", METRICS)
@settings(deadline=None)
@given(logits=logits_of, temperature=temperatures)
def test_signals_are_those_of_their_formulas(metric, logits, temperature):
    decision = decide(logits, metric, temperature)
    signal, confidence = expected(logits, metric, temperature)
    np.testing.assert_allclose(decision.signal, signal, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(decision.confidence, confidence, rtol=1e-5)
    np.testing.assert_array_equal(decision.labels, logits.argmax(axis=1))


@pytest.mark.parametrize("metric", METRICS)
@settings(deadline=None)
@given(logits=logits_of, temperature=temperatures)
def test_dtypes_shapes_and_bounds(metric, logits, temperature):
    decision = decide(logits, metric, temperature)
    batch, classes = logits.shape
    lowest, highest = bounds(metric, classes)
    assert isinstance(decision, Decision)
    assert (decision.labels.dtype, decision.labels.shape) == (np.int64, (batch,))
    assert (decision.signal.dtype, decision.signal.shape) == (np.float32, (batch,))
    assert (decision.confidence.dtype, decision.confidence.shape) == (np.float32, (batch,))
    assert (decision.signal >= lowest).all()
    assert (decision.signal <= highest).all()
    assert (decision.confidence >= np.float32(1) / np.float32(classes)).all()
    assert (decision.confidence <= 1).all()


@pytest.mark.parametrize("metric", METRICS)
@settings(deadline=None)
@given(logits=finite, temperature=temperatures)
def test_any_finite_logits_are_judged_within_bounds_or_refused(metric, logits, temperature):
    try:
        decision = decide(logits, metric, temperature)
    except BackendError:
        scaled = logits.astype(np.float64) / temperature
        assert max(np.abs(scaled).max(), np.abs(logits).max()) > 1e38
    else:
        lowest, highest = bounds(metric, logits.shape[1])
        assert (decision.signal >= lowest).all()
        assert (decision.signal <= highest).all()


@pytest.mark.parametrize("metric", METRICS)
@settings(deadline=None)
@given(logits=logits_of, temperature=temperatures)
def test_a_sample_is_judged_alone_as_in_a_batch(metric, logits, temperature):
    whole = decide(logits, metric, temperature)
    for row in range(len(logits)):
        alone = decide(logits[row : row + 1], metric, temperature)
        assert alone.signal[0] == whole.signal[row]
        assert alone.labels[0] == whole.labels[row]


@pytest.mark.parametrize("metric", METRICS)
@settings(deadline=None)
@given(logits=logits_of)
def test_float16_is_judged_as_the_float32_of_the_same_value(metric, logits):
    half = logits.astype(np.float16)
    np.testing.assert_array_equal(
        decide(half, metric, 1.5).signal, decide(half.astype(np.float32), metric, 1.5).signal
    )


@pytest.mark.parametrize("metric", METRICS)
@settings(deadline=None)
@given(logits=logits_of)
def test_a_higher_temperature_is_never_more_confident(metric, logits):
    cold, warm = decide(logits, metric, 1.0), decide(logits, metric, 4.0)
    assert (warm.signal <= cold.signal + 1e-5).all()


@settings(deadline=None)
@given(logits=finite, temperature=st.floats(2**-10, 2**20, width=32))
def test_labels_do_not_depend_on_the_temperature(logits, temperature):
    try:
        decision = decide(logits, "max_softmax", temperature)
    except BackendError:
        return
    np.testing.assert_array_equal(decision.labels, logits.argmax(axis=1))


def test_labels_of_neighbouring_numbers_survive_the_division():
    low = np.float32(1.75)
    pairs = []
    for _ in range(4):
        high = np.nextafter(low, np.float32(2))
        pairs.append([low, high])
        low = high
    logits = np.array(pairs)
    divided = logits / np.float32(1.5)
    assert (divided[:, 0] == divided[:, 1]).any()
    assert decide(logits, "max_softmax", 1.5).labels.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_lowest_index_wins_a_tie(metric, dtype):
    decision = decide(np.array([[1, 5, 5], [5, 5, 5], [0, 1, 1]], dtype), metric)
    assert decision.labels.tolist() == [1, 0, 1]
    if metric.endswith("margin"):
        assert decision.signal.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("metric", "sure", "unsure"),
    [
        ("max_softmax", 1.0, 0.25),
        ("entropy", 0.0, -np.log(4)),
        ("softmax_margin", 1.0, 0.0),
        ("logits_margin", 200.0, 0.0),
    ],
)
def test_the_ends_of_the_scale(metric, sure, unsure):
    decision = decide(np.array([[0, 200, 0, 0], [7, 7, 7, 7]], np.float32), metric)
    np.testing.assert_allclose(decision.signal, [sure, unsure], rtol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("others", [0.0, np.inf, -np.inf])
def test_non_finite_logits_are_an_error_that_names_the_sample(
    metric, dtype, value, temperature, others
):
    logits = np.zeros((4, 3), dtype)
    logits[2, 1] = value
    logits[2, 2] = others
    with refused(BackendError, "the logits of sample 2 of the batch are NaN, infinite"):
        decide(logits, metric, temperature)


@pytest.mark.parametrize("metric", METRICS)
def test_logits_beyond_float32_are_an_error_too(metric):
    with refused(BackendError, "sample 0 of the batch"):
        decide(np.array([[3e38, -3e38]], np.float32), metric)
    with refused(BackendError, "sample 1 of the batch"):
        decide(np.array([[1, 2], [3e38, 0]], np.float32), metric, 0.1)


@pytest.mark.parametrize("metric", METRICS)
def test_the_logits_are_left_alone(metric):
    logits = np.array([[1, 2, 3]], np.float32)
    logits.flags.writeable = False
    decide(logits, metric, 2.0)
    assert logits.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("classes", [2, 10, 1000, 100_000])
@pytest.mark.parametrize("metric", METRICS)
def test_a_uniform_distribution_is_within_bounds_for_many_classes(metric, classes):
    logits = np.full((1, classes), 0.1, np.float32)
    lowest, highest = bounds(metric, classes)
    assert lowest <= decide(logits, metric).signal[0] <= highest


@pytest.mark.parametrize("metric", METRICS)
@settings(deadline=None)
@given(logits=finite, temperature=temperatures)
def test_one_sample_is_judged_bit_for_bit_as_in_a_batch(metric, logits, temperature):
    try:
        together = decide(logits, metric, temperature)
    except BackendError:
        return
    for row, sample in enumerate(logits):
        alone = decide(sample, metric, temperature)
        assert np.shape(alone.labels) == np.shape(alone.signal) == ()
        assert alone.labels == together.labels[row]
        assert alone.signal == together.signal[row]
        assert alone.confidence == together.confidence[row]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_sample_that_is_not_finite_is_refused(bad):
    with pytest.raises(BackendError, match="NaN, infinite"):
        decide(np.float32([0, bad, 1]), "max_softmax")
