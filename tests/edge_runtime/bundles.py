"""Little bundles of real ONNX stages whose manifest is plain data, so that tests can break it."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime import EdgeRuntimeError

CLASSES = ("ant", "bee", "cat")


@dataclass
class Parts:
    """A bundle before it is written: change anything, then `write`."""

    manifest: dict[str, Any]
    files: dict[str, bytes]

    def write(self, folder: Path) -> Path:
        """Write the parts as they are, without any check."""
        folder.mkdir(parents=True)
        for file, data in self.files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)
        (folder / "manifest.json").write_text(json.dumps(self.manifest, indent=2))
        return folder

    def stage(self, name: str) -> dict[str, Any]:
        """The manifest's entry of a stage."""
        return next(stage for stage in self.manifest["stages"] if stage["name"] == name)

    def add_variant(self, stage: str, precision: str, model: bytes) -> None:
        """Add a file and its entry, with the right hash."""
        file = f"stages/{stage}.{precision}.onnx"
        self.files[file] = model
        self.stage(stage)["variants"][precision] = artifact(file, model)


def little_parts(dtype: str = "float32", features: int = 5) -> Parts:
    """A saver, a segment and a head on feature vectors, shape (batch, 4): two exits."""
    image = tensor("image", 4, dtype)
    models = {
        "saver": linear("image", "early", 4, len(CLASSES), dtype, seed=1),
        "segment": linear("image", "features", 4, features, dtype, seed=2),
        "head": linear("features", "late", features, len(CLASSES), dtype, seed=3),
    }
    parts = Parts(
        {
            "schema_version": 1,
            "name": "little",
            "classes": list(CLASSES),
            "image": image,
            "boundary_dtype": dtype,
            "stages": [
                stage("saver", "saver", image, tensor("early", len(CLASSES), dtype)),
                stage("segment", "segment", image, tensor("features", features, dtype)),
                stage(
                    "head",
                    "head",
                    tensor("features", features, dtype),
                    tensor("late", len(CLASSES), dtype),
                ),
            ],
            "exits": [{"name": "early", "logits": "early"}, {"name": "late", "logits": "late"}],
            "provenance": {"made_by": "tests"},
        },
        {},
    )
    for name, model in models.items():
        parts.add_variant(name, "fp32", model)
    return parts


def tensor(name: str, width: int, dtype: str = "float32") -> dict[str, Any]:
    """A manifest's entry of a tensor, shape (batch, width)."""
    return {"name": name, "shape": ["batch", width], "dtype": dtype}


def stage(name: str, kind: str, source: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    """A manifest's entry of a stage without variants."""
    inputs, outputs = [copy.deepcopy(source)], [copy.deepcopy(target)]
    return {"name": name, "kind": kind, "inputs": inputs, "outputs": outputs, "variants": {}}


def artifact(file: str, data: bytes) -> dict[str, Any]:
    """A manifest's entry of a file."""
    return {"file": file, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def linear(
    source: str,
    target: str,
    width_in: int,
    width_out: int,
    dtype: str = "float32",
    *,
    seed: int = 0,
) -> bytes:
    """An ONNX model: target = source @ weights."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weights = np.random.default_rng(seed).standard_normal((width_in, width_out)).astype(dtype)
    graph = helper.make_graph(
        [helper.make_node("MatMul", [source, "weights"], [target])],
        "linear",
        [helper.make_tensor_value_info(source, kind, ["batch", width_in])],
        [helper.make_tensor_value_info(target, kind, ["batch", width_out])],
        [numpy_helper.from_array(weights, "weights")],
    )
    return model(graph).SerializeToString()


def model(graph: onnx.GraphProto, **fields: Any) -> onnx.ModelProto:
    """A model of `graph` at a fixed opset."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, **fields)


def external(name: str = "secret", location: str = "../../etc/passwd") -> TensorProto:
    """A tensor whose data are in another file."""
    found = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2])
    found.data_location = TensorProto.EXTERNAL
    found.external_data.add(key="location", value=location)
    return found


@contextmanager
def refused(kind: type[EdgeRuntimeError], *parts: str) -> Iterator[None]:
    """Expect exactly an error of `kind` on one line that says each of `parts`."""
    with pytest.raises(EdgeRuntimeError) as caught:
        yield
    assert type(caught.value) is kind, repr(caught.value)
    message = str(caught.value)
    assert message.isprintable(), message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
