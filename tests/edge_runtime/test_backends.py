"""The contract that every backend keeps, run against every backend."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from edge_runtime import BackendError, Bundle, ConfigError, EdgeRuntimeError
from edge_runtime.backends.base import Backend
from edge_runtime.backends.cuda.backend import CudaBackend, CudaOptions
from edge_runtime.backends.cuda.fake import FakeCuda
from edge_runtime.backends.cuda.fake_stages import FakeStages
from edge_runtime.backends.fake import FakeBackend
from edge_runtime.backends.onnxrt import OnnxRuntimeBackend
from edge_runtime.backends.torch import TorchBackend
from edge_runtime.backends.torch_cuda import TorchStages
from edge_runtime.cascade import Plan
from tests.edge_runtime.bundles import model
from tests.meta.repository import ROOT
from tests.toys import toy_bundle, toy_cascade, toy_images, toy_modules

AXES = {"height": 5, "width": 7}
#: Ways to run a batch on a GPU; the mode "graph" takes one image at a time.
CUDA: dict[str, CudaOptions] = {
    "polling": CudaOptions(mode="polling", batch=8),
    "polling, overlap": CudaOptions(mode="polling", batch=8, overlap=True),
    "sync": CudaOptions(mode="sync", batch=8),
    "run_all": CudaOptions(mode="run_all", batch=8),
    "run_all, overlap": CudaOptions(mode="run_all", batch=8, overlap=True),
}


def on_the_fake_device(options: CudaOptions) -> Callable[[Bundle], Backend]:
    return lambda bundle: CudaBackend(FakeStages(), options, cuda=FakeCuda())


def with_torch_on_a_gpu(options: CudaOptions) -> Callable[[Bundle], Backend]:
    return lambda bundle: CudaBackend(TorchStages(toy_modules()), options)


BACKENDS: dict[str, Callable[[Bundle], Backend]] = {
    "fake": lambda bundle: FakeBackend(),
    "onnxrt": OnnxRuntimeBackend,
    "torch": lambda bundle: TorchBackend(toy_modules()),
    "torch, eager on a GPU": lambda bundle: TorchBackend(toy_modules(), device="cuda"),
    **{f"cuda fake, {name}": on_the_fake_device(options) for name, options in CUDA.items()},
    **{f"cuda torch, {name}": with_torch_on_a_gpu(options) for name, options in CUDA.items()},
}


def parameters() -> list[Any]:
    """All backends, those with torch and those on a GPU marked so."""
    marks = {
        name: [
            *([pytest.mark.torch] if "torch" in name else []),
            *([pytest.mark.gpu] if "GPU" in name or "cuda torch" in name else []),
        ]
        for name in BACKENDS
    }
    return [pytest.param(name, marks=marks[name]) for name in BACKENDS]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return toy_bundle(tmp_path_factory.mktemp("toy") / "toy.bundle")


@pytest.fixture
def plan() -> Plan:
    return toy_cascade().plan([0, 1, 2])


@pytest.fixture(params=parameters())
def closed(request: pytest.FixtureRequest, bundle: Bundle) -> Backend:
    if "torch" in request.param:
        pytest.importorskip("torch")
    return BACKENDS[request.param](bundle)


@pytest.fixture
def backend(closed: Backend, plan: Plan):
    closed.open(plan, AXES, {})
    yield closed
    closed.close()


def run_all(backend: Backend, plan: Plan, images: np.ndarray) -> dict[str, np.ndarray]:
    backend.feed(images)
    for stage in plan.stages:
        backend.run(stage.name)
    return {spec.name: backend.read(spec.name) for s in plan.stages for spec in s.outputs}


def test_tensors_have_the_declared_shape_and_dtype(backend: Backend, plan: Plan) -> None:
    found = run_all(backend, plan, toy_images(3))
    for stage in plan.stages:
        for spec in stage.outputs:
            assert found[spec.name].shape == (3, *spec.shape[1:])
            assert found[spec.name].dtype.name == spec.dtype


def test_results_do_not_depend_on_the_batch(backend: Backend, plan: Plan) -> None:
    images = toy_images(5)
    together = run_all(backend, plan, images)
    for i in range(5):
        alone = run_all(backend, plan, images[i : i + 1])
        for name, value in alone.items():
            np.testing.assert_allclose(together[name][i], value[0], rtol=1e-5, atol=1e-5)


def test_samples_differ(backend: Backend, plan: Plan) -> None:
    logits = run_all(backend, plan, toy_images(5))["final/logits"]
    assert len(np.unique(logits.round(4), axis=0)) == 5


def test_batches_may_grow_and_shrink(backend: Backend, plan: Plan) -> None:
    images = toy_images(8)
    want = run_all(backend, plan, images)["final/logits"]
    for size in (1, 8, 3, 1, 5):
        got = run_all(backend, plan, images[:size])["final/logits"]
        np.testing.assert_allclose(got, want[:size], rtol=1e-5, atol=1e-5)


def test_keep_compacts_what_later_stages_read(backend: Backend, plan: Plan) -> None:
    images = toy_images(6)
    want = run_all(backend, plan, images)["final/logits"]
    backend.feed(images)
    for name in ("preprocess", "saver"):
        backend.run(name)
    backend.keep(np.array([1, 4, 5]), ["pixels"])
    for name in ("segment1", "head1"):
        backend.run(name)
    backend.keep(np.array([0, 2]), ["features"])
    for name in ("segment2", "head2"):
        backend.run(name)
    np.testing.assert_allclose(backend.read("final/logits"), want[[1, 5]], rtol=1e-5, atol=1e-5)
    assert len(backend.decide("final/logits", "max_softmax", 1.0).labels) == 2


def test_read_and_decide_hand_out_copies(backend: Backend, plan: Plan) -> None:
    first = run_all(backend, plan, toy_images(2, seed=1))["saver/logits"]
    before = first.copy()
    decision = backend.decide("saver/logits", "entropy", 1.0)
    signal = decision.signal.copy()
    run_all(backend, plan, toy_images(2, seed=2))
    np.testing.assert_array_equal(first, before)
    np.testing.assert_array_equal(decision.signal, signal)
    first[:] = 0
    assert np.abs(backend.read("saver/logits")).max() > 0


def test_decide_agrees_with_the_logits(backend: Backend, plan: Plan) -> None:
    logits = run_all(backend, plan, toy_images(4))["middle/logits"]
    decision = backend.decide("middle/logits", "max_softmax", 2.0)
    exponent = np.exp(logits.astype(np.float64) / 2)
    softmax = exponent / exponent.sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(decision.labels, logits.argmax(axis=1))
    np.testing.assert_allclose(decision.signal, softmax.max(axis=1), rtol=1e-5)
    assert decision.signal.dtype == np.float32


def test_feed_copies_the_image(backend: Backend, plan: Plan) -> None:
    images = toy_images(2)
    want = run_all(backend, plan, images)["pixels"]
    backend.feed(images)
    images[:] = 0
    backend.run("preprocess")
    np.testing.assert_allclose(backend.read("pixels"), want, rtol=1e-5)


def test_an_unknown_stage_is_named(backend: Backend) -> None:
    backend.feed(toy_images(1))
    with pytest.raises(BackendError, match="'nonsense' was not opened") as caught:
        backend.run("nonsense")
    assert caught.value.stage == "nonsense"


def test_close_is_idempotent_and_final(backend: Backend, plan: Plan) -> None:
    backend.close()
    backend.close()
    with pytest.raises(BackendError):
        backend.feed(toy_images(1))
    with pytest.raises(BackendError):
        backend.run("saver")
    backend.open(plan, AXES, {})
    run_all(backend, plan, toy_images(1))


def test_a_failed_open_leaves_nothing_behind(closed: Backend, plan: Plan) -> None:
    with pytest.raises(ConfigError, match="height"):
        closed.open(plan, {}, {})
    with pytest.raises(BackendError):
        closed.feed(toy_images(1))
    closed.open(plan, AXES, {})
    run_all(closed, plan, toy_images(1))
    closed.close()


def test_the_precision_of_a_stage_is_told(backend: Backend) -> None:
    assert backend.precision("saver") == "fp32"


def test_a_plan_without_some_stages_loads_only_its_own(closed: Backend) -> None:
    plan = toy_cascade().plan([1])
    closed.open(plan, AXES, {})
    closed.feed(toy_images(1))
    with pytest.raises(BackendError, match="was not opened"):
        closed.run("saver")
    closed.close()


def test_errors_are_of_our_tree_and_one_line(closed: Backend, plan: Plan) -> None:
    with pytest.raises(EdgeRuntimeError) as caught:
        closed.open(plan, {"height": 5}, {})
    assert "\n" not in str(caught.value)


def test_close_before_open_is_allowed(closed: Backend) -> None:
    closed.close()


def transposed_matmul(source: str, target: str) -> bytes:
    """A model: y (1, 2, 3) = x (2, 1, 8), transposed and cast, times 0.5."""
    kinds = [helper.np_dtype_to_tensor_dtype(np.dtype(name)) for name in (source, target)]
    nodes = [helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2])]
    if source != target:
        nodes.append(helper.make_node("Cast", ["t"], ["c"], to=kinds[1]))
    nodes.append(helper.make_node("MatMul", [nodes[-1].output[0], "w"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kinds[0], [2, 1, 8])],
        [helper.make_tensor_value_info("y", kinds[1], [1, 2, 3])],
        [numpy_helper.from_array(np.full((8, 3), 0.5, target), "w")],
    )
    return model(graph).SerializeToString()


class TestOnnxRuntime:
    """What only ONNX Runtime has."""

    def test_a_variant_that_does_not_exist(self, bundle: Bundle, plan: Plan) -> None:
        backend = OnnxRuntimeBackend(bundle)
        with pytest.raises(ConfigError, match="stage 'saver': variant: got 'int4', expected fp32"):
            backend.open(plan, AXES, {"saver": "int4"})

    def test_another_thread_count_in_one_process_is_refused(
        self, bundle: Bundle, plan: Plan
    ) -> None:
        from edge_runtime.backends.onnxrt import OnnxRuntimeOptions

        OnnxRuntimeBackend(bundle).open(plan, AXES, {})
        other = OnnxRuntimeBackend(bundle, OnnxRuntimeOptions(threads=63))
        with pytest.raises(ConfigError, match="pool of this process is already running"):
            other.open(plan, AXES, {})

    def test_an_unknown_provider_is_refused(self, bundle: Bundle, plan: Plan) -> None:
        from edge_runtime import BackendUnavailable
        from edge_runtime.backends.onnxrt import OnnxRuntimeOptions

        backend = OnnxRuntimeBackend(bundle, OnnxRuntimeOptions(provider="Abacus"))
        with pytest.raises(BackendUnavailable, match="execution provider: got 'Abacus'"):
            backend.open(plan, AXES, {})

    def test_a_file_that_is_no_model(self, tmp_path: Path) -> None:
        from edge_runtime.backends.onnxrt import new_session

        with pytest.raises(BackendError, match="ONNX Runtime says") as caught:
            new_session(b"not a model")
        assert caught.value.__cause__ is not None

    def test_without_a_shared_pool_sessions_do_not_spin(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import onnxruntime

        from edge_runtime.backends import onnxrt

        monkeypatch.delattr(onnxruntime, "set_global_thread_pool_sizes")
        options = onnxrt.OnnxRuntimeOptions()
        assert not onnxrt.shared_pool_available(onnxruntime)
        shared = onnxrt._Process().prepare(onnxruntime, options)
        settings = onnxrt._session_options(onnxruntime, options, shared)
        assert settings.use_per_session_threads
        assert settings.get_session_config_entry("session.intra_op.allow_spinning") == "0"

    @pytest.mark.parametrize("optimization", ["all", "extended"])
    @pytest.mark.parametrize(("source", "target"), [("float16", "float16"), ("uint8", "float32")])
    def test_a_cast_behind_a_transpose_does_not_kill_the_process(
        self, source: str, target: str, optimization: str, tmp_path: Path
    ) -> None:
        """ONNX Runtime 1.31.1 dies of the level "all" where `new_session` does not prevent it."""
        (tmp_path / "m.onnx").write_bytes(transposed_matmul(source, target))
        lines = (
            "import sys, numpy as np",
            "from edge_runtime.backends.onnxrt import OnnxRuntimeOptions, new_session",
            "model = open(sys.argv[1], 'rb').read()",
            "session = new_session(model, OnnxRuntimeOptions(optimization=sys.argv[3]))",
            "(y,) = session.run(None, {'x': np.ones((2, 1, 8), sys.argv[2])})",
            "assert y.shape == (1, 2, 3) and (y == 4).all(), y",
        )
        arguments = [str(tmp_path / "m.onnx"), source, optimization]
        command = [sys.executable, "-c", "\n".join(lines), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stderr

    @pytest.mark.parametrize(
        ("source", "target", "disabled"),
        [
            ("float16", "float16", "MatmulTransposeFusion"),
            ("uint8", "float32", "MatmulTransposeFusion"),
            ("float32", "float32", None),
        ],
    )
    def test_only_models_with_casts_do_without_an_optimiser(
        self, source: str, target: str, disabled: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import onnxruntime

        from edge_runtime.backends.onnxrt import new_session

        seen = []

        class Spy:
            """Loads nothing: what must not be loaded would end the tests."""

            def __init__(self, model: bytes, settings: Any, providers: list[str]) -> None:
                seen.append(settings)

            def get_providers(self) -> list[str]:
                return ["CPUExecutionProvider"]

        monkeypatch.setattr(onnxruntime, "InferenceSession", Spy)
        new_session(transposed_matmul(source, target))
        (settings,) = seen
        try:
            entry = settings.get_session_config_entry("optimization.disable_specified_optimizers")
        except RuntimeError:  # there is none
            entry = None
        assert entry == disabled


@pytest.mark.torch
class TestTorch:
    """What only live modules have."""

    @pytest.fixture
    def modules(self) -> dict:
        pytest.importorskip("torch")
        return toy_modules()

    def test_it_computes_what_onnx_runtime_computes(
        self, modules: dict, bundle: Bundle, plan: Plan
    ) -> None:
        images = toy_images(5)
        found = []
        for backend in (TorchBackend(modules), OnnxRuntimeBackend(bundle)):
            backend.open(plan, AXES, {})
            found.append(run_all(backend, plan, images))
            backend.close()
        for name, value in found[0].items():
            np.testing.assert_allclose(value, found[1][name], rtol=1e-4, atol=1e-4)

    def test_modules_get_their_mode_back(self, modules: dict, plan: Plan) -> None:
        modules["head1"].eval()
        modules["saver"].train()
        backend = TorchBackend(modules)
        backend.open(plan, AXES, {})
        assert not modules["saver"].training
        backend.close()
        assert modules["saver"].training
        assert not modules["head1"].training

    def test_a_module_that_two_stages_share_gets_its_mode_back(
        self, modules: dict, plan: Plan
    ) -> None:
        modules["head2"] = modules["head1"]
        backend = TorchBackend(modules)
        backend.open(plan, AXES, {})
        backend.close()
        assert modules["head1"].training

    def test_a_missing_module_is_named(self, modules: dict, plan: Plan) -> None:
        del modules["head1"]
        with pytest.raises(ConfigError, match="stage 'head1' has no module"):
            TorchBackend(modules).open(plan, AXES, {})

    def test_another_variant_is_refused(self, modules: dict, plan: Plan) -> None:
        with pytest.raises(ConfigError, match="variant: got 'int8', expected fp32"):
            TorchBackend(modules).open(plan, AXES, {"saver": "int8"})

    def test_a_module_that_returns_something_else(self, modules: dict, plan: Plan) -> None:
        modules["saver"] = modules["segment1"]
        backend = TorchBackend(modules)
        backend.open(plan, AXES, {})
        backend.feed(toy_images(2))
        backend.run("preprocess")
        with pytest.raises(BackendError, match=r"got \(2, 6\) float32, expected \(batch, 4\)"):
            backend.run("saver")

    def test_a_module_that_raises(self, modules: dict, plan: Plan) -> None:
        modules["saver"] = modules["head2"]
        backend = TorchBackend(modules)
        backend.open(plan, AXES, {})
        backend.feed(toy_images(2))
        backend.run("preprocess")
        with pytest.raises(BackendError, match="torch says: RuntimeError") as caught:
            backend.run("saver")
        assert caught.value.stage == "saver"
        assert caught.value.__cause__ is not None

    def test_a_device_that_is_not_here(self, modules: dict, plan: Plan) -> None:
        from edge_runtime import BackendUnavailable

        with pytest.raises(BackendUnavailable, match="torch has no device 'abacus'"):
            TorchBackend(modules, device="abacus").open(plan, AXES, {})

    @pytest.mark.gpu
    def test_on_cuda_it_computes_the_same(self, modules: dict, plan: Plan) -> None:
        found = []
        for device in ("cpu", "cuda"):
            backend = TorchBackend(modules, device=device)
            backend.open(plan, AXES, {})
            found.append(run_all(backend, plan, toy_images(5)))
            backend.close()
        captured = CudaBackend(TorchStages(modules), CudaOptions(batch=8, mode="sync"))
        captured.open(plan, AXES, {})
        found.append(run_all(captured, plan, toy_images(5)))
        captured.close()
        for name, value in found[0].items():
            np.testing.assert_allclose(value, found[1][name], rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(value, found[2][name], rtol=1e-3, atol=1e-3)
