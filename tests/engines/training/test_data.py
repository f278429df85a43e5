"""The data of a training: what is opened and refused, and what the models are given."""

import struct
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from edge_runtime.backends.onnxrt import new_session  # noqa: E402
from edge_runtime.dataset import ImageDataset  # noqa: E402
from edge_runtime.errors import ConfigError  # noqa: E402
from engines.preprocess import PreprocessSpec, camera_image, preprocess_model  # noqa: E402
from engines.training.augment import moved  # noqa: E402
from engines.training.config import load_training  # noqa: E402
from engines.training.data import Images, open_data, save_arrays  # noqa: E402
from engines.training.draws import kept_generators, seed_generators  # noqa: E402
from engines.training.feed import Feed  # noqa: E402
from tests.engines.training.trainings import DIGITS, write  # noqa: E402

pytestmark = pytest.mark.torch


def dataset(count: int = 12, size: tuple[int, int] = (10, 12)) -> ImageDataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    return ImageDataset.from_arrays(images, np.arange(count) % 3, "abc")


def test_models_are_given_what_the_deployed_preprocessing_makes() -> None:
    data = dataset()
    spec = PreprocessSpec((8, 8), mean=(0.4, 0.5, 0.6), std=(0.2,), crop=0.875)
    images = Images(data, spec)
    model = preprocess_model(spec, camera_image(3), "pixels")  # for images of any size
    session = new_session(model.SerializeToString())
    camera = np.stack([data.image(i) for i in range(len(data))])
    (expected,) = session.run(None, {"image": camera})
    assert np.array_equal(images.ready().permute(0, 3, 1, 2).numpy(), expected)
    batches = list(images.in_order(5))
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    assert np.array_equal(torch.cat([pixels for pixels, _ in batches]).numpy(), expected)
    unkept = Images(data, spec, limit=1)
    assert unkept.ready() is None
    assert np.array_equal(torch.cat([p for p, _ in unkept.in_order(5)]).numpy(), expected)


def test_a_moved_image_is_mirrored_and_shifted_with_its_edges_reflected() -> None:
    images = torch.rand(3, 6, 7, 2, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([2, 0, 1, 0, 2, 1] * 40)
    made = moved(images, rows, True, 2, torch.Generator().manual_seed(1))
    assert made.shape == (240, 2, 6, 7)
    padded = torch.nn.functional.pad(images.permute(0, 3, 1, 2), (2, 2, 2, 2), mode="reflect")
    seen = set()
    for row, one in zip(rows, made, strict=True):
        for flip in (False, True):
            for down in range(5):
                for right in range(5):
                    window = padded[row][:, down : down + 6, right : right + 7]
                    if torch.equal(one, window.flip(2) if flip else window):
                        seen.add((flip, down, right))
                        break
    assert len(seen) > 40  # of the 50 that there are


def test_an_epoch_has_every_image_once_in_an_order_of_its_own(tmp_path) -> None:
    recipe = load_training(write(tmp_path), ["phases.0.batch=100"])
    training, _ = open_data(recipe)
    images = Images(training, recipe.input.spec(1))
    feed = Feed(images, recipe.phases[0], 0, seed=0, workers=0)
    epochs = [list(feed.batches(epoch)) for epoch in (0, 1, 0)]
    assert feed.steps == len(epochs[0]) == 4
    known = sorted(row.numpy().tobytes() for row in images.ready().permute(0, 3, 1, 2))
    orders = []
    for batches in epochs:
        orders.append([one.numpy().tobytes() for pixels, _ in batches for one in pixels])
        assert sorted(orders[-1]) == known
    assert orders[0] == orders[2] != orders[1]
    later = list(feed.batches(0, start=3))
    assert len(later) == 1 and torch.equal(later[0][0], epochs[0][3][0])


def test_mixed_targets_are_shares_and_an_odd_last_batch_loses_an_image(tmp_path) -> None:
    recipe = load_training(
        write(tmp_path), ["phases.0.batch=50", "phases.0.augment={mixup: 0.8, cutmix: 1.0}"]
    )
    training, _ = open_data(recipe)
    feed = Feed(Images(training, recipe.input.spec(1)), recipe.phases[0], 0, 0, 0)
    sizes = []
    for pixels, targets in feed.batches(0):
        assert targets.shape == (len(pixels), 10)
        assert torch.allclose(targets.sum(1), torch.ones(len(pixels)))
        sizes.append(len(pixels))
    assert len(training) == 359 and sizes == [50] * 7 + [8]


def test_smoothed_targets_are_shares(tmp_path) -> None:
    recipe = load_training(write(tmp_path), ["phases.0.label_smoothing=0.2"])
    training, _ = open_data(recipe)
    feed = Feed(Images(training, recipe.input.spec(1)), recipe.phases[0], 0, 0, 0)
    _, targets = next(feed.batches(0))
    assert torch.allclose(targets.max(1).values, torch.tensor(0.82))
    assert torch.allclose(targets.min(1).values, torch.tensor(0.02))


def test_the_global_generators_get_their_state_back() -> None:
    import random

    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    with kept_generators():
        seed_generators(2**40 + 1)
        assert random.getstate() != before[0]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002


def test_a_share_for_validation_is_kept_out_of_training(tmp_path) -> None:
    training, validation = open_data(load_training(write(tmp_path)))
    whole = ImageDataset.open(DIGITS, list("0123456789"), channels=1)
    assert len(training) + len(validation) == len(whole)
    save_arrays(validation, tmp_path / "validation.npz")
    again = ImageDataset.open(tmp_path / "validation.npz", list("0123456789"), channels=1)
    assert len(again) == 90
    assert np.array_equal(again.labels, validation.labels)
    assert all(np.array_equal(again.image(i), validation.image(i)) for i in range(90))


def save(path: Path, labels: list[int], size: int = 8) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (len(labels), size, size), dtype=np.uint8)
    np.savez(path, images=images, labels=np.array(labels))
    return path


