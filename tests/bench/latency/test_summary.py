"""Figures made of recorded frames."""

from __future__ import annotations

import numpy as np
import pytest

from bench.latency import summary
from bench.latency.rounds import Recording, Rounds, StageRecording
from bench.latency.subjects import Answer
from bench.result import BLOCK
from edge_runtime import OperatingPoint, Prediction
from edge_runtime.prediction import ExitRun, StageRun, Trace
from tests.bench.results import latency_table
from tests.toys import toy_cascade

EXITS = ("saver", "middle", "final")
#: Seconds of a frame that leaves at each exit, and the stages that it runs.
SECONDS = (0.001, 0.004, 0.009)
STAGES = ("preprocess", "saver", "segment1", "head1", "segment2", "head2")
REACHES = (2, 4, 6)


def recording(seconds: np.ndarray, exits: np.ndarray) -> Recording:
    made = Recording(EXITS)
    for s, e in zip(seconds.tolist(), exits.tolist(), strict=True):
        made.add(Answer(s, EXITS[e], e))
    return made


def prediction(left: int, seconds: float, *, known: bool = True) -> Prediction:
    """A frame whose stages share its time evenly, but for a tenth that no stage accounts for."""
    names = STAGES[: REACHES[left]]
    each = 0.9 * seconds / len(names)
    begins = [0.05 * seconds + i * each for i in range(len(names))]
    stages = [
        StageRun(name, "fp32", begin if known else np.nan, each if known else np.nan, 1)
        for name, begin in zip(names, begins, strict=True)
    ]
    ends = [begin + each for begin in begins]
    exits = [
        ExitRun(EXITS[i], i, 1.0, 1.0, ends[REACHES[i] - 1] + 0.01 * seconds)
        for i in range(left + 1)
    ]
    trace = Trace("made up", "host", "confident", tuple(stages), tuple(exits))
    return Prediction(left, "", 1.0, EXITS[left], seconds, False, lambda: trace)


def stages_of(left: np.ndarray, seconds: np.ndarray, *, known: bool = True) -> StageRecording:
    cascade = toy_cascade()
    policy = OperatingPoint("p", thresholds={"saver": 0.5, "middle": 0.5}).policy_for(cascade)
    made = StageRecording(cascade.plan(policy.evaluated(3)))
    for e, s in zip(left.tolist(), seconds.tolist(), strict=True):
        made.add(prediction(e, s, known=known))
    return made


@pytest.fixture
def left() -> np.ndarray:
    return np.random.default_rng(0).choice(3, 1000, p=(0.6, 0.3, 0.1))


@pytest.fixture
def seconds(left: np.ndarray) -> np.ndarray:
    return np.array(SECONDS)[left] * np.random.default_rng(1).normal(1, 0.01, len(left))


def rounds_of(left: np.ndarray, seconds: np.ndarray) -> Rounds:
    always = {
        f"exit {name} always": recording(np.full(len(left), s), np.full(len(left), i))
        for i, (name, s) in enumerate(zip(EXITS, SECONDS, strict=True))
    }
    return Rounds({"cascade": recording(seconds, left), **always}, np.arange(len(left)))


def test_easy_and_hard_images_are_no_unsteadiness(left: np.ndarray, seconds: np.ndarray) -> None:
    spread = summary.unsteadiness(recording(seconds, left))
    assert spread is not None
    assert spread < 0.005


def test_a_machine_that_slows_down_is_unsteady(left: np.ndarray, seconds: np.ndarray) -> None:
    slower = seconds * np.linspace(1, 1.5, len(seconds))
    spread = summary.unsteadiness(recording(slower, left))
    assert spread is not None
    assert spread > summary.UNSTEADY


def test_less_than_two_blocks_tell_nothing_of_steadiness() -> None:
    few = np.full(2 * BLOCK - 1, 0.001)
    assert summary.unsteadiness(recording(few, np.zeros(len(few), int))) is None


