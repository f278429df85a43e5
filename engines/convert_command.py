"""Convert the stages of a bundle, or one ONNX file, to FP16 that is typed in the graph.

With --data the FP32 stages run on the images first: what comes near the largest number of FP16
stays in FP32, and both precisions are compared, stage by stage and from image to logits. Without
it the comparison is on noise, which shows blunders and no more.

A bundle gets new variants in a new bundle with a hash of its own; its operating points come along
and still run the variants that they ran. Stages of kind "preprocess" are left as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import math
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.console import Console, percent
from edge_runtime.dataset import ImageDataset, parse_size
from edge_runtime.errors import (
    BackendError,
    ConfigError,
    EdgeRuntimeError,
    EngineBuildError,
    ManifestError,
)
from edge_runtime.files import check_target, sha256
from edge_runtime.manifest import Bundle
from edge_runtime.options import count, positive
from edge_runtime.tensors import BATCH, TensorSpec
from engines.bundle import with_variants

if TYPE_CHECKING:
    from engines.fp16 import Converted

PRECISION = "fp16"

#: Largest relative error of a stage. Rounding to FP16 changes a number by up to 0.05 %; measured,
#: that adds up to 0.12 % over a ViT of 12 blocks and 0.05 % over a ResNet of 50 convolutions, both
#: with random weights, and to 1.4 % where small differences of large inputs are taken. An overflow
#: or a lost epsilon, which this is to catch, costs far more.
TOLERANCE = 0.02

_SAMPLES = 512
_BATCH = 8
#: Camera image and number of samples where nobody gives data.
_NOISE_SIZE, _NOISE_SAMPLES = (240, 320), 16

Arrays = dict[str, NDArray[Any]]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime convert``."""
    parser.add_argument("source", metavar="BUNDLE", type=Path, help="a bundle, or one .onnx file")
    parser.add_argument("--precision", choices=(PRECISION,), required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="the new bundle, or .onnx file, to write"
    )
    parser.add_argument(
        "--stages", metavar="A,B", help="convert these stages only (default: all but preprocess)"
    )
    parser.add_argument(
        "--tolerance",
        type=positive,
        default=TOLERANCE,
        help=f"largest relative error of a stage, of its largest output (default {TOLERANCE:g})",
    )
    parser.add_argument(
        "--overwrite", "--force", action="store_true", help="replace what is already at --out"
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="PATH",
        help="a folder of class folders, or an npz with images and labels; for a model that takes "
        "no camera images, an npz with an array named as each input",
    )
    group.add_argument(
        "--samples",
        type=count,
        default=_SAMPLES,
        metavar="N",
        help=f"how many of them to use, of all classes alike (default {_SAMPLES})",
    )
    group.add_argument(
        "--image-size",
        metavar="HEIGHTxWIDTH",
        help="size of the camera: images are scaled to cover it and cropped",
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Find ranges, convert, compare, show, write.

    Raises:
        ConfigError: The options don't fit the bundle or the file.
        EngineBuildError: A stage can't be converted, or differs by more than the tolerance.
        EdgeRuntimeError: The result can't be written; nothing is left behind.
    """
    if args.source.is_file():
        return _convert_file(args, console)
    bundle = Bundle.open(args.source)
    check_target(args.out, overwrite=args.overwrite)
    parts = _parts(bundle, args.stages)
    samples = _samples(args, [bundle.cascade.image], bundle.cascade.classes)
    exits = {exit_.name: exit_.logits for exit_ in bundle.cascade.exits}
    work = _work(parts, samples, exits, args, console)
    new = with_variants(
        bundle,
        {name: {PRECISION: converted.model} for name, converted in work.converted.items()},
        args.out,
        provenance=_provenance(work, args),
        overwrite=args.overwrite,
    )
    console.line(f"bundle  {new.path}")
    console.line(f"hash    {new.hash}")
    console.line(f"points  {', '.join(bundle.operating_points()) or 'none'} (carried over)")
    return {"bundle": str(new.path), "hash": new.hash, "made_of": bundle.hash, **work.result()}


@dataclass(frozen=True)
class _Part:
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
            name: np.concatenate([np.atleast_1d(row[name]) for row in rows])
            for name in self.outputs
        }


@dataclass(frozen=True)
class _Samples:
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
        return console.progress(self.batches(), description, -(-self.size // _BATCH))


class _Difference:
    """How far an output in FP16 is off, over all batches; NaN stays."""

    def __init__(self) -> None:
        self.absolute = self._largest = 0.0
        self._same = self._rows = 0

    def add(self, have: NDArray[Any], want: NDArray[Any]) -> None:
        with np.errstate(invalid="ignore"):  # infinities give NaN, which no tolerance accepts
            off = np.abs(have.astype(np.float64) - want.astype(np.float64)).max(initial=0.0)
        self.absolute = float(np.maximum(self.absolute, off))
        self._largest = max(self._largest, float(np.abs(want).max(initial=0.0)))

    def count_classes(self, have: NDArray[Any], want: NDArray[Any]) -> None:
        self._same += int((have.argmax(axis=-1) == want.argmax(axis=-1)).sum())
        self._rows += len(have)

    @property
    def relative(self) -> float:
        if not self._largest:
            return 0.0 if self.absolute == 0 else math.inf
        return self.absolute / self._largest

    @property
    def agreement(self) -> float:
        return self._same / self._rows


@dataclass(frozen=True)
class _Work:
    """All that was found.

    Attributes:
        samples: What it was found on.
        overflows: Stage -> tensor -> largest magnitude.
        converted: Stage -> its model in FP16.
        original_bytes: Stage -> size of its model in FP32.
        errors: Stage -> output -> difference, both precisions fed with FP32 inputs.
        exits: Exit -> difference of its logits, from the image on.
        tolerance: What errors are held to.
    """

    samples: _Samples
    overflows: Mapping[str, Mapping[str, float]]
    converted: Mapping[str, Converted]
    original_bytes: Mapping[str, int]
    errors: Mapping[str, Mapping[str, _Difference]]
    exits: Mapping[str, _Difference]
    tolerance: float

    def error(self, stage: str) -> float:
        """Largest relative error of a stage's outputs; NaN where one is."""
        return float(np.max([one.relative for one in self.errors[stage].values()]))

    def result(self) -> dict[str, Any]:
        return {
            "precision": PRECISION,
            "data": self.samples.data,
            "samples": self.samples.size,
            "tolerance": self.tolerance,
            "stages": {
                stage: {
                    "kept": dict(one.kept),
                    "kept_by_reason": dict(Counter(one.kept.values())),
                    "casts": one.casts,
                    "bytes": len(one.model),
                    "fp32_bytes": self.original_bytes[stage],
                    "overflows": {
                        tensor: top if math.isfinite(top) else str(top)
                        for tensor, top in self.overflows.get(stage, {}).items()
                    },
                    "relative_error": self.error(stage),
                }
                for stage, one in self.converted.items()
            },
            "exits": {
                name: {
                    "same_class": one.agreement,
                    "largest_logit_difference": one.absolute,
                    "relative_error": one.relative,
                }
                for name, one in self.exits.items()
            },
        }


def _parts(bundle: Bundle, stages: str | None) -> list[_Part]:
    """The stages in order of execution, and which of them are to be converted."""
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
        if chosen and ("fp32" not in record.variants or PRECISION in record.variants):
            there = PRECISION in record.variants
            raise ConfigError(
                f"stage {record.name!r} has {f'{PRECISION} already' if there else 'no fp32'}",
                got=", ".join(record.variants),
                remedy="Name the stages to convert with --stages",
            )
        precision = "fp32" if "fp32" in record.variants else next(iter(record.variants))
        parts.append(
            _Part(
                f"stage {record.name!r}",
                record.name,
                bundle.stage_model(record.name, precision),
                tuple(spec.name for spec in record.inputs),
                tuple(spec.name for spec in record.outputs),
                any(spec.shape[0] == 1 for spec in record.inputs),
                chosen,
            )
        )
    return parts


def _work(
    parts: Sequence[_Part],
    samples: _Samples,
    exits: Mapping[str, str],
    args: argparse.Namespace,
    console: Console,
) -> _Work:
    """Convert and compare; shows what was found before it judges it."""
    overflows = {} if samples.data is None else _ranges(parts, samples, console)
    chosen = [part for part in parts if part.chosen]
    converted = {
        part.stage: _converted(part, overflows.get(part.stage, {}))
        for part in console.progress(chosen, "converting")
    }
    errors, ends = _compare(parts, converted, samples, exits, console)
    sizes = {part.stage: len(part.model) for part in chosen}
    work = _Work(samples, overflows, converted, sizes, errors, ends, args.tolerance)
    _show(work, console)
    for part in chosen:
        if not work.error(part.stage) <= args.tolerance:
            raise _too_far(part, work)
    return work


def _ranges(
    parts: Sequence[_Part], samples: _Samples, console: Console
) -> dict[str, dict[str, float]]:
    """Stage -> tensors beyond FP16, from one pass of the data through the FP32 chain."""
    from engines.fp16 import RangeFinder

    finders = {}
    for part in parts:
        if part.chosen:
            with _naming(part):
                finders[part.stage] = RangeFinder(part.model)
    runs = {
        part.stage: finders[part.stage].run if part.chosen else _session(part, part.model)
        for part in parts
    }
    for batch in samples.progress(console, "looking for values beyond FP16"):
        known = dict(batch)
        for part in parts:
            with _naming(part):
                known |= part.apply(runs[part.stage], known)
    return {stage: finder.overflows() for stage, finder in finders.items()}


def _converted(part: _Part, overflows: Mapping[str, float]) -> Converted:
    from engines.fp16 import convert, nodes_to_keep

    with _naming(part):
        return convert(part.model, keep=nodes_to_keep(part.model, overflows))


def _compare(
    parts: Sequence[_Part],
    converted: Mapping[str, Converted],
    samples: _Samples,
    exits: Mapping[str, str],
    console: Console,
) -> tuple[dict[str, dict[str, _Difference]], dict[str, _Difference]]:
    """Each stage fed with FP32 inputs, and the chain from end to end."""
    full = {part.stage: _session(part, part.model) for part in parts}
    half = full | {
        part.stage: _session(part, converted[part.stage].model, half=True)
        for part in parts
        if part.chosen
    }
    errors = {p.stage: {name: _Difference() for name in p.outputs} for p in parts if p.chosen}
    ends = {name: _Difference() for name in exits}
    for batch in samples.progress(console, "comparing FP16 with FP32"):
        want, have = dict(batch), dict(batch)
        for part in parts:
            want |= part.apply(full[part.stage], want)
            chained = part.apply(half[part.stage], have)
            have |= chained
            if part.chosen:
                # The first stages are fed the same either way.
                same = all(have[name] is want[name] for name in part.inputs)
                alone = chained if same else part.apply(half[part.stage], want)
                for name, difference in errors[part.stage].items():
                    difference.add(alone[name], want[name])
        for name, logits in exits.items():
            ends[name].add(have[logits], want[logits])
            ends[name].count_classes(have[logits], want[logits])
    return errors, ends


def _session(part: _Part, model: bytes, *, half: bool = False) -> Callable[[Arrays], Arrays]:
    """A session of a part in either precision."""
    from edge_runtime.backends.onnxrt import native_error, native_exceptions, new_session
    from engines.fp16 import emulated

    with _naming(part):
        session = new_session(emulated(model) if half else model)
    names = list(part.outputs)

    def run(feeds: Arrays) -> Arrays:
        try:
            return dict(zip(names, session.run(names, feeds), strict=True))
        except native_exceptions() as error:
            raise native_error(error, f"{part.name} failed", part.stage) from error

    return run


@contextlib.contextmanager
def _naming(part: _Part) -> Iterator[None]:
    """Put the stage's name before what is wrong with it."""
    try:
        yield
    except (EngineBuildError, BackendError, ManifestError) as error:
        if str(error).startswith(part.name):
            raise
        raise EngineBuildError(f"{part.name}: {error}") from error


def _too_far(part: _Part, work: _Work) -> EngineBuildError:
    name, worst = next(
        (name, one)
        for name, one in work.errors[part.stage].items()
        if not one.relative <= work.tolerance
    )
    remedy = "Where the classes agree all the same, raise --tolerance"
    if work.samples.data is None:
        remedy = "Give --data: values beyond FP16 are found on it and stay in FP32"
    elif part.name != part.stage:
        remedy = f"Leave it in FP32 by naming the other stages with --stages. {remedy}"
    return EngineBuildError(
        f"{part.name} in {PRECISION}: relative error of its output {name!r}",
        got=f"{worst.relative:.3g}",
        expected=f"<= {work.tolerance:g}",
        remedy=remedy,
    )


def _show(work: _Work, console: Console) -> None:
    console.table(
        f"Stages in {PRECISION}",
        ("stage", "kept in FP32", "casts", "kB", "of FP32", "relative error"),
        [
            (
                stage,
                ", ".join(f"{n} {why}" for why, n in Counter(one.kept.values()).items()) or "-",
                one.casts,
                f"{len(one.model) / 1e3:.1f}",
                percent(len(one.model) / work.original_bytes[stage]),
                f"{work.error(stage):.1e}",
            )
            for stage, one in work.converted.items()
        ],
    )
    if work.exits:
        console.table(
            "From the input to the logits, FP16 against FP32",
            ("exit", "same class", "largest logit difference", "relative"),
            [
                (name, f"{one.agreement:.2%}", f"{one.absolute:.2g}", f"{one.relative:.1e}")
                for name, one in work.exits.items()
            ],
        )
    if work.samples.data is None:
        console.line(
            f"NOT CHECKED ON DATA: the figures are of {work.samples.size} samples of noise, and "
            "nobody looked for values beyond FP16. Give --data."
        )
    else:
        console.line(f"ranges and figures are of {work.samples.size} samples of the data")


def _provenance(work: _Work, args: argparse.Namespace) -> dict[str, Any]:
    stages = {
        stage: {
            "kept_by_reason": found["kept_by_reason"],
            "casts": found["casts"],
            "relative_error": found["relative_error"],
        }
        for stage, found in work.result()["stages"].items()
    }
    return {
        "made_by": "engines.convert_command",
        "precision": PRECISION,
        "versions": {p: importlib.metadata.version(p) for p in ("onnx", "onnxruntime")},
        "data": work.samples.data,
        "samples": work.samples.size,
        "tolerance": args.tolerance,
        "stages": stages,
        "exits": work.result()["exits"],
    }


def _convert_file(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The same for one ONNX file."""
    from engines.classifier import read_model

    if args.stages is not None:
        raise ConfigError("--stages is for bundles", got=str(args.source))
    _check_file(args.source, args.out, overwrite=args.overwrite)
    proto = read_model(args.source, "the model")
    inputs = [_spec(value) for value in proto.graph.input]
    outputs = tuple(value.name for value in proto.graph.output)
    single = any(spec.shape[0] == 1 for spec in inputs)
    data = proto.SerializeToString()
    part = _Part(
        str(args.source),
        str(args.source),
        data,
        tuple(spec.name for spec in inputs),
        outputs,
        single,
        True,
    )
    logits = {
        value.name: value.name
        for value in proto.graph.output
        if len(value.type.tensor_type.shape.dim) == 2
    }
    work = _work([part], _samples(args, inputs, None), logits, args, console)
    (converted,) = work.converted.values()
    _write(args.out, converted.model)
    console.line(f"wrote   {args.out}")
    return {
        "file": str(args.out),
        "sha256": sha256(converted.model),
        "made_of": sha256(args.source.read_bytes()),
        **work.result(),
    }


def _spec(value: Any) -> TensorSpec:
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


def _check_file(source: Path, out: Path, *, overwrite: bool) -> None:
    """Refuse an output file before any long work."""
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"the folder {out.parent} does not exist", remedy="Create it first")
    if out.exists() and (not out.is_file() or out.samefile(source)):
        raise ConfigError(f"{out} is not replaced", remedy="Choose another --out")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists", remedy="Choose another --out, or give --overwrite")


def _write(path: Path, data: bytes) -> None:
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


def _samples(
    args: argparse.Namespace, inputs: Sequence[TensorSpec], classes: Sequence[str] | None
) -> _Samples:
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
) -> _Samples:
    if classes is None:  # labels are of no use here
        classes = sorted(e.name for e in path.iterdir() if e.is_dir() and e.name[0] != ".")
    size = parse_size(args.image_size) if args.image_size else None
    data = ImageDataset.open(path, classes, image_size=size, channels=int(spec.shape[3]))
    data = data.balanced(args.samples, seed=0)
    spec.check(data.image(0)[None])

    def batches() -> Iterator[Arrays]:
        return ({spec.name: images} for images, _ in data.batches(_BATCH))

    return _Samples(batches, len(data), {"hash": data.hash, "image_size": args.image_size})


def _arrays(
    args: argparse.Namespace, path: Path, inputs: Sequence[TensorSpec], also: str | None
) -> _Samples:
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
    return _Samples(lambda: _batches(arrays), len(rows), {"hash": digest, "image_size": None})


def _noise(inputs: Sequence[TensorSpec]) -> _Samples:
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
    return _Samples(lambda: _batches(arrays), _NOISE_SAMPLES, None)


def _batches(arrays: Arrays) -> Iterator[Arrays]:
    total = len(next(iter(arrays.values())))
    for start in range(0, total, _BATCH):
        yield {name: values[start : start + _BATCH] for name, values in arrays.items()}
