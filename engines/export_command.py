"""Make a bundle of plain ONNX classifiers that a YAML file lists.

Each model gets its preprocessing as a stage of its own, all are fed from the same camera image, and
every stage is compared with the original file before the bundle is moved in place. torch is not
needed. examples/imagenet_mobilenets/cascade.yaml shows all there is to write.

Models in torch are exported from Python, with engines.export.export_stages: a YAML file that named
Python code to run would be code itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edge_runtime.console import Console
from edge_runtime.manifest import Bundle


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path, help="the models")
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        default=[],
        help="replaces a value of the file, such as models.0.input.crop=1.0",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="folder of the bundle to write"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a bundle that is already there"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Make the bundle and show its stages."""
    from engines.import_onnx import build
    from engines.recipe import load_recipe

    recipe = load_recipe(args.config, args.overrides)
    console.note(f"reading and verifying {len(recipe.models)} model(s) ...")
    bundle = build(recipe, args.out, overwrite=args.force)
    result = describe(bundle)
    _show(result, console)
    return result


def describe(bundle: Bundle) -> dict[str, Any]:
    """What `--json` writes: the bundle, its stages, and what verification found."""
    verification = bundle.manifest.provenance["verification"]
    return {
        "bundle": str(bundle.path),
        "hash": bundle.hash,
        "exits": [exit_.name for exit_ in bundle.cascade.exits],
        "verification": verification,
        "stages": [
            {
                "name": record.name,
                "kind": record.kind,
                "inputs": {spec.name: str(spec) for spec in record.inputs},
                "outputs": {spec.name: str(spec) for spec in record.outputs},
                "bytes": {name: artifact.size for name, artifact in record.variants.items()},
                "worst_relative_error": verification["worst_relative_error"].get(record.name),
            }
            for record in bundle.manifest.stages
        ],
    }


def _show(result: dict[str, Any], console: Console) -> None:
    rows = []
    for stage in result["stages"]:
        error = stage["worst_relative_error"]
        rows.append(
            (
                stage["name"],
                ", ".join(stage["bytes"]),
                " + ".join(stage["outputs"].values()),
                f"{max(stage['bytes'].values()) / 1e6:.3f}",
                "-" if error is None else f"{error:.1e}",
            )
        )
    console.table(
        "Stages, in order of execution",
        ("stage", "variants", "writes", "MB", "worst error"),
        rows,
    )
    console.line(f"exits   {', '.join(result['exits'])}")
    console.line(f"bundle  {result['bundle']}")
    console.line(f"hash    {result['hash']}")
