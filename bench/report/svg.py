"""A picture as SVG that stands inside a page among others."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

from bench.report.figures import Chart, without_glyph_warnings

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_HREF = f"{{{_XLINK}}}href"
_POINTS_AT = re.compile(r"url\(#([^)]+)\)")
_FAMILY = re.compile(r"font-family:[^;]*;?\s*")
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def inline_svg(chart: Chart) -> str:
    """A chart as an `svg` element: text stays text, ids are its own, the same input the same bytes.

    Args:
        chart: Its caption is what a reader hears who does not see it.

    Returns:
        The element without a prolog, metadata, or an id that nothing points at.
    """
    from matplotlib import rc_context

    written = io.BytesIO()
    with (
        rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.name}),
        without_glyph_warnings(),
    ):
        chart.figure.savefig(written, format="svg", metadata=_NO_METADATA)
    root = ElementTree.fromstring(written.getvalue())
    _drop(root, f"{{{_SVG}}}metadata", f"{{{_SVG}}}style")
    for words in root.iter(f"{{{_SVG}}}text"):
        # The page says in which letters; matplotlib's list would be repeated for every word.
        words.set("style", _FAMILY.sub("", words.get("style", "")))
    _own_ids(root, f"{chart.name}-")
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", f"{chart.title}. {chart.caption}")
    # What a chart is as large as on paper, so that letters on a wide screen don't grow without end.
    root.set("style", f"--inches: {chart.figure.get_figwidth():.2f}")
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def _drop(root: ElementTree.Element, *tags: str) -> None:
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in tags]:
            parent.remove(child)


def _own_ids(root: ElementTree.Element, prefix: str) -> None:
    """Give what is pointed at a name that no other picture uses; other names go."""
    used = set()
    for one in root.iter():
        for key, value in list(one.attrib.items()):
            if key == _HREF:
                used.add(value.removeprefix("#"))
                one.set(key, f"#{prefix}{value.removeprefix('#')}")
            elif key != "id" and "url(#" in value:
                used.update(_POINTS_AT.findall(value))
                one.set(key, _POINTS_AT.sub(rf"url(#{prefix}\1)", value))
    for one in root.iter():
        name = one.attrib.pop("id", None)
        if name in used:
            one.set("id", f"{prefix}{name}")
