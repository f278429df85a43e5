"""Plain ONNX classifiers -> a bundle, without torch.

Every model is fed from the same camera image through a preprocess stage of its own (models that
expect the same share one), and its outputs become logits of the cascade's classes in ONNX.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.cascade import Cascade, Exit, Stage, StageKind
from edge_runtime.errors import ConfigError
from edge_runtime.files import check_target, sha256
from edge_runtime.manifest import Bundle
from edge_runtime.schema import nearest, plain
from edge_runtime.tensors import BATCH, TensorSpec
from engines.bundle import BuiltStage, write_bundle
from engines.classifier import Classifier, read_model, understand
from engines.cut import Piece, cut
from engines.logits import append_logits, as_logits
from engines.onnx_graph import check_exists, extract, opset, rename
from engines.onnx_package import onnx
from engines.preprocess import PreprocessSpec, camera_image, preprocess_stage
from engines.recipe import ModelRecipe, OutputRecipe, Recipe, load_recipe
from engines.verify import TOLERANCE, Report, run_stages, verify

__all__ = ["Recipe", "build", "load_recipe"]

#: Camera image that verification uses where the recipe fixes none; no model's aspect ratio.
_VERIFY_SIZE = (240, 320)


def build(recipe: Recipe, out: Path, overwrite: bool = False) -> Bundle:
    """Make a bundle of a recipe, verified before it is moved in place.

    Args:
        recipe: What `load_recipe` returned.
        out: The bundle's folder.
        overwrite: Whether a bundle at `out` may be replaced.

    Returns:
        The bundle; its provenance has each file's hash, what became of its batch, and the worst
        relative error per stage.

    Raises:
        ConfigError: The recipe does not fit the models.
        EngineBuildError: A file is no valid ONNX, ONNX Runtime refuses it, or a stage differs from
            the original.
        BackendUnavailable: onnx or onnxruntime is missing.
    """
    check_target(out, overwrite=overwrite)
    classes = recipe.class_names
    image = camera_image(recipe.image.channels, recipe.image.size)
    parts = _Parts(image)
    for model in recipe.models:
        parts.add(model, len(classes), first=model is recipe.models[0])
    cascade = Cascade(
        classes, image, tuple(built.stage for built in parts.stages), tuple(parts.exits)
    )
    report = _verify(cascade, parts)
    return write_bundle(
        out,
        name=recipe.name,
        classes=classes,
        image=image,
        stages=parts.stages,
        exits=parts.exits,
        provenance={
            "made_by": "engines.import_onnx",
            "versions": {p: importlib.metadata.version(p) for p in ("onnx", "onnxruntime")},
            "models": parts.provenance,
            "verification": report.provenance(),
        },
        overwrite=overwrite,
    )


@dataclass
class _Original:
    """A model as it was, to compare with.

    Attributes:
        classifier: The model.
        pixels: Name in the cascade of the tensor that it is fed with.
        names: Tensor of the model -> name in the cascade.
        outputs: Exit tensor of the model -> logits in the cascade.
        recipe: What its outputs mean.
    """

    classifier: Classifier
    pixels: str
    names: Mapping[str, str]
    outputs: Mapping[str, str]
    recipe: OutputRecipe

    def reference(self, pixels: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """What the model itself computes, by names of the cascade."""
        found = self.classifier.run(pixels, [*self.names, *self.outputs])
        inner = {name: found[tensor] for tensor, name in self.names.items()}
        logits = {n: as_logits(found[t], self.recipe) for t, n in self.outputs.items()}
        return inner | logits


@dataclass
class _Parts:
    """The cascade in the making."""

    image: TensorSpec
    stages: list[BuiltStage] = field(default_factory=list)
    exits: list[Exit] = field(default_factory=list)
    originals: list[_Original] = field(default_factory=list)
    provenance: list[dict[str, Any]] = field(default_factory=list)
    _pixels: dict[tuple[PreprocessSpec, int], str] = field(default_factory=dict)

    def add(self, recipe: ModelRecipe, classes: int, *, first: bool) -> None:
        """Add one model's stages and exits."""
        where = f"model {recipe.name!r}"
        original = read_model(Path(recipe.file), where)
        outputs = _outputs(original, recipe, where)
        spec = recipe.input.spec(int(self.image.shape[3]))
        asked = [*recipe.cut_at, *outputs]
        check_exists(original, recipe.cut_at, f"{where}: cut_at")
        check_exists(original, outputs, where)
        classifier = understand(original, spec, asked, where)
        for output in outputs:
            _check_width(classifier.specs[output], recipe.output, classes, where)
        pieces = cut(classifier.model, classifier.input, recipe.cut_at, outputs, where)
        pixels = self._preprocess(recipe.name, spec, classifier)
        names = {tensor: f"{recipe.name}/{tensor}" for tensor in recipe.cut_at}
        exits = {t: _exit_name(recipe, t, len(outputs)) for t in outputs}
        logits = {tensor: f"{name}.logits" for tensor, name in exits.items()}
        segment = 0
        for piece in pieces:
            segment += not piece.head
            name = exits[piece.target] if piece.head else recipe.name
            if not piece.head and recipe.cut_at:
                name = f"{recipe.name}.{segment}"
            known = {classifier.input: pixels, **names, **logits}
            self.stages.append(_stage(name, piece, classifier, recipe, known, first, spec))
        self.exits += [Exit(exits[tensor], logits[tensor]) for tensor in outputs]
        self.originals.append(_Original(classifier, pixels, names, logits, recipe.output))
        self.provenance.append(_provenance(recipe, classifier))

    def _preprocess(self, name: str, spec: PreprocessSpec, classifier: Classifier) -> str:
        """The tensor that holds the model's input; adds the stage if no other model has it."""
        version = opset(classifier.model)
        pixels = self._pixels.get((spec, version))
        if pixels is None:
            pixels = self._pixels[spec, version] = f"{name}.pixels"
            stage = preprocess_stage(
                spec,
                self.image,
                name=f"{name}.preprocess",
                output=pixels,
                opset=version,
                ir_version=classifier.model.ir_version,
            )
            self.stages.append(stage)
        return pixels


