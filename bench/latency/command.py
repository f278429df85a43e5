"""Latency, throughput and energy of a cascade, with its exits and baselines, in one run.

The cascade, its base model, each exit forced, and the baselines classify every frame in turn; their
ratios hold while the machine's speed drifts, absolute times are for the machine that the result
names. --json writes everything that was measured, for `edge-runtime compare` and `simulate`.
"""

from __future__ import annotations

import argparse
import datetime
import math
import shlex
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.latency import show, summary
from bench.latency.energy import measure_energy, with_energy
from bench.latency.frame_trace import trace_events
from bench.latency.frames import Frames, add_arguments, open_frames
from bench.latency.lineup import BASELINES, Lineup, chosen_point, open_lineup, parse_baselines
from bench.latency.rounds import LEAST_ROUNDS, WARM_UP_ROUNDS
from bench.latency.run import Run
from bench.latency.throughput import check_batches, throughput
from bench.machine.clocks import locked
from bench.machine.environment import condition, stamp, steal_share
from bench.report.table import show as print_tables
from bench.result import Energy, Result, frames_for
from edge_runtime import options
from edge_runtime.console import Console
from edge_runtime.device import cpu_name
from edge_runtime.errors import ConfigError
from edge_runtime.files import write_json
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.power.find import Found, find
from edge_runtime.schema import plain

_DURATION_S, _ENERGY_WINDOW_S = 20.0, 1.5


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime bench``."""
    options.add_bundle(parser)
    options.add_operating_point(parser)
    add_arguments(parser)
    group = parser.add_argument_group("what is measured")
    group.add_argument("--precision", metavar="NAME", help="run every stage that has it at it")
    group.add_argument(
        "--batch",
        metavar="N,...",
        type=_batches,
        default=(),
        help="images per second in batches of these sizes as well",
    )
    group.add_argument(
        "--deadline-ms", type=options.positive, metavar="MS", help="deadline of every frame"
    )
    group.add_argument(
        "--baselines",
        metavar="NAME,...",
        default="all",
        help=f"which to measure: {', '.join(BASELINES)}; all (default) or none",
    )
    group.add_argument(
        "--energy-window",
        type=options.positive,
        default=_ENERGY_WINDOW_S,
        metavar="SECONDS",
        help=f"length of a window of energy (default {_ENERGY_WINDOW_S:g})",
    )
    group = parser.add_argument_group("how long")
    group.add_argument(
        "--duration",
        type=options.positive,
        default=_DURATION_S,
        metavar="SECONDS",
        help=f"measure about this long (default {_DURATION_S:g})",
    )
    group.add_argument(
        "--warmup",
        type=options.count,
        default=WARM_UP_ROUNDS,
        metavar="ROUNDS",
        help=f"rounds before, and 0.2 s at least (default {WARM_UP_ROUNDS})",
    )
    group.add_argument(
        "--percentile",
        type=_percentile,
        metavar="P",
        help="refuse a duration too short to tell it, such as 99.9",
    )
    group = parser.add_argument_group("machine and files")
    group.add_argument("--name", help="what the result calls this machine (default: the board)")
    group.add_argument(
        "--lock-clocks",
        action="store_true",
        help="lock the clocks at their maximum while it runs (root); else they are left alone",
    )
    group.add_argument("--html", type=Path, metavar="PATH", help="write a page to look at")
    group.add_argument(
        "--trace", type=Path, metavar="PATH", help="write single frames for ui.perfetto.dev"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure, print tables, write files."""
    baselines = parse_baselines(args.baselines)
    for option in ("html", "trace"):
        _check_file(f"--{option}", getattr(args, option))
    bundle = Bundle.open(args.bundle)
    point = chosen_point(args, bundle)
    frames = open_frames(args, bundle, console)
    result = _measured(args, bundle, point, frames, baselines, console)
    tables = show.tables(result)
    print_tables(tables, console)
    for sentence in show.sentences(result):
        console.line(sentence)
    console.line(f"bundle {bundle.path}, data {args.data or 'none'}, operating point {point.name}")
    if args.trace:
        write_json(args.trace, trace_events(result))
        console.note(f"wrote {args.trace}: open it in https://ui.perfetto.dev")
    if args.html:
        from bench.report.page import write_page

        title = f"{result.bundle_name} on {result.name}"
        write_page(args.html, [result], tables, title=title, command=result.command)
        console.note(f"wrote {args.html}")
    found: dict[str, Any] = plain(result)
    return found


