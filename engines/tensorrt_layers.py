"""What a built TensorRT engine consists of: its layers, their precision, and what only converts.

TensorRT tells it in two ways. On a device the engine's inspector gives JSON. Without one the
builder's own log gives the same layers, one per line, when it builds with detailed verbosity. The
wording differs between versions: 10.x has `"Format/Datatype": "Row major linear FP32"`, later ones
and TensorRT for RTX have `Datatype: Float` beside the format.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_runtime.errors import EngineBuildError

#: TensorRT's words for element types -> numpy's.
_DTYPES = {
    "float": "float32",
    "fp32": "float32",
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "int8": "int8",
    "uint8": "uint8",
    "fp8": "float8",
    "int32": "int32",
    "int64": "int64",
    "bool": "bool",
}
#: Kinds of layers that compute nothing.
_MOVING_KINDS = {"Reformat", "Cast", "NoOp"}
#: TensorRT's graph compiler names a fused kernel by what is in it: `__myl_CastMulAdd_myl0_3`.
_FUSED = re.compile(r"__myl_([A-Za-z]+)_")
#: Those of its words that stand for moving values, not for computing new ones.
_MOVING_WORDS = {"Cast", "Move", "Tran", "Resh", "Conc", "Copy", "Bitc"}
_LINE = re.compile(r"\s*Name: (?P<name>.*?), LayerType: (?P<kind>\w+)")


@dataclass(frozen=True)
class Layer:
    """One layer of an engine, which is one kernel or a few.

    Attributes:
        name: As TensorRT names it; it mostly holds the names of the ONNX nodes.
        kind: TensorRT's type of layer: "CaskConvolution", "kgen", "Reformat".
        inputs: Element types of its inputs, without constants: "float32", "int8".
        outputs: Element types of its outputs.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def converts(self) -> bool:
        """Whether what comes out has another element type than what went in."""
        return bool(self.inputs and self.outputs) and set(self.inputs) != set(self.outputs)

    @property
    def only_moves(self) -> bool:
        """Whether it only converts or rearranges values."""
        fused = _FUSED.match(self.name)
        if fused:
            words = re.findall(r"[A-Z][a-z0-9]*", fused[1])
            return bool(words) and set(words) <= _MOVING_WORDS
        return self.kind in _MOVING_KINDS


@dataclass(frozen=True)
class LayerSummary:
    """What an engine's layers cost besides the computation.

    Attributes:
        layers: How many there are.
        dtypes: Element type -> number of layers that compute, by the lowest of their inputs' types.
        casts: Layers that only convert to another element type, and perhaps rearrange.
        reformats: Layers that only rearrange values.
        fused_conversions: Layers that compute, and convert besides.
    """

    layers: int
    dtypes: Mapping[str, int]
    casts: int
    reformats: int
    fused_conversions: int


def summarize(layers: Sequence[Layer]) -> LayerSummary:
    """Count the layers of an engine by what they do."""
    moving = [layer for layer in layers if layer.only_moves]
    computing = [layer for layer in layers if not layer.only_moves]
    dtypes = Counter(_lowest(layer.inputs) for layer in computing)
    casts = sum(layer.converts for layer in moving)
    return LayerSummary(
        layers=len(layers),
        dtypes=dict(sorted(dtypes.items())),
        casts=casts,
        reformats=len(moving) - casts,
        fused_conversions=sum(layer.converts for layer in computing),
    )


def from_log(text: str) -> tuple[Layer, ...]:
    """Read the layers that the builder has logged.

    Args:
        text: The message that begins with "Layers:".

    Raises:
        EngineBuildError: A line is not as expected.
    """
    lines = text.partition("\n\n")[0].splitlines()[1:]
    return tuple(_from_line(line) for line in lines if line.strip())


def from_inspector(text: str) -> tuple[Layer, ...]:
    """Read the layers that the inspector of an engine has printed as JSON.

    Raises:
        EngineBuildError: The text is not as expected.
    """
    try:
        return tuple(_from_json(layer) for layer in json.loads(text)["Layers"])
    except (ValueError, TypeError, KeyError) as error:
        raise EngineBuildError(
            "the engine's layer information is not as expected", got=f"{text[:80]!r}"
        ) from error


def _from_line(line: str) -> Layer:
    found = _LINE.match(line)
    if not found:
        raise EngineBuildError("the log has a layer that can't be read", got=line[:120])
    return Layer(
        found["name"], found["kind"], _dtypes(line, "Inputs: ["), _dtypes(line, "Outputs: [")
    )


def _dtypes(line: str, beginning: str) -> tuple[str, ...]:
    """Element types of the tensors in one list of a line of the log."""
    tensors = line.partition(beginning)[2].partition("}]")[0]
    named = re.findall(r"(?:Format/Datatype|Datatype): ([^,}]+)", tensors)
    return tuple(_dtype(text) for text in named)


def _from_json(layer: Any) -> Layer:
    if isinstance(layer, str):
        raise EngineBuildError(
            "the engine was built without the details of its layers",
            remedy="Build it with edge-runtime build, which asks for them",
        )
    return Layer(
        layer["Name"],
        layer["LayerType"],
        tuple(_tensor_dtypes(layer["Inputs"])),
        tuple(_tensor_dtypes(layer["Outputs"])),
    )


def _tensor_dtypes(tensors: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for tensor in tensors:
        yield _dtype(str(tensor.get("Datatype") or tensor["Format/Datatype"]))


def _dtype(text: str) -> str:
    """Element type that a text of TensorRT names: "Float", "Row major linear INT8 format"."""
    for word in re.findall(r"\w+", text.lower()):
        if word in _DTYPES:
            return _DTYPES[word]
    return text.strip()


def _lowest(dtypes: Sequence[str]) -> str:
    """The type that decides how fast a layer computes."""
    order = ("int8", "float8", "float16", "bfloat16", "float32")
    return next((dtype for dtype in order if dtype in dtypes), dtypes[0] if dtypes else "none")
