"""Paths, the files of gates, and what comes from outside in either."""

import io
import json
import zipfile
from dataclasses import fields, replace

import numpy as np
import pytest

from edge_runtime.cascade import Cascade, Exit, Stage
from edge_runtime.errors import ConfigError, EdgeRuntimeError, ManifestError
from edge_runtime.gate_model import ErrorPredictor, GateModel, input_features
from edge_runtime.npz import write_npz
from edge_runtime.paths import Paths
from edge_runtime.tensors import TensorSpec
from tests.edge_runtime.bundles import refused
from tests.edge_runtime.gates import BUNDLE, EXITS, LEVELS, model


class TestPaths:
    def test_names_and_codes(self):
        paths = Paths(("fp16", "int8"), ("a", "b", "c"), ((0,), (0, 0), (0, 1), (0, 0, 0)))
        assert paths.name((0, 1)) == "fp16 -> int8"
        assert paths.bits == (16, 8)
        assert paths.dearest == (0, 0, 0)
        assert paths.beginning_with((0, 0)) == (1, 3)
        np.testing.assert_allclose(
            paths.codes([(0, 1), (0, 0, 0)]), [[1, 0.5, 0, 2 / 3], [1, 1, 1, 1]], rtol=1e-6
        )

    @pytest.mark.parametrize(
        ("paths", "message"),
        [
            (((0,), (0, 0), (1,)), "'int8': its first block: got int8, expected fp32"),
            (((0,), (0, 2)), "the path [0, 2]: expected indices of levels, 0..1"),
            (((0,), (0, -1)), "the path [0, -1]: expected indices of levels, 0..1"),
            (((0,), (0, 0), (0, 0, 0)), "got 3 blocks, expected 1..2"),
            (((0,), ()), "got 0 blocks"),
            (((0,), (0, 1)), "the path 'fp32 -> fp32' is missing"),
            (((0, 0),), "the path 'fp32' is missing, with which 'fp32 -> fp32' begins"),
            (((0,), (0, 0), (0, 0)), "the path 'fp32 -> fp32' is listed twice"),
        ],
    )
    def test_paths_that_can_not_be(self, paths, message):
        with refused(ConfigError, message):
            Paths(("fp32", "int8"), ("a", "b"), paths)

    def test_a_path_that_returns_to_a_higher_precision(self):
        with refused(ConfigError, "the path 'fp32 -> int8 -> fp32' returns to a higher precision"):
            Paths(("fp32", "int8"), EXITS, ((0,), (0, 1), (0, 1, 0)))

    @pytest.mark.parametrize(
        ("levels", "message"),
        [
            (("fp32", "mixed"), "the level 'mixed' has no bit width in its name"),
            (("int8", "fp32"), "levels: got int8, fp32, expected the highest precision first"),
            (("int8", "fp8"), "levels: got int8, fp8"),
        ],
    )
    def test_levels_that_have_no_code(self, levels, message):
        paths = Paths(levels, ("a",), ((0,),))
        with refused(ConfigError, message):
            paths.codes([(0,)])

    @pytest.mark.parametrize(
        ("levels", "exits", "message"),
        [
            ((), ("a",), "paths need at least one level"),
            (("fp32",), (), "paths need at least one exit"),
            (("fp32", "fp32"), ("a",), "names of the levels: got 'fp32', 'fp32'"),
            (("fp32",), ("a\n",), "names of the exits"),
        ],
    )
    def test_names_that_can_not_be(self, levels, exits, message):
        with refused(ConfigError, message):
            Paths(levels, exits, ((0,),))


def test_the_features_are_those_of_the_paper_in_its_order():
    now = np.array([[0.5, 0.5, 0], [1, 0, 0]], np.float32)
    before = np.array([[0.25, 0.25, 0.5], [0.2, 0.7, 0.1]], np.float32)
    found = input_features(now, before)
    assert found.dtype == np.float32
    np.testing.assert_allclose(
        found[0], [0.5, 0.5, 0, 0.25, 0.25, 0.5, np.log(2), 1.5 * np.log(2), 0.5, 0.5], rtol=1e-6
    )
    first = input_features(now, None)
    np.testing.assert_allclose(first[1], [1, 0, 0, 0, 0, 0, 0, 0, 0, 1], atol=1e-7)


