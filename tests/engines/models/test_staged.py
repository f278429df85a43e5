"""Saver, base and exit sequence network as one model, in torch and as a bundle."""

import copy
import functools
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

import edge_runtime as er  # noqa: E402
from edge_runtime.errors import ConfigError, EngineBuildError  # noqa: E402
from edge_runtime.manifest import Bundle  # noqa: E402
from engines.models.early_exit import EarlyExit, ExitSpec  # noqa: E402
from engines.models.esn import Esn  # noqa: E402
from engines.models.residual import Residual, ResidualOptions  # noqa: E402
from engines.models.staged import StagedModel  # noqa: E402
from engines.preprocess import PreprocessSpec  # noqa: E402
from tests.edge_runtime.test_tensorrt_stages import robot_of  # noqa: E402
from tests.engines.conftest import chain  # noqa: E402
from tests.engines.test_tensorrt_builds import build_all  # noqa: E402
from tests.tensorrt_on_fake_device import FakeTensorRT  # noqa: E402

pytestmark = pytest.mark.torch

CLASSES = 4
NAMES = tuple("abcd")
SPEC = PreprocessSpec((8, 8), mean=(0.5,), std=(0.25,))
EXITS = ("saver", "exit_0", "esn_0", "exit_stages_0_1", "esn_stages_0_1", "final")


def small_base(*exits: int | str) -> EarlyExit:
    return copy.deepcopy(_made(exits))


@functools.cache
def _made(exits: tuple[int | str, ...]) -> EarlyExit:
    torch.manual_seed(1)
    backbone = Residual(CLASSES, options=ResidualOptions(widths=(4, 6), blocks=(2, 1)))
    return EarlyExit(backbone, [ExitSpec(layer) for layer in exits], torch.zeros(2, 3, 8, 8))


def small_saver(classes: int = CLASSES) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 3, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, classes)
    )


def whole_model() -> StagedModel:
    """No parameter is 0, and no statistic is what it was at first."""
    torch.manual_seed(0)
    base = small_base(0, "stages.0.1")
    esn = Esn(base.layouts, base.classes, layers=1, width=8, heads=2)
    model = StagedModel(base, small_saver(), esn)
    for parameter in esn.parameters():
        nn.init.normal_(parameter, std=0.3)
    model(torch.randn(16, 3, 8, 8))
    return model.eval()


