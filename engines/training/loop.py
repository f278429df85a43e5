"""The training loop: phases, epochs and steps, and what is written between them."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from edge_runtime.console import Console
from edge_runtime.errors import EdgeRuntimeError
from engines.models.staged import StagedModel
from engines.training.checkpoint import (
    Best,
    Checkpoints,
    EpochRecord,
    State,
    load_model,
    load_optimizer,
    model_tensors,
    optimizer_tensors,
)
from engines.training.config import PhaseRecipe, TrainingRecipe
from engines.training.data import Images
from engines.training.draws import seed_of
from engines.training.feed import Feed
from engines.training.objectives import Objective, objective

#: Called with the state after every epoch.
OnEpoch = Callable[[State], None]


@dataclass(frozen=True)
class LoopOptions:
    """How a training runs, which changes nothing of what comes out.

    Attributes:
        device: Where it computes.
        workers: Processes that read and vary images.
        checkpoint_s: Seconds between checkpoints within an epoch.
    """

    device: torch.device
    workers: int = 0
    checkpoint_s: float = 600.0


class Trainer:
    """Trains a model phase by phase.

    Args:
        recipe: What is asked for.
        model: On the device; its weights are those to begin with.
        training: The training data.
        validation: The validation data.
        checkpoints: Where it writes.
        console: Where it tells.
        options: How it runs.

    Attributes:
        recipe: As given.
        model: As given.
        training: As given.
        validation: As given.
        checkpoints: As given.
        console: As given.
        options: As given.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        model: StagedModel,
        training: Images,
        validation: Images,
        checkpoints: Checkpoints,
        console: Console,
        options: LoopOptions,
    ) -> None:
        self.recipe = recipe
        self.model = model
        self.training = training
        self.validation = validation
        self.checkpoints = checkpoints
        self.console = console
        self.options = options

    def run(self, state: State, on_epoch: OnEpoch) -> State:
        """Train from where `state` stands to the end; the model then has the best weights.

        Args:
            state: From `Checkpoints.load`, or a new one.
            on_epoch: Called after every epoch, when its checkpoint is written.

        Returns:
            The state at the end.

        Raises:
            EdgeRuntimeError: The loss is not finite, or a file can't be written.
            ConfigError: An image can't be read.
            ManifestError: The checkpoint is damaged.
            KeyboardInterrupt: On Ctrl-C, when a checkpoint is written.
        """
        tensors: Mapping[str, Tensor] = {}
        if state.weights is not None:
            tensors = self.checkpoints.read(state.weights)
            load_model(self.model, tensors)
        with _Stop() as stop:
            while state.phase < len(self.recipe.phases):
                phase = _Phase(self, state, stop)
                if state.epoch or state.step:
                    load_optimizer(phase.optimizer, tensors)
                state = phase.run(on_epoch)
        return state


