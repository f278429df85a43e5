"""What variants do to a cascade, how long they take, and which of them are chosen."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import edge_runtime as er
from calib.sensitivity import (
    Figures,
    Mixes,
    StageEffect,
    VariantTimes,
    at_thresholds,
    choose_precisions,
    default_choice,
    stage_effects,
    stages_with,
    usable_thresholds,
    variant_times,
)
from calib.thresholds import AccuracyDrop, Goal, ZeroLoss
from edge_runtime import BackendError, Bundle, CalibrationError, ConfigError, OperatingPoint
from edge_runtime.backends.onnxrt import OnnxRuntimeBackend
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset
from edge_runtime.scheduler import Scheduler
from edge_runtime.timing import Ratio
from engines.bundle import BuiltStage, write_bundle
from engines.verify import run_stages
from tests.toys import CLASSES, DENSE, dense_model, mean_model, toy_cascade, toy_images

DEFAULT = ("saver", "segment1", "head1", "segment2", "head2")


def trained_models() -> dict[str, bytes]:
    """The toy cascade with exits that mostly agree: the earlier, the worse."""
    random = np.random.default_rng(7)
    colours = random.standard_normal((3, 4)) * 0.004
    first_four = np.eye(6, 4)
    weights = {
        "saver": colours + random.standard_normal((3, 4)) * 0.001,
        "segment1": np.concatenate([colours, random.standard_normal((3, 2)) * 0.004], axis=1),
        "head1": first_four * 0.5 + random.standard_normal((6, 4)) * 0.03,
        "segment2": np.eye(6) * 0.3,
        "head2": first_four * 0.5,
    }
    models = {"preprocess": mean_model()}
    for stage in toy_cascade().stages[1:]:
        (source,), (target,) = stage.inputs, stage.outputs
        shape, seed, _ = DENSE[stage.name]
        model = dense_model(source.name, target.name, *shape, seed=seed, batch=source.shape[0])
        models[stage.name] = with_constant(model, "weights", weights[stage.name])
    return models


def with_constant(model: bytes, name: str, value: np.ndarray) -> bytes:
    """A toy model with another constant."""
    loaded = onnx.load_from_string(model)
    (tensor,) = (tensor for tensor in loaded.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
    return loaded.SerializeToString()


def scaled(model: bytes, factor: float) -> bytes:
    """The same model with its outputs scaled: of logits, a temperature."""
    return with_constant(model, "three", np.array(3 * factor))


def ruined(model: bytes) -> bytes:
    """The same model with the columns of its weights in another order."""
    loaded = onnx.load_from_string(model)
    weights = numpy_helper.to_array(loaded.graph.initializer[0])
    return with_constant(model, "weights", np.roll(weights, 1, axis=1))


def slow(model: bytes) -> bytes:
    """A toy model with the same outputs that takes many times as long."""
    loaded = onnx.load_from_string(model)
    graph = loaded.graph
    source, target = graph.input[0].name, graph.output[0].name
    graph.node[-1].output[0] = "light"
    width = graph.input[0].type.tensor_type.shape.dim[1].dim_value
    for name, value in (
        ("widen", np.ones((width, 256), np.float32)),
        ("same", np.eye(256, dtype=np.float32)),
        ("last_axis", np.array([-1])),
        ("zero", np.float32(0)),
    ):
        graph.initializer.append(numpy_helper.from_array(value, name))
    graph.node.append(helper.make_node("MatMul", [source, "widen"], ["wide0"]))
    for i in range(6):
        graph.node.append(helper.make_node("MatMul", [f"wide{i}", "same"], [f"wide{i + 1}"]))
    graph.node.append(helper.make_node("ReduceMean", ["wide6", "last_axis"], ["mean"]))
    graph.node.append(helper.make_node("Mul", ["mean", "zero"], ["nothing"]))
    graph.node.append(helper.make_node("Add", ["light", "nothing"], [target]))
    return loaded.SerializeToString()


def write_toy(
    out: Path, variants: Mapping[str, bytes], *, defaults: Mapping[str, bytes] | None = None
) -> Bundle:
    """A bundle of the trained toy, some stages with a variant "int8"."""
    cascade, models = toy_cascade(), {**trained_models(), **(defaults or {})}
    return write_bundle(
        out,
        name="toy",
        classes=CLASSES,
        image=cascade.image,
        stages=[
            BuiltStage(
                stage,
                {"fp32": models[stage.name]}
                | ({"int8": variants[stage.name]} if stage.name in variants else {}),
            )
            for stage in cascade.stages
        ],
        exits=cascade.exits,
        provenance={},
    )


@functools.cache
def toy_data(count: int = 400) -> ImageDataset:
    """Images labelled by the last exit, with every tenth label wrong."""
    images = toy_images(count)
    logits = run_stages(toy_cascade(), trained_models(), images)["final/logits"]
    labels = logits.argmax(axis=1)
    labels[::10] = (labels[::10] + 1) % 4
    return ImageDataset.from_arrays(images, labels, CLASSES)


def quiet() -> Console:
    return Console(stdout=io.StringIO(), stderr=io.StringIO())


def opener(bundle: Bundle):
    def open_scheduler(point: OperatingPoint) -> Scheduler:
        return er.load(bundle, operating_point=point, image_size=(5, 7))

    return open_scheduler


def mixes_of(bundle: Bundle, metric: str = "max_softmax", **options) -> Mixes:
    return Mixes(bundle, toy_data(), quiet(), opener(bundle), metric, **options)


def times_of(bundle: Bundle, ratios: Mapping[str, tuple[float, float, float]]) -> VariantTimes:
    """Made-up times: every stage takes 1 ms, its variant as the ratio (value, low, high) says."""
    seconds = {stage.name: {"fp32": 1e-3} for stage in bundle.cascade.stages}
    for name, (value, *_) in ratios.items():
        seconds[name]["int8"] = value * 1e-3
    found = {name: Ratio(*ratios[name]) for name in seconds if name in ratios}
    return VariantTimes("int8", dict.fromkeys(seconds, "fp32"), seconds, found)


FASTER, SLOWER, UNSURE = (0.5, 0.48, 0.52), (1.4, 1.3, 1.5), (0.95, 0.85, 1.02)


class TestEffects:
    """What variants do to each exit."""

    def test_a_harmless_variant_changes_nothing(self, tmp_path: Path) -> None:
        bundle = write_toy(tmp_path / "b", {"head1": trained_models()["head1"]})
        (effect,) = stage_effects(mixes_of(bundle), "int8", {"saver": 0.8, "middle": 0.7})
        assert effect.stages == ("head1",)
        assert effect.exit_agreement == 1
        assert effect.accuracy_drop == effect.agreement_loss == 0
        for one in effect.exits:
            assert one.agreement == 1
            assert one.accuracy_drop == one.signal_shift == one.rate_shift == 0

    @pytest.mark.parametrize("metric", ["max_softmax", "entropy", "logits_margin"])
    def test_they_equal_a_computation_by_hand(self, tmp_path: Path, metric: str) -> None:
        models = trained_models()
        variants = {
            "saver": scaled(models["saver"], 0.6),
            "segment1": ruined(models["segment1"]),
            "head2": scaled(models["head2"], 1.5),
        }
        bundle = write_toy(tmp_path / "b", variants)
        mixes = mixes_of(bundle, metric, temperatures={"middle": 1.3})
        thresholds = {"saver": mixes.judged({}).signals[:, 0].mean(), "middle": None}
        found = stage_effects(mixes, "int8", thresholds)
        groups = [("saver",), ("segment1",), ("head2",), ("saver", "segment1", "head2")]
        assert [effect.stages for effect in found] == groups
        for effect in found:
            changed = {name: variants[name] for name in effect.stages}
            assert_effect(effect, models, {**models, **changed}, metric, thresholds)

    def test_only_exits_behind_a_stage_change(self, tmp_path: Path) -> None:
        bundle = write_toy(tmp_path / "b", {"head1": ruined(trained_models()["head1"])})
        (effect,) = stage_effects(mixes_of(bundle), "int8", {})
        saver, middle, final = effect.exits
        assert saver.agreement == final.agreement == 1
        assert effect.agreement_loss == 1 - middle.agreement > 0.3
        assert middle.accuracy_drop > 0.3
        assert effect.exit_agreement == 1  # nobody leaves there

    def test_each_mix_is_run_once(self, tmp_path: Path) -> None:
        bundle = write_toy(tmp_path / "b", {"head1": trained_models()["head1"]})
        mixes = mixes_of(bundle)
        assert mixes.judged({"saver": "fp32"}) is mixes.judged({})
        assert mixes.judged({"head1": "int8"}) is not mixes.judged({})

    def test_the_base_may_have_variants_of_its_own(self, tmp_path: Path) -> None:
        models = trained_models()
        variants = {"saver": ruined(models["saver"]), "head1": models["head1"]}
        bundle = write_toy(tmp_path / "b", variants)
        mixes = mixes_of(bundle, base={"saver": "int8"})
        (effect,) = stage_effects(mixes, "int8", {})
        assert effect.stages == ("head1",)
        other = mixes_of(bundle).judged({})
        assert (mixes.judged({}).labels[:, 0] != other.labels[:, 0]).mean() > 0.3


def assert_effect(
    effect: StageEffect,
    before: Mapping[str, bytes],
    after: Mapping[str, bytes],
    metric: str,
    thresholds: Mapping[str, float | None],
) -> None:
    """Compare with sample by sample in double precision."""
    images, truth = next(toy_data().batches(1000))
    logits = [run_stages(toy_cascade(), models, images) for models in (before, after)]
    labels, signals, left = ([[], []] for _ in range(3))
    for which in range(2):
        for sample in range(len(images)):
            said, sure = [], []
            for name, temperature in (("saver", 1), ("middle", 1.3), ("final", 1)):
                x = logits[which][f"{name}/logits"][sample].astype(float) / temperature
                p = np.exp(x) / np.exp(x).sum()
                said.append(int(x.argmax()))
                first, second = np.sort(x)[::-1][:2]
                sure.append(
                    {
                        "max_softmax": p.max(),
                        "entropy": (p * np.log(p)).sum(),
                        "logits_margin": first - second,
                    }[metric]
                )
            labels[which].append(said)
            signals[which].append(sure)
            left[which].append(0 if sure[0] >= thresholds["saver"] else 2)
    labels, signals, left = np.array(labels), np.array(signals), np.array(left)
    answers = np.take_along_axis(labels, left[:, :, None], axis=2)[:, :, 0]
    for k, one in enumerate(effect.exits):
        right = labels[:, :, k] == truth
        assert one.accuracy_drop == pytest.approx(right[0].mean() - right[1].mean())
        assert one.agreement == pytest.approx((labels[0, :, k] == labels[1, :, k]).mean())
        shift = np.abs(signals[1, :, k] - signals[0, :, k]).mean()
        assert one.signal_shift == pytest.approx(shift, rel=1e-4, abs=1e-6)
        assert one.rate_shift == pytest.approx((left[1] == k).mean() - (left[0] == k).mean())
    same = (left[0] == left[1]) & (answers[0] == answers[1])
    assert effect.exit_agreement == pytest.approx(same.mean())
    right = answers == truth
    assert effect.accuracy_drop == pytest.approx(right[0].mean() - right[1].mean())


class TestTimes:
    """Both precisions are timed in turn."""

    def test_fast_and_slow_variants_are_told_apart(self, tmp_path: Path) -> None:
        models = trained_models()
        bundle = write_toy(
            tmp_path / "b",
            {"segment1": models["segment1"], "head2": slow(models["head2"])},
            defaults={"segment1": slow(models["segment1"])},
        )
        times = variant_times(bundle, "int8", toy_data(), quiet(), opener(bundle), rounds=60)
        assert times.faster == ("segment1",)
        assert list(times.not_faster) == ["head2"]
        assert times.not_faster["head2"].startswith("slower here: ")
        assert list(times.seconds) == [stage.name for stage in bundle.cascade.stages]
        assert list(times.seconds["head1"]) == ["fp32"]
        own = times.seconds["segment1"]
        assert times.ratios["segment1"].value == pytest.approx(own["int8"] / own["fp32"])
        assert times.saved("segment1") == own["fp32"] - own["int8"] > 0
        assert times.stage_seconds({"segment1": "int8"})["segment1"] == own["int8"]
        assert times.stage_seconds({})["segment1"] == own["fp32"]

    def test_a_backend_that_does_not_know_is_refused(self, tmp_path: Path, monkeypatch) -> None:
        bundle = write_toy(tmp_path / "b", {"head1": trained_models()["head1"]})
        monkeypatch.setattr(OnnxRuntimeBackend, "asynchronous", True)
        with pytest.raises(BackendError, match="does not tell how long"):
            variant_times(bundle, "int8", toy_data(), quiet(), opener(bundle), rounds=2)

    def test_an_interval_decides_not_its_middle(self, tmp_path: Path) -> None:
        bundle = write_toy(tmp_path / "b", {})
        times = times_of(bundle, {"saver": UNSURE, "head1": FASTER, "head2": SLOWER})
        assert times.faster == ("head1",)
        assert times.not_faster == {
            "saver": "not clearly faster here: 0.950 [0.850, 1.020] of its time",
            "head2": "slower here: 1.400 [1.300, 1.500] of its time",
        }


class TestChoice:
    """Fast variants are kept as far as accuracy allows, with thresholds of their own."""

    @staticmethod
    def choose(bundle: Bundle, ratios, *, goal: Goal | None = None, budget: float = 0.01):
        mixes, times, goal = mixes_of(bundle), times_of(bundle, ratios), goal or ZeroLoss()
        before = default_choice(mixes, times, goal, repeats=2)
        effects = stage_effects(mixes, "int8", before.thresholds)
        return choose_precisions(mixes, times, effects, before, goal, budget=budget, repeats=2)

    def test_harmless_variants_are_all_chosen(self, tmp_path: Path) -> None:
        models = trained_models()
        bundle = write_toy(tmp_path / "b", {name: models[name] for name in DEFAULT})
        found = self.choose(bundle, dict.fromkeys(DEFAULT, FASTER))
        assert found.variants == dict.fromkeys(DEFAULT, "int8")
        assert found.left == {}
        assert found.loss == 0
        assert found.interval[0] < 0 < found.interval[1]
        assert found.before.point.counts[0] > 100  # the early exits are used
        assert found.after.thresholds == found.before.thresholds == found.forgotten.thresholds
        assert found.after.point.cost < found.before.point.cost
        assert found.rival is not None
        assert found.rival.point.cost == pytest.approx(found.before.point.cost)
        assert found.after.held_out_accuracy == found.before.held_out_accuracy is not None

    def test_a_ruined_stage_goes_back(self, tmp_path: Path) -> None:
        models = trained_models()
        variants = {name: models[name] for name in DEFAULT}
        variants["segment2"] = ruined(models["segment2"])
        bundle = write_toy(tmp_path / "b", variants)
        found = self.choose(bundle, dict.fromkeys(DEFAULT, FASTER))
        assert "segment2" not in found.variants
        assert len(found.variants) == 4
        assert list(found.left) == ["segment2"]
        assert "points, 1 are allowed, and it changes" in found.left["segment2"]
        assert found.loss == 0

    def test_slower_and_unsure_variants_are_never_chosen(self, tmp_path: Path) -> None:
        models = trained_models()
        bundle = write_toy(tmp_path / "b", {name: models[name] for name in DEFAULT})
        ratios = {**dict.fromkeys(DEFAULT, FASTER), "segment1": SLOWER, "head2": UNSURE}
        found = self.choose(bundle, ratios, budget=1.0)
        assert sorted(found.variants) == ["head1", "saver", "segment2"]
        assert found.left["segment1"].startswith("slower here: 1.400")
        assert found.left["head2"].startswith("not clearly faster here: 0.950")

    def test_where_nothing_is_faster_everything_stays(self, tmp_path: Path) -> None:
        bundle = write_toy(tmp_path / "b", {"head2": trained_models()["head2"]})
        found = self.choose(bundle, {"head2": SLOWER})
        assert found.variants == {}
        assert found.choice is found.rival is None
        assert found.after is found.before
        assert found.loss == 0

    def test_thresholds_follow_the_signal(self, tmp_path: Path) -> None:
        """Flatter logits make every exit less confident, though it says the same."""
        models = trained_models()
        variants = {name: scaled(models[name], 0.6) for name in ("saver", "head1")}
        bundle = write_toy(tmp_path / "b", variants)
        found = self.choose(bundle, dict.fromkeys(variants, FASTER))
        assert sorted(found.variants) == ["head1", "saver"]
        before, forgotten, after = found.before, found.forgotten, found.after
        assert before.thresholds["saver"] is not None
        assert after.thresholds["saver"] is not None
        assert after.thresholds["saver"] < before.thresholds["saver"] - 0.02
        assert forgotten.thresholds == before.thresholds
        assert forgotten.exit_rates["saver"] < before.exit_rates["saver"] - 0.1
        assert after.exit_rates["saver"] == pytest.approx(before.exit_rates["saver"], abs=0.05)
        assert after.point.cost < forgotten.point.cost
        assert after.point.accuracy >= after.base.accuracy

    def test_looser_thresholds_alone_are_no_merit_of_a_variant(self, tmp_path: Path) -> None:
        """A worse last exit asks less of the early ones; the base could have had that as well."""
        models = trained_models()
        bundle = write_toy(tmp_path / "b", {"head2": ruined(models["head2"])})
        found = self.choose(bundle, {"head2": (0.999, 0.998, 0.9995)}, budget=1.0)
        assert found.variants == {}
        assert "no cheaper than one without that is as accurate" in found.left["head2"]

    def test_given_thresholds_are_compared_as_they_are(self, tmp_path: Path) -> None:
        models = trained_models()
        bundle = write_toy(tmp_path / "b", {"saver": models["saver"]})
        mixes, times = mixes_of(bundle), times_of(bundle, {"saver": FASTER})
        before = at_thresholds(mixes, times, {}, {"saver": 0.9})
        assert before.thresholds == {"saver": 0.9, "middle": None}
        assert before.held_out_accuracy is None
        effects = stage_effects(mixes, "int8", before.thresholds)
        found = choose_precisions(
            mixes, times, effects, before, AccuracyDrop(0.05), budget=0.1, repeats=0
        )
        assert found.before is before
        at = mixes.judged({}).signals[:, 0] >= np.float32(0.9)
        assert before.point.counts == (at.sum(), 0, 400 - at.sum())
        # The preprocessing and the saver for all, the rest but head1 for those that stay.
        assert before.point.cost == pytest.approx(2e-3 + 3e-3 * (1 - at.mean()))

    def test_it_is_deterministic(self, tmp_path: Path) -> None:
        models = trained_models()
        variants = {name: scaled(models[name], 0.9) for name in DEFAULT}
        bundle = write_toy(tmp_path / "b", variants)
        ratios = dict.fromkeys(DEFAULT, FASTER)
        assert self.choose(bundle, ratios) == self.choose(bundle, ratios)


class TestRefusals:
    """What can't be is refused, with what to do about it."""

    def test_no_such_variant(self, tmp_path: Path) -> None:
        bundle = write_toy(tmp_path / "b", {})
        command = f"edge-runtime quantize {bundle.path} --data DIR --out NEW"
        with pytest.raises(ConfigError, match="has a variant 'int8'") as caught:
            stages_with(bundle, "int8", {})
        assert command in str(caught.value)
        with pytest.raises(ConfigError, match="'head1' has no variant 'int8'") as caught:
            stages_with(bundle, "int8", {}, ["head1"])
        assert command in str(caught.value)
        with pytest.raises(ConfigError, match=r"convert .*b --precision fp16 --out NEW"):
            stages_with(bundle, "fp16", {})

    def test_a_stage_that_does_not_exist(self, tmp_path: Path) -> None:
        bundle = write_toy(tmp_path / "b", {"head1": trained_models()["head1"]})
        with pytest.raises(ConfigError, match=r"no stage 'head7'.*Did you mean 'head"):
            stages_with(bundle, "int8", {}, ["head7"])

    def test_a_base_that_runs_at_it_already(self, tmp_path: Path) -> None:
        bundle = write_toy(tmp_path / "b", {"head1": trained_models()["head1"]})
        base = {"head1": "int8"}
        with pytest.raises(ConfigError, match="that can runs at int8 already"):
            stages_with(bundle, "int8", base)
        with pytest.raises(ConfigError, match="'head1' runs at int8 already"):
            stages_with(bundle, "int8", base, ["head1"])

    def test_one_exit(self, tmp_path: Path) -> None:
        cascade, models = toy_cascade(), trained_models()
        stages = [BuiltStage(s, {"fp32": models[s.name]}) for s in cascade.stages[:2]]
        bundle = write_bundle(
            tmp_path / "b",
            name="one",
            classes=CLASSES,
            image=cascade.image,
            stages=stages,
            exits=cascade.exits[:1],
            provenance={},
        )
        with pytest.raises(ConfigError, match="has one exit"):
            mixes_of(bundle)

    @pytest.mark.parametrize("budget", [-0.01, float("nan"), float("inf")])
    def test_a_budget_that_is_none(self, tmp_path: Path, budget: float) -> None:
        bundle = write_toy(tmp_path / "b", {"head1": trained_models()["head1"]})
        with pytest.raises(ConfigError, match=r"accuracy budget: got .*expected a number >= 0"):
            TestChoice.choose(bundle, {"head1": FASTER}, budget=budget)

    def test_a_faster_stage_without_an_effect(self, tmp_path: Path) -> None:
        bundle = write_toy(tmp_path / "b", {"head1": trained_models()["head1"]})
        mixes, times = mixes_of(bundle), times_of(bundle, {"head1": FASTER})
        before: Figures = at_thresholds(mixes, times, {}, {})
        with pytest.raises(CalibrationError, match="no effect of stage 'head1'"):
            choose_precisions(mixes, times, (), before, ZeroLoss(), budget=0)

    def test_points_whose_thresholds_can_not_be_chosen(self, tmp_path: Path) -> None:
        bundle = write_toy(tmp_path / "b", {})
        with pytest.raises(ConfigError, match="policy: got patience, expected threshold"):
            usable_thresholds(OperatingPoint("p", policy="patience"), bundle)
        point = OperatingPoint("p", thresholds={"saver": 1.5, "middle": 0.5})
        assert usable_thresholds(point, bundle) == {"saver": None, "middle": 0.5}
        never = OperatingPoint("p", policy="never", thresholds={"saver": 0.5})
        assert usable_thresholds(never, bundle) == {"saver": None, "middle": None}