def images(batch: int) -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, (batch, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return whole_model().export(
        tmp_path_factory.mktemp("staged") / "a.bundle",
        example_images=images(3),
        preprocess=SPEC,
        classes=NAMES,
        name="whole",
        provenance={"seed": 0},
    )


def test_exits_answer_in_order_and_each_part_runs_once() -> None:
    model = whole_model()
    runs: list[str] = []
    for name, module in (("saver", model.saver), ("backbone", model.base.backbone)):
        module.register_forward_hook(lambda *_, name=name: runs.append(name))
    x = torch.randn(3, 3, 8, 8)
    found = model(x)
    assert sorted(runs) == ["backbone", "saver"]
    assert tuple(found) == EXITS == model.exit_names
    assert all(logits.shape == (3, CLASSES) for logits in found.values())
    features = model.base.features(x)
    torch.testing.assert_close(found["final"], model.base.backbone(x))
    torch.testing.assert_close(found["saver"], model.saver(x))
    torch.testing.assert_close(found["exit_stages_0_1"], model.base.heads[1](features[1]))
    later = model.esn(features[:-1], found["saver"])
    torch.testing.assert_close(found["esn_stages_0_1"], later[1])


def test_what_is_not_there_has_no_exit() -> None:
    x = torch.randn(2, 3, 8, 8)
    assert tuple(StagedModel(small_base(0))(x)) == ("exit_0", "final")
    assert tuple(StagedModel(small_base(), small_saver())(x)) == ("saver", "final")


@pytest.mark.parametrize("batch", [1, 5])
def test_a_bundle_gives_what_torch_gives(bundle: Bundle, batch: int) -> None:
    have = chain(bundle, images(batch))
    assert tuple(exit_.name for exit_ in bundle.cascade.exits) == EXITS
    with torch.no_grad():
        want = whole_model()(torch.from_numpy(have["pixels"]))
    for exit_ in bundle.cascade.exits:
        np.testing.assert_allclose(have[exit_.logits], want[exit_.name], atol=1e-4)


def test_stages_stand_in_the_order_in_which_they_are_needed(bundle: Bundle) -> None:
    assert [(record.name, record.kind) for record in bundle.manifest.stages] == [
        ("preprocess", "preprocess"),
        ("saver", "saver"),
        ("segment1", "segment"),
        ("head_0", "head"),
        ("esn_0", "head"),
        ("segment2", "segment"),
        ("head_stages_0_1", "head"),
        ("esn_stages_0_1", "head"),
        ("segment3", "segment"),
    ]


def test_a_bundle_says_what_the_model_is_made_of(bundle: Bundle) -> None:
    said, model = bundle.manifest.provenance["model"], whole_model()
    assert bundle.manifest.provenance["seed"] == 0
    assert said["segments"] == model.base.describe()["segments"]
    assert set(said["exits"]) == {"exit_0", "exit_stages_0_1"}
    assert said["esn"]["exits"] == {
        "esn_0": {"layer": 0, "macs": model.esn.macs()[0]},
        "esn_stages_0_1": {"layer": 1, "macs": model.esn.macs()[1]},
    }
    assert (said["esn"]["layers"], said["esn"]["width"], said["esn"]["heads"]) == (1, 8, 2)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(said["parameters"].values()) == total
    assert sum(said["esn"]["parameters"].values()) == said["parameters"]["esn"]


def test_a_point_of_corrected_exits_runs_them_and_no_plain_heads(bundle: Bundle) -> None:
    frames = images(6)
    known = chain(bundle, frames)
    point = er.OperatingPoint("test", thresholds={"saver": 0.9, "esn_stages_0_1": 0.0})
    with er.load(bundle, operating_point=point, image_size=(8, 8)) as runner:
        assert runner.plan.pruned == ("head_0", "head_stages_0_1", "segment3")
        predictions = runner(frames)
    tensors = {"saver": "saver_logits", "esn_stages_0_1": "esn_logits_stages_0_1"}
    for i, prediction in enumerate(predictions):
        assert prediction.label == known[tensors[prediction.exit]][i].argmax()
    assert "esn_stages_0_1" in {prediction.exit for prediction in predictions}


def confidence(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).softmax(1).amax(1).numpy()


@pytest.mark.parametrize("mode", ["graph", "polling"])
def test_on_a_device_it_answers_as_on_the_host(bundle: Bundle, tmp_path: Path, mode: str) -> None:
    """A head that hands a tensor to a later one is no obstacle to the graph of a whole frame."""
    robot = robot_of(bundle, tmp_path, image_size=(8, 8))
    known = chain(bundle, images(12))
    saver = confidence(known["saver_logits"])
    first = np.sort(saver)[7:9].mean()  # four leave there
    middle = np.median(confidence(known["esn_logits_stages_0_1"])[saver < first])
    point = er.OperatingPoint("test", thresholds={"saver": first, "esn_stages_0_1": middle})
    with er.load(bundle, operating_point=point, image_size=(8, 8)) as runner:
        want = [runner(image) for image in images(12)]
    fake = FakeTensorRT()
    with robot.cascade(fake, point, mode=mode).open() as runner:
        have = [runner(image) for image in images(12)]
    fake.check_all_is_closed()
    assert Counter(one.exit for one in want) == {"saver": 4, "esn_stages_0_1": 4, "final": 4}
    for one, other in zip(have, want, strict=True):
        assert (one.exit, one.label) == (other.exit, other.label)
        assert one.confidence == pytest.approx(other.confidence, rel=1e-5)


@pytest.mark.tensorrt
def test_tensorrt_builds_every_stage(tensorrt: ModuleType, bundle: Bundle) -> None:
    assert len(build_all(bundle)) == len(bundle.manifest.stages)


def moved(before: dict[str, Tensor], model: StagedModel) -> set[str]:
    """Components of which a parameter or a statistic has changed."""
    after = model.state_dict()
    names = {"saver": "saver.", "backbone": "base.backbone.", "exits": "base.heads.", "esn": "esn."}
    return {
        component
        for component, prefix in names.items()
        if any(
            not torch.equal(before[name], after[name]) for name in after if name.startswith(prefix)
        )
    }


@pytest.mark.parametrize("chosen", [("esn",), ("backbone", "exits"), ("saver",)])
def test_frozen_components_keep_weights_and_statistics(chosen: tuple[str, ...]) -> None:
    model = whole_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = model.train_only(chosen)
    model.train()
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    sum(logits.square().mean() for logits in model(torch.randn(8, 3, 8, 8)).values()).backward()
    optimizer.step()
    assert moved(before, model) == set(chosen)
    assert all((parameter.grad is None) != parameter.requires_grad for parameter in parameters)


def test_other_components_are_thawed_again() -> None:
    model = whole_model()
    model.train_only(["esn"])
    model.train_only(["saver"])
    assert model.train().saver.training
    assert not model.esn.training
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(name.startswith("saver.") for name in trained)


def test_stages_leave_the_saver_in_its_mode() -> None:
    model = StagedModel(small_base(0), small_saver())
    model.train_only(["saver"])
    model.train()
    mean = model.saver[1].running_mean.clone()
    model.stages(torch.randn(2, 3, 8, 8))
    assert model.saver.training
    assert torch.equal(model.saver[1].running_mean, mean)


def test_parts_that_do_not_fit_are_refused() -> None:
    base = small_base(0)
    esn = Esn(base.layouts, CLASSES, width=8)
    with pytest.raises(ConfigError) as raised:
        StagedModel(base, None, esn)
    assert str(raised.value) == (
        "an exit sequence network without a saver. It corrects a saver's logits: name a saver, or "
        "leave the network out"
    )
    message = "network was made for another base: got 1 segments and 4 classes, expected 2 and 4"
    with pytest.raises(ConfigError, match=message):
        StagedModel(small_base(0, "stages.0.1"), small_saver(), esn)
    with pytest.raises(ConfigError, match="got 1 segments and 5 classes, expected 1 and 4, and"):
        StagedModel(base, small_saver(), Esn(base.layouts, 5, width=8))
    with pytest.raises(ConfigError, match="needs exits of the base to hang its tokens on"):
        Esn(small_base().layouts, CLASSES)
    with pytest.raises(
        ConfigError, match=r"the model has no component 'exit'\. Did you mean 'exits"
    ):
        StagedModel(base).train_only(["exit"])
    with pytest.raises(ConfigError, match=r"components to train: none\. Valid: backbone, exits"):
        StagedModel(base).train_only([])


def test_a_saver_of_other_classes_is_refused() -> None:
    model, x = StagedModel(small_base(0), small_saver(5)), torch.randn(2, 3, 8, 8)
    for use in (model, model.stages):
        with pytest.raises(ConfigError, match=r"logits of the saver: got \([12], 5\), expected "):
            use(x)


def test_a_saver_that_cannot_read_the_input_is_named() -> None:
    model = StagedModel(small_base(0), nn.Linear(7, CLASSES))
    with pytest.raises(EngineBuildError, match="stage 'saver' failed: torch says: RuntimeError"):
        model.stages(torch.randn(2, 3, 8, 8))


def test_without_preprocessing_a_bundle_reads_the_model_s_own_input(tmp_path: Path) -> None:
    model = StagedModel(small_base()).eval()
    pixels = torch.randn(2, 3, 8, 8)
    bundle = model.export(tmp_path / "a", example_images=pixels, classes=NAMES, name="bare")
    assert str(bundle.cascade.image) == "(batch, 3, 8, 8) float32"
    assert "esn" not in bundle.manifest.provenance["model"]
    with torch.no_grad():
        want = model(pixels)["final"]
    np.testing.assert_allclose(chain(bundle, pixels.numpy())["final_logits"], want, atol=1e-5)
