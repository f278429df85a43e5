"""What each layer does alone, which ones hurt, and what it is worth to keep those float."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from calib.layer_advice import NOTEWORTHY, exclusion, hurting, remedies
from calib.layer_models import LayerModels
from calib.layer_sensitivity import LayerEffect, layer_effects, stages_with_layers, worst_first
from calib.sensitivity import ExitEffect, StageEffect, stage_effects
from edge_runtime import Bundle, ConfigError
from engines.bundle import BuiltStage, with_variants, write_bundle
from tests.calib.conv_toys import LAYERS, int8_bundle, mixes_of, open_bundle

THRESHOLDS = {"early": 0.6}
#: What a layer that can't hold its input's range is called, and the tensor that it reads.
WORST, RUINED = "Conv4", {("segment1", "b"): 300.0}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return int8_bundle(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def ruined(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return int8_bundle(tmp_path_factory.mktemp("ruined"), RUINED)


def effects_of(bundle: Bundle, layers: str = "all") -> tuple[LayerEffect, ...]:
    stages = stages_with_layers(bundle, layers)
    return layer_effects(mixes_of(bundle), stages, THRESHOLDS, open_bundle)


class TestEffects:
    """One layer in INT8, everything else in float."""

    def test_a_layer_does_what_a_bundle_with_that_layer_alone_does(
        self, bundle: Bundle, tmp_path: Path
    ) -> None:
        found = effects_of(bundle, "segment1")
        assert [(e.stages[0], e.node) for e in found] == [
            ("segment1", name) for name in LAYERS["segment1"]
        ]
        base = bundle.stage_model("segment1", "fp32")
        models = LayerModels(base, bundle.stage_model("segment1", "int8"))
        for one in found:
            alone = with_variants(
                Bundle.open(bundle.path.parent / "float.bundle"),
                {"segment1": {"int8": models.build([one.node])}},
                tmp_path / one.node,
                provenance={},
            )
            (want,) = stage_effects(mixes_of(alone), "int8", THRESHOLDS)
            assert as_stage(one) == want
            assert one.exits[0].signal_shift > 0

    def test_the_only_layer_of_a_stage_does_what_the_stage_does(self, bundle: Bundle) -> None:
        (layer,) = effects_of(bundle, "head1")
        (stage,) = stage_effects(mixes_of(bundle), "int8", THRESHOLDS, stages=["head1"])
        assert as_stage(layer) == stage
        assert layer.operator == "MatMul"

    def test_the_bundle_on_disk_is_left_alone(self, bundle: Bundle, monkeypatch) -> None:
        before = sorted(bundle.path.parent.rglob("*"))
        opened = []

        def interrupted(altered: Bundle, point: object) -> None:
            opened.append(altered)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            layer_effects(mixes_of(bundle), ["segment1"], THRESHOLDS, interrupted)
        assert sorted(bundle.path.parent.rglob("*")) == before
        (altered,) = opened
        assert altered.hash != bundle.hash
        model = altered.stage_model("segment1", "int8")
        artifact = altered.record("segment1").variants["int8"]
        assert len(model) == artifact.size != bundle.record("segment1").variants["int8"].size
        for other in ("preprocess", "segment2"):
            assert altered.stage_model(other, "fp32") == bundle.stage_model(other, "fp32")

    def test_a_layer_with_an_absurd_range_is_the_worst(self, ruined: Bundle) -> None:
        found = effects_of(ruined)
        assert [effect.node for effect in found] == [n for names in LAYERS.values() for n in names]
        worst, second = worst_first(found)[:2]
        assert (worst.stages, worst.node) == (("segment1",), WORST)
        assert worst.agreement_loss > 0.3 > 0.05 > second.agreement_loss


def as_stage(effect: LayerEffect) -> StageEffect:
    return StageEffect(
        effect.stages,
        effect.precision,
        effect.exits,
        effect.exit_agreement,
        effect.accuracy_drop,
    )


class TestAdvice:
    """Layers that surely hurt, and far more than the others."""

    @staticmethod
    def layer(name: str, loss: float) -> LayerEffect:
        exits = (ExitEffect("early", 0.0, 1 - loss, 0.01, 0.0), ExitEffect("final", 0, 1, 0, 0))
        return LayerEffect(("segment1",), "int8", exits, 1 - loss, 0.0, name, "Conv")

    def hurt(self, samples: int, **losses: float) -> list[str]:
        effects = [self.layer(name, loss) for name, loss in losses.items()]
        return [effect.node for effect in hurting(effects, samples)]

    def test_one_that_stands_out_hurts(self) -> None:
        assert self.hurt(5000, a=0.004, b=0.08, c=0.002, d=0.03) == ["b", "d"]

    def test_none_does_where_all_are_alike(self) -> None:
        assert self.hurt(5000, a=0.08, b=0.09, c=0.1, d=0.12) == []

    def test_what_changes_hardly_any_label_does_not_hurt(self) -> None:
        assert self.hurt(50000, a=0.0, b=NOTEWORTHY * 0.9, c=0.0) == []

    def test_few_images_prove_little(self) -> None:
        assert self.hurt(5000, a=0.0, b=0.03, c=0.0) == ["b"]
        assert self.hurt(100, a=0.0, b=0.03, c=0.0) == []

    def test_a_layer_without_others_is_judged_alone(self) -> None:
        assert self.hurt(5000, a=0.08) == ["a"]

    def test_the_remedy_is_measured(self, ruined: Bundle) -> None:
        mixes = mixes_of(ruined)
        (found,) = remedies(mixes, effects_of(ruined), THRESHOLDS, open_bundle)
        assert found.stage == "segment1"
        assert found.exclude_nodes == f"^({WORST})$"
        assert not found.whole
        assert found.elsewhere == ()
        (stage,) = stage_effects(mixes, "int8", THRESHOLDS, stages=["segment1"])
        assert found.before == stage
        assert found.helps
        assert found.after.agreement_loss < 0.05 < 0.3 < found.before.agreement_loss

    def test_there_is_none_where_no_layer_hurts(self, bundle: Bundle) -> None:
        assert remedies(mixes_of(bundle), effects_of(bundle), THRESHOLDS, open_bundle) == ()

    def test_nodes_of_the_same_name_in_other_stages_are_seen(self, tmp_path: Path) -> None:
        bundle = int8_bundle(tmp_path, {("segment2", "t1"): 300.0, ("head1", "t1"): 300.0})
        effects = effects_of(bundle)
        first, second = remedies(mixes_of(bundle), effects, THRESHOLDS, open_bundle)
        assert (first.stage, first.whole, first.elsewhere) == ("head1", True, ("head2",))
        assert first.after.agreement_loss == 0
        assert (second.stage, second.whole, second.elsewhere) == ("segment2", False, ("segment1",))

    @pytest.mark.parametrize("name", ["a.b/c-1", "x|y$", "new\nline\x1b[31m", "ünï\u2028"])
    def test_the_expression_finds_the_name_alone_and_can_be_printed(self, name: str) -> None:
        expression = exclusion([name, "other"])
        assert re.search(expression, name)
        assert not re.search(expression, f"{name}1")
        assert not re.search(expression, "aXb/c-1")
        assert expression.isprintable()


class TestRefusals:
    """Before anything long begins, with the name of the stage."""

    def test_a_variant_that_is_not_made_of_the_float_one(self, tmp_path: Path) -> None:
        good, other = int8_bundle(tmp_path), tmp_path / "other.bundle"
        stages = [self.stage(good, record.name) for record in good.manifest.stages]
        strange = {"fp32": stages[1].default, "int8": stages[1].default}
        stages[1] = BuiltStage(stages[1].stage, strange)
        bundle = self.write(good, other, stages)
        with pytest.raises(ConfigError, match=r"stage 'segment1': .* split .*: nothing in it is"):
            stages_with_layers(bundle, "segment1,head1")
        assert stages_with_layers(bundle, "head1, segment2") == ("head1", "segment2")

    def test_int8_without_a_float_variant(self, tmp_path: Path) -> None:
        good, other = int8_bundle(tmp_path), tmp_path / "other.bundle"
        stages = [self.stage(good, record.name) for record in good.manifest.stages]
        for i in range(1, len(stages)):
            stages[i] = BuiltStage(stages[i].stage, {"int8": stages[i].models["int8"]})
        bundle = self.write(good, other, stages)
        for layers in ("segment2", "all"):
            with pytest.raises(ConfigError, match=r"stage 'seg.*' has no fp32 variant .*got int8"):
                stages_with_layers(bundle, layers)

    def test_a_point_that_runs_something_else(self, bundle: Bundle, tmp_path: Path) -> None:
        half = {"segment1": {"fp16": bundle.stage_model("segment1", "fp32")}}
        both = with_variants(bundle, half, tmp_path / "half", provenance={})
        with pytest.raises(ConfigError, match=r"stage 'segment1' are compared .*: got fp16"):
            stages_with_layers(both, "segment1", {"segment1": "fp16"})
        assert stages_with_layers(both, "all", {"segment2": "int8"}) == (
            "segment1",
            "head1",
            "head2",
        )

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ("segment7", "no stage 'segment7'.*Did you mean"),
            ("preprocess", "'preprocess' has no variant 'int8'"),
            (" ,", "--layers: got ' ,', expected names of stages, or all"),
        ],
    )
    def test_what_is_no_stage_with_layers(self, bundle: Bundle, layers: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            stages_with_layers(bundle, layers)

    @staticmethod
    def stage(bundle: Bundle, name: str) -> BuiltStage:
        record = bundle.record(name)
        return BuiltStage(record.stage, {p: bundle.stage_model(name, p) for p in record.variants})

    @staticmethod
    def write(like: Bundle, out: Path, stages: list[BuiltStage]) -> Bundle:
        return write_bundle(
            out,
            name="other",
            classes=like.manifest.classes,
            image=like.manifest.image,
            stages=stages,
            exits=like.manifest.exits,
            provenance={},
        )
