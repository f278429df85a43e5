"""What a study looks like: printed, as JSON, and drawn."""

import io
import json

import pytest

from calib.quee.plot import draw
from calib.quee.report import plain, show, unit
from calib.quee.study import Study
from calib.quee.targets import TargetError
from edge_runtime.console import Console
from tests.calib.quee.test_study import a_study


@pytest.fixture(scope="module")
def made() -> Study:
    study = a_study(trade_offs=tuple(i / 20 for i in range(20)))
    errors = tuple(TargetError(k, 0.05 - k / 2000, (0.02, 0.08)) for k in (5, 10, 20, 40))
    return Study(**{**vars(study), "calibration": errors})


def printed(study: Study) -> str:
    out = io.StringIO()
    show(study, Console(stdout=out))
    return out.getvalue()


class TestShow:
    def test_every_curve_has_eight_lines_at_most(self, made):
        lines = [line.strip() for line in printed(made).splitlines()]
        first = next(i for i, line in enumerate(lines) if line.startswith("thresholds, fp32"))
        second = next(i for i, line in enumerate(lines) if line.startswith("thresholds, all int8"))
        assert len(made.columns[0].reference.points) > 30
        assert second - first == 8

    def test_costs_calibration_near_ties_and_verdict(self, made):
        text = printed(made)
        assert "bitops at equal accuracy, against thresholds, fp32" in text
        assert "never" in text
        assert "4.00 %" in text
        assert "near-ties of the gate weighing bitops: " in text
        assert "bitops: the gate is cheaper than thresholds, fp32 at 100.00 %" in text

    def test_seconds_are_shown_as_milliseconds(self):
        assert unit("latency") == ("latency, ms", 1e3)
        assert unit("anything") == ("anything", 1)


class TestPlain:
    def test_json_has_all_points_with_shares_by_exit_and_path(self, made):
        data = json.loads(json.dumps(plain(made), allow_nan=False))
        curves = data["columns"]["bitops"]["curves"]
        assert len(curves["gate"]) == 20
        point = curves["gate"][0]
        assert list(point["leaving"]) == ["early", "middle", "last"]
        assert sum(point["paths"].values()) == pytest.approx(1)
        assert len(point["accuracy"]["parts"]) == 10
        compared = data["columns"]["bitops"]["cost_at_accuracy"][0]
        assert (compared["curve"], compared["verdict"]) == ("gate", "cheaper")
        assert data["calibration"][0]["clusters"] == 5
        assert data["verdict"]


class TestPlot:
    def test_curves_squares_and_calibration_are_in_the_picture(self, made, tmp_path):
        pytest.importorskip("matplotlib")
        draw(made, tmp_path / "p.svg")
        text = (tmp_path / "p.svg").read_text()
        for words in (
            "<!-- gate -->",
            "<!-- thresholds, all int8 -->",
            "<!-- fp32, no exits -->",
            "<!-- second-order polynomial -->",
            "<!-- accuracy against exits -->",
        ):
            assert words in text
        assert [path.name for path in tmp_path.iterdir()] == ["p.svg"]
