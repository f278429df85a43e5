"""Bundles that several modules of these tests read."""

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.manifest import Bundle
from engines.preprocess import PreprocessSpec


@pytest.fixture(scope="session")
def camera_images() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (4, 24, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def convolutional_bundle(
    tmp_path_factory: pytest.TempPathFactory, camera_images: np.ndarray
) -> Bundle:
    """Exported from torch, with preprocessing: image -> saver, two segments with heads."""
    pytest.importorskip("torch")
    from engines.export import export_stages
    from tests.engines import torch_models

    stages, exits = torch_models.convolutional()
    return export_stages(
        stages,
        exits,
        example=camera_images,
        classes=torch_models.CLASSES,
        preprocess=PreprocessSpec((16, 16), mean=(0.5,), std=(0.25,), crop=0.875),
        out=tmp_path_factory.mktemp("convolutional") / "a.bundle",
        name="convolutional",
        provenance={"seed": 0},
    )


@pytest.fixture(scope="session")
def transformer_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Exported from torch without preprocessing: two blocks, two tensors at every boundary."""
    torch = pytest.importorskip("torch")
    from engines.export import export_stages
    from tests.engines import torch_models

    stages, exits = torch_models.transformer()
    return export_stages(
        stages,
        exits,
        example=torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        classes=torch_models.CLASSES,
        out=tmp_path_factory.mktemp("transformer") / "a.bundle",
        name="transformer",
    )


def chain(bundle: Bundle, image: np.ndarray) -> dict[str, np.ndarray]:
    """Every tensor of a bundle, each stage at its first variant."""
    from engines.verify import run_stages

    models = {
        record.name: bundle.stage_model(record.name, bundle.precision(record.name, {}))
        for record in bundle.manifest.stages
    }
    return run_stages(bundle.cascade, models, image)


def folder_is_empty(folder: Path) -> bool:
    return list(folder.iterdir()) == []
