"""The YAML of a training, as frozen dataclasses; `TrainingRecipe` shows one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from edge_runtime import config
from edge_runtime.errors import ConfigError
from engines.models.backbones import BackboneRecipe
from engines.recipe import ImageRecipe, InputRecipe, LabelsFile, class_names

#: What a phase can train.
Part = Literal["saver", "backbone", "all", "exits", "esn"]

#: Data sets that torchvision reads without running what a file says: it checks the hashes of
#: CIFAR's pickles, and MNIST's files are plain arrays.
TorchvisionName = Literal["CIFAR10", "CIFAR100", "MNIST", "FashionMNIST"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_RAND = re.compile(
    r"rand(-(m\d+|n\d+|p[01](\.\d+)?|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t(3aw?|weights)))*"
)
# Without "v0": it reduces images to 0 bits now and then, which Pillow refuses.
_AUTO = re.compile(r"(original|originalr|v0r|3a)(-mstd\d+(\.\d+)?)?")

#: More is a mistake, and rates of 1e4 or batches of a million end in one too.
_MAX_EPOCHS, _MAX_BATCH, _MAX_RATE = 100_000, 65_536, 10.0


@dataclass(frozen=True)
class SourceRecipe:
    """Where labelled images are.

    Attributes:
        path: A folder of class folders or an npz, relative to the YAML file; see
            `ImageDataset.open`.
        torchvision: Instead of `path`, a data set of torchvision; nothing is downloaded.
        root: The folder that holds it, relative to the YAML file.
        train: Whether its training half is taken, else its test half.
    """

    path: str | None = None
    torchvision: TorchvisionName | None = None
    root: str | None = None
    train: bool = True

    def __post_init__(self) -> None:
        """Refuse two sources, or none."""
        if (self.path is None) == (self.torchvision is None):
            got = "none of them" if self.path is None else "both"
            raise ConfigError("path, torchvision", got=got, expected="exactly one")
        if (self.torchvision is None) != (self.root is None):
            raise ConfigError("torchvision and root belong together", remedy="Give both or none")

    def beside(self, folder: Path) -> SourceRecipe:
        """The same with paths that start at `folder`."""
        path = None if self.path is None else str(folder / self.path)
        return replace(self, path=path, root=None if self.root is None else str(folder / self.root))


@dataclass(frozen=True)
class DataRecipe:
    """The data.

    Attributes:
        train: What is learned from.
        validation: What is measured on: a share of the training data that is kept out, or data of
            its own.
        image: The camera image; `size` scales all images to it.
    """

    train: SourceRecipe
    validation: float | SourceRecipe = 0.1
    image: ImageRecipe = field(default_factory=ImageRecipe)

    def __post_init__(self) -> None:
        """Refuse a share that leaves nothing."""
        if isinstance(self.validation, float) and not 0 < self.validation < 1:
            raise ConfigError(
                "validation", got=self.validation, expected="a share in (0, 1), or {path: ...}"
            )


@dataclass(frozen=True)
class EsnRecipe:
    """The exit sequence network; see `engines.models.esn`.

    Attributes:
        layers: Layers of the decoder.
        width: Width of its tokens, a multiple of `heads`.
        heads: Heads of its attention.
    """

    layers: int = 1
    width: int = 32
    heads: int = 8

    def __post_init__(self) -> None:
        """Refuse what can't be built."""
        if self.layers < 0 or self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ConfigError(
                "esn",
                got=f"layers {self.layers}, width {self.width}, heads {self.heads}",
                expected="layers >= 0, heads >= 1, width a multiple of heads",
            )


