"""Operating points: what they refuse, the policies they make, and their files."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime import policy
from edge_runtime.cascade import Cascade, Exit, Stage
from edge_runtime.confidence import METRICS, bounds, decide
from edge_runtime.errors import ConfigError, EdgeRuntimeError, ManifestError
from edge_runtime.operating_point import GateChoice, OperatingPoint
from edge_runtime.policy import POLICIES
from edge_runtime.tensors import TensorSpec
from tests.edge_runtime.bundles import refused

IMAGE = TensorSpec("image", ("batch", 4), "float32")
NAMES = ("first", "second", "last")
LARGEST = float(np.finfo(np.float32).max)
#: Those that need no file besides.
PLAIN = [policy for policy in POLICIES if policy != "gate"]
CHOICE = GateChoice(file="gate.npz", sha256="a" * 64, cost="macs", trade_off=0.5)


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    logits = [TensorSpec(name, ("batch", 3), "float32") for name in NAMES]
    stages = tuple(Stage(f"{spec.name}-stage", "saver", (IMAGE,), (spec,)) for spec in logits)
    return Cascade(("a", "b", "c"), IMAGE, stages, tuple(Exit(name, name) for name in NAMES))


class TestConstructor:
    def test_a_gate_and_its_policy_come_together(self):
        with refused(ConfigError, "gate: got none, expected one for the policy gate"):
            OperatingPoint("a", policy="gate")
        with refused(ConfigError, "gate: got gate.npz, expected none for the policy threshold"):
            OperatingPoint("a", gate=CHOICE)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"trade_off": -0.1}, "lambda: got -0.1, expected a finite number >= 0"),
            ({"trade_off": math.nan}, "lambda: got nan"),
            ({"file": "../gate.npz"}, "file of a gate"),
            ({"file": "gate.pickle"}, "expected a plain .npz"),
        ],
    )
    def test_a_choice_of_a_gate_is_checked(self, changes, expected):
        with refused(ConfigError, expected):
            replace(CHOICE, **changes)

    @pytest.mark.parametrize(
        "name",
        ["", ".", "..", ".hidden", "a/b", "a\\b", "/a", "a\0", "a\nb", "a.json", " a", "x" * 201],
    )
    def test_a_name_is_a_plain_file_name(self, name):
        with refused(ConfigError, "name of an operating point: got"):
            OperatingPoint(name)

    @pytest.mark.parametrize("name", ["zero_loss", "drop 0.5 %", "größer", "a.b"])
    def test_names_of_people(self, name):
        assert OperatingPoint(name).name == name

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"schema_version": 2}, "'x': schema version: got 2, expected 1"),
            ({"metric": "softmax"}, "metric: got 'softmax', expected max_softmax, entropy"),
            ({"policy": "always"}, "policy: got 'always', expected threshold, patience"),
            ({"patience": 0}, "patience: got 0, expected >= 1"),
            ({"patience": -1}, "patience: got -1, expected >= 1"),
            ({"thresholds": {"a": float("nan")}}, "threshold of exit 'a': got nan"),
            ({"thresholds": {"a": float("inf")}}, "threshold of exit 'a': got inf"),
            ({"thresholds": {"a": -1e39}}, "threshold of exit 'a': got -1e+39"),
            ({"temperatures": {"a": 0.0}}, "temperature of exit 'a': got 0.0"),
            ({"temperatures": {"a": -1.0}}, "temperature of exit 'a': got -1.0"),
            ({"temperatures": {"a": 1e-50}}, "temperature of exit 'a': got 1e-50"),
            ({"temperatures": {"a": float("inf")}}, "temperature of exit 'a': got inf"),
            ({"temperatures": {"a": float("nan")}}, "temperature of exit 'a': got nan"),
        ],
        ids=str,
    )
    def test_refuses_what_no_cascade_could_run(self, fields, message):
        with refused(ConfigError, message):
            OperatingPoint("x", **fields)


class TestPolicyFor:
    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({}, policy.Never()),
            ({"policy": "never", "thresholds": {"first": 0.5}}, policy.Never()),
            ({"thresholds": {"first": None, "second": None}}, policy.Never()),
            ({"thresholds": {"last": 0.5}}, policy.Never()),
            ({"thresholds": {"first": 1.01}}, policy.Never()),
            ({"thresholds": {"first": 0.5}}, policy.Threshold((0.5, None), 0.0)),
            ({"thresholds": {"second": 1.0}}, policy.Threshold((None, 1.0), 0.0)),
            (
                {"thresholds": {"second": 0.25, "first": 0.5, "last": 2.0}},
                policy.Threshold((0.5, 0.25), 0.0),
            ),
            ({"thresholds": {"first": 1.5, "second": 0.5}}, policy.Threshold((None, 0.5), 0.0)),
            (
                {"thresholds": {"first": 1.5}, "metric": "logits_margin"},
                policy.Threshold((1.5, None), 0.0),
            ),
            ({"policy": "patience", "patience": 2}, policy.Patience(2)),
            (
                {"policy": "patient_and_confident", "patience": 2, "thresholds": {"first": 0.5}},
                policy.PatientAndConfident((0.5, None), 2),
            ),
        ],
    )
    def test_rules(self, cascade, fields, expected):
        assert OperatingPoint("x", **fields).policy_for(cascade) == expected

    @pytest.mark.parametrize("rule", PLAIN)
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"thresholds": {"frist": 0.5}}, "no exit 'frist'. Did you mean 'first'? Valid: "),
            ({"temperatures": {"lsat": 0.5}}, "no exit 'lsat'. Did you mean 'last'?"),
            ({"variants": {"last-stge": "fp32"}}, "no stage 'last-stge'. Did you mean"),
        ],
    )
    def test_names_that_the_cascade_lacks(self, cascade, rule, fields, message):
        with refused(ConfigError, "operating point 'x': the cascade has", message):
            OperatingPoint("x", policy=rule, **fields).policy_for(cascade)


class TestForced:
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("name", NAMES)
    def test_only_that_exit_is_evaluated(self, cascade, metric, name):
        point = OperatingPoint.forced(cascade, name, metric=metric)
        rule = point.policy_for(cascade)
        assert rule.evaluated(3) == (NAMES.index(name),)

    @pytest.mark.parametrize("metric", METRICS)
    def test_the_least_confident_logits_leave(self, cascade, metric):
        rule = OperatingPoint.forced(cascade, "first", metric=metric).policy_for(cascade)
        decision = decide(np.zeros((1, 3), np.float32), metric)
        assert rule.leaves(0, decision, policy.Streak()).all()

    def test_options_are_kept(self, cascade):
        point = OperatingPoint.forced(cascade, "first", variants={"first-stage": "int8"})
        assert point.variants == {"first-stage": "int8"}

    def test_an_unknown_exit(self, cascade):
        with refused(ConfigError, "no exit 'frist'. Did you mean 'first'?"):
            OperatingPoint.forced(cascade, "frist")


def test_all_exits_evaluates_everything_and_leaves_nowhere(cascade):
    rule = OperatingPoint.all_exits(cascade).policy_for(cascade)
    assert rule.evaluated(3) == (0, 1, 2)
    sure = decide(np.array([[1e30, 0, 0]], np.float32), "logits_margin")
    assert not rule.leaves(0, sure, policy.Streak()).any()


text = st.text(max_size=5)
points = st.builds(
    OperatingPoint,
    name=st.text("abcé .-", min_size=1, max_size=8).filter(
        lambda name: name == name.strip() and not name.startswith(".")
    ),
    policy=st.sampled_from(PLAIN),
    metric=st.sampled_from(METRICS),
    thresholds=st.dictionaries(text, st.none() | st.floats(-LARGEST, LARGEST), max_size=3),
    temperatures=st.dictionaries(text, st.floats(1e-30, 1e30), max_size=3),
    patience=st.integers(1, 5),
    variants=st.dictionaries(text, text, max_size=2),
    bundle=text,
    chosen_on=st.dictionaries(text, st.integers() | text | st.none(), max_size=2),
    expected=st.dictionaries(text, st.floats(allow_nan=False, allow_infinity=False), max_size=2),
)


class TestFiles:
    @settings(deadline=None)
    @given(point=points)
    def test_what_is_written_is_read(self, tmp_path_factory, point):
        path = tmp_path_factory.getbasetemp() / "point.json"
        point.write(path)
        assert OperatingPoint.from_file(path) == point
        assert json.loads(path.read_text()) == json.loads(point.to_json())

    def test_defaults_may_be_left_out(self, tmp_path):
        (tmp_path / "x.json").write_text('{"name": "x"}')
        assert OperatingPoint.from_file(tmp_path / "x.json") == OperatingPoint("x")

    def test_whole_numbers_are_numbers(self, tmp_path):
        (tmp_path / "x.json").write_text('{"name": "x", "thresholds": {"a": 1}}')
        assert OperatingPoint.from_file(tmp_path / "x.json").thresholds == {"a": 1.0}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "is not whole"),
            ("[]", "got list [], expected a mapping"),
            ("{}", "the key 'name' is missing"),
            ('{"name": "x", "name": "y"}', "the key 'name' appears twice"),
            ('{"name": "../x"}', "name of an operating point: got '../x'"),
            ('{"name": "x", "treshold": {}}', "unknown key 'treshold'. Did you mean 'thresholds'?"),
            ('{"name": "x", "thresholds": {"a": "0.5"}}', "thresholds: a: got str '0.5'"),
            ('{"name": "x", "thresholds": {"a": NaN}}', "NaN is not JSON"),
            ('{"name": "x", "thresholds": {"a": 1e999}}', "the number 1e999 is too large"),
            ('{"name": "x", "thresholds": {"a": 1e300}}', "threshold of exit 'a': got 1e+300"),
            ('{"name": "x", "thresholds": {"a\\n": true}}', "thresholds: 'a\\n': got bool True"),
            ('{"name": "x", "policy": "thresold"}', "Did you mean 'threshold'?"),
            ('{"name": "x", "patience": 1.5}', "patience: got float 1.5, expected int"),
            (
                '{"schema_version": 2, "name": "x", "new_key": 1}',
                "schema version: got 2, expected 1. It was written by another version",
            ),
        ],
    )
    def test_a_broken_file_is_named(self, tmp_path, text, message):
        path = tmp_path / "x.json"
        path.write_text(text)
        with refused(ManifestError, f"operating point {path}", message):
            OperatingPoint.from_file(path)

    def test_a_missing_file(self, tmp_path):
        with refused(ManifestError, "operating point", "absent.json does not exist"):
            OperatingPoint.from_file(tmp_path / "absent.json")

    def test_it_can_not_be_written(self, tmp_path):
        with refused(EdgeRuntimeError, "can't be written: No such file or directory"):
            OperatingPoint("x").write(tmp_path / "absent" / "x.json")


@pytest.mark.parametrize("metric", METRICS)
def test_a_threshold_at_the_lower_bound_always_fires(cascade, metric):
    lowest, _ = bounds(metric, 3)
    point = OperatingPoint("x", metric=metric, thresholds={"second": lowest})
    assert point.policy_for(cascade).evaluated(3) == (1,)
