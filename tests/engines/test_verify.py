"""Verification finds what differs, and names it."""

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import BackendError, EngineBuildError
from edge_runtime.manifest import Bundle
from engines.import_onnx import build
from engines.verify import Report, TensorError, run_model, verify, verify_bundle
from tests.engines.classifiers import residual_classifier
from tests.engines.conftest import chain
from tests.engines.test_import_onnx import IMAGES, recipe_of
from tests.engines.test_one_piece import X, bundle_of, stage


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    stages = [
        stage("s1", "image", "a", factor=2),
        stage("h1", "a", "early.logits", factor=7),
        stage("h2", "a", "late.logits", factor=5),
    ]
    return bundle_of(tmp_path / "b", stages, "early.logits", "late.logits")


def test_reports_every_tensor_that_was_compared(bundle: Bundle) -> None:
    report = verify_bundle(bundle, X, reference={"a": 2 * X, "late.logits": 10 * X})
    assert [(e.tensor, e.stage, e.against) for e in report.errors] == [
        ("a", "s1", "the original"),
        ("late.logits", "h2", "the original"),
        ("early.logits", "h1", "one piece"),
        ("late.logits", "h2", "one piece"),
    ]
    assert (report.samples, report.worst) == (2, 0.0)


def test_errors_are_relative_to_the_largest_magnitude(bundle: Bundle) -> None:
    want = 2 * X
    want[0, 0] += 0.004
    report = verify_bundle(bundle, X, reference={"a": want}, tolerance=1e-2)
    assert report.errors[0].absolute == pytest.approx(0.004, rel=1e-3)
    assert report.errors[0].relative == pytest.approx(0.004 / 8, rel=1e-3)


def test_the_first_tensor_beyond_the_tolerance_is_named(bundle: Bundle) -> None:
    wrong = {"late.logits": 11 * X, "a": 2.001 * X}
    with pytest.raises(EngineBuildError) as error:
        verify_bundle(bundle, X, reference=wrong)
    assert str(error.value) == (
        "tensor 'a' of stage 's1' differs from the original: relative error: got 0.0005, "
        "expected <= 0.0001"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_never_pass(bundle: Bundle, value: float) -> None:
    want = 2 * X
    want[1, 1] = value
    with pytest.raises(EngineBuildError, match="tensor 'a' of stage 's1' differs"):
        verify_bundle(bundle, X, reference={"a": want}, tolerance=10)
    infinite = X.copy()
    infinite[0, 0] = value
    with pytest.raises(EngineBuildError, match="got nan"):
        verify_bundle(bundle, infinite, tolerance=10)


def test_a_tensor_of_zeros_must_be_met(bundle: Bundle) -> None:
    verify_bundle(bundle, 0 * X, reference={"a": 0 * X})
    with pytest.raises(EngineBuildError, match="relative error: got inf"):
        verify_bundle(bundle, X, reference={"a": 0 * X})


def test_another_shape_is_named(bundle: Bundle) -> None:
    with pytest.raises(EngineBuildError, match="against the original: shape: got"):
        verify_bundle(bundle, X, reference={"a": 2 * X[:1]})


def test_a_stage_that_does_not_write_what_it_promises_is_named(bundle: Bundle) -> None:
    models = {r.name: bundle.stage_model(r.name, "fp32") for r in bundle.manifest.stages}
    other = stage("s1", "image", "b").default
    with pytest.raises(BackendError, match="stage 's1' failed"):
        verify(bundle.cascade, models | {"s1": other}, X, {})
    with pytest.raises(BackendError, match=r"stage 's1'.*can't be loaded"):
        verify(bundle.cascade, models | {"s1": b"nothing"}, X, {})
    wide = np.concatenate([X, X], axis=1)
    with pytest.raises(BackendError, match="stage 's1' failed"):
        verify(bundle.cascade, models, wide, {})


def test_a_model_in_one_piece_that_differs_is_named(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that took a wrong weight: the chain is right, the one piece is not."""
    wrong = stage("h", "image", "early.logits", factor=3).default
    monkeypatch.setattr("engines.verify.merge", lambda *_: wrong)
    with pytest.raises(
        EngineBuildError, match=r"'early.logits' of stage 'h1' differs from one piece"
    ):
        verify_bundle(bundle, X)
    assert verify_bundle(bundle, X, with_one_piece=False).errors == ()


def test_provenance_has_the_worst_error_of_each_stage() -> None:
    errors = tuple(
        TensorError("t", stage, "the original", 1.0, relative)
        for stage, relative in (("a", 1e-7), ("b", 3e-6), ("a", 2e-5))
    )
    report = Report(5, 1e-4, errors)
    assert report.worst == 2e-5
    assert report.provenance() == {
        "samples": 5,
        "tolerance": 1e-4,
        "worst_relative_error": {"a": 2e-5, "b": 3e-6},
    }


def test_a_bundle_with_an_altered_weight_is_found(tmp_path: Path) -> None:
    """An import whose second segment is off by 1 % does not pass for the original."""
    bundle = build(recipe_of(tmp_path, (residual_classifier(), {"cut_at": ("a",)})), tmp_path / "b")
    reference = {"m0.logits": chain(bundle, IMAGES)["m0.logits"]}
    models = {
        r.name: bundle.stage_model(r.name, next(iter(r.variants))) for r in bundle.manifest.stages
    }
    verify(bundle.cascade, models, IMAGES, reference)
    import onnx
    from onnx import numpy_helper

    model = onnx.load_model_from_string(models["m0.2"])
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
    with pytest.raises(EngineBuildError, match=r"tensor 'm0.logits' of stage 'm0.2' differs"):
        verify(bundle.cascade, models | {"m0.2": model.SerializeToString()}, IMAGES, reference)


def test_one_sample_at_a_time_gives_a_batch(bundle: Bundle) -> None:
    model = bundle.stage_model("s1", "fp32")
    together = run_model(model, {"image": X}, ["a"])
    singly = run_model(model, {"image": X}, ["a"], single=True)
    np.testing.assert_array_equal(together["a"], singly["a"])
