"""Backbones by name: our own, and those of timm, with weights from a file.

Nothing is downloaded: a model begins with random weights, or with those of a file.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from edge_runtime import schema
from edge_runtime.errors import ConfigError
from engines.eval_mode import evaluating
from engines.models.residual import Residual, ResidualOptions
from engines.models.weights import load_weights
from engines.timm_package import timm
from engines.torch_exporter import MODULE_ERRORS

#: Channels, height and width, in pixels.
Image = tuple[int, int, int]

_FROM_DATA = "The data and the image say it"
_FROM_FILE = "Weights come from a file: weights: model.safetensors"
_ONE_TENSOR = "A backbone is a classifier: one image tensor -> logits"
#: Options of timm that are not for a recipe, and why.
_RESERVED = {
    **dict.fromkeys(("num_classes", "in_chans", "img_size"), _FROM_DATA),
    **dict.fromkeys(
        (
            "pretrained",
            "pretrained_cfg",
            "pretrained_cfg_overlay",
            "pretrained_strict",
            "checkpoint_path",
            "cache_dir",
        ),
        _FROM_FILE,
    ),
    **dict.fromkeys(
        ("features_only", "out_indices", "scriptable", "exportable", "no_jit"), _ONE_TENSOR
    ),
}
_UNEXPECTED = re.compile(r"(?:(\w+)\.)?(\w+)\(\) got an unexpected keyword argument '(\w+)'")


@dataclass(frozen=True)
class BackboneRecipe:
    """A backbone as it is asked for.

    Attributes:
        model: Name of a model of ours ("residual") or of timm ("vit_base_patch16_224").
        options: Of that model. What the data say (classes, channels, image size) is not among them.
        weights: File to begin with, .safetensors, .pth, .pt or .bin; None for random weights.
        new_head: Whether the file's classifier is left out, as it must be for other classes.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    new_head: bool = False

    def __post_init__(self) -> None:
        """Refuse a head that replaces nothing."""
        if self.new_head and self.weights is None:
            raise ConfigError(
                "new_head without weights", remedy="Without a file every part is new: leave it out"
            )


def build_backbone(recipe: BackboneRecipe, classes: int, image: Image) -> nn.Module:
    """Make a backbone, and try it on one image.

    Args:
        recipe: What to make.
        classes: Number of logits, at least 2.
        image: Channels, height and width of its input, in pixels.

    Returns:
        A classifier: (batch, channels, height, width) float -> logits (batch, classes).

    Raises:
        ConfigError: No model has the name, an option is unknown or can't be, the image does not fit
            the model, or the weights don't.
        BackendUnavailable: timm or safetensors is not installed.
    """
    if classes < 2:
        raise ConfigError("classes of a backbone", got=classes, expected=">= 2")
    if len(image) != 3 or min(image) < 1:
        raise ConfigError(
            "image of a backbone", got=list(image), expected="[channels, height, width], each >= 1"
        )
    make = _OWN.get(recipe.model, _timm_model)
    model = make(recipe, classes, image)
    _check_image(recipe.model, model, image)
    _check_answer(recipe.model, model, classes, image)
    if recipe.weights is not None:
        head = tuple(classifier_modules(model))
        load_weights(model, Path(recipe.weights), head=head, new_head=recipe.new_head)
    return model


def classifier_modules(model: nn.Module) -> dict[str, nn.Module]:
    """What makes the logits: as the model says (`get_classifier`), else its last linear layer.

    Returns:
        Name -> module; several where the model has several heads.
    """
    ask = getattr(model, "get_classifier", None)
    said = ask() if callable(ask) else None
    modules = dict(model.named_modules())
    if said is None:
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        return {name: modules[name] for name in linear[-1:]}
    heads = said if isinstance(said, tuple | list) else (said,)
    return {
        name: module
        for name, module in modules.items()
        if name and any(module is head for head in heads)
    }


def _residual(recipe: BackboneRecipe, classes: int, image: Image) -> nn.Module:
    options = schema.read(ResidualOptions, recipe.options, f"backbone {recipe.model!r}: options")
    return Residual(classes, image[0], options)


_OWN: dict[str, Callable[[BackboneRecipe, int, Image], nn.Module]] = {"residual": _residual}


def _timm_model(recipe: BackboneRecipe, classes: int, image: Image) -> nn.Module:
    package = timm()
    if not package.is_model(recipe.model):
        names = [*_OWN, *package.list_models()]
        near = difflib.get_close_matches(recipe.model, names, n=3, cutoff=0.6)
        raise ConfigError(
            f"unknown backbone {recipe.model!r}",
            remedy=(f"Did you mean {' or '.join(map(repr, near))}? " if near else "")
            + f"Valid: {', '.join(_OWN)}, and the {len(names) - len(_OWN)} of timm.list_models()",
        )
    for name in recipe.options:
        if name in _RESERVED:
            raise ConfigError(f"backbone {recipe.model!r}: option {name!r}", remedy=_RESERVED[name])
    channels, height, width = image
    options = {**recipe.options, "num_classes": classes, "in_chans": channels}
    size = height if height == width else (height, width)
    try:
        try:
            return _create(package, recipe.model, {**options, "img_size": size})
        except TypeError as error:
            unexpected = _UNEXPECTED.search(str(error))
            if unexpected is None or unexpected[3] != "img_size":
                raise
            return _create(package, recipe.model, options)
    except MODULE_ERRORS as error:
        raise _refused(package, recipe.model, error) from error


def _create(package: ModuleType, name: str, options: Mapping[str, Any]) -> nn.Module:
    model: nn.Module = package.create_model(name, pretrained=False, **options)
    return model


def _refused(package: ModuleType, name: str, error: Exception) -> ConfigError:
    """The error for a model that timm does not make."""
    unexpected = _UNEXPECTED.search(str(error))
    if isinstance(error, TypeError) and unexpected is not None:
        option = unexpected[3]
        valid = _options(package, name, unexpected[1] or unexpected[2])
        return ConfigError(
            f"backbone {name!r}: unknown option {option!r}",
            remedy=schema.nearest(option, valid) if valid else None,
        )
    return ConfigError(f"backbone {name!r}: timm can't make it with these options: {_first(error)}")


def _options(package: ModuleType, name: str, called: str) -> set[str]:
    """Names of what the class or function that timm calls for a model can be asked for."""
    module = sys.modules[package.model_entrypoint(name).__module__]
    try:
        parameters = inspect.signature(getattr(module, called)).parameters.values()
    except (AttributeError, TypeError, ValueError):
        return set()
    named = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
    return named - {*_RESERVED, "self", "variant"}


def _check_image(name: str, model: nn.Module, image: Image) -> None:
    """Refuse an image that is no whole number of patches: some models would drop its border."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if not isinstance(patch, tuple) or len(patch) != 2:
        return
    if any(side % of for side, of in zip(image[1:], patch, strict=True)):
        raise ConfigError(
            f"backbone {name!r}: image",
            got=f"{image[1]} x {image[2]} pixels",
            expected=f"multiples of the patch, {patch[0]} x {patch[1]}",
        )


def _check_answer(name: str, model: nn.Module, classes: int, image: Image) -> None:
    """Run the model on one image."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with evaluating(model), torch.no_grad():
            answer = model(torch.zeros(1, *image, device=device))
    except MODULE_ERRORS as error:
        size = " x ".join(map(str, image))
        raise ConfigError(
            f"backbone {name!r}: it fails on an image of {size}: {_first(error)}"
        ) from error
    got = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
    if got != [1, classes]:
        raise ConfigError(
            f"backbone {name!r}: its answer to one image", got=got, expected=[1, classes]
        )


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
