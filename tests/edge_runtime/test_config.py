"""Strict YAML: what is read, and that every trap is an error with line and remedy."""

import builtins
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime import config
from edge_runtime.errors import BackendUnavailable, ConfigError, EdgeRuntimeError
from tests.edge_runtime.bundles import refused


@dataclass(frozen=True)
class Model:
    file: str = ""
    rate: float = 1.0
    kind: Literal["small", "large"] = "small"


@dataclass(frozen=True)
class Settings:
    name: str = "unnamed"
    count: int = 1
    flag: bool = False
    model: Model = Model()
    models: tuple[Model, ...] = ()
    table: Mapping[str, str] = field(default_factory=dict)
    anything: Any = None


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Read YAML text, from a file c.yaml in the current folder."""
    monkeypatch.chdir(tmp_path)

    def load_text(text: str | bytes, *overrides: str) -> Settings:
        Path("c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return config.load(Path("c.yaml"), Settings, overrides)

    return load_text


def test_reads_every_kind_of_value(load):
    text = """\
# a comment
name: "yes"          # quoted: text
count: -3
flag: true
model: {file: a b.onnx, rate: 1.0e-3, kind: large}
models:
  - rate: 2
  - rate: .5
    file: 'it''s'
table:
  "on": x
  héllo: "\\u00e9"
