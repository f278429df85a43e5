"""Bundles: what is read, and every way in which one can be broken or hostile."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from edge_runtime.errors import ConfigError, EdgeRuntimeError, ManifestError
from edge_runtime.files import sha256
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from tests.edge_runtime.bundles import (
    CLASSES,
    artifact,
    external,
    linear,
    little_parts,
    model,
    refused,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return little_parts().write(tmp_path / "little.bundle")


@pytest.fixture
def bundle(folder: Path) -> Bundle:
    return Bundle.open(folder)


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class TestReading:
    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    @pytest.mark.parametrize("features", [1, 5])
    def test_opens_what_was_written(self, tmp_path, dtype, features):
        parts = little_parts(dtype, features)
        bundle = Bundle.open(parts.write(tmp_path / "b"))
        assert bundle.manifest.name == "little"
        assert bundle.cascade.classes == CLASSES
        assert [stage.name for stage in bundle.cascade.stages] == ["saver", "segment", "head"]
        assert bundle.cascade.exits[1].logits == "late"
        for stage in bundle.manifest.stages:
            assert (
                bundle.stage_model(stage.name, "fp32")
                == parts.files[f"stages/{stage.name}.fp32.onnx"]
            )
        assert bundle.hash == sha256((tmp_path / "b" / "manifest.json").read_bytes())

    def test_its_stages_are_real(self, bundle):
        saver = ReferenceEvaluator(onnx.load_model_from_string(bundle.stage_model("saver", "fp32")))
        (logits,) = saver.run(None, {"image": np.ones((2, 4), np.float32)})
        assert logits.shape == (2, 3)

    def test_a_path_may_be_text_or_a_link_to_a_bundle(self, folder, tmp_path):
        (tmp_path / "current").symlink_to("little.bundle")
        assert Bundle.open(str(tmp_path / "current")).hash == Bundle.open(folder).hash

    def test_the_hash_is_that_of_the_contents(self, folder, tmp_path):
        shutil.copytree(folder, tmp_path / "copy")
        assert Bundle.open(tmp_path / "copy").hash == Bundle.open(folder).hash
        changed = json.loads((folder / "manifest.json").read_text())
        changed["name"] = "other"
        (folder / "manifest.json").write_text(json.dumps(changed))
        assert Bundle.open(tmp_path / "copy").hash != Bundle.open(folder).hash

    def test_the_first_variant_is_the_default(self, tmp_path):
        parts = little_parts()
        parts.add_variant("head", "int8", linear("features", "late", 5, 3, seed=9))
        bundle = Bundle.open(parts.write(tmp_path / "b"))
        assert bundle.precision("head", {}) == "fp32"
        assert bundle.precision("head", {"head": "int8"}) == "int8"
        assert bundle.precision("saver", {"head": "int8"}) == "fp32"
        with refused(ConfigError, "stage 'saver': variant: got 'int8', expected fp32"):
            bundle.precision("saver", {"saver": "int8"})

    def test_an_unknown_stage_names_the_nearest(self, bundle):
        with refused(ConfigError, "no stage 'segmnt'. Did you mean 'segment'?"):
            bundle.record("segmnt")


class TestAltered:
    """Files that are not what the manifest says."""

    def test_no_bundle(self, tmp_path):
        with refused(ManifestError, "the bundle", "does not exist", "edge-runtime export"):
            Bundle.open(tmp_path / "absent")
        (tmp_path / "file").write_text("{}")
        with refused(ManifestError, "does not exist"):
            Bundle.open(tmp_path / "file")

    def test_no_manifest(self, folder):
        (folder / "manifest.json").unlink()
        with refused(ManifestError, "manifest", "manifest.json does not exist"):
            Bundle.open(folder)

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
    def test_a_truncated_manifest(self, folder, share):
        text = (folder / "manifest.json").read_bytes()
        (folder / "manifest.json").write_bytes(text[: int(len(text) * share)])
        with refused(ManifestError, "manifest.json is not whole", "make it again"):
            Bundle.open(folder)

    def test_a_manifest_that_is_no_file(self, folder):
        (folder / "manifest.json").unlink()
        (folder / "manifest.json").mkdir()
        with refused(ManifestError, "is not a plain file"):
            Bundle.open(folder)

    @pytest.mark.parametrize("stage", ["saver", "segment", "head"])
    def test_a_missing_stage(self, folder, stage):
        (folder / f"stages/{stage}.fp32.onnx").unlink()
        with refused(ManifestError, f"stages/{stage}.fp32.onnx is missing", "Restore it"):
            Bundle.open(folder)

    def test_a_truncated_stage(self, folder):
        file = folder / "stages/head.fp32.onnx"
        data = file.read_bytes()
        file.write_bytes(data[:-1])
        expected = f"size: got {len(data) - 1}, expected {len(data)}"
        with refused(ManifestError, "head.fp32.onnx was altered", expected, "Restore the file"):
            Bundle.open(folder)

    def test_an_altered_stage(self, folder):
        file = folder / "stages/head.fp32.onnx"
        data = bytearray(file.read_bytes())
        before = sha256(bytes(data))
        data[-1] ^= 1
        file.write_bytes(data)
        with refused(ManifestError, "was altered: sha256", sha256(bytes(data)), before):
            Bundle.open(folder)

    def test_a_stage_that_is_altered_after_opening(self, bundle):
        file = bundle.path / "stages/head.fp32.onnx"
        file.write_bytes(bytes(len(file.read_bytes())))
        with refused(ManifestError, "was altered: sha256"):
            bundle.stage_model("head", "fp32")

    @pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
    def test_a_stage_that_is_no_file(self, folder, make):
        (folder / "stages/head.fp32.onnx").unlink()
        make(folder / "stages/head.fp32.onnx")
        with refused(ManifestError, "head.fp32.onnx is not a plain file"):
            Bundle.open(folder)

    def test_a_hash_of_another_file(self, tmp_path):
        parts = little_parts()
        variants = parts.stage("head")["variants"]
        variants["fp32"]["sha256"] = parts.stage("saver")["variants"]["fp32"]["sha256"]
        with refused(ManifestError, "head.fp32.onnx was altered: sha256"):
            Bundle.open(parts.write(tmp_path / "b"))

    def test_a_stage_that_is_no_onnx_file(self, tmp_path):
        parts = little_parts()
        parts.add_variant("head", "fp32", b"\x0b not ONNX")
        with refused(ManifestError, "head.fp32.onnx is not an ONNX file"):
            Bundle.open(parts.write(tmp_path / "b"))


class TestVersions:
    @pytest.mark.parametrize("version", [0, 2, 99, None, "1", [1], "\n"])
    def test_an_unknown_version_names_both(self, tmp_path, version):
        parts = little_parts()
        parts.manifest["schema_version"] = version
        parts.manifest["a_key_of_the_future"] = 1
        with refused(
            ManifestError,
            f"schema version: got {version!r}, expected 1",
            "another version of edge-runtime",
        ):
            Bundle.open(parts.write(tmp_path / "b"))

    @pytest.mark.parametrize("version", [True, 1.0])
    def test_only_the_integer_counts(self, tmp_path, version):
        parts = little_parts()
        parts.manifest["schema_version"] = version
        with refused(ManifestError, "schema_version: got"):
            Bundle.open(parts.write(tmp_path / "b"))

    @pytest.mark.parametrize("manifest", [[], None, "text", 1])
    def test_no_version(self, folder, manifest):
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with refused(ManifestError, "schema version: got None, expected 1"):
            Bundle.open(folder)


def set_path(manifest: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    """Set, or with `...` remove, the value at a path of keys and indices."""
    for key in path[:-1]:
        manifest = manifest[key]
    if value is ...:
        del manifest[path[-1]]
    else:
        manifest[path[-1]] = value


class TestManifestsThatDoNotFit:
    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (("clases",), [], "unknown key 'clases'. Did you mean 'classes'?"),
            (("classes",), ..., "the key 'classes' is missing"),
            (("classes",), "abc", "classes: got str 'abc', expected a list"),
            (("classes",), ["ant", "bee", "bee"], "the class name 'bee' is used twice"),
            (("classes",), ["ant", "bee", ""], "the class name '' is empty"),
            (("classes",), ["ant"], "a classifier needs classes: got 1, expected >= 2"),
            (("classes",), ["ant", "bee"], "logits 'early': got (batch, 3) float32"),
            (("boundary_dtype",), "float64", "boundary_dtype: got 'float64'"),
            (("boundary_dtype",), "int8", "boundary_dtype: got 'int8', expected float32 or"),
            (("image", "dtype"), "float64", "image: tensor 'image': dtype: got 'float64'"),
            (("image", "dtype"), "float16", "input 'image' does not fit what the image writes"),
            (("image", "shape"), [4], "image: tensor 'image': first axis"),
            (("image", "shape"), ["batch", 10**30], "does not fit what the image writes"),
            (("image", "shape"), ["batch", 4.0], "image: shape[1]: got float 4.0"),
            (("image", "shape"), ["batch", -4], "shape: got ['batch', -4]"),
            (("stages",), [], "at least one stage and one exit"),
            (("exits",), [], "at least one stage and one exit"),
            (("stages", 0, "kind"), "savior", "kind: got 'savior'"),
            (("stages", 0, "name"), "head", "the stage name 'head' is used twice"),
            (("stages", 0, "name"), "../head", "stage name '../head'"),
            (("stages", 0, "name"), "a/b", "stage name 'a/b'"),
            (("stages", 0, "name"), "", "stage name ''"),
            (("stages", 0, "name"), ".hidden", "stage name '.hidden'"),
            (("stages", 0, "name"), "a\nb", "stage name 'a\\nb'"),
            (("stages", 0, "variants"), {}, "stage 'saver' has no variant"),
            (("stages", 0, "variants", "../fp32"), ("stages", "x"), "got list"),
            (("stages", 0, "inputs"), [], "needs at least one input"),
            (("stages", 0, "outputs"), [], "needs at least one input and one output"),
            (("stages", 0, "inputs", 0, "name"), "nothing", "nobody produces its input 'nothing'"),
            (("stages", 0, "outputs", 0, "name"), "image", "tensor 'image' has two producers"),
            (("stages", 0, "outputs", 0, "name"), "late", "tensor 'late' has two producers"),
            (("stages", 1, "outputs", 0, "shape"), ["batch", 6], "'features' does not fit"),
            (("stages", 1, "outputs", 0, "dtype"), "float16", "'features' does not fit"),
            (("stages", 1, "inputs", 0, "name"), "late", "stage 'segment' is part of a cycle"),
            (("stages", 2, "outputs", 0, "shape"), ["batch", 4], "logits 'late': got (batch, 4)"),
            (("stages", 2, "outputs", 0, "dtype"), "int32", "logits 'late': got (batch, 3) int32"),
            (("exits", 0, "logits"), "nothing", "no stage produces its logits 'nothing'"),
            (("exits", 0, "logits"), "image", "no stage produces its logits 'image'"),
            (("exits", 0, "name"), "late", "the exit name 'late' is used twice"),
        ],
    )
    def test_names_what_does_not_fit(self, tmp_path, path, value, message):
        parts = little_parts()
        set_path(parts.manifest, path, value)
        with refused(ManifestError, f"manifest {tmp_path}/b/manifest.json: ", message):
            Bundle.open(parts.write(tmp_path / "b"))

    def test_stages_out_of_order(self, tmp_path):
        parts = little_parts()
        parts.manifest["stages"].reverse()
        with refused(ManifestError, "stage 'head' is listed before 'segment'", "in order"):
            Bundle.open(parts.write(tmp_path / "b"))

    @pytest.mark.parametrize(
        "precision", ["../fp32", "FP32", "", "fp32.onnx", "a b", "fp32\n", "/fp32"]
    )
    def test_a_precision_names_a_file(self, tmp_path, precision):
        parts = little_parts()
        variants = parts.stage("head")["variants"]
        variants[precision] = variants["fp32"]
        with refused(ManifestError, f"stage 'head': precision {precision!r}"):
            Bundle.open(parts.write(tmp_path / "b"))

    @pytest.mark.parametrize(
        "digest", ["", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "0" * 64 + "\n"]
    )
    def test_a_hash_is_64_hex_digits(self, tmp_path, digest):
        parts = little_parts()
        parts.stage("head")["variants"]["fp32"]["sha256"] = digest
        with refused(ManifestError, "sha256: got", "expected 64 hex digits"):
            Bundle.open(parts.write(tmp_path / "b"))


class TestPathsThatLeave:
    """A bundle comes from anywhere; it may read and write nothing outside of its folder."""

    @pytest.fixture
    def parts(self, tmp_path):
        """A bundle whose head names another file, and such a file outside."""
        parts = little_parts()
        (tmp_path / "secret.onnx").write_bytes(parts.files["stages/head.fp32.onnx"])
        return parts

    def opened(self, parts, tmp_path, file: str) -> Bundle:
        parts.stage("head")["variants"]["fp32"]["file"] = file
        return Bundle.open(parts.write(tmp_path / "b"))

    @pytest.mark.parametrize(
        "file", ["../secret.onnx", "stages/../../secret.onnx", "stages/..", "..", "..\\secret.onnx"]
    )
    def test_upwards(self, parts, tmp_path, file):
        with refused(ManifestError, f"the path {file!r} leaves the bundle"):
            self.opened(parts, tmp_path, file)

    def test_absolute(self, parts, tmp_path):
        with refused(ManifestError, "leaves the bundle"):
            self.opened(parts, tmp_path, str(tmp_path / "secret.onnx"))

    @pytest.mark.parametrize("file", ["C:\\secret.onnx", "\\\\host\\share", "stages\\x.onnx"])
    def test_backslash(self, parts, tmp_path, file):
        with refused(ManifestError, "leaves the bundle"):
            self.opened(parts, tmp_path, file)

    @pytest.mark.parametrize("file", ["", ".", "stages", "stages/", "manifest.json"])
    def test_what_is_no_stage(self, parts, tmp_path, file):
        with pytest.raises(ManifestError, match=r"plain file|was altered|can't be read|missing"):
            self.opened(parts, tmp_path, file)

    @pytest.mark.parametrize("file", ["stages/\0", "stages/\ud800.onnx", "x" * 5000])
    def test_names_that_no_file_can_have(self, parts, tmp_path, file):
        with refused(ManifestError, "can't be read"):
            self.opened(parts, tmp_path, file)

    def test_a_linked_file(self, parts, tmp_path):
        folder = parts.write(tmp_path / "b")
        (folder / "stages/head.fp32.onnx").unlink()
        (folder / "stages/head.fp32.onnx").symlink_to(tmp_path / "secret.onnx")
        with refused(ManifestError, "head.fp32.onnx is a symbolic link"):
            Bundle.open(folder)

    def test_a_linked_folder(self, parts, tmp_path):
        folder = parts.write(tmp_path / "b")
        (folder / "stages").rename(tmp_path / "elsewhere")
        (folder / "stages").symlink_to(tmp_path / "elsewhere")
        with refused(ManifestError, "stages is a symbolic link"):
            Bundle.open(folder)

    def test_a_link_within_the_bundle(self, parts, tmp_path):
        folder = parts.write(tmp_path / "b")
        (folder / "stages/head.fp32.onnx").rename(folder / "stages/other.onnx")
        (folder / "stages/head.fp32.onnx").symlink_to("other.onnx")
        with refused(ManifestError, "is a symbolic link"):
            Bundle.open(folder)

    def test_a_link_that_is_made_after_opening(self, parts, tmp_path):
        bundle = Bundle.open(parts.write(tmp_path / "b"))
        (bundle.path / "stages/head.fp32.onnx").unlink()
        (bundle.path / "stages/head.fp32.onnx").symlink_to(tmp_path / "secret.onnx")
        with refused(ManifestError, "is a symbolic link"):
            bundle.stage_model("head", "fp32")

    def test_a_linked_manifest(self, parts, tmp_path):
        folder = parts.write(tmp_path / "b")
        (folder / "manifest.json").rename(tmp_path / "manifest.json")
        (folder / "manifest.json").symlink_to(tmp_path / "manifest.json")
        with refused(ManifestError, "manifest.json is a symbolic link"):
            Bundle.open(folder)

    def test_external_data(self, parts, tmp_path):
        graph = model(_graph_with(external())).SerializeToString()
        parts.add_variant("head", "fp32", graph)
        with refused(ManifestError, "head.fp32.onnx refers to external data"):
            Bundle.open(parts.write(tmp_path / "b"))

    def test_external_data_in_a_variant_that_is_not_the_default(self, parts, tmp_path):
        graph = model(_graph_with(external())).SerializeToString()
        parts.add_variant("head", "int8", graph)
        with refused(ManifestError, "head.int8.onnx refers to external data"):
            Bundle.open(parts.write(tmp_path / "b"))


def _graph_with(tensor):
    return helper.make_graph(
        [helper.make_node("MatMul", ["features", "secret"], ["late"])],
        "g",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 5])],
        [helper.make_tensor_value_info("late", TensorProto.FLOAT, ["batch", 3])],
        [tensor],
    )


class TestOperatingPoints:
    @pytest.fixture
    def point(self, bundle) -> OperatingPoint:
        return OperatingPoint("zero_loss", thresholds={"early": 0.75}, bundle=bundle.hash)

    def test_what_is_written_is_read(self, bundle, point):
        before = bundle.hash
        path = bundle.write_operating_point(point)
        assert path == bundle.path / "operating_points/zero_loss.json"
        assert bundle.operating_points() == {"zero_loss": path}
        assert bundle.operating_point("zero_loss") == point
        assert Bundle.open(bundle.path).hash == before

    def test_without_any(self, bundle):
        assert bundle.operating_points() == {}
        with refused(ManifestError, "has no operating point 'x'. Valid: none", "thresholds"):
            bundle.operating_point("x")

    def test_an_unknown_one_names_the_nearest(self, bundle, point):
        bundle.write_operating_point(point)
        with refused(ManifestError, "'zero_los'. Did you mean 'zero_loss'?"):
            bundle.operating_point("zero_los")

    def test_one_of_the_same_name_is_replaced(self, bundle, point):
        bundle.write_operating_point(point)
        other = OperatingPoint("zero_loss", thresholds={"early": 0.5}, bundle=bundle.hash)
        bundle.write_operating_point(other)
        assert bundle.operating_point("zero_loss") == other

    def test_a_point_of_another_bundle(self, bundle, point, tmp_path):
        other = Bundle.open(little_parts(features=6).write(tmp_path / "other"))
        theirs = OperatingPoint("theirs", bundle=other.hash)
        with refused(ConfigError, "operating point 'theirs': bundle", bundle.hash[:12]):
            bundle.write_operating_point(theirs)
        path = other.write_operating_point(theirs)
        (bundle.path / "operating_points").mkdir()
        shutil.copy(path, bundle.path / "operating_points")
        for name in ("theirs", str(path)):
            with refused(
                ManifestError,
                "theirs.json was chosen on another bundle",
                f"got {other.hash[:12]}, expected {bundle.hash[:12]}",
                "Choose it again with",
            ):
                bundle.operating_point(name)

    def test_a_point_made_by_hand_belongs_to_every_bundle(self, bundle, tmp_path):
        by_hand = OperatingPoint("by_hand", thresholds={"early": 0.5})
        by_hand.write(tmp_path / "by_hand.json")
        assert bundle.operating_point(str(tmp_path / "by_hand.json")) == by_hand

    def test_a_linked_point(self, bundle, point, tmp_path):
        point.write(tmp_path / "outside.json")
        (bundle.path / "operating_points").mkdir()
        (bundle.path / "operating_points/inside.json").symlink_to(tmp_path / "outside.json")
        with refused(ManifestError, "inside.json is a symbolic link"):
            bundle.operating_point("inside")

    def test_a_linked_folder_of_points(self, bundle, point, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        point.write(tmp_path / "elsewhere/zero_loss.json")
        (bundle.path / "operating_points").symlink_to(tmp_path / "elsewhere")
        with refused(ManifestError, "operating_points is a symbolic link"):
            bundle.operating_points()
        with refused(ManifestError, "operating_points is a symbolic link"):
            bundle.operating_point("zero_loss")
        with refused(ManifestError, "operating_points is a symbolic link"):
            bundle.write_operating_point(OperatingPoint("new", bundle=bundle.hash))
        assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["zero_loss.json"]

    @pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"name": "x"', b"\xff"])
    def test_one_that_is_not_whole(self, bundle, text):
        (bundle.path / "operating_points").mkdir()
        (bundle.path / "operating_points/x.json").write_bytes(text)
        with refused(ManifestError, "operating point", "operating_points/x.json"):
            bundle.operating_point("x")

    def test_one_that_is_half_written_is_not_listed(self, bundle, point, monkeypatch):
        def full(fd):
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(os, "fsync", full)
        with refused(EdgeRuntimeError, "zero_loss.json can't be written: No space left on device"):
            bundle.write_operating_point(point)
        assert bundle.operating_points() == {}
        assert list((bundle.path / "operating_points").iterdir()) == []

    def test_a_folder_that_can_not_be_made(self, bundle, point):
        (bundle.path / "operating_points").write_text("")
        with refused(EdgeRuntimeError, "operating_points can't be made: File exists"):
            bundle.write_operating_point(point)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"thresholds": {"erly": 0.5}}, "no exit 'erly'. Did you mean 'early'?"),
            ({"temperatures": {"lat": 1.0}}, "no exit 'lat'. Did you mean 'late'?"),
            ({"variants": {"hed": "fp32"}}, "no stage 'hed'. Did you mean 'head'?"),
            ({"variants": {"head": "int8"}}, "stage 'head': variant: got 'int8', expected fp32"),
        ],
    )
    def test_one_that_does_not_fit_is_not_written(self, bundle, fields, message):
        with refused(ConfigError, message):
            bundle.write_operating_point(OperatingPoint("x", bundle=bundle.hash, **fields))
        assert bundle.operating_points() == {}


def test_refusing_changes_nothing(tmp_path):
    parts = little_parts()
    parts.stage("head")["variants"]["fp32"]["size"] += 1
    folder = parts.write(tmp_path / "b")
    before = everything_in(tmp_path)
    with pytest.raises(ManifestError):
        Bundle.open(folder)
    assert everything_in(tmp_path) == before


paths = st.sampled_from(
    [
        ("schema_version",),
        ("classes",),
        ("classes", 0),
        ("image",),
        ("image", "shape"),
        ("image", "shape", 1),
        ("stages",),
        ("stages", 1),
        ("stages", 0, "inputs"),
        ("stages", 0, "inputs", 0, "name"),
        ("stages", 2, "outputs", 0, "shape", 0),
        ("stages", 2, "variants"),
        ("stages", 2, "variants", "fp32"),
        ("stages", 2, "variants", "fp32", "file"),
        ("stages", 2, "variants", "fp32", "size"),
        ("exits", 0),
        ("exits", 0, "logits"),
        ("provenance",),
        ("boundary_dtype",),
    ]
)
values = st.recursive(
    st.sampled_from([..., None, True, 0, -1, 10**400, 1.5, 1e300, "", "early", "\n", "\0", "../x"]),
    lambda inner: (
        st.lists(inner, max_size=2).map(
            lambda items: [None if item is ... else item for item in items]
        )
        | st.dictionaries(
            st.sampled_from(["name", "shape", "file", "\n"]),
            inner.map(lambda item: None if item is ... else item),
            max_size=2,
        )
    ),
    max_leaves=4,
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.lists(st.tuples(paths, values), min_size=1, max_size=3))
def test_any_change_of_the_manifest_is_read_or_refused_on_one_line(tmp_path_factory, changes):
    parts = little_parts()
    for path, value in changes:
        with contextlib.suppress(LookupError, TypeError):  # an earlier change took it away
            set_path(parts.manifest, path, value)
    folder = tmp_path_factory.mktemp("any") / "b"
    parts.write(folder)
    try:
        Bundle.open(folder)
    except EdgeRuntimeError as error:
        assert type(error) is ManifestError
        assert str(error).isprintable()
    finally:
        shutil.rmtree(folder.parent)


def test_an_artifact_of_the_tests_has_the_right_form():
    assert artifact("a", b"") == {"file": "a", "sha256": sha256(b""), "size": 0}
