"""The scheduler with a gate: it routes as the offline table does, and says what it ran."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_runtime as er
from calib.quee.routing import route_table
from calib.quee.table import PathTable
from edge_runtime import (
    BackendError,
    Bundle,
    ConfigError,
    InputError,
    ManifestError,
    OperatingPoint,
    Prediction,
    Scheduler,
)
from edge_runtime.backends.fake import FakeBackend
from edge_runtime.backends.onnxrt import OnnxRuntimeBackend
from edge_runtime.cli import main
from edge_runtime.confidence import decide
from edge_runtime.files import sha256
from edge_runtime.gate import Gate
from edge_runtime.gate_model import GateModel
from edge_runtime.gated import GatedScheduler
from edge_runtime.load import new_backend
from edge_runtime.paths import Levels
from edge_runtime.timing import FakeClock
from tests.edge_runtime.gated_toys import (
    EXITS,
    LEVELS,
    SIZE,
    VARIANTS,
    gate_model,
    gate_point,
    gated_bundle,
    walked,
)
from tests.toys import toy_images

IMAGES = toy_images(60, seed=4)
#: Stages of each block that can be run at several levels.
BLOCKS = (("saver",), ("segment1", "head1"), ("segment2", "head2"))
#: At three lambdas, and with stages whose default is not the highest level.
WAYS: dict[str, dict[str, Any]] = {
    "free": {"trade_off": 0.0},
    "cheap": {"trade_off": 0.3},
    "macs": {"trade_off": 0.1, "cost": "macs"},
    "other default": {"trade_off": 0.1, "variants": {"segment1": "int8", "head2": "fp16"}},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return gated_bundle(tmp_path_factory.mktemp("gated"))


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> GateModel:
    return gate_model(bundle)


@pytest.fixture(scope="module")
def point(bundle: Bundle, model: GateModel) -> OperatingPoint:
    return gate_point(bundle, model)


@pytest.fixture
def cascade(bundle: Bundle, point: OperatingPoint) -> Any:
    with opened(bundle, point) as cascade:
        yield cascade


def opened(bundle: Bundle, point: OperatingPoint | str, **options: Any) -> GatedScheduler:
    cascade = er.load(bundle, operating_point=point, image_size=SIZE, **options)
    assert isinstance(cascade, GatedScheduler)
    return cascade


def with_choice(point: OperatingPoint, **choice: Any) -> OperatingPoint:
    assert point.gate is not None
    return replace(point, gate=replace(point.gate, **choice))


def gate_of(model: GateModel, point: OperatingPoint) -> Gate:
    assert point.gate is not None
    return Gate(model, model.costs(point.gate.cost), point.gate.trade_off)


def stages_of(path: Levels, variants: Any) -> list[tuple[str, str]]:
    """The stages that a path runs, and at which precision."""
    found = [("preprocess", "fp32")]
    for block, level in zip(BLOCKS, path, strict=False):
        for stage in block:
            has = ("fp32", *VARIANTS.get(stage, ()))
            own = variants.get(stage, "fp32")
            found.append((stage, LEVELS[level] if LEVELS[level] in has else own))
    return found


def ran(prediction: Prediction) -> list[tuple[str, str]]:
    return [(run.stage, run.precision) for run in prediction.trace.stages]


class TestRouting:
    @pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
    def test_samples_go_as_in_the_table_and_the_trace_names_what_ran(
        self, bundle: Bundle, model: GateModel, way: dict[str, Any]
    ) -> None:
        variants = way.get("variants", {})
        point = gate_point(bundle, model, "way", **way)
        backend = new_backend("onnxrt", bundle)
        logits, said = walked(bundle, model.paths, backend, IMAGES, variants)
        labels = np.zeros(len(IMAGES), np.int64)
        routed = route_table(gate_of(model, point), PathTable(model.paths, said, labels, {}))
        with opened(bundle, point) as cascade:
            found = [cascade(image) for image in IMAGES]
        assert routed.near_ties <= 2
        taken = set()
        for i in np.flatnonzero(~routed.near):
            path, one = model.paths.paths[routed.path[i]], found[i]
            assert isinstance(one, Prediction)
            assert one.exit == EXITS[len(path) - 1]
            assert one.trace.ended == ("last" if len(path) == 3 else "confident")
            assert ran(one) == stages_of(path, variants)
            # All that each exit said on the way is what this path's beginnings say.
            for k, said_there in enumerate(one.trace.exits):
                begin = model.paths.index(path[: k + 1])
                assert said_there[1:4] == decide(logits[i, begin], "max_softmax")
            taken.add(path)
        assert len(taken) >= 3

    def test_levels_differ_in_what_they_say(self, bundle: Bundle, model: GateModel) -> None:
        """Else the test above would pass with any variant."""
        backend = new_backend("onnxrt", bundle)
        logits, _ = walked(bundle, model.paths, backend, IMAGES[:1], {})
        assert len(np.unique(logits[0].round(5), axis=0)) == len(model.paths)

    def test_logits_of_all_exits_are_those_at_the_highest_level(
        self, bundle: Bundle, model: GateModel
    ) -> None:
        variants = {"segment1": "int8", "segment2": "int8", "head2": "fp16"}
        point = gate_point(bundle, model, "low", variants=variants)
        plain = OperatingPoint.all_exits(bundle.cascade)
        with (
            opened(bundle, point) as cascade,
            er.load(bundle, operating_point=plain, image_size=SIZE) as highest,
        ):
            want = highest.logits(IMAGES[:5])
            got = cascade.logits(IMAGES[:5])
            assert cascade.block(1, 0).runs == ("segment1.fp32", "head1")
        assert list(got) == list(EXITS)
        for name in EXITS:
            np.testing.assert_array_equal(got[name], want[name])

    def test_stages_say_at_which_precisions_they_may_run(self, cascade: GatedScheduler) -> None:
        assert cascade.precisions["preprocess"] == cascade.precisions["saver"] == ("fp32",)
        assert cascade.precisions["segment1"] == ("fp32", "fp16", "int8")
        assert cascade.precisions["segment2"] == ("fp32", "int8")

    def test_a_gate_of_one_step_is_run_at_its_own_lambda_alone(self, bundle: Bundle) -> None:
        model = gate_model(bundle, kind="one_step")
        point = gate_point(bundle, model, "step", trade_off=0.5)
        with opened(bundle, point) as cascade:
            assert len({tuple(ran(cascade(image))) for image in IMAGES}) > 2
            with pytest.raises(ConfigError, match=r"for one lambda: got 0\.4, expected 0\.5"):
                cascade.switch(with_choice(point, trade_off=0.4))


class TestFrames:
    def test_a_batch_is_classified_one_by_one(self, cascade: GatedScheduler) -> None:
        together = cascade(IMAGES[:9])
        alone = [cascade(image) for image in IMAGES[:9]]
        assert [(p.label, p.exit, ran(p)) for p in together] == [
            (p.label, p.exit, ran(p)) for p in alone
        ]
        assert len({p.exit for p in alone}) > 1
        assert {run.batch for p in together for run in p.trace.stages} == {1}
        assert [p.exit for p in cascade(IMAGES[:1])] == [alone[0].exit]

    def test_frames_that_follow_each_other(self, cascade: GatedScheduler) -> None:
        found = list(cascade.each(IMAGES[:9]))
        assert [ran(p) for p in found] == [ran(cascade(image)) for image in IMAGES[:9]]

    def test_a_batch_can_t_be_submitted(self, cascade: GatedScheduler) -> None:
        pending = cascade.submit(IMAGES[0])
        with pytest.raises(InputError, match="images per frame of a cascade with a gate: got 2"):
            cascade.submit(IMAGES[:2])
        assert ran(pending.result()) == ran(cascade(IMAGES[0]))

    @pytest.mark.parametrize(
        "image", [[IMAGES[0], IMAGES[0]], np.float32(1), IMAGES[:0], IMAGES[:2, :4], [[1], [1, 2]]]
    )
    def test_what_is_no_image_is_refused_as_elsewhere(
        self, cascade: GatedScheduler, image: Any
    ) -> None:
        for call in (cascade, cascade.submit):
            with pytest.raises(InputError, match="image"):
                call(image)

    def test_threads_take_turns(self, cascade: GatedScheduler) -> None:
        want = [ran(cascade(image)) for image in IMAGES[:20]]
        wrong: list[int] = []

        def classify() -> None:
            found = [ran(cascade(image)) for image in IMAGES[:20]]
            wrong.extend(i for i in range(20) if found[i] != want[i])

        threads = [threading.Thread(target=classify) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_closed_and_opened_again_it_goes_on(self, bundle: Bundle, point: Any) -> None:
        cascade = opened(bundle, point)
        want = [ran(cascade(image)) for image in IMAGES[:9]]
        cascade.close()
        for call in (cascade, cascade.submit, cascade.logits):
            with pytest.raises(BackendError, match="closed"):
                call(IMAGES[:2])
        with cascade.open():
            assert [ran(cascade(image)) for image in IMAGES[:9]] == want

    def test_the_gate_s_time_is_part_of_the_frame_s(self, cascade: GatedScheduler) -> None:
        for image in IMAGES[:9]:
            one = cascade(image)
            assert 0 < cascade.gate_s < one.latency_s
            # The last decision is the frame's end, and the gate stands before it.
            assert one.trace.exits[-1].at_s == one.latency_s
            if one.exit == EXITS[0]:
                last = one.trace.stages[-1]
                assert one.latency_s - last.start_s - last.duration_s > cascade.gate_s
            decided = [exit_.at_s for exit_ in one.trace.exits]
            begins = {run.stage: run.start_s for run in one.trace.stages}
            assert all(
                begins[block[0]] >= at
                for block, at in zip(BLOCKS[1 : len(decided)], decided, strict=False)
            )

    def test_logits_that_are_no_numbers_name_their_exit(
        self, bundle: Bundle, model: GateModel, point: OperatingPoint
    ) -> None:
        function = {"saver": lambda inputs: {"saver/logits": np.full((1, 4), np.nan)}}
        cascade = GatedScheduler(bundle, FakeBackend(function), point, image_size=SIZE)
        with pytest.raises(BackendError, match=r"exit 'saver': .* NaN, infinite"):
            cascade.open()


class TestSwitch:
    def test_lambda_and_costs_change_without_loading(
        self, bundle: Bundle, model: GateModel, point: OperatingPoint, monkeypatch: Any
    ) -> None:
        others = [with_choice(point, **way) for way in ({"trade_off": 0.0}, {"cost": "macs"})]
        wants = []
        for one in (*others, point):
            with opened(bundle, one) as cascade:
                wants.append([ran(cascade(image)) for image in IMAGES])
        with opened(bundle, point) as cascade:
            monkeypatch.setattr(OnnxRuntimeBackend, "open", None)
            for one, want in zip((*others, point), wants, strict=True):
                cascade.switch(one)
                assert [ran(cascade(image)) for image in IMAGES] == want
        assert wants[0] != wants[1] != wants[2] != wants[0]

    def test_another_gate_variants_or_policy_is_refused_and_nothing_changes(
        self, bundle: Bundle, cascade: GatedScheduler, point: OperatingPoint
    ) -> None:
        want = [ran(cascade(image)) for image in IMAGES[:9]]
        other = gate_point(bundle, gate_model(bundle, seed=8), "other")
        for one, message in (
            (other, "'other': gate: got .*, for which the cascade was opened"),
            (replace(point, variants={"segment1": "int8"}), "variants of stages: got .*int8"),
            (OperatingPoint("plain"), "'plain': got policy threshold, expected policy gate"),
            (with_choice(point, cost="joules"), "no costs 'joules'"),
        ):
            with pytest.raises(ConfigError, match=message) as caught:
                cascade.switch(one)
            assert "joules" in message or "Open the cascade anew" in str(caught.value)
            assert cascade.point is point
            assert [ran(cascade(image)) for image in IMAGES[:9]] == want

    def test_another_scheduler_refuses_a_gate_when_it_is_opened_and_switched(
        self, bundle: Bundle, point: OperatingPoint
    ) -> None:
        message = r"'gate' has a gate, which this scheduler does not run\. .*er\.load"
        backend = new_backend("onnxrt", bundle)
        with pytest.raises(ConfigError, match=message):
            Scheduler(bundle.cascade, backend, point, image_size=SIZE).open()
        every = OperatingPoint.all_exits(bundle.cascade)
        with er.load(bundle, operating_point=every, image_size=SIZE) as cascade:
            with pytest.raises(ConfigError, match=message):
                cascade.switch(point)
            assert cascade.point is every
            assert cascade(IMAGES[0]).exit == "final"


class TestDeadlines:
    """On a clock that only stages move; the gate goes on to the end at the highest level."""

    @pytest.fixture
    def slow(self, bundle: Bundle) -> tuple[GatedScheduler, FakeClock]:
        model = gate_model(bundle, paths=((0,), (0, 0), (0, 0, 0), (0, 1)))
        columns = {name: {model.paths.name(p): 1 for p in model.paths.paths} for name in ("a", "b")}
        stays = replace(
            model,
            figures={"costs": columns},
            predictors=tuple(
                replace(
                    one,
                    features=np.zeros_like(one.features),
                    # The longer the path, the less it errs.
                    codes=np.eye(*one.codes.shape, k=-3, dtype=np.float32)[:, :],
                    bias=np.zeros_like(one.bias),
                    output=np.full_like(one.output, -1),
                )
                for one in model.predictors
            ),
        )
        point = gate_point(bundle, stays, "slow", cost="a", trade_off=0.0)
        clock = FakeClock()
        names = ("preprocess", "saver", "segment1", "head1", "segment2", "head2")
        names = (*names, "segment1.fp16")
        backend = FakeBackend(seconds=dict.fromkeys(names, 0.01), clock=clock)
        return GatedScheduler(bundle, backend, point, image_size=SIZE, clock=clock), clock

    @pytest.mark.parametrize(
        ("deadline", "exit_"),
        [(1.0, "final"), (0.055, "middle"), (0.035, "saver"), (0.001, "saver")],
    )
    def test_the_deepest_exit_in_time_answers(
        self, slow: tuple[GatedScheduler, FakeClock], deadline: float, exit_: str
    ) -> None:
        with slow[0] as cascade:
            one = cascade(IMAGES[0], deadline_s=deadline)
        assert one.exit == exit_
        assert one.trace.ended == ("last" if exit_ == "final" else "deadline")
        assert one.deadline_missed == (deadline == 0.001)
        depth = EXITS.index(exit_) + 1
        assert [run.exit for run in one.trace.exits] == list(EXITS[:depth])
        assert [run.stage for run in one.trace.stages][1:] == [s for b in BLOCKS[:depth] for s in b]

    def test_a_frame_cut_in_the_middle_of_a_block_shows_what_it_ran(
        self, slow: tuple[GatedScheduler, FakeClock]
    ) -> None:
        with slow[0] as cascade:
            cascade.backend._seconds["segment1"] = 0.5
            one = cascade(IMAGES[0], deadline_s=0.1)
            assert (one.exit, one.trace.ended, one.deadline_missed) == ("saver", "deadline", True)
            assert [run.stage for run in one.trace.stages] == ["preprocess", "saver", "segment1"]
            assert one.trace.stages[-1].duration_s == pytest.approx(0.5)
            assert [run.exit for run in one.trace.exits] == ["saver"]
            assert one.latency_s == pytest.approx(0.52)
            cascade.backend._seconds["segment1"] = 0.01
            assert cascade(IMAGES[0], deadline_s=1.0).exit == "final"

    def test_a_deadline_is_for_each_image_of_a_batch(
        self, slow: tuple[GatedScheduler, FakeClock]
    ) -> None:
        with slow[0] as cascade:
            assert {p.exit for p in cascade(IMAGES[:4], deadline_s=0.07)} == {"final"}
            with pytest.raises(InputError, match="deadline_s"):
                cascade(IMAGES[:4], deadline_s=0.0)


class TestWhatIsNotWhole:
    @pytest.fixture
    def own(self, tmp_path: Path) -> Bundle:
        return gated_bundle(tmp_path)

    def test_the_gate_s_file_is_missing_or_altered(self, own: Bundle) -> None:
        point = gate_point(own, gate_model(own))
        file = own.path / "operating_points" / "gate.npz"
        data = bytearray(file.read_bytes())
        data[-300] ^= 1
        file.write_bytes(data)
        with pytest.raises(ManifestError, match=r"gate.npz was altered: sha256: .*gate fit"):
            opened(own, point)
        file.unlink()
        with pytest.raises(ManifestError, match=r"gate.npz does not exist"):
            opened(own, "gate")
        file.symlink_to(own.path / "manifest.json")
        with pytest.raises(ManifestError, match="symbolic link"):
            opened(own, "gate")

    def test_the_gate_is_of_another_bundle(self, own: Bundle) -> None:
        point = gate_point(own, replace(gate_model(own), bundle="0" * 64))
        with pytest.raises(ConfigError, match="fitted for another bundle: got 000000000000"):
            opened(own, point)

    def test_no_stage_has_a_level(self, own: Bundle) -> None:
        point = gate_point(own, gate_model(own, levels=("fp32", "int8", "int4")))
        with pytest.raises(ConfigError, match=r"level 'int4': .*segment1 \(fp32, fp16, int8\)"):
            opened(own, point)

    @pytest.mark.parametrize(
        ("costs", "message"),
        [
            ({}, "no costs 'latency'"),
            ({"macs": {}}, "no costs 'latency'.*macs"),
            ({"latency": 3}, "costs 'latency' of the gate: got 3"),
            ({"latency": {"fp32": 1.0}}, "the path 'fp32 -> fp32' has no cost"),
        ],
    )
    def test_costs_are_missing(self, own: Bundle, costs: Any, message: str) -> None:
        point = gate_point(own, gate_model(own, costs=costs))
        with pytest.raises(ConfigError, match=message):
            opened(own, point)

    @pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
    def test_lambda_is_none(self, own: Bundle, value: float, capsys: Any) -> None:
        gate_point(own, gate_model(own))
        file = own.path / "operating_points" / "gate.json"
        text = file.read_text()
        assert '"trade_off": 0.3' in text
        token = {"nan": "NaN", "inf": "Infinity"}.get(str(value), str(value))
        file.write_text(text.replace('"trade_off": 0.3', f'"trade_off": {token}'))
        with pytest.raises(ManifestError, match=r"lambda|NaN|Infinity"):
            opened(own, "gate")
        code = main(["evaluate", str(own.path), "--data", "x", "--operating-point", "gate"])
        assert code in (1, 2)
        assert capsys.readouterr().err.startswith("error: ")

    def test_a_gate_file_that_is_no_gate_though_its_hash_fits(self, own: Bundle) -> None:
        point = gate_point(own, gate_model(own))
        file = own.path / "operating_points" / "gate.npz"
        file.write_bytes(b"no npz")
        with pytest.raises(ManifestError, match=r"gate\.npz can't be read"):
            opened(own, with_choice(point, sha256=sha256(b"no npz")))


class TestElsewhere:
    def test_evaluate_compares_it_with_the_last_exit(
        self, bundle: Bundle, point: OperatingPoint, tmp_path: Path
    ) -> None:
        import json

        with opened(bundle, point) as cascade:
            found = [cascade(image) for image in IMAGES]
        labels = np.array([one.label for one in found])
        np.savez(tmp_path / "data.npz", images=IMAGES, labels=labels)
        out = tmp_path / "out.json"
        words = ["evaluate", str(bundle.path), "--data", str(tmp_path / "data.npz")]
        assert main([*words, "--operating-point", "gate", "--json", str(out)]) == 0
        result = json.loads(out.read_text())
        assert result["operating_point"]["gate"]["cost"] == "latency"
        assert result["evaluation"]["accuracy"] == 1.0
        assert {one["exit"]: one["share"] for one in result["evaluation"]["exits"]} == {
            name: pytest.approx(np.mean([one.exit == name for one in found])) for name in EXITS
        }

    def test_a_model_with_if_nodes_can_t_hold_a_gate(
        self, bundle: Bundle, point: OperatingPoint
    ) -> None:
        from engines.monolith import if_model

        with pytest.raises(ConfigError, match="If nodes: got 'gate', expected threshold or never"):
            if_model(bundle, point)
