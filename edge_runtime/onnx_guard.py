"""Refuses ONNX files whose tensors live in other files.

ONNX lets a tensor name an external file by a path. A stage from a bundle that somebody sent could
so read any file of the robot. Bundles never need it, hence the rule is simple: no tensor of a
stage, in any subgraph, function or attribute, may have external data. The scan reads the protobuf
wire format, because the robot has no onnx package and a runtime would open the file before anybody
could look.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    view = memoryview(model)
    queue = [("Model", 0, len(view))]
    try:
        while queue:
            message, start, end = queue.pop()
            children = _CHILDREN.get(message, {})
            for number, wire, first, last in _fields(view, start, end):
                if message == "Tensor" and (
                    number == _EXTERNAL_DATA or (number == _DATA_LOCATION and first != 0)
                ):
                    raise ManifestError(
                        f"{where} refers to external data",
                        remedy="Store its tensors inside the file (export without external data)",
                    )
                if wire == _BYTES and number in children:
                    queue.append((children[number], first, last))
    except (IndexError, ValueError) as error:
        raise ManifestError(f"{where} is not an ONNX file: {error}") from error


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
