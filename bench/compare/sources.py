"""The files of a comparison: results of the bench, and published platforms."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.compare.platforms import read_platforms
from bench.result import Result, read_result
from edge_runtime.errors import ConfigError
from edge_runtime.schema import nearest

_CSV = ".csv"


@dataclass(frozen=True)
class Run:
    """One result of a comparison.

    Attributes:
        file: Where it comes from, as the user wrote it: "orin.json", "platforms.csv:orin".
        result: The result; no other one of the comparison has its name.
    """

    file: str
    result: Result


def read_runs(arguments: Sequence[str]) -> tuple[Run, ...]:
    """Read the results of a comparison.

    Args:
        arguments: Paths of results (JSON), of published platforms (CSV: all of them), or of one
            platform (`PATH.csv:NAME`).

    Returns:
        In the order of the arguments. Where several have one name, the file's name is added.

    Raises:
        ConfigError: Fewer than two results, one of them twice, an unknown platform, or a bad row.
        ManifestError: A file is missing, is not whole, or is no result of this version.
    """
    runs: list[Run] = []
    seen: dict[tuple[str, str], str] = {}
    for argument in arguments:
        for path, platform, run in _read(argument):
            key = (os.path.realpath(path), platform)
            if key in seen:
                raise ConfigError(
                    f"{run.file} is there twice",
                    expected="different results",
                    remedy="Name each result once",
                )
            seen[key] = run.file
            runs.append(run)
    if len(runs) < 2:
        raise ConfigError(
            f"nothing to compare {runs[0].file} with" if runs else "nothing to compare",
            got=f"{len(runs)} result",
            expected="two or more",
            remedy="Write another one with: edge-runtime bench BUNDLE --data DATA --json FILE",
        )
    _refuse_copies(runs)
    return _distinct_names(runs)


def path_of(argument: str) -> Path:
    """The file that an argument names."""
    return _split(argument)[0]


def _read(argument: str) -> Iterator[tuple[Path, str, Run]]:
    path, platform = _split(argument)
    if path.suffix.lower() != _CSV:
        yield path, "", Run(argument, read_result(path))
        return
    platforms = {result.name: result for result in read_platforms(path)}
    if platform and platform not in platforms:
        raise ConfigError(
            f"{path} has no platform {platform!r}", remedy=nearest(platform, platforms)
        )
    for name in [platform] if platform else platforms:
        yield path, name, Run(f"{path}:{name}", platforms[name])


def _split(argument: str) -> tuple[Path, str]:
    """The file and the platform; a file whose own name has a colon is a file."""
    before, colon, platform = argument.rpartition(":")
    if colon and before.lower().endswith(_CSV) and not os.path.lexists(argument):
        if not platform:
            raise ConfigError(f"{argument} names no platform", expected=f"{before}:NAME")
        return Path(before), platform
    return Path(argument), ""


def _refuse_copies(runs: Sequence[Run]) -> None:
    for i, run in enumerate(runs):
        for other in runs[:i]:
            if run.result == other.result:
                raise ConfigError(
                    f"{run.file} and {other.file} hold the same run",
                    remedy="A comparison needs two runs: measure again",
                )


def _distinct_names(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Give results of one name the names of their files, and numbers where that is not enough."""
    named = [(run, run.result.name or Path(run.file).stem) for run in runs]
    often = Counter(name for _, name in named)
    named = [
        (run, f"{name} ({Path(run.file).stem})" if often[name] > 1 else name) for run, name in named
    ]
    often = Counter(name for _, name in named)
    found = []
    for i, (run, name) in enumerate(named, 1):
        distinct = f"{name} #{i}" if often[name] > 1 else name
        found.append(replace(run, result=replace(run.result, name=distinct)))
    return tuple(found)
