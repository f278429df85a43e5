"""`edge-runtime collect`: tables of bundles, files and modules, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_runtime as er
from calib import collect as collect_module
from calib.collect import Source, collect
from calib.collect_sources import collect_modules
from calib.model_costs import read_costs
from calib.model_table import ModelTable
from edge_runtime import Bundle, OperatingPoint
from edge_runtime.cli import main
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import CalibrationError, ConfigError, EdgeRuntimeError
from edge_runtime.scheduler import Scheduler
from tests.meta.repository import ROOT
from tests.toys import (
    CLASSES,
    DENSE,
    dense_model,
    dense_weights,
    toy_bundle,
    toy_images,
    toy_modules,
)

EXITS = ("saver", "middle", "final")
SAMPLES = 150


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    toy_bundle(tmp_path / "toy.bundle")
    write_data(tmp_path / "data.npz")
    return tmp_path


def write_data(path: Path, seed: int = 0) -> None:
    np.savez(path, images=toy_images(SAMPLES, seed), labels=np.arange(SAMPLES) % len(CLASSES))


def run(folder: Path, *more: Any, sources: Sequence[str] = ("toy.bundle",)) -> int:
    paths = [str(folder / source) for source in sources]
    data = ["--data", str(folder / "data.npz"), "--out", str(folder / "T.npz"), "--batch", "8"]
    return main(["collect", *paths, *data, *map(str, more)])


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_table_has_the_logits_of_every_exit(toy: Path) -> None:
    assert run(toy, "--json", toy / "result.json") == 0
    table = ModelTable.open(toy / "T.npz")
    assert table.names == EXITS
    images = np.load(toy / "data.npz")["images"]
    bundle = Bundle.open(toy / "toy.bundle")
    point = OperatingPoint.all_exits(bundle.cascade)
    with er.load(bundle, operating_point=point, image_size=(5, 7)) as cascade:
        known = [cascade.logits(images[i : i + 8]) for i in range(0, SAMPLES, 8)]
    with np.load(toy / "T.npz") as file:
        assert file["labels"].tolist() == [i % 4 for i in range(SAMPLES)]
        for name in EXITS:
            np.testing.assert_array_equal(file[name], np.concatenate([k[name] for k in known]))
            assert file[name].dtype == np.float32
    found = json.loads((toy / "result.json").read_text())
    assert found["table_hash"] == table.hash
    assert found["samples"] == SAMPLES
    assert left_behind(toy) == []


def test_half_precision_and_a_part_of_the_data(toy: Path) -> None:
    assert run(toy, "--dtype", "float16", "--part", "1/2") == 0
    with np.load(toy / "T.npz") as file:
        assert {file[name].dtype for name in EXITS} == {np.dtype("float16")}
    assert 70 <= len(ModelTable.open(toy / "T.npz")) <= 80


def test_exits_of_the_same_name_are_told_apart_by_their_bundle(toy: Path) -> None:
    assert run(toy, sources=("toy.bundle", "toy.bundle")) == 2
    shutil.copytree(toy / "toy.bundle", toy / "other.bundle")
    manifest = toy / "other.bundle" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"name": "other"}))
    assert run(toy, sources=("toy.bundle", "other.bundle")) == 0
    names = ModelTable.open(toy / "T.npz").names
    assert names == tuple(f"{b}.{exit_}" for b in ("toy", "other") for exit_ in EXITS)


def test_bundles_of_other_classes_are_refused(toy: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(toy / "toy.bundle", toy / "other.bundle")
    manifest = toy / "other.bundle" / "manifest.json"
    changed = json.loads(manifest.read_text()) | {"name": "other", "classes": ["up", *CLASSES[1:]]}
    manifest.write_text(json.dumps(changed))
    assert run(toy, sources=("toy.bundle", "other.bundle")) == 2
    assert "other.bundle are others than those of" in capsys.readouterr().err


def test_a_batch_is_as_large_as_the_backend_takes(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from edge_runtime.backends.onnxrt import OnnxRuntimeBackend

    sizes = []
    original = Scheduler.logits
    monkeypatch.setattr(OnnxRuntimeBackend, "largest_batch", 16)
    monkeypatch.setattr(
        Scheduler, "logits", lambda self, x: sizes.append(len(x)) or original(self, x)
    )
    assert run(toy, "--batch", "17") == 2
    assert "--batch: got 17, expected <= 16" in capsys.readouterr().err
    assert left_behind(toy) == []
    arguments = ["--data", str(toy / "data.npz"), "--out", str(toy / "T.npz")]
    assert main(["collect", str(toy / "toy.bundle"), *arguments]) == 0
    assert max(sizes) == 16


KILLED = """
import os, signal, sys
from calib import collect
from edge_runtime.cli import main