def _outputs(model: onnx.ModelProto, recipe: ModelRecipe, where: str) -> list[str]:
    """The tensors that are exits, in order."""
    names = [value.name for value in model.graph.output]
    if recipe.output.tensor is not None:
        return [recipe.output.tensor]
    for name in recipe.exits:
        if name not in names:
            raise ConfigError(
                f"{where}: exits: it has no output {name!r}", remedy=nearest(name, names)
            )
    if not recipe.exits and len(names) != 1:
        raise ConfigError(
            f"{where}: outputs",
            got=", ".join(names),
            expected="one",
            remedy="Name the exits in order in exits, or one tensor in output.tensor",
        )
    return list(recipe.exits or names)


def _check_width(spec: TensorSpec, recipe: OutputRecipe, classes: int, where: str) -> None:
    flat = len(spec.shape) == 2 or (len(spec.shape) == 4 and spec.shape[2:] == (1, 1))
    if not flat or spec.dtype != "float32":
        raise ConfigError(
            f"{where}: its output {spec.name!r} holds no scores",
            got=str(spec),
            expected=f"({BATCH}, classes) float32",
        )
    width = spec.sample_shape()[0]
    first, end = recipe.classes or (0, width)
    if end > width or end - first != classes:
        raise ConfigError(
            f"{where}: classes in its output {spec.name!r} of {width}",
            got=f"{end - first} ({first} to {end})",
            expected=f"{classes}, as the recipe has",
            remedy="A background class is dropped with output.classes, such as [1, 1001]",
        )


def _exit_name(recipe: ModelRecipe, tensor: str, count: int) -> str:
    if count == 1:
        return recipe.name
    return f"{recipe.name}." + re.sub(r"[^A-Za-z0-9_-]+", "_", tensor).strip("_")


def _stage(
    name: str,
    piece: Piece,
    classifier: Classifier,
    recipe: ModelRecipe,
    known: Mapping[str, str],
    first: bool,
    pixels: PreprocessSpec,
) -> BuiltStage:
    """Cut a piece out and give it the cascade's names."""
    batch = 1 if classifier.single else BATCH
    specs = dict(classifier.specs)
    whole = pixels.output(classifier.input)
    specs[whole.name] = TensorSpec(whole.name, (batch, *whole.shape[1:]), whole.dtype)
    source, target = specs[piece.source], specs[piece.target]
    model = extract(classifier.model, [source], [target])
    names = {piece.source: known[piece.source], piece.target: known[piece.target]}
    output = TensorSpec(known[piece.target], target.shape, target.dtype)
    if piece.exit:
        names[piece.target] = f"{recipe.name}/{piece.target}"
    model.graph.CopyFrom(rename(model.graph, f"{recipe.name}/", names))
    if piece.exit:
        output = append_logits(model, output.name, target, recipe.output)
    onnx.checker.check_model(model, full_check=True)
    kind: StageKind = "head" if piece.head else "segment"
    if first and not recipe.cut_at:
        kind = "saver"
    read = TensorSpec(known[piece.source], source.shape, source.dtype)
    stage = Stage(name, kind, (read,), (output,))
    return BuiltStage(stage, {_precision(model): model.SerializeToString()})


def _precision(model: onnx.ModelProto) -> str:
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    return "int8" if quantized else "fp32"


def _provenance(recipe: ModelRecipe, classifier: Classifier) -> dict[str, Any]:
    file = Path(recipe.file)
    return {
        **plain(recipe),
        "file": file.name,
        "sha256": sha256(file.read_bytes()),
        "opset": opset(classifier.model),
        "batch": classifier.batch,
    }


def _verify(cascade: Cascade, parts: _Parts) -> Report:
    """Compare the stages with the original files, and with one piece."""
    height, width = (
        length if isinstance(length, int) else default
        for length, default in zip(cascade.image.shape[1:3], _VERIFY_SIZE, strict=True)
    )
    channels = int(cascade.image.shape[3])
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, height, width, channels), dtype=np.uint8)
    models = {built.stage.name: built.default for built in parts.stages}
    chain = run_stages(cascade, models, image)
    reference: dict[str, NDArray[Any]] = {}
    for original in parts.originals:
        reference |= original.reference(chain[original.pixels])
    return verify(cascade, models, image, reference, tolerance=TOLERANCE)
