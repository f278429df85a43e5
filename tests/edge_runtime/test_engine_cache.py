"""The cache of engines: what is handed out, what is refused and why, and many processes at once."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import files
from edge_runtime.engine_cache import EngineCache, EngineDevice, EngineKey
from edge_runtime.errors import BackendError, ConfigError, EdgeRuntimeError, ManifestError
from edge_runtime.manifest import Artifact, StageRecord
from edge_runtime.schema import plain
from tests.edge_runtime.bundles import refused
from tests.edge_runtime.test_files import FULL, interrupted_at

ORIN = EngineDevice(
    gpu="Orin",
    compute_capability="8.7",
    driver="36.4",
    cuda="12.6",
    module="tensorrt",
    tensorrt="10.3.0",
    system="Linux",
    machine="aarch64",
)
KEY = EngineKey(
    bundle="b" * 64,
    stage="head",
    precision="fp16",
    model="c" * 64,
    shapes={"features": (1, 197, 192)},
    options={"max_aux_streams": 0},
    device=ORIN,
)
PLAN = bytes(range(256)) * 40

PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
from edge_runtime import EdgeRuntimeError
from edge_runtime.engine_cache import EngineCache, EngineKey
from edge_runtime.schema import read

def become_nobody():
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)

def say(text):
    print(text, flush=True)

cache = EngineCache(Path(sys.argv[1]))
key = read(EngineKey, json.loads(sys.argv[2]), "key")
"""


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache")