def _measured(
    args: argparse.Namespace,
    bundle: Bundle,
    point: OperatingPoint,
    frames: Frames,
    baselines: tuple[str, ...],
    console: Console,
) -> Result:
    """Open everything, measure it, and put the result together."""
    found = find(gpu=(args.device or 0) if args.backend == "tensorrt" else None)
    with ExitStack() as stack:
        clocks_locked = stack.enter_context(locked(args.lock_clocks, console, gpu=args.device or 0))
        facts = stamp()
        lineup = open_lineup(args, bundle, frames, point, baselines, stack)
        check_batches(args.batch, lineup.cascade)
        run_ = Run(bundle, frames, lineup, seed=args.seed)
        _check_duration(args, run_.warm_up(args.warmup, console))
        before = condition()
        rounds = run_.measure(args.duration, console)
        after = condition()
        result = run_.result(rounds, console)
        batches = [
            throughput(lineup.cascade, lineup.base, frames, batch, args.duration / 4, console)
            for batch in args.batch
        ]
        energy = _energy(found, lineup, frames, args.energy_window, console)
        steps = {
            step.exit.name: [stage.name for stage in step.stages]
            for step in lineup.cascade.plan.steps
        }
    result = replace(
        result,
        name=args.name or facts.get("board") or cpu_name(),
        command=_command_line(),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        environment={
            "stamp": facts,
            "before": before,
            "after": after,
            "threads": args.threads or 0,
            "clocks_locked_by_us": clocks_locked,
        },
        throughput=tuple(batches),
        no_energy="" if found.sources else _reasons(found),
        unstable=summary.instability(
            result.subjects, result.enqueue_share, steal_share(before, after)
        ),
    )
    return with_energy(result, energy, steps)


def _energy(
    found: Found, lineup: Lineup, frames: Frames, seconds: float, console: Console
) -> tuple[Energy, ...]:
    """Energy of the cascade, its base and its forced exits, by every source there is."""
    if not found.sources:
        return ()
    alone = [
        one
        for one in lineup.subjects
        if one.name in ("cascade", "base")
        or one.name in {f"exit {name} always" for name in lineup.cascade.exits}
    ]
    with ExitStack() as stack:
        sources = [stack.enter_context(source) for source in found.sources]
        return measure_energy(alone, frames, sources, seconds, console)


def _reasons(found: Found) -> str:
    return "; ".join(f"{name}: {why}" for name, why in found.missing.items()) or "no reader"


def _check_duration(args: argparse.Namespace, per_round: float) -> None:
    """Refuse a duration in which the asked percentile can't be told.

    Raises:
        ConfigError: It says how many frames would be missing.
    """
    if args.percentile is None:
        return
    needed = frames_for(args.percentile / 100)
    rounds = max(LEAST_ROUNDS, int(args.duration / per_round))
    if rounds < needed:
        raise ConfigError(
            f"--percentile {args.percentile:g} in --duration {args.duration:g}",
            got=f"about {rounds} frames at {per_round * 1e3:.3g} ms per round of all subjects",
            expected=f"{needed}, so {needed - rounds} frames are missing",
            remedy=f"Give --duration {math.ceil(1.1 * needed * per_round)}, or fewer --baselines",
        )


def _command_line() -> str:
    return shlex.join(["edge-runtime", "bench", *sys.argv[2:]])


def _check_file(option: str, path: Path | None) -> None:
    """Refuse a file that can't be written, before anything long begins."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConfigError(f"{option} {path}", expected="a file in a folder that exists")


def _batches(text: str) -> tuple[int, ...]:
    """The type of `--batch`: one size or several; 1 is what is measured anyway."""
    sizes = [options.count(part) for part in text.split(",")]
    return tuple(dict.fromkeys(size for size in sizes if size > 1))


def _percentile(text: str) -> float:
    """The type of `--percentile`: a number between 0 and 100."""
    value = options.positive(text)
    if value >= 100:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number below 100")
    return value
