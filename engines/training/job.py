"""A training from its YAML to its bundle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_runtime import schema
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import BackendUnavailable, ConfigError
from edge_runtime.file_lock import file_lock
from edge_runtime.files import check_target, write_bytes
from edge_runtime.manifest import Bundle
from engines.models.backbones import BackboneRecipe, build_backbone
from engines.models.early_exit import EarlyExit, parse_exits
from engines.models.esn import Esn
from engines.models.staged import StagedModel
from engines.training.checkpoint import Checkpoints, State, write_tensors
from engines.training.config import SourceRecipe, TrainingRecipe
from engines.training.data import Images, open_data, save_arrays
from engines.training.loop import LoopOptions, Trainer, accuracies

#: Images at a time of the last measurement, and samples that the export is verified with.
_MEASURED, _VERIFIED = 256, 8

#: Training images that are kept for INT8's ranges.
_CALIBRATION = 1000


@dataclass(frozen=True)
class JobOptions:
    """How a training runs; nothing here changes what it learns, but for rounding.

    Attributes:
        restart: Whether a checkpoint is thrown away.
        force: Whether a bundle that is already there may be replaced.
        export: Whether a bundle is written at the end.
        device: "cpu", "cuda", or "auto": CUDA where there is one.
        threads: Of torch; None leaves them to it.
        workers: Processes that read and vary images.
        checkpoint_s: Seconds between checkpoints within an epoch.
    """

    restart: bool = False
    force: bool = False
    export: bool = True
    device: str = "auto"
    threads: int | None = None
    workers: int = 0
    checkpoint_s: float = 600.0


@dataclass(frozen=True)
class Trained:
    """What came out.

    Attributes:
        model: With the best weights, on the CPU, in eval mode.
        state: The history of its training.
        accuracy: Exit -> share of the validation data that it classifies rightly, in float32.
        samples: Number of validation images.
        image_size: Their (height, width).
        bundle: None where none was asked for.
        already: Whether nothing was left to train.
    """

    model: StagedModel
    state: State
    accuracy: Mapping[str, float]
    samples: int
    image_size: tuple[int, int]
    bundle: Bundle | None
    already: bool


def train(recipe: TrainingRecipe, out: Path, options: JobOptions, console: Console) -> Trained:
    """Train, or go on where a checkpoint stands, and export.

    Writes in `out`: `training/`, the checkpoint; `log.jsonl`; `weights/`, one file per component;
    `thresholds.npz`, the validation images, where they are a share of the training data;
    `calibration.npz`, some of the training images; and the bundle.

    Args:
        recipe: What is asked for.
        out: The folder; made where its parent exists.
        options: How.
        console: Where progress is told.

    Raises:
        ConfigError: The data or the models don't fit, a checkpoint is of another training, or a
            bundle is there and may not be replaced.
        BackendUnavailable: A package or the device is missing.
        EdgeRuntimeError: The loss is not finite, a file can't be written, or the export failed.
        KeyboardInterrupt: On Ctrl-C, when a checkpoint is written.
    """
    device = _device(options.device)
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"the folder {out.parent} does not exist", remedy="Create it first")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is not a folder")
    with _threads(options.threads), torch.random.fork_rng(devices=[]):
        job = _Job(recipe, out, options, console, device)
        folder = out / "training"
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            return job.run(Checkpoints(folder))


class _Job:
    def __init__(
        self,
        recipe: TrainingRecipe,
        out: Path,
        options: JobOptions,
        console: Console,
        device: torch.device,
    ) -> None:
        self.recipe = recipe
        self.out = out
        self.options = options
        self.console = console
        self.device = device
        self.spec = recipe.input.spec(recipe.data.image.channels)
        self.bundle = out / f"{recipe.name}.bundle"
        self.training, self.validation = open_data(recipe)
        self.classes = self.training.classes
        self.model = build_model(recipe, len(self.classes)).to(device)
        if recipe.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def run(self, checkpoints: Checkpoints) -> Trained:
        recipe, options, console = self.recipe, self.options, self.console
        console.note(
            f"{len(self.training)} images for training, {len(self.validation)} for validation, "
            f"{len(self.classes)} classes"
        )
        identity = _identity(recipe, self.training, self.validation)
        # The bundle first: a checkpoint is not thrown away for a training that can't end.
        found = None if options.restart else checkpoints.load(identity)
        already = found is not None and found.phase == len(recipe.phases)
        if options.export and not already:
            check_target(self.bundle, overwrite=options.force)
        if options.restart:
            checkpoints.clear()
        validation = Images(self.validation, self.spec)
        trainer = Trainer(
            recipe,
            self.model,
            Images(self.training, self.spec),
            validation,
            checkpoints,
            console,
            LoopOptions(self.device, options.workers, options.checkpoint_s),
        )
        if found is not None:
            console.note("the training is finished" if already else _where(found))
        state = trainer.run(found or State(identity), self._log)
        self._log(state)
        accuracy = accuracies(self.model, validation, _MEASURED, recipe, self.device)
        self._note_untrained()
        model = self.model.cpu().eval()
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self._write_weights(model)
        if isinstance(recipe.data.validation, float):
            save_arrays(self.validation, self.out / "thresholds.npz")
        calibration = self.training.balanced(_CALIBRATION, recipe.seed)
        save_arrays(calibration, self.out / "calibration.npz")
        bundle = self._export(model, state) if options.export else None
        height, width, _ = self.validation.image_shape
        size = (height, width)
        return Trained(model, state, accuracy, len(self.validation), size, bundle, already)

    def _note_untrained(self) -> None:
        """Tell of answers that nothing has learned."""
        recipe = self.recipe
        learned = {"backbone" if p.train == "all" else p.train for p in recipe.phases}
        learned |= {"exits"} if any(p.train == "all" for p in recipe.phases) else set()
        given = {"saver": recipe.saver, "backbone": recipe.base}
        for name in self.model.components():
            model = given.get(name)
            if name not in learned and (model is None or model.weights is None):
                self.console.note(f"no phase trains the {name}: what they answer is chance")

    def _log(self, state: State) -> None:
        """Write all epochs so far, one a line."""
        lines = [json.dumps(schema.plain(record), allow_nan=False) for record in state.history]
        write_bytes(self.out / "log.jsonl", "".join(f"{line}\n" for line in lines).encode())

    def _write_weights(self, model: StagedModel) -> None:
        folder = self.out / "weights"
        folder.mkdir(exist_ok=True)
        for name, modules in model.components().items():
            tensors: dict[str, Tensor] = {}
            for i, module in enumerate(modules):
                prefix = f"{i}." if len(modules) > 1 or name == "exits" else ""
                tensors |= {prefix + n: t.clone() for n, t in module.state_dict().items()}
            write_tensors(folder / f"{name}.safetensors", tensors)

    def _export(self, model: StagedModel, state: State) -> Bundle:
        if self.bundle.exists() and not self.options.force:
            self.console.note(f"{self.bundle} is there already; --force writes it again")
            return Bundle.open(self.bundle)
        self.console.note(f"exporting {self.bundle} ...")
        return model.export(
            self.bundle,
            example_images=next(self.validation.batches(_VERIFIED))[0],
            classes=self.classes,
            name=self.recipe.name,
            preprocess=self.spec,
            image_size=self.recipe.data.image.size,
            provenance={"training": schema.plain(state.identity)},
            overwrite=self.options.force,
        )


def build_model(recipe: TrainingRecipe, classes: int) -> StagedModel:
    """Make the models; what has no weights gets those of the recipe's seed.

    Changes torch's global generator.

    Raises:
        ConfigError: A model, an option, an exit or a file of weights does not fit.
        BackendUnavailable: timm is missing and needed.
    """
    torch.manual_seed(recipe.seed)
    image = (recipe.data.image.channels, *recipe.input.size)
    example = torch.zeros(2, *image)
    saver = None if recipe.saver is None else build_backbone(recipe.saver, classes, image)
    backbone = build_backbone(recipe.base, classes, image)
    base = EarlyExit(backbone, parse_exits(recipe.exits), example)
    esn = None
    if recipe.esn is not None:
        sizes = recipe.esn
        layouts, classes = base.layouts, base.classes
        esn = Esn(layouts, classes, layers=sizes.layers, width=sizes.width, heads=sizes.heads)
    return StagedModel(base, saver, esn)


def _identity(
    recipe: TrainingRecipe, training: ImageDataset, validation: ImageDataset
) -> dict[str, Any]:
    """What decides what is learned: the configuration without paths, and hashes of all files."""
    found: dict[str, Any] = schema.plain(recipe)
    del found["name"]
    found["classes"] = list(recipe.class_names)
    found["data"] = {
        "training": training.hash,
        "validation": validation.hash,
        "image": found["data"]["image"],
    }
    if not isinstance(recipe.data.validation, SourceRecipe):
        found["data"]["share"] = recipe.data.validation
    for part in ("base", "saver"):
        model: BackboneRecipe | None = getattr(recipe, part)
        if model is not None and model.weights is not None:
            found[part]["weights"] = _file_hash(Path(model.weights), f"{part}: weights")
    return found


def _file_hash(path: Path, what: str) -> str:
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise ConfigError(f"{what} {path} can't be read: {error.strerror}") from error


def _where(state: State) -> str:
    return f"goes on in phase {state.phase + 1}, epoch {state.epoch + 1}, step {state.step + 1}"


def _device(name: str) -> torch.device:
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise BackendUnavailable(
            "--device cuda: torch finds no CUDA device",
            remedy="Install a torch for CUDA and its driver, or give --device cpu",
        )
    return torch.device("cuda" if cuda and name != "cpu" else "cpu")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from training in the same folder."""

    def refuse() -> None:
        raise ConfigError(
            f"another process trains in {folder.parent}",
            remedy="Wait for it, or choose another --out",
        )

    with file_lock(folder / ".lock", refuse):
        yield
