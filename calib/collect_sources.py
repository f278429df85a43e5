"""What a table is collected from: bundles over images, ONNX files over arrays, torch modules."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calib.collect import DTYPES, Collected, Source, collect
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import ConfigError, EngineBuildError
from edge_runtime.files import sha256
from edge_runtime.manifest import Bundle
from edge_runtime.scheduler import Scheduler
from edge_runtime.tensors import TensorSpec

if TYPE_CHECKING:
    import torch

    from edge_runtime.backends.onnxrt import OnnxRuntimeOptions

#: Samples per call, where a model takes as many and nobody asks for another number.
BATCH = 64

Arrays = dict[str, NDArray[Any]]


def bundle_source(
    bundle: Bundle,
    names: Sequence[str],
    data: ImageDataset,
    open_cascade: Callable[[], Scheduler],
    origin: Mapping[str, Any],
    batch: int | None = None,
) -> Source:
    """All exits of a bundle.

    Args:
        bundle: The bundle.
        names: What its exits are called in the table, in their order.
        data: Images.
        open_cascade: Opens it at `OperatingPoint.all_exits`; called when its turn comes.
        origin: How it is run, plain JSON data.
        batch: Images per call; where None, 64 or as many as the backend takes.

    Returns:
        The source. Its batches raise ConfigError where the backend takes no such batch.
    """

    def batches(begin: int) -> Iterator[Sequence[NDArray[Any]]]:
        with open_cascade() as scheduler:
            size = _batch(scheduler, batch)
            rest = data.subset(np.arange(begin, len(data)))
            for images, _ in rest.batches(size):
                found = scheduler.logits(images)
                yield [found[exit_.name] for exit_ in bundle.cascade.exits]

    return Source(
        title=bundle.manifest.name,
        names=tuple(names),
        classes=len(bundle.cascade.classes),
        origin={"bundle": bundle.hash, "batch": batch or BATCH, **origin},
        batches=batches,
    )


def _batch(scheduler: Scheduler, asked: int | None) -> int:
    largest = scheduler.backend.largest_batch
    if asked is not None and largest is not None and asked > largest:
        raise ConfigError(
            "--batch", got=asked, expected=f"<= {largest}, which the engines were built for"
        )
    return asked or min(BATCH, largest or BATCH)


@dataclass(frozen=True, eq=False)
class InputArrays:
    """An npz with an array for every input of a model, and labels; `open` makes one.

    Attributes:
        path: The file.
        labels: Class indices, shape (N,), int64.
    """

    path: Path
    labels: NDArray[np.int64]
    _arrays: Arrays = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> InputArrays:
        """Read the labels.

        Raises:
            ConfigError: There is no such npz, or it has no labels.
        """
        if path.is_dir():
            raise ConfigError(
                f"the data {path} is a folder of images, which need preprocessing",
                remedy="Make a bundle of the ONNX files (edge-runtime export) and collect from it",
            )
        if not path.is_file():
            raise ConfigError(f"the data {path} does not exist")
        labels = _read(path, "labels")
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ConfigError(
                f"the data {path}: array 'labels'",
                got=f"shape {labels.shape}, {labels.dtype}",
                expected="shape (N,), integers",
            )
        return cls(path, labels.astype(np.int64))

    def of(self, inputs: Sequence[TensorSpec]) -> Arrays:
        """The arrays of some inputs, checked; each is read once.

        Raises:
            ConfigError: There is no array of this name, or it has other samples than the labels.
            InputError: It has another shape or dtype than the input, or is not finite.
        """
        for spec in inputs:
            if spec.name not in self._arrays:
                self._arrays[spec.name] = _read(self.path, spec.name)
            array = self._arrays[spec.name]
            spec.check(array)
            if len(array) != len(self.labels):
                raise ConfigError(
                    f"the data {self.path}: samples of the array {spec.name!r}",
                    got=len(array),
                    expected=f"{len(self.labels)} as in 'labels'",
                )
        return {spec.name: self._arrays[spec.name] for spec in inputs}


def _read(path: Path, name: str) -> NDArray[Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if name not in file.files:
                raise ConfigError(
                    f"the data {path}: there is no array {name!r}",
                    got=", ".join(file.files) or "none",
                    expected="labels, and an array named as each input of the models",
                )
            array: NDArray[Any] = file[name]
    except ConfigError:
        raise
    except (OSError, ValueError, AttributeError, EOFError, LookupError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the data {path} is no whole npz: {reason}") from error
    return array


@dataclass(frozen=True, eq=False)
class ModelFile:
    """A plain ONNX classifier over arrays; `open` makes one, and it is loaded only while it runs.

    Attributes:
        path: The file.
        output: The output that has the logits.
        classes: Their number.
        hash: Of the model, with its external data.
        arrays: Input name -> samples, shape (N, ...).
        options: How it is run.
    """

    path: Path
    output: str
    classes: int
    hash: str
    arrays: Arrays
    options: OnnxRuntimeOptions

    @classmethod
    def open(cls, path: Path, data: InputArrays, options: OnnxRuntimeOptions) -> ModelFile:
        """Read a model and run it on the first sample.

        Raises:
            ConfigError: It has several outputs that may be the logits, or the data lacks an input.
            EngineBuildError: It is no ONNX model, or its output are no logits.
            BackendError: ONNX Runtime refuses it.
        """
        from engines import parts

        part, inputs, logits = parts.file_part(path)
        outputs = list(logits) or list(part.outputs)
        if len(outputs) != 1:
            raise ConfigError(
                f"outputs of {path}",
                got=", ".join(outputs) or "none",
                expected="one with logits, shape (batch, classes)",
                remedy="Choose with edge-runtime export, and collect from the bundle",
            )
        file = cls(path, outputs[0], 0, sha256(part.model), data.of(inputs), options)
        with file.opened() as run:
            first = run(0, 1)
        if first.ndim != 2 or len(first) != 1 or first.shape[1] < 2 or first.dtype.kind != "f":
            raise EngineBuildError(
                f"output {outputs[0]!r} of {path}",
                got=f"shape {first.shape}, {first.dtype}",
                expected="logits, shape (batch, classes), float",
            )
        return cls(path, outputs[0], first.shape[1], file.hash, file.arrays, options)

    @contextmanager
    def opened(self) -> Iterator[Callable[[int, int], NDArray[Any]]]:
        """Load it.

        Yields:
            A function from the first row and the row after the last to logits, shape
            (rows, classes).
        """
        from edge_runtime.backends.onnxrt import native_error, native_exceptions, new_session
        from engines import parts

        part, _, _ = parts.file_part(self.path)
        if sha256(part.model) != self.hash:
            raise ConfigError(f"the model {self.path} was altered while it was in use")
        with parts.naming(part):
            session = new_session(part.model, self.options)

        def call(feeds: Arrays) -> Arrays:
            try:
                return {self.output: session.run([self.output], feeds)[0]}
            except native_exceptions() as error:
                raise native_error(error, f"{self.path} failed", str(self.path)) from error

        def run(begin: int, end: int) -> NDArray[Any]:
            rows = {name: array[begin:end] for name, array in self.arrays.items()}
            return part.apply(call, rows)[self.output]

        yield run

    def macs(self) -> int:
        """Operations for one sample; see `engines.macs`."""
        from engines import parts
        from engines.macs import macs

        part, _, _ = parts.file_part(self.path)
        shapes = {name: (1, *array.shape[1:]) for name, array in self.arrays.items()}
        with parts.naming(part):
            return macs(part.model, shapes)

    def source(self, origin: Mapping[str, Any], batch: int | None = None) -> Source:
        """It as a source, called as its file without the suffix.

        Args:
            origin: How it is run, plain JSON data.
            batch: Samples per call, 64 where None.
        """
        size = batch or BATCH
        samples = len(next(iter(self.arrays.values())))

        def batches(begin: int) -> Iterator[Sequence[NDArray[Any]]]:
            with self.opened() as run:
                for start in range(begin, samples, size):
                    yield [run(start, min(start + size, samples))]

        return Source(
            title=str(self.path),
            names=(self.path.stem,),
            classes=self.classes,
            origin={"model": self.hash, "batch": size, **origin},
            batches=batches,
        )


def digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Hash of names, shapes, dtypes and contents, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name}\0{array.shape}\0{array.dtype.str}\0".encode())
        found.update(memoryview(array.reshape(-1).view(np.uint8).data))
    return found.hexdigest()


def collect_modules(
    modules: Mapping[str, torch.nn.Module],
    data: ImageDataset,
    out: Path,
    *,
    console: Console | None = None,
    batch: int = BATCH,
    dtype: str = DTYPES[0],
    overwrite: bool = False,
    anew: bool = False,
) -> Collected:
    """Collect a table from torch modules.

    Args:
        modules: Name in the table -> module. It takes images, a tensor (n, height, width, channels)
            uint8 on the device of its parameters, and returns logits (n, classes): put its
            preprocessing before it in an `nn.Sequential`. It is run in eval mode and gets its mode
            back.
        data: Labelled images.
        out: The npz to write.
        console: Shows progress; on stderr where None.
        batch: Images per call.
        dtype: As of `calib.collect.collect`.
        overwrite: As of `calib.collect.collect`.
        anew: As of `calib.collect.collect`. Rows of an earlier run are known by the modules' text,
            their weights and the data.

    Returns:
        What was written.

    Raises:
        ConfigError: As for `calib.collect.collect`, or a module does not return logits.
        CalibrationError: A logit is not finite.
        EdgeRuntimeError: The files can't be written.
    """
    sources = [_module_source(name, module, data, batch) for name, module in modules.items()]
    return collect(
        sources,
        data.labels,
        out,
        console or Console(),
        data={"images": data.hash, "shape": list(data.image_shape)},
        dtype=dtype,
        overwrite=overwrite,
        anew=anew,
    )


def _module_source(name: str, module: torch.nn.Module, data: ImageDataset, batch: int) -> Source:
    import torch

    tensors = (*module.parameters(), *module.buffers())
    device = tensors[0].device if tensors else torch.device("cpu")
    weights = {key: value.cpu().numpy() for key, value in module.state_dict().items()}

    def batches(begin: int) -> Iterator[Sequence[NDArray[Any]]]:
        training = module.training
        module.eval()
        try:
            rest = data.subset(np.arange(begin, len(data)))
            for images, _ in rest.batches(batch):
                with torch.inference_mode():
                    logits = module(torch.from_numpy(images).to(device))
                if logits.shape != (len(images), len(data.classes)):
                    raise ConfigError(
                        f"output of the module {name!r}",
                        got=tuple(logits.shape),
                        expected=f"{(len(images), len(data.classes))}, logits of the data's "
                        "classes",
                    )
                yield [logits.float().cpu().numpy()]
        finally:
            module.train(training)

    return Source(
        title=name,
        names=(name,),
        classes=len(data.classes),
        origin={"text": sha256(str(module).encode()), "weights": digest(weights), "batch": batch},
        batches=batches,
    )
