"""A report as one file for a browser: no network, no script, nothing beside it.

```
write_page(Path("orin.html"), [result], tables, title="Orin NX", command="edge-runtime bench ...")
```

Results come from files that anybody may have written, so every word of theirs is escaped, and the
page forbids itself to load anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from bench.report.figures import Chart, charts
from bench.report.page_style import STYLE
from bench.report.palette import result_colour
from bench.report.svg import inline_svg
from bench.report.table import Table
from bench.report.words import UNKNOWN, clean, milliseconds, number, percent
from bench.result import Result
from edge_runtime.files import write_bytes

#: Only the page's own style and pictures inside the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
#: Inches from which a chart gets the width of the page.
_WIDE = 6.5


def write_page(
    path: Path, results: Sequence[Result], tables: Sequence[Table], *, title: str, command: str
) -> None:
    """Write a report so that a reader sees the old file or the new one.

    Args:
        path: The file, .html.
        results: One or more; several are drawn together.
        tables: Shown under the charts.
        title: Of the page.
        command: The exact command line that made the page.

    Raises:
        BackendUnavailable: matplotlib is not installed.
        EdgeRuntimeError: The file can't be written.
    """
    write_bytes(path, page(results, tables, title=title, command=command).encode())


def page(results: Sequence[Result], tables: Sequence[Table], *, title: str, command: str) -> str:
    """A whole HTML document; the same results give the same bytes.

    Args:
        results: One or more; several are drawn together.
        tables: Shown under the charts.
        title: Of the page.
        command: The exact command line that made the page.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_safe(title)}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        *_header(results, title),
        "<main>",
        *_warnings(results),
        *_summary(results),
        *_charts(charts(results)),
        *_tables(tables),
        *_remarks(results),
        *_origin(results),
        *_environment(results),
        *_commands(results),
        "</main>",
        f"<footer><p>This page was made by:</p><pre><code>{_safe(command)}</code></pre></footer>",
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _safe(words: str) -> str:
    """Text from anywhere as HTML."""
    return escape(clean(words))


def _header(results: Sequence[Result], title: str) -> Iterable[str]:
    if len(results) == 1:
        (result,) = results
        point = result.operating_point
        words = [
            result.bundle_name or "a cascade",
            f" at {point.name}" if point is not None else "",
            f" on {result.name}",
            f", {result.backend}" if result.backend else "",
            f" ({result.mode})" if result.mode else "",
            f", {result.end_to_end.count:,} frames, {result.created[:16].replace('T', ' ')}",
        ]
        if result.kind == "reference":
            words.append(". Published figures, not measured here")
        lead = "".join(words) + "."
    else:
        lead = f"{len(results)} results together, each in its own colour throughout the page."
    return ("<header>", f"<h1>{_safe(title)}</h1>", f"<p>{_safe(lead)}</p>", "</header>")


def _warnings(results: Sequence[Result]) -> Iterable[str]:
    for result in results:
        if result.unstable:
            words = "This run was not stable: trust its ratios more than its times"
            yield '<div class="warn" role="note">'
            yield f"<p><strong>{_safe(_whose(results, result))}{words}:</strong></p>"
            yield _list(result.unstable)
            yield "</div>"


def _whose(results: Sequence[Result], result: Result) -> str:
    return f"{result.name}: " if len(results) > 1 else ""


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_safe(item)}</li>" for item in items) + "</ul>"


def _summary(results: Sequence[Result]) -> Iterable[str]:
    if len(results) == 1:
        facts = _facts(results[0])
        items = (
            f"<div><dt>{_safe(words)}</dt><dd>{_safe(value)}</dd></div>" for value, words in facts
        )
        return ('<dl class="facts">', *items, "</dl>")
    items = (
        f'<li><span class="swatch" style="background:{result_colour(i)}"></span>'
        f"<p><strong>{_safe(result.name)}</strong>: {_safe(_sentence(result))}</p></li>"
        for i, result in enumerate(results)
    )
    return ('<ul class="results">', *items, "</ul>")


def _facts(result: Result) -> list[tuple[str, str]]:
    """The figures that a reader looks for first, with what they are."""
    times = result.end_to_end
    known = (("median", times.p50), ("99th percentile", times.p99))
    tail = ", ".join(f"{name} {milliseconds(value)}" for name, value in known if value is not None)
    facts = [(milliseconds(times.mean), f"mean latency of a frame{tail and '; '}{tail}")]
    base = result.subject("base")
    ratio = base.over_cascade if base is not None else None
    if ratio is not None:
        between = f"{number(ratio.low)} to {number(ratio.high)}"
        words = f"as long for the base model; 95\u00a0% interval {between}"
        facts.append((f"{number(ratio.value)} times", words))
    if result.accuracy is not None:
        beside = result.base_accuracy
        of_base = f"; of the base model {percent(beside)}" if beside is not None else ""
        facts.append((percent(result.accuracy), f"of the answers are right{of_base}"))
    if len(result.exits) > 1:
        facts.append((percent(_early(result), 0), "of the frames leave before the last exit"))
    return facts


def _early(result: Result) -> float:
    return sum(one.share for one in result.exits[:-1])


