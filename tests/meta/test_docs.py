"""Links in the documents resolve, and the commands that they show run."""

import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.meta.repository import ROOT, copy_repository_files

README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("**/*.md"))]

FENCE = re.compile(
    r"^(?P<fence>```+|~~~+)(?P<tags>[^\n`]*)\n(?P<body>.*?)^(?P=fence)\s*$", re.M | re.S
)
INLINE_LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
REFERENCE_LINK = re.compile(r"^\s{0,3}\[[^\]]+\]:\s*<?(\S+?)>?(?:\s|$)", re.M)
HTML_LINK = re.compile(r"""<(?:a|img)\s[^>]*?(?:href|src)=["']([^"']+)["']""")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.M)
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:")  # https:, mailto:


def prose(text: str) -> str:
    """Return a document without its fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def links(text: str) -> list[str]:
    """Return the targets of a document's links that do not leave the repository."""
    found = [
        target
        for pattern in (INLINE_LINK, REFERENCE_LINK, HTML_LINK)
        for target in pattern.findall(prose(text))
    ]
    return [target for target in found if not ELSEWHERE.match(target)]


def anchors(text: str) -> set[str]:
    """Return the anchors that a Markdown host makes of a document's headings."""
    made: dict[str, int] = {}
    names = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        count = made.get(slug, 0)
        made[slug] = count + 1
        names.add(f"{slug}-{count}" if count else slug)
    return names


def shell_blocks(text: str) -> list[tuple[set[str], list[str]]]:
    """Return the tags and the commands of each fenced `bash` block."""
    blocks = []
    for match in FENCE.finditer(text):
        language, *tags = match["tags"].split() or [""]
        if language == "bash":
            lines = match["body"].replace("\\\n", "").splitlines()
            commands = [line.strip().removeprefix("$ ") for line in lines]
            blocks.append((set(tags), [line for line in commands if line and line[0] != "#"]))
    return blocks


def commands_to_run() -> list[object]:
    """Return a parameter for each `edge-runtime` line of a `bash` block.

    A block opened with "bash no-run" is left out, one opened with "bash slow" gets that marker.
    """
    parameters = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8") if document.is_file() else ""
        for tags, commands in shell_blocks(text):
            for command in commands:
                if command.startswith("edge-runtime ") and "no-run" not in tags:
                    marks = [pytest.mark.slow] if "slow" in tags else []
                    name = document.relative_to(ROOT)
                    parameter = pytest.param(
                        name, command, marks=marks, id=f"{name.name}: {command}"
                    )
                    parameters.append(parameter)
    return parameters


@pytest.fixture(scope="module")
def playgrounds(tmp_path_factory: pytest.TempPathFactory):
    """Return a function from a document's name to its own copy of the repository's files.

    The commands of one document share the copy, as they would for a reader who types them.
    """
    copies: dict[Path, Path] = {}

    def playground(document: Path) -> Path:
        if document not in copies:
            copies[document] = tmp_path_factory.mktemp(document.stem)
            copy_repository_files(copies[document])
        return copies[document]

    return playground


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document):
    text = document.read_text(encoding="utf-8")
    broken = []
    for link in links(text):
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        found = target.exists() and target.is_relative_to(ROOT)
        if found and anchor:
            found = anchor in anchors(target.read_text(encoding="utf-8"))
        if not found:
            broken.append(link)
    assert not broken


def test_the_readme_names_scripts_that_can_be_run():
    commands = [line for _, block in shell_blocks(README.read_text("utf-8")) for line in block]
    words = {word for command in commands for word in command.split()}
    scripts = {
        word.removeprefix("./") for word in words if re.match(r"(\./)?(scripts|\.ci)/", word)
    }
    assert {"scripts/demo", "scripts/test"} <= scripts
    unusable = [name for name in sorted(scripts) if not os.access(ROOT / name, os.X_OK)]
    assert not unusable


@pytest.mark.parametrize(("document", "command"), commands_to_run())
def test_a_documented_command_runs(document, command, playgrounds):
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=playgrounds(document),
        env=os.environ | {"PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_links_and_anchors_are_found():
    text = '# One `two`, three!\n## Same\n## Same\n[a](b.md#c) ![d](e.png "f")\n[g]: h.md\n'
    text += "```text\n[not](this)\n```\n`[nor](this)` [out](https://example.org)\n"
    assert links(text) == ["b.md#c", "e.png", "h.md"]
    assert anchors(text) == {"one-two-three", "same", "same-1"}


def test_shell_blocks_are_found():
    text = "```bash slow\n# comment\n$ one \\\n  two\n\nthree\n```\n```python\nfour\n```\n"
    assert shell_blocks(text) == [({"slow"}, ["one   two", "three"])]
