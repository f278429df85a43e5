"""Bundles are written whole or not at all."""

import dataclasses
import errno
import os
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from edge_runtime.cascade import Exit, Stage
from edge_runtime.errors import ConfigError, EdgeRuntimeError, ManifestError
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.tensors import TensorSpec
from engines.bundle import BuiltStage, with_variants, write_bundle

IMAGE = TensorSpec("image", ("batch", 2), "float32")
MIDDLE = TensorSpec("middle", ("batch", 2), "float32")
LOGITS = TensorSpec("logits", ("batch", 2), "float32")
FIRST = Stage("first", "segment", (IMAGE,), (MIDDLE,))
SECOND = Stage("second", "head", (MIDDLE,), (LOGITS,))


def model(source: str, target: str, operator: str = "Identity") -> bytes:
    graph = helper.make_graph(
        [helper.make_node(operator, [source], [target])],
        "one",
        [helper.make_tensor_value_info(source, TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info(target, TensorProto.FLOAT, ["batch", 2])],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8
    ).SerializeToString()


def write(out: Path, operator: str = "Identity", **changes) -> Bundle:
    parts = {
        "name": "test",
        "classes": ("a", "b"),
        "image": IMAGE,
        "stages": [
            BuiltStage(FIRST, {"fp32": model("image", "middle", operator)}),
            BuiltStage(
                SECOND,
                {"fp32": model("middle", "logits"), "fp16": model("middle", "logits", "Abs")},
            ),
        ],
        "exits": [Exit("only", "logits")],
        "provenance": {"made_by": "a test", "numbers": [1, 2.5]},
    }
    return write_bundle(out, **(parts | changes))


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_writes_a_bundle_that_opens(tmp_path: Path) -> None:
    bundle = write(tmp_path / "a.bundle")
    assert bundle == Bundle.open(tmp_path / "a.bundle")
    assert files(tmp_path) == [
        "a.bundle/manifest.json",
        "a.bundle/stages/first.fp32.onnx",
        "a.bundle/stages/second.fp16.onnx",
        "a.bundle/stages/second.fp32.onnx",
    ]
    assert bundle.precision("second", {}) == "fp32"
    assert bundle.stage_model("second", "fp16") == model("middle", "logits", "Abs")
    assert bundle.manifest.provenance == {"made_by": "a test", "numbers": [1, 2.5]}


def test_the_same_parts_give_the_same_hash(tmp_path: Path) -> None:
    assert write(tmp_path / "a").hash == write(tmp_path / "b").hash
    assert write(tmp_path / "c", "Abs").hash != Bundle.open(tmp_path / "a").hash


def test_operating_points_travel_with_it(tmp_path: Path) -> None:
    point = OperatingPoint("never", policy="never")
    bundle = write(tmp_path / "a", operating_points=[point])
    assert bundle.operating_point("never") == dataclasses.replace(point, bundle=bundle.hash)


def test_a_point_of_another_bundle_is_refused(tmp_path: Path) -> None:
    point = OperatingPoint("old", policy="never", bundle="0" * 64)
    with pytest.raises(ConfigError, match="operating point 'old': bundle: got '000000000000'"):
        write(tmp_path / "a", operating_points=[point])
    assert list(tmp_path.iterdir()) == []


def test_an_old_bundle_is_replaced_only_when_asked(tmp_path: Path) -> None:
    old = write(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"exists.*--force"):
        write(tmp_path / "a", "Abs")
    assert Bundle.open(tmp_path / "a").hash == old.hash
    new = write(tmp_path / "a", "Abs", overwrite=True)
    assert Bundle.open(tmp_path / "a").hash == new.hash != old.hash
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


class _FailsAt:
    """Stands in for a function and raises at one of its calls."""

    def __init__(self, function, call: int, error: BaseException) -> None:
        self.function, self.left, self.error = function, call, error

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.function(*args, **kwargs)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), EdgeRuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["disk-full", "ctrl-c"],
)
@pytest.mark.parametrize(
    ("place", "name", "call", "old"),
    [
        (Path, "write_bytes", 1, True),
        (Path, "write_bytes", 3, True),
        (Path, "write_bytes", 3, False),
        (os, "fsync", 1, True),
        (os, "fsync", 4, True),
        (os, "fsync", 4, False),
        (Path, "rename", 1, True),
        (Path, "rename", 2, True),
        (Path, "rename", 1, False),
    ],
)
def test_a_failure_leaves_the_old_bundle_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place, name, call, old, error, raised
) -> None:
    before = write(tmp_path / "a") if old else None
    failing = _FailsAt(getattr(place, name), call, error)
    # A function, not an object, so that methods of Path bind.
    monkeypatch.setattr(place, name, lambda *args, **kwargs: failing(*args, **kwargs))
    with pytest.raises(raised):
        write(tmp_path / "a", "Abs", overwrite=True)
    monkeypatch.undo()
    assert failing.left <= 0, "the failure was not reached"
    if before is not None:
        assert Bundle.open(tmp_path / "a").hash == before.hash
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
    else:
        assert list(tmp_path.iterdir()) == []


def test_disk_full_is_one_line_that_names_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(EdgeRuntimeError, match=r"a was not written: .*No space left on device"):
        write(tmp_path / "a")


