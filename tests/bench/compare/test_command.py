"""`edge-runtime compare` from the files to the verdict, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.compare import command
from edge_runtime.cli import run_command
from tests.bench.compare.made_up import platforms, written
from tests.bench.results import made_up_result


def _compare(*arguments: str) -> int:
    return run_command("edge-runtime compare", command, arguments)


def test_two_machines_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = written(tmp_path, made_up_result(), made_up_result("desktop", 0.2))
    assert _compare(*files, "--json", str(tmp_path / "out.json")) == 0
    said = capsys.readouterr().out
    assert "desktop takes 0.20 [0.18, 0.22] of Orin NX's time per frame" in said
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["results"] == ["Orin NX", "desktop"]
    assert (found["comparable"], found["hindrances"]) == (True, [])
    ratios = found["ratios"]["desktop"]
    assert ratios["of"] == "Orin NX"
    assert ratios["end_to_end"]["low"] < 0.2 < ratios["end_to_end"]["high"]
    assert ratios["exits"] == pytest.approx({"saver": 0.2, "middle": 0.2, "final": 0.2})
    assert found["tables"][0]["columns"][0] == "result"


def test_what_is_not_comparable_needs_anyway(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = written(tmp_path, made_up_result(), made_up_result("desktop", bundle="c" * 64))
    assert _compare(*files) == 2
    assert "--anyway" in capsys.readouterr().err
    assert _compare(*files, "--anyway") == 0
    said = capsys.readouterr().out
    assert said.index("NOT COMPARABLE") < said.index("my-cascade cccc") < said.index("overview")


def test_a_csv_alone_compares_its_platforms_and_a_name_picks_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(platforms(tmp_path / "p.csv"))
    assert _compare(path) == 0
    whole = capsys.readouterr().out
    assert "fast takes 0.500 [0.500, 0.500] of slow's time per frame" in whole
    assert _compare(f"{path}:fast", f"{path}:slow") == 0
    assert "slow takes 2.000 [2.000, 2.000] times as long" in capsys.readouterr().out
    assert _compare(f"{path}:fats", path) == 2
    assert "no platform 'fats'. Did you mean 'fast'?" in capsys.readouterr().err
    assert _compare(f"{path}:", path) == 2
    assert "names no platform" in capsys.readouterr().err


def test_results_of_one_name_are_told_apart_by_their_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = written(tmp_path, made_up_result(), made_up_result("Orin NX", 0.9))
    assert _compare(*files) == 0
    assert "Orin NX (b) takes 0.90 [" in capsys.readouterr().out


def test_one_result_twice_or_alone_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = written(tmp_path, made_up_result(), made_up_result())
    assert _compare(a) == 2
    assert f"nothing to compare {a} with: got 1 result" in capsys.readouterr().err
    assert _compare(a, str(tmp_path / "." / "a.json")) == 2
    assert "is there twice" in capsys.readouterr().err
    assert _compare(a, b) == 2
    assert f"{b} and {a} hold the same run" in capsys.readouterr().err
    path = str(platforms(tmp_path / "p.csv"))
    assert _compare(path, f"{path}:slow") == 2
    assert "p.csv:slow is there twice" in capsys.readouterr().err


def test_a_broken_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = written(tmp_path, made_up_result(), made_up_result("desktop"))
    whole = Path(b).read_text()
    for text, message in (
        (whole[: len(whole) // 2], "is not whole"),
        (whole.replace('"schema_version": 1', '"schema_version": 9'), "schema version: got 9"),
        ("{}", "is no result of the bench"),
        (whole.replace('"unstable": []', '"unstable": 3'), "unstable: got int 3"),
    ):
        assert text != whole
        Path(b).write_text(text)
        assert _compare(a, b) == 1
        assert message in capsys.readouterr().err
    assert _compare(a, str(tmp_path / "gone.json")) == 1
    assert "gone.json does not exist" in capsys.readouterr().err


def test_a_target_that_can_t_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = written(tmp_path, made_up_result(), made_up_result("desktop"))
    before = Path(a).read_bytes()
    for option, target, message in (
        ("--html", tmp_path / "no" / "page.html", "does not exist"),
        ("--html", tmp_path, "got a folder"),
        ("--html", Path(a), "would replace the result"),
        ("--json", Path(b), "would replace the result"),
        ("--png", tmp_path / "no" / "charts", "does not exist"),
        ("--png", Path(a).with_name("file"), "got a file"),
    ):
        (tmp_path / "file").touch()
        assert _compare(a, b, option, str(target)) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert not captured.out
    assert Path(a).read_bytes() == before


def test_page_and_charts_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = written(tmp_path, made_up_result(), made_up_result("desktop", 0.2))
    page, charts = tmp_path / "page.html", tmp_path / "charts"
    assert _compare(*files, "--html", str(page), "--png", str(charts)) == 0
    text = page.read_text()
    assert "desktop against Orin NX" in text
    assert "of Orin NX&#x27;s time per frame" in text or "of Orin NX's time per frame" in text
    assert list(charts.glob("*.png"))
    assert f"wrote {page}" in capsys.readouterr().err
