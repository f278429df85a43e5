"""Labelled images: folders and npz, what is refused, hashes, and divisions without overlap."""

import builtins
import io
import itertools
import logging
import os
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from edge_runtime.dataset import ImageDataset, overlap, parse_part, parse_size
from edge_runtime.errors import BackendUnavailable, ConfigError, EdgeRuntimeError
from tests.edge_runtime.bundles import refused

CLASSES = ("ant", "bee", "cat")


def pixels(height: int = 6, width: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels)).astype(np.uint8)


def save(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(path, **options)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two images of each class, lossless, 6 x 8."""
    root = tmp_path / "data"
    for label, name in enumerate(CLASSES):
        for number in range(2):
            save(root / name / f"{number}.png", pixels(seed=2 * label + number))
    return root


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    images = np.stack([pixels(seed=i) for i in range(6)])
    return {"images": images, "labels": np.array([0, 0, 1, 1, 2, 2], np.uint8)}


@pytest.fixture
def npz(tmp_path, arrays) -> Path:
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


def everything(data: ImageDataset) -> list[tuple[bytes, int]]:
    return [(data.image(i).tobytes(), int(data.labels[i])) for i in range(len(data))]


class TestFolder:
    def test_images_and_labels(self, folder):
        data = ImageDataset.open(folder, CLASSES)
        assert len(data) == 6
        assert data.classes == CLASSES
        assert data.image_shape == (6, 8, 3)
        assert data.labels.dtype == np.int64
        assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
        for i in range(6):
            image = data.image(i)
            assert (image.dtype, image.shape) == (np.uint8, (6, 8, 3))
            np.testing.assert_array_equal(image, pixels(seed=i))

    def test_the_model_may_know_more_classes(self, folder):
        data = ImageDataset.open(str(folder), ("zebra", "cat", "dog", "ant", "bee"))
        assert data.labels.tolist() == [3, 3, 4, 4, 1, 1]

    @pytest.mark.parametrize("names", [("0_x", "2_y"), ("0000_a b", "02_cat"), ("0_ant", "cat")])
    def test_an_index_names_a_class(self, tmp_path, names):
        for name in names:
            save(tmp_path / name / "a.png", pixels())
        assert ImageDataset.open(tmp_path, CLASSES).labels.tolist() == [0, 2]

    def test_a_class_name_that_looks_like_an_index(self, tmp_path):
        for name in ("7_up", "cola"):
            save(tmp_path / name / "a.png", pixels())
        assert ImageDataset.open(tmp_path, ("cola", "7_up")).labels.tolist() == [1, 0]

    @pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".bmp", ".webp"])
    def test_formats(self, tmp_path, suffix):
        for name in CLASSES[:2]:
            array = np.full((6, 8, 3), 100, np.uint8)
            save(tmp_path / name / f"a{suffix}", array)
        image = ImageDataset.open(tmp_path, CLASSES).image(0)
        np.testing.assert_allclose(image, 100, atol=2)

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "LA"])
    def test_colours(self, tmp_path, mode, channels):
        suffix = ".jpg" if mode == "CMYK" else ".png"
        source = Image.fromarray(np.full((6, 8, 3), 255, np.uint8)).convert(mode)
        for name in CLASSES[:2]:
            (tmp_path / name).mkdir()
            source.save(tmp_path / name / f"a{suffix}")
        data = ImageDataset.open(tmp_path, CLASSES, channels=channels)
        assert data.image_shape == (6, 8, channels)
        np.testing.assert_array_equal(data.image(1), np.full((6, 8, channels), 255))

    def test_transparency_is_no_warning(self, tmp_path):
        source = Image.fromarray(pixels()).quantize(4)
        source.info["transparency"] = b"\x00\xff\x80\xff"
        for name in CLASSES[:2]:
            (tmp_path / name).mkdir()
            source.save(tmp_path / name / "a.png", transparency=b"\x00\xff\x80\xff")
        assert ImageDataset.open(tmp_path, CLASSES).image(0).shape == (6, 8, 3)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
    def test_the_orientation_that_a_camera_wrote(self, tmp_path, orientation, suffix):
        """A red mark that is at the top left for a viewer is there in the pixels."""
        upright = Image.new("RGB", (32, 16), "blue")
        ImageDraw.Draw(upright).rectangle((0, 0, 9, 7), fill="red")
        stored = {
            1: None,
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270,
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        for name in CLASSES[:2]:
            (tmp_path / name).mkdir()
            turned = upright if stored is None else upright.transpose(stored)
            turned.save(tmp_path / name / f"a{suffix}", exif=exif, quality=95)
        data = ImageDataset.open(tmp_path, CLASSES)
        assert data.image_shape == (16, 32, 3)
        assert data.image(0)[3, 4].argmax() == 0
        assert data.image(0)[12, 28].argmax() == 2

    def test_other_files_are_left_out_and_told(self, folder, caplog):
        (folder / "ant" / "notes.txt").write_text("")
        (folder / "ant" / ".hidden.png").write_text("")
        (folder / ".git").mkdir()
        (folder / "README.md").write_text("")
        with caplog.at_level(logging.WARNING):
            assert len(ImageDataset.open(folder, CLASSES)) == 6
        (record,) = caplog.records
        assert record.getMessage() == f"{folder}/ant: left out 1 files without an image's suffix"

    def test_an_image_is_the_callers_own(self, folder):
        data = ImageDataset.open(folder, CLASSES)
        data.image(0)[:] = 0
        np.testing.assert_array_equal(data.image(0), pixels(seed=0))
        with pytest.raises(ValueError, match="read-only"):
            data.labels[0] = 1

    def test_without_pillow_it_names_the_extra(self, folder, monkeypatch):
        monkeypatch.setattr(builtins, "__import__", _without_pillow(builtins.__import__))
        with refused(BackendUnavailable, "Pillow", "edge-runtime[cpu]"):
            ImageDataset.open(folder, CLASSES)


def _without_pillow(real):
    def imported(name, *args, **kwargs):
        if name.startswith("PIL"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    return imported


class TestFolderRefused:
    def test_missing(self, tmp_path):
        with refused(ConfigError, f"the data {tmp_path}/absent does not exist"):
            ImageDataset.open(tmp_path / "absent", CLASSES)

    def test_empty(self, tmp_path):
        (tmp_path / "a.png").write_text("")
        with refused(ConfigError, f"the data {tmp_path} has no class folder", "for each class"):
            ImageDataset.open(tmp_path, CLASSES)

    def test_a_single_class(self, folder):
        shutil.rmtree(folder / "bee")
        shutil.rmtree(folder / "cat")
        with refused(ConfigError, "images of a single class: got 'ant', expected at least two"):
            ImageDataset.open(folder, CLASSES)

    @pytest.mark.parametrize("other", [None, "a.tif", "sub/a.png"])
    def test_a_class_without_an_image(self, folder, other):
        shutil.rmtree(folder / "bee")
        (folder / "bee" / "sub").mkdir(parents=True)
        if other:
            (folder / "bee" / other).write_text("")
        with refused(ConfigError, f"the class folder {folder}/bee has no image", ".jpg, .jpeg"):
            ImageDataset.open(folder, CLASSES)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("caat", "caat is none of the model's classes. Did you mean 'cat'? Valid: ant, bee"),
            ("Cat", "Cat is none of the model's classes. Did you mean 'cat'?"),
            ("3_dog", "3_dog: class index: got 3, expected 0..2"),
            ("3", "3 is none of the model's classes"),
            ("_x", "_x is none of the model's classes"),
            ("-1_x", "-1_x is none of the model's classes"),
            ("02_bee", "is ambiguous: class 2 is 'cat', and 'bee' is class 1. Count classes from"),
            ("1_BEE", "are of one class, 'bee'. Put their images into one folder"),
            ("2_", "2_ is none of the model's classes"),
        ],
    )
    def test_a_folder_that_is_no_class(self, folder, name, message):
        save(folder / name / "a.png", pixels())
        with refused(ConfigError, message):
            ImageDataset.open(folder, CLASSES)

    def test_a_name_of_one_class_with_the_number_of_another(self, tmp_path):
        for name in ("0_b", "x"):
            save(tmp_path / name / "a.png", pixels())
        with refused(ConfigError, "0_b is ambiguous: class 1 has this name", "that of 'x'"):
            ImageDataset.open(tmp_path, ("x", "0_b"))

    def test_equal_names_with_different_numbers_are_not_ambiguous(self, tmp_path):
        """ImageNet has two cranes; a model's class names make them differ somehow."""
        for name in ("0_crane", "1_crane"):
            save(tmp_path / name / "a.png", pixels())
        data = ImageDataset.open(tmp_path, ("crane", "crane, machine"))
        assert data.labels.tolist() == [0, 1]

    def test_images_of_several_sizes(self, folder):
        save(folder / "cat" / "2.png", pixels(6, 9))
        with refused(
            ConfigError,
            f"the images differ in size: {folder}/cat/2.png: got 6x9, expected 6x8",
            "--image-size HEIGHTxWIDTH",
        ):
            ImageDataset.open(folder, CLASSES)
        assert len(ImageDataset.open(folder, CLASSES, image_size=(4, 4))) == 7

    @pytest.mark.parametrize("damage", [b"", b"no image", None])
    def test_a_file_that_is_no_image(self, folder, damage):
        file = folder / "bee" / "1.png"
        file.write_bytes(file.read_bytes()[:60] if damage is None else damage)
        data = ImageDataset.open(folder, CLASSES, image_size=(6, 8))
        with refused(ConfigError, f"the image {file} can't be read"):
            data.image(3)
        with refused(ConfigError, f"the image {file} can't be read"):
            list(data.batches(4))
        if damage is not None:
            with refused(ConfigError, f"the image {file} can't be read"):
                ImageDataset.open(folder, CLASSES)

    def test_a_format_that_its_suffix_hides(self, folder):
        Image.fromarray(pixels()).save(folder / "bee" / "1.png", format="GIF")
        data = ImageDataset.open(folder, CLASSES, image_size=(6, 8))
        with refused(ConfigError, f"the image {folder}/bee/1.png can't be read"):
            data.image(3)

    def test_more_than_8_bits(self, folder):
        Image.fromarray(np.zeros((6, 8), np.uint16)).save(folder / "bee" / "1.png")
        data = ImageDataset.open(folder, CLASSES)
        with refused(ConfigError, "bee/1.png has more than 8 bits per channel: got Pillow's mode"):
            data.image(3)

    def test_a_file_that_changes_after_opening(self, folder):
        data = ImageDataset.open(folder, CLASSES)
        save(folder / "ant" / "0.png", pixels(9, 9))
        with refused(ConfigError, "ant/0.png: got 9x9, expected 6x8"):
            data.image(0)
        (folder / "ant" / "0.png").unlink()
        with refused(ConfigError, "the image", "ant/0.png can't be read", "No such file"):
            data.image(0)
        with refused(ConfigError, "the image", "ant/0.png can't be read", "No such file"):
            _ = data.hash

    @pytest.mark.parametrize("channels", [0, 2, 4])
    def test_channels(self, folder, channels):
        with refused(ConfigError, f"channels: got {channels}, expected 3 (RGB) or 1 (grey)"):
            ImageDataset.open(folder, CLASSES, channels=channels)

    @pytest.mark.parametrize("size", [(0, 4), (4, -1)])
    def test_image_size(self, folder, size):
        with refused(ConfigError, "image size: got"):
            ImageDataset.open(folder, CLASSES, image_size=size)

    @settings(deadline=None)
    @given(st.data())
    @pytest.mark.filterwarnings("ignore")
    def test_any_damage_is_read_or_refused(self, data):
        """Pillow's plugins raise what they like; a person sees one line."""
        kind = data.draw(st.sampled_from(["JPEG", "PNG", "BMP", "WEBP"]))
        whole = io.BytesIO()
        Image.fromarray(pixels()).save(whole, format=kind)
        damaged = bytearray(whole.getvalue())
        for _ in range(data.draw(st.integers(1, 5))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        root = Path(os.environ["PYTEST_DAMAGED"])
        (root / "bee" / "0.jpg").write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
        try:
            found = ImageDataset.open(root, CLASSES, image_size=(6, 8))
            assert found.image(1).shape == (6, 8, 3)
            ImageDataset.open(root, CLASSES)
        except EdgeRuntimeError as error:
            assert type(error) is ConfigError
            assert str(error).isprintable()

    @pytest.fixture(autouse=True)
    def damaged(self, tmp_path_factory, monkeypatch):
        root = tmp_path_factory.mktemp("damaged")
        save(root / "ant" / "0.png", pixels())
        (root / "bee").mkdir()
        monkeypatch.setenv("PYTEST_DAMAGED", str(root))


class TestNpz:
    def test_images_and_labels(self, npz, arrays):
        data = ImageDataset.open(npz, CLASSES)
        assert (len(data), data.image_shape) == (6, (6, 8, 3))
        assert data.labels.dtype == np.int64
        np.testing.assert_array_equal(data.labels, arrays["labels"])
        np.testing.assert_array_equal(data.image(3), arrays["images"][3])
        data.image(3)[:] = 0
        np.testing.assert_array_equal(data.image(3), arrays["images"][3])

    def test_it_needs_no_pillow_where_nothing_is_scaled(self, npz, monkeypatch):
        monkeypatch.setattr(builtins, "__import__", _without_pillow(builtins.__import__))
        assert len(ImageDataset.open(npz, CLASSES)) == 6
        assert ImageDataset.open(npz, CLASSES, image_size=(6, 6)).image(0).shape == (6, 6, 3)
        with refused(BackendUnavailable, "Pillow", "edge-runtime[cpu]"):
            ImageDataset.open(npz, CLASSES, image_size=(3, 4))

    @pytest.mark.parametrize("shape", [(6, 4, 5), (6, 4, 5, 1)])
    def test_one_channel(self, tmp_path, arrays, shape):
        arrays["images"] = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
        np.savez_compressed(tmp_path / "a.npz", **arrays)
        data = ImageDataset.open(tmp_path / "a.npz", CLASSES, channels=1)
        assert data.image_shape == (4, 5, 1)
        np.testing.assert_array_equal(data.image(2).ravel(), arrays["images"][2].ravel())

    def test_its_classes_are_checked(self, tmp_path, arrays):
        np.savez(tmp_path / "a.npz", **arrays, classes=np.array(CLASSES))
        assert len(ImageDataset.open(tmp_path / "a.npz", CLASSES)) == 6
        with refused(ConfigError, "a.npz: class 1 is not the model's: got 'bee', expected 'cow'"):
            ImageDataset.open(tmp_path / "a.npz", ("ant", "cow", "cat"))
        with refused(ConfigError, "a.npz: classes: got 3, expected the model's 4 class names"):
            ImageDataset.open(tmp_path / "a.npz", (*CLASSES, "dog"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"images": None}, "has no array 'images': expected images, labels"),
            ({"labels": None}, "has no array 'labels'"),
            ({"images": np.zeros((6, 4, 5, 3), np.float32)}, "images: got shape (6, 4, 5, 3), fl"),
            ({"images": np.zeros((6, 4, 5, 4), np.uint8)}, "expected shape (N, height, width, 3)"),
            ({"images": np.zeros((6, 4, 5), np.uint8)}, "images: got shape (6, 4, 5), uint8"),
            ({"images": np.zeros((6, 3, 4, 5), np.uint8)}, "images: got shape (6, 3, 4, 5)"),
            ({"images": np.zeros((0, 4, 5, 3), np.uint8)}, "there is no image"),
            ({"images": np.zeros((6, 0, 5, 3), np.uint8)}, "there is no image"),
            ({"images": np.uint8(3)}, "images: got shape (), uint8"),
            ({"labels": np.zeros(5, int)}, "labels: got shape (5,), int64, expected shape (6,)"),
            ({"labels": np.zeros((6, 1), int)}, "labels: got shape (6, 1)"),
            ({"labels": np.zeros(6)}, "labels: got shape (6,), float64"),
            ({"labels": np.array(list("abcabc"))}, "labels: got shape (6,), <U1"),
            ({"labels": np.array([0, 1, 2, 3, 0, 0])}, "label of a sample: got 3, expected 0..2"),
            ({"labels": np.array([0, 1, 2, -1, 0, 0])}, "label of a sample: got -1"),
            ({"labels": np.ones(6, int)}, "images of a single class: got 'bee'"),
            ({"labels": np.array([None] * 6)}, "can't be read: Object arrays"),
            ({"classes": np.array([b"ant", b"bee", b"cat"])}, "class 0 is not the model's"),
            ({"classes": np.array("ant")}, "classes: got 'ant', expected the model's 3"),
            ({"classes": np.array([0, 1, 2])}, "class 0 is not the model's: got 0, expected 'ant'"),
        ],
    )
    def test_refused(self, tmp_path, arrays, change, message):
        kept = {name: array for name, array in {**arrays, **change}.items() if array is not None}
        np.savez(tmp_path / "a.npz", **kept)
        with refused(ConfigError, "a.npz", message):
            ImageDataset.open(tmp_path / "a.npz", CLASSES)

    @pytest.mark.parametrize("data", [b"", b"PK", b"no archive"])
    def test_a_file_that_is_no_npz(self, tmp_path, data):
        (tmp_path / "a.npz").write_bytes(data)
        with refused(ConfigError, "a.npz is neither a folder nor a whole npz", "Unpack archives"):
            ImageDataset.open(tmp_path / "a.npz", CLASSES)

    def test_a_zip_of_something_else(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
            file.writestr("images", "text")
            file.writestr("labels.npy", "no array")
        with refused(ConfigError, "a.npz"):
            ImageDataset.open(tmp_path / "a.npz", CLASSES)

    @settings(deadline=None)
    @given(st.data())
    def test_any_damage_is_read_or_refused(self, data):
        whole = io.BytesIO()
        images = np.stack([pixels(2, 2, seed=i) for i in range(3)])
        np.savez_compressed(whole, images=images, labels=np.array([0, 1, 2]))
        damaged = bytearray(whole.getvalue())
        for _ in range(data.draw(st.integers(1, 5))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        path = Path(os.environ["PYTEST_DAMAGED"])
        path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
        try:
            ImageDataset.open(path, CLASSES).image(0)
        except EdgeRuntimeError as error:
            assert type(error) is ConfigError
            assert str(error).isprintable()

    @pytest.fixture(autouse=True)
    def damaged(self, tmp_path_factory, monkeypatch):
        monkeypatch.setenv("PYTEST_DAMAGED", str(tmp_path_factory.mktemp("damaged") / "a.npz"))


class TestArrays:
    def test_as_they_are(self, arrays):
        data = ImageDataset.from_arrays(arrays["images"], arrays["labels"], CLASSES)
        expected = [(i.tobytes(), int(n)) for i, n in zip(*arrays.values(), strict=True)]
        assert everything(data) == expected
        arrays["images"][:] = 0
        assert everything(data) == expected

    @pytest.mark.parametrize("shape", [(4, 2, 3), (4, 2, 3, 1)])
    def test_grey(self, shape):
        data = ImageDataset.from_arrays(np.zeros(shape, np.uint8), [0, 1, 0, 1], CLASSES)
        assert data.image_shape == (2, 3, 1)

    def test_refused(self, arrays):
        with refused(ConfigError, "the arrays: label of a sample: got 2, expected 0..1"):
            ImageDataset.from_arrays(arrays["images"], arrays["labels"], CLASSES[:2])
        with refused(ConfigError, "the arrays: images: got shape (6, 6, 8, 3), float64"):
            ImageDataset.from_arrays(arrays["images"] / 255, arrays["labels"], CLASSES)


class TestImageSize:
    """A camera of another size: scale to cover, crop around the centre."""

    def opened(self, tmp_path, array, size, channels=3) -> np.ndarray:
        for name in CLASSES[:2]:
            save(tmp_path / name / "a.png", array)
        data = ImageDataset.open(tmp_path, CLASSES, image_size=size, channels=channels)
        assert data.image_shape == (*size, channels)
        images = np.stack([array] * 2)
        same = ImageDataset.from_arrays(images, [0, 1], CLASSES)
        np.savez(tmp_path / "a.npz", images=images, labels=[0, 1])
        npz = ImageDataset.open(tmp_path / "a.npz", CLASSES, image_size=size, channels=channels)
        np.testing.assert_array_equal(npz.image(0), data.image(0))
        assert same.image_shape == array.shape
        return data.image(0)

    @pytest.mark.parametrize(
        ("array", "size", "rows", "columns"),
        [
            (pixels(6, 8), (6, 8), slice(0, 6), slice(0, 8)),
            (pixels(6, 8), (6, 6), slice(0, 6), slice(1, 7)),
            (pixels(6, 9), (6, 6), slice(0, 6), slice(1, 7)),
            (pixels(8, 6), (6, 6), slice(1, 7), slice(0, 6)),
            (pixels(8, 6), (4, 6), slice(2, 6), slice(0, 6)),
            (pixels(6, 8, 1), (6, 5), slice(0, 6), slice(1, 6)),
        ],
    )
    def test_without_scaling_pixels_are_untouched(self, tmp_path, array, size, rows, columns):
        found = self.opened(tmp_path, array, size, array.shape[2])
        np.testing.assert_array_equal(found, array[rows, columns])

    @pytest.mark.parametrize(
        ("shape", "size", "scaled", "top", "left"),
        [
            ((12, 16), (6, 8), (6, 8), 0, 0),
            ((12, 16), (6, 6), (6, 8), 0, 1),
            ((12, 20), (6, 6), (6, 10), 0, 2),
            ((20, 12), (6, 6), (10, 6), 2, 0),
            ((5, 7), (10, 10), (10, 14), 0, 2),
            ((6, 8), (4, 8), (6, 8), 1, 0),
            ((6, 8), (3, 8), (6, 8), 1, 0),
            ((100, 3), (6, 6), (200, 6), 97, 0),
        ],
    )
    @pytest.mark.parametrize("channels", [1, 3])
    def test_scaled_as_pillow_scales(self, tmp_path, shape, size, scaled, top, left, channels):
        array = pixels(*shape, channels)
        image = Image.fromarray(array[..., 0] if channels == 1 else array)
        resized = np.asarray(image.resize(scaled[::-1], Image.Resampling.BILINEAR))
        resized = resized.reshape(*scaled, channels)
        expected = resized[top : top + size[0], left : left + size[1]]
        np.testing.assert_array_equal(self.opened(tmp_path, array, size, channels), expected)

    @settings(deadline=None)
    @given(*[st.integers(1, 40)] * 4)
    def test_any_image_covers_any_size(self, height, width, to_height, to_width):
        from edge_runtime.image_sources import _cover

        array = np.full((height, width, 3), 77, np.uint8)
        found = _cover(array, (to_height, to_width))
        np.testing.assert_array_equal(found, np.full((to_height, to_width, 3), 77))


class TestBatches:
    @pytest.mark.parametrize("size", [1, 4, 6, 100])
    def test_everything_in_order(self, folder, npz, size):
        for path in (folder, npz):
            data = ImageDataset.open(path, CLASSES)
            batches = list(data.batches(size))
            assert [len(labels) for _, labels in batches[:-1]] == [size] * (len(batches) - 1)
            images = np.concatenate([images for images, _ in batches])
            assert (images.dtype, images.shape) == (np.uint8, (6, 6, 8, 3))
            labels = np.concatenate([labels for _, labels in batches])
            assert labels.dtype == np.int64
            assert labels.tolist() == data.labels.tolist()
            assert [i.tobytes() for i in images] == [pixel for pixel, _ in everything(data)]

    def test_a_folder_is_read_when_it_is_asked_for(self, folder):
        data = ImageDataset.open(folder, CLASSES)
        batches = data.batches(2)
        next(batches)
        (folder / "bee" / "0.png").unlink()
        with refused(ConfigError, "bee/0.png can't be read"):
            next(batches)

    @pytest.mark.parametrize("size", [0, -1])
    def test_a_size_below_1(self, npz, size):
        with refused(ConfigError, f"batch size: got {size}, expected >= 1"):
            list(ImageDataset.open(npz, CLASSES).batches(size))


class TestHash:
    def test_it_names_the_data(self, folder, tmp_path):
        shutil.copytree(folder, tmp_path / "copy")
        data = ImageDataset.open(folder, CLASSES)
        copy = ImageDataset.open(tmp_path / "copy", CLASSES, image_size=(3, 3))
        assert len(data.hash) == 64
        assert int(data.hash, 16)
        assert data.hash == copy.hash
        assert data.hash == ImageDataset.open(folder, CLASSES).hash

    def test_the_order_of_samples_does_not_matter(self, folder, npz):
        for path in (folder, npz):
            data = ImageDataset.open(path, CLASSES)
            assert data.subset([5, 3, 1, 0, 2, 4]).hash == data.hash

    def test_the_order_in_an_npz_does_not_matter(self, tmp_path, arrays, npz):
        backwards = {name: array[::-1] for name, array in arrays.items()}
        np.savez(tmp_path / "backwards.npz", **backwards)
        found = ImageDataset.open(tmp_path / "backwards.npz", CLASSES)
        assert found.hash == ImageDataset.open(npz, CLASSES).hash

    def test_every_part_matters(self, folder):
        before = ImageDataset.open(folder, CLASSES).hash
        seen = {before}
        assert ImageDataset.open(folder, CLASSES).subset(range(5)).hash not in seen
        (folder / "ant" / "0.png").rename(folder / "ant" / "7.png")
        seen.add(ImageDataset.open(folder, CLASSES).hash)
        (folder / "ant" / "7.png").rename(folder / "bee" / "7.png")
        seen.add(ImageDataset.open(folder, CLASSES).hash)
        save(folder / "bee" / "7.png", pixels(seed=99))
        seen.add(ImageDataset.open(folder, CLASSES).hash)
        assert len(seen) == 4

    def test_labels_of_an_npz_matter(self, arrays):
        one = ImageDataset.from_arrays(arrays["images"], [0, 0, 1, 1, 2, 2], CLASSES)
        two = ImageDataset.from_arrays(arrays["images"], [0, 0, 1, 2, 2, 2], CLASSES)
        assert one.hash != two.hash

    def test_it_is_read_once(self, folder):
        data = ImageDataset.open(folder, CLASSES)
        before = data.hash
        shutil.rmtree(folder)
        assert data.hash == before
        assert len(data.subset([0]).hash) == 64


class TestSubset:
    def test_samples_in_the_order_asked_for(self, npz):
        data = ImageDataset.open(npz, CLASSES)
        some = data.subset(np.array([4, 1]))
        assert everything(some) == [everything(data)[4], everything(data)[1]]
        assert everything(some.subset([1])) == [everything(data)[1]]

    @pytest.mark.parametrize(
        ("indices", "message"),
        [
            ([], "got shape (0,)"),
            ([6], "got 6..6, expected 0..5"),
            ([-1], "got -1..-1, expected 0..5"),
            ([1, 1], "one appears twice"),
            ([0.0], "got shape (1,), float64"),
            ([True, False], "got shape (2,), bool"),
            ([[0]], "got shape (1, 1)"),
        ],
    )
    def test_refused(self, npz, indices, message):
        with refused(ConfigError, "indices of a subset", message):
            ImageDataset.open(npz, CLASSES).subset(indices)


def numbered(labels: list[int]) -> ImageDataset:
    """A dataset whose images tell their index."""
    images = np.zeros((len(labels), 1, 2, 1), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.divmod(np.arange(len(labels)), 256)
    return ImageDataset.from_arrays(images, labels, [str(i) for i in range(max(labels) + 1)])


def indices(data: ImageDataset) -> list[int]:
    return [
        int(image[0, 0, 0]) * 256 + int(image[0, 1, 0])
        for image in map(data.image, range(len(data)))
    ]


two_classes_at_least = st.lists(st.integers(0, 5), min_size=8, max_size=120).filter(
    lambda labels: len(set(labels)) > 1
)
shares = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(
    lambda parts: [part / sum(parts) for part in parts]
)


class TestSplit:
    @settings(deadline=None)
    @given(two_classes_at_least, shares, st.integers(0, 3))
    def test_disjoint_complete_and_stratified(self, labels, fractions, seed):
        data = numbered(labels)
        try:
            parts = data.split(fractions, seed)
        except ConfigError:
            assert min(fractions) * len(labels) < 2
            return
        found = [indices(part) for part in parts]
        assert sorted(itertools.chain(*found)) == list(range(len(labels)))
        count = Counter(labels)
        for fraction, part, members in zip(fractions, parts, found, strict=True):
            assert members == sorted(members)
            assert part.labels.tolist() == [labels[i] for i in members]
            assert abs(len(members) - fraction * len(labels)) < len(fractions)
            for label, total in count.items():
                have = sum(labels[i] == label for i in members)
                assert abs(have - fraction * total) < len(fractions) + 1
        for i, one in enumerate(parts):
            for other in parts[:i]:
                assert overlap(one, other) == 0

    @settings(deadline=None)
    @given(two_classes_at_least, st.integers(0, 3))
    def test_halves_are_as_equal_as_can_be(self, labels, seed):
        one, two = numbered(labels).split([0.5, 0.5], seed)
        assert abs(len(one) - len(two)) <= 1
        for label in set(labels):
            assert abs((one.labels == label).sum() - (two.labels == label).sum()) <= 1

    def test_a_seed_gives_one_division(self):
        data = numbered([0, 1, 2] * 20)
        first = [indices(part) for part in data.split([0.5, 0.5], 0)]
        assert first == [indices(part) for part in data.split([0.5, 0.5], 0)]
        assert first != [indices(part) for part in data.split([0.5, 0.5], 1)]

    def test_the_division_is_that_of_yesterday_and_of_other_machines(self):
        """Fixed numbers: operating points name data by such a division."""
        one, _ = numbered([0, 1] * 6).split([0.5, 0.5], seed=0)
        assert indices(one) == [3, 4, 6, 7, 8, 11]

    def test_classes_of_one_image_are_spread_at_random(self):
        data = numbered(list(range(40)))
        sides = [set(indices(data.split([0.5, 0.5], seed)[0])) for seed in range(20)]
        assert all(len(side) == 20 for side in sides)
        often = Counter(i for side in sides for i in side)
        assert set(often) == set(range(40))
        assert max(often.values()) < 20

    def test_folders_are_divided_by_names_not_by_place(self, folder, tmp_path):
        shutil.copytree(folder, tmp_path / "copy")
        one, _ = ImageDataset.open(folder, CLASSES).split([0.5, 0.5], 3)
        two, _ = ImageDataset.open(tmp_path / "copy", CLASSES).split([0.5, 0.5], 3)
        assert one.hash == two.hash
        assert sorted(one.labels.tolist()) == [0, 1, 2]

    def test_parts_of_parts(self):
        data = numbered([0, 1] * 20)
        train, rest = data.split([0.5, 0.5], 0)
        valid, test = rest.split([0.5, 0.5], 0)
        assert sorted(indices(train) + indices(valid) + indices(test)) == list(range(40))

    @pytest.mark.parametrize(
        "fractions", [[], [0.5], [0.5, 0.6], [1.0, 0.0], [1.5, -0.5], [float("nan"), 0.5]]
    )
    def test_fractions_that_do_not_make_1(self, fractions):
        with refused(ConfigError, "fractions of a split: got", "numbers > 0 that make 1"):
            numbered([0, 1, 0]).split(fractions, 0)

    def test_a_part_that_gets_nothing(self):
        with refused(ConfigError, "a part of a split in 4 gets no image: got 3 images"):
            numbered([0, 1, 0]).split([0.25] * 4, 0)


class TestPart:
    @pytest.mark.parametrize("n", [1, 2, 3, 7])
    def test_parts_are_disjoint_and_together_everything(self, n):
        data = numbered([0, 1, 2] * 10)
        parts = [data.part(k, n, seed=5) for k in range(1, n + 1)]
        assert sorted(itertools.chain(*map(indices, parts))) == list(range(30))

    @pytest.mark.parametrize(("k", "n"), [(0, 2), (3, 2), (-1, 2), (1, 0)])
    def test_refused(self, k, n):
        with refused(ConfigError, f"part: got {k}/{n}, expected K/N"):
            numbered([0, 1]).part(k, n, 0)

    @pytest.mark.parametrize(
        ("text", "part"), [("1/2", (1, 2)), ("3/3", (3, 3)), ("01/10", (1, 10))]
    )
    def test_parse(self, text, part):
        assert parse_part(text) == part

    @pytest.mark.parametrize(
        "text",
        ["", "1", "1/", "/2", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "a/b", "1 / 2", "1/2\n", "٢/٣"],
    )
    def test_parse_refuses(self, text):
        with refused(ConfigError, f"--part: got {text!r}, expected K/N with 1 <= K <= N"):
            parse_part(text)


@pytest.mark.parametrize(("text", "size"), [("480x640", (480, 640)), ("1x1", (1, 1))])
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "480", "x", "480x", "480X640", "480*640", "0x4", "4x0", "-4x4", "4x4x3", "1e2x4", "4x4\n"],
)
def test_parse_size_refuses(text):
    with refused(ConfigError, f"image size: got {text!r}, expected HEIGHTxWIDTH"):
        parse_size(text)


class TestOverlap:
    def test_pixels_count_not_names_or_labels(self, folder, npz, arrays):
        data = ImageDataset.open(folder, CLASSES)
        assert overlap(data, data) == 6
        assert overlap(data, ImageDataset.open(npz, CLASSES)) == 6
        relabelled = ImageDataset.from_arrays(arrays["images"][:3], [2, 1, 0], CLASSES)
        assert overlap(relabelled, data) == 3
        assert overlap(data, relabelled) == 3

    def test_every_sample_of_the_first_counts(self, arrays):
        twice = ImageDataset.from_arrays(arrays["images"][[0, 0, 1]], [0, 1, 2], CLASSES)
        once = ImageDataset.from_arrays(arrays["images"][[0, 2]], [0, 1], CLASSES)
        assert overlap(twice, once) == 2
        assert overlap(once, twice) == 1

    def test_parts_without_overlap(self):
        one, two = numbered([0, 1] * 10).split([0.5, 0.5], 0)
        assert overlap(one, two) == 0

    def test_different_shapes_can_not_be_compared(self, folder):
        data = ImageDataset.open(folder, CLASSES)
        other = ImageDataset.open(folder, CLASSES, image_size=(3, 3))
        with refused(ConfigError, "different shapes: got (6, 8, 3), expected (3, 3, 3)"):
            overlap(data, other)
