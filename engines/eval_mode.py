"""Eval mode for as long as a torch model is looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules in eval mode; each of their submodules gets its own mode back."""
    modes = {inner: inner.training for module in modules for inner in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for inner, training in modes.items():
            inner.train(training)  # parents first; some drop there what they kept of weights
