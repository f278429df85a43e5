"""The emulated CUDA driver, one for the process."""

from collections.abc import Iterator

import pytest

from edge_runtime.backends.cuda import core
from tests.cuda_without_gpu import SUPPORTED, Emulated, NotEmulatedError, load


@pytest.fixture(scope="session")
def emulated_driver() -> Emulated:
    if not SUPPORTED:
        pytest.skip("the emulated CUDA driver exists for Linux on x86-64 and aarch64 only")
    try:
        driver = load()
    except NotEmulatedError as error:
        pytest.skip(f"no emulated CUDA driver: {error}")
    return driver


@pytest.fixture
def begun(emulated_driver: Emulated) -> Iterator[Emulated]:
    """The emulated driver as at the start of a process; other tests find no device."""
    emulated_driver.reset()
    core._loaded.clear()
    yield emulated_driver
    emulated_driver.reset()
    emulated_driver.set_device_count(0)


@pytest.fixture
def emulated(begun: Emulated) -> Iterator[Emulated]:
    """The emulated driver, used as a driver may be used."""
    yield begun
    assert not begun.problems()
