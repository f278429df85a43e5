"""Check where the Q/DQ nodes of an INT8 ONNX model stand, against TensorRT's rules.

Any model can be checked, whoever quantised it. For each rule that is violated: what to do about
it, and the nodes with what was found. Exit code 0: nothing is violated, 1: something is, 2: the
file is no ONNX model.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from edge_runtime.console import Console
from edge_runtime.errors import EdgeRuntimeError

#: Rows of a rule that are shown; the JSON has all of them.
_SHOWN = 5
#: Characters of a node's name that are shown: its beginning and its end.
_NAME = 60


class RulesViolated(EdgeRuntimeError):
    """The model does not keep TensorRT's rules."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime lint-qdq``."""
    parser.add_argument("file", metavar="FILE", type=Path, help="an ONNX model")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Check the model and show what it violates.

    Raises:
        ConfigError: The file is no ONNX model.
        RulesViolated: The model violates a rule; the JSON is written all the same.
    """
    from engines.qdq_lint import lint, quantized_nodes, read

    model = read(args.file)
    violations = lint(model)
    nodes = quantized_nodes(model)
    result = {"file": str(args.file), "quantized_nodes": nodes, "violations": violations}
    if not violations:
        said = f"{nodes} quantised nodes, no rule is violated" if nodes else "nothing is quantised"
        console.line(f"{args.file}: {said}")
        return result
    counts = Counter(violation.rule for violation in violations)
    for rule, count in counts.items():
        of_rule = [violation for violation in violations if violation.rule == rule]
        console.line(f"{rule} ({count})  {of_rule[0].remedy}")
        for violation in of_rule[:_SHOWN]:
            console.line(f"    {_short(violation.node)}: {violation.why}")
        if count > _SHOWN:
            console.line(f"    and {count - _SHOWN} more")
    console.finish(result)
    listed = ", ".join(f"{rule} ({count})" for rule, count in counts.items())
    raise RulesViolated(f"{args.file} violates rules for INT8: {listed}")


def _short(name: str) -> str:
    """A name without its middle, where it is long."""
    half = _NAME // 2 - 1
    return name if len(name) <= _NAME else f"{name[:half]}..{name[-half:]}"
