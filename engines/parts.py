"""What the precision tools work on: a bundle's stages or one ONNX file, and samples for them."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset, parse_size
from edge_runtime.errors import (
    BackendError,
    ConfigError,
    EdgeRuntimeError,
    EngineBuildError,
    ManifestError,
)
from edge_runtime.files import sha256
from edge_runtime.manifest import Bundle
from edge_runtime.tensors import BATCH, TensorSpec

#: Samples that are used where nobody says how many, and per batch.
SAMPLES, BATCH_SIZE = 512, 8
#: Camera image and number of samples where nobody gives data.
_NOISE_SIZE, _NOISE_SAMPLES = (240, 320), 16

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Part:
    """A stage, or the whole of a bare file.

    Attributes:
        name: For people: "stage 'x'", or the file.
        stage: The stage's name, or the file.
        model: Its ONNX file in FP32.
        inputs: Names of the tensors it reads.
        outputs: Names of those it writes.
        single: Whether it takes one sample at a time.
        chosen: Whether it is to be converted.
    """

    name: str
    stage: str
    model: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    single: bool
    chosen: bool

    def apply(self, run: Callable[[Arrays], Arrays], known: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run a batch through one of its sessions, whatever batch that takes."""
        feeds = {name: known[name] for name in self.inputs}
        if not self.single:
            return run(feeds)
        size = len(feeds[self.inputs[0]])
        rows = [run({k: v[i : i + 1] for k, v in feeds.items()}) for i in range(size)]
        return {
            name: np.concatenate([np.atleast_1d(row[name]) for row in rows]) for name in rows[0]
        }


