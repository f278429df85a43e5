"""Shortlists from small CSVs in timm's format, and from the public files where they are present."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from calib.cascade_search.signals import Judgement
from calib.saver_selection import rank_savers
from calib.shortlist import PublicModel, PublicSaver, Shortlist, read_shortlist
from edge_runtime import cli

PUBLIC = Path(__file__).parents[3] / "shared" / "data" / "timm"

RESULTS = """model,img_size,top1,top1_err,top5,param_count,crop_pct
big.a,224,80.0,20.0,95.0,"1,025.5",0.95
big.b,224,82.0,18.0,96.0,100.0,0.95
big.b,288,84.0,16.0,97.0,100.0,1.0
small.x,224,70.0,30.0,90.0,5.0,0.9
tiny,128,40.0,60.0,70.0,1.0,0.9
slow.x,224,69.0,31.0,89.0,6.0,0.9
test_vit.r160,160,41.0,59.0,70.0,0.4,0.9
absent.x,224,90.0,10.0,99.0,50.0,0.9
blank.x,224,90.0,10.0,99.0,50.0,0.9
"""
#: Other columns in another order, and a row without a number.
BENCHMARK = """infer_gmacs,model,infer_samples_per_sec,infer_step_time,infer_img_size
4.0,big,100.0,10,224
6.0,big,50,20,288
0.25,small,1000,1,224
0.5,slow,500,2,224
0.01,tiny,10000,0.1,128
0.05,test_vit,20000,0.1,160
,blank,,,224
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "results.csv").write_text(RESULTS)
    (tmp_path / "benchmark.csv").write_text(BENCHMARK)
    return tmp_path


def arguments(files: Path, *more: str) -> list[str]:
    results, benchmark = str(files / "results.csv"), str(files / "benchmark.csv")
    return ["shortlist", "--accuracy", results, "--costs", benchmark, *more]


def test_checkpoints_get_the_cost_of_their_architecture_at_their_size(files: Path) -> None:
    found = read_shortlist(files / "results.csv", files / "benchmark.csv")
    assert found.unit == "seconds per sample"
    assert {one.name: (one.accuracy, one.cost) for one in found.models} == {
        "big.a@224": (0.80, 0.01),
        "big.b@224": (0.82, 0.01),
        "big.b@288": (0.84, 0.02),
        "small.x@224": (0.70, 0.001),
        "tiny@128": (0.40, 0.0001),
        "slow.x@224": (0.69, 0.002),
    }
    assert found.dropped == {"test models": 1, "without a cost": 2}
    names = [one.name for one in found.front()]
    assert names == ["tiny@128", "small.x@224", "big.b@224", "big.b@288"]


@pytest.mark.parametrize("seed", range(5))
def test_front_equals_brute_force_with_ties(seed: int) -> None:
    generator = np.random.default_rng(seed)
    models = tuple(
        PublicModel(f"m{i}", 224, int(a) / 10, float(c))
        for i, (a, c) in enumerate(generator.integers(1, 9, (25, 2)))
    )
    want = {
        (one.accuracy, one.cost)
        for one in models
        if not any(
            o.accuracy >= one.accuracy
            and o.cost <= one.cost
            and (o.accuracy, o.cost) != (one.accuracy, one.cost)
            for o in models
        )
    }
    front = Shortlist(models, "", {}).front()
    assert {(one.accuracy, one.cost) for one in front} == want
    assert len(front) == len(want)


def test_savers_are_cheaper_models_on_the_front_that_could_pay_off(files: Path) -> None:
    found = read_shortlist(files / "results.csv", files / "benchmark.csv")
    base = found.find("big.a")
    savers = {one.saver.name: (one.needed, one.possible) for one in found.savers(base)}
    # As dear as the base: big.b. Not on the front: slow.x.
    assert savers == {
        "small.x@224": (pytest.approx(0.1), pytest.approx(0.9)),
        "tiny@128": (pytest.approx(0.01), pytest.approx(0.6)),
    }
    assert [one.saver.name for one in found.savers(base)] == ["small.x@224", "tiny@128"]
    near = PublicModel("near", 224, 0.9, 0.0011)
    assert [one.saver.name for one in found.savers(near)] == ["tiny@128"]


