"""The graph in which every layer is an If answers as the model and its exits do."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

from edge_runtime.backends.onnxrt import new_session  # noqa: E402
from edge_runtime.errors import ConfigError, EngineBuildError  # noqa: E402
from engines.fast_pass import fast_pass_onnx  # noqa: E402
from engines.models.backbones import BackboneRecipe, build_backbone  # noqa: E402
from engines.models.early_exit import EarlyExit, ExitSpec  # noqa: E402
from engines.onnx_graph import subgraphs  # noqa: E402

pytestmark = pytest.mark.torch

CLASSES = 5
# Model, options, image, exits; the residual network's maps shrink after its second layer.
MODELS = {
    "token": (
        "vit_tiny_patch16_224",
        {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2},
        (3, 32, 32),
        (ExitSpec(0, "lph"), ExitSpec(1, "gah")),
    ),
    "flag": (
        "residual",
        {"widths": [4, 8], "blocks": [2, 2]},
        (1, 8, 8),
        (ExitSpec(1, "lph"), ExitSpec(2)),
    ),
}


@functools.cache
def model(name: str) -> EarlyExit:
    backbone, options, image, exits = MODELS[name]
    torch.manual_seed(0)
    made = EarlyExit(
        build_backbone(BackboneRecipe(backbone, options), CLASSES, image),
        exits,
        torch.zeros(1, *image),
    ).eval()
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
    for head in made.heads:
        torch.nn.init.normal_(head.head.weight)  # confidences that differ between images
    return made


def images(name: str, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *MODELS[name][2], generator=generator)


@functools.cache
def exported(name: str) -> bytes:
    return fast_pass_onnx(model(name), [0.5, 2.0], images(name, 1))


@functools.cache
def session(name: str):
    return new_session(exported(name))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("exit_", range(3))
def test_a_forced_exit_gives_the_logits_of_the_model(name: str, exit_: int) -> None:
    pixels = images(name, 1)
    thresholds = np.array([0 if i == exit_ else 2 for i in range(2)], np.float32)
    logits, found = session(name).run(
        ["logits", "exit"], {"pixels": pixels.numpy(), "thresholds": thresholds}
    )
    with torch.no_grad():
        want = model(name)(pixels)[exit_].numpy()
    assert (found.tolist(), found.dtype) == ([exit_], np.int64)
    assert (logits.shape, logits.dtype) == ((1, CLASSES), np.float32)
    np.testing.assert_allclose(logits, want, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_at_thresholds_between_the_images_it_takes_the_first_confident_exit(name: str) -> None:
    pixels = images(name, 24)
    with torch.no_grad():
        answers = model(name)(pixels)
    confidences = np.stack([a.softmax(-1).amax(-1).numpy() for a in answers[:-1]])
    order = np.sort(confidences, axis=1)
    thresholds = order[:, 11:13].mean(1)
    used = set()
    for i, image in enumerate(pixels):
        fires = confidences[:, i] >= thresholds
        want = int(fires.argmax()) if fires.any() else 2
        logits, exit_ = session(name).run(
            None, {"pixels": image[None].numpy(), "thresholds": thresholds}
        )
        assert exit_.tolist() == [want]
        np.testing.assert_allclose(logits[0], answers[want][i].numpy(), atol=1e-4)
        used.add(want)
    assert used == {0, 1, 2}


@pytest.mark.parametrize("name", MODELS)
def test_thresholds_left_out_are_those_of_the_export(name: str) -> None:
    for image in images(name, 8):
        feeds = {"pixels": image[None].numpy()}
        given = {**feeds, "thresholds": np.array([0.5, 2], np.float32)}
        for left_out, named in zip(
            session(name).run(None, feeds), session(name).run(None, given), strict=True
        ):
            np.testing.assert_array_equal(left_out, named)


def branches(name: str) -> list[tuple[list[str], list[str]]]:
    """Operators of the branches of each If, that of answered images first."""
    found = []
    for node in onnx.load_model_from_string(exported(name)).graph.node:
        if node.op_type == "If":
            graphs = {a.name: a.g for a in node.attribute}
            found.append(
                tuple(
                    [inner.op_type for inner in graphs[branch].node]
                    for branch in ("then_branch", "else_branch")
                )
            )
    return found


@pytest.mark.parametrize(("name", "layers"), [("token", 3), ("flag", 4)])
def test_every_layer_but_the_first_is_an_if_and_so_is_the_classifier(
    name: str, layers: int
) -> None:
    passed, run = zip(*branches(name), strict=True)
    assert len(passed) == layers  # layers - 1, and the classifier
    assert all(set(operators) <= {"Identity", "ConstantOfShape"} for operators in passed)
    work = {"Conv", "MatMul", "Gemm"}
    assert all(work & set(operators) for operators in run)
    nested = [n for n in onnx.load_model_from_string(exported(name)).graph.node if subgraphs(n)]
    assert not any(subgraphs(inner) for n in nested for g in subgraphs(n) for inner in g.node)


def test_what_travels_in_a_transformer_is_the_sequence_with_one_more_token() -> None:
    inferred = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(exported("token")))
    shapes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in inferred.graph.value_info
    }
    ifs = [node for node in inferred.graph.node if node.op_type == "If"]
    travelling = [shapes[node.output[0]] for node in ifs[:-1]]
    assert travelling == [[1, 16 + 1 + 1, 16]] * 2


def test_the_model_is_valid_and_names_its_ends() -> None:
    for name, (_, _, image, _) in MODELS.items():
        made = onnx.load_model_from_string(exported(name))
        onnx.checker.check_model(made, full_check=True)
        ends = {
            value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in itertools.chain(made.graph.input, made.graph.output)
        }
        assert ends == {
            "pixels": [1, *image],
            "thresholds": [2],
            "logits": [1, CLASSES],
            "exit": [1],
        }


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ([0.5], "thresholds of a fast pass: got 1, expected 2"),
        ([0.5, 0.5, 0.5], "thresholds of a fast pass: got 3, expected 2"),
        ([0.5, float("nan")], "threshold of exit 2: got nan, expected a float32 number"),
        ([float("inf"), 0.5], "threshold of exit 1: got inf, expected a float32 number"),
        ([1e39, 0.5], "threshold of exit 1: got 1e+39, expected a float32 number"),
    ],
)
def test_refuses_thresholds_that_do_not_fit(thresholds: list[float], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        fast_pass_onnx(model("flag"), thresholds, images("flag", 1))
    assert str(error.value).startswith(message)


def test_refuses_a_model_without_exits() -> None:
    with pytest.raises(ConfigError, match="a fast pass needs exits: got a model without any"):
        fast_pass_onnx(
            EarlyExit(model("flag").backbone, (), images("flag", 1)), [], images("flag", 1)
        )


def test_refuses_an_example_that_the_model_can_not_read_and_keeps_the_modes() -> None:
    with pytest.raises(
        ConfigError, match=r"example: got torch\.int64, expected a tensor of floats"
    ):
        fast_pass_onnx(model("flag"), [0.5, 0.5], torch.zeros(1, 1, 8, 8, dtype=torch.int64))
    model("flag").heads.train()
    with pytest.raises(EngineBuildError, match=r"the model failed on shape \(2, 3, 8, 8\)"):
        fast_pass_onnx(model("flag"), [0.5, 0.5], torch.zeros(1, 3, 8, 8))
    assert model("flag").heads[0].training  # as it was
    model("flag").heads.eval()
