"""TensorRT parses and builds every stage of every example, at every precision."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edge_runtime.backends.tensorrt.keys import CAST_FIRST
from edge_runtime.cli import main
from edge_runtime.errors import EngineBuildError
from edge_runtime.manifest import Bundle
from engines.qdq_lint import lint
from engines.recipe import load_recipe
from tests.engines.classifiers import mobilenet, save
from tests.engines.test_mobilenets import DATA
from tests.engines.test_tensorrt_builds import build_all, build_stage
from tests.meta.repository import ROOT, repository_files

EXAMPLES = ROOT / "examples"
RECIPE = EXAMPLES / "imagenet_mobilenets" / "cascade.yaml"


def run(*arguments: Any) -> None:
    assert main([*map(str, arguments)]) == 0


def write_images(path: Path, *, side: int = 8, channels: int = 3) -> Path:
    """Digits of scikit-learn, each pixel enlarged to a square."""
    from sklearn.datasets import load_digits

    digits, pixel = load_digits(), np.ones((1, side // 8, side // 8), np.uint8)
    images = np.kron(np.rint(digits.images[:160] * (255 / 16)).astype(np.uint8), pixel)
    images = images[..., None].repeat(channels, axis=3)
    np.savez(path, images=images, labels=digits.target[:160])
    return path


def converted(bundle: Path, images: Path, folder: Path) -> Bundle:
    """The bundle with INT8 and FP16 variants, by the commands that make them."""
    int8, everything = folder / "int8.bundle", folder / "all.bundle"
    run("quantize", bundle, "--data", images, "--samples", 32, "--out", int8)
    data = ("--data", images, "--samples", 8)
    run("convert", int8, "--precision", "fp16", *data, "--out", everything)
    return Bundle.open(everything)


def digits(folder: Path) -> Bundle:
    """The committed bundle."""
    images = write_images(folder / "images.npz", channels=1)
    return converted(EXAMPLES / "digits" / "digits.bundle", images, folder)


def digits_vit(folder: Path) -> Bundle:
    """The committed bundle."""
    images = write_images(folder / "images.npz", channels=1)
    return converted(EXAMPLES / "digits_vit" / "digits_vit.bundle", images, folder)


def cifar10(folder: Path) -> Bundle:
    """The committed bundle, with digits as images: its photographs are not in the repository."""
    images = write_images(folder / "images.npz", side=32)
    return converted(EXAMPLES / "cifar10" / "cifar10.bundle", images, folder)


def imagenet_mobilenets(folder: Path) -> Bundle:
    """Its recipe on files of the same architectures and sizes, FP32 with random weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_SHARED", str(folder))
        (folder / "data" / "imagenet_mobilenets").mkdir(parents=True)
        for model in load_recipe(RECIPE).models:
            named = re.search(r"mobilenet_v(\d)_([\d.]+)_(\d+)", model.file)
            assert named is not None
            assert model.output.tensor is not None
            version, width, size = int(named[1]), float(named[2]), int(named[3])
            save(mobilenet(version, width, size, model.output.tensor), Path(model.file))
        run("export", RECIPE, "--out", folder / "fp32.bundle")
    return converted(folder / "fp32.bundle", write_images(folder / "images.npz"), folder)


#: Folder of an example -> what makes its bundle at every precision, without any download.
MAKERS: dict[str, Callable[[Path], Bundle]] = {
    "cifar10": cifar10,
    "digits": digits,
    "digits_vit": digits_vit,
    "imagenet_mobilenets": imagenet_mobilenets,
}


@pytest.fixture(scope="module", params=list(MAKERS))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Each example in turn."""
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


def test_no_example_is_left_out() -> None:
    paths = [Path(name).relative_to("examples") for name in repository_files("examples")]
    assert {path.parts[0] for path in paths if len(path.parts) > 1} == set(MAKERS)


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_stage_builds(tensorrt: ModuleType, bundle: Bundle, precision: str) -> None:
    build_all(bundle, precision)


def test_int8_stages_keep_the_rules(bundle: Bundle) -> None:
    for record in bundle.manifest.stages:
        if record.kind != "preprocess":
            assert lint(bundle.stage_model(record.name, "int8")) == ()


@pytest.mark.tensorrt
def test_of_the_pretrained_mobilenets_it_takes_the_preprocessing_only(
    tensorrt: ModuleType, tmp_path: Path
) -> None:
    """As docs/examples.md has it; `lint-qdq` names the very node that TensorRT stops at."""
    if not (DATA / "imagenet_mobilenets").is_dir():
        pytest.skip(f"no pretrained models in {DATA}: EDGE_SHARED names the folder that has data/")
    run("export", RECIPE, "--out", tmp_path / "a.bundle")
    pretrained = Bundle.open(tmp_path / "a.bundle")
    for record in pretrained.manifest.stages:
        if record.kind == "preprocess":
            assert build_stage(pretrained, record, CAST_FIRST)
            continue
        with pytest.raises(EngineBuildError, match="zero point is not supported") as refusal:
            build_stage(pretrained, record, "int8")
        found = lint(pretrained.stage_model(record.name, "int8"))
        assert {"signed", "symmetric"} <= {violation.rule for violation in found}
        asymmetric = [violation.node for violation in found if violation.rule == "symmetric"]
        assert any(node in str(refusal.value) for node in asymmetric)