anything: [null, ~, 0x1F, +1, 1.5, False, "", 2.5e+3, 1.2.3, a:b, {}]
"""
    assert load(text) == Settings(
        name="yes",
        count=-3,
        flag=True,
        model=Model("a b.onnx", 0.001, "large"),
        models=(Model(rate=2.0), Model("it's", 0.5)),
        table={"on": "x", "héllo": "é"},
        anything=[None, None, 31, 1, 1.5, False, "", 2500.0, "1.2.3", "a:b", {}],
    )


def test_a_byte_order_mark_is_no_part_of_the_text(load):
    assert load(b"\xef\xbb\xbfname: a\n").name == "a"


def test_block_text(load):
    assert load("name: |\n  on\n  1e-3\n").name == "on\n1e-3\n"


@pytest.mark.parametrize(
    ("text", "where", "remedy"),
    [
        ("rate: 1e-3", "c.yaml:1: '1e-3' is text for some", "Write 1.0e-3, or quote it"),
        ("a: 1\nrate: 2.5E4", "c.yaml:2: '2.5E4'", "Write 2.5e+4"),
        ("rate: -1E5", "c.yaml:1: '-1E5'", "Write -1.0e+5"),
        ("count: 1_000", "c.yaml:1: '1_000'", "Write 1000"),
        ("count: 0b11", "c.yaml:1: '0b11'", "Write 3"),
        ("flag: on", "c.yaml:1: 'on' is true or false", "Write true or false, or quote it"),
        ("flag: Off", "c.yaml:1: 'Off'", "Write true or false"),
        ("flag: yes", "c.yaml:1: 'yes'", "Write true or false"),
        ("flag: NO", "c.yaml:1: 'NO'", "Write true or false"),
        ("flag: y", "c.yaml:1: 'y'", "Write true or false"),
        ("flag: N", "c.yaml:1: 'N'", "Write true or false"),
        ("on: 1", "c.yaml:1: 'on'", "quote it"),
        ("table:\n  no: x", "c.yaml:2: 'no'", "quote it"),
        ("anything: [a, y]", "c.yaml:1: 'y'", "quote it"),
        ("count: 010", "c.yaml:1: '010' is octal", "Write it without the leading 0"),
        ("count: 08", "c.yaml:1: '08'", "leading 0"),
        ("count: 0o17", "c.yaml:1: '0o17'", "leading 0"),
        ("count: 1:30", "c.yaml:1: '1:30' is a number in base 60", "Write one number"),
        ("name: 16:9", "c.yaml:1: '16:9'", "quote it"),
        ("rate: -1:30:00.5", "c.yaml:1: '-1:30:00.5'", "quote it"),
        ("rate: .inf", "c.yaml:1: '.inf' is not a finite number", "Write a number"),
        ("rate: -.INF", "c.yaml:1: '-.INF'", "Write a number"),
        ("rate: .nan", "c.yaml:1: '.nan'", "Write a number"),
        ("rate: nan", "c.yaml:1: 'nan'", "quote it"),
        ("anything: 1.0e+999", "c.yaml:1: the number 1.0e+999 is too large", ""),
        (f"count: {'9' * 5000}", "c.yaml:1: the number 99999", "is too long"),
        ("name: 2026-11-22", "c.yaml:1: '2026-11-22' is a date", "Quote it"),
        ("name: 2026-11-22 10:00:00", "c.yaml:1: '2026-11-22 10:00:00' is a date", "Quote it"),
        ("name: =", "c.yaml:1: '='", "Quote it"),
        ("table:\n  <<: {a: b}", "c.yaml:2: '<<' has a meaning", "write the keys out"),
        ("a: &x 1\nb: *x", "c.yaml:1: anchors and aliases", "Write the value out"),
        ("a: *x", "c.yaml:1: anchors and aliases", "Write the value out"),
        ("&x a: 1", "c.yaml:1: anchors and aliases", "Write the value out"),
        ("a: !!python/object/apply:os.system [ls]", "c.yaml:1: the tag ", "Remove it"),
        ("name: !!str 1", "c.yaml:1: the tag ", "Remove it"),
        ("name: ! 1", "c.yaml:1: the tag ", "Remove it"),
        ("!!map {}", "c.yaml:1: the tag ", "Remove it"),
        ("name: a\ncount: 1\nname: b", "c.yaml:3: the key 'name' appears twice", "in line 1"),
        ("model:\n  rate: 1\n  'rate': 2", "c.yaml:3: the key 'rate' appears twice", "line 2"),
        ("modle:\n  rate: 1", "c.yaml:1: unknown key 'modle'", "Did you mean 'model'?"),
        ("model:\n  rat: 1", "c.yaml:2: model: unknown key 'rat'", "Did you mean 'rate'?"),
        ("model:\n\n  rate: x", "c.yaml:3: model: rate: got str 'x'", "expected float"),
        (
            "models:\n- {}\n- kind: big",
            "c.yaml:3: models[1]: kind: got 'big'",
            "'small' or 'large'",
        ),
        ("model: {kind: lrage}", "c.yaml:1: model: kind", "Did you mean 'large'?"),
        ("1: a", "c.yaml:1: the key '1' is not text", "Quote it"),
        ("null: a", "c.yaml:1: the key 'null'", "Quote it"),
        ("?\n: a", "c.yaml:1: the key ''", "Quote it"),
        ("? [a]\n: b", "c.yaml:1: a key must be text", ""),
        ("- a", "c.yaml: the whole file: got list", "expected a mapping"),
        ("text", "c.yaml: the whole file: got str", "expected a mapping"),
        ("", "c.yaml: the whole file: got nothing", "expected a mapping"),
        ("# only a comment\n", "c.yaml: the whole file: got nothing", "expected a mapping"),
        ("name: a\n---\nname: b", "c.yaml:2: a second document", "one document per file"),
        ("model:\n\trate: 1", "c.yaml:2: a tab", "Indent with spaces"),
        ("name:\ta", "c.yaml:1: a tab", "Indent with spaces"),
        (b"name: a\ncount: \xff", "c.yaml:2: the text is not UTF-8", ""),
        ("name: a".encode("utf-16"), "c.yaml:1: the text is not UTF-8", ""),
        ("count: 1\nname: \x07", "c.yaml:2: the character '\\x07'", ""),
        ("name: a\0", "c.yaml:1: the character '\\x00'", ""),
        ('name: "\\0"', "c.yaml:1: the text '\\x00'", ""),
        ('name: "\\uD800"', "c.yaml:1: the text '\\ud800'", ""),
        ("name: [a", "c.yaml:1: not YAML", ""),
        ("name: a: b", "c.yaml:1: not YAML: mapping values are not allowed here", "Quote"),
        ("name: @a", "c.yaml:1: not YAML", "Quote"),
        ("%YAML 3.0\n---\nname: a", "c.yaml:1: not YAML", ""),
        ("anything: " + "[" * 5000, "c.yaml:1: nested deeper than 64 levels", ""),
        ("anything: " + "{a: " * 100, "c.yaml:1: nested deeper than 64 levels", ""),
        ("name: ${", "c.yaml:1: no variable: '${'", "Write ${NAME} or ${NAME:-default}"),
        ("name: '${A-b}'", "c.yaml:1: no variable", "Write ${NAME}"),
        ("name: ${EDGE_NOT_SET}/a", "c.yaml:1: the environment variable EDGE_NOT_SET is", "Set it"),
    ],
)
def test_refuses_with_line_and_remedy(load, text, where, remedy):
    with refused(ConfigError, where, remedy):
        load(text)


def test_a_number_of_repeated_aliases_never_expands(load):
    bomb = "a: &a [x, x]\n" + "".join(
        f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with refused(ConfigError, "anchors and aliases"):
        load(bomb)


def test_a_file_that_can_not_be_read(tmp_path):
    with refused(ConfigError, "absent.yaml does not exist"):
        config.load(tmp_path / "absent.yaml", Settings)
    with refused(ConfigError, f"{tmp_path} can't be read: Is a directory"):
        config.load(tmp_path, Settings)


class TestVariables:
    def test_a_relative_path_is_taken_from_the_current_folder(self, load, monkeypatch):
        monkeypatch.setenv("EDGE_DATA", "../shared")
        expected = str(Path.cwd().parent / "shared" / "a.onnx")
        assert load("name: ${EDGE_DATA}/a.onnx").name == expected

    def test_one_word_before_a_slash_is_a_path(self, load, monkeypatch):
        monkeypatch.setenv("EDGE_DATA", "shared")
        assert load("name: '${EDGE_DATA:-x}/a'").name == str(Path.cwd() / "shared" / "a")

    def test_one_word_that_exists_is_a_path(self, load, monkeypatch):
        Path("shared").mkdir()
        monkeypatch.setenv("EDGE_DATA", "shared")
        assert load("name: ${EDGE_DATA}").name == str(Path.cwd() / "shared")

    @pytest.mark.parametrize("value", ["/data/x", "fp16", "http://host/a", "a b"])
    def test_other_values_are_taken_as_they_are(self, load, monkeypatch, value):
        monkeypatch.setenv("EDGE_DATA", value)
        assert load("name: ${EDGE_DATA}").name == value

    def test_within_a_text_it_is_no_path(self, load, monkeypatch):
        monkeypatch.setenv("EDGE_DATA", "a/b")
        assert load("name: runs/${EDGE_DATA}-${EDGE_DATA}").name == "runs/a/b-a/b"

    def test_a_default_is_taken_as_written(self, load, monkeypatch):
        monkeypatch.delenv("EDGE_DATA", raising=False)
        assert load("name: ${EDGE_DATA:-../shared}/a.onnx").name == "../shared/a.onnx"
        assert load("name: ${EDGE_DATA:-}").name == ""

    def test_an_empty_variable_counts_as_not_set(self, load, monkeypatch):
        monkeypatch.setenv("EDGE_DATA", "")
        assert load("name: ${EDGE_DATA:-x}").name == "x"
        with refused(ConfigError, "the environment variable EDGE_DATA is not set"):
            load("name: ${EDGE_DATA}")

    def test_a_value_is_not_read_again(self, load, monkeypatch):
        monkeypatch.setenv("EDGE_DATA", "${HOME} on 1e-3")
        assert load("name: ${EDGE_DATA}").name == "${HOME} on 1e-3"

    def test_a_dollar_alone_is_text(self, load):
        assert load("name: $5 $HOME").name == "$5 $HOME"


class TestOverrides:
    TEXT = "name: a\nmodels:\n- rate: 2\n- rate: 3\n"

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("name=b", {"name": "b"}),
            ("name=b=c", {"name": "b=c"}),
            ("name=''", {"name": ""}),
            ("name='on'", {"name": "on"}),
            ("count=5", {"count": 5}),
            ("flag=true", {"flag": True}),
            ("model.rate=1.0e-3", {"model": Model(rate=0.001)}),
            ("model={rate: 4}", {"model": Model(rate=4.0)}),
            ("models.1.rate=4", {"models": (Model(rate=2.0), Model(rate=4.0))}),
            ("models=[{rate: 4}]", {"models": (Model(rate=4.0),)}),
            ("table.x=z", {"table": {"x": "z"}}),
            ("anything=null", {"anything": None}),
            ("anything.a.b=1", {"anything": {"a": {"b": 1}}}),
        ],
    )
    def test_replace_values(self, load, override, expected):
        before = {"name": "a", "models": (Model(rate=2.0), Model(rate=3.0))}
        assert load(self.TEXT, override) == Settings(**{**before, **expected})

    def test_the_last_one_counts(self, load):
        assert load(self.TEXT, "count=2", "count=3").count == 3

    def test_null_makes_room_for_keys(self, load):
        assert load("model: null", "model.rate=2").model == Model(rate=2.0)

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("model.rat=1", "model: unknown key 'rat'. Did you mean 'rate'?"),
            ("modell.rate=1", "unknown key 'modell'. Did you mean 'model'?"),
            ("name.x=1", "'name' has no keys: got 'a'"),
            ("models.2.rate=1", "place in a list: got '2', expected a number in 0..1"),
            ("models.x.rate=1", "place in a list: got 'x'"),
            ("models.-1.rate=1", "place in a list: got '-1'"),
            ("model.rate=1e-3", "Write 1.0e-3"),
            ("flag=on", "Write true or false"),
            ("count=two", "count: got str 'two', expected int"),
            ("name=a: b", "name: got a mapping"),
            ("name=", "the value is empty. Write null or ''"),
            ("name=#a", "the value is empty"),
            ("name=[a", "not YAML"),
            ("name=*a", "anchors and aliases"),
            ("table={a: b, a: c}", "the key 'a' appears twice"),
            ("name", "expected key=value"),
            ("=1", "expected key=value"),
            ("model..rate=1", "expected key=value"),
        ],
    )
    def test_refuse_and_name_the_override(self, load, override, message):
        with refused(ConfigError, f"override {override!r}", message):
            load(self.TEXT, override)


def test_without_pyyaml_it_names_the_extra(load, monkeypatch):
    real = builtins.__import__

    def without_yaml(name, *args, **kwargs):
        if name == "yaml":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_yaml)
    with refused(BackendUnavailable, "PyYAML", "edge-runtime[cpu]"):
        load("name: a")


alphabet = st.sampled_from([*"ab01eE+-.:_#'\"[]{},&*!|>%@`?<=~ \t\n\r$yon\\", "on", "1e3", "- "])


@settings(deadline=None, max_examples=300)
@given(st.lists(alphabet, max_size=12).map("".join))
def test_any_text_is_read_as_pyyaml_does_or_refused_on_one_line(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text("anything: " + text, newline="")
    try:
        found = config.load(path, Settings)
    except EdgeRuntimeError as error:
        assert type(error) is ConfigError
        assert str(error).isprintable()
    else:
        assert found.anything == yaml.safe_load("anything: " + text)["anything"]