class _Phase:
    """One phase under way."""

    def __init__(self, trainer: Trainer, state: State, stop: _Stop) -> None:
        self._model = trainer.model
        self._validation = trainer.validation
        self._checkpoints = trainer.checkpoints
        self._console = trainer.console
        self._options = trainer.options
        self._recipe = trainer.recipe
        self._stop = stop
        self._state = state
        self._phase = self._recipe.phases[state.phase]
        self._objective = objective(self._model, self._phase)
        self._feed = Feed(
            trainer.training, self._phase, state.phase, self._recipe.seed, self._options.workers
        )
        self._parameters = self._model.train_only(self._objective.components)
        self.optimizer = _optimizer(self._parameters, self._phase)
        self._written = time.monotonic()

    @property
    def _name(self) -> str:
        place = f"{self._state.phase + 1}/{len(self._recipe.phases)}"
        return f"phase {place} ({self._phase.train})"

    def run(self, on_epoch: OnEpoch) -> State:
        """Train the phase to its end."""
        with self._console.status(self._name) as show:
            while not self._done():
                self._epoch(show)
                on_epoch(self._state)
                self._console.note(f"{self._name}, {_said(self._state.history[-1], self._phase)}")
                if self._stop.asked:
                    self._interrupt()
        best = self._state.best
        assert best is not None  # epochs >= 1
        if self._state.epoch < self._phase.epochs:
            self._console.note(
                f"{self._name}: no better validation in {self._state.stale} epochs, goes on with "
                f"epoch {best.epoch + 1}"
            )
        load_model(self._model, self._checkpoints.read(best.weights))
        self._state = self._checkpoints.save(
            replace(self._state, phase=self._state.phase + 1, epoch=0, step=0, stale=0, best=None),
            model_tensors(self._model),
        )
        return self._state

    def _done(self) -> bool:
        patience = self._phase.patience
        stale = patience is not None and self._state.stale >= patience
        return stale or self._state.epoch >= self._phase.epochs

    def _epoch(self, show: Callable[[str], None]) -> None:
        """The rest of an epoch's steps, validation, and a checkpoint."""
        self._model.train()
        epoch, steps = self._state.epoch, self._feed.steps
        begin = time.monotonic()
        for pixels, targets in self._feed.batches(epoch, self._state.step):
            loss = self._step(pixels, targets)
            now = time.monotonic()
            state = self._state
            self._state = replace(
                state,
                step=state.step + 1,
                loss=state.loss + loss * len(pixels),
                samples=state.samples + len(pixels),
                seconds=state.seconds + now - begin,
            )
            begin = now
            state = self._state
            show(
                f"epoch {epoch + 1}/{self._phase.epochs}, step {state.step}/{steps}, "
                f"loss {state.loss / state.samples:.4f}, "
                f"{state.samples / max(state.seconds, 1e-9):.0f} images/s"
            )
            if state.step < steps:
                self._between_steps()
                begin = time.monotonic()
        accuracy = accuracies(
            self._objective, self._validation, self._phase.batch, self._recipe, self._options.device
        )
        self._close_epoch(accuracy)

    def _between_steps(self) -> None:
        if self._stop.asked:
            self._save()
            self._interrupt()
        if time.monotonic() - self._written >= self._options.checkpoint_s:
            self._save()

    def _step(self, pixels: Tensor, targets: Tensor) -> float:
        """Learn from one batch; returns its loss."""
        state, phase = self._state, self._phase
        torch.manual_seed(seed_of("step", self._recipe.seed, state.phase, state.epoch, state.step))
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(
                phase, state.epoch * self._feed.steps + state.step, self._feed.steps
            )
        pixels = placed(pixels, self._options.device, self._recipe.channels_last)
        targets = targets.to(self._options.device)
        with _precision(self._recipe, self._options.device):
            logits, reference = self._objective.logits(pixels)
        loss = self._objective.loss(logits, reference, targets)
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value}")
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if phase.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, phase.clip_norm)
        self.optimizer.step()
        return value

    def _close_epoch(self, accuracy: Mapping[str, float]) -> None:
        state = self._state
        mean = sum(accuracy.values()) / len(accuracy)
        best = state.best is None or mean > state.best.accuracy
        record = EpochRecord(
            phase=state.phase,
            train=self._phase.train,
            epoch=state.epoch + 1,
            loss=state.loss / state.samples,
            rate=self.optimizer.param_groups[0]["lr"],
            accuracy=accuracy,
            mean_accuracy=mean,
            best=best,
            seconds=state.seconds,
            images_per_second=state.samples / max(state.seconds, 1e-9),
        )
        self._check_finite()
        kept = state.best
        if best:
            weights = self._checkpoints.write("best", model_tensors(self._model))
            kept = Best(state.epoch, mean, weights)
        self._state = replace(
            state,
            epoch=state.epoch + 1,
            step=0,
            loss=0.0,
            samples=0,
            seconds=0.0,
            stale=0 if best else state.stale + 1,
            best=kept,
            history=(*state.history, record),
        )
        self._save()

    def _save(self) -> None:
        self._check_finite()
        tensors = {**model_tensors(self._model), **optimizer_tensors(self.optimizer)}
        self._state = self._checkpoints.save(self._state, tensors)
        self._written = time.monotonic()

    def _check_finite(self) -> None:
        for name, tensor in model_tensors(self._model).items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise self._diverged(f"{name} is not finite")

    def _diverged(self, what: str) -> EdgeRuntimeError:
        state = self._state
        return EdgeRuntimeError(
            f"{self._name}, epoch {state.epoch + 1}, step {state.step + 1}: {what}; the last "
            "checkpoint and the best weights are kept",
            remedy=f"Make phases.{state.phase}.rate smaller ({self._phase.rate:g} now) or set "
            "clip_norm, and give --restart or another --out",
        )

    def _interrupt(self) -> None:
        self._console.note(
            f"stopped in {self._name}, epoch {self._state.epoch + 1}; a checkpoint is written, and "
            "the same command goes on from it"
        )
        raise KeyboardInterrupt


