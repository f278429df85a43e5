"""The example of three pretrained ImageNet classifiers, where their files are at hand."""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.backends.onnxrt import new_session
from edge_runtime.manifest import Bundle
from engines.import_onnx import build, load_recipe
from engines.one_piece import one_piece
from tests.engines.conftest import chain

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("EDGE_SHARED") or ROOT.parent / "shared")
DATA = SHARED / "data"

#: Photographs that are looked at; the accuracies below are of these.
PHOTOGRAPHS = 100


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    if not (DATA / "imagenet_mobilenets").is_dir():
        pytest.skip(f"no pretrained models in {DATA}: EDGE_SHARED names the folder that has data/")
    recipe = load_recipe(ROOT / "examples/imagenet_mobilenets/cascade.yaml")
    return build(recipe, tmp_path_factory.mktemp("mobilenets") / "a.bundle")


def photographs() -> Iterator[tuple[int, np.ndarray]]:
    """Every sixth photograph with its class."""
    from PIL import Image

    file = DATA / "imagenet_sample_600.tar"
    if not file.is_file():
        pytest.skip(f"no photographs in {DATA}: EDGE_SHARED names the folder that has data/")
    with tarfile.open(file) as archive:
        members = [m for m in archive if m.isfile() and "/" in m.name]
        for member in members[:: len(members) // PHOTOGRAPHS][:PHOTOGRAPHS]:
            stream = archive.extractfile(member)
            assert stream is not None
            photograph = Image.open(io.BytesIO(stream.read())).convert("RGB")
            yield int(member.name.split("/")[-2].split("_")[0]), np.asarray(photograph)[None]


def test_the_files_take_any_batch_and_verify(bundle: Bundle) -> None:
    provenance = bundle.manifest.provenance
    batches = {model["name"]: model["batch"] for model in provenance["models"]}
    assert set(batches) == {"small", "middle", "large"}
    assert set(batches.values()) == {"fixed 1 in the file, made symbolic and checked"}
    errors = provenance["verification"]["worst_relative_error"]
    assert all(errors[name] <= 1e-4 for name in batches)
    assert all(list(bundle.record(name).variants) == ["int8"] for name in batches)


def test_one_piece_equals_the_stages_and_a_batch_its_samples(bundle: Bundle) -> None:
    image = np.random.default_rng(0).integers(0, 256, (2, 256, 341, 3), dtype=np.uint8)
    tensors = chain(bundle, image)
    for exit_ in bundle.cascade.exits:
        session = new_session(one_piece(bundle, exit_.name))
        (whole,) = session.run(None, {"image": image})
        singles = [session.run(None, {"image": image[i : i + 1]})[0][0] for i in range(2)]
        want = tensors[exit_.logits]
        np.testing.assert_allclose(whole, want, atol=1e-4 * np.abs(want).max())
        np.testing.assert_allclose(singles, want, atol=1e-4 * np.abs(want).max())


def test_accuracy_on_photographs(bundle: Bundle) -> None:
    """Preprocessing, background class and labels are right, or these would be near 0."""
    labels, answers = [], []
    sessions = {
        record.name: new_session(bundle.stage_model(record.name, next(iter(record.variants))))
        for record in bundle.manifest.stages
    }
    for label, photograph in photographs():
        known = {"image": photograph}
        for record in bundle.manifest.stages:
            feeds = {spec.name: known[spec.name] for spec in record.inputs}
            known[record.outputs[0].name] = sessions[record.name].run(None, feeds)[0]
        labels.append(label)
        answers.append([int(known[e.logits].argmax()) for e in bundle.cascade.exits])
    accuracy = (np.array(answers) == np.array(labels)[:, None]).mean(axis=0)
    assert len(labels) == PHOTOGRAPHS
    # 46.8, 68.0 and 87.8 % on all 600; a standard error is 5 points at most here.
    np.testing.assert_allclose(accuracy, [0.47, 0.68, 0.88], atol=0.12)
