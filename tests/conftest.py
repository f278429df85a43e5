"""Fixtures for all tests."""

import gc
import signal
from types import ModuleType

import pytest

from tests import tensorrt_without_gpu


@pytest.fixture(scope="session")
def tensorrt() -> ModuleType:
    """TensorRT's parser and builder, with or without a GPU."""
    if not tensorrt_without_gpu.SUPPORTED:
        pytest.skip("TensorRT's builder without a GPU exists for Linux on x86-64 only")
    return tensorrt_without_gpu.load()


@pytest.fixture(scope="module", autouse=True)
def short_garbage_collections() -> None:
    """Collections pass over what earlier modules left alive, of torch's exporter above all.

    They took a second each otherwise, and some tests collect after every call.
    """
    gc.collect()
    gc.freeze()


def pytest_configure() -> None:
    """Let Ctrl-C mean what it means to users: a shell's background jobs begin with it ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
