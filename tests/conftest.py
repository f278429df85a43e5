"""Fixtures for all tests."""

from types import ModuleType

import pytest

from tests import tensorrt_without_gpu


@pytest.fixture(scope="session")
def tensorrt() -> ModuleType:
    """TensorRT's parser and builder, with or without a GPU."""
    if not tensorrt_without_gpu.SUPPORTED:
        pytest.skip("TensorRT's builder without a GPU exists for Linux on x86-64 only")
    return tensorrt_without_gpu.load()