collect._KEEP_EVERY_S = 0.0
left, table = int(sys.argv[1]), sys.argv[2]

def counting(handle, sync=os.fsync):
    global left
    left -= 1
    if not left or os.path.exists(table):
        os.kill(os.getpid(), signal.SIGKILL)
    sync(handle)

os.fsync = counting
sys.exit(main(sys.argv[3:]))
"""


def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(toy: Path) -> None:
    assert run(toy) == 0
    undisturbed = (toy / "T.npz").read_bytes()
    (toy / "T.npz").unlink()
    command = ["collect", str(toy / "toy.bundle"), "--data", str(toy / "data.npz")]
    command += ["--out", str(toy / "T.npz"), "--batch", "8"]
    # Two calls bring the empty state to the disk, five each batch: its three arrays, then the new
    # state and its name. The last kill is when the npz is written and has not got its name.
    kept, rows = toy / ".T.npz.collect", []
    for at in (2, 6, 31, 40, 10_000):
        script = [sys.executable, "-c", KILLED, str(at), str(kept / "table.npz")]
        process = subprocess.run([*script, *command], cwd=ROOT, env={**os.environ})
        assert process.returncode == -signal.SIGKILL
        state = kept / "state.json"
        rows.append(json.loads(state.read_text())["rows"][0] if state.exists() else 0)
        assert not (toy / "T.npz").exists()
    assert rows == sorted(rows)
    assert 0 < rows[1] < rows[2] < rows[3] < rows[4] == SAMPLES
    assert run(toy) == 0
    assert (toy / "T.npz").read_bytes() == undisturbed
    assert left_behind(toy) == []


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C in the middle of a batch."""
    original, calls = Scheduler.logits, iter(range(after))

    def logits(self: Scheduler, images: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return original(self, images)

    monkeypatch.setattr(Scheduler, "logits", logits)


@pytest.fixture
def interrupted(toy: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, after=5)
        assert run(toy) == 130
    return toy


def test_an_interrupted_run_keeps_what_is_done_and_says_how_to_go_on(
    toy: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, after=5)
        assert run(toy) == 130
    assert "40 of 150 rows are kept" in capsys.readouterr().err
    calls = []
    original = Scheduler.logits
    monkeypatch.setattr(
        Scheduler, "logits", lambda self, x: calls.append(len(x)) or original(self, x)
    )
    assert run(toy) == 0
    assert sum(calls) == SAMPLES - 40
    assert "going on with 40 of 150 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "differs"),
    [
        (("--dtype", "float16"), "'dtype'"),
        (("--batch", "16"), "'models'"),
        (("--part", "1/2"), "'samples'"),
        (("--optimization", "none"), "'models'"),
    ],
)
def test_rows_of_another_run_are_not_mixed_in(
    interrupted: Path, more: Sequence[str], differs: str, capsys: pytest.CaptureFixture
) -> None:
    assert run(interrupted, *more) == 2
    message = capsys.readouterr().err
    assert f"differs in {differs}" in message
    assert "--anew" in message
    assert run(interrupted, *more, "--anew") == 0


def test_rows_of_other_images_are_not_mixed_in(
    interrupted: Path, capsys: pytest.CaptureFixture
) -> None:
    write_data(interrupted / "data.npz", seed=1)
    assert run(interrupted) == 2
    assert "differs in 'data content'" in capsys.readouterr().err


