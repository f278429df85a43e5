"""What an engine consists of, as TensorRT's log and its inspector tell it."""

import json

import pytest

from edge_runtime.errors import EngineBuildError
from engines.tensorrt_layers import Layer, from_inspector, from_log, summarize

LOG = """Layers:
Name: __myl_CastConc_myl0_0, LayerType: kgen, Inputs: [ { Name: pixels, Dimensions: [1,3,8,8], \
Datatype: Float, Format: (Linear) Row major linear format }], Constants: [ { Name: zero, \
Datatype: Half, Format: (NHWC) Channel major format }], Outputs: [ { Name: a, Dimensions: \
[1,4,8,8], Datatype: Half, Format: (NHWC) Channel major format }], StreamId: 0
Name: conv, with a comma, LayerType: correlation, Inputs: [ { Name: a, Datatype: Half, Format: \
(NHWC) x }, { Name: b, Datatype: Int8, Format: (NHWC) x }], Outputs: [ { Name: c, Datatype: \
Float, Format: (NHWC) x }], StreamId: 0
Name: __myl_TranMove_myl0_2, LayerType: kgen, Inputs: [ { Name: c, Datatype: Float, Format: x }], \
Outputs: [ { Name: d, Datatype: Float, Format: x }], StreamId: 0

I/O Tensors:
 Name: pixels, IOMode: Input, DataType: Float
"""

LAYERS = (
    Layer("__myl_CastConc_myl0_0", "kgen", ("float32",), ("float16",)),
    Layer("conv, with a comma", "correlation", ("float16", "int8"), ("float32",)),
    Layer("__myl_TranMove_myl0_2", "kgen", ("float32",), ("float32",)),
)


def test_the_log_s_lines_are_read():
    assert from_log(LOG) == LAYERS


def test_layers_are_counted_by_what_they_do():
    summary = summarize(LAYERS)
    assert (summary.layers, summary.casts, summary.reformats) == (3, 1, 1)
    assert summary.dtypes == {"int8": 1}
    assert summary.fused_conversions == 1


def inspected(**texts: str) -> dict[str, object]:
    """Inputs and outputs as the inspector gives them."""
    return {name: [{"Name": "t", "Dimensions": [1], **_of(text)}] for name, text in texts.items()}


def _of(text: str) -> dict[str, str]:
    return {"Format/Datatype": text} if " " in text else {"Datatype": text, "Format": "Linear"}


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        ("Row major linear FP32", "Thirty-two wide channel vectorized row major Int8 format"),
        ("Float", "Int8"),
    ],
    ids=["10.x", "11.x"],
)
def test_the_inspector_s_json_is_read(wide, narrow):
    text = json.dumps(
        {
            "Layers": [
                {
                    "Name": "Reformatting CopyNode for Input Tensor 0 to conv",
                    "LayerType": "Reformat",
                    **inspected(Inputs=wide, Outputs=narrow),
                },
                {
                    "Name": "conv + relu",
                    "LayerType": "CaskConvolution",
                    **inspected(Inputs=narrow, Outputs=narrow),
                },
                {"Name": "copy", "LayerType": "Reformat", **inspected(Inputs=wide, Outputs=wide)},
            ]
        }
    )
    summary = summarize(from_inspector(text))
    assert (summary.layers, summary.casts, summary.reformats) == (3, 1, 1)
    assert summary.dtypes == {"int8": 1}
    assert summary.fused_conversions == 0


@pytest.mark.parametrize("text", ["", "[]", '{"Layers": 3}', '{"Layers": [{"Name": "a"}]}'])
def test_layer_information_that_is_none_is_refused(text):
    with pytest.raises(EngineBuildError, match="layer information is not as expected"):
        from_inspector(text)


def test_names_without_details_are_refused():
    with pytest.raises(EngineBuildError, match="without the details"):
        from_inspector('{"Layers": ["conv"]}')


def test_a_line_that_is_no_layer_is_refused():
    with pytest.raises(EngineBuildError, match="can't be read"):
        from_log("Layers:\nsomething else")
