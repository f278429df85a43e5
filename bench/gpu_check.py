"""Check edge-runtime on an NVIDIA GPU or a Jetson: results, waits, times, memory, in 9 minutes.

Needs a driver and cuda-core or pycuda; what needs more (torch, TensorRT, the repository's tests) is
left out where that is missing, and the table says why. Nothing on the machine is changed: clocks
and power are what they are. The result is a JSON file with a stamp of the environment.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from bench.gpu import endurance, engines, environment, results, tensorrt, timing, torch
from bench.gpu.lab import Lab, NotRun, SharedCuda
from edge_runtime import options
from edge_runtime.backends.cuda import probe
from edge_runtime.backends.cuda.backend import Package, open_cuda
from edge_runtime.backends.cuda.base import Cuda
from edge_runtime.cli import run_command
from edge_runtime.console import Console
from edge_runtime.errors import BackendUnavailable, ConfigError, EdgeRuntimeError
from edge_runtime.files import write_json
from edge_runtime.schema import nearest, plain

#: Version of the result file's format.
SCHEMA_VERSION = 1

#: Seconds for all checks together, and the part of it that --quick takes.
_TOTAL_S, _QUICK = 500.0, 0.15

#: What a check may raise without ending the others: errors of ours, and whatever torch, TensorRT
#: and CUDA packages raise. Not KeyboardInterrupt, nor SystemExit.
_CRASHES = (
    EdgeRuntimeError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Check(NamedTuple):
    """A check: what it does with a lab, and how many seconds it may take."""

    function: Callable[[Lab], dict[str, Any]]
    seconds: float


#: In this order: what the others rest on first, then what nobody has run before.
CHECKS: dict[str, Check] = {
    "environment": Check(environment.environment, 5),
    "probe": Check(results.modes, 5),
    "waits": Check(results.waits, 5),
    "errors": Check(results.refusals, 5),
    "identical": Check(results.identical, 50),
    "switch": Check(results.switch, 10),
    "second_thread": Check(results.second_thread, 10),
    "launch": Check(timing.launch, 10),
    "conditional_node": Check(timing.conditional_node, 20),
    "depth": Check(timing.depth, 50),
    "cost_per_exit": Check(timing.cost_per_exit, 40),
    "overlap": Check(timing.overlap, 15),
    "endurance": Check(endurance.endurance, 45),
    "tensorrt": Check(tensorrt.check, 25),
    "engines": Check(engines.check, 100),
    "models": Check(torch.models, 60),
    "contract": Check(endurance.contract, 40),
}


class ChecksFailed(EdgeRuntimeError):
    """Some checks found what should not be."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``python -m bench.gpu_check``."""
    parser.add_argument(
        "--quick", action="store_true", help="smaller counts, about a minute: a first look"
    )
    parser.add_argument("--device", type=options.whole, default=0, help="index of the GPU")
    parser.add_argument(
        "--package",
        choices=get_args(Package),
        default="any",
        help="what reaches the driver (default: cuda-core where it is installed, else pycuda)",
    )
    parser.add_argument(
        "--mode",
        nargs="+",
        choices=list(probe.MODES),
        default=[],
        help="execution modes to check (default: all that work here)",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the result (default: gpu_check-<device>-<date>.json in bench/results, where that "
        "exists, else here)",
    )
    parser.add_argument("--only", nargs="+", metavar="CHECK", help=f"some of: {', '.join(CHECKS)}")


def run(
    args: argparse.Namespace,
    console: Console,
    *,
    make: Callable[[], Cuda] | None = None,
    checks: Mapping[str, Check] | None = None,
    scale: float | None = None,
    patience: float | None = None,
) -> dict[str, Any]:
    """Run the checks one after another, write what they find, print a table.

    Args:
        args: As `configure` describes them.
        console: Where to print.
        make: Makes the device, not opened, where it is not to be found by `args.package`.
        checks: Other checks than `CHECKS`.
        scale: Size of all counts; by --quick where None.
        patience: Size of all budgets of time; as `scale` where None.

    Returns:
        What was written to the file.

    Raises:
        BackendUnavailable: There is no package, driver or device.
        ChecksFailed: A check is not ok; everything is written all the same.
    """
    chosen = _chosen(checks or CHECKS, args.only)
    out = None if args.out is None else _checked(Path(args.out))
    make = make or functools.partial(open_cuda, args.package, args.device)
    size = scale if scale is not None else _QUICK if args.quick else 1.0
    times = size if patience is None else patience
    cuda = SharedCuda(make())
    lab = Lab(
        cuda.open(),
        make,
        device=args.device,
        package=args.package,
        scale=size,
        only=args.mode,
    )
    _require(args.mode, lab)
    result = _Result(out or _default_path(cuda.facts.name), lab, args.quick)
    console.note(f"{cuda.facts.name}: {len(chosen)} checks, at most {_TOTAL_S * times:.0f} s")
    interrupted = None
    try:
        _run_all(chosen, lab, times, result, console)
    except KeyboardInterrupt as error:
        interrupted = error
    result.finish(chosen, lab)
    _close(cuda, result)
    result.write()
    _show(result.data["checks"], console)
    console.note(f"wrote {result.path}")
    failed = [name for name, found in result.data["checks"].items() if found["ok"] is False]
    if interrupted is not None or failed:
        # `run_command` writes the JSON of what returns only.
        console.finish(result.data)
    if interrupted is not None:
        raise interrupted
    if failed:
        raise ChecksFailed(f"not ok: {', '.join(failed)}", remedy=f"See {result.path}")
    return result.data


def _require(modes: Sequence[str], lab: Lab) -> None:
    """Refuse modes that were asked for and don't work here."""
    for mode in modes:
        if lab.reasons[mode]:
            raise BackendUnavailable(f"the mode {mode!r} is not available: {lab.reasons[mode]}")


def _chosen(checks: Mapping[str, Check], only: Sequence[str] | None) -> dict[str, Check]:
    for name in only or ():
        if name not in checks:
            raise ConfigError(f"there is no check {name!r}", remedy=nearest(name, checks))
    return {name: check for name, check in checks.items() if not only or name in only}


def _checked(path: Path) -> Path:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"--out {path}: not a file in a folder that exists")
    return path


