"""Weights from files of others: safetensors, or torch's format without what runs code.

A file is loaded whole or not at all: a name too many or too few, or another shape, is an error that
lists them. The one exception is asked for by name: a classifier for other classes is left out.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from edge_runtime.errors import ConfigError, missing_package

_TORCH = (".pth", ".pt", ".bin")
_SAFE = ".safetensors"
#: Under which training scripts put the weights beside the state of their optimizer.
_NESTED = ("state_dict", "model")
#: What wrappers for several GPUs and for compiling put before every name.
_WRAPPERS = ("module.", "_orig_mod.")
#: How torch says that a file names a class or a function that it does not allow.
_OBJECTS = ("GLOBAL", "Can only")
#: A message lists this many names of each kind.
_SHOWN = 4


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read named tensors onto the CPU.

    Args:
        path: A .safetensors file, or one that `torch.save` wrote (.pth, .pt, .bin): weights by
            name, or a mapping that has them as "state_dict" or "model".

    Returns:
        Name -> tensor, names without what a wrapper put before all of them.

    Raises:
        ConfigError: The file is missing, damaged, of another kind, or holds something else.
        BackendUnavailable: safetensors is not installed.
    """
    if not path.is_file():
        raise ConfigError(f"weights {path}: there is no such file")
    if path.suffix == _SAFE:
        return _unwrapped(_read_safetensors(path))
    if path.suffix not in _TORCH:
        raise ConfigError(
            f"weights {path}: kind of file",
            got=repr(path.suffix),
            expected=" or ".join((_SAFE, *_TORCH)),
        )
    loaded = _read_torch(path)
    for key in ("", *_NESTED):
        found = loaded.get(key) if key and isinstance(loaded, Mapping) else loaded
        if _is_state(found):
            return _unwrapped(found)
    keys = [str(key) for key in loaded] if isinstance(loaded, Mapping) else []
    raise ConfigError(
        f"weights {path}: they hold no tensors by name",
        got=_some(keys) if keys else type(loaded).__name__,
        expected=f"name -> tensor, or that under {' or '.join(map(repr, _NESTED))}",
    )


def load_weights(
    model: nn.Module, path: Path, *, head: Sequence[str] = (), new_head: bool = False
) -> None:
    """Load weights into a model, all of them.

    Args:
        model: It gets the values, in its own dtype.
        path: As for `read_weights`.
        head: Names of the modules that make the logits.
        new_head: Whether these keep what they have, whatever the file says of them.

    Raises:
        ConfigError: As for `read_weights`, or the weights are not those of the model.
        BackendUnavailable: safetensors is not installed.
    """
    have = read_weights(path)
    want = model.state_dict()
    of_head = {n for n in (*have, *want) if any(n.startswith(f"{name}.") for name in head)}
    skipped = of_head if new_head else set()
    missing = [name for name in want if name not in have and name not in skipped]
    unexpected = [name for name in have if name not in want and name not in skipped]
    both = [name for name in want if name in have and name not in skipped]
    other = [name for name in both if have[name].shape != want[name].shape]
    if missing or unexpected or other:
        shapes = [
            f"{name} {tuple(have[name].shape)} instead of {tuple(want[name].shape)}"
            for name in other
        ]
        only_head = of_head.issuperset((*missing, *unexpected, *other))
        raise ConfigError(
            f"weights {path}: they are not those of the model",
            got="; ".join(
                f"{len(names)} {kind}: {_some(names)}"
                for kind, names in (
                    ("missing", missing),
                    ("unexpected", unexpected),
                    ("of another shape", shapes),
                )
                if names
            ),
            remedy="new_head: true leaves out the file's classifier" if only_head else None,
        )
    model.load_state_dict({name: have[name] for name in both}, strict=False)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise missing_package("safetensors", "train") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text advises to load it without the check.
        if not any(sign in str(error) for sign in _OBJECTS):
            raise ConfigError(
                f"weights {path} can't be read: they are not what torch.save writes of tensors",
                remedy="Restore the file, or convert it to .safetensors where it was made",
            ) from error
        raise ConfigError(
            f"weights {path}: besides tensors they hold objects, whose loading can run any code",
            remedy="Convert them to .safetensors, if you trust where they come from",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ConfigError:
    first = (str(error).strip().splitlines() or [""])[0]
    return ConfigError(
        f"weights {path} can't be read: {type(error).__name__}: {first}"[:300],
        remedy="Restore the file or download it again",
    )


def _is_state(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without a wrapper's part of the names."""
    found = dict(state)
    for _ in range(2):
        for wrapper in _WRAPPERS:
            if found and all(name.startswith(wrapper) for name in found):
                found = {name.removeprefix(wrapper): tensor for name, tensor in found.items()}
    return found


def _some(names: Collection[str]) -> str:
    """The first few names."""
    shown = ", ".join([*names][:_SHOWN])
    return f"{shown}, ..." if len(names) > _SHOWN else shown
