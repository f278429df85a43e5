"""Torch modules become bundles that compute what torch computes."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from edge_runtime.cascade import Exit  # noqa: E402
from edge_runtime.errors import ConfigError, EngineBuildError, InputError  # noqa: E402
from edge_runtime.manifest import Bundle  # noqa: E402
from engines.export import TorchStage, export_stages  # noqa: E402
from engines.preprocess import PreprocessSpec  # noqa: E402
from tests.engines import torch_models  # noqa: E402
from tests.engines.conftest import chain, folder_is_empty  # noqa: E402

pytestmark = pytest.mark.torch


def torch_chain(stages: list[TorchStage], pixels: np.ndarray) -> dict[str, np.ndarray]:
    known = {"pixels": torch.from_numpy(pixels)}
    with torch.no_grad():
        for stage in stages:
            result = stage.module.eval()(*(known[name] for name in stage.inputs))
            outputs = result if isinstance(result, tuple) else (result,)
            known.update(zip(stage.outputs, outputs, strict=True))
    return {name: tensor.detach().numpy() for name, tensor in known.items()}


@pytest.mark.parametrize("count", [1, 2, 7])
def test_convolutions_give_what_torch_gives(convolutional_bundle: Bundle, count: int) -> None:
    image = np.random.default_rng(9).integers(0, 256, (count, 31, 29, 3), dtype=np.uint8)
    have = chain(convolutional_bundle, image)
    stages, _ = torch_models.convolutional()
    want = torch_chain(stages, have["pixels"])
    for name, values in want.items():
        np.testing.assert_allclose(have[name], values, atol=1e-5 * np.abs(values).max())


@pytest.mark.parametrize("count", [1, 3])
def test_a_transformer_gives_what_torch_gives(transformer_bundle: Bundle, count: int) -> None:
    pixels = np.random.default_rng(9).standard_normal((count, 3, 16, 16)).astype(np.float32)
    have = chain(transformer_bundle, pixels)
    stages, _ = torch_models.transformer()
    for name, values in torch_chain(stages, pixels).items():
        np.testing.assert_allclose(have[name], values, atol=1e-5 * np.abs(values).max())


def test_the_manifest_has_the_dataflow(
    convolutional_bundle: Bundle, transformer_bundle: Bundle
) -> None:
    stages = {r.name: r for r in convolutional_bundle.manifest.stages}
    assert [(r.name, r.kind) for r in stages.values()] == [
        ("preprocess", "preprocess"),
        ("saver", "saver"),
        ("segment1", "segment"),
        ("head1", "head"),
        ("segment2", "segment"),
        ("head2", "head"),
    ]
    assert str(convolutional_bundle.cascade.image) == "(batch, height, width, 3) uint8"
    assert str(stages["segment2"].inputs[0]) == "(batch, 6, 8, 8) float32"
    assert list(stages["preprocess"].variants) == ["fp32", "fp32_cast_first"]
    assert list(stages["saver"].variants) == ["fp32"]
    assert str(transformer_bundle.cascade.image) == "(batch, 3, 16, 16) float32"
    block = transformer_bundle.record("block2")
    assert [s.name for s in block.inputs] == ["token1", "tokens1"]
    assert [str(s) for s in block.outputs] == ["(batch, 1, 12) float32", "(batch, 16, 12) float32"]


def test_the_manifest_has_what_was_verified(convolutional_bundle: Bundle) -> None:
    provenance = convolutional_bundle.manifest.provenance
    assert provenance["seed"] == 0
    assert provenance["versions"]["torch"] == torch.__version__
    errors = provenance["verification"]["worst_relative_error"]
    assert sorted(errors) == ["head1", "head2", "saver", "segment1", "segment2"]
    assert all(error <= 1e-4 for error in errors.values())
    assert provenance["verification"]["samples"] == 4


def test_no_file_has_a_path_of_the_builder(
    convolutional_bundle: Bundle, transformer_bundle: Bundle
) -> None:
    traces = [str(Path(__file__).parent), str(Path(torch.__file__).parent), "torch_models.py"]
    for bundle in (convolutional_bundle, transformer_bundle):
        for path in bundle.path.rglob("*"):
            if path.is_file():
                assert not [t for t in traces if t.encode() in path.read_bytes()], path


def tiny(**changes) -> dict:
    """Arguments of an export that works, of one small stage."""
    stage = TorchStage("only", "segment", nn.Linear(3, 2), ("pixels",), ("logits",))
    return {
        "stages": [stage],
        "exits": [Exit("only", "logits")],
        "example": np.array([[0.5, -1, 2]], np.float32),
        "classes": ("a", "b"),
        "name": "tiny",
    } | changes


def test_the_same_module_gives_the_same_bundle(tmp_path: Path) -> None:
    arguments = tiny()
    first, second = (export_stages(**arguments, out=tmp_path / name) for name in "ab")
    assert first.hash == second.hash


def test_modes_and_statistics_of_the_modules_stay(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    module.train()
    module[1].eval()
    modes = [m.training for m in module.modules()]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    stage = TorchStage("only", "segment", module, ("pixels",), ("logits",))
    export_stages(**tiny(stages=[stage]), out=tmp_path / "a")
    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())


def test_the_exporter_is_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    export_stages(**tiny(), out=tmp_path / "a")
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert logging.root.manager.disable == 0


def test_a_fixed_camera_size_is_kept(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    bundle = export_stages(
        **tiny(
            stages=[TorchStage("only", "segment", module, ("pixels",), ("logits",))],
            example=np.zeros((1, 9, 9, 1), np.uint8),
            preprocess=PreprocessSpec((4, 4), channels=1, range=(0, 1)),
            image_size=(9, 9),
        ),
        out=tmp_path / "a",
    )
    assert str(bundle.cascade.image) == "(batch, 9, 9, 1) uint8"


def module_of(function: Callable) -> nn.Module:
    class Module(nn.Module):
        def forward(self, *inputs):
            return function(*inputs)

    return Module()


def stage_of(function: Callable, outputs: tuple[str, ...] = ("logits",)) -> list[TorchStage]:
    return [TorchStage("only", "segment", module_of(function), ("pixels",), outputs)]


def chained(x: torch.Tensor) -> torch.Tensor:
    return x[:, :2] if x.sum() > 0 else x[:, 1:]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"stages": stage_of(chained)},
            EngineBuildError,
            "stage 'only' can't be exported: torch says: ",
        ),
        (
            {"stages": stage_of(lambda x: x @ torch.ones(7, 2))},
            EngineBuildError,
            "stage 'only' failed: torch says: RuntimeError: ",
        ),
        (
            {"stages": stage_of(lambda x: (x[:, :2], x))},
            EngineBuildError,
            "stage 'only': the module returns: got Tensor, Tensor, expected 1 tensor(s): logits",
        ),
        (
            {"stages": stage_of(lambda x: {"logits": x[:, :2]})},
            EngineBuildError,
            "stage 'only': the module returns: got dict",
        ),
        (
            {"stages": stage_of(lambda x: x.reshape(3, -1)[:, :2])},
            EngineBuildError,
            "stage 'only': tensor 'logits' for batches of [2, 3]: got shapes (3, 2) and (3, 2)",
        ),
        (
            # torch exports this without a word, with the traced values as constants.
            {"stages": stage_of(lambda x: torch.tensor(x.tolist())[:, :2])},
            EngineBuildError,
            "stage 'only'",
        ),
        (
            {"stages": stage_of(lambda x: x[:, :2] / 0)},
            EngineBuildError,
            "tensor 'logits' of stage 'only' differs from the original: relative error: got nan",
        ),
        (
            {"stages": stage_of(lambda x: x[:, :2].double())},
            ConfigError,
            "tensor 'logits': dtype: got 'float64'",
        ),
        (
            {"stages": stage_of(lambda x: x[:, :2].half())},
            ConfigError,
            "stage 'only': output 'logits' is not of the boundary's dtype: got float16",
        ),
        ({"classes": ("a", "b", "c")}, ConfigError, "exit 'only': logits 'logits'"),
        ({"exits": [Exit("x", "nothing")]}, ConfigError, "exit 'x': no stage produces"),
        (
            {"stages": [dataclasses.replace(tiny()["stages"][0], inputs=("pixels", "more"))]},
            ConfigError,
            "tensors that are read and that no stage writes: got more, pixels, expected exactly",
        ),
        (
            {"stages": [dataclasses.replace(tiny()["stages"][0], inputs=("logits",))]},
            ConfigError,
            "tensors that are read and that no stage writes: got none",
        ),
        ({"image_size": (4, 4)}, ConfigError, "image_size without preprocess"),
        (
            {
                "stages": [dataclasses.replace(tiny()["stages"][0], inputs=("image",))],
                "example": np.zeros((1, 4, 4, 3), np.uint8),
                "preprocess": PreprocessSpec((4, 4), range=(0, 1)),
            },
            ConfigError,
            "preprocessing reads and writes a tensor 'image'. Name the model's input otherwise",
        ),
        ({"example": np.float32(1)}, ConfigError, "example: got shape ()"),
        ({"example": np.ones((0, 3), np.float32)}, ConfigError, "example: got shape (0, 3)"),
        (
            {"preprocess": PreprocessSpec((4, 4), range=(0, 1))},
            InputError,
            "input 'image': dtype: got float32, expected uint8",
        ),
    ],
)
def test_refuses(tmp_path: Path, changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        export_stages(**tiny(**changes), out=tmp_path / "a")
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
    assert folder_is_empty(tmp_path)


def test_stages_out_of_order_are_refused(tmp_path: Path) -> None:
    stages, exits = torch_models.convolutional()
    with pytest.raises(ConfigError, match="stage 'head1': no earlier stage produces its input"):
        export_stages(
            [stages[0], stages[2], stages[1]],
            exits[:2],
            example=np.zeros((1, 3, 16, 16), np.float32),
            classes=torch_models.CLASSES,
            out=tmp_path / "a",
            name="x",
        )


def test_refuses_an_existing_bundle_before_it_works(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    unusable = stage_of(lambda x: 1 / 0)
    with pytest.raises(ConfigError, match="exists"):
        export_stages(**tiny(stages=unusable), out=tmp_path / "a")
