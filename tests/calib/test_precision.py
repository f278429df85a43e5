"""Which variants are chosen, and with which thresholds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calib.precision import (
    Figures,
    at_thresholds,
    choose_precisions,
    default_choice,
    usable_thresholds,
)
from calib.sensitivity import stage_effects
from calib.thresholds import AccuracyDrop, Goal, ZeroLoss
from edge_runtime import Bundle, CalibrationError, ConfigError, OperatingPoint
from tests.calib.precision_toys import (
    FASTER,
    SLOWER,
    UNSURE,
    mixes_of,
    ruined,
    scaled,
    times_of,
    trained_models,
    write_toy,
)

DEFAULT = ("saver", "segment1", "head1", "segment2", "head2")


class TestChoice:
    """Fast variants are kept as far as accuracy allows, with thresholds of their own."""

    @staticmethod
    def choose(
        bundle: Bundle,
        ratios,
        *,
        goal: Goal | None = None,
        budget: float = 0.01,
        at_any_speed: bool = False,
    ):
        mixes, times, goal = mixes_of(bundle), times_of(bundle, ratios), goal or ZeroLoss()
        before = default_choice(mixes, times, goal, repeats=2)
        effects = stage_effects(mixes, "int8", before.thresholds)
        return choose_precisions(
            mixes,
            times,
            effects,
            before,
            goal,
            budget=budget,
            at_any_speed=at_any_speed,
            repeats=2,
        )

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

    def test_at_any_speed_accuracy_alone_decides(self, tmp_path: Path) -> None:
        models = trained_models()
        variants = {name: models[name] for name in DEFAULT}
        variants["segment2"] = ruined(models["segment2"])
        bundle = write_toy(tmp_path / "b", variants)
        ratios = {**dict.fromkeys(DEFAULT, SLOWER), "segment2": FASTER}
        found = self.choose(bundle, ratios, at_any_speed=True)
        assert sorted(found.variants) == ["head1", "head2", "saver", "segment1"]
        assert found.left["segment2"].endswith("of an exit's labels")
        assert found.after.point.cost > found.before.point.cost
        assert found.rival is not None

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
