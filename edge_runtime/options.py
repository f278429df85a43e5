"""Options that several commands share, and what they open."""

from __future__ import annotations

import argparse
import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, get_args

from edge_runtime.dataset import ImageDataset, parse_part, parse_size
from edge_runtime.errors import ConfigError
from edge_runtime.load import BACKENDS, load
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.scheduler import Scheduler

if TYPE_CHECKING:
    from edge_runtime.backends.cuda.backend import CudaOptions
    from edge_runtime.backends.onnxrt import OnnxRuntimeOptions


#: Options by the backend that has them.
_ONNXRT = ("threads", "provider", "optimization")
_TENSORRT = ("mode", "device")


def count(text: str) -> int:
    """The type of an option that is a whole number >= 1."""
    return _whole(text, 1)


def whole(text: str) -> int:
    """The type of an option that is a whole number >= 0."""
    return _whole(text, 0)


def positive(text: str) -> float:
    """The type of an option that is a finite number > 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number > 0")
    return value


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number >= {least}")
    return value


def add_bundle(parser: argparse.ArgumentParser, *, backend: str = "onnxrt") -> None:
    """The bundle, and how its stages are run; `backend` is the default."""
    from edge_runtime.backends.cuda.backend import Mode
    from edge_runtime.backends.onnxrt import Optimization

    parser.add_argument("bundle", metavar="BUNDLE", help="folder of the bundle")
    group = parser.add_argument_group("backend")
    group.add_argument("--backend", choices=BACKENDS, default=backend)
    group.add_argument("--threads", type=whole, help="onnxrt: 0 is one per core (default)")
    group.add_argument(
        "--provider", help="onnxrt: execution provider (default CPUExecutionProvider)"
    )
    group.add_argument("--optimization", choices=get_args(Optimization), help="onnxrt")
    group.add_argument(
        "--mode", choices=get_args(Mode), help="tensorrt: execution mode (default: the best here)"
    )
    group.add_argument("--device", type=whole, help="tensorrt: index of the GPU (default 0)")


def add_data(parser: argparse.ArgumentParser, *, without: str | None = None) -> None:
    """Labelled images.

    Args:
        parser: The command's.
        without: What the command does where none are given; None where it needs them.
    """
    group = parser.add_argument_group("data")
    more = "" if without is None else f"; without it {without}"
    group.add_argument(
        "--data",
        required=without is None,
        metavar="PATH",
        help=f"a folder of class folders, or an npz with images and labels{more}",
    )
    group.add_argument("--part", metavar="K/N", help="use the K-th of N disjoint parts of the data")
    group.add_argument(
        "--seed", type=whole, default=0, help="seed of everything random (default 0)"
    )
    group.add_argument(
        "--image-size",
        metavar="HEIGHTxWIDTH",
        help="size of the camera: images are scaled to cover it and cropped",
    )


def add_operating_point(parser: argparse.ArgumentParser) -> None:
    """The operating point."""
    parser.add_argument(
        "--operating-point",
        metavar="NAME",
        help="a point of the bundle, or a .json file (default: zero_loss)",
    )


def open_data(
    args: argparse.Namespace, bundle: Bundle, *, skip_unreadable: bool = False
) -> ImageDataset:
    """The images that `args` name, checked against the bundle's classes and image.

    Args:
        args: What `add_data` has added.
        bundle: The bundle.
        skip_unreadable: See `ImageDataset.open`.

    Raises:
        ConfigError: The data is empty, has other classes, or images of another size.
    """
    image = bundle.cascade.image
    if len(image.shape) != 4 or not isinstance(image.shape[3], int) or image.dtype != "uint8":
        raise ConfigError(
            "the bundle does not take camera images",
            got=str(image),
            expected="(batch, height, width, channels) uint8",
        )
    size = parse_size(args.image_size) if args.image_size else None
    data = ImageDataset.open(
        args.data,
        bundle.cascade.classes,
        image_size=size,
        channels=image.shape[3],
        skip_unreadable=skip_unreadable,
    )
    if args.part:
        data = data.part(*parse_part(args.part), seed=args.seed)
    return data


def backend_options(
    args: argparse.Namespace, *, time_stages: bool = False
) -> OnnxRuntimeOptions | CudaOptions | None:
    """Options of the backend that `args` name.

    Args:
        args: What `add_bundle` has added.
        time_stages: See `open_cascade`.

    Raises:
        ConfigError: There are some of another backend.
    """
    own: tuple[str, ...] = {"onnxrt": _ONNXRT, "tensorrt": _TENSORRT}.get(args.backend, ())
    for name in (*_ONNXRT, *_TENSORRT):
        if name not in own and getattr(args, name) is not None:
            raise ConfigError(f"--{name} is no option of --backend {args.backend}")
    given = {name: getattr(args, name) for name in own if getattr(args, name) is not None}
    if args.backend == "onnxrt":
        return onnxrt_options(args)
    if args.backend == "tensorrt":
        from edge_runtime.backends.cuda.backend import CudaOptions

        return CudaOptions(**given, time_stages=time_stages)
    return None


def onnxrt_options(args: argparse.Namespace) -> OnnxRuntimeOptions:
    """Options of the ONNX Runtime backend; the defaults for what `args` do not give."""
    from edge_runtime.backends.onnxrt import OnnxRuntimeOptions

    given = {name: getattr(args, name) for name in _ONNXRT if getattr(args, name) is not None}
    return OnnxRuntimeOptions(**given)


def open_with_base(
    args: argparse.Namespace, bundle: Bundle, data: ImageDataset, stack: ExitStack
) -> tuple[Scheduler, Scheduler]:
    """The cascade at the operating point of `args`, and its base model: the last exit alone.

    Both run the same variants, and are closed with `stack`.
    """
    cascade = stack.enter_context(open_cascade(args, bundle, data, args.operating_point))
    point = OperatingPoint(name="base", policy="never", variants=cascade.point.variants)
    return cascade, stack.enter_context(open_cascade(args, bundle, data, point))


def open_cascade(
    args: argparse.Namespace,
    bundle: Bundle,
    data: ImageDataset,
    point: str | OperatingPoint | None,
    *,
    time_stages: bool = False,
) -> Scheduler:
    """The cascade at an operating point, opened for the size of the data's images.

    Args:
        args: What `add_bundle` has added.
        bundle: The bundle.
        data: Images.
        point: The operating point, or its name.
        time_stages: Whether traces must have the time of every stage, which a GPU tells only when
            it is asked for.
    """
    height, width, _ = data.image(0).shape
    return load(
        bundle,
        backend=args.backend,
        operating_point=point,
        image_size=(height, width),
        options=backend_options(args, time_stages=time_stages),
    )
