"""Looks into ONNX files before a runtime does: whether it may open them, and with what care.

ONNX lets a tensor name an external file by a path. A stage from a bundle that somebody sent could
so read any file of the robot. Bundles never need it, hence the rule is simple: no tensor of a
stage, in any subgraph, function or attribute, may have external data. The scan reads the protobuf
wire format, because the robot has no onnx package and a runtime would open the file before anybody
could look. So does the one for casts, which ONNX Runtime must be kept from moving (see
`edge_runtime.backends.onnxrt`). No scan reads or copies weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from edge_runtime.errors import ManifestError

# Message -> field number -> message inside it (onnx.proto, IR version 13).
_CHILDREN: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
}
#: The same, and what has types and no tensors.
_TYPED_CHILDREN: dict[str, dict[int, str]] = {
    **_CHILDREN,
    "Graph": {**_CHILDREN["Graph"], 11: "Value", 12: "Value", 13: "Value"},
    "Function": {**_CHILDREN["Function"], 12: "Value"},
    "Attribute": {**_CHILDREN["Attribute"], 14: "Type", 15: "Type"},
    "Value": {2: "Type"},
    "Type": {1: "Elements", 4: "Container", 5: "Map", 8: "Elements", 9: "Container"},
    "Container": {1: "Type"},
    "Map": {2: "Type"},
}
#: Fields with the type of the elements; FLOAT16 and BFLOAT16 among its values.
_ELEMENT_TYPES = (("Tensor", 2), ("Elements", 1))
_HALF = (10, 16)
_OPERATOR = ("Node", 4)
_CASTS = (b"Cast", b"CastLike")
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
#: At bytes 4 to 8 of a model in ONNX Runtime's own format, which it prefers to protobuf.
_ORT_FORMAT = b"ORTM"


def refuse_external_data(model: bytes, where: str) -> None:
    """Check that an ONNX model carries all of its tensors itself.

    Args:
        model: The file's bytes.
        where: Name of the file, for the message.

    Raises:
        ManifestError: A tensor has external data, or the bytes are no protobuf message.
    """
    if model[4:8] == _ORT_FORMAT:
        raise ManifestError(f"{where} is not an ONNX file", got="ONNX Runtime's own format")
    try:
        for message, number, _, first, _ in _walk(memoryview(model), _CHILDREN):
            if message == "Tensor" and (
                number == _EXTERNAL_DATA or (number == _DATA_LOCATION and first != 0)
            ):
                raise ManifestError(
                    f"{where} refers to external data",
                    remedy="Store its tensors inside the file (export without external data)",
                )
    except (IndexError, ValueError) as error:
        raise ManifestError(f"{where} is not an ONNX file: {error}") from error


def may_cast(model: bytes) -> bool:
    """Whether a runtime finds casts in an ONNX model, or may put some there.

    Args:
        model: The file's bytes.

    Returns:
        True where it has a Cast, or a tensor in half precision, for which a CPU has few kernels, in
        any of its subgraphs and functions; and where the bytes are no protobuf message.
    """
    view = memoryview(model)
    try:
        return any(
            first in _HALF
            if (message, number) in _ELEMENT_TYPES
            else (message, number) == _OPERATOR and view[first:last] in _CASTS
            for message, number, _, first, last in _walk(view, _TYPED_CHILDREN)
        )
    except (IndexError, ValueError):
        return True


def _walk(
    view: memoryview, children: Mapping[str, Mapping[int, str]]
) -> Iterator[tuple[str, int, int, int, int]]:
    """Yield the name of the message and what `_fields` does, of all messages from the model on."""
    queue = [("Model", 0, len(view))]
    while queue:
        message, start, end = queue.pop()
        inner = children.get(message, {})
        for number, wire, first, last in _fields(view, start, end):
            yield message, number, wire, first, last
            if wire == _BYTES and number in inner:
                queue.append((inner[number], first, last))


def _fields(view: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (field number, wire type, start or varint value, end) of each field of a message."""
    while at < end:
        key, at = _varint(view, at)
        number, wire = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            # Some protobuf parsers drop the upper bits and would see another field than this scan.
            raise ValueError(f"field number {number}")
        if wire == _VARINT:
            value, at = _varint(view, at)
            yield number, wire, value, at
            continue
        if wire == _BYTES:
            length, at = _varint(view, at)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire} of field {number}")
        if at + length > end:
            raise ValueError(f"field {number} runs past the end")
        yield number, wire, at, at + length
        at += length


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """Decode one base-128 integer; returns it and the position after it."""
    value = shift = 0
    while True:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("an integer of more than 64 bits")