@dataclass(frozen=True)
class AugmentRecipe:
    """How training images vary. Every draw depends on the seed, the epoch and the sample only.

    Attributes:
        flip: Whether images are mirrored, left and right, half of the time.
        shift: Largest shift in pixels of the model's input, in both directions; what comes in is
            a reflection.
        auto: timm's RandAugment ("rand-m5-mstd0.5") or AutoAugment ("original", "v0r"), on the
            camera image.
        crop: Smallest and largest share of the camera image's area that is cut out, and scaled
            back to its size.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of cutmix; 0 for none. With both, a batch gets one of them.
    """

    flip: bool = False
    shift: int = 0
    auto: str | None = None
    crop: tuple[float, float] | None = None
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what can't be drawn."""
        if self.shift < 0:
            raise ConfigError("shift", got=self.shift, expected=">= 0 pixels")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) <= 100:
                raise ConfigError(name, got=getattr(self, name), expected="an alpha in [0, 100]")
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ConfigError(
                "crop", got=list(self.crop), expected="[smallest, largest] share in (0, 1]"
            )
        if self.auto is not None and not (_RAND.fullmatch(self.auto) or _AUTO.fullmatch(self.auto)):
            raise ConfigError(
                "auto",
                got=repr(self.auto),
                expected="RandAugment such as rand-m5-mstd0.5, or AutoAugment: original, "
                "originalr, v0r, 3a, each also with -mstd0.5",
            )

    @property
    def per_image(self) -> bool:
        """Whether something is done to camera images one by one."""
        return self.auto is not None or self.crop is not None

    @property
    def mixes(self) -> bool:
        """Whether samples are mixed."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class PhaseRecipe:
    """One phase: what is trained, how long and how.

    Attributes:
        train: "saver"; "backbone" by its own logits; "all", the backbone and its exits end to end
            by the sum of their losses; "exits" with the backbone frozen; "esn" with all else
            frozen.
        epochs: Passes over the training data.
        batch: Samples per step; even with mixup or cutmix.
        rate: AdamW's rate after the warm-up.
        weight_decay: AdamW's decay, for weights of two axes and more.
        warmup_epochs: Over which the rate rises linearly from 0, parts of an epoch too.
        final_rate: Share of `rate` at the end of the cosine.
        label_smoothing: Share of the target that is spread over all classes.
        distill: Of "exits" only: share of the loss that is the divergence from the backbone's own
            logits.
        temperature: What those logits and the exits' are divided by for it.
        patience: The phase ends after so many epochs without better validation; None: never.
        clip_norm: Largest norm of the gradient; None: any.
        augment: How images vary.
    """

    train: Part
    epochs: int
    batch: int = 128
    rate: float = 0.001
    weight_decay: float = 0.05
    warmup_epochs: float = 0.0
    final_rate: float = 0.0
    label_smoothing: float = 0.0
    distill: float = 0.0
    temperature: float = 1.0
    patience: int | None = None
    clip_norm: float | None = None
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)

    def __post_init__(self) -> None:
        """Refuse what can't be trained."""
        whole = {"epochs": _MAX_EPOCHS, "batch": _MAX_BATCH}
        for name, most in whole.items():
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(name, got=getattr(self, name), expected=f"1..{most}")
        if not 0 < self.rate <= _MAX_RATE:
            raise ConfigError("rate", got=self.rate, expected=f"in (0, {_MAX_RATE:g}]")
        for name in ("weight_decay", "final_rate", "label_smoothing", "distill"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(name, got=getattr(self, name), expected="in [0, 1]")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ConfigError(
                "warmup_epochs", got=self.warmup_epochs, expected=f"0..epochs ({self.epochs})"
            )
        if self.temperature <= 0:
            raise ConfigError("temperature", got=self.temperature, expected="> 0")
        if self.patience is not None and self.patience < 1:
            raise ConfigError("patience", got=self.patience, expected=">= 1 epoch, or null")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError("clip_norm", got=self.clip_norm, expected="> 0, or null")
        if self.distill and self.train != "exits":
            raise ConfigError(
                f"distill in a phase that trains {self.train!r}",
                expected="train: exits, which learn from the frozen backbone",
            )
        if self.augment.mixes and self.batch % 2:
            raise ConfigError("batch with mixup or cutmix", got=self.batch, expected="even")


@dataclass(frozen=True)
class TrainingRecipe:
    """A training.

    name: cifar10
    classes: [airplane, ...]      # or a number, or {file: labels.txt}
    seed: 0
    data:
      train: {path: cifar10_train}
      validation: 0.1
      image: {channels: 3, size: [32, 32]}
    input: {size: [32, 32], mean: [0.49, 0.48, 0.45], std: [0.25, 0.24, 0.26]}
    saver: {model: residual, options: {widths: [8, 16, 32], blocks: [1, 1, 1]}}
    base: {model: residual, options: {widths: [32, 64, 128], blocks: [1, 2, 1]}}
    exits: {count: 2, neck: pool}  # or [[1, lph, {kernel: 3}], [3, pool]]
    esn: {layers: 1, width: 32, heads: 8}
    amp: bfloat16
    phases:
      - {train: all, epochs: 30, rate: 0.01, augment: {flip: true, shift: 4}}
      - {train: exits, epochs: 5, rate: 0.001, distill: 0.5}

    Attributes:
        name: Name of the bundle and its folder.
        classes: Class names in the order of the logits, their number, or a file of them.
        data: The data.
        input: What the models expect of their input: the deployed preprocessing.
        base: The backbone.
        phases: In order; each starts from the best weights of the one before.
        exits: Early exits of the backbone, as `engines.models.early_exit.parse_exits` reads them.
        saver: A small classifier in front.
        esn: The exit sequence network.
        seed: Another one gives other weights, another validation share and other draws.
        amp: "bfloat16" computes products in it while it trains; weights, and what is exported,
            stay float32.
        channels_last: Whether images lie in memory with their channels last, which convolutions
            are faster on.
    """

    name: str
    classes: int | tuple[str, ...] | LabelsFile
    data: DataRecipe
    input: InputRecipe
    base: BackboneRecipe
    phases: tuple[PhaseRecipe, ...]
    exits: Any = ()
    saver: BackboneRecipe | None = None
    esn: EsnRecipe | None = None
    seed: int = 0
    amp: Literal["bfloat16"] | None = None
    channels_last: bool = True

    def __post_init__(self) -> None:
        """Refuse what doesn't fit together."""
        if not _NAME.fullmatch(self.name):
            raise ConfigError("name", got=repr(self.name), expected="letters, digits, '_' and '-'")
        if not 0 <= self.seed < 2**32:
            raise ConfigError("seed", got=self.seed, expected="0..4294967295")
        if not self.phases:
            raise ConfigError("phases", got="none", expected="at least one")
        try:
            self.input.spec(self.data.image.channels)
        except ConfigError as error:
            raise ConfigError(f"input: {error}") from error
        if self.input.layout != "NCHW":
            raise ConfigError(
                "input: layout", got=self.input.layout, expected="NCHW, as torch models read"
            )
        if self.esn is not None and (self.saver is None or not self.exits):
            raise ConfigError("esn without saver and exits", remedy="Add them, or remove esn")
        for index, phase in enumerate(self.phases):
            self._check_phase(phase, f"phases[{index}]")
        self._check_order()

    def _check_phase(self, phase: PhaseRecipe, where: str) -> None:
        there = {"saver": self.saver is not None, "exits": bool(self.exits)}
        there["esn"] = self.esn is not None
        if not there.get(phase.train, True):
            raise ConfigError(
                f"{where} trains {phase.train!r}, which this configuration lacks",
                remedy=f"Add {phase.train}:, or remove the phase",
            )
        if phase.augment.shift >= min(self.input.size):
            raise ConfigError(
                f"{where}: shift",
                got=phase.augment.shift,
                expected=f"less than the input's {min(self.input.size)} pixels",
            )

    def _check_order(self) -> None:
        """Frozen parts must have learned something before others learn from them."""
        ready = {"saver": self.saver is not None and self.saver.weights is not None}
        ready["backbone"] = self.base.weights is not None
        needs = {"exits": ("backbone",), "esn": ("saver", "backbone")}
        for index, phase in enumerate(self.phases):
            for part in needs.get(phase.train, ()):
                if not ready[part]:
                    raise ConfigError(
                        f"phases[{index}] trains {phase.train!r} on a {part} without weights",
                        remedy=f"Train the {part} in an earlier phase, or give it weights",
                    )
            ready["backbone" if phase.train == "all" else phase.train] = True

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in the order of the logits; "0", "1", ... where only a number is given.

        Raises:
            ConfigError: The file can't be read, there is one class, or a name appears twice.
        """
        names = class_names(self.classes)
        if len(names) < 2:
            raise ConfigError("classes", got=len(names), expected="at least 2")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"classes: {twice[0]!r} appears twice")
        return names


def load_training(path: Path, overrides: Sequence[str] = ()) -> TrainingRecipe:
    """Read a training's YAML; its paths become relative to the current folder, or absolute.

    Raises:
        ConfigError: The file is missing, is no strict YAML, or asks for what can't be.
        BackendUnavailable: PyYAML is not installed.
    """
    recipe = config.load(path, TrainingRecipe, overrides)
    folder = path.parent
    data = replace(recipe.data, train=recipe.data.train.beside(folder))
    if isinstance(data.validation, SourceRecipe):
        data = replace(data, validation=data.validation.beside(folder))
    classes = recipe.classes
    if isinstance(classes, LabelsFile):
        classes = LabelsFile(str(folder / classes.file))
    saver = None if recipe.saver is None else _beside(recipe.saver, folder)
    return replace(
        recipe, data=data, classes=classes, base=_beside(recipe.base, folder), saver=saver
    )


def _beside(recipe: BackboneRecipe, folder: Path) -> BackboneRecipe:
    if recipe.weights is None:
        return recipe
    return replace(recipe, weights=str(folder / recipe.weights))
