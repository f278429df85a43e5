"""Tables and costs: what is read, and that anything else is one line that names it."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from calib.model_costs import costs_of, read_costs
from calib.model_table import ModelTable
from edge_runtime.errors import ConfigError, EdgeRuntimeError
from tests.calib.model_tables import write_table

LABELS = np.array([0, 2, 1, 0])
LOGITS = np.arange(12, dtype=np.float32).reshape(4, 3)
PRED, CONF = np.array([0, 1, 2, 0]), np.array([0.5, 0.25, 1.0, -3.0])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
def test_what_was_saved_is_read_block_by_block(tmp_path: Path, save, dtype: str) -> None:
    arrays = {"a.b": LOGITS.astype(dtype), "c.pred": PRED.astype("i1"), "c.conf": CONF}
    save(tmp_path / "t.npz", labels=LABELS.astype("u2"), **arrays)
    table = ModelTable.open(tmp_path / "t.npz")
    assert (table.names, table.with_logits, table.classes) == (("a.b", "c"), ("a.b",), 3)
    assert len(table) == 4
    assert table.labels.tolist() == LABELS.tolist()
    blocks = list(table.logits("a.b", rows=3))
    assert [len(block) for block in blocks] == [3, 1]
    assert blocks[0].dtype == np.dtype("f4") == blocks[1].dtype
    assert np.concatenate(blocks).tolist() == LOGITS.tolist()
    ((block, labels),) = table.labelled("a.b")
    assert (len(block), labels.tolist()) == (4, LABELS.tolist())
    predicted, confidence = table.predictions("c")
    assert predicted.tolist() == PRED.tolist()
    assert confidence.tolist() == CONF.tolist()


def test_only_the_two_suffixes_mean_something(tmp_path: Path) -> None:
    names = ("v1.0", "net.logits", "pred", "x.pred.old", "labels.old")
    write_table(tmp_path / "t.npz", {"labels": LABELS, **dict.fromkeys(names, LOGITS)})
    assert ModelTable.open(tmp_path / "t.npz").names == names


def test_the_hash_tells_contents_apart(tmp_path: Path) -> None:
    def opened(logits: np.ndarray, save=np.savez) -> str:
        save(tmp_path / "t.npz", labels=LABELS, a=logits)
        return ModelTable.open(tmp_path / "t.npz").hash

    assert opened(LOGITS) == opened(LOGITS, np.savez_compressed)
    assert opened(LOGITS) != opened(LOGITS + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "there is no array 'labels'"),
        ({"a": None}, "there is no model beside 'labels'"),
        ({"a": LOGITS[:3]}, "samples of the array 'a': got 3, expected 4 as in 'labels'"),
        ({"labels": LABELS[:3]}, "samples of the array 'a': got 4, expected 3 as in 'labels'"),
        ({"labels": LABELS[:0], "a": LOGITS[:0]}, "array 'labels' is empty"),
        ({"labels": LABELS * 0}, "array 'labels' is of a single class: got 4 samples of class 0"),
        ({"labels": LABELS + 1}, "array 'labels', row 1: got 3, expected a class index 0..2"),
        ({"labels": LABELS - 1}, "array 'labels', row 0: got -1"),
        ({"labels": LABELS.astype("u8") + 2**63}, "array 'labels', row 0: got"),
        ({"labels": LABELS.astype(float)}, "array 'labels': got shape (4,), float64"),
        ({"labels": LABELS[:, None]}, "array 'labels': got shape (4, 1)"),
        ({"a": LOGITS[:, :1]}, "classes of the array 'a': got 1, expected 2.."),
        ({"b": LOGITS[:, :2]}, "classes of the array 'b': got 2, expected 3 as in 'a'"),
        ({"a": LOGITS[0]}, "array 'a': got shape (3,), float32, expected logits, shape (N, K)"),
        ({"a": LOGITS.astype(int)}, "array 'a': got shape (4, 3), int64, expected logits"),
        ({"a": LOGITS.astype(complex)}, "array 'a': got shape (4, 3), complex128"),
        ({"a": np.array([{}] * 4)}, "array 'a': got shape (4,), object"),
        ({"a": np.asfortranarray(LOGITS)}, "array 'a' is stored class by class (Fortran order)"),
        ({"b.pred": PRED}, "there is 'b.pred' but no array 'b.conf'"),
        ({"b.conf": CONF}, "there is 'b.conf' but no array 'b.pred'"),
        ({"a.pred": PRED, "a.conf": CONF}, "the model 'a' has both logits and the array 'a.pred'"),
        ({"b.pred": PRED, "b.conf": CONF[:3]}, "samples of the array 'b.conf': got 3, expected 4"),
        ({"b.pred": PRED * 1.0, "b.conf": CONF}, "array 'b.pred': got shape (4,), float64"),
        ({"b.pred": PRED, "b.conf": PRED}, "array 'b.conf': got shape (4,), int64, expected"),
        ({"labels.pred": PRED, "labels.conf": CONF}, "the array 'labels.pred' names no model"),
        ({".pred": PRED, ".conf": CONF}, "the array '.pred' names no model"),
    ],
)
def test_a_table_that_is_none_names_the_array(tmp_path: Path, change: dict, message: str) -> None:
    arrays = {"labels": LABELS, "a": LOGITS} | change
    path = write_table(tmp_path / "t.npz", {k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(ConfigError, match=re.escape(f"table {path}: {message}")):
        ModelTable.open(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_a_number_that_is_none_names_array_and_row(tmp_path: Path, value: float) -> None:
    logits, confidence, predicted = LOGITS.astype(float), CONF.copy(), PRED.copy()
    logits[3, 1] = confidence[2] = value
    arrays = {"labels": LABELS, "a": logits, "b.pred": predicted, "b.conf": confidence}
    table = ModelTable.open(write_table(tmp_path / "t.npz", arrays))
    message = re.escape(f"array 'a', row 3, class 1: got {value}, expected a finite float32")
    with pytest.raises(ConfigError, match=message):
        list(table.logits("a", rows=2))
    with pytest.raises(ConfigError, match=re.escape(f"array 'b.conf', row 2: got {value}")):
        table.predictions("b")


@pytest.mark.parametrize("value", [-1, 3])
def test_a_prediction_that_is_no_class_names_the_row(tmp_path: Path, value: int) -> None:
    arrays = {"labels": LABELS, "a": LOGITS, "b.pred": PRED * 0 + [0, value, 0, 0], "b.conf": CONF}
    table = ModelTable.open(write_table(tmp_path / "t.npz", arrays))
    message = f"array 'b.pred', row 1: got {value}, expected a class index 0..2"
    with pytest.raises(ConfigError, match=message):
        table.predictions("b")


def test_a_model_that_the_table_lacks_is_named(tmp_path: Path) -> None:
    arrays = {"labels": LABELS, "net": LOGITS, "other.pred": PRED, "other.conf": CONF}
    table = ModelTable.open(write_table(tmp_path / "t.npz", arrays))
    with pytest.raises(ConfigError, match=r"no logits of the model 'nets'. Did you mean 'net'"):
        next(table.logits("nets"))
    with pytest.raises(ConfigError, match=r"no predictions of the model 'net'. Valid: other"):
        table.predictions("net")


def test_files_that_are_no_whole_npz(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the table .*none.npz does not exist"):
        ModelTable.open(tmp_path / "none.npz")
    path = tmp_path / "t.npz"
    path.write_bytes(b"not a zip")
    with pytest.raises(ConfigError, match="is no npz"):
        ModelTable.open(path)
    write_table(path, {"labels": LABELS, "a": LOGITS})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ConfigError, match="is no npz"):
        ModelTable.open(path)


def test_damaged_arrays_are_named(tmp_path: Path) -> None:
    many = np.tile(LOGITS, (1, 500))
    path = write_table(tmp_path / "t.npz", {"labels": LABELS, "a": many})
    path.write_bytes(path.read_bytes().replace(many[3].tobytes(), (many[3] + 1).tobytes()))
    table = ModelTable.open(path)
    with pytest.raises(ConfigError, match="the array 'a' can't be read: Bad CRC-32"):
        list(table.logits("a", rows=1))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b"(4, 3)", b"(4, 4)", r"bytes of the array 'a': got \d+, expected \d+"),
        (b"(4, 3)", b"[4, 3}", "the array 'a' can't be read: "),
        (b"NUMPY", b"PYNUM", "the array 'a' can't be read: "),
    ],
)
def test_damaged_headers_are_named(
    tmp_path: Path, before: bytes, after: bytes, message: str
) -> None:
    path = write_table(tmp_path / "t.npz", {"labels": LABELS, "a": LOGITS})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("labels.npy", members["labels.npy"])
        archive.writestr("a.npy", members["a.npy"].replace(before, after))
    with pytest.raises(ConfigError, match=message):
        ModelTable.open(path)


def test_a_name_that_appears_twice(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.npz", {"labels": LABELS, "a": LOGITS})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a.npy", archive.read("a.npy"))
    with pytest.raises(ConfigError, match="the array 'a' appears twice"):
        ModelTable.open(path)


def test_members_that_are_no_arrays(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.npz", {"labels": LABELS, "a": LOGITS})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(ConfigError, match=r"'notes.txt' is no array"):
        ModelTable.open(path)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("labels.npy", b"\x80\x04K\x01.")
    with pytest.raises(ConfigError, match="the array 'labels' can't be read"):
        ModelTable.open(path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": LOGITS}, "first.npz has the model 'b', .*second.npz has not"),
        ({"a": LOGITS, "b": LOGITS, "c": LOGITS}, "second.npz has the model 'c', .*first.npz has"),
        ({"a": LOGITS, "b.pred": PRED, "b.conf": CONF}, "first.npz has logits of 'b'"),
        (
            {"a": np.zeros((4, 5), "f4"), "b": np.zeros((4, 5), "f4")},
            "second.npz: classes of the array 'a': got 5, expected 3 as in .*first.npz",
        ),
    ],
)
def test_tables_of_other_models_or_classes_are_told_apart(
    tmp_path: Path, other: dict, message: str
) -> None:
    mine = {"labels": LABELS, "a": LOGITS, "b": LOGITS}
    first = ModelTable.open(write_table(tmp_path / "first.npz", mine))
    second = ModelTable.open(write_table(tmp_path / "second.npz", {"labels": LABELS, **other}))
    first.check_same_models(first)
    with pytest.raises(ConfigError, match=message):
        first.check_same_models(second)


def test_costs_are_read_by_the_name_of_the_column(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text('\ufeffcost, model ,seconds\n59e6,"a, b",0.01\n\n 7 , c.1,2e-3\n', "utf-8")
    assert read_costs(path) == {"a, b": 59e6, "c.1": 7.0}
    assert read_costs(path, "seconds") == {"a, b": 0.01, "c.1": 0.002}
    assert costs_of(["c.1", "a, b"], read_costs(path), path) == [7.0, 59e6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("name,cost\na,1\n", "there is no column 'model'. Valid: cost, name"),
        ("model,costs\na,1\n", "there is no column 'cost'. Did you mean 'costs'"),
        ("model,cost,cost\na,1,2\n", "the column 'cost' appears twice"),
        ("model,cost\na,1\n\na,2\n", "line 4: the model 'a' appears twice"),
        ("model,cost\na,1\nb\n", "line 3: cells: got 1, expected 2"),
        ("model,cost\na,0\n", "line 2: cost of 'a': got '0', expected a finite number > 0"),
        ("model,cost\na,-1\n", "line 2: cost of 'a': got '-1'"),
        ("model,cost\na,nan\n", "line 2: cost of 'a': got 'nan'"),
        ("model,cost\na,inf\n", "line 2: cost of 'a': got 'inf'"),
        ("model,cost\na,cheap\n", "line 2: cost of 'a': got 'cheap'"),
        ("model,cost\na,\n", "line 2: cost of 'a': got ''"),
        ('model,cost\n"a,1\n', "are no CSV"),
    ],
)
def test_costs_that_are_none_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_costs(path)


def test_other_costs_than_models(tmp_path: Path) -> None:
    costs = {"a": 1.0, "b": 2.0}
    with pytest.raises(ConfigError, match=r"c.csv: there is no cost for the model 'c'"):
        costs_of(["a", "b", "c"], costs, "c.csv")
    with pytest.raises(ConfigError, match=r"c.csv: the table has no model 'b'. Valid: a"):
        costs_of(["a"], costs, "c.csv")
    with pytest.raises(ConfigError, match=r"the costs none.csv do not exist"):
        read_costs("none.csv")
    (tmp_path / "c.csv").write_bytes(b"model,cost\n\xff,1\n")
    with pytest.raises(ConfigError, match="are no CSV: 'utf-8' codec"):
        read_costs(tmp_path / "c.csv")
    with pytest.raises(EdgeRuntimeError, match="is not a plain file"):
        read_costs(tmp_path)
    (tmp_path / "c.csv").write_text("model,cost\na,1\n")
    with pytest.raises(ConfigError, match="'model' holds names, not costs"):
        read_costs(tmp_path / "c.csv", "model")
