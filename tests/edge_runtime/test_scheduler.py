"""What the scheduler promises, on cascades whose logits and times are set by the test."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edge_runtime as er
from edge_runtime import (
    BackendError,
    Cascade,
    ConfigError,
    Exit,
    InputError,
    OperatingPoint,
    Scheduler,
    Stage,
    TensorSpec,
)
from edge_runtime.backends.fake import FakeBackend
from edge_runtime.timing import FakeClock
from tests.toys import toy_bundle, toy_cascade, toy_images

IMAGE = TensorSpec("image", ("batch", 3), "float32")
CONFIDENT, UNSURE = 5.0, 0.5


def chain(exits: int = 3) -> Cascade:
    """Segment i reads segment i-1 and feeds head i."""
    stages: list[Stage] = []
    before = IMAGE
    for i in range(exits):
        features = TensorSpec(f"f{i}", ("batch", 3), "float32")
        logits = TensorSpec(f"l{i}", ("batch", 3), "float32")
        stages += [
            Stage(f"segment{i}", "segment", (before,), (features,)),
            Stage(f"head{i}", "head", (features,), (logits,)),
        ]
        before = features
    names = tuple(Exit(f"exit{i}", f"l{i}") for i in range(exits))
    return Cascade(("a", "b", "c"), IMAGE, tuple(stages), names)


def chain_backend(
    exits: int = 3, seconds: dict[str, float] | None = None, clock: FakeClock | None = None
) -> FakeBackend:
    """Segments pass the image on; head i answers class i, confident where image[:, i] > 0."""

    def segment(i: int):
        return lambda inputs: {f"f{i}": next(iter(inputs.values()))}

    def head(i: int):
        def logits(inputs):
            (features,) = inputs.values()
            out = np.zeros((len(features), 3), np.float32)
            out[:, i] = np.where(features[:, i] > 0, CONFIDENT, UNSURE)
            return {f"l{i}": out}

        return logits

    functions = {f"segment{i}": segment(i) for i in range(exits)}
    functions |= {f"head{i}": head(i) for i in range(exits)}
    return FakeBackend(functions, seconds=seconds, clock=clock)


def point(**thresholds: float | None) -> OperatingPoint:
    return OperatingPoint("test", thresholds=thresholds or {"exit0": 0.9, "exit1": 0.9})


def opened(op: OperatingPoint | None = None, **options) -> Scheduler:
    return Scheduler(chain(), chain_backend(**options), op or point()).open()


def image(*confident_at: int) -> np.ndarray:
    row = np.zeros(3, np.float32)
    row[list(confident_at)] = 1
    return row


def names(prediction: er.Prediction) -> list[str]:
    return [run.stage for run in prediction.trace.stages]


@pytest.mark.parametrize(
    ("confident_at", "exit_", "ended"),
    [((0, 1, 2), "exit0", "confident"), ((1,), "exit1", "confident"), ((), "exit2", "last")],
)
def test_stops_at_the_first_confident_exit(confident_at, exit_, ended) -> None:
    with opened() as cascade:
        prediction = cascade(image(*confident_at))
    depth = int(exit_[-1])
    assert (prediction.exit, prediction.trace.ended) == (exit_, ended)
    assert prediction.label == depth
    assert prediction.name == "abc"[depth]
    assert names(prediction) == [f"{k}{i}" for i in range(depth + 1) for k in ("segment", "head")]
    assert [run.exit for run in prediction.trace.exits] == [f"exit{i}" for i in range(depth + 1)]
    softmax = np.exp(CONFIDENT if confident_at else UNSURE)
    assert prediction.confidence == pytest.approx(softmax / (softmax + 2), rel=1e-6)


def test_a_signal_equal_to_its_threshold_leaves() -> None:
    signal = np.float32(1) / (np.float32(1) + 2 * np.exp(np.float32(-CONFIDENT)))
    with opened(point(exit0=float(signal))) as cascade:
        assert cascade(image(0)).exit == "exit0"
    with opened(point(exit0=float(np.nextafter(signal, np.float32(2))))) as cascade:
        assert cascade(image(0)).exit == "exit2"


@pytest.mark.parametrize("threshold", [None, 1.5])
def test_an_exit_that_cannot_fire_is_pruned_with_its_head(threshold) -> None:
    with opened(point(exit0=threshold, exit1=0.9)) as cascade:
        prediction = cascade(image(0, 1))
    assert names(prediction) == ["segment0", "segment1", "head1"]
    assert cascade.plan.pruned == ("head0", "segment2", "head2")[:1]


def test_what_lies_behind_a_certain_exit_is_pruned() -> None:
    with opened(point(exit0=0.0)) as cascade:
        assert cascade.plan.pruned == ("segment1", "head1", "segment2", "head2")
        assert cascade(image()).trace.ended == "last"


def test_never_runs_the_last_exit_alone() -> None:
    with opened(OperatingPoint("base", policy="never")) as cascade:
        assert names(cascade(image(0))) == ["segment0", "segment1", "segment2", "head2"]


@pytest.mark.parametrize("name", ["exit0", "exit1", "exit2"])
def test_forced(name) -> None:
    with opened(OperatingPoint.forced(chain(), name)) as cascade:
        prediction = cascade(image())
        assert prediction.exit == name
        assert len(prediction.trace.exits) == 1


def test_all_exits_are_evaluated_and_none_taken() -> None:
    with opened(OperatingPoint.all_exits(chain())) as cascade:
        prediction = cascade(image(0, 1, 2))
    assert len(prediction.trace.exits) == 3
    assert prediction.exit == "exit2"


def test_patience_counts_agreement() -> None:
    """Each head of the chain names another class when confident; unsure heads do as well."""
    cascade = chain()
    same = {
        f"head{i}": lambda inputs, i=i: {
            f"l{i}": np.tile(np.float32([1, 0, 0]), (len(inputs[f"f{i}"]), 1))
        }
        for i in range(3)
    }
    backend = chain_backend()
    backend._functions.update(same)
    op = OperatingPoint("patient", policy="patience", patience=1)
    with Scheduler(cascade, backend, op) as runner:
        assert runner(image()).exit == "exit1"


def test_patient_and_confident_needs_confident_exits_in_a_row() -> None:
    thresholds = {"exit0": 0.9, "exit1": 0.9}
    op = OperatingPoint("pc", policy="patient_and_confident", thresholds=thresholds, patience=2)
    with opened(op) as cascade:
        assert cascade(image(0, 1)).exit == "exit1"
        assert cascade(image(1)).exit == "exit2"


def test_temperature_softens_confidence_not_the_label() -> None:
    op = OperatingPoint("t", thresholds={"exit0": 0.9}, temperatures={"exit0": 100.0})
    with opened(op) as cascade:
        prediction = cascade(image(0))
    assert prediction.exit == "exit2"
    assert prediction.trace.exits[0].confidence == pytest.approx(1 / 3, abs=0.02)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=9))
def test_a_batch_is_its_images(rows) -> None:
    images = np.array(rows, np.float32)
    with opened() as cascade:
        together = cascade(images)
        alone = [cascade(row) for row in images]
    for a, b in zip(together, alone, strict=True):
        assert (a.label, a.exit, a.confidence) == (b.label, b.exit, b.confidence)
        assert [run[:4] for run in a.trace.exits] == [run[:4] for run in b.trace.exits]
        assert names(a) == names(b)
        assert a.trace.ended == b.trace.ended


def test_the_trace_counts_the_samples_left_after_compaction() -> None:
    images = np.array([image(0), image(1), image(), image(0)])
    with opened() as cascade:
        last = cascade(images)[2]
    assert [run.batch for run in last.trace.stages] == [4, 4, 2, 2, 1, 1]


def test_a_backend_that_loses_rows_would_be_noticed() -> None:
    """The order of answers is the order of images, whoever leaves first."""
    images = np.array([image(), image(0), image(1), image(), image(0)])
    with opened() as cascade:
        assert [p.exit[-1] for p in cascade(images)] == ["2", "0", "1", "2", "0"]


class TestDeadline:
    """An answer by T, the deepest that is expected to be ready."""

    SECONDS: ClassVar = {f"{kind}{i}": 0.010 for i in range(3) for kind in ("segment", "head")}

    def scheduler(self, clock: FakeClock, seconds: dict[str, float] | None = None) -> Scheduler:
        backend = chain_backend(seconds=seconds or self.SECONDS, clock=clock)
        return Scheduler(chain(), backend, point(), clock=clock).open()

    @pytest.mark.parametrize(
        ("deadline_s", "exit_", "ended", "missed"),
        [
            (0.070, "exit2", "last", False),
            (0.059, "exit1", "deadline", False),
            (0.039, "exit0", "deadline", False),
            (0.015, "exit0", "deadline", True),
        ],
    )
    def test_the_deepest_exit_in_time_answers(self, deadline_s, exit_, ended, missed) -> None:
        prediction = self.scheduler(FakeClock())(image(), deadline_s=deadline_s)
        assert (prediction.exit, prediction.trace.ended) == (exit_, ended)
        assert prediction.deadline_missed is missed
        assert prediction.latency_s <= max(deadline_s, 0.020) + 1e-9

    def test_a_confident_exit_still_leaves_early(self) -> None:
        prediction = self.scheduler(FakeClock())(image(0), deadline_s=0.030)
        assert (prediction.exit, prediction.trace.ended) == ("exit0", "confident")

    def test_without_a_deadline_nothing_is_missed(self) -> None:
        assert not self.scheduler(FakeClock())(image()).deadline_missed

    def test_the_wall_clock_decides_before_each_stage(self) -> None:
        """A step that turns out slower than expected is left between its stages."""
        clock = FakeClock()
        cascade = self.scheduler(clock)
        cascade.backend._seconds["segment2"] = 0.050
        prediction = cascade(image(), deadline_s=0.065)
        assert prediction.exit == "exit1"
        assert names(prediction)[-1] == "segment2"
        assert prediction.deadline_missed

    def test_a_slow_step_is_tried_again_after_a_while(self) -> None:
        clock = FakeClock()
        cascade = self.scheduler(clock)
        cascade.backend._seconds["head2"] = 0.500
        assert cascade(image(), deadline_s=1.0).deadline_missed is False
        cascade.backend._seconds["head2"] = 0.010
        assert cascade(image(), deadline_s=0.070).exit == "exit1"
        exits = [cascade(image(), deadline_s=0.070).exit for _ in range(60)]
        assert exits[-1] == "exit2"

    @pytest.mark.parametrize("deadline_s", [0.0, -1.0, float("nan")])
    def test_a_deadline_lies_in_the_future(self, deadline_s) -> None:
        with pytest.raises(InputError, match="deadline_s"):
            self.scheduler(FakeClock())(image(), deadline_s=deadline_s)

    def test_latency_of_a_batch_is_per_sample(self) -> None:
        first, second = self.scheduler(FakeClock())(np.array([image(0), image()]))
        assert first.latency_s == pytest.approx(0.020)
        assert second.latency_s == pytest.approx(0.060)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((2, 5), np.float32), "shape: got \\(2, 5\\)"),
        (np.zeros((0, 3), np.float32), "the batch is empty"),
        (np.zeros((2, 3), np.float64), "dtype: got float64, expected float32"),
        (np.full((1, 3), np.nan, np.float32), "NaN or infinite"),
        (np.full(3, np.inf, np.float32), "NaN or infinite"),
        ([[0.0, 0.0, 0.0]], "got list, expected a numpy.ndarray"),
    ],
)
def test_bad_input_is_refused(bad, message) -> None:
    with opened() as cascade, pytest.raises(InputError, match=message):
        cascade(bad)


def test_bad_camera_images_are_refused() -> None:
    cascade = toy_cascade()
    op = OperatingPoint("base", policy="never")
    with Scheduler(cascade, FakeBackend(), op, image_size=(5, 7)) as runner:
        for bad in (toy_images(1, height=6), toy_images(1)[..., :1], toy_images(1)[0, :, :, 0]):
            with pytest.raises(InputError, match="shape"):
                runner(bad)
        with pytest.raises(InputError, match="dtype: got float32, expected uint8"):
            runner(toy_images(1).astype(np.float32))


def test_an_open_image_size_must_be_given() -> None:
    with pytest.raises(ConfigError, match="image_size=\\(height, width\\)"):
        Scheduler(toy_cascade(), FakeBackend(), OperatingPoint("base", policy="never")).open()


def test_a_cascade_without_an_image_has_no_image_size() -> None:
    with pytest.raises(ConfigError, match="takes no image"):
        Scheduler(chain(), chain_backend(), point(), image_size=(2, 2)).open()


def test_a_fixed_image_size_may_not_be_changed() -> None:
    image = TensorSpec("image", ("batch", 8, 8, 3), "uint8")
    logits = TensorSpec("logits", ("batch", 2), "float32")
    cascade = Cascade(
        ("a", "b"), image, (Stage("s", "saver", (image,), (logits,)),), (Exit("e", "logits"),)
    )
    op = OperatingPoint("base", policy="never")
    with pytest.raises(ConfigError, match="got 9x8, expected 8x8, which the bundle fixes"):
        Scheduler(cascade, FakeBackend(), op, image_size=(9, 8)).open()
    Scheduler(cascade, FakeBackend(), op, image_size=(8, 8)).open().close()


def test_non_finite_logits_name_exit_and_stage() -> None:
    backend = chain_backend()
    with Scheduler(chain(), backend, point()) as cascade:
        backend._functions["head1"] = lambda inputs: {"l1": np.float32([[np.nan, 0, 0]])}
        with pytest.raises(BackendError, match="exit 'exit1': the logits of sample 0") as caught:
            cascade(image())
        assert caught.value.stage == "head1"
        assert cascade(image(0)).exit == "exit0"


def test_a_closed_cascade_says_so() -> None:
    cascade = opened()
    cascade.close()
    cascade.close()
    with pytest.raises(BackendError, match="closed"):
        cascade(image())
    with cascade:
        assert cascade(image(0)).exit == "exit0"


def test_it_can_t_be_opened_twice() -> None:
    with opened() as cascade:
        with pytest.raises(BackendError, match="open already"):
            cascade.open()
        assert cascade(image(0)).exit == "exit0"


def test_a_failed_open_closes_the_backend() -> None:
    backend = chain_backend()
    backend._functions["head2"] = lambda inputs: {"l2": np.float32([[np.inf, 0, 0]])}
    with pytest.raises(BackendError):
        Scheduler(chain(), backend, point()).open()
    with pytest.raises(BackendError, match="not open"):
        backend.feed(image()[None])


def test_threads_take_turns() -> None:
    rng = np.random.default_rng(0)
    with opened() as cascade:
        work = [rng.integers(0, 2, (7, 3)).astype(np.float32) for _ in range(8)]
        want = [[p.exit for p in cascade(images)] for images in work]
        got: list[list[list[str]]] = [[] for _ in work]

        def repeat(i: int) -> None:
            for _ in range(50):
                got[i].append([p.exit for p in cascade(work[i])])

        threads = [threading.Thread(target=repeat, args=(i,)) for i in range(len(work))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(found == [want[i]] * 50 for i, found in enumerate(got))


def test_logits_of_every_exit() -> None:
    with opened(OperatingPoint.all_exits(chain())) as cascade:
        found = cascade.logits(np.array([image(0), image(2)]))
    assert list(found) == ["exit0", "exit1", "exit2"]
    np.testing.assert_array_equal(found["exit0"][:, 0], np.float32([CONFIDENT, UNSURE]))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> er.Bundle:
    return toy_bundle(tmp_path_factory.mktemp("toy") / "toy.bundle")


class TestOnOnnxRuntime:
    """The same promises on real models."""

    def test_batch_1_and_batch_64_leave_at_the_same_exits(self, bundle: er.Bundle) -> None:
        images = toy_images(64)
        op = OperatingPoint("test", thresholds={"saver": 0.49, "middle": 0.45})
        with er.load(bundle, operating_point=op, image_size=(5, 7)) as cascade:
            together = cascade(images)
            alone = [cascade(one) for one in images]
        assert len({p.exit for p in together}) == 3
        limits = {"saver": 0.49, "middle": 0.45}
        for a, b in zip(together, alone, strict=True):
            near = any(abs(e.signal - limits.get(e.exit, 9)) < 1e-6 for e in b.trace.exits)
            assert near or (a.exit, a.label) == (b.exit, b.label)

    def test_load_by_path_and_forced(self, bundle: er.Bundle) -> None:
        op = OperatingPoint.forced(bundle.cascade, "middle")
        with er.load(bundle.path, operating_point=op, image_size=(5, 7)) as cascade:
            prediction = cascade(toy_images(1)[0])
        assert names(prediction) == ["preprocess", "segment1", "head1"]
        assert prediction.trace.backend == "onnxrt"

    def test_a_bundle_without_the_default_point_says_how_to_get_one(
        self, bundle: er.Bundle
    ) -> None:
        with pytest.raises(er.ManifestError, match="edge-runtime thresholds"):
            er.load(bundle, image_size=(5, 7))

    def test_an_unknown_backend(self, bundle: er.Bundle, tmp_path: Path) -> None:
        op = OperatingPoint("base", policy="never")
        with pytest.raises(ConfigError, match=r"no backend 'onnxrtt'\. Did you mean 'onnxrt'"):
            er.load(bundle, backend="onnxrtt", operating_point=op)