@dataclass(frozen=True)
class Samples:
    """What the comparison runs on.

    Attributes:
        batches: Makes batches, input name -> array, as often as it is called.
        size: Number of samples.
        data: What a provenance says of the data; None for noise.
    """

    batches: Callable[[], Iterator[Arrays]]
    size: int
    data: Mapping[str, Any] | None

    def progress(self, console: Console, description: str) -> Iterator[Arrays]:
        """All batches, showing how far it is."""
        return console.progress(self.batches(), description, -(-self.size // BATCH_SIZE))


def session(
    part: Part, model: bytes, outputs: Sequence[str] | None = None
) -> Callable[[Arrays], Arrays]:
    """A function that runs a part's model, or another one in its place.

    Args:
        part: Names it in errors.
        model: The ONNX file.
        outputs: Names of the outputs; the part's own where None.
    """
    from edge_runtime.backends.onnxrt import native_error, native_exceptions, new_session

    with naming(part):
        opened = new_session(model)
    names = list(part.outputs if outputs is None else outputs)

    def run(feeds: Arrays) -> Arrays:
        try:
            return dict(zip(names, opened.run(names, feeds), strict=True))
        except native_exceptions() as error:
            raise native_error(error, f"{part.name} failed", part.stage) from error

    return run


def bundle_parts(bundle: Bundle, stages: str | None, precision: str) -> list[Part]:
    """The stages in order of execution, and which of them get a variant.

    Args:
        bundle: The bundle.
        stages: Names with commas between them; all but preprocess stages where None.
        precision: The variant that they are to get.

    Raises:
        ConfigError: There is no such stage, it has that variant already, or none in FP32.
    """
    names = [record.name for record in bundle.manifest.stages if record.kind != "preprocess"]
    if stages is not None:
        asked = [name.strip() for name in stages.split(",") if name.strip()]
        for name in asked:
            if bundle.record(name).kind == "preprocess":
                raise ConfigError(
                    f"--stages: {name!r} is a preprocess stage, which is left as it is",
                    expected=", ".join(names),
                )
        names = [name for name in names if name in asked]
    if not names:
        raise ConfigError("there is no stage to convert")
    parts = []
    for record in bundle.manifest.stages:
        chosen = record.name in names
        if chosen and ("fp32" not in record.variants or precision in record.variants):
            there = precision in record.variants
            raise ConfigError(
                f"stage {record.name!r} has {f'{precision} already' if there else 'no fp32'}",
                got=", ".join(record.variants),
                remedy="Name the stages to convert with --stages",
            )
        source = "fp32" if "fp32" in record.variants else next(iter(record.variants))
        parts.append(
            Part(
                f"stage {record.name!r}",
                record.name,
                bundle.stage_model(record.name, source),
                tuple(spec.name for spec in record.inputs),
                tuple(spec.name for spec in record.outputs),
                any(spec.shape[0] == 1 for spec in record.inputs),
                chosen,
            )
        )
    return parts


def file_part(path: Path) -> tuple[Part, list[TensorSpec], dict[str, str]]:
    """One ONNX file as the only part.

    Returns:
        The part, its inputs, and those of its outputs that look like logits, by their names.

    Raises:
        ConfigError: It is no ONNX file, or an input has no batch axis.
    """
    from engines.classifier import read_model

    proto = read_model(path, "the model")
    inputs = [spec_of(value) for value in proto.graph.input]
    part = Part(
        str(path),
        str(path),
        proto.SerializeToString(),
        tuple(spec.name for spec in inputs),
        tuple(value.name for value in proto.graph.output),
        any(spec.shape[0] == 1 for spec in inputs),
        True,
    )
    logits = {
        value.name: value.name
        for value in proto.graph.output
        if len(value.type.tensor_type.shape.dim) == 2
    }
    return part, inputs, logits


@contextlib.contextmanager
def naming(part: Part) -> Iterator[None]:
    """Put the stage's name before what is wrong with it."""
    try:
        yield
    except (EngineBuildError, BackendError, ManifestError) as error:
        if str(error).startswith(part.name):
            raise
        raise EngineBuildError(f"{part.name}: {error}") from error


def spec_of(value: Any) -> TensorSpec:
    """Spec of an ONNX input."""
    from engines.onnx_package import onnx

    tensor = value.type.tensor_type
    dims = enumerate(tensor.shape.dim)
    axes = [dim.dim_value or dim.dim_param or f"axis{i}" for i, dim in dims]
    if not axes or (isinstance(axes[0], int) and axes[0] != 1):
        raise ConfigError(
            f"input {value.name!r}",
            got=f"shape {axes}",
            expected="the batch as its first axis, 1 or symbolic",
        )
    batch = 1 if axes[0] == 1 else BATCH
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return TensorSpec(value.name, (batch, *axes[1:]), np.dtype(dtype).name)


def check_file(source: Path, out: Path, *, overwrite: bool) -> None:
    """Refuse an output file before any long work."""
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"the folder {out.parent} does not exist", remedy="Create it first")
    if out.exists() and (not out.is_file() or out.samefile(source)):
        raise ConfigError(f"{out} is not replaced", remedy="Choose another --out")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists", remedy="Choose another --out, or give --overwrite")


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    path = Path(os.path.realpath(path))
    writing = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with writing.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        writing.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            writing.unlink()
        if isinstance(error, OSError):
            raise EdgeRuntimeError(f"{path} was not written: {error}") from error
        raise


def open_samples(
    args: argparse.Namespace, inputs: Sequence[TensorSpec], classes: Sequence[str] | None
) -> Samples:
    """Data where there is some, else noise.

    Args:
        args: The command's.
        inputs: What the model or the cascade reads.
        classes: The bundle's; None for a bare file.
    """
    if args.data is None:
        return _noise(inputs)
    path = Path(args.data)
    if not path.exists():
        raise ConfigError(f"the data {path} does not exist")
    takes_images = len(inputs) == 1 and _is_camera_image(inputs[0])
    if takes_images and (classes is not None or path.is_dir()):
        return _images(args, path, inputs[0], classes)
    if path.is_dir():
        raise ConfigError(
            f"the data {path} has images, and the model takes none from a camera",
            got="; ".join(f"{spec.name} {spec}" for spec in inputs),
            expected="(batch, height, width, channels) uint8",
            remedy="Give an npz with an array named as each input, or make a bundle that has the "
            "model's preprocessing: edge-runtime export",
        )
    return _arrays(args, path, inputs, also="images" if takes_images else None)


def _is_camera_image(spec: TensorSpec) -> bool:
    return len(spec.shape) == 4 and spec.dtype == "uint8" and spec.shape[3] in (1, 3)


def _images(
    args: argparse.Namespace, path: Path, spec: TensorSpec, classes: Sequence[str] | None
) -> Samples:
    if classes is None:  # labels are of no use here
        classes = sorted(e.name for e in path.iterdir() if e.is_dir() and e.name[0] != ".")
    size = parse_size(args.image_size) if args.image_size else None
    data = ImageDataset.open(path, classes, image_size=size, channels=int(spec.shape[3]))
    data = data.balanced(args.samples, seed=0)
    spec.check(data.image(0)[None])

    def batches() -> Iterator[Arrays]:
        return ({spec.name: images} for images, _ in data.batches(BATCH_SIZE))

    return Samples(batches, len(data), {"hash": data.hash, "image_size": args.image_size})


def _arrays(
    args: argparse.Namespace, path: Path, inputs: Sequence[TensorSpec], also: str | None
) -> Samples:
    """An npz with an array for each input; `also` is another name for the only one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = {spec.name: spec.name for spec in inputs}
            if also is not None and inputs[0].name not in file.files:
                names = {inputs[0].name: also}
            missing = [name for name in names.values() if name not in file.files]
            if missing:
                raise ConfigError(
                    f"the data {path}: arrays",
                    got=", ".join(file.files) or "none",
                    expected=", ".join(f"{spec.name} {spec}" for spec in inputs),
                )
            arrays = {name: file[stored] for name, stored in names.items()}
    except (OSError, ValueError, AttributeError, EOFError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"the data {path} is no npz: {error}") from error
    for spec in inputs:
        spec.check(arrays[spec.name])
    lengths = {name: len(values) for name, values in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"the data {path}: numbers of samples", got=lengths, expected="one")
    total = next(iter(lengths.values()))
    rows = np.unique(np.linspace(0, total - 1, min(total, args.samples)).astype(int))
    arrays = {name: values[rows] for name, values in arrays.items()}
    digest = sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays)))
    return Samples(lambda: _batches(arrays), len(rows), {"hash": digest, "image_size": None})


def _noise(inputs: Sequence[TensorSpec]) -> Samples:
    rng = np.random.default_rng(0)
    arrays: Arrays = {}
    sides = dict(zip(("height", "width"), _NOISE_SIZE, strict=True))
    for spec in inputs:
        shape = [sides.get(axis, axis) if isinstance(axis, str) else axis for axis in spec.shape]
        lengths = [axis for axis in shape[1:] if isinstance(axis, int)]
        if len(lengths) < len(spec.shape) - 1 or spec.dtype not in ("uint8", "float32"):
            raise ConfigError(
                f"input {spec.name!r}: nobody knows what noise would suit it",
                got=str(spec),
                remedy="Give --data, an npz with an array named as each input",
            )
        whole = (_NOISE_SAMPLES, *lengths)
        arrays[spec.name] = (
            rng.integers(0, 256, whole, dtype=np.uint8)
            if spec.dtype == "uint8"
            else rng.standard_normal(whole, dtype=np.float32)
        )
    return Samples(lambda: _batches(arrays), _NOISE_SAMPLES, None)


def _batches(arrays: Arrays) -> Iterator[Arrays]:
    total = len(next(iter(arrays.values())))
    for start in range(0, total, BATCH_SIZE):
        yield {name: values[start : start + BATCH_SIZE] for name, values in arrays.items()}