def _sentence(result: Result) -> str:
    times = result.end_to_end
    p99 = f" (99th percentile {milliseconds(times.p99)})" if times.p99 is not None else ""
    parts = [f"{milliseconds(times.mean)} per frame on average{p99}"]
    base = result.subject("base")
    if base is not None and base.over_cascade is not None:
        ratio = base.over_cascade
        between = f"[{number(ratio.low)}, {number(ratio.high)}]"
        parts.append(f"the base model takes {number(ratio.value)} {between} times as long")
    if result.accuracy is not None:
        beside = result.base_accuracy
        of_base = f" (base {percent(beside)})" if beside is not None else ""
        parts.append(f"{percent(result.accuracy)} right{of_base}")
    if len(result.exits) > 1:
        parts.append(f"{percent(_early(result), 0)} leave before the last exit")
    if result.kind == "reference":
        parts.append("published figures, not measured here")
    if result.unstable:
        parts.append("not stable")
    return "; ".join(parts) + "."


def _charts(drawn: Sequence[Chart]) -> Iterable[str]:
    if not drawn:
        return
    yield '<h2>Charts</h2><div class="charts">'
    for chart in drawn:
        wide = ' class="card wide"' if chart.figure.get_figwidth() > _WIDE else ' class="card"'
        scrolls = f' tabindex="0" role="group" aria-label="{_safe(chart.title)}"'
        yield f'<figure{wide} id="{chart.name}"><h3>{_safe(chart.title)}</h3>'
        yield f'<div class="paper"{scrolls}>{inline_svg(chart)}</div>'
        yield f"<figcaption>{_safe(chart.caption)}</figcaption></figure>"
    yield "</div>"


def _tables(tables: Sequence[Table]) -> Iterable[str]:
    if not tables:
        return
    yield '<h2>Tables</h2><div class="tables">'
    for table in tables:
        yield f'<section class="card"><h3>{_safe(table.title)}</h3>'
        yield from _table(table.title, table.columns, table.rows)
        yield from (f'<p class="note">{_safe(note)}</p>' for note in table.notes)
        yield "</section>"
    yield "</div>"


def _table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = ""
) -> Iterable[str]:
    yield f'<div class="scroll" tabindex="0" role="group" aria-label="{_safe(title)}">'
    heads = "".join(f'<th scope="col">{_safe(name)}</th>' for name in columns)
    yield f"<table{kind}>"
    if heads:
        yield f"<thead><tr>{heads}</tr></thead>"
    yield "<tbody>"
    for first, *others in rows:
        cells = "".join(f"<td>{_safe(cell)}</td>" for cell in others)
        yield f'<tr><th scope="row">{_safe(first)}</th>{cells}</tr>'
    yield "</tbody></table></div>"


def _remarks(results: Sequence[Result]) -> Iterable[str]:
    missing, notes = [], []
    for result in results:
        whose = _whose(results, result)
        missing += [f"{whose}{name}: {why}" for name, why in result.not_measured.items()]
        if result.no_energy:
            missing.append(f"{whose}energy: {result.no_energy}")
        notes += [f"{whose}{one.reader}: {one.problem}" for one in result.energy if one.problem]
        notes += [f"{whose}{note}" for note in result.notes]
    for title, items in (("Not measured", missing), ("Notes", notes)):
        if items:
            yield f"<h2>{title}</h2>"
            yield _list(items)


def _origin(results: Sequence[Result]) -> Iterable[str]:
    return _side_by_side("How it was measured", results, [_origin_of(one) for one in results])


def _origin_of(result: Result) -> dict[str, str]:
    point = result.operating_point
    thresholds = point.thresholds if point is not None else {}
    seconds = f"{number(result.measured_s)} s after {number(result.warm_up_s)} s of warm-up"
    return {
        "kind": "measured" if result.kind == "bench" else "published elsewhere",
        "created": result.created,
        "method": result.method,
        "frames": f"{result.end_to_end.count:,}",
        "time": seconds if result.measured_s else UNKNOWN,
        "bundle": result.bundle_name,
        "bundle hash": result.bundle,
        "data hash": result.data or UNKNOWN,
        "images": f"{result.images:,}" if result.images else UNKNOWN,
        "operating point": f"{point.name}: {point.policy}, {point.metric}" if point else UNKNOWN,
        "thresholds": _pairs(thresholds) or UNKNOWN,
        "precisions": _pairs({one.name: one.precision for one in result.stages}) or UNKNOWN,
        "stages left out": ", ".join(result.pruned) or "none",
        "backend": ", ".join(filter(None, (result.backend, result.mode))) or UNKNOWN,
    }


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {'off' if v is None else v}" for name, v in values.items())


def _environment(results: Sequence[Result]) -> Iterable[str]:
    from bench.machine.environment import rows

    told = [dict(rows(one.environment)) if one.environment else {} for one in results]
    return _side_by_side("Environment", results, told) if any(told) else ()


def _side_by_side(
    title: str, results: Sequence[Result], facts: Sequence[Mapping[str, str]]
) -> Iterable[str]:
    """Facts by name, a column per result."""
    names = dict.fromkeys(name for one in facts for name in one)
    kind = ' class="words one"' if len(results) == 1 else ' class="words"'
    rows = [(name, *(one.get(name, UNKNOWN) for one in facts)) for name in names]
    columns = ("", *(one.name for one in results)) if len(results) > 1 else ()
    return (
        f'<h2>{title}</h2><div class="card">',
        *_table(title, columns, rows, kind),
        "</div>",
    )


def _commands(results: Sequence[Result]) -> Iterable[str]:
    yield "<h2>Measured by</h2>"
    for result in results:
        if len(results) > 1:
            yield f"<h3>{_safe(result.name)}</h3>"
        yield f"<pre><code>{_safe(result.command)}</code></pre>"
