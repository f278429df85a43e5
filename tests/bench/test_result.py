"""Result files: read as they were written, and refused where they are not ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.result import Distribution, frames_for, read_result, write_result
from edge_runtime.errors import ManifestError
from tests.bench.results import made_up_result


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = made_up_result()
    write_result(result, tmp_path / "a.json")
    assert read_result(tmp_path / "a.json") == result


def test_a_percentile_needs_enough_frames_to_have_one_above_it() -> None:
    assert [frames_for(q) for q in (0.5, 0.9, 0.99, 0.999)] == [5, 29, 299, 2995]
    few, many = (Distribution.of(np.arange(1.0, n)) for n in (299, 301))
    assert few.p90 is not None
    assert few.p99 is None
    assert many.p99 == pytest.approx(297.01)
    assert many.p999 is None


def test_jitter_is_the_mean_step_from_one_frame_to_the_next() -> None:
    assert Distribution.of([1.0, 3.0, 2.0]).jitter == 1.5
    assert Distribution.of([1.0]).jitter is None


def altered(path: Path, *keys: Any, value: Any) -> None:
    data = json.loads(path.read_text())
    place = data
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("keys", "value", "expected"),
    [
        (["schema_version"], 99, "schema version: got 99, expected 1"),
        (["kind"], "benchmark", "kind: got 'benchmark', expected 'bench' or 'reference'"),
        (["subjects", 0, "latency", "mean"], "fast", "mean: got str 'fast', expected float"),
        (["exits", 1, "shares"], 1, "unknown key 'shares'"),
        (["latency_table", "around_us"], [1.0], "latency table"),
        (["operating_point", "policy"], "guess", "policy"),
        (["exits", 0, "share"], 1.5, "share"),
        (["end_to_end", "mean"], -1.0, "durations"),
    ],
)
def test_a_file_that_does_not_fit_says_where(
    tmp_path: Path, keys: list[Any], value: Any, expected: str
) -> None:
    path = tmp_path / "a.json"
    write_result(made_up_result(), path)
    altered(path, *keys, value=value)
    with pytest.raises(ManifestError, match=r"result .*a\.json") as caught:
        read_result(path)
    assert expected in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_result(made_up_result(), path)
    path.write_text(path.read_text()[:5000])
    with pytest.raises(ManifestError, match="is not whole"):
        read_result(path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema_version": 1}', '"text"'])
def test_another_json_file_is_no_result(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ManifestError, match="is no result of the bench"):
        read_result(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"absent\.json"):
        read_result(tmp_path / "absent.json")