class _Stop:
    """Ctrl-C as a question that the loop answers between two steps; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _ask(self, _: int, __: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None


def rate_at(phase: PhaseRecipe, step: int, steps: int) -> float:
    """The rate of a step: linear from 0 over the warm-up, then a cosine to its end.

    Args:
        phase: The phase.
        step: Steps of the phase so far.
        steps: Steps of an epoch.
    """
    warm, total = phase.warmup_epochs * steps, phase.epochs * steps
    if step < warm:
        return phase.rate * (step + 1) / (warm + 1)
    share = (step - warm) / max(1.0, total - warm)
    return phase.rate * (
        phase.final_rate + (1 - phase.final_rate) * (1 + math.cos(math.pi * share)) / 2
    )


def accuracies(
    measured: Objective | StagedModel,
    images: Images,
    batch: int,
    recipe: TrainingRecipe,
    device: torch.device,
) -> dict[str, float]:
    """Share of the images that each exit classifies rightly; the mode is eval afterwards.

    Args:
        measured: A phase's objective, in the training's precision; or the whole model, in float32.
        images: Labelled images.
        batch: Images at a time.
        recipe: Precision and memory format.
        device: Where it computes.
    """
    phase = isinstance(measured, Objective)
    (measured.model if isinstance(measured, Objective) else measured).eval()
    right: dict[str, int] = {}
    with torch.no_grad(), _precision(recipe, device) if phase else contextlib.nullcontext():
        for pixels, labels in images.in_order(batch):
            pixels, labels = placed(pixels, device, recipe.channels_last), labels.to(device)
            if isinstance(measured, Objective):
                named = dict(zip(measured.exits, measured.logits(pixels)[0], strict=True))
            else:
                named = measured(pixels)
            for name, logits in named.items():
                correct = int((logits.argmax(1) == labels).sum())
                right[name] = right.get(name, 0) + correct
    return {name: count / len(images) for name, count in right.items()}


def placed(pixels: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """Inputs on a device, in the memory format of the model."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return pixels.to(device, memory_format=layout)


@contextlib.contextmanager
def _precision(recipe: TrainingRecipe, device: torch.device) -> Iterator[None]:
    if recipe.amp is None:
        yield
        return
    with torch.autocast(device.type, torch.bfloat16):
        yield


def _optimizer(parameters: list[nn.Parameter], phase: PhaseRecipe) -> torch.optim.AdamW:
    """AdamW that decays weights, not biases and scales."""
    decayed = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [(decayed, phase.weight_decay), (others, 0.0)]
    return torch.optim.AdamW(
        [{"params": chosen, "weight_decay": decay} for chosen, decay in groups if chosen],
        lr=phase.rate,
        fused=True,
    )


def _said(record: EpochRecord, phase: PhaseRecipe) -> str:
    accuracy = ", ".join(f"{name} {100 * share:.2f} %" for name, share in record.accuracy.items())
    return (
        f"epoch {record.epoch}/{phase.epochs}: loss {record.loss:.4f}, {accuracy}"
        f"{' (best)' if record.best else ''}, {record.seconds:.0f} s, "
        f"{record.images_per_second:.0f} images/s"
    )
