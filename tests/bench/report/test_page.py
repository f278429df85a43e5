"""A page that stands alone, whatever is written in the results."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench.report.page import page, write_page
from bench.report.table import Table
from bench.result import Result
from tests.bench.report.test_figures import NAMES, reference
from tests.bench.results import made_up_energy, made_up_result

pytest.importorskip("matplotlib")

VOID = {"meta", "br", "link", "img", "hr"}
TABLE = Table("Exits, ms", ("exit", "p50"), (("saver", "0.50"), ("final", "5.00")), ("A note.",))
COMMAND = "edge-runtime bench my.bundle --html orin.html"


class Checker(HTMLParser):
    """Fails where tags do not match; keeps what a test asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def read(*results: Result) -> Checker:
    checker = Checker()
    text = page(results, [TABLE], title="Orin", command=COMMAND)
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


def five() -> list[Result]:
    return [made_up_result(f"board {i}", 1 + i) for i in range(5)]


def test_a_page_says_what_was_measured_and_how():
    text = read(made_up_result()).text
    for words in (
        "my-cascade at zero_loss on Orin NX, onnxrt (host), 1,000 frames",
        "as long for the base model; 95\u00a0% interval 3.46 to 3.68",
        "3.57 times",
        "90 %",
        "PyTorch eager: the package torch is not installed",
        "saver 0.9, middle 0.8",
        "b" * 64,
        "d" * 64,
        "edge-runtime bench my.bundle --data photos",
        COMMAND,
        "2026-11-24T15:00:00+00:00",
        "A note.",
    ):
        assert words in text
    assert "not stable" not in text


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_chart_is_named_for_those_who_do_not_see_it(count):
    checker = read(*five()[:count])
    pictures = checker.all("svg")
    assert len(pictures) == len(NAMES)
    assert all(one["role"] == "img" and len(str(one["aria-label"])) > 40 for one in pictures)
    assert [one["id"] for one in checker.all("figure")] == NAMES
    assert checker.all("html") == [{"lang": "en"}]
    assert {one["scope"] for one in checker.all("th")} == {"col", "row"}


def test_a_reference_has_a_page_too():
    text = read(reference()).text
    assert "Published figures, not measured here" in text
    assert "Environment" not in text


def test_nothing_leaves_the_page():
    text = page(five(), [TABLE], title="Five", command=COMMAND)
    bare = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "://" not in bare
    assert not re.search(r"<(script|link|img|iframe|object|base)\b|@import|url\((?!#)", bare)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert f'http-equiv="Content-Security-Policy" content="{policy}"' in text


def test_ids_are_unique_and_every_pointer_finds_one():
    text = page(five(), [], title="Five", command=COMMAND)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    pointers = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)
    assert pointers and {a or b for a, b in pointers} <= set(ids)


def test_an_unstable_run_says_so_first():
    checker = read(made_up_result(unstable=("block medians vary by 4.1 %",)), reference())
    assert checker.text.index("block medians vary") < checker.text.index("Charts")
    assert [one["class"] for one in checker.all("div") if one.get("role") == "note"] == ["warn"]


def test_same_results_give_the_same_bytes(tmp_path: Path):
    for name in ("a.html", "b.html"):
        write_page(tmp_path / name, [made_up_result()], [TABLE], title="Orin", command=COMMAND)
    first = (tmp_path / "a.html").read_bytes()
    assert first == (tmp_path / "b.html").read_bytes()
    assert len(first) < 400_000


def test_what_a_result_file_says_is_never_markup():
    evil = "</svg><script>alert(1)</script>\" onload='x' $x_{ \x00\ud800\u202e &amp;"
    whole = made_up_result()
    hostile = replace(
        whole,
        name=evil,
        command=evil,
        created=evil,
        method=evil,
        bundle=evil,
        bundle_name=evil,
        data=evil,
        backend=evil,
        mode=evil,
        environment={"machine": {"cpu": evil}, evil: evil},
        exits=tuple(replace(one, name=f"{i}{evil}") for i, one in enumerate(whole.exits)),
        stages=tuple(replace(one, name=evil, precision=evil) for one in whole.stages),
        points=tuple(replace(one, name=evil) for one in whole.points),
        frames=tuple(
            replace(
                one, what=evil, spans=tuple(replace(s, name=evil, kind=evil) for s in one.spans)
            )
            for one in whole.frames
        ),
        subjects=tuple(replace(one, name=f"{i}{evil}") for i, one in enumerate(whole.subjects)),
        energy=(replace(made_up_energy(), reader=evil, problem=evil),),
        no_energy=evil,
        pruned=(evil,),
        not_measured={evil: evil},
        unstable=(evil,),
        notes=(evil,),
    )
    table = Table(evil, (evil, evil), ((evil, evil),), (evil,))
    text = page([hostile, whole], [table], title=evil, command=evil)
    checker = Checker()
    checker.feed(text)
    assert checker.open == [] and checker.all("script") == []
    assert not any("onload" in attributes for _, attributes in checker.tags)
    assert "<script>alert(1)</script>\" onload='x' $x_{" in checker.text
    assert text.encode().isascii() is False
    assert not set(text) & set("\x00\u202e")