class TestFile:
    @pytest.mark.parametrize("kind", ["paths", "one_step"])
    def test_a_gate_comes_back_and_equal_gates_are_equal_files(self, tmp_path, kind):
        made = model(kind=kind)
        made.write(tmp_path / "a.npz")
        back = GateModel.read(tmp_path / "a.npz")
        for name in ("bundle", "classes", "paths", "figures", "kind", "trade_off"):
            assert getattr(back, name) == getattr(made, name)
        for one, other in zip(back.predictors, made.predictors, strict=True):
            for part in fields(ErrorPredictor):
                np.testing.assert_array_equal(getattr(one, part.name), getattr(other, part.name))
        back.write(tmp_path / "b.npz")
        assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
        with np.load(tmp_path / "a.npz", allow_pickle=False) as plain:
            assert plain["0.features"].dtype == np.float32

    def test_every_damage_of_one_byte_or_a_cut_is_one_line(self, tmp_path):
        path = tmp_path / "g.npz"
        model(classes=2, hidden=1).write(path)
        whole = path.read_bytes()
        for at in range(0, len(whole), 29):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
            try:
                GateModel.read(path)
            except EdgeRuntimeError as error:
                assert type(error) is ManifestError, (at, repr(error))
                assert str(path) in str(error) and str(error).isprintable()
        for at in range(0, len(whole) - 1, 97):
            path.write_bytes(whole[:at])
            with refused(ManifestError, str(path)):
                GateModel.read(path)

    def test_no_file_and_no_plain_file(self, tmp_path):
        with refused(ManifestError, "gate", "g.npz does not exist"):
            GateModel.read(tmp_path / "g.npz")
        with refused(ManifestError, "is not a plain file"):
            GateModel.read(tmp_path)

    def test_a_large_file_is_not_read(self, tmp_path):
        with (tmp_path / "g.npz").open("wb") as file:
            file.truncate(65 * 2**20)
        with refused(ManifestError, "expected at most 64 MiB"):
            GateModel.read(tmp_path / "g.npz")

    def test_pickles_and_compressed_arrays_are_not_unpacked(self, tmp_path):
        np.savez(tmp_path / "p.npz", meta=np.array([print], object))
        with refused(ManifestError, "array 'meta': got object (1,)"):
            GateModel.read(tmp_path / "p.npz")
        np.savez_compressed(tmp_path / "c.npz", meta=np.zeros(10**6, np.uint8))
        with refused(ManifestError, "got a compressed array"):
            GateModel.read(tmp_path / "c.npz")

    def test_an_array_that_claims_more_than_is_there(self, tmp_path):
        buffer = io.BytesIO()
        header = {"descr": "|u1", "fortran_order": False, "shape": (2**50,)}
        np.lib.format.write_array_header_1_0(buffer, header)
        with zipfile.ZipFile(tmp_path / "g.npz", "w") as archive:
            archive.writestr("meta.npy", buffer.getvalue())
        with refused(ManifestError, "got 0 bytes for uint8 (1125899906842624,)"):
            GateModel.read(tmp_path / "g.npz")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"schema_version": 2}, "schema version: got 2, expected 1. It was written by another"),
            ({"kind": "best"}, "kind: got 'best'"),
            ({"classes": 1}, "classes of a gate: got 1"),
            ({"classes": 6}, "array '0.features': got float32 (14, 8), expected float32 (16, 8)"),
            ({"hidden": [8, 8]}, "an unknown array '2.bias'"),
            ({"hidden": [8, 8, 8, 8]}, "no array '3.features'"),
            ({"hidden": [8, 8, 2**40]}, "array '2.features': got float32 (14, 8)"),
            ({"trade_off": 0.5}, "lambda of a gate: got 0.5"),
            ({"paths": [[0], [0, 1]]}, "the path 'fp32 -> fp32 -> fp32 -> fp32' is missing"),
            ({"paths": [[0.5]]}, "paths[0][0]: got float 0.5, expected int"),
            ({"levels": ["fp32", "tiny", "int8"]}, "the level 'tiny' has no bit width"),
            ({"extra": 1}, "unknown key 'extra'"),
        ],
    )
    def test_a_description_that_does_not_fit(self, tmp_path, change, message):
        path = tmp_path / "g.npz"
        rewrite(path, change, {})
        with refused(ManifestError, str(path), message):
            GateModel.read(path)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_weight_that_is_no_number(self, tmp_path, value):
        rewrite(tmp_path / "g.npz", {}, {"1.bias": np.full(8, value, np.float32)})
        with refused(ManifestError, "array '1.bias' has values that are NaN or infinite"):
            GateModel.read(tmp_path / "g.npz")

    def test_figures_that_are_no_json(self, tmp_path):
        with refused(ConfigError, "its description is no JSON"):
            replace(model(), figures={"loss": float("nan")}).write(tmp_path / "g.npz")
        assert not list(tmp_path.iterdir())


def rewrite(path, change, arrays) -> None:
    """Write the file of a gate with some things in it changed."""
    model().write(path)
    with np.load(path, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    meta = json.loads(found.pop("meta").tobytes())
    write_npz(path, meta | change, found | arrays)


class TestModel:
    def test_predictors_that_do_not_fit(self):
        made = model()
        with refused(ConfigError, "predictors of a gate: got 2, expected 3"):
            replace(made, predictors=made.predictors[1:])
        with refused(ConfigError, "features of the predictor of exit 'a'", "expected float32 (16"):
            replace(made, classes=6)
        wide = replace(made.predictors[0], bias=made.predictors[0].bias.astype(float))
        with refused(ConfigError, "bias of the predictor of exit 'b': got float64"):
            replace(made, predictors=(made.predictors[0], wide, made.predictors[2]))

    def test_another_bundle_is_refused(self):
        made = model()
        made.check(BUNDLE, cascade(EXITS, 5))
        remedy = "Fit one for this bundle: edge-runtime gate fit"
        with refused(
            ConfigError, "another bundle: got 0123456789ab, expected ffffffffffff", remedy
        ):
            made.check("f" * 64, cascade(EXITS, 5))
        with refused(ConfigError, "exits of the gate: got a, b, c, d, expected a, b, d", remedy):
            made.check(BUNDLE, cascade(("a", "b", "d"), 5))
        with refused(ConfigError, "classes of the gate: got 5, expected 6"):
            made.check(BUNDLE, cascade(EXITS, 6))


def cascade(exits: tuple[str, ...], classes: int) -> Cascade:
    image = TensorSpec("image", ("batch", 4), "float32")
    logits = [TensorSpec(name, ("batch", classes), "float32") for name in exits]
    stages = tuple(Stage(f"s-{spec.name}", "saver", (image,), (spec,)) for spec in logits)
    names = tuple(f"class{i}" for i in range(classes))
    return Cascade(names, image, stages, tuple(Exit(name, name) for name in exits))


def test_the_levels_of_these_tests_are_those_of_the_code():
    assert model().paths.bits == (32, 16, 8)
    assert len(LEVELS) == 3
