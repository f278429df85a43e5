"""No ONNX file whose tensors live elsewhere gets past the scan, wherever they hide."""

import functools
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from edge_runtime.errors import ManifestError
from edge_runtime.onnx_guard import refuse_external_data
from tests.edge_runtime.bundles import external, linear, model, refused

SHIPPED = sorted((Path(onnx.__file__).parent / "backend/test/data").rglob("*.onnx"))


def has_external_data(message) -> bool:
    """The truth, from the onnx package: walk every field that protobuf knows."""
    if isinstance(message, TensorProto) and (
        message.external_data or message.data_location != TensorProto.DEFAULT
    ):
        return True
    for field, value in message.ListFields():
        if field.message_type is not None:
            items = value if isinstance(value, (list, tuple)) or hasattr(value, "add") else [value]
            if any(has_external_data(item) for item in items):
                return True
    return False


def passes(data: bytes) -> bool:
    """Whether the scan lets the bytes pass; it may raise nothing but a one-line ManifestError."""
    try:
        refuse_external_data(data, "stages/a.onnx")
    except ManifestError as error:
        assert str(error).startswith("stages/a.onnx ")
        assert str(error).isprintable()
        return False
    return True


def value_info(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])


def graph(*nodes, name: str = "g", **fields) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), name, [value_info("x")], [value_info("y")], **fields)


def constant(tensor: TensorProto, output: str = "y") -> onnx.NodeProto:
    return helper.make_node("Constant", [], [output], value=tensor)


def branch(node: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph([node], "branch", [], [value_info("y")])


def in_initializer(tensor):
    return model(graph(helper.make_node("Add", ["x", "secret"], ["y"]), initializer=[tensor]))


def in_constant(tensor):
    return model(graph(constant(tensor)))


def in_if(tensor):
    node = helper.make_node(
        "If",
        ["x"],
        ["y"],
        then_branch=branch(constant(tensor)),
        else_branch=branch(constant(tensor)),
    )
    return model(graph(node))


def in_if_initializer(tensor):
    inner = branch(helper.make_node("Identity", ["secret"], ["y"]))
    inner.initializer.append(tensor)
    return model(graph(helper.make_node("If", ["x"], ["y"], then_branch=inner)))


def in_nested_loops(tensor):
    node = constant(tensor)
    for _ in range(20):
        node = helper.make_node("Loop", ["x"], ["y"], body=branch(node))
    return model(graph(node))


def in_function(tensor):
    function = helper.make_function(
        "local", "f", ["x"], ["y"], [constant(tensor)], [helper.make_opsetid("", 18)]
    )
    return model(graph(helper.make_node("f", ["x"], ["y"], domain="local")), functions=[function])


def in_function_default(tensor):
    found = in_function(numpy_helper.from_array(np.zeros(2, np.float32)))
    found.functions[0].attribute_proto.append(helper.make_attribute("value", tensor))
    return found


def in_tensor_list(tensor):
    node = helper.make_node("Constant", [], ["y"])
    node.attribute.append(AttributeProto(name="v", type=AttributeProto.TENSORS, tensors=[tensor]))
    return model(graph(node))


def in_graph_list(tensor):
    node = helper.make_node("Custom", [], ["y"])
    inner = branch(constant(tensor))
    node.attribute.append(AttributeProto(name="g", type=AttributeProto.GRAPHS, graphs=[inner]))
    return model(graph(node))


def in_sparse_values(tensor):
    sparse = onnx.SparseTensorProto(values=tensor, dims=[2])
    return model(
        graph(helper.make_node("Add", ["x", "secret"], ["y"]), sparse_initializer=[sparse])
    )


def in_sparse_indices(tensor):
    sparse = onnx.SparseTensorProto(indices=tensor, dims=[2])
    node = helper.make_node("Constant", [], ["y"])
    node.attribute.append(
        AttributeProto(name="v", type=AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse)
    )
    return model(graph(node))


def in_sparse_list(tensor):
    sparse = onnx.SparseTensorProto(values=tensor, dims=[2])
    node = helper.make_node("Constant", [], ["y"])
    node.attribute.append(
        AttributeProto(name="v", type=AttributeProto.SPARSE_TENSORS, sparse_tensors=[sparse])
    )
    return model(graph(node))


def in_training(tensor):
    found = in_constant(numpy_helper.from_array(np.zeros(2, np.float32)))
    found.training_info.add(algorithm=graph(constant(tensor)))
    return found


def in_training_initialization(tensor):
    found = in_constant(numpy_helper.from_array(np.zeros(2, np.float32)))
    found.training_info.add(initialization=graph(constant(tensor)))
    return found


PLACES = [
    in_initializer,
    in_constant,
    in_if,
    in_if_initializer,
    in_nested_loops,
    in_function,
    in_function_default,
    in_tensor_list,
    in_graph_list,
    in_sparse_values,
    in_sparse_indices,
    in_sparse_list,
    in_training,
    in_training_initialization,
]


@pytest.mark.parametrize("place", PLACES)
def test_external_data_is_refused_wherever_it_hides(place):
    found = place(external())
    assert has_external_data(found)
    with refused(ManifestError, "a.onnx refers to external data", "Store its tensors inside"):
        refuse_external_data(found.SerializeToString(), "a.onnx")


@pytest.mark.parametrize("place", PLACES)
def test_the_same_models_with_their_own_data_pass(place):
    found = place(numpy_helper.from_array(np.ones(2, np.float32), "secret"))
    assert passes(found.SerializeToString())


@pytest.mark.parametrize("place", [in_initializer, in_function])
def test_a_location_alone_and_an_entry_alone_are_refused(place):
    location = TensorProto(name="secret", data_type=1, dims=[2])
    location.data_location = TensorProto.EXTERNAL
    entry = TensorProto(name="secret", data_type=1, dims=[2])
    entry.external_data.add(key="location", value="weights.bin")
    assert not passes(place(location).SerializeToString())
    assert not passes(place(entry).SerializeToString())


def test_every_place_for_a_tensor_in_the_onnx_format_is_scanned():
    """Fails when a new onnx package knows a message that the scan does not follow."""
    from edge_runtime.onnx_guard import _CHILDREN

    names = {
        "ModelProto": "Model",
        "TrainingInfoProto": "Training",
        "GraphProto": "Graph",
        "FunctionProto": "Function",
        "NodeProto": "Node",
        "AttributeProto": "Attribute",
        "SparseTensorProto": "Sparse",
        "TensorProto": "Tensor",
    }

    @functools.cache
    def leads_to_a_tensor(descriptor, above=()):
        return descriptor.name == "TensorProto" or any(
            field.message_type is not None
            and field.message_type.name not in above
            and leads_to_a_tensor(field.message_type, (*above, descriptor.name))
            for field in descriptor.fields
        )

    for proto, ours in names.items():
        if ours == "Tensor":
            continue
        known = {
            field.number: names[field.message_type.name]
            for field in getattr(onnx, proto).DESCRIPTOR.fields
            if field.message_type is not None and leads_to_a_tensor(field.message_type)
        }
        assert known == _CHILDREN[ours], proto
    tensor = TensorProto.DESCRIPTOR.fields_by_name
    assert (tensor["external_data"].number, tensor["data_location"].number) == (13, 14)


@pytest.mark.skipif(not SHIPPED, reason="this onnx package ships no models")
def test_it_agrees_with_the_onnx_package_on_real_models():
    for path in SHIPPED:
        data = path.read_bytes()
        assert passes(data) is not has_external_data(onnx.load_model_from_string(data)), path


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, data: bytes | int, extra: int = 0) -> bytes:
    """One protobuf field, `extra` ORed into its key."""
    if isinstance(data, int):
        return varint(number << 3 | extra) + varint(data)
    return varint(number << 3 | 2 | extra) + varint(len(data)) + data


