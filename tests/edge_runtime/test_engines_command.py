"""`edge-runtime engines`: what is listed, what is checked, what is removed and what stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import cli
from edge_runtime.backends.tensorrt import api
from edge_runtime.engine_cache import EngineCache, EngineKey
from edge_runtime.errors import BackendUnavailable, CudaError
from edge_runtime.manifest import Bundle
from tests.edge_runtime.bundles import little_parts
from tests.edge_runtime.test_engine_cache import ORIN, PLAN

THOR = replace(ORIN, gpu="Thor", tensorrt="10.16.2")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(little_parts().write(tmp_path / "my.bundle"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCache:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    return EngineCache()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "this_device", lambda: ORIN)


@pytest.fixture(params=[BackendUnavailable("no TensorRT"), CudaError("no TensorRT")], ids=repr)
def nowhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> None:
        raise request.param

    monkeypatch.setattr(api, "this_device", unavailable)


@pytest.fixture
def run(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["engines", str(bundle.path), *arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def removed(run: Run) -> Callable[..., list[str]]:
    """Run prune: stage of everything that was removed, and the reason, sorted."""

    def call(*arguments: str) -> list[str]:
        code, out, _ = run("prune", *arguments, "--json", "-")
        assert code == 0
        found = json.loads(out)["removed"]
        return sorted(f"{one['key'] and one['key']['stage']} {one['reason']}" for one in found)

    return call


def key_of(bundle: Bundle, stage: str, **changes: Any) -> EngineKey:
    key = EngineKey(
        bundle=bundle.hash,
        stage=stage,
        precision="fp32",
        model=bundle.record(stage).variants["fp32"].sha256,
        shapes={"image": (1, 4)},
        options={},
        device=ORIN,
    )
    return replace(key, **changes)


def fill(cache: EngineCache, bundle: Bundle) -> None:
    """One of each: good, foreign, stale, altered, without a sidecar, of another bundle."""
    cache.store(key_of(bundle, "saver"), PLAN, {"seconds": 1.5})
    cache.store(key_of(bundle, "saver", device=THOR), PLAN, {})
    cache.store(key_of(bundle, "segment", model="f" * 64), PLAN, {})
    cache.store(key_of(bundle, "head"), PLAN, {}).write_bytes(bytes(len(PLAN)))
    plan = cache.store(key_of(bundle, "head", shapes={"image": (2, 4)}), PLAN, {})
    (plan.parent / f"{key_of(bundle, 'head', shapes={'image': (2, 4)}).name}.json").unlink()
    cache.store(replace(key_of(bundle, "head"), bundle="a" * 64), PLAN, {})


class TestList:
    def test_the_table(self, run, cache, bundle, here):
        fill(cache, bundle)
        code, out, _ = run("list")
        assert code == 0
        lines = [" ".join(line.split()) for line in out.splitlines()]
        for device, end in (
            (ORIN, "10.3.0 Orin this"),
            (THOR, "10.16.2 Thor foreign: gpu, tensorrt"),
        ):
            created = cache.find(key_of(bundle, "saver", device=device)).created
            built = created[:16].replace("T", " ")
            assert f"saver fp32 image 1x4 10.2 kB {built} {end}" in lines
        assert any(line.startswith("segment (stale) fp32") for line in lines)
        assert any(line.startswith("broken: ") and "no sidecar names it" in line for line in lines)
        assert "a" * 64 not in out

    def test_as_json(self, run, cache, bundle, here):
        fill(cache, bundle)
        found = json.loads(run("list", "--json", "-")[1])
        assert (found["hash"], found["cache"]) == (bundle.hash, str(cache.root))
        assert found["device"]["gpu"] == "Orin"
        engines = found["engines"]
        assert len(engines) == 5
        own = [one for one in engines if one["this_device"] and not one["stale"]]
        assert [one["key"]["stage"] for one in own] == ["head", "saver"]
        assert own[1]["about"] == {"seconds": 1.5}
        assert own[1]["size"] == len(PLAN)
        assert [one["key"]["stage"] for one in engines if one["stale"]] == ["segment"]
        assert [one["this_device"] for one in engines].count(False) == 1
        assert [bool(one["problem"]) for one in engines].count(True) == 1

    def test_without_tensorrt_it_says_so(self, run, cache, bundle, nowhere):
        fill(cache, bundle)
        code, out, _ = run("list")
        assert code == 0
        assert "TensorRT is not available here, so which engines are of this device" in out
        assert "no TensorRT" in out
        assert "foreign" not in out
        found = json.loads(run("list", "--json", "-")[1])
        assert (found["device"], found["device_problem"]) == (None, "no TensorRT")
        assert {one["this_device"] for one in found["engines"]} == {None}

    def test_an_empty_cache_is_not_made(self, run, cache, here):
        code, out, _ = run("list")
        assert (code, out) == (0, f"little has no engines in {cache.root}\n")
        assert not cache.root.exists()


class TestVerify:
    def test_whole_engines(self, run, cache, bundle):
        cache.store(key_of(bundle, "saver", shapes={"image": (1, 4), "mask": (1, 2, 3)}), PLAN, {})
        code, out, _ = run("verify")
        assert (code, out) == (0, "whole: saver fp32 image 1x4, mask 1x2x3\n")

    def test_no_engines(self, run, cache):
        code, out, _ = run("verify")
        assert (code, out) == (0, f"little has no engines in {cache.root}\n")

    def test_a_broken_one_is_exit_code_1_with_the_remedy(self, run, cache, bundle, tmp_path):
        fill(cache, bundle)
        code, out, err = run("verify", "--json", str(tmp_path / "found.json"))
        assert code == 1
        assert out.count("whole: ") == 3
        assert out.count("broken: ") == 2
        assert "was altered: sha256" in out
        error = err.splitlines()[-1]
        assert error.startswith(f"error: 2 of 5 engines in {cache.root} are broken. Remove them")
        assert f"edge-runtime engines {bundle.path} prune" in error
        assert f"edge-runtime build {bundle.path}" in error
        found = json.loads((tmp_path / "found.json").read_text())
        assert [bool(one["problem"]) for one in found["engines"]].count(True) == 2


DEFAULT = [
    "None broken: ",
    "head broken: ",
    "saver foreign: gpu, tensorrt",
    "segment stale: its model is not in the bundle",
]


def same(found: list[str], expected: list[str]) -> bool:
    return len(found) == len(expected) and all(map(str.startswith, found, expected))


class TestPrune:
    def test_removes_what_is_foreign_stale_or_broken(self, run, removed, cache, bundle, here):
        fill(cache, bundle)
        assert same(removed("--dry-run"), DEFAULT)
        assert len(cache.entries()) == 6
        assert same(removed(), DEFAULT)
        left = cache.entries()
        assert {(entry.bundle, entry.key.stage) for entry in left} == {
            (bundle.hash, "saver"),
            ("a" * 64, "head"),
        }
        assert cache.load(key_of(bundle, "saver"), bundle.path)[0] == PLAN
        assert removed() == []

    def test_all_and_other_bundles(self, removed, cache, bundle, here):
        fill(cache, bundle)
        assert removed("--all") == sorted(
            f"{stage} all were asked for" for stage in ("None", "head", "saver", "saver", "segment")
        )
        assert removed("--other-bundles") == ["head of another bundle"]
        assert cache.entries() == []

    def test_without_tensorrt_the_foreign_ones_are_kept(self, run, removed, cache, bundle, nowhere):
        fill(cache, bundle)
        assert same(removed("--dry-run"), [DEFAULT[0], DEFAULT[1], DEFAULT[3]])
        code, out, _ = run("prune")
        assert code == 0
        assert "TensorRT is not available here, so engines of other devices can't be told" in out
        assert {entry.key.device.gpu for entry in cache.entries(bundle.hash)} == {"Orin", "Thor"}

    def test_all_needs_no_tensorrt(self, run, cache, bundle, nowhere):
        fill(cache, bundle)
        code, out, _ = run("prune", "--all")
        assert code == 0
        assert "not available" not in out
        assert cache.entries(bundle.hash) == []

    def test_says_what_it_frees(self, run, cache, bundle, here):
        plan = cache.store(key_of(bundle, "saver", device=THOR), bytes(1_500_000), {})
        code, out, _ = run("prune", "--dry-run")
        title = "saver fp32 image 1x4, 1.5 MB: foreign: gpu, tensorrt\n"
        assert (code, out.partition("\n")[0] + "\n") == (0, f"would remove {title}")
        assert f"would free 1.5 MB in {cache.root}: 1 entry" in out
        assert plan.exists()
        code, out, _ = run("prune")
        assert out == f"removed {title}freed 1.5 MB in {cache.root}: 1 entry\n"
        assert not plan.exists()

    def test_what_can_t_be_removed_is_exit_code_1(self, run, cache, bundle, here):
        plan = cache.store(key_of(bundle, "saver", device=THOR), PLAN, {})
        plan.unlink()
        plan.mkdir()
        code, out, err = run("prune", "--json", "-")
        assert code == 1
        (one,) = json.loads(out)["removed"]
        assert one["problem"] == f"{plan}: Is a directory"
        assert "error: 1 of 1 can't be removed" in err


@pytest.mark.parametrize("option", ["--all", "--other-bundles", "--dry-run"])
@pytest.mark.parametrize("action", ["list", "verify"])
def test_an_option_of_prune_is_refused_elsewhere(run, cache, action, option):
    code, out, err = run(action, option)
    assert (code, out) == (2, "")
    assert err == f"error: {option} is an option of prune\n"


def test_a_folder_that_is_no_bundle(capsys, tmp_path):
    assert cli.main(["engines", str(tmp_path / "no"), "list"]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_this_machine_is_asked_when_nobody_says_otherwise(run, cache, bundle):
    """The real `this_device`: it tells a device, or the reason why there is none."""
    cache.store(key_of(bundle, "saver"), PLAN, {})
    code, out, _ = run("list", "--json", "-")
    assert code == 0
    found = json.loads(out)
    assert (found["device"] is None) == bool(found["device_problem"])
