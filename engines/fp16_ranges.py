"""Which tensors of a model go beyond what FP16 holds, as data shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends.onnxrt import native_error, native_exceptions, new_session
from edge_runtime.errors import ConfigError, EngineBuildError
from engines.fp16_graph import FLOAT, Model
from engines.onnx_package import onnx

#: The largest finite number of FP16.
FP16_MAX = 65504.0
#: Data is a sample: values up to half of what FP16 holds are taken for safe.
MARGIN = 2.0
OVERFLOW = "values beyond FP16 on the data"


class RangeFinder:
    """Runs an FP32 model and remembers the largest magnitude of each of its tensors.

    Only maxima leave the session, so memory does not grow with the number of samples.

    Args:
        model: An ONNX file in FP32.

    Raises:
        EngineBuildError: It can't be converted anyway.
        BackendError: ONNX Runtime refuses it.
    """

    def __init__(self, model: bytes) -> None:
        whole = Model(model)
        whole.check_convertible()
        self._outputs = [value.name for value in whole.proto.graph.output]
        self.largest: dict[str, float] = dict.fromkeys(whole.float_tensors(), 0.0)
        graph = whole.proto.graph
        for index, name in enumerate(self.largest):
            magnitude, maximum = f"range/{index}/abs", f"range/{index}"
            graph.node.append(onnx.helper.make_node("Abs", [name], [magnitude]))
            graph.node.append(
                onnx.helper.make_node("ReduceMax", [magnitude], [maximum], keepdims=0)
            )
            graph.output.append(onnx.helper.make_tensor_value_info(maximum, FLOAT, []))
        self._session = new_session(whole.proto.SerializeToString())

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run a batch.

        Args:
            feeds: Input name -> batch.

        Returns:
            The model's outputs.

        Raises:
            BackendError: ONNX Runtime refuses the batch.
            EngineBuildError: An output is NaN, so that the FP32 model is no reference.
        """
        try:
            results = self._session.run(None, dict(feeds))
        except native_exceptions() as error:
            raise native_error(error, "the model failed") from error
        outputs = dict(zip(self._outputs, results, strict=False))
        for name, values in outputs.items():
            if values.dtype.kind == "f" and np.isnan(values).any():
                raise EngineBuildError(f"output {name!r} of the FP32 model is NaN on the data")
        maxima = results[len(self._outputs) :]
        for name, maximum in zip(self.largest, maxima, strict=True):
            self.largest[name] = max(self.largest[name], float(maximum))
        return outputs

    def overflows(self, limit: float = FP16_MAX, margin: float = MARGIN) -> dict[str, float]:
        """Tensors whose magnitude came to `limit / margin` or beyond, with the largest seen."""
        return {name: top for name, top in self.largest.items() if not top < limit / margin}


def find_overflows(
    model: bytes,
    batches: Iterable[Mapping[str, NDArray[Any]]],
    limit: float = FP16_MAX,
    margin: float = MARGIN,
) -> dict[str, float]:
    """Run a model on data to find the tensors that FP16 can't hold.

    Args:
        model: An ONNX file in FP32.
        batches: Input name -> batch, in any number.
        limit: The largest magnitude that can be held.
        margin: What the limit is divided by, >= 1, since other data may give larger values.

    Returns:
        Tensor -> largest magnitude, for those at `limit / margin` or beyond; `nodes_to_keep` turns
        it into what `engines.fp16.convert` takes.

    Raises:
        ConfigError: The limit or the margin is none, or there is no batch.
        EngineBuildError: The model can't be converted anyway, or gives NaN.
        BackendError: ONNX Runtime refuses the model or a batch.
    """
    if not (limit > 0 and margin >= 1):
        raise ConfigError("limit, margin", got=(limit, margin), expected="> 0, >= 1")
    finder = RangeFinder(model)
    count = 0
    for count, feeds in enumerate(batches, start=1):  # noqa: B007
        finder.run(feeds)
    if not count:
        raise ConfigError("there is no batch to find ranges on")
    return finder.overflows(limit, margin)


def nodes_to_keep(model: bytes, overflows: Mapping[str, float]) -> dict[str, str]:
    """The nodes that write or read such tensors: node -> reason, in order of execution."""
    return {
        node.name: OVERFLOW
        for node in Model(model).nodes
        if node.op_type not in ("Shape", "Size")
        and any(name in overflows for name in (*node.input, *node.output))
    }
