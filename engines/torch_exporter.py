"""torch's own ONNX exporter, called the one way that gives a stage: quiet, whole, without paths."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edge_runtime.errors import EngineBuildError
from edge_runtime.tensors import BATCH
from engines.onnx_graph import strip_debug_info

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

#: What user code in a module's forward, and the exporter that traces it, may raise.
MODULE_ERRORS = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
)


def to_onnx(
    stage: str,
    module: torch.nn.Module,
    arguments: Sequence[torch.Tensor],
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int,
) -> bytes:
    """Export a module with a dynamic batch.

    Args:
        stage: Name of the stage, for messages.
        module: In eval mode, called with one positional tensor per input.
        arguments: Samples to trace it with, first axis the batch, at least 2 samples.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        opset: ONNX operator set, 18 or later.

    Returns:
        The ONNX file, without external data.

    Raises:
        EngineBuildError: torch can't export it; the message has torch's.
    """
    import torch

    batch = torch.export.Dim(BATCH)
    try:
        with _silenced(stage):
            program = torch.onnx.export(
                module,
                tuple(arguments),
                dynamo=True,
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=opset,
                dynamic_shapes=tuple({0: batch} for _ in arguments),
                external_data=False,
                verbose=False,
            )
            assert program is not None  # what dynamo=True promises
            model = program.model_proto
        strip_debug_info(model)
        data: bytes = model.SerializeToString()
    except MODULE_ERRORS as error:
        raise torch_error(stage, "can't be exported", error.__cause__ or error) from error
    return data


def torch_error(stage: str, what: str, error: BaseException) -> EngineBuildError:
    """What torch raised as one line; raise it from `error`."""
    first = (str(error).strip().splitlines() or [""])[0]
    return EngineBuildError(f"stage {stage!r} {what}: torch says: {type(error).__name__}: {first}")


@contextlib.contextmanager
def _silenced(stage: str) -> Iterator[None]:
    """Keep what torch's exporter says for our own log at DEBUG; exceptions pass."""
    said = io.StringIO()
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if said.getvalue():
            logger.debug("torch while exporting %s: %s", stage, said.getvalue())
