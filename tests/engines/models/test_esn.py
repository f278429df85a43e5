"""The exit sequence network: the same answers step by step as over the whole sequence."""

import itertools
from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

import edge_runtime as er  # noqa: E402
from edge_runtime.errors import ConfigError  # noqa: E402
from edge_runtime.manifest import Bundle  # noqa: E402
from engines.export import TorchStage, export_stages  # noqa: E402
from engines.fp16 import convert  # noqa: E402
from engines.macs import stage_macs  # noqa: E402
from engines.models.esn import Esn, esn_loss  # noqa: E402
from engines.models.features import Layout  # noqa: E402
from engines.verify import run_model  # noqa: E402
from tests.engines.conftest import chain  # noqa: E402
from tests.engines.test_tensorrt_builds import build_all  # noqa: E402

pytestmark = pytest.mark.torch

CLASSES = 5
#: Tokens behind a class token, tokens behind a register, and a map.
LAYOUTS = (
    Layout("tokens", 1, (2, 3), 12),
    Layout("tokens", 1, (2, 3), 12, has_cls=False),
    Layout("NCHW", 0, (3, 2), 10, has_cls=False),
)
SHAPES = ((7, 12), (7, 12), (10, 3, 2))
LABELS = ("2", "4", "7")


def network(*, layers: int = 2, width: int = 16, heads: int = 4, trained: bool = True) -> Esn:
    """Trained stands for: no parameter is 0."""
    torch.manual_seed(0)
    esn = Esn(LAYOUTS, CLASSES, layers=layers, width=width, heads=heads)
    for parameter in esn.parameters() if trained else ():
        nn.init.normal_(parameter, std=0.3)
    return esn


def sequence(batch: int, seed: int = 1) -> tuple[list[Tensor], Tensor]:
    """Features behind each segment, and the saver's logits."""
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(batch, *shape, generator=generator) for shape in SHAPES]
    return features, torch.randn(batch, CLASSES, generator=generator)


def step_by_step(esn: Esn, features: list[Tensor], saver: Tensor) -> list[tuple[Tensor, ...]]:
    """What each stage writes, when it gets what its inputs name and nothing else."""
    stages, _ = esn.stages(LABELS)
    known = {f"features_{label}": x for label, x in zip(LABELS, features, strict=True)}
    known["saver_logits"] = saver
    found = []
    for stage in stages:
        written = stage.module(*(known[name] for name in stage.inputs))
        written = written if isinstance(written, tuple) else (written,)
        known.update(zip(stage.outputs, written, strict=True))
        found.append(written)
    return found


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("batch", [1, 6])
def test_step_by_step_gives_what_the_whole_sequence_gives(layers: int, batch: int) -> None:
    esn, (features, saver) = network(layers=layers), sequence(batch)
    whole = esn(features, saver)
    for want, (logits, *cache) in zip(whole, step_by_step(esn, features, saver), strict=True):
        torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)
        assert all(tensor.shape[0] == batch for tensor in cache)
    assert all((one - saver).abs().amax() > 0.1 for one in whole)


def test_each_stage_adds_one_token_to_the_cache() -> None:
    stages, exits = network(layers=2).stages(LABELS)
    assert [(stage.name, stage.inputs) for stage in stages] == [
        ("esn_2", ("features_2", "saver_logits")),
        ("esn_4", ("features_4", "saver_logits", "esn_cache_2")),
        ("esn_7", ("features_7", "saver_logits", "esn_cache_4")),
    ]
    written = step_by_step(network(layers=2), *sequence(3))
    assert [[tuple(tensor.shape) for tensor in one[1:]] for one in written] == [
        [(3, 2, 2, 2, 16)],
        [(3, 2, 2, 3, 16)],
        [],
    ]
    assert [(one.name, one.logits) for one in exits] == [
        (f"esn_{label}", f"esn_logits_{label}") for label in LABELS
    ]


