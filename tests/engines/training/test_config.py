"""The YAML of a training: what is refused, and with which words."""

from pathlib import Path

import pytest

pytest.importorskip("torch")

from edge_runtime.errors import ConfigError
from engines.training.config import load_training
from tests.engines.training.trainings import phases, write

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("phases.0.epochs=0", "epochs: got 0, expected 1..100000"),
        ("phases.0.batch=0", "batch: got 0, expected 1..65536"),
        ("phases.0.rate=0.0", "rate: got 0.0, expected in (0, 10]"),
        ("phases.0.rate=11", "rate: got 11.0, expected in (0, 10]"),
        ("phases.0.weight_decay=2", "weight_decay: got 2.0, expected in [0, 1]"),
        ("phases.0.warmup_epochs=3", "warmup_epochs: got 3.0, expected 0..epochs (2)"),
        ("phases.0.label_smoothing=-0.1", "label_smoothing: got -0.1, expected in [0, 1]"),
        ("phases.0.temperature=0", "temperature: got 0.0, expected > 0"),
        ("phases.0.patience=0", "patience: got 0, expected >= 1 epoch, or null"),
        ("phases.0.clip_norm=0", "clip_norm: got 0.0, expected > 0, or null"),
        ("phases.0.distill=0.5", "distill in a phase that trains 'backbone'"),
        ("phases.0.train=head", "got 'head', expected 'saver' or 'backbone' or 'all'"),
        ("phases.0.rates=0.1", "unknown key 'rates'. Did you mean 'rate'?"),
        ("phases.0.augment.shift=-1", "shift: got -1, expected >= 0 pixels"),
        ("phases.0.augment.shift=8", "shift: got 8, expected less than the input's 8 pixels"),
        ("phases.0.augment.mixup=-1", "mixup: got -1.0, expected an alpha in [0, 100]"),
        ("phases.0.augment.crop=[0.9, 0.5]", "crop: got [0.9, 0.5], expected [smallest, largest]"),
        ("phases.0.augment.auto=rand-m5-nonsense", "auto: got 'rand-m5-nonsense', expected Rand"),
        ("phases=[]", "phases: got none, expected at least one"),
        ("data.validation=1.5", "validation: got 1.5, expected a share in (0, 1), or {path: ...}"),
        ("data.train={train: true}", "path, torchvision: got none of them, expected exactly one"),
        ("data.train.torchvision=MNIST", "path, torchvision: got both, expected exactly one"),
        ("data.train={torchvision: MNIST}", "torchvision and root belong together"),
        ("data.train={torchvision: ImageNet, root: x}", "expected 'CIFAR10' or 'CIFAR100'"),
        ("data.image.channels=2", "input: channels: got 2, expected 1 or 3"),
        ("input.layout=NHWC", "input: layout: got NHWC, expected NCHW, as torch models read"),
        ("esn.heads=3", "esn: got layers 1, width 8, heads 3, expected"),
        ("exits=[]", "esn without saver and exits"),
        ("saver=null", "esn without saver and exits"),
        ("name=a/b", "name: got 'a/b', expected letters, digits, '_' and '-'"),
        ("seed=-1", "seed: got -1, expected 0..4294967295"),
        ("amp=float16", "got 'float16', expected 'bfloat16'"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_training(write(tmp_path), [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["esn=null", "saver=null", phases("train: saver, epochs: 1")], "trains 'saver', which"),
        (["esn=null", phases("train: esn, epochs: 1")], "trains 'esn', which"),
        (["esn=null", "exits=[]", phases("train: exits, epochs: 1")], "trains 'exits', which"),
        (
            [phases("train: exits, epochs: 1")],
            "phases[0] trains 'exits' on a backbone without weights. Train the backbone",
        ),
        (
            [phases("train: backbone, epochs: 1", "train: esn, epochs: 1")],
            "phases[1] trains 'esn' on a saver without weights",
        ),
        (
            [phases("train: all, epochs: 1, batch: 5, augment: {cutmix: 1.0}")],
            "batch with mixup or cutmix: got 5, expected even",
        ),
    ],
)
def test_phases_that_do_not_fit_are_refused(tmp_path, overrides, message) -> None:
    with pytest.raises(ConfigError) as caught:
        load_training(write(tmp_path), overrides)
    assert message in str(caught.value)


def test_a_phase_can_use_weights_from_a_file(tmp_path) -> None:
    recipe = load_training(
        write(tmp_path), ["base.weights=a.safetensors", phases("train: exits, epochs: 1")]
    )
    assert recipe.base.weights == str(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("classes=1", "classes: got 1, expected at least 2"),
        ("classes=[a, b, a]", "classes: 'a' appears twice"),
        ("classes={file: nowhere.txt}", "nowhere.txt can't be read"),
    ],
)
def test_classes_that_cannot_be_are_refused(tmp_path, override, message) -> None:
    with pytest.raises(ConfigError) as caught:
        _ = load_training(write(tmp_path), [override]).class_names
    assert message in str(caught.value)


def test_classes_come_from_a_file_beside_the_configuration(tmp_path) -> None:
    (tmp_path / "labels.txt").write_text("north\nsouth\n")
    recipe = load_training(write(tmp_path), ["classes={file: labels.txt}"])
    assert recipe.class_names == ("north", "south")
