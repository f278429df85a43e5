"""The command line: a table of commands, each resolved only when it is called.

A command is a module with two functions: ``configure(parser)`` adds its arguments, and
``run(args, console)`` does the work and returns what ``--json`` writes. Exit codes: 0 ok, 1 the
operation failed, 2 usage or config, 3 missing dependency or hardware, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType
from typing import NamedTuple

from edge_runtime.console import Console
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.schema import nearest

logger = logging.getLogger(__name__)


class Command(NamedTuple):
    """Where a command lives and what it is for."""

    module: str
    help: str


#: Sections of the help, in the order in which people need them.
SECTIONS: dict[str, dict[str, Command]] = {
    "look": {
        "doctor": Command("edge_runtime.doctor", "what is installed here, and what is missing"),
        "info": Command("edge_runtime.info", "what is in a bundle"),
        "lint-qdq": Command("engines.lint_command", "does an INT8 ONNX model suit TensorRT"),
    },
    "make": {
        "export": Command("engines.export_command", "plain ONNX classifiers -> a bundle"),
        "train": Command("engines.train_command", "a backbone with exits and a saver -> a bundle"),
        "quantize": Command("calib.quantize_command", "a bundle, or one ONNX file, in INT8"),
        "convert": Command("engines.convert_command", "a bundle, or one ONNX file, in FP16"),
        "thresholds": Command("calib.thresholds_command", "operating points from labelled data"),
        "gate": Command("calib.quee.command", "exits and precision per sample, learned (QuEE)"),
        "collect": Command("calib.collect_command", "what models say about data, as a table"),
        "search": Command("calib.search_command", "the best cascades in a table of predictions"),
        "certify": Command("calib.certify_command", "a cascade of a table with a guarantee"),
        "savers": Command("calib.savers_command", "the best small model before each large one"),
        "shortlist": Command("calib.shortlist_command", "candidate models from public results"),
        "build": Command("engines.build_command", "TensorRT engines for this device"),
        "precision": Command("calib.precision_command", "which stages run at INT8 or FP16"),
        "engines": Command(
            "edge_runtime.engines_command", "list, check or remove a bundle's TensorRT engines"
        ),
    },
    "measure": {
        "evaluate": Command(
            "edge_runtime.evaluate", "accuracy, exits and latency on labelled data"
        ),
        "verify": Command("engines.verify_command", "this device's engines against ONNX Runtime"),
        "study": Command("bench.study_command", "layers, thresholds or classes, one by one"),
        "bench": Command(
            "bench.latency.command", "latency, exits, energy and baselines, in one run"
        ),
        "compare": Command("bench.compare.command", "two or more results of bench, side by side"),
        "simulate": Command(
            "bench.simulate.command", "operating points on a device that isn't here"
        ),
    },
}
COMMANDS = {name: command for section in SECTIONS.values() for name, command in section.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``edge-runtime COMMAND``.

    Args:
        argv: Arguments without the program's name; `sys.argv` where None.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        sys.stdout.write(f"edge-runtime {_version()}\n")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        sys.stderr.write(f"error: there is no command {name!r}. {nearest(name, COMMANDS)}\n")
        return 2
    module = importlib.import_module(COMMANDS[name].module)
    return run_command(f"edge-runtime {name}", module, arguments[1:])


def run_command(program: str, module: ModuleType, arguments: Sequence[str]) -> int:
    """Run a command's module: parse, work, print, and turn errors into exit codes.

    Args:
        program: How the user called it.
        module: Has `configure(parser)` and `run(args, console)`.
        arguments: What follows the program's name.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(program, description=module.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    try:
        module.configure(parser)
        parser.add_argument("--json", metavar="PATH", help="write the result as JSON; - is stdout")
        parser.add_argument("-v", "--verbose", action="store_true", help="log to stderr")
        args = parser.parse_intermixed_args(arguments)  # KEY=VALUE behind options too
        level = logging.DEBUG if args.verbose else logging.WARNING
        logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
        console = Console(args.json)
        console.check()
        console.finish(module.run(args, console))
    except SystemExit as error:  # argparse, which has printed its message
        return int(error.code or 0)
    except EdgeRuntimeError as error:
        sys.stderr.write(f"error: {error}\n")
        logger.debug("the error's origin", exc_info=True)
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except BrokenPipeError:
        # The reader went away (head, less); Python must not complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _version() -> str:
    try:
        return metadata.version("edge-runtime")
    except metadata.PackageNotFoundError:
        return "(not installed, run from its folder)"


def _help() -> str:
    lines = ["usage: edge-runtime COMMAND [OPTIONS]", ""]
    lines.append("Early-exit vision models on a robot: one bundle, many exits.")
    for section, commands in SECTIONS.items():
        lines += ["", f"{section}:"]
        lines += [f"  {name:<12}{command.help}" for name, command in commands.items()]
    lines += ["", "edge-runtime COMMAND --help shows the options of a command.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
