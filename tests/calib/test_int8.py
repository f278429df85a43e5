"""INT8 ranges of a bundle: which images, what is counted, what is refused."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from calib.int8 import LEAST_SAMPLES, Ranges, choose_images, histograms, ranges_of
from edge_runtime import Bundle, CalibrationError, ConfigError, ManifestError
from edge_runtime.dataset import ImageDataset
from engines.parts import Part, bundle_parts
from tests.toys import CLASSES, toy_bundle, toy_images


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return toy_bundle(tmp_path_factory.mktemp("toy") / "toy.bundle")


def pictures(count: int, *, seed: int = 0, size: int = 16) -> ImageDataset:
    """Smooth gradients with a little noise: neighbours resemble each other."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, size)[None, None, :, None]
    images = ramp + random.integers(0, 50, (count, size, size, 3))
    return ImageDataset.from_arrays(images.astype(np.uint8), np.arange(count) % 4, CLASSES)


def parts(bundle: Bundle) -> list[Part]:
    return bundle_parts(bundle, None, "int8")


def feeds(*batches: np.ndarray) -> list[dict[str, np.ndarray]]:
    return [{"image": batch} for batch in batches]


class TestImages:
    """Balanced, enough, real, and used nowhere else."""

    def test_they_are_balanced_and_the_same_every_time(self) -> None:
        labels = np.array([0] * 100 + [1] * 20 + [2] * 5 + [3] * 50)
        images = np.random.default_rng(0).integers(0, 256, (175, 4, 4, 3)).astype(np.uint8)
        data = ImageDataset.from_arrays(images, labels, CLASSES)
        chosen = data.balanced(40, seed=3)
        counts = np.bincount(chosen.labels)
        assert counts[2] == 5
        assert counts.sum() == 40
        assert counts[[0, 1, 3]].max() - counts[[0, 1, 3]].min() <= 1
        assert chosen.hash == data.balanced(40, seed=3).hash
        assert chosen.hash != data.balanced(40, seed=4).hash
        assert len(data.balanced(1000, seed=0)) == 175
        with pytest.raises(ConfigError, match="samples"):
            data.balanced(0, seed=0)

    def test_too_few_are_refused(self) -> None:
        with pytest.raises(CalibrationError, match=f"got 31, expected >= {LEAST_SAMPLES}"):
            choose_images(pictures(31), samples=512, seed=0)
        with pytest.raises(CalibrationError, match="got 8"):
            choose_images(pictures(100), samples=8, seed=0)
        assert len(choose_images(pictures(40), samples=512, seed=0)) == 40

    def test_noise_is_refused(self) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3)).astype(np.uint8)
        data = ImageDataset.from_arrays(noise, np.arange(64) % 4, CLASSES)
        with pytest.raises(CalibrationError, match="look like noise"):
            choose_images(data, samples=64, seed=0)

    def test_constant_images_are_refused_too(self) -> None:
        grey = np.full((64, 16, 16, 3), 128, np.uint8)
        data = ImageDataset.from_arrays(grey, np.arange(64) % 4, CLASSES)
        with pytest.raises(CalibrationError, match="look like noise"):
            choose_images(data, samples=64, seed=0)

    def test_images_that_are_used_elsewhere_are_refused(self) -> None:
        data, other = pictures(64), pictures(10, seed=9)
        assert choose_images(data, samples=64, seed=0, used=[("the test data", other)])
        with pytest.raises(CalibrationError, match="that are in the test data too: got 64"):
            choose_images(data, samples=64, seed=0, used=[("the test data", data)])

    def test_a_few_unreadable_files_are_left_out_and_named(self, tmp_path: Path, caplog) -> None:
        data = self.folder(tmp_path, broken=1)
        chosen = choose_images(data, samples=64, seed=0)
        assert len(chosen) == 63
        assert "1 of 64 calibration images are left out, the first: the image" in caplog.text

    def test_many_unreadable_files_are_refused_and_named(self, tmp_path: Path) -> None:
        data = self.folder(tmp_path, broken=5)
        with pytest.raises(CalibrationError, match=r"calibration images can't be used.*\.png"):
            choose_images(data, samples=64, seed=0)

    def test_a_header_that_can_not_be_read_is_no_reason_to_give_up(self, tmp_path: Path) -> None:
        self.folder(tmp_path, broken=1)
        classes = sorted(path.name for path in tmp_path.iterdir())
        first = min(tmp_path.glob("*/*.png"))
        first.write_bytes(b"no image")
        data = ImageDataset.open(tmp_path, classes, channels=1, skip_unreadable=True)
        assert len(data) == 64
        with pytest.raises(ConfigError, match=f"{first} can't be read"):
            ImageDataset.open(tmp_path, classes, channels=1)

    @staticmethod
    def folder(path: Path, *, broken: int) -> ImageDataset:
        from PIL import Image

        source = pictures(64)
        for index in range(64):
            file = path / CLASSES[int(source.labels[index])] / f"{index}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(source.image(index)).save(file)
        data = ImageDataset.open(path, CLASSES)
        for file in sorted(path.glob("*/*.png"))[:broken]:
            file.write_bytes(file.read_bytes()[:60])
        return data