def test_damaged_rows_are_refused(interrupted: Path, capsys: pytest.CaptureFixture) -> None:
    folder = interrupted / ".T.npz.collect"
    file, state = folder / "0-1.npy", folder / "state.json"
    kept = file.read_bytes()
    for damage, told in ((kept[:-1], "fewer than 40 rows"), (b"x" + kept[1:], "another array")):
        file.write_bytes(damage)
        assert run(interrupted) == 2
        assert told in capsys.readouterr().err
    file.unlink()
    assert run(interrupted) == 2
    assert "is missing" in capsys.readouterr().err
    for text in ("{", "[]", state.read_text().replace("40", "151"), state.read_text()[:-9]):
        state.write_text(text)
        assert run(interrupted) == 2
        assert "are damaged" in capsys.readouterr().err
    assert run(interrupted, "--anew") == 0


def test_costs_are_of_each_exit_alone(toy: Path) -> None:
    assert run(toy, "--costs", toy / "C.csv") == 0
    assert read_costs(toy / "C.csv", "macs") == {
        "saver": 3 * 4,
        "middle": 3 * 6 + 6 * 4,
        "final": 3 * 6 + 6 * 6 + 6 * 4,
    }
    seconds = read_costs(toy / "C.csv", "seconds")
    assert list(seconds) == list(EXITS)
    assert seconds["final"] > seconds["saver"] > 0


def write_files(folder: Path) -> list[str]:
    """Two plain classifiers, one of which takes one sample at a time, and their data."""
    files = ["small.onnx", "large.v2.onnx"]
    for file, batch, seed in zip(files, ("batch", 1), (1, 2), strict=True):
        model = dense_model("x", "scores", 3, 4, seed=seed, batch=batch)
        (folder / file).write_bytes(model)
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    np.savez(folder / "data.npz", x=x, labels=np.arange(20) % 4)
    return files


def test_plain_files_over_arrays(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    assert run(tmp_path, "--costs", tmp_path / "C.csv", sources=files) == 0
    assert ModelTable.open(tmp_path / "T.npz").names == ("small", "large.v2")
    with np.load(tmp_path / "T.npz") as table, np.load(tmp_path / "data.npz") as data:
        for name, seed in (("small", 1), ("large.v2", 2)):
            known = np.tanh(data["x"] @ dense_weights(3, 4, seed=seed, scale=1.0)) * 3
            np.testing.assert_allclose(table[name], known, rtol=1e-5, atol=1e-5)
    assert read_costs(tmp_path / "C.csv", "macs") == {"small": 12, "large.v2": 12}
    assert min(read_costs(tmp_path / "C.csv", "seconds").values()) > 0


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"labels": None}, "there is no array 'labels'"),
        ({"x": None}, "there is no array 'x'"),
        ({"labels": np.arange(19) % 4}, "samples of the array 'x': got 20, expected 19"),
        ({"labels": np.full(20, 4)}, "label of sample 0: got 4, expected 0..3"),
        ({"labels": np.zeros(20, int)}, "single class"),
        ({"labels": np.zeros(20)}, "array 'labels'"),
        ({"x": np.zeros((20, 2), np.float32)}, "input 'x': shape"),
        ({"x": np.zeros((20, 3))}, "input 'x': dtype"),
    ],
)
def test_arrays_that_do_not_fit_are_named(
    tmp_path: Path, arrays: dict[str, Any], told: str, capsys: pytest.CaptureFixture
) -> None:
    files = write_files(tmp_path)
    with np.load(tmp_path / "data.npz") as data:
        changed = {k: v for k, v in {**data, **arrays}.items() if v is not None}
    np.savez(tmp_path / "data.npz", **changed)
    assert run(tmp_path, sources=files) == 2
    assert told in capsys.readouterr().err
    assert left_behind(tmp_path) == []


def test_what_can_not_be_collected_is_refused_at_once(
    toy: Path, capsys: pytest.CaptureFixture
) -> None:
    (toy / "labels.onnx").write_bytes(dense_model("x", "y", 3, 4, seed=1))
    (toy / "taken.csv").write_text("")
    for sources, more, told in (
        (("toy.bundle", "labels.onnx"), (), "bundles and plain ONNX files together"),
        (("labels.onnx",), (), "can't have this name"),
        (("labels.onnx",), ("--part", "1/2"), "--part and --image-size are for bundles"),
        (("toy.bundle",), ("--costs", toy / "taken.csv"), "taken.csv exists"),
        (("toy.bundle",), ("--out", toy / "no" / "T.npz"), "does not exist"),
        (("toy.bundle",), ("--out", toy), "is no file"),
        (("toy.bundle",), ("--data", toy / "no.npz"), "does not exist"),
    ):
        assert run(toy, *more, sources=sources) == 2
        assert told in capsys.readouterr().err
    assert run(toy) == 0
    capsys.readouterr()
    assert run(toy) == 2
    assert "T.npz exists" in capsys.readouterr().err
    assert run(toy, "--overwrite") == 0