def test_the_cache_of_earlier_tokens_stays_as_it_was() -> None:
    written = step_by_step(network(), *sequence(2))
    for (_, before), (_, after) in itertools.pairwise(written[:-1]):
        assert torch.equal(after[:, :, :, :-1], before)


def test_without_layers_an_exit_reads_its_own_feature_and_the_saver_only() -> None:
    stages, _ = network(layers=0).stages(LABELS)
    assert [stage.inputs for stage in stages] == [(f"features_{n}", "saver_logits") for n in LABELS]
    assert all(len(stage.outputs) == 1 for stage in stages)


@pytest.mark.parametrize("changed", range(len(SHAPES)))
def test_a_later_feature_changes_no_earlier_exit(changed: int) -> None:
    esn, (features, saver) = network(), sequence(2)
    before = esn(features, saver)
    features[changed] = features[changed] + 1
    after = esn(features, saver)
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [i < changed for i in range(len(SHAPES))]


def test_every_exit_hears_of_the_saver_beyond_the_sum() -> None:
    esn, (features, saver) = network(), sequence(2)
    other = saver + torch.tensor([3.0, 0, 0, 0, 0])
    for one, two in zip(esn(features, saver), esn(features, other), strict=True):
        assert ((two - other) - (one - saver)).abs().amax() > 1e-3


@pytest.mark.parametrize("layers", [0, 1])
def test_untrained_it_repeats_the_saver_bit_by_bit(layers: int) -> None:
    features, saver = sequence(4)
    esn = network(layers=layers, trained=False)
    assert all(torch.equal(logits, saver) for logits in esn(features, saver))


@pytest.mark.parametrize("layers", [0, 1])
def test_the_loss_reaches_every_parameter_but_not_the_weights_of_samples(layers: int) -> None:
    esn, (features, saver) = network(layers=layers), sequence(4)
    saver.requires_grad_(True)
    targets = torch.arange(4)
    esn_loss(esn(features, saver), targets, saver).backward()
    assert all(p.grad is not None and p.grad.abs().amax() > 0 for p in esn.parameters())
    constant = [torch.zeros(4, CLASSES)]
    assert not esn_loss(constant, targets, saver).requires_grad