@pytest.mark.parametrize("seed", range(20))
def test_predictions_never_let_more_leave_than_the_accuracies_allow(seed: int) -> None:
    generator = np.random.default_rng(seed)
    models = {
        name: Judgement(generator.random(40, np.float32), generator.random(40) < share)
        for name, share in (("saver", 0.4 + seed / 50), ("base", 0.9))
    }
    small, large = (
        PublicModel(name, 224, float(one.correct.mean()), cost)
        for (name, one), cost in zip(models.items(), (1.0, 9.0), strict=True)
    )
    (measured,) = rank_savers(models, {"saver": 1.0, "base": 9.0}, "base", 0.0)
    bound: list[PublicSaver] = list(Shortlist((small, large), "", {}).savers(large))
    for one in bound:
        assert measured.exit_ratio <= one.possible + 1e-12
        assert measured.delta >= one.best_delta - 1e-12
    assert bound or measured.delta >= 0


def test_the_command_end_to_end(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = files / "out.json"
    more = ["--base", "big.b@288,slow.x", "--cost-column", "infer_gmacs", "--json", str(out)]
    assert cli.main(arguments(files, *more)) == 0
    found = json.loads(out.read_text())
    assert found["unit"] == "MACs"
    assert [one["model"] for one in found["front"]] == ["tiny", "small.x", "big.b", "big.b"]
    assert [one["cost"] for one in found["front"]] == [1e7, 2.5e8, 4e9, 6e9]
    savers = {one["model"]: one for one in found["bases"]["big.b@288"]["savers"]}
    assert savers["small.x"]["needed_exit_ratio"] == pytest.approx(0.25 / 6)
    text = capsys.readouterr().out
    assert "slow.x@224 needs no saver: small.x@224 is cheaper and as accurate" in text
    assert "1 test models" in text


def test_limits_leave_models_out(files: Path) -> None:
    paths = (files / "results.csv", files / "benchmark.csv")
    found = read_shortlist(*paths, max_cost=0.015, max_image_size=200, max_params=90)
    assert [one.name for one in found.models] == ["tiny@128"]
    found = read_shortlist(*paths, max_params=1000)
    assert found.dropped["above --max-params"] == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--base", "big.b"],
            "--base big.b: there are 2 sizes of the image. Give one of big.b@224,",
        ),
        (["--base", "huge"], "--base: no model 'huge' has both accuracy and cost"),
        (["--cost-column", "watts"], "benchmark.csv: there is no column 'watts'"),
        (["--cost-column", "infer_step_time"], "times of batches, whose sizes differ between"),
        (
            ["--accuracy-column", "top2"],
            "results.csv: there is no column 'top2'. Did you mean 'top",
        ),
        (["--max-cost", "1e-9"], "got 6 above --max-cost, 1 test models, 2 without a cost, expec"),
        (["--max-cost", "0"], "got '0', expected a number > 0"),
    ],
)
def test_what_is_asked_wrongly(
    files: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(files, *more)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("results", "70.0,30.0", "much,30.0", "line 5: top1: got 'much', expected a finite"),
        ("results", "70.0,30.0", "170,30.0", "line 5: 'small.x' at 224 pixels: top1: got 170"),
        ("results", "small.x,224", "small.x,0", "line 5: img_size: got '0', expected a finite"),
        ("results", "big.b,288", "big.b,224", "line 4: 'big.b' at 224 pixels appears twice"),
        ("results", ",0.95\nbig.b,224", "\nbig.b,224", "line 2: cells: got 6, expected 7"),
        ("results", "top5", "top1", "the column 'top1' appears twice"),
        ("results", "img_size", "size", "columns of image sizes: got none, expected one, img_"),
        ("benchmark", "0.5,slow,500", "0.5,slow,-1", "line 5: infer_samples_per_sec: got '-1'"),
        ("benchmark", "0.5,slow", "0.5,small", "line 5: 'small' at 224 pixels appears twice"),
    ],
)
def test_bad_files_are_one_line_that_names_the_row(
    files: Path,
    file: str,
    old: str,
    new: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = files / f"{file}.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert cli.main(arguments(files)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_missing_and_empty_files(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "benchmark.csv").unlink()
    assert cli.main(arguments(files)) == 2
    assert "benchmark.csv: there is no such file" in capsys.readouterr().err
    (files / "benchmark.csv").write_text("\n")
    assert cli.main(arguments(files)) == 2
    assert "benchmark.csv: the file is empty" in capsys.readouterr().err


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="the public CSVs are not here")
@pytest.mark.parametrize("column", ["infer_samples_per_sec", "infer_gmacs"])
def test_every_public_benchmark_gives_a_front(column: str) -> None:
    for benchmark in sorted(PUBLIC.glob("benchmark-*.csv")):
        found = read_shortlist(PUBLIC / "results-imagenet.csv", benchmark, cost_column=column)
        assert len(found.models) > 500
        front = found.front()
        assert 10 < len(front) < 100
        assert all(not one.model.startswith("test_") for one in found.models)
        assert len(found.savers(front[-1])) >= 5