@pytest.fixture
def start(cache: EngineCache) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A function that starts a process with `cache` and `key`, and more arguments in sys.argv."""
    started = []

    def start_one(program: str, *arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM + program, str(cache.root), json.dumps(plain(KEY))]
            + [str(argument) for argument in arguments],
            cwd=Path(files.__file__).parents[1],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def device_folder(cache: EngineCache, key: EngineKey = KEY) -> Path:
    return cache.root / key.bundle / key.device.digest


def names(cache: EngineCache) -> list[str]:
    return sorted(path.name for path in device_folder(cache).iterdir())


def sidecar_file(cache: EngineCache, key: EngineKey = KEY) -> Path:
    return device_folder(cache, key) / f"{key.name}.json"


def edit_sidecar(cache: EngineCache, **changes: Any) -> None:
    file = sidecar_file(cache)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class TestKey:
    @pytest.mark.parametrize("field", plain(ORIN))
    def test_every_part_of_the_device_names_another_folder(self, field):
        other = replace(ORIN, **{field: "9"})
        assert other.digest != ORIN.digest
        assert ORIN.differences(other) == (field,)

    @pytest.mark.parametrize(
        "change",
        [
            {"model": "d" * 64},
            {"shapes": {"features": (2, 197, 192)}},
            {"shapes": {"tokens": (1, 197, 192)}},
            {"options": {}},
            {"options": {"max_aux_streams": False}},
            {"precision": "int8"},
            {"stage": "head2"},
        ],
    )
    def test_every_other_part_names_another_file(self, change):
        other = replace(KEY, **change)
        assert other.name != KEY.name
        assert not other.matches(KEY)
        assert other.differences(KEY)

    def test_the_order_of_shapes_and_options_is_no_part_of_it(self):
        one = replace(KEY, shapes={"a": (1,), "b": (2,)}, options={"x": 1, "y": "z"})
        two = replace(KEY, shapes={"b": (2,), "a": (1,)}, options={"y": "z", "x": 1})
        assert one.name == two.name
        assert one.matches(two)
        assert one.differences(two) == {}

    @pytest.mark.parametrize("stage", ["", "..", "../head", "a/b", ".head", "a\\b", "a\n", "a\0"])
    def test_a_stage_that_leaves_the_folder_is_refused_as_in_the_manifest(self, stage):
        with refused(ConfigError, "key of an engine: stage"):
            replace(KEY, stage=stage)
        with pytest.raises(ConfigError):
            StageRecord(stage, "head", (), (), {"fp32": Artifact("a", "0" * 64, 1)})

    @pytest.mark.parametrize("precision", ["", "..", "fp16/..", "FP16", "a.b", "a\n"])
    def test_a_precision_too(self, precision):
        with refused(ConfigError, "key of an engine: precision"):
            replace(KEY, precision=precision)
        with pytest.raises(ConfigError):
            StageRecord("head", "head", (), (), {precision: Artifact("a", "0" * 64, 1)})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"bundle": "../" + "b" * 61}, "bundle: got '../bbb"),
            ({"bundle": "B" * 64}, "expected 64 hex digits"),
            ({"model": "c" * 63}, "model: got"),
            ({"shapes": {"features": (0, 3)}}, "shape of input 'features': got (0, 3)"),
            ({"shapes": {"features": (True, 3)}}, "expected whole numbers >= 1"),
            ({"shapes": {"a\x1b[2J": (1, 3)}}, "name of an input: got"),
            ({"options": {"a": "\n"}}, "option 'a'"),
        ],
    )
    def test_what_no_engine_has_is_refused(self, change, message):
        with refused(ConfigError, message):
            replace(KEY, **change)

    def test_a_device_is_printable(self):
        with refused(ConfigError, "device of an engine: gpu: got 'Or\\nin'"):
            replace(ORIN, gpu="Or\nin")


class TestWhere:
    @pytest.mark.parametrize(
        ("environment", "root"),
        [
            ({}, "/home/robot/.cache/edge-runtime"),
            ({"XDG_CACHE_HOME": "/var/cache"}, "/var/cache/edge-runtime"),
            ({"XDG_CACHE_HOME": "relative"}, "/home/robot/.cache/edge-runtime"),
            ({"XDG_CACHE_HOME": "/var/cache", "EDGE_RUNTIME_CACHE": "/disk"}, "/disk"),
            ({"EDGE_RUNTIME_CACHE": ""}, "/home/robot/.cache/edge-runtime"),
        ],
    )
    def test_the_environment_says_where(self, monkeypatch, environment, root):
        for name in ("XDG_CACHE_HOME", "EDGE_RUNTIME_CACHE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"HOME": "/home/robot", **environment}.items():
            monkeypatch.setenv(name, value)
        assert EngineCache().root == Path(root)

    def test_nothing_is_made_before_something_is_stored(self, cache):
        assert cache.find(KEY) is None
        assert cache.entries() == []
        assert cache.prune(lambda entry: "all") == []
        assert not cache.root.exists()

    def test_folders_are_their_owner_s_alone(self, tmp_path):
        cache = EngineCache(tmp_path / "new" / "cache")
        cache.store(KEY, PLAN, {})
        cache.timing_cache(ORIN).write_bytes(b"times")
        folders = [path for path in (tmp_path / "new").rglob("*") if path.is_dir()]
        assert len(folders) == 5
        assert {path.stat().st_mode & 0o777 for path in [tmp_path / "new", *folders]} == {0o700}

    def test_a_timing_cache_is_a_device_s(self, cache):
        assert cache.timing_cache(ORIN).parent.is_dir()
        other = replace(ORIN, tensorrt="10.16")
        assert cache.timing_cache(ORIN) == cache.timing_cache(replace(ORIN))
        assert cache.timing_cache(ORIN) != cache.timing_cache(other)


class TestLoad:
    def test_what_was_stored(self, cache):
        path = cache.store(KEY, PLAN, {"seconds": 2.5, "log": ["a"]})
        plan, sidecar = cache.load(KEY, "my.bundle")
        assert plan == PLAN == path.read_bytes()
        assert sidecar.key.matches(KEY)
        assert sidecar.about == {"seconds": 2.5, "log": ["a"]}
        (entry,) = cache.entries()
        assert entry == cache.find(KEY)
        assert (entry.path, entry.size, entry.problem) == (path, len(PLAN), "")
        assert cache.verify(entry) == ""

    def test_the_layout(self, cache):
        path = cache.store(KEY, PLAN, {})
        assert path.parent == device_folder(cache)
        assert path.name.startswith(f"{KEY.name}.")
        assert KEY.name.startswith("head.fp16.")
        assert names(cache) == sorted([path.name, f"{KEY.name}.json"])

    def test_keys_live_side_by_side(self, cache):
        keys = [KEY, *(replace(KEY, shapes={"features": (n, 197, 192)}) for n in (2, 3))]
        keys.append(replace(KEY, device=replace(ORIN, driver="37")))
        for number, key in enumerate(keys):
            cache.store(key, bytes([number]), {})
        for number, key in enumerate(keys):
            assert cache.load(key, "b")[0] == bytes([number])
        assert len(cache.entries(KEY.bundle)) == 4
        assert cache.entries("a" * 64) == []

    def test_without_an_engine_the_command_that_builds_it(self, cache):
        with refused(
            BackendError,
            f"stage 'head' has no TensorRT engine (fp16) in {cache.root}.",
            "Build it with: edge-runtime build 'my first.bundle'",
        ):
            cache.load(KEY, "my first.bundle")

    @pytest.mark.parametrize(
        ("change", "got", "expected"),
        [
            ({"device": replace(ORIN, gpu="Thor")}, "gpu Thor", "gpu Orin"),
            (
                {"device": replace(ORIN, tensorrt="10.16", cuda="")},
                "cuda unknown, tensorrt 10.16",
                "cuda 12.6, tensorrt 10.3.0",
            ),
            ({"model": "d" * 64}, "model dddddddddddd", "model cccccccccccc"),
            (
                {"shapes": {"features": (4, 197, 192)}},
                "shape of features (4, 197, 192)",
                "shape of features (1, 197, 192)",
            ),
            (
                {"options": {"dla": True}},
                "option max_aux_streams none, option dla true",
                "option max_aux_streams 0, option dla none",
            ),
        ],
        ids=["device", "version", "model", "shapes", "options"],
    )
    def test_a_foreign_or_stale_engine_shows_what_differs(self, cache, change, got, expected):
        cache.store(replace(KEY, **change), PLAN, {})
        assert cache.find(KEY) is None
        with pytest.raises(BackendError) as caught:
            cache.load(KEY, "my.bundle")
        assert (caught.value.got, caught.value.expected) == (got, expected)
        assert caught.value.stage == "head"
        assert str(caught.value).endswith(". Build it with: edge-runtime build my.bundle")

    def test_the_nearest_engine_is_the_one_that_is_shown(self, cache):
        far = replace(ORIN, gpu="RTX 4090", compute_capability="8.9", machine="x86_64")
        for key in (
            replace(KEY, device=far),
            replace(KEY, device=replace(ORIN, driver="37.1")),
            replace(KEY, stage="saver"),
            replace(KEY, precision="int8"),
        ):
            cache.store(key, PLAN, {})
        with refused(BackendError, "built for something else: got driver 37.1, expected driver 36"):
            cache.load(KEY, "my.bundle")


def truncate(cache: EngineCache, plan: Path) -> None:
    plan.write_bytes(PLAN[:-1])


def alter(cache: EngineCache, plan: Path) -> None:
    plan.write_bytes(PLAN[:-1] + b"\0")


def remove(cache: EngineCache, plan: Path) -> None:
    plan.unlink()


def make_pipe(cache: EngineCache, plan: Path) -> None:
    plan.unlink()
    os.mkfifo(plan)


def link_plan(cache: EngineCache, plan: Path) -> None:
    plan.rename(cache.root.parent / "elsewhere")
    plan.symlink_to(cache.root.parent / "elsewhere")


def link_sidecar(cache: EngineCache, plan: Path) -> None:
    sidecar_file(cache).rename(cache.root.parent / "elsewhere")
    sidecar_file(cache).symlink_to(cache.root.parent / "elsewhere")


def link_device(cache: EngineCache, plan: Path) -> None:
    plan.parent.rename(cache.root.parent / "elsewhere")
    plan.parent.symlink_to(cache.root.parent / "elsewhere")


def link_bundle(cache: EngineCache, plan: Path) -> None:
    plan.parent.parent.rename(cache.root.parent / "elsewhere")
    plan.parent.parent.symlink_to(cache.root.parent / "elsewhere")


def cut_sidecar(cache: EngineCache, plan: Path) -> None:
    sidecar_file(cache).write_bytes(sidecar_file(cache).read_bytes()[:-9])


def newer_sidecar(cache: EngineCache, plan: Path) -> None:
    edit_sidecar(cache, schema_version=2)


def unknown_in_sidecar(cache: EngineCache, plan: Path) -> None:
    edit_sidecar(cache, extra=1)


def leave_by_the_sidecar(cache: EngineCache, plan: Path) -> None:
    edit_sidecar(cache, key=plain(KEY) | {"stage": "../../head"})


def undated_sidecar(cache: EngineCache, plan: Path) -> None:
    edit_sidecar(cache, created="yesterday")


def sidecar_without_a_hash(cache: EngineCache, plan: Path) -> None:
    edit_sidecar(cache, sha256="../../../etc/passwd")


BROKEN = [
    (truncate, f"was altered: size: got {len(PLAN) - 1}, expected {len(PLAN)}"),
    (alter, "was altered: sha256: got"),
    (remove, "is missing"),
    (make_pipe, "is not a plain file"),
    (link_plan, "is a symbolic link"),
    (link_sidecar, "is a symbolic link"),
    (link_device, "is a symbolic link"),
    (link_bundle, "is a symbolic link"),
    (cut_sidecar, "is not whole"),
    (newer_sidecar, "schema version: got 2, expected 1"),
    (unknown_in_sidecar, "unknown key 'extra'"),
    (leave_by_the_sidecar, "key of an engine: stage"),
    (undated_sidecar, "created: got 'yesterday'"),
    (sidecar_without_a_hash, "sha256: got '../../../etc/passwd'"),
]


class TestBroken:
    @pytest.mark.parametrize(
        ("damage", "message"), BROKEN, ids=lambda one: getattr(one, "__name__", "")
    )
    def test_no_byte_of_it_is_handed_out_and_it_can_be_mended(self, cache, damage, message):
        damage(cache, cache.store(KEY, PLAN, {}))
        with refused(BackendError, message, ". Build it with: edge-runtime build my.bundle"):
            cache.load(KEY, "my.bundle")
        problems = [cache.verify(entry) for entry in cache.entries()]
        assert any(message in problem for problem in problems), problems
        assert all(problems)
        with cache.building(KEY) as found:
            assert found is None
        outside = {p: p.read_bytes() for p in cache.root.parent.glob("elsewhere*") if p.is_file()}

        pruned = cache.prune(cache.verify)
        assert [one.problem for one in pruned] == [""] * len(problems)
        assert not (cache.root / KEY.bundle).exists()
        cache.store(KEY, PLAN, {})
        assert cache.load(KEY, "my.bundle")[0] == PLAN
        assert all(path.read_bytes() == data for path, data in outside.items())

    @pytest.mark.parametrize(
        "damage", [truncate, alter, remove, make_pipe, link_plan, cut_sidecar, newer_sidecar]
    )
    def test_storing_it_again_mends_it_without_pruning(self, cache, damage):
        damage(cache, cache.store(KEY, PLAN, {}))
        cache.store(KEY, PLAN, {})
        assert cache.load(KEY, "my.bundle")[0] == PLAN
        assert [entry.problem for entry in cache.entries()] == [""]

    def test_an_engine_that_was_copied_from_another_device_is_foreign(self, cache):
        laptop = replace(KEY, device=replace(ORIN, gpu="RTX 4090"))
        cache.store(laptop, PLAN, {})
        device_folder(cache, laptop).rename(device_folder(cache))
        with refused(BackendError, "something else: got gpu RTX 4090, expected gpu Orin. Build"):
            cache.load(KEY, "my.bundle")
        assert cache.find(KEY) is None
        (entry,) = cache.entries()
        assert "is of another engine: got" in entry.problem

    def test_a_plan_without_a_sidecar_is_an_entry(self, cache):
        path = cache.store(KEY, PLAN, {})
        sidecar_file(cache).unlink()
        (entry,) = cache.entries()
        assert (entry.path, entry.key, entry.size) == (path, None, len(PLAN))
        assert entry.problem == f"{path}: no sidecar names it"

    def test_nothing_is_stored_through_a_link(self, cache, tmp_path):
        (tmp_path / "outside").mkdir()
        cache.root.mkdir()
        (cache.root / KEY.bundle).symlink_to(tmp_path / "outside")
        with refused(ManifestError, f"{cache.root / KEY.bundle} is a symbolic link"):
            cache.store(KEY, PLAN, {})
        assert list((tmp_path / "outside").iterdir()) == []

    def test_what_this_user_may_not_read(self, cache, start):
        cache.store(KEY, PLAN, {})
        device_folder(cache).chmod(0)
        program = (
            "become_nobody()\n"
            "try:\n"
            "    cache.load(key, 'my.bundle')\n"
            "except EdgeRuntimeError as error:\n"
            "    say(f'{type(error).__name__}: {error}')\n"
        )
        try:
            said, _ = start(program).communicate()
        finally:
            device_folder(cache).chmod(0o700)
        assert said.startswith("BackendError: ")
        assert "can't be read: Permission denied. Build it with: edge-runtime build my.b" in said


class TestStore:
    def test_an_engine_is_replaced(self, cache):
        old = cache.store(KEY, PLAN, {"n": 1})
        entry = cache.find(KEY)
        new = cache.store(KEY, b"new", {"n": 2})
        assert names(cache) == sorted([new.name, f"{KEY.name}.json"])
        assert not old.exists()
        assert cache.load(KEY, "b")[0] == b"new"
        assert cache.verify(entry) == ""
        cache.store(KEY, b"new", {"n": 3})
        assert cache.load(KEY, "b")[1].about == {"n": 3}

    @pytest.mark.parametrize(
        ("error", "exists"),
        [(FULL, True), (FULL, False), (KeyboardInterrupt(), True)],
        ids=["full", "full, the first", "ctrl-c"],
    )
    def test_at_every_line_the_old_engine_or_the_new_one(self, cache, error, exists, monkeypatch):
        monkeypatch.setattr(os, "fsync", lambda handle: None)  # a disk that is busy is slow
        cache.root.mkdir()
        for line in itertools.count():
            if exists:
                cache.store(KEY, b"old", {})
            came = interrupted_at(line, error, lambda: cache.store(KEY, b"new", {}))
            plans = [cache.load(KEY, "b")[0]] if cache.find(KEY) else []
            assert plans in [[b"new"], [b"old"] if exists else []]
            problems = [entry.problem for entry in cache.entries() if entry.problem]
            if problems:  # only where removing the replaced plan is what was interrupted
                assert (plans, exists, len(problems)) == ([b"new"], True, 1)
                assert problems[0].endswith("no sidecar names it")
            left = [path for path in cache.root.rglob("*") if path.is_file()]
            assert len(left) == 2 * len(plans) + len(problems), left
            if not came:
                assert line > 30
                assert (plans, problems) == ([b"new"], [])
                return
            shutil.rmtree(cache.root / KEY.bundle, ignore_errors=True)

    def test_a_disk_that_is_really_full(self, cache, start):
        """A file-size limit of the system, in a process of its own."""
        cache.store(KEY, b"old", {})
        before = names(cache)
        program = (
            "import resource\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
            "try:\n"
            "    cache.store(key, bytes(100_000), {})\n"
            "except EdgeRuntimeError as error:\n"
            "    say(error)\n"
        )
        said, _ = start(program).communicate()
        assert said.startswith(f"{device_folder(cache)}/head.fp16.")
        assert ".engine can't be written: File too large. Make room there" in said
        assert "set EDGE_RUNTIME_CACHE to another folder" in said
        assert names(cache) == before
        assert cache.load(KEY, "b")[0] == b"old"

    @pytest.mark.parametrize("call", ["store(key, b'', {})", "timing_cache(key.device)"])
    def test_a_folder_that_is_not_writable(self, cache, start, call):
        cache.root.mkdir(mode=0o500)
        program = (
            "become_nobody()\n"
            "try:\n"
            f"    cache.{call}\n"
            "except EdgeRuntimeError as error:\n"
            "    say(error)\n"
        )
        said, _ = start(program).communicate()
        assert said.startswith(f"the cache of engines {cache.root} can't be written: ")
        assert ": Permission denied. " in said
        assert "set EDGE_RUNTIME_CACHE to another folder" in said

    def test_a_file_where_the_folder_should_be(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        cache = EngineCache(tmp_path / "file")
        message = f"the cache of engines {tmp_path}/file can't be written: "
        with refused(EdgeRuntimeError, message, "set EDGE_RUNTIME_CACHE"):
            cache.store(KEY, PLAN, {})
        with refused(EdgeRuntimeError, message):  # noqa: SIM117
            with cache.building(KEY):
                pytest.fail("it can't be locked")
        with refused(BackendError, "can't be read: Not a directory", "edge-runtime build"):
            cache.load(KEY, "my.bundle")
        with refused(ManifestError, "can't be read: Not a directory"):
            cache.entries()

    def test_what_is_not_json_writes_nothing(self, cache):
        with pytest.raises(ValueError, match="JSON compliant"):
            cache.store(KEY, PLAN, {"seconds": float("nan")})
        assert not cache.root.exists()

    @pytest.mark.parametrize("fsyncs", [1, 2, 3, 4])
    def test_killed_while_it_stores(self, cache, start, fsyncs):
        cache.store(KEY, b"old", {})
        program = (
            "left = [int(sys.argv[3])]\n"
            "def die(handle):\n"
            "    left[0] -= 1\n"
            "    if not left[0]:\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "os.fsync = die\n"
            "cache.store(key, b'new', {})\n"
        )
        process = start(program, fsyncs)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert cache.load(KEY, "b")[0] == (b"new" if fsyncs == 4 else b"old")
        assert any(entry.problem for entry in cache.entries())
        cache.store(KEY, b"newer", {})
        assert [entry.problem for entry in cache.entries()] == [""]
        assert len(names(cache)) == 2


class TestPrune:
    def test_removes_what_it_is_told_and_says_what_it_freed(self, cache):
        other = replace(KEY, stage="saver")
        foreign = replace(KEY, device=replace(ORIN, gpu="Thor"))
        for key in (KEY, other, foreign):
            cache.store(key, PLAN, {})
        expected = len(PLAN) + sidecar_file(cache, foreign).stat().st_size
        for dry_run in (True, False):
            (one,) = cache.prune(
                lambda entry: "foreign" if entry.key.device != ORIN else "", dry_run=dry_run
            )
            assert (one.reason, one.size, one.problem) == ("foreign", expected, "")
            assert one.entry.key == foreign
            assert device_folder(cache, foreign).exists() is dry_run
        assert {entry.key.stage for entry in cache.entries()} == {"head", "saver"}
        assert len(cache.prune(lambda entry: "all")) == 2
        assert not (cache.root / KEY.bundle).exists()

    def test_never_touches_what_is_not_the_cache_s(self, cache):
        cache.store(KEY, PLAN, {})
        mine = [
            device_folder(cache) / "latency_table.json",
            device_folder(cache) / "head.fp16.engine",
            cache.root / KEY.bundle / "notes.txt",
            cache.root / "photos" / f"{KEY.name}.json",
        ]
        for path in mine:
            path.parent.mkdir(exist_ok=True)
            path.write_text("mine")
        assert len(cache.entries()) == 1
        cache.prune(lambda entry: "all")
        assert all(path.read_text() == "mine" for path in mine)
        assert cache.entries() == []

    def test_says_what_it_could_not_remove_and_goes_on(self, cache):
        path = cache.store(KEY, PLAN, {})
        cache.store(replace(KEY, stage="saver"), PLAN, {})
        path.unlink()
        path.mkdir()
        head, saver = cache.prune(lambda entry: "all")
        assert head.problem == f"{path}: Is a directory"
        assert saver.problem == ""


class TestProcesses:
    def test_one_builds_and_the_others_find_what_it_made(self, cache, start):
        program = (
            "with cache.building(key, lambda: say('waits')) as found:\n"
            "    if found is None:\n"
            "        time.sleep(0.5)\n"
            "        cache.store(key, sys.argv[3].encode(), {})\n"
            "        say('built')\n"
            "    else:\n"
            "        say(f'found {found.path.name}')\n"
        )
        processes = [start(program, number) for number in range(3)]
        said = [process.communicate()[0].split("\n")[:-1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0, 0]
        built = [number for number, lines in enumerate(said) if "built" in lines]
        assert len(built) == 1, said
        assert cache.load(KEY, "b")[0] == str(built[0]).encode()
        found = f"found {cache.find(KEY).path.name}"
        assert sum(found in lines for lines in said) == 2
        assert list((cache.root / "locks").iterdir()) == []

    def test_another_key_is_not_waited_for(self, cache):
        with cache.building(KEY), cache.building(replace(KEY, precision="int8"), pytest.fail):
            pass

    def test_a_builder_that_is_killed_is_not_waited_for(self, cache, start):
        program = "with cache.building(key):\n    say('builds')\n    time.sleep(60)\n"
        process = start(program)
        assert process.stdout.readline() == "builds\n"
        waited = []

        def kill() -> None:
            waited.append(True)
            process.kill()

        with cache.building(KEY, kill) as found:
            assert found is None
        assert waited == [True]
        process.wait()
        with cache.building(KEY, pytest.fail):
            pass

    def test_a_builder_that_fails_leaves_it_to_the_next(self, cache):
        with pytest.raises(ZeroDivisionError), cache.building(KEY):
            raise ZeroDivisionError
        with cache.building(KEY, pytest.fail) as found:
            assert found is None

    def test_readers_see_a_whole_engine_while_others_replace_it(self, cache, start):
        cache.store(KEY, b"0" * 50_000, {"who": "0"})
        program = (
            "import random\n"
            "say('ready')\n"
            "while not Path(sys.argv[4]).exists():\n"
            "    plan = (sys.argv[3] * 50_000).encode()[random.randrange(10):]\n"
            "    cache.store(key, plan, {'who': sys.argv[3]})\n"
        )
        stop = cache.root.parent / "stop"
        writers = [start(program, who, stop) for who in ("1", "2")]
        for writer in writers:
            writer.stdout.readline()
        seen = set()
        reads = 0
        while reads < 300 or len(seen) < 5:
            plan, sidecar = cache.load(KEY, "b")
            assert set(plan) == {ord(sidecar.about["who"])}
            assert len(plan) == sidecar.size
            assert [writer.poll() for writer in writers] == [None, None]
            seen.add(sidecar.sha256)
            reads += 1
        for _ in range(20):
            (entry,) = cache.entries()
            assert cache.verify(entry) == ""
            assert cache.prune(lambda entry: entry.problem) == []
        stop.touch()
        for writer in writers:
            writer.communicate()
            assert writer.returncode == 0
        assert len(names(cache)) == 2


class TestNewest:
    """The builder's options need not be named again."""

    OTHER = replace(KEY, options={"workspace_mb": 512})

    def test_where_there_is_none_it_is_the_key_itself(self, cache):
        assert cache.newest(KEY) is KEY
        for field in ("stage", "precision", "model", "bundle"):
            cache.store(replace(KEY, **{field: "d" * 64}), PLAN, {})
        cache.store(replace(KEY, shapes={"features": (2, 197, 192)}), PLAN, {})
        cache.store(replace(KEY, device=replace(ORIN, driver="36.5")), PLAN, {})
        assert cache.newest(KEY) is KEY

    @pytest.mark.parametrize(("older", "newer"), [(KEY, OTHER), (OTHER, KEY)])
    def test_of_several_it_is_the_one_stored_or_preferred_last(self, cache, older, newer):
        cache.store(older, PLAN, {})
        time.sleep(0.01)  # A file system's clock goes in steps.
        cache.store(newer, PLAN, {})
        for asked in (older, newer, replace(KEY, options={})):
            assert cache.newest(asked).matches(newer)
        time.sleep(0.01)
        found = cache.find(older)
        assert found is not None
        cache.prefer(found)
        assert cache.newest(newer).matches(older)
        assert cache.load(older, "b")[0] == PLAN

    def test_one_that_is_broken_does_not_count(self, cache):
        cache.store(KEY, PLAN, {})
        truncate(cache, cache.store(self.OTHER, PLAN, {}))
        assert cache.newest(self.OTHER).matches(KEY)

    def test_a_cache_that_can_t_be_read_leaves_it_to_load(self, cache):
        cache.root.parent.mkdir(exist_ok=True)
        cache.root.write_text("no folder")
        assert cache.newest(KEY) is KEY
        with pytest.raises(BackendError, match="can't be read"):
            cache.load(cache.newest(KEY), "b")
