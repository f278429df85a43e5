"""What can't be compared, and that a machine is no reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.compare.comparable import check_comparable, hindrances
from bench.compare.sources import Run
from bench.result import Deadline
from edge_runtime import OperatingPoint
from edge_runtime.errors import ConfigError
from tests.bench.results import made_up_result

POINT = made_up_result().operating_point
assert POINT is not None


def _runs(**changes: Any) -> tuple[Run, Run]:
    other = made_up_result("desktop", 0.2, **changes)
    return Run("a.json", made_up_result()), Run("b.json", other)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"bundle": "c" * 64}, "bundle"),
        ({"data": "e" * 64}, "data"),
        ({"data": ""}, "data"),
        ({"method": "another"}, "method"),
        ({"batch": 8}, "batch"),
        ({"deadline": Deadline(seconds=0.01, missed=0, cut_short=0, frames=9)}, "deadline"),
        ({"operating_point": None}, "operating point"),
        ({"operating_point": replace(POINT, thresholds={"saver": 0.9})}, "thresholds"),
        ({"operating_point": replace(POINT, temperatures={"saver": 1.5})}, "temperatures"),
        ({"operating_point": replace(POINT, metric="entropy")}, "metric"),
        ({"operating_point": replace(POINT, policy="patience", patience=2)}, "policy"),
        (
            {
                "stages": tuple(
                    replace(stage, precision="int8") for stage in made_up_result().stages
                )
            },
            "precision of stages",
        ),
        (
            {"stages": (), "operating_point": replace(POINT, variants={"segment1": "int8"})},
            "precision of stages",
        ),
    ],
)
def test_another_experiment_is_refused_by_name(changes: dict[str, Any], what: str) -> None:
    runs = _runs(**changes)
    assert what in [one.what for one in hindrances(runs)]
    with pytest.raises(ConfigError, match=rf"b\.json: {what}: got .*, expected .*--anyway"):
        check_comparable(runs, anyway=False)
    assert check_comparable(runs, anyway=True) == hindrances(runs)


def test_a_slower_machine_that_sees_fewer_of_the_images_is_comparable() -> None:
    assert hindrances(_runs(images=400)) == ()


def test_every_hindrance_of_every_file_is_listed() -> None:
    first, second = _runs(batch=4, data="e" * 64)
    third = Run("c.json", made_up_result("third", method="another"))
    with pytest.raises(ConfigError) as caught:
        check_comparable((first, second, third), anyway=False)
    message = str(caught.value)
    assert "b.json: data: got eeeeeeeeeeee, expected dddddddddddd" in message
    assert "b.json: batch: got 4, expected 1" in message
    assert "c.json: method: got another" in message


def test_machine_backend_and_mode_are_what_people_compare() -> None:
    assert check_comparable(_runs(backend="tensorrt", mode="graph"), anyway=False) == ()


def test_points_that_run_alike_are_alike_whatever_they_are_called() -> None:
    same = OperatingPoint(
        "by_hand",
        thresholds={"middle": 0.8, "saver": 0.9, "final": None},
        temperatures={"saver": 1.0},
    )
    assert hindrances(_runs(operating_point=same)) == ()
