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
from edge_runtime.onnx_guard import may_cast, refuse_external_data
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


#: Descriptor -> what the scans call it.
MESSAGES = {
    "ModelProto": "Model",
    "TrainingInfoProto": "Training",
    "GraphProto": "Graph",
    "FunctionProto": "Function",
    "NodeProto": "Node",
    "AttributeProto": "Attribute",
    "SparseTensorProto": "Sparse",
    "TensorProto": "Tensor",
    "ValueInfoProto": "Value",
    "TypeProto": "Type",
    "Tensor": "Elements",
    "SparseTensor": "Elements",
    "Sequence": "Container",
    "Optional": "Container",
    "Map": "Map",
}


def fields_that_lead_to(ends: set[str]) -> dict[str, dict[int, str]]:
    """Message -> field -> message inside it, of all through which one of `ends` is reached."""

    @functools.cache
    def leads(descriptor, above=()):
        return MESSAGES.get(descriptor.name) in ends or any(
            field.message_type is not None
            and field.message_type.name not in above
            and leads(field.message_type, (*above, descriptor.name))
            for field in descriptor.fields
        )

    found = {}
    queue = [onnx.ModelProto.DESCRIPTOR]
    while queue:
        descriptor = queue.pop()
        inner = [f for f in descriptor.fields if f.message_type and leads(f.message_type)]
        name = MESSAGES[descriptor.name]
        if name not in found and inner:
            found[name] = {f.number: MESSAGES[f.message_type.name] for f in inner}
            queue += [f.message_type for f in inner]
    return found


def test_every_place_for_a_tensor_in_the_onnx_format_is_scanned():
    """Fails when a new onnx package knows a message that the scan does not follow."""
    from edge_runtime.onnx_guard import _CHILDREN

    assert fields_that_lead_to({"Tensor"}) == _CHILDREN
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


def casts(message) -> bool:
    """The truth about `may_cast`, from the onnx package."""
    half = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    if isinstance(message, TensorProto):
        return message.data_type in half
    if isinstance(message, onnx.NodeProto) and message.op_type in ("Cast", "CastLike"):
        return True
    if isinstance(message, onnx.TypeProto.Tensor | onnx.TypeProto.SparseTensor):
        return message.elem_type in half
    return any(
        casts(item)
        for field, value in message.ListFields()
        if field.message_type is not None
        for item in (value if hasattr(value, "add") else [value])
    )


def a_cast(kind: int = TensorProto.INT32, operator: str = "Cast") -> onnx.NodeProto:
    return helper.make_node(operator, ["x"], ["y"], **({"to": kind} if operator == "Cast" else {}))


def with_value(where: str, kind: onnx.TypeProto) -> onnx.ModelProto:
    """A model with a type among its inputs, outputs or values in between."""
    found = model(graph(helper.make_node("Relu", ["x"], ["y"])))
    getattr(found.graph, where).append(helper.make_value_info("more", kind))
    return found


def with_type_attribute(kind: onnx.TypeProto) -> onnx.ModelProto:
    return model(graph(helper.make_node("Optional", [], ["y"], type=kind)))


def in_function_values(kind: onnx.TypeProto) -> onnx.ModelProto:
    found = in_function(numpy_helper.from_array(np.zeros(2, np.float32)))
    found.functions[0].value_info.append(helper.make_value_info("more", kind))
    return found


def types(elements: int) -> list[onnx.TypeProto]:
    tensor = helper.make_tensor_type_proto(elements, [2])
    return [
        tensor,
        helper.make_sparse_tensor_type_proto(elements, [2]),
        helper.make_sequence_type_proto(tensor),
        helper.make_optional_type_proto(helper.make_sequence_type_proto(tensor)),
        helper.make_map_type_proto(TensorProto.INT64, tensor),
    ]


TYPED = [
    *(functools.partial(with_value, where) for where in ("input", "output", "value_info")),
    with_type_attribute,
    in_function_values,
]


def test_every_place_for_a_type_in_the_onnx_format_is_scanned():
    from edge_runtime.onnx_guard import _TYPED_CHILDREN

    assert fields_that_lead_to({"Tensor", "Elements"}) == _TYPED_CHILDREN


@pytest.mark.parametrize("place", PLACES)
def test_a_half_tensor_is_found_wherever_it_is(place):
    for dtype, half in ((np.float16, True), (np.float32, False), (np.int8, False)):
        found = place(numpy_helper.from_array(np.ones(2, dtype), "secret"))
        assert may_cast(found.SerializeToString()) is casts(found) is half
    found = place(TensorProto(name="secret", data_type=TensorProto.BFLOAT16, dims=[0]))
    assert may_cast(found.SerializeToString())


@pytest.mark.parametrize("place", TYPED)
def test_a_half_type_is_found_wherever_it_is(place):
    for elements, half in ((TensorProto.FLOAT16, True), (TensorProto.INT8, False)):
        for kind in types(elements):
            found = place(kind)
            assert may_cast(found.SerializeToString()) is casts(found) is half


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.FLOAT])
def test_a_cast_is_found_in_subgraphs_and_functions(kind):
    nested = a_cast(kind)
    for _ in range(3):
        nested = helper.make_node("Loop", ["x"], ["y"], body=branch(nested))
    function = helper.make_function(
        "local", "f", ["x"], ["y"], [a_cast(kind)], [helper.make_opsetid("", 18)]
    )
    call = helper.make_node("f", ["x"], ["y"], domain="local")
    for found in (
        model(graph(a_cast(kind))),
        model(graph(nested)),
        model(graph(call), functions=[function]),
        model(graph(a_cast(operator="CastLike"))),
    ):
        assert may_cast(found.SerializeToString())


def test_int8_in_the_graph_is_no_cast():
    scale, zero = (
        numpy_helper.from_array(np.float32(1), "s"),
        numpy_helper.from_array(np.int8(0), "z"),
    )
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    quantised = model(graph(*nodes, initializer=[scale, zero]))
    assert not may_cast(quantised.SerializeToString())


def test_a_name_or_a_number_is_no_cast():
    node = helper.make_node("Conv", ["Cast", "x"], ["y"], name="Cast", group=10)
    assert not may_cast(model(graph(node, name="Cast")).SerializeToString())


@pytest.mark.skipif(not SHIPPED, reason="this onnx package ships no models")
def test_it_knows_the_casts_of_real_models():
    for path in SHIPPED:
        data = path.read_bytes()
        assert may_cast(data) is casts(onnx.load_model_from_string(data)), path


@pytest.mark.parametrize("data", [b"\x80", b"\x0a\x05abc", b"\x3a\x02\x0a\x05"])
def test_what_is_no_protobuf_may_cast(data):
    assert may_cast(data)
