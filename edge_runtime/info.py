"""Show what is in a bundle: stages, exits, variants and operating points, all hashes checked."""

from __future__ import annotations

import argparse
from typing import Any

from edge_runtime import schema
from edge_runtime.console import Console
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime info``."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder of the bundle")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Check the bundle and print its contents."""
    bundle = Bundle.open(args.bundle)
    points = {name: bundle.operating_point(name) for name in bundle.operating_points()}
    manifest = bundle.manifest
    console.facts(
        {
            "bundle": f"{manifest.name}, {bundle.path}",
            "hash": bundle.hash,
            "image": f"{manifest.image.name} {manifest.image}",
            "classes": _classes(manifest.classes),
            "boundary": manifest.boundary_dtype,
        }
    )
    console.line("\nstages, in order of execution")
    for record in manifest.stages:
        files = ", ".join(f"{p} {a.size / 1e3:.0f} kB" for p, a in record.variants.items())
        reads = ", ".join(f"{spec.name} {spec}" for spec in record.inputs)
        writes = ", ".join(f"{spec.name} {spec}" for spec in record.outputs)
        console.line(f"  {record.name} ({record.kind}; {files})\n    {reads} -> {writes}")
    console.line("\nexits, in order of evaluation")
    for exit_ in manifest.exits:
        console.line(f"  {exit_.name}: logits {exit_.logits}")
    console.line("\noperating points" if points else "\nno operating points yet")
    for name, point in points.items():
        console.line(f"  {name}: {describe(point)}")
    return {
        "path": str(bundle.path),
        "hash": bundle.hash,
        "manifest": schema.plain(manifest),
        "operating_points": {name: schema.plain(point) for name, point in points.items()},
    }


def describe(point: OperatingPoint) -> str:
    """Policy, metric and thresholds of a point, on one line."""
    if point.policy == "never":
        return "no early exit"
    if point.gate is not None:
        gate = point.gate
        return f"gate {gate.file}, weighing {gate.cost}, lambda {gate.trade_off:g}"
    parts = [point.policy.replace("_", " ")]
    if "patien" in point.policy:
        parts.append(f"patience {point.patience}")
    if point.policy != "patience":
        limits = ", ".join(
            f"{name} {'never' if value is None else f'>= {value:.6g}'}"
            for name, value in point.thresholds.items()
        )
        parts.append(f"{point.metric}: {limits or 'no early exit'}")
    return ", ".join(parts)


def _classes(classes: tuple[str, ...]) -> str:
    shown = ", ".join(classes[:10])
    return f"{len(classes)}: {shown}{', ...' if len(classes) > 10 else ''}"
