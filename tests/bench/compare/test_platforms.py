"""Published platforms become results to compare with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bench.compare.platforms import read_platforms
from bench.result import read_result, write_result
from edge_runtime.errors import ConfigError, EdgeRuntimeError, ManifestError
from tests.bench.compare.made_up import HEAD, made_up_rows, platforms

ROOT = Path(__file__).parents[3]
SHARED = Path(os.environ.get("EDGE_SHARED") or ROOT.parent / "shared")


def test_each_platform_is_a_result_with_its_exits_in_order(tmp_path: Path) -> None:
    slow, fast = read_platforms(platforms(tmp_path / "p.csv"))
    assert (slow.name, fast.name, slow.kind) == ("slow", "fast", "reference")
    assert slow.bundle == "EEVIT ViT-B/16, 2 exits"
    assert [exit_.name for exit_ in slow.exits] == ["exit_9", "exit_10", "final"]
    assert [exit_.count for exit_ in slow.exits] == [600, 300, 100]
    assert [exit_.accuracy for exit_ in slow.exits] == [0.9, 0.5, 0.4]
    assert slow.accuracy == pytest.approx(0.6 * 0.9 + 0.3 * 0.5 + 0.1 * 0.4)
    assert slow.end_to_end.mean == pytest.approx(15.03e-3, rel=1e-3)
    assert fast.end_to_end.mean == pytest.approx(slow.end_to_end.mean / 2, rel=1e-3)
    assert slow.end_to_end.p99 is not None
    assert slow.end_to_end.p999 is None, "1,000 rows do not tell it"


def test_blocks_of_rows_grouped_by_exit_hold_a_part_of_each_exit(tmp_path: Path) -> None:
    slow = read_platforms(platforms(tmp_path / "p.csv"))[0]
    blocks = slow.subjects[0].blocks
    assert len(blocks) == 20
    np.testing.assert_allclose(blocks, slow.end_to_end.mean, rtol=0.01)


def test_rows_that_are_not_grouped_stay_in_their_order(tmp_path: Path) -> None:
    rows = [f"a,exit_{i % 2},50,{1 + i // 50}" for i in range(200)]
    (found,) = read_platforms(platforms(tmp_path / "p.csv", rows))
    assert found.subjects[0].blocks == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3])


def test_an_exit_that_one_platform_never_took_is_there_without_figures(tmp_path: Path) -> None:
    rows = ["a,exit_1,90,1", "a,final,80,3", "b,final,80,2"]
    _, found = read_platforms(platforms(tmp_path / "p.csv", rows))
    first = found.exit("exit_1")
    assert (first.count, first.accuracy, first.latency) == (0, None, None)
    assert found.accuracy == 0.8


def test_a_reference_can_be_written_and_read(tmp_path: Path) -> None:
    (slow, _) = read_platforms(platforms(tmp_path / "p.csv"))
    write_result(slow, tmp_path / "slow.json")
    assert read_result(tmp_path / "slow.json") == slow


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,exit_1,90", r"line 3: columns: got 3, expected 4"),
        ("a,exit_1,90,1,2", r"line 3: columns: got 5, expected 4"),
        ("a,exit_1,90,fast", r"line 3: latency_ms: got 'fast', expected a number"),
        ("a,exit_1,90,nan", r"line 3: latency_ms: got 'nan', expected a number"),
        ("a,exit_1,90,-1", r"line 3: latency_ms: got -1, expected milliseconds > 0"),
        ("a,exit_1,101,1", r"line 3: accuracy_of_exit_percent: got 101, expected percent"),
        ("a,exit_1,80,1", r"line 3: accuracy_of_exit_percent of exit_1: got 80, expected 90"),
        (",exit_1,90,1", r"line 3: platform: got nothing"),
        ('a,"exit_1,90,1', r"line 3: unexpected end of data"),
        ("a,last,90,1\na,final,90,1", r"the order of the exits final, last is not known"),
        ("\n".join(f"p{i},exit_1,90,1" for i in range(70)), r"line 66: platforms: got 65"),
    ],
)
def test_a_bad_row_names_its_line(tmp_path: Path, row: str, message: str) -> None:
    path = platforms(tmp_path / "p.csv", ["a,exit_1,90,1", row])
    with pytest.raises(ConfigError, match=message):
        read_platforms(path)


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (b"", ConfigError, r"no row|got nothing"),
        (HEAD.encode(), ConfigError, r"got no row, expected one row per sample"),
        (b"exit,platform,accuracy_of_exit_percent,latency_ms\n", ConfigError, r"line 1: columns"),
        (HEAD.encode() + b"\n\xff\xfe,x,1,1\n", ConfigError, r"not text in UTF-8"),
    ],
)
def test_a_file_of_another_form_is_refused(
    tmp_path: Path, data: bytes, kind: type[EdgeRuntimeError], message: str
) -> None:
    (tmp_path / "p.csv").write_bytes(data)
    with pytest.raises(kind, match=message):
        read_platforms(tmp_path / "p.csv")


def test_a_file_that_is_missing_a_pipe_or_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"gone\.csv does not exist"):
        read_platforms(tmp_path / "gone.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(ManifestError, match="not a plain file"):
        read_platforms(tmp_path / "pipe.csv")
    large = tmp_path / "large.csv"
    large.touch()
    os.truncate(large, 2**26 + 1)
    with pytest.raises(ManifestError, match="at most 67108864"):
        read_platforms(large)


def test_a_byte_order_mark_and_empty_lines_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("\r\n".join([HEAD, *made_up_rows(), "", ""]), encoding="utf-8-sig")
    assert [result.name for result in read_platforms(path)] == ["slow", "fast"]


def _published() -> Sequence[str]:
    return ("orin_onnx_cpu", "orin_onnx_gpu", "pc_onnx_cpu", "pc_onnx_gpu")


def test_the_thesis_s_own_file_gives_its_published_means() -> None:
    path = SHARED / "data" / "eevit_platforms.csv"
    if not path.is_file():
        pytest.skip(f"no {path}: EDGE_SHARED names the folder that has data/")
    results = read_platforms(path)
    assert tuple(result.name for result in results) == _published()
    means = [round(1e3 * result.end_to_end.mean, 1) for result in results]
    assert means == [108.2, 44.4, 88.2, 52.8]
    last = [result.exit("final").latency for result in results]
    assert [round(1e3 * one.mean, 1) for one in last if one] == [211.8, 105.5, 180.3, 130.2]
    assert {result.bundle for result in results} == {"EEVIT ViT-B/16, 8 exits"}