class TestHistograms:
    """Every value that a stage computes is counted."""

    TENSORS: ClassVar = {
        "segment1": ("pixels", "product", "features"),
        "segment2": ("features", "deep"),
    }

    def test_they_hold_what_the_stages_compute(self, bundle: Bundle) -> None:
        from engines.verify import run_stages

        images = toy_images(20)
        found = histograms(parts(bundle), feeds(images[:8], images[8:]), self.TENSORS)
        models = {s.name: bundle.stage_model(s.name, "fp32") for s in bundle.cascade.stages}
        known = run_stages(bundle.cascade, models, images)
        assert found["segment1"]["features"].largest == pytest.approx(
            np.abs(known["features"]).max()
        )
        assert found["segment2"]["deep"].counts.sum() == known["deep"].size
        assert found["segment1"]["pixels"].counts.sum() == known["pixels"].size
        assert found["segment1"]["product"].counts.sum() == known["features"].size

    def test_batches_do_not_matter(self, bundle: Bundle) -> None:
        images = toy_images(20)
        one = histograms(parts(bundle), feeds(images), self.TENSORS)
        alone = feeds(*(images[i : i + 1] for i in range(20)))
        many = histograms(parts(bundle), alone, self.TENSORS)
        for method in ("minmax", "percentile"):
            a, b = (ranges_of(h, method, {}).stages for h in (one, many))
            for stage in a:
                for tensor in a[stage]:
                    assert a[stage][tensor] == pytest.approx(b[stage][tensor], rel=2e-3)

    def test_memory_does_not_grow_with_the_number_of_images(self, bundle: Bundle) -> None:
        def peak(count: int) -> int:
            batches = ({"image": toy_images(8, seed=i)} for i in range(count // 8))
            tracemalloc.start()
            histograms(parts(bundle), batches, self.TENSORS)
            found = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return found

        peak(64)  # what is made once
        assert peak(1600) < 1.1 * peak(160)

    def test_no_image_is_refused(self, bundle: Bundle) -> None:
        with pytest.raises(CalibrationError, match="no calibration image"):
            histograms(parts(bundle), [], self.TENSORS)


class TestRangesFile:
    """Ranges are used again only for what they were made for."""

    EXPECTED: ClassVar = {"bundle": "b" * 64, "data": "d" * 64, "samples": 64, "seed": 0}

    def made(self) -> Ranges:
        return Ranges("mse", {"saver": {"x": 1.5}}, self.EXPECTED)

    def test_a_round_trip(self, tmp_path: Path) -> None:
        file = tmp_path / "ranges.json"
        self.made().write(file)
        assert Ranges.read(file, self.EXPECTED, "mse") == self.made()

    @pytest.mark.parametrize(
        ("name", "value"), [("bundle", "c" * 64), ("data", "e"), ("samples", 65), ("seed", 1)]
    )
    def test_a_stale_file_is_refused(self, tmp_path: Path, name: str, value: object) -> None:
        file = tmp_path / "ranges.json"
        self.made().write(file)
        with pytest.raises(ConfigError, match=f"are stale: {name}: got .*Delete the file"):
            Ranges.read(file, {**self.EXPECTED, name: value}, "mse")

    def test_another_method_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "ranges.json"
        self.made().write(file)
        with pytest.raises(ConfigError, match="stale: method: got mse, expected entropy"):
            Ranges.read(file, self.EXPECTED, "entropy")

    def test_a_file_that_is_no_ranges(self, tmp_path: Path) -> None:
        file = tmp_path / "ranges.json"
        file.write_text('{"method": "mse"}')
        with pytest.raises(ManifestError, match="INT8 ranges"):
            Ranges.read(file, self.EXPECTED, "mse")
