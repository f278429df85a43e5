"""The YAML that makes a cascade of plain ONNX classifiers, as frozen dataclasses.

name: two-models
classes: 1000                 # a number, a list of names, or {file: labels.txt}
image: {channels: 3}          # the camera image; size: [height, width] fixes it
models:
  - name: small
    file: small.onnx          # relative to this file
    input: {size: [128, 128], layout: NCHW, range: [-1, 1], crop: 0.875}
    output: {kind: probabilities, classes: [1, 1001]}
  - name: large
    file: large.onnx
    input: {size: [224, 224], mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
    cut_at: [block3/output]   # optional: run it in segments
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from edge_runtime import config
from edge_runtime.errors import ConfigError
from engines.preprocess import Layout, PreprocessSpec

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class LabelsFile:
    """Class names in a text file.

    Attributes:
        file: Path, relative to the YAML file; one name per line, in the order of the logits.
    """

    file: str


@dataclass(frozen=True)
class ImageRecipe:
    """The camera image that all models are fed from.

    Attributes:
        channels: 1 or 3.
        size: Height and width; None leaves them open until the bundle is opened.
    """

    channels: int = 3
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class InputRecipe:
    """What a model expects of its input; see `PreprocessSpec`."""

    size: tuple[int, int]
    layout: Layout = "NCHW"
    crop: float = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    range: tuple[float, float] | None = None
    antialias: bool = False

    def spec(self, channels: int) -> PreprocessSpec:
        """The same with the camera's channels.

        Raises:
            ConfigError: The values can't be.
        """
        return PreprocessSpec(
            size=self.size,
            channels=channels,
            layout=self.layout,
            crop=self.crop,
            mean=self.mean,
            std=self.std,
            range=self.range,
            antialias=self.antialias,
        )


@dataclass(frozen=True)
class OutputRecipe:
    """What a model's outputs mean.

    Attributes:
        kind: "logits", or "probabilities", which become logits by their logarithm.
        classes: First and last + 1 of the outputs that are classes; [1, 1001] drops a background
            class in front. None takes all.
        tensor: A tensor of the graph to take instead of its output, such as the one before the
            softmax.
    """

    kind: Literal["logits", "probabilities"] = "logits"
    classes: tuple[int, int] | None = None
    tensor: str | None = None

    def __post_init__(self) -> None:
        """Refuse an empty slice."""
        if self.classes is not None and not 0 <= self.classes[0] < self.classes[1]:
            raise ConfigError(
                "classes", got=list(self.classes), expected="[first, last + 1], 0 <= first < last"
            )


@dataclass(frozen=True)
class ModelRecipe:
    """One ONNX classifier.

    Attributes:
        name: Begins the names of its stages, tensors and exits.
        file: Path, relative to the YAML file.
        input: What it expects of its input.
        output: What its outputs mean.
        cut_at: Tensors at which it is cut into segments, in order of execution.
        exits: Names of its outputs that are exits, in order of evaluation; all but the last become
            heads that hang on the nearest cut. Empty for a model with one output.
    """

    name: str
    file: str
    input: InputRecipe
    output: OutputRecipe = field(default_factory=OutputRecipe)
    cut_at: tuple[str, ...] = ()
    exits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no model could be."""
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                "name of a model", got=repr(self.name), expected="letters, digits, '_' and '-'"
            )
        for key, names in (("cut_at", self.cut_at), ("exits", self.exits)):
            if len(set(names)) != len(names):
                raise ConfigError(f"model {self.name!r}: {key} names a tensor twice")
        if self.exits and self.output.tensor is not None:
            raise ConfigError(
                f"model {self.name!r}: output.tensor and exits exclude each other",
                remedy="Name the tensor in exits",
            )
        if len(self.exits) > 1 and not self.cut_at:
            raise ConfigError(
                f"model {self.name!r} has {len(self.exits)} exits and is not cut",
                remedy="Name in cut_at the tensors at which its early exits branch off",
            )


@dataclass(frozen=True)
class Recipe:
    """A cascade of plain ONNX classifiers.

    Attributes:
        name: Name of the bundle.
        classes: Class names, their number, or a file of them.
        models: In order of evaluation: the cheapest first, the base model last.
        image: The camera image.
    """

    name: str
    classes: int | tuple[str, ...] | LabelsFile
    models: tuple[ModelRecipe, ...]
    image: ImageRecipe = field(default_factory=ImageRecipe)

    def __post_init__(self) -> None:
        """Refuse what no cascade could be."""
        if not self.models:
            raise ConfigError("models", got="none", expected="at least one")
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ConfigError("models: a name is used twice", got=", ".join(names))
        for model in self.models:
            try:
                model.input.spec(self.image.channels)
            except ConfigError as error:
                raise ConfigError(f"model {model.name!r}: input: {error}") from error

    @property
    def class_names(self) -> tuple[str, ...]:
        """As `class_names`."""
        return class_names(self.classes)


def class_names(classes: int | tuple[str, ...] | LabelsFile) -> tuple[str, ...]:
    """Class names in the order of the logits; "0", "1", ... where only a number is given.

    Raises:
        ConfigError: The file of the labels can't be read.
    """
    if isinstance(classes, int):
        return tuple(str(i) for i in range(classes))
    if isinstance(classes, tuple):
        return classes
    try:
        text = Path(classes.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"classes: {classes.file} can't be read: {error}") from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; its paths become relative to the current folder, or absolute.

    Raises:
        ConfigError: The file is missing, is no strict YAML, or asks for what can't be.
        BackendUnavailable: PyYAML is not installed.
    """
    recipe = config.load(path, Recipe, overrides)
    classes = recipe.classes
    if isinstance(classes, LabelsFile):
        classes = LabelsFile(str(path.parent / classes.file))
    models = tuple(replace(model, file=str(path.parent / model.file)) for model in recipe.models)
    return replace(recipe, classes=classes, models=models)