@pytest.mark.parametrize("bit", [32, 33, 34])
def test_a_field_number_with_bits_that_some_parsers_drop_is_refused(bit):
    """C++ protobuf, so ONNX Runtime, reads such a key as the one without these bits."""
    tensor = TensorProto(name="secret", data_type=1, dims=[2]).SerializeToString()
    tensor += field(13, b"\x0a\x08location\x12\x01a", 1 << bit) + field(14, 1, 1 << bit)
    plain = in_constant(numpy_helper.from_array(np.zeros(2, np.float32)))
    inner = plain.graph.SerializeToString() + field(5, tensor)
    plain.ClearField("graph")
    data = plain.SerializeToString() + field(7, inner)
    with refused(ManifestError, "a.onnx is not an ONNX file: field number"):
        refuse_external_data(data, "a.onnx")


def test_a_location_of_more_than_one_field_counts_once():
    """Two graphs in one file are merged by a parser, so both are scanned."""
    clean = in_constant(numpy_helper.from_array(np.zeros(2, np.float32))).SerializeToString()
    assert passes(clean + clean)
    assert not passes(clean + in_initializer(external()).SerializeToString())


@pytest.mark.parametrize(
    "data",
    [
        b"\x80",
        b"\x0a\x05abc",
        b"\x0b",
        b"\x0f",
        b"\x00\x00",
        b"\x08" + b"\xff" * 11,
        b"\x0a" + b"\xff" * 9 + b"\x01",
        b"\x09abc",
        b"\x3a\x02\x0a\x05",
    ],
)
def test_what_is_no_protobuf_is_refused(data):
    with refused(ManifestError, "a.onnx is not an ONNX file"):
        refuse_external_data(data, "a.onnx")


def test_the_format_of_onnx_runtime_is_refused():
    """It starts like protobuf when its first bytes are chosen so, and is read first."""
    with refused(ManifestError, "a.onnx is not an ONNX file: got ONNX Runtime's own format"):
        refuse_external_data(b"\x12\x20\x00\x00ORTM" + bytes(30), "a.onnx")


def test_every_truncation_passes_or_is_refused():
    data = in_if(external()).SerializeToString()
    for end in range(len(data)):
        whole = end and passes(data[:end])
        if whole:
            try:
                found = onnx.load_model_from_string(data[:end])
            except DecodeError:
                continue
            assert not has_external_data(found)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_pass_or_are_refused(data):
    passes(data)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_models_pass_only_without_external_data(data):
    whole = bytearray(data.draw(st.sampled_from(PLACES))(external()).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    if not passes(bytes(whole)):
        return
    try:
        found = onnx.load_model_from_string(bytes(whole))
    except DecodeError:
        return  # protobuf refuses it too
    assert not has_external_data(found)


tensors = st.builds(lambda hide: external() if hide else TensorProto(name="w"), st.booleans())


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(PLACES), tensors), min_size=1, max_size=4))
def test_it_agrees_with_the_onnx_package_on_made_up_models(parts):
    whole = onnx.ModelProto()
    for place, tensor in parts:
        whole.MergeFrom(place(tensor))
    assert passes(whole.SerializeToString()) is not has_external_data(whole)


def test_large_tensors_are_not_walked_through():
    assert passes(linear("x", "y", 1000, 1000))