def _default_path(device: str) -> Path:
    """A file that does not exist yet."""
    results = Path("bench") / "results"
    folder = results if results.is_dir() else Path()
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "gpu"
    stem = f"gpu_check-{slug}-{datetime.now(timezone.utc):%Y-%m-%d}"
    path, number = folder / f"{stem}.json", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.json", number + 1
    return path


class _Result:
    """The result, written anew after every check, so that a crash leaves what was found."""

    def __init__(self, path: Path, lab: Lab, quick: bool) -> None:
        self.path = path
        self._begin = time.monotonic()
        self.data: dict[str, Any] = {
            "what": "python -m bench.gpu_check",
            "schema_version": SCHEMA_VERSION,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "quick": quick,
            "scale": lab.scale,
            "complete": False,
            "environment": clean(_guarded(functools.partial(environment.environment, lab))),
            "checks": {},
        }

    def add(self, name: str, found: dict[str, Any]) -> None:
        """Take in what a check found."""
        self.data["checks"][name] = clean(found)
        self.write()

    def finish(self, chosen: Mapping[str, Check], lab: Lab) -> None:
        """Say of the checks that are left that they were interrupted."""
        left = [name for name in chosen if name not in self.data["checks"]]
        for name in left:
            self.data["checks"][name] = _not_run("interrupted")
        self.data["complete"] = not left
        state = _guarded(functools.partial(environment.gpu_state, lab))
        self.data["state_at_the_end"] = clean(state)
        self.data["seconds"] = round(time.monotonic() - self._begin, 1)

    def write(self) -> None:
        """Write the file."""
        write_json(self.path, clean(self.data))


def _run_all(
    chosen: Mapping[str, Check], lab: Lab, patience: float, result: _Result, console: Console
) -> None:
    end = time.monotonic() + _TOTAL_S * patience
    for number, (name, check) in enumerate(chosen.items(), 1):
        console.note(f"[{number}/{len(chosen)}] {name} ...")
        begin = time.monotonic()
        seconds = min(check.seconds * patience, end - begin)
        if seconds <= 0:
            found = _not_run("the time for all checks was up")
        else:
            lab.begin(seconds)
            found = _guarded(functools.partial(check.function, lab))
        found["seconds"] = round(time.monotonic() - begin, 1)
        result.add(name, found)
        console.note(f"    {found['seconds']:.1f} s, {verdict(found)}: {_figures(found)}")


def _guarded(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call a check; what it raises becomes what it found."""
    try:
        return function()
    except NotRun as error:
        return _not_run(str(error))
    except BackendUnavailable as error:
        return _not_run(str(error))
    except _CRASHES as error:
        line = (str(error).strip().splitlines() or [""])[0]
        frames = traceback.extract_tb(error.__traceback__)
        return {
            "ok": False,
            "summary": f"{type(error).__name__}: {line}",
            "error": str(error),
            # File names without the folders of the machine.
            "where": [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames],
        }


def _not_run(why: str) -> dict[str, Any]:
    return {"ok": None, "summary": f"not run: {why}"}


def verdict(found: Mapping[str, Any]) -> str:
    """What the table says of a check."""
    return {True: "ok", False: "NOT OK", None: "not run"}[found["ok"]]


def _close(cuda: SharedCuda, result: _Result) -> None:
    """Close the device; one that was lost can't be."""
    found = _guarded(lambda: {"ok": True, "summary": "", "made": _closed(cuda)})
    if not found["ok"]:
        result.data["closing"] = found


def _closed(cuda: SharedCuda) -> dict[str, int]:
    cuda.close_device()
    return dict(cuda.made)


def _show(checks: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print the table, or plain lines where rich is not installed."""
    rows = [
        (f"{name}: {_figures(found)}", verdict(found), f"{found.get('seconds', 0):.1f}")
        for name, found in checks.items()
    ]
    try:
        console.table("edge-runtime on this GPU", ("check: figures", "verdict", "seconds"), rows)
    except BackendUnavailable:
        for figures, said, _ in rows:
            console.line(f"{said:<8} {figures}")


def _figures(found: Mapping[str, Any]) -> str:
    """What a check says in a line."""
    return str(found["summary"]).removeprefix("not run: ")


def clean(value: object) -> Any:
    """The value as JSON can hold it: numpy's scalars as numbers, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [clean(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return clean(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    made = plain(value)
    return str(value) if made is value else clean(made)


if __name__ == "__main__":
    sys.exit(run_command("python -m bench.gpu_check", sys.modules[__name__], sys.argv[1:]))