def external() -> bytes:
    """A model whose tensor is in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    graph = helper.make_graph([], "g", [], [], [tensor])
    return helper.make_model(graph).SerializeToString()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"exits": [Exit("only", "nothing")]}, ConfigError, "exit 'only': no stage produces"),
        ({"classes": ("a", "b", "c")}, ConfigError, "exit 'only': logits 'logits'"),
        (
            {"stages": [BuiltStage(SECOND, {"fp32": model("middle", "logits")})]},
            ConfigError,
            "stage 'second': nobody produces its input 'middle'",
        ),
        ({"boundary_dtype": "int8"}, ConfigError, "boundary_dtype: got 'int8'"),
        (
            {"boundary_dtype": "float16"},
            ConfigError,
            "stage 'first': output 'middle' is not of the boundary's dtype: got float32",
        ),
        (
            {
                "stages": [
                    BuiltStage(FIRST, {"fp32": external()}),
                    BuiltStage(SECOND, {"fp32": model("middle", "logits")}),
                ]
            },
            ManifestError,
            "stage 'first' (fp32) refers to external data",
        ),
        (
            {
                "stages": [
                    BuiltStage(FIRST, {"fp32": b"this is no ONNX file"}),
                    BuiltStage(SECOND, {"fp32": model("middle", "logits")}),
                ]
            },
            ManifestError,
            "stage 'first' (fp32) is not an ONNX file",
        ),
        (
            {
                "stages": [
                    BuiltStage(FIRST, {"FP 32": model("image", "middle")}),
                    BuiltStage(SECOND, {"fp32": model("middle", "logits")}),
                ]
            },
            ConfigError,
            "stage 'first': precision 'FP 32'",
        ),
        (
            {
                "stages": [
                    BuiltStage(FIRST, {}),
                    BuiltStage(SECOND, {"fp32": model("middle", "logits")}),
                ]
            },
            ConfigError,
            "stage 'first' has no variant",
        ),
    ],
)
def test_refuses_parts_that_make_no_bundle(
    tmp_path: Path, changes: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        write(tmp_path / "a", **changes)
    assert str(raised.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../first", "a/b", ".hidden", "", "a b", "ü"])
def test_refuses_stage_names_that_are_no_file_names(tmp_path: Path, name: str) -> None:
    stages = [
        BuiltStage(dataclasses.replace(FIRST, name=name), {"fp32": model("image", "middle")}),
        BuiltStage(SECOND, {"fp32": model("middle", "logits")}),
    ]
    with pytest.raises(ConfigError, match="stage name"):
        write(tmp_path / "a", stages=stages)
    assert list(tmp_path.iterdir()) == []


# More variants ----------------------------------------------------------------------------------


MORE = {
    "first": {"fp16": model("image", "middle", "Abs")},
    "second": {"int8": model("middle", "logits", "Neg")},
}


def add(bundle: Bundle, out: Path, models=MORE, **options) -> Bundle:
    return with_variants(bundle, models, out, provenance={"made_by": "a converter"}, **options)


def test_variants_come_behind_those_that_are_there(tmp_path: Path) -> None:
    old = write(tmp_path / "old")
    new = add(old, tmp_path / "new")
    assert new == Bundle.open(tmp_path / "new")
    assert {r.name: list(r.variants) for r in new.manifest.stages} == {
        "first": ["fp32", "fp16"],
        "second": ["fp32", "fp16", "int8"],
    }
    assert new.stage_model("second", "int8") == MORE["second"]["int8"]
    for record in old.manifest.stages:
        for precision in record.variants:
            have, want = (b.stage_model(record.name, precision) for b in (new, old))
            assert have == want
    assert new.precision("second", {}) == "fp32"
    assert new.cascade == old.cascade and new.hash != old.hash
    assert Bundle.open(tmp_path / "old") == old


def test_provenance_grows(tmp_path: Path) -> None:
    old = write(tmp_path / "old")
    new = add(old, tmp_path / "new", {"first": MORE["first"]})
    last = add(new, tmp_path / "last", {"second": MORE["second"]})
    assert last.manifest.provenance == {
        "made_by": "a test",
        "numbers": [1, 2.5],
        "made_of": new.hash,
        "conversions": [
            {"made_by": "a converter", "made_of": old.hash},
            {"made_by": "a converter", "made_of": new.hash},
        ],
    }


def test_operating_points_are_carried_over(tmp_path: Path) -> None:
    old = write(tmp_path / "old")
    points = [
        OperatingPoint("chosen", bundle=old.hash, chosen_on={"data": "abc"}),
        OperatingPoint("of-variants", bundle=old.hash, variants={"second": "fp16"}),
    ]
    for point in points:
        old.write_operating_point(point)
    new = add(old, tmp_path / "new")
    assert list(new.operating_points()) == ["chosen", "of-variants"]
    for point in points:
        assert new.operating_point(point.name) == dataclasses.replace(
            point, bundle=new.hash, chosen_on={**point.chosen_on, "carried_from": old.hash}
        )


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"second": {"fp16": b""}}, "stage 'second' has a variant 'fp16' already"),
        ({"third": {"fp16": b""}}, "the bundle has no stage 'third'"),
        ({}, "no variant to add"),
        ({"first": {}}, "no variant to add"),
        ({"first": {"FP 16": model("image", "middle")}}, "stage 'first': precision 'FP 16'"),
    ],
)
def test_refuses_variants(tmp_path: Path, models: dict, message: str) -> None:
    old = write(tmp_path / "old")
    with pytest.raises(ConfigError) as raised:
        add(old, tmp_path / "new", models)
    assert str(raised.value).startswith(message)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_refuses_variants_with_external_data(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"stage 'first' \(fp16\) refers to external data"):
        add(write(tmp_path / "old"), tmp_path / "new", {"first": {"fp16": external()}})


def test_a_bundle_can_get_variants_in_its_place(tmp_path: Path) -> None:
    old = write(tmp_path / "a")
    with pytest.raises(ConfigError, match="exists"):
        add(old, tmp_path / "a")
    new = add(old, tmp_path / "a", overwrite=True)
    assert Bundle.open(tmp_path / "a") == new
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
