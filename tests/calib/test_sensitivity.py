"""What variants do to each exit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from calib.sensitivity import StageEffect, stage_effects, stages_with
from edge_runtime import ConfigError
from engines.bundle import BuiltStage, write_bundle
from engines.verify import run_stages
from tests.calib.precision_toys import (
    mixes_of,
    ruined,
    scaled,
    toy_data,
    trained_models,
    write_toy,
)
from tests.toys import CLASSES, toy_cascade


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
