"""Where a training stands, on disk: a JSON file that names the files of tensors that belong to it.

Tensors are written first under names of their own; replacing `state.json` makes them count. So the
folder holds a whole checkpoint at any moment, after a power cut too. Nothing in it is code.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edge_runtime import schema
from edge_runtime.errors import ConfigError, ManifestError, missing_package
from edge_runtime.files import read_json, write_bytes, write_json

FORMAT = 1

_REMEDY = "Give --restart to begin again, or another --out"


@dataclass(frozen=True)
class TensorFile:
    """A file of tensors.

    Attributes:
        file: Its name in the checkpoint's folder.
        sha256: Hash of its contents.
    """

    file: str
    sha256: str

    def __post_init__(self) -> None:
        """Refuse names that leave the folder."""
        if Path(self.file).name != self.file or not self.file.endswith(".safetensors"):
            raise ConfigError("file", got=repr(self.file), expected="a plain name")


@dataclass(frozen=True)
class Best:
    """The best epoch of the phase so far.

    Attributes:
        epoch: From 0.
        accuracy: Mean of the exits that the phase trains, on the validation data.
        weights: The model as it was then.
    """

    epoch: int
    accuracy: float
    weights: TensorFile


@dataclass(frozen=True)
class EpochRecord:
    """One epoch, as log.jsonl has it.

    Attributes:
        phase: Index of the phase.
        train: What it trains.
        epoch: From 1.
        loss: Mean over the samples.
        rate: The optimizer's at the end.
        accuracy: Exit -> share of the validation data that it classifies rightly.
        mean_accuracy: Mean over these exits.
        best: Whether it is the phase's best so far.
        seconds: Time of the training steps, without validation.
        images_per_second: Training samples in that time.
    """

    phase: int
    train: str
    epoch: int
    loss: float
    rate: float
    accuracy: Mapping[str, float]
    mean_accuracy: float
    best: bool
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class State:
    """Where a training stands.

    Attributes:
        identity: What was asked for, without paths: configuration and hashes of the data.
        weights: Model and optimizer; None before the first checkpoint.
        phase: Index of the phase; their number when all are done.
        epoch: Epochs of the phase that are done.
        step: Steps of the next one that are done.
        loss: Sum of the loss over the samples of these steps.
        samples: Samples in these steps.
        seconds: Time of these steps.
        stale: Epochs since the best one.
        best: The phase's best epoch.
        history: All epochs so far.
        format: Version of this layout.
    """

    identity: Mapping[str, Any]
    weights: TensorFile | None = None
    phase: int = 0
    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    samples: int = 0
    seconds: float = 0.0
    stale: int = 0
    best: Best | None = None
    history: tuple[EpochRecord, ...] = ()
    format: int = FORMAT

    def __post_init__(self) -> None:
        """Refuse a place that no training was ever in."""
        place = (self.phase, self.epoch, self.step)
        if min(place) < 0:
            raise ConfigError("phase, epoch, step", got=list(place), expected=">= 0")


class Checkpoints:
    """The folder of a training's checkpoint.

    Args:
        folder: It exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index = folder / "state.json"

    def load(self, identity: Mapping[str, Any]) -> State | None:
        """Read where the training stands; None where nothing was written.

        Args:
            identity: What is asked for now.

        Raises:
            ConfigError: The checkpoint is of another training; the message names what differs.
            ManifestError: It is not whole.
        """
        if not self._index.exists():
            return None
        data = read_json(self._index, "the checkpoint")
        found = data.get("format") if isinstance(data, dict) else None
        if found != FORMAT:
            raise ManifestError(
                f"the checkpoint {self._index}: format", got=found, expected=FORMAT, remedy=_REMEDY
            )
        try:
            state = schema.read(State, data, str(self._index))
        except ConfigError as error:
            raise ManifestError(f"the checkpoint is not whole: {error}", remedy=_REMEDY) from error
        if state.weights is None:
            raise ManifestError(f"the checkpoint {self._index} has no weights", remedy=_REMEDY)
        differences = _differences(state.identity, schema.plain(identity), "")
        if differences:
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise ConfigError(
                f"{self.folder} holds the checkpoint of another training: "
                f"{'; '.join(differences[:3])}{more}",
                remedy=_REMEDY,
            )
        return state

    def save(self, state: State, tensors: Mapping[str, Tensor] | None = None) -> State:
        """Write where the training stands; what was there before is removed then.

        Args:
            state: The state; its files exist, but for `weights` where `tensors` are given.
            tensors: Contents of `weights`.

        Returns:
            The state as written.

        Raises:
            EdgeRuntimeError: A file can't be written; the checkpoint before is still there.
        """
        if tensors is not None:
            state = replace(state, weights=self.write("state", tensors))
        write_json(self._index, schema.plain(state))
        kept = {state.weights, None if state.best is None else state.best.weights}
        names = {file.file for file in kept if file is not None}
        for path in self.folder.glob("*.safetensors"):
            if path.name not in names:
                with contextlib.suppress(OSError):
                    path.unlink()
        return state

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> TensorFile:
        """Write tensors under a name that begins with `name`.

        Raises:
            EdgeRuntimeError: The file can't be written.
        """
        file = f"{name}.{secrets.token_hex(8)}.safetensors"
        digest = write_tensors(self.folder / file, tensors)
        return TensorFile(file, digest)

    def read(self, file: TensorFile) -> dict[str, Tensor]:
        """Read tensors back.

        Raises:
            ManifestError: The file is missing or has changed.
        """
        import safetensors.torch

        path = self.folder / file.file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ManifestError(
                f"the checkpoint's {path} can't be read: {error.strerror}", remedy=_REMEDY
            ) from error
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise ManifestError(f"the checkpoint's {path} has changed", remedy=_REMEDY)
        try:
            return safetensors.torch.load(data)
        except (safetensors.SafetensorError, ValueError) as error:
            raise ManifestError(f"the checkpoint's {path}: {error}", remedy=_REMEDY) from error

    def clear(self) -> None:
        """Remove the checkpoint."""
        for path in (self._index, *self.folder.glob("*.safetensors")):
            path.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file; returns the hash of its contents.

    Raises:
        EdgeRuntimeError: The file can't be written.
        BackendUnavailable: safetensors is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise missing_package("safetensors", "train") from error
    data = safetensors.torch.save({n: t.detach().cpu().contiguous() for n, t in tensors.items()})
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the places of `model_tensors`; those of other names are left alone.

    Raises:
        ManifestError: One is missing or has another shape.
    """
    with torch.no_grad():
        for name, place in model_tensors(model).items():
            found = tensors.get(name)
            if found is None or found.shape != place.shape or found.dtype != place.dtype:
                raise ManifestError(
                    f"the checkpoint does not fit the model: {name}",
                    got="nothing" if found is None else f"{tuple(found.shape)} {found.dtype}",
                    expected=f"{tuple(place.shape)} {place.dtype}",
                    remedy=_REMEDY,
                )
            place.copy_(found)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments, by the place of their parameter in the groups."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"optimizer/{i}/{key}": value
        for i, parameter in enumerate(parameters)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        ManifestError: A moment has another shape than its parameter.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        if not name.startswith("optimizer/"):
            continue
        place, _, key = name.removeprefix("optimizer/").partition("/")
        if not place.isdigit() or int(place) >= len(parameters):
            raise ManifestError(f"the checkpoint has no place for {name}", remedy=_REMEDY)
        parameter = parameters[int(place)]
        if key == "step":
            kept = value.to(parameter.device, copy=True)
        elif value.shape == parameter.shape:
            kept = torch.empty_like(parameter).copy_(value)
        else:
            raise ManifestError(f"the checkpoint's {name} has another shape", remedy=_REMEDY)
        optimizer.state[parameter][key] = kept


def _differences(old: Any, new: Any, where: str) -> list[str]:
    """What differs, as lines for people."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in dict.fromkeys([*old, *new]):
            place = f"{where}.{key}" if where else str(key)
            found += _differences(old.get(key), new.get(key), place)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in _differences(a, b, f"{where}[{i}]")]
    if old == new:
        return []
    return [f"{where} was {_short(old)}, is {_short(new)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