def test_exits_are_counted_and_judged(left: np.ndarray, seconds: np.ndarray) -> None:
    found = summary.exit_figures(
        toy_cascade(), EXITS, rounds_of(left, seconds), seconds / 2, np.where(left == 2, 0, left)
    )
    assert [one.count for one in found] == np.bincount(left).tolist()
    assert [one.accuracy for one in found] == [1.0, 1.0, 0.0]
    assert [one.latency.mean for one in found if one.latency] == pytest.approx(SECONDS, rel=0.01)
    assert found[0].inference is not None
    assert found[0].inference.mean == pytest.approx(SECONDS[0] / 2, rel=0.01)


def test_the_expectation_is_shares_times_forced_times(
    left: np.ndarray, seconds: np.ndarray
) -> None:
    found = summary.expectation(EXITS, toy_cascade(), rounds_of(left, seconds))
    assert found.seconds == pytest.approx(float(np.bincount(left) / len(left) @ SECONDS))
    assert found.ratio.low <= 1 <= found.ratio.high


def test_the_host_gap_is_what_no_stage_accounts_for(left: np.ndarray, seconds: np.ndarray) -> None:
    gap = summary.host_gap(stages_of(left, seconds), seconds)
    assert gap is not None
    assert gap == pytest.approx(0.1 * seconds)


def test_inference_begins_where_preprocessing_ends(left: np.ndarray, seconds: np.ndarray) -> None:
    rest = summary.without_preprocessing(stages_of(left, seconds), seconds)
    assert rest is not None
    stages = np.array(REACHES)[left]
    assert rest == pytest.approx(seconds * (1 - 0.05 - 0.9 / stages))


def test_what_only_the_device_knows_is_left_unknown(left: np.ndarray, seconds: np.ndarray) -> None:
    recorded = stages_of(left, seconds, known=False)
    assert summary.host_gap(recorded, seconds) is None
    assert summary.without_preprocessing(recorded, seconds) is None
    stages = summary.stage_figures(recorded, dict.fromkeys(STAGES, "fp32"), latency_table())
    # Which stages ran is known all the same, and what they take where the table tells.
    assert stages[0].share == 1
    assert stages[-1].share == pytest.approx((left == 2).mean())
    assert stages[-1].latency is None
    assert stages[0].latency is not None
    assert stages[0].latency.mean == pytest.approx(0.1e-3, rel=0.05)


def test_a_recorded_frame_is_a_typical_one_of_its_exit(
    left: np.ndarray, seconds: np.ndarray
) -> None:
    found = summary.frame_traces(stages_of(left, seconds), rounds_of(left, seconds))
    assert [frame.exit for frame in found] == [*EXITS, "final"]
    assert [frame.seconds for frame in found[:3]] == pytest.approx(SECONDS, rel=0.01)
    assert found[-1].seconds == seconds.max()
    spans = found[1].spans
    assert [span.name for span in spans] == [
        "preprocess",
        "saver",
        "decide saver",
        "segment1",
        "head1",
        "decide middle",
    ]
    assert spans[2].seconds == pytest.approx(0.01 * found[1].seconds)
    assert spans[2].begin == pytest.approx(spans[1].begin + spans[1].seconds)


def test_without_stage_times_a_frame_shows_how_long_each_decision_took(
    left: np.ndarray, seconds: np.ndarray
) -> None:
    recorded = stages_of(left, seconds, known=False)
    frame = summary.frame_traces(recorded, rounds_of(left, seconds))[1]
    assert [span.name for span in frame.spans] == ["until saver", "until middle"]
    assert frame.spans[0].begin == 0
    assert sum(span.seconds for span in frame.spans) == pytest.approx(0.96 * frame.seconds)


@pytest.mark.parametrize(
    ("share", "stolen", "expected"),
    [
        (0.9, None, "enqueueing a frame takes 90%"),
        (None, 0.05, "took 5.0% of the processor's time"),
    ],
)
def test_a_run_that_is_not_to_be_trusted_says_why(
    left: np.ndarray, seconds: np.ndarray, share: float, stolen: float, expected: str
) -> None:
    assert summary.instability((), None, None) == ()
    (why,) = summary.instability((), share, stolen)
    assert expected in why