def test_too_few_images_of_a_class_are_refused(tmp_path) -> None:
    path = save(tmp_path / "few.npz", [0, 0, 0, 1, 1])
    config = write(tmp_path)
    source = f"data.train={{path: {path}}}"
    with pytest.raises(ConfigError) as caught:
        open_data(load_training(config, [source, "classes=2"]))
    assert str(caught.value).startswith(
        "class '1': images for training and validation: got 2, expected at least 3. Add"
    )
    with pytest.raises(ConfigError, match=r"class '2': images for .* got 0, expected at least 3"):
        open_data(load_training(config, [source, "classes=3"]))
    own = save(tmp_path / "own.npz", [0, 0, 1, 1])
    lacking = f"data.validation={{path: {save(tmp_path / 'lacking.npz', [0, 1, 2])}}}"
    with pytest.raises(ConfigError, match=r"class '2': images for training: got 0, .* least 2"):
        open_data(load_training(config, [f"data.train={{path: {own}}}", lacking, "classes=3"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train={path: nowhere}", "data: train: the data "),
        ("classes=9", "label of a sample: got 9, expected 0..8"),
        ("data.image.channels=3", "images: got shape (449, 8, 8"),
        ("data.train={torchvision: CIFAR10, root: nowhere}", "CIFAR10 in "),
    ],
)
def test_data_that_do_not_fit_are_refused(tmp_path, override, message) -> None:
    with pytest.raises(ConfigError) as caught:
        open_data(load_training(write(tmp_path), [override]))
    assert message in str(caught.value)


def test_training_and_validation_of_different_sizes_are_refused(tmp_path) -> None:
    other = save(tmp_path / "other.npz", list(range(10)), size=9)
    overrides = [f"data.validation={{path: {other}}}", "data.image.size=null"]
    with pytest.raises(ConfigError, match=r"differ in size: got \(8, 8\) and \(9, 9\)"):
        open_data(load_training(write(tmp_path), overrides))


def test_a_data_set_of_torchvision_is_read_without_download(tmp_path) -> None:
    raw = tmp_path / "sets" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("train", "t10k"):
        images = rng.integers(0, 256, (100, 28, 28), dtype=np.uint8)
        header = struct.pack(">iiii", 0x803, 100, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = (np.arange(100) % 10).astype(np.uint8)
        header = struct.pack(">ii", 0x801, 100)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
        if name == "train":
            expected = images
    recipe = load_training(
        write(tmp_path),
        ["data.train={torchvision: MNIST, root: sets}", "data.image.size=[28, 28]"],
    )
    training, validation = open_data(recipe)
    assert (len(training), len(validation)) == (80, 20)
    pixels = {image.tobytes() for image in expected}
    assert all(training.image(i).tobytes() in pixels for i in range(80))
    with pytest.raises(ConfigError, match=r"images of MNIST: got size \[28, 28\], 1 channel"):
        open_data(load_training(write(tmp_path), ["data.train={torchvision: MNIST, root: sets}"]))