def test_an_untrained_network_starts_to_learn() -> None:
    """The heads are 0, and yet get a gradient: what stands before them follows a step later."""
    esn, (features, saver) = network(trained=False), sequence(8)
    targets = torch.arange(8) % CLASSES
    optimizer = torch.optim.AdamW(esn.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = esn_loss(esn(features, saver), targets, saver)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_the_loss_is_equation_11() -> None:
    probabilities = np.array([[0.5, 0.3, 0.2], [0.9, 0.05, 0.05]])
    answers = np.array([[0.2, 0.7, 0.1], [0.6, 0.2, 0.2]])
    saver, exit_ = (torch.tensor(np.log(p), dtype=torch.float32) for p in (probabilities, answers))
    want = np.mean([2 * 0.5 * -np.log(0.7), 2 * 0.1 * -np.log(0.6)])
    assert float(esn_loss([exit_], torch.tensor([1, 0]), saver)) == pytest.approx(want, rel=1e-6)
    both = esn_loss([exit_, saver], torch.tensor([1, 0]), saver)
    more = np.mean([2 * 0.5 * -np.log(0.3), 2 * 0.1 * -np.log(0.9)])
    assert float(both) == pytest.approx(want + more, rel=1e-6)
    soft = torch.tensor([[0.0, 0.4, 0.6], [1.0, 0.0, 0.0]])
    mixed = np.mean([2 * 0.5 * -(0.4 * np.log(0.7) + 0.6 * np.log(0.1)), 2 * 0.1 * -np.log(0.6)])
    assert float(esn_loss([exit_], soft, saver)) == pytest.approx(mixed, rel=1e-6)


def test_a_sure_saver_leaves_nothing_to_learn() -> None:
    saver = torch.tensor([[100.0, 0.0, 0.0]])
    assert float(esn_loss([torch.zeros(1, 3)], torch.tensor([2]), saver)) == 0


@pytest.mark.parametrize("layers", [0, 2])
def test_parameters_are_counted_per_component(layers: int) -> None:
    esn = network(layers=layers)
    counts = esn.parameter_counts()
    assert counts["heads"] == len(LABELS) * (16 + 1) * CLASSES
    assert sum(counts.values()) == sum(p.numel() for p in esn.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"width": 20, "heads": 8},
            "width of an exit sequence network: got 20 for 8 heads, expected a multiple of the",
        ),
        ({"layers": -1}, "layers of an exit sequence network: got -1, expected >= 0"),
        ({"width": 0}, "width of an exit sequence network: got 0, expected >= 1"),
        ({"heads": 0}, "heads of an exit sequence network: got 0, expected >= 1"),
        ({"classes": 1}, "classes of an exit sequence network: got 1, expected >= 2"),
        (
            {"layouts": ()},
            "an exit sequence network needs exits of the base to hang its tokens on. Give the base",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Esn(**{"layouts": LAYOUTS, "classes": CLASSES, **options})
    assert str(raised.value).startswith(message)


def test_without_attention_the_heads_need_not_divide_the_width() -> None:
    assert network(layers=0, width=9, heads=8)(*sequence(1))[0].shape == (1, CLASSES)


def test_inputs_that_do_not_fit_are_refused() -> None:
    esn, (features, saver) = network(), sequence(2)
    with pytest.raises(ConfigError, match="features of an exit sequence network: got 2, expected"):
        esn(features[:2], saver)
    with pytest.raises(ConfigError, match=r"logits of the saver: got \(2, 4\), expected \(batch, "):
        esn(features, saver[:, :4])
    with pytest.raises(ConfigError, match="labels of an exit sequence network: got 1, expected 3"):
        esn.stages(("a",))
    with pytest.raises(ConfigError, match="names of features of an exit sequence network: got 1"):
        esn.stages(LABELS, ("a",))


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        ([], torch.tensor([0, 1]), "an exit sequence network needs exits"),
        ([torch.zeros(2, 4)], torch.tensor([0, 1]), "logits of exit 0: got (2, 4), expected (2, 3"),
        ([torch.zeros(2, 3)], torch.tensor([0]), "targets: got (1,) int64, expected (2,) int64"),
        ([torch.zeros(2, 3)], torch.zeros(2), "targets: got (2,) float32, expected (2,) int64 or"),
    ],
)
def test_a_loss_of_what_does_not_fit_is_refused(
    logits: list[Tensor], targets: Tensor, message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        esn_loss(logits, targets, torch.zeros(2, 3))
    assert str(raised.value).startswith(message)


class Segment(nn.Module):
    """Any tensor -> a feature of a shape; what is between them does not matter here."""

    def __init__(self, numbers: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.linear = nn.Linear(numbers, int(np.prod(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)).tanh().reshape(-1, *self.shape)


def cascade(esn: Esn) -> tuple[list[TorchStage], list[er.Exit]]:
    """A saver, three segments each with a stage of the network, and the base's own answer."""
    steps, exits = esn.stages(LABELS)
    saver = nn.Sequential(nn.Flatten(), nn.Linear(8, CLASSES))
    stages = [TorchStage("saver", "saver", saver, ("pixels",), ("saver_logits",))]
    before, numbers = "pixels", 8
    for label, shape, step in zip(LABELS, SHAPES, steps, strict=True):
        segment, name = Segment(numbers, shape), f"features_{label}"
        stages += [TorchStage(f"segment_{label}", "segment", segment, (before,), (name,)), step]
        before, numbers = name, int(np.prod(shape))
    last = nn.Sequential(nn.Flatten(), nn.Linear(numbers, CLASSES))
    stages.append(TorchStage("rest", "segment", last, (before,), ("final_logits",)))
    return stages, [er.Exit("saver", "saver_logits"), *exits, er.Exit("final", "final_logits")]


def pixels(batch: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((batch, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    stages, exits = cascade(network())
    return export_stages(
        stages,
        exits,
        example=pixels(2),
        classes=tuple("abcde"),
        out=tmp_path_factory.mktemp("esn") / "a.bundle",
        name="esn",
    )


@pytest.mark.parametrize("batch", [1, 5])
def test_a_bundle_gives_what_torch_gives_over_the_whole_sequence(
    bundle: Bundle, batch: int
) -> None:
    have = chain(bundle, pixels(batch))
    features = [torch.from_numpy(have[f"features_{label}"]) for label in LABELS]
    with torch.no_grad():
        want = network()(features, torch.from_numpy(have["saver_logits"]))
    for label, logits in zip(LABELS, want, strict=True):
        np.testing.assert_allclose(have[f"esn_logits_{label}"], logits, atol=1e-4)


def test_its_operations_are_those_of_the_exported_stages(bundle: Bundle) -> None:
    counted = stage_macs(bundle)
    assert network().macs() == tuple(counted[f"esn_{label}"] for label in LABELS)


def test_its_stages_convert_to_fp16(bundle: Bundle) -> None:
    """Where the mask were -inf they would not: a constant must be finite."""
    images = pixels(4)
    want = chain(bundle, images)
    stage = bundle.record("esn_2")
    half = convert(bundle.stage_model("esn_2", "fp32")).model
    inputs = {spec.name: want[spec.name] for spec in stage.inputs}
    have = run_model(half, inputs, ["esn_logits_2", "esn_cache_2"])
    for name, values in have.items():
        np.testing.assert_allclose(values, want[name], atol=0.01 * np.abs(want[name]).max())


@pytest.mark.tensorrt
def test_tensorrt_builds_every_stage(tensorrt: ModuleType, bundle: Bundle) -> None:
    assert [name for name in build_all(bundle) if name.startswith("esn")] == [
        f"esn_{label}" for label in LABELS
    ]


def point(**thresholds: float) -> er.OperatingPoint:
    return er.OperatingPoint("test", thresholds=thresholds)


def test_a_later_exit_still_runs_the_earlier_stages_that_feed_its_cache(bundle: Bundle) -> None:
    images = pixels(4)
    logits = chain(bundle, images)["esn_logits_4"]
    with er.load(bundle, operating_point=point(esn_4=0.0)) as runner:
        predictions = runner(images)
        assert runner.plan.pruned == ("segment_7", "esn_7", "rest")
    for prediction, row in zip(predictions, logits, strict=True):
        assert prediction.exit == "esn_4"
        assert prediction.label == row.argmax()
        assert [run.exit for run in prediction.trace.exits] == ["esn_4"]
        assert [run.stage for run in prediction.trace.stages if run.stage[:3] == "esn"] == [
            "esn_2",
            "esn_4",
        ]


def test_a_batch_that_shrinks_keeps_each_sample_s_own_cache(bundle: Bundle) -> None:
    """Some leave at the second exit, so that the third reads a cache of fewer rows."""
    images = pixels(8)
    known = chain(bundle, images)
    signal = torch.from_numpy(known["esn_logits_4"]).softmax(1).amax(1).sort().values
    between = float(signal[3:5].mean())
    with er.load(bundle, operating_point=point(esn_4=between, esn_7=0.0)) as runner:
        predictions = runner(images)
    assert sorted(p.exit for p in predictions) == ["esn_4"] * 4 + ["esn_7"] * 4
    for i, prediction in enumerate(predictions):
        row = torch.from_numpy(known[prediction.exit.replace("_", "_logits_")][i])
        assert prediction.confidence == pytest.approx(float(row.softmax(0).amax()), rel=1e-4)


def test_where_no_exit_of_it_is_evaluated_all_its_stages_are_pruned(bundle: Bundle) -> None:
    with er.load(bundle, operating_point=point(saver=0.99)) as runner:
        assert runner.plan.pruned == tuple(f"esn_{label}" for label in LABELS)
