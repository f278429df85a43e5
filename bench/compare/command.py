"""Two or more results of the bench side by side; the first is what the others are compared with.

Results are files that `edge-runtime bench --json` wrote. Results of another bundle, operating
point, data, method, batch or deadline are refused: what differs then is not the machine. A CSV is
taken for the EEVIT thesis's published platforms: all of them, or one as FILE.csv:NAME.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.compare.comparable import check_comparable, hindrance_table
from bench.compare.ratios import ratio_of_means, ratio_of_runs
from bench.compare.sources import path_of, read_runs
from bench.compare.tables import comparison_tables
from bench.report.table import show
from bench.result import ExitFigures, Result
from edge_runtime.console import Console
from edge_runtime.errors import ConfigError, missing_package
from edge_runtime.schema import plain
from edge_runtime.timing import Ratio


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime compare``."""
    parser.add_argument(
        "results", nargs="+", metavar="RESULT", help="a result (.json), or published figures (.csv)"
    )
    parser.add_argument("--html", metavar="OUT", help="write a page with charts")
    parser.add_argument("--png", metavar="DIR", help="write the charts, one file each")
    parser.add_argument(
        "--anyway", action="store_true", help="show results of different experiments too"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Read results, compare them, show and write what was found.

    Raises:
        ConfigError: Fewer than two results, one twice, results that are not comparable without
            `--anyway`, a bad row of published figures, or a file that can't be written there.
        ManifestError: A result is missing, is not whole, or is of another version.
        BackendUnavailable: A package for charts is missing.
        EdgeRuntimeError: A file can't be written.
    """
    _check_targets(args)
    runs = read_runs(args.results)
    found = check_comparable(runs, anyway=args.anyway)
    results = [one.result for one in runs]
    tables = comparison_tables(results)
    if found:
        tables.insert(0, hindrance_table(found))
    show(tables, console)
    files = []
    if args.html is not None:
        from bench.report.page import write_page

        title = " against ".join(result.name for result in reversed(results))
        title += " (not comparable)" if found else ""
        page = Path(args.html)
        write_page(page, results, tables, title=title, command=_command(args))
        files.append(page)
    if args.png is not None:
        from bench.report.figures import write_pngs

        files += write_pngs(Path(args.png), results)
    for file in files:
        console.note(f"wrote {file}")
    return {
        "results": [result.name for result in results],
        "comparable": not found,
        "hindrances": [str(one) for one in found],
        "ratios": {result.name: _ratios(result, results[0]) for result in results[1:]},
        "tables": plain(tables),
        "files": [str(file) for file in files],
    }


def _check_targets(args: argparse.Namespace) -> None:
    """Refuse files that can't be written, or would replace a result, before the work begins."""
    targets = {"--html": args.html, "--png": args.png, "--json": args.json}
    inputs = {os.path.realpath(path_of(argument)): argument for argument in args.results}
    for option, target in targets.items():
        if target is None or (option == "--json" and target == "-"):
            continue
        path = Path(target)
        if os.path.realpath(path) in inputs:
            raise ConfigError(
                f"{option} {path} would replace the result", remedy="Choose another file"
            )
        if not path.absolute().parent.is_dir():
            raise ConfigError(
                f"{option} {path}: the folder {path.parent} does not exist",
                remedy="Create it first",
            )
    if args.html is not None and Path(args.html).is_dir():
        raise ConfigError(f"--html {args.html}", got="a folder", expected="a file, new or not")
    if args.png is not None and Path(args.png).exists() and not Path(args.png).is_dir():
        raise ConfigError(f"--png {args.png}", got="a file", expected="a folder, new or not")
    if args.html is not None or args.png is not None:
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            raise missing_package("matplotlib", "bench") from error


def _command(args: argparse.Namespace) -> str:
    """The call, with every option that was given."""
    words = ["edge-runtime", "compare", *args.results]
    for name in ("html", "png", "json"):
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name}", str(value)]
    return shlex.join([*words, "--anyway"] if args.anyway else words)


def _ratios(result: Result, first: Result) -> dict[str, Any]:
    """A result's mean latencies over the first's, as JSON."""
    found = ratio_of_runs(result, first)
    whole = found if isinstance(found, Ratio) else {"value": found, "low": None, "high": None}
    pairs = [
        (exit_, other)
        for exit_ in first.exits
        for other in result.exits
        if exit_.name == other.name
    ]
    return {
        "of": first.name,
        "end_to_end": plain(whole),
        "exits": _of_exits(pairs, "latency"),
        "forced": _of_exits(pairs, "forced"),
    }


def _of_exits(
    pairs: Sequence[tuple[ExitFigures, ExitFigures]], field: str
) -> dict[str, float | None]:
    return {
        exit_.name: ratio_of_means(getattr(other, field), getattr(exit_, field))
        for exit_, other in pairs
    }
