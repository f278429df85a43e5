"""Blocks at several precisions: what is loaded, what is run, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime import Bundle, ConfigError, OperatingPoint, Stage
from edge_runtime.blocks import Blocks, variants_of
from edge_runtime.paths import Paths
from engines.bundle import BuiltStage, with_variants, write_bundle
from tests.edge_runtime.gated_toys import EXITS, LEVELS, gate_model, gate_point, gated_bundle
from tests.edge_runtime.gates import all_paths
from tests.toys import dense_model, toy_cascade

PATHS = Paths(LEVELS, EXITS, all_paths(3, 3))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return gated_bundle(tmp_path_factory.mktemp("blocks"))


def runs(blocks: Blocks, bundle: Bundle) -> list[list[tuple[str, ...]]]:
    """Per block and level, what the backend is asked to run."""
    steps = bundle.cascade.plan(range(3)).steps
    return [
        [blocks.runs(step, level) for level in blocks.levels_at(i)] for i, step in enumerate(steps)
    ]


def test_a_stage_is_run_at_the_level_where_it_has_it_and_at_its_own_elsewhere(
    bundle: Bundle,
) -> None:
    blocks = Blocks(bundle, PATHS, {})
    assert runs(blocks, bundle) == [
        [("preprocess", "saver")],
        [("segment1", "head1"), ("segment1.fp16", "head1"), ("segment1.int8", "head1")],
        [("segment2", "head2"), ("segment2", "head2.fp16"), ("segment2.int8", "head2.int8")],
    ]
    assert blocks.precisions(bundle.cascade.plan(range(3)).steps[2], 1) == ("fp32", "fp16")


def test_what_has_another_precision_by_default_is_run_at_the_level_all_the_same(
    bundle: Bundle,
) -> None:
    blocks = Blocks(bundle, PATHS, {"segment1": "int8", "segment2": "int8"})
    assert runs(blocks, bundle)[1:] == [
        [("segment1.fp32", "head1"), ("segment1.fp16", "head1"), ("segment1", "head1")],
        [("segment2.fp32", "head2"), ("segment2", "head2.fp16"), ("segment2", "head2.int8")],
    ]


def test_each_variant_that_a_path_takes_is_loaded_once_and_no_other(bundle: Bundle) -> None:
    plan = bundle.cascade.plan(range(3))
    some = Paths(LEVELS, EXITS, ((0,), (0, 0), (0, 0, 0), (0, 0, 2)))
    blocks = Blocks(bundle, some, {"segment1": "fp16"})
    loaded = blocks.loaded(plan)
    assert [stage.name for stage in loaded.stages] == [
        *("preprocess", "saver", "segment1.fp32", "head1"),
        *("segment2", "head2", "segment2.int8", "head2.int8"),
    ]
    wanted = {stage.name: (stage.inputs, stage.outputs) for stage in plan.stages}
    for stage in loaded.stages:
        assert (stage.inputs, stage.outputs) == wanted[stage.name.partition(".")[0]]
    # Those that are built are the same.
    chosen = {(name, at) for choice in blocks.choices(plan) for name, at in choice.items()}
    assert {(n, at) for n, at in chosen if n in ("saver", "segment1", "segment2", "head2")} == {
        *(("saver", "fp32"), ("segment1", "fp32"), ("segment2", "fp32"), ("segment2", "int8")),
        *(("head2", "fp32"), ("head2", "int8")),
    }


def test_a_variant_has_the_manifest_s_entry_of_its_stage(bundle: Bundle) -> None:
    record = bundle.record("segment1.int8")
    assert (record.name, list(record.variants)) == ("segment1", ["int8"])
    assert bundle.precision("segment1.int8", {"segment1": "fp16"}) == "int8"
    assert bundle.stage_model("segment1.int8", "int8") == bundle.stage_model("segment1", "int8")
    with pytest.raises(ConfigError, match=r"no stage 'head1.int8'"):
        bundle.record("head1.int8")


def test_a_level_that_no_stage_has_is_refused_unless_no_path_takes_it(tmp_path: Path) -> None:
    from tests.toys import toy_bundle

    bundle = toy_bundle(tmp_path / "one.bundle")
    levels = ("fp32", "int8")
    with pytest.raises(ConfigError, match="level 'int8': no stage of the bundle") as caught:
        Blocks(bundle, Paths(levels, EXITS, all_paths(2, 3)), {}).check()
    assert "saver (fp32), segment1 (fp32)" in str(caught.value)
    assert "edge-runtime quantize" in str(caught.value)
    Blocks(bundle, Paths(levels, EXITS, all_paths(1, 3)), {}).check()


def test_a_stage_that_is_called_as_a_variant_is_refused(tmp_path: Path) -> None:
    cascade = toy_cascade()
    called = {"head1": "segment1.int8"}
    models = {
        s.name: dense_model(s.inputs[0].name, s.outputs[0].name, 3, 4, seed=0)
        for s in cascade.stages
    }
    bundle = write_bundle(
        tmp_path / "named.bundle",
        name="named",
        classes=cascade.classes,
        image=cascade.image,
        stages=[
            BuiltStage(
                Stage(called.get(s.name, s.name), s.kind, s.inputs, s.outputs),
                dict.fromkeys(("fp32", "int8"), models[s.name]),
            )
            for s in cascade.stages
        ],
        exits=cascade.exits,
        provenance={},
    )
    blocks = Blocks(bundle, Paths(("fp32", "int8"), EXITS, all_paths(2, 3)), {})
    with pytest.raises(ConfigError, match=r"'segment1\.int8' is called as the variant of"):
        blocks.loaded(bundle.cascade.plan(range(3)))


def test_a_point_without_a_gate_has_one_choice(bundle: Bundle) -> None:
    point = OperatingPoint("plain", variants={"segment1": "int8"})
    assert variants_of(bundle, point) == [{"segment1": "int8"}]


def test_a_gate_stays_behind_when_its_bundle_gets_more_variants(tmp_path: Path) -> None:
    bundle = gated_bundle(tmp_path)
    gate_point(bundle, gate_model(bundle))
    bundle.write_operating_point(OperatingPoint("plain", bundle=bundle.hash))
    models = {"saver": {"int8": bundle.stage_model("saver", "fp32")}}
    more = with_variants(bundle, models, tmp_path / "more.bundle", provenance={})
    assert list(more.operating_points()) == ["plain"]
