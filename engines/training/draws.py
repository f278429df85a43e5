"""Random draws that depend on what they are for, never on what was drawn before."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np


def seed_of(*what: int | str) -> int:
    """A seed below 2^63 that stands for `what`, the same on every machine."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Give Python's and NumPy's global generators, which timm draws from, their state back."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def seed_generators(seed: int) -> None:
    """Seed Python's and NumPy's global generators; within `kept_generators`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
