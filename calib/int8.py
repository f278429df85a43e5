"""INT8 ranges of a bundle's activations, from calibration images, in memory that does not grow.

The FP32 stages run one after another on every image; whatever shall be quantised is counted into a
histogram per tensor and forgotten. One pass serves every method.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.histogram import METHODS, Histogram, Method
from edge_runtime import schema
from edge_runtime.backends.onnxrt import native_error, native_exceptions, new_session
from edge_runtime.cascade import Stage
from edge_runtime.dataset import ImageDataset, overlap
from edge_runtime.errors import CalibrationError, ConfigError, ManifestError
from edge_runtime.files import read_json, write_json
from edge_runtime.manifest import Bundle
from engines.onnx_graph import with_outputs
from engines.onnx_package import onnx

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
        CalibrationError: There are too few, they are noise, or some are used elsewhere.
    """
    chosen = data.balanced(samples, seed)
    if len(chosen) < LEAST_SAMPLES:
        raise CalibrationError(
            "images for INT8 calibration",
            got=len(chosen),
            expected=f">= {LEAST_SAMPLES}",
            remedy="Take them from the training data; some hundred are enough",
        )
    likeness = _likeness(chosen)
    if likeness < _LEAST_CORRELATION:
        raise CalibrationError(
            "the calibration images look like noise: correlation of neighbouring pixels",
            got=f"{likeness:.2f}",
            expected=f">= {_LEAST_CORRELATION}",
            remedy="Ranges from random data fit nothing: give pictures such as the camera's",
        )
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


def _likeness(data: ImageDataset) -> float:
    """Median over images of the correlation of horizontal neighbours."""
    found = []
    for index in range(0, len(data), max(1, len(data) // _LOOKED_AT)):
        image = data.image(index).astype(np.float64)
        left, right = image[:, :-1].ravel(), image[:, 1:].ravel()
        if left.std() > 0 and right.std() > 0:
            found.append(float(np.corrcoef(left, right)[0, 1]))
    return float(np.median(found)) if found else 0.0


def readable(data: ImageDataset, size: int) -> Iterable[NDArray[np.uint8]]:
    """Batches of images; a few that can't be read are left out.

    Args:
        data: The images.
        size: Images per batch.

    Raises:
        CalibrationError: More than a small share can't be read; the first are named.
    """
    broken: list[str] = []
    batch: list[NDArray[np.uint8]] = []
    for index in range(len(data)):
        try:
            batch.append(data.image(index))
        except ConfigError as error:
            broken.append(str(error))
            if len(broken) > max(1, _MOST_UNREADABLE * len(data)):
                raise CalibrationError(
                    f"{len(broken)} of {index + 1} calibration images can't be read, the first: "
                    f"{broken[0]}",
                    remedy="Mend or remove them",
                ) from error
            continue
        if len(batch) == size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def histograms(
    bundle: Bundle, batches: Iterable[NDArray[Any]], tensors: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Histogram]]:
    """Run the bundle's default stages on images, and count the values of tensors.

    Args:
        bundle: The bundle.
        batches: Images, as its first stage takes them.
        tensors: Stage -> names of tensors of its graph, inputs and outputs among them.

    Returns:
        Stage -> tensor -> histogram.

    Raises:
        CalibrationError: A value is NaN or infinite, or there was no image.
        BackendError: A stage failed.
    """
    found = {s: {name: Histogram() for name in names} for s, names in tensors.items()}
    chain = [_Watched(bundle, stage, tensors.get(stage.name, ())) for stage in _needed(bundle)]
    images = 0
    for batch in batches:
        known: dict[str, NDArray[Any]] = {bundle.cascade.image.name: batch}
        for watched in chain:
            for name, value in watched.run(known).items():
                try:
                    found[watched.stage.name][name].add(value)
                except CalibrationError as error:
                    where = f"stage {watched.stage.name!r}, tensor {name!r}"
                    raise CalibrationError(f"{where}: {error}") from error
        images += len(batch)
    if not images:
        raise CalibrationError("there is no calibration image")
    return found


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


class _Watched:
    """A stage's session that also hands out the tensors that are asked for."""

    def __init__(self, bundle: Bundle, stage: Stage, tensors: Sequence[str]) -> None:
        self.stage = stage
        inputs = {spec.name for spec in stage.inputs}
        self._of_inputs = [name for name in tensors if name in inputs]
        self._of_graph = [name for name in tensors if name not in inputs]
        self._outputs = [spec.name for spec in stage.outputs]
        model = onnx.load_model_from_string(bundle.stage_model(stage.name, _first(bundle, stage)))
        names = list(dict.fromkeys([*self._outputs, *self._of_graph]))
        self._session = new_session(with_outputs(model, names).SerializeToString())
        self._names = names
        self._single = any(spec.shape[0] == 1 for spec in stage.inputs)

    def run(self, known: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the stage, add its outputs to `known`, and return the watched tensors."""
        feeds = {spec.name: known[spec.name] for spec in self.stage.inputs}
        count = len(next(iter(feeds.values())))
        rows = [slice(i, i + 1) for i in range(count)] if self._single else [slice(None)]
        try:
            runs = [
                self._session.run(self._names, {k: v[row] for k, v in feeds.items()})
                for row in rows
            ]
        except native_exceptions() as error:
            name = self.stage.name
            raise native_error(error, f"stage {name!r} failed", name) from error
        made = {
            name: np.concatenate([np.atleast_1d(run[i]) for run in runs])
            for i, name in enumerate(self._names)
        }
        known |= {name: made[name] for name in self._outputs}
        watched = {name: made[name] for name in self._of_graph}
        return watched | {name: feeds[name] for name in self._of_inputs}


def _needed(bundle: Bundle) -> tuple[Stage, ...]:
    return bundle.cascade.plan(range(len(bundle.cascade.exits))).stages


def _first(bundle: Bundle, stage: Stage) -> str:
    return bundle.precision(stage.name, {})


__all__ = [
    "LEAST_SAMPLES",
    "METHODS",
    "Ranges",
    "choose_images",
    "histograms",
    "ranges_of",
    "readable",
]