def generated(rows: int, classes: int, batch: int, **change: Any) -> Source:
    """Numbers that are made when they are asked for."""

    def batches(begin: int) -> Iterator[list[np.ndarray]]:
        for start in range(begin, rows, batch):
            count = min(batch, rows - start)
            values = np.arange(start, start + count, dtype=np.float32)[:, None]
            yield [np.broadcast_to(values, (count, classes)) * change.get("scale", 1e-3)]

    return Source("generated", ("net",), classes, {"batch": batch}, batches)


def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    rows, classes = 50_000, 1_000
    labels = np.arange(rows) % classes
    tracemalloc.start()
    try:
        out = tmp_path / "T.npz"
        collect([generated(rows, classes, 250)], labels, out, Console(), data={})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert out.stat().st_size > 4 * rows * classes
    assert peak < 16 * 2**20


def test_a_logit_that_half_precision_can_not_hold_is_named(tmp_path: Path) -> None:
    source = generated(100, 10, 8, scale=1e3)
    labels, out = np.arange(100) % 10, tmp_path / "T.npz"
    with pytest.raises(CalibrationError, match=r"model 'net', sample 66, class 0.*--dtype float32"):
        collect([source], labels, out, Console(), data={}, dtype="float16")
    collect([source], labels, out, Console(), data={}, anew=True)
    with np.load(out) as file:
        assert file["net"][99, 0] == 99e3


def test_a_full_disk_is_one_error_and_costs_no_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import resource

    labels, out = np.arange(1000) % 10, tmp_path / "T.npz"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(EdgeRuntimeError, match="can't be written: File too large"):
            collect([generated(1000, 10, 50)], labels, out, Console(), data={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "200 of 1000 rows are kept" in capsys.readouterr().err
    made = collect([generated(1000, 10, 50)], labels, out, Console(), data={})
    assert made.found == (200,)
    with np.load(out) as file:
        np.testing.assert_array_equal(file["net"][:, 0], np.arange(1000, dtype=np.float32) * 1e-3)


def test_rows_reach_the_disk_while_a_run_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect_module, "_KEEP_EVERY_S", 0.05)
    source, state = generated(30, 10, 10), tmp_path / ".T.npz.collect" / "state.json"
    seen = []

    def slow(begin: int) -> Iterator[Any]:
        for arrays in source.batches(begin):
            time.sleep(0.06)
            seen.append(json.loads(state.read_text())["rows"][0])
            yield arrays

    slowly = Source("slow", ("net",), 10, {}, slow)
    collect([slowly], np.arange(30) % 10, tmp_path / "T.npz", Console(), data={})
    assert seen == [0, 10, 20]


@pytest.mark.torch
def test_modules_give_the_table_of_their_bundle(toy: Path) -> None:
    import torch

    modules = toy_modules()
    chains = {
        "saver": ("preprocess", "saver"),
        "final": ("preprocess", "segment1", "segment2", "head2"),
    }
    assert set(DENSE) < set(modules)
    nets = {
        name: torch.nn.Sequential(*(modules[part] for part in chain))
        for name, chain in chains.items()
    }
    data = ImageDataset.open(toy / "data.npz", CLASSES)
    collect_modules(nets, data, toy / "M.npz", batch=32)
    assert all(net.training for net in nets.values())
    assert run(toy) == 0
    with np.load(toy / "T.npz") as bundle, np.load(toy / "M.npz") as made:
        for name in chains:
            np.testing.assert_allclose(made[name], bundle[name], rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="output of the module 'mean'"):
        collect_modules({"mean": modules["preprocess"]}, data, toy / "N.npz")
