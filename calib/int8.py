"""INT8 ranges of a bundle's activations, from calibration images, in memory that does not grow.

The FP32 stages run one after another on every image; whatever shall be quantised is counted into a
histogram per tensor and forgotten. One pass serves every method.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.histogram import METHODS, Histogram, Method
from edge_runtime import schema
from edge_runtime.dataset import ImageDataset, overlap
from edge_runtime.errors import CalibrationError, ConfigError, ManifestError
from edge_runtime.files import read_json, write_json
from engines.onnx_graph import with_outputs
from engines.onnx_package import onnx
from engines.parts import Arrays, Part, session

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1

#: Fewer images say nothing of the range of an activation.
LEAST_SAMPLES = 32
#: Pictures have neighbours that resemble each other: 0.7 and more where noise has 0.0.
_LEAST_CORRELATION = 0.2
#: Images that the resemblance is measured on.
_LOOKED_AT = 64
#: Unreadable files that are put up with, as a share of the images.
_MOST_UNREADABLE = 0.02


@dataclass(frozen=True)
class Ranges:
    """INT8 ranges and where they come from.

    Attributes:
        method: How they were chosen from the histograms.
        stages: Stage -> tensor -> largest |x| to represent, > 0.
        chosen_on: Provenance: bundle, data and models by their hashes, samples, seed.
        schema_version: Version of this file format.
    """

    method: Method
    stages: Mapping[str, Mapping[str, float]]
    chosen_on: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def write(self, path: Path) -> None:
        """Write them as JSON, atomically."""
        write_json(path, schema.plain(self))

    @classmethod
    def read(cls, path: Path, expected: Mapping[str, Any], method: Method) -> Ranges:
        """Read what `write` wrote, for the same bundle, data and method.

        Args:
            path: The file.
            expected: The provenance that it must have.
            method: The method that it must have.

        Raises:
            ManifestError: It is not whole.
            ConfigError: It is of something else, and so would be wrong here.
        """
        data = read_json(path, "INT8 ranges")
        try:
            found = schema.read(cls, data, f"INT8 ranges {path}")
        except ConfigError as error:
            raise ManifestError(str(error)) from error
        have = {"method": found.method, **found.chosen_on}
        for name, want in {"method": method, **expected}.items():
            if have.get(name) != want:
                raise ConfigError(
                    f"INT8 ranges {path} are stale: {name}",
                    got=_short(have.get(name)),
                    expected=_short(want),
                    remedy="Delete the file, or name another, to calibrate anew",
                )
        return found


def _short(value: object) -> str:
    return f"{value!s:.16}"


def choose_images(
    data: ImageDataset,
    *,
    samples: int,
    seed: int,
    used: Sequence[tuple[str, ImageDataset]] = (),
) -> ImageDataset:
    """Class-balanced calibration images.

    Args:
        data: Training images.
        samples: How many to take; all where there are fewer.
        seed: Of the choice.
        used: Data that thresholds were chosen or tests are made on, by its name: no image of it
            may be among them.

    Raises:
        CalibrationError: There are too few, too many can't be read, they are noise, or some are
            used elsewhere.
    """
    chosen = readable(data.balanced(samples, seed))
    if len(chosen) < LEAST_SAMPLES:
        raise CalibrationError(
            "images for INT8 calibration",
            got=len(chosen),
            expected=f">= {LEAST_SAMPLES}",
            remedy="Take them from the training data; some hundred are enough",
        )
    step = max(1, len(chosen) // _LOOKED_AT)
    refuse_noise(np.stack([chosen.image(i) for i in range(0, len(chosen), step)]))
    for name, other in used:
        common = overlap(chosen, other)
        if common:
            raise CalibrationError(
                f"calibration images that are in {name} too",
                got=common,
                expected=0,
                remedy="Calibrate on training data: what is measured on those would flatter INT8",
            )
    return chosen


def refuse_noise(images: NDArray[Any]) -> None:
    """Refuse images that are no pictures.

    Args:
        images: Shape (n, H, W, C), or (n, C, H, W) where that has 1 or 3 channels.

    Raises:
        CalibrationError: Horizontal neighbours don't resemble each other.
    """
    if images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    found = [0.0]
    for image in images[:_LOOKED_AT].astype(np.float64):
        left, right = image[:, :-1].ravel(), image[:, 1:].ravel()
        if left.std() > 0 and right.std() > 0:
            found.append(float(np.corrcoef(left, right)[0, 1]))
    likeness = float(np.median(found[1:] or found))
    if likeness < _LEAST_CORRELATION:
        raise CalibrationError(
            "the calibration images look like noise: correlation of neighbouring pixels",
            got=f"{likeness:.2f}",
            expected=f">= {_LEAST_CORRELATION}",
            remedy="Ranges from random data fit nothing: give pictures such as the camera's",
        )


def readable(data: ImageDataset) -> ImageDataset:
    """The images that can be read; a few others are put up with, and named in the log.

    Raises:
        CalibrationError: More than a small share can't be read; the first is named.
    """
    fine: list[int] = []
    broken: list[str] = []
    for index in range(len(data)):
        try:
            data.image(index)
        except ConfigError as error:
            broken.append(str(error))
            if len(broken) > max(1, _MOST_UNREADABLE * len(data)):
                raise CalibrationError(
                    f"{len(broken)} of the first {index + 1} calibration images can't be used, "
                    f"the first: {broken[0]}",
                    remedy="Mend or remove them",
                ) from error
        else:
            fine.append(index)
    if broken:
        logger.warning(
            "%d of %d calibration images are left out, the first: %s",
            len(broken),
            len(data),
            broken[0],
        )
    return data.subset(fine)


def histograms(
    parts: Sequence[Part], batches: Iterable[Arrays], tensors: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Histogram]]:
    """Run FP32 stages one after another on samples, and count the values of their tensors.

    Args:
        parts: The stages, in order of execution.
        batches: Samples: input name -> array, as the first stages take them.
        tensors: Stage -> names of tensors of its graph, inputs and outputs among them.

    Returns:
        Stage -> tensor -> histogram.

    Raises:
        CalibrationError: A value is NaN or infinite, or there was no sample.
        BackendError: A stage failed.
    """
    found = {stage: {name: Histogram() for name in names} for stage, names in tensors.items()}
    runs = {part.stage: _watching(part, tensors.get(part.stage, ())) for part in parts}
    samples = 0
    for batch in batches:
        known = dict(batch)
        for part in parts:
            made = part.apply(runs[part.stage], known)
            for name, histogram in found.get(part.stage, {}).items():
                try:
                    histogram.add(known[name] if name in part.inputs else made[name])
                except CalibrationError as error:
                    raise CalibrationError(f"{part.name}, tensor {name!r}: {error}") from error
            known |= {name: made[name] for name in part.outputs}
        samples += len(next(iter(batch.values())))
    if not samples:
        raise CalibrationError("there is no calibration image")
    return found


def _watching(part: Part, tensors: Sequence[str]) -> Callable[[Arrays], Arrays]:
    """A session of a part that hands out some tensors of its graph too."""
    inner = [name for name in tensors if name not in part.inputs]
    names = list(dict.fromkeys([*part.outputs, *inner]))
    model = onnx.load_model_from_string(part.model)
    return session(part, with_outputs(model, names).SerializeToString(), names)


def ranges_of(
    found: Mapping[str, Mapping[str, Histogram]],
    method: Method,
    chosen_on: Mapping[str, Any],
) -> Ranges:
    """Choose ranges by one method; a tensor that was always zero gets 1, which is as good as any.

    Args:
        found: What `histograms` returned.
        method: The method.
        chosen_on: Provenance.
    """
    return Ranges(
        method,
        {
            stage: {name: one.range(method) if one.end else 1.0 for name, one in tensors.items()}
            for stage, tensors in found.items()
        },
        dict(chosen_on),
    )


__all__ = [
    "LEAST_SAMPLES",
    "METHODS",
    "Ranges",
    "choose_images",
    "histograms",
    "ranges_of",
    "readable",
]
