"""A bundle's stages as torch modules that run eagerly: the baseline "PyTorch eager".

A stage's nodes are called one after another, each as the function of torch that a model's author
would have written, with nothing fused. What depends on weights alone is worked out when a module is
made, and what depends on shapes alone at the first call with inputs of these shapes: the sizes
behind a Reshape are plain numbers in a model's own code too. A ViT-Tiny with exits takes as long as
its own torch modules do, which attend in one call (1.005 times, one thread, 60 frames in turn).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from edge_runtime.backends.torch import TorchBackend
from edge_runtime.cascade import Stage
from edge_runtime.errors import EngineBuildError, missing_package
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.scheduler import Scheduler
from engines.onnx_graph import opset, reads, subgraphs
from engines.onnx_package import DecodeError, onnx

try:
    import torch
except ImportError as error:
    raise missing_package("torch", "export") from error
from engines.eager_operators import OPERATORS, Node, Unsupported, tensor_of

#: The opset that operators are written for; earlier models are converted to it.
_OPSET = 18
#: What the onnx package raises for a model that is not whole.
_ONNX_ERRORS = (DecodeError, onnx.checker.ValidationError, RuntimeError, ValueError, TypeError)
#: What torch raises for a call that it can't do.
_TORCH_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


def eager_scheduler(
    bundle: Bundle,
    point: OperatingPoint,
    *,
    image_size: tuple[int, int] | None = None,
    device: str = "cpu",
) -> Scheduler:
    """A bundle at an operating point, its stages run by PyTorch; not opened.

    Args:
        bundle: Where the stages come from.
        point: Also says at which variants. A live module has no other, so the scheduler's own
            point names none, and traces call all of them "fp32".
        image_size: (height, width) of every image, for bundles that leave it open.
        device: Any of torch's devices.

    Raises:
        ConfigError: The point does not fit the bundle, or the size of the images is not known.
        EngineBuildError: A stage needs what this baseline can't run.
        BackendUnavailable: The onnx package or torch is missing.
    """
    policy = point.policy_for(bundle.cascade)
    plan = bundle.cascade.plan(policy.evaluated(len(bundle.cascade.exits)))
    modules = eager_modules(bundle, plan.stages, point.variants, image_size=image_size)
    backend = TorchBackend(modules, device=device)
    return Scheduler(bundle.cascade, backend, replace(point, variants={}), image_size=image_size)


def eager_modules(
    bundle: Bundle,
    stages: Sequence[Stage],
    variants: Mapping[str, str],
    *,
    image_size: tuple[int, int] | None = None,
) -> dict[str, torch.nn.Module]:
    """Make a module of each stage, and run each once.

    Args:
        bundle: Where the models come from.
        stages: Some of its stages.
        variants: Stage name -> precision, for stages that are not taken at their first variant.
            INT8 is emulated: rounded where the model rounds, computed in floats.
        image_size: (height, width) of every image, for bundles that leave it open.

    Returns:
        Stage name -> module, for `TorchBackend`.

    Raises:
        ConfigError: There is no such variant, or the size of the images is not known.
        EngineBuildError: A stage needs what this baseline can't run; the message names stage, node
            and operator.
        BackendUnavailable: The onnx package or torch is missing.
    """
    axes = dict(zip(("height", "width"), image_size or (), strict=False))
    modules: dict[str, torch.nn.Module] = {}
    for stage in stages:
        model = bundle.stage_model(stage.name, bundle.precision(stage.name, variants))
        inputs = [
            torch.zeros((1, *spec.resolve(axes).sample_shape()), dtype=getattr(torch, spec.dtype))
            for spec in stage.inputs
        ]
        module = EagerStage(stage, model)
        with torch.inference_mode():
            module(*inputs)
        modules[stage.name] = module
    return modules


class _Step(NamedTuple):
    """One call: the places of what it reads and writes, and of what nobody reads after it."""

    call: Callable[..., Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    dead: tuple[int, ...]


class EagerStage(torch.nn.Module):
    """A stage that calls torch once per node.

    Args:
        stage: Names of its inputs and outputs, in the order of `forward`.
        model: Its ONNX model.

    Raises:
        EngineBuildError: From the constructor and from the first call with inputs of other
            shapes: it needs what this baseline can't run.
    """

    def __init__(self, stage: Stage, model: bytes) -> None:
        super().__init__()
        self._stage = stage
        proto = _load(stage, model)
        self._opset = opset(proto)
        self._inputs = [spec.name for spec in stage.inputs]
        self._outputs = [spec.name for spec in stage.outputs]
        self._programs: dict[tuple[Any, ...], tuple[list[Any], list[_Step], list[int]]] = {}
        constants = {}
        for tensor in proto.graph.initializer:
            with _naming(stage, f"weight {tensor.name!r}"):
                constants[tensor.name] = tensor_of(tensor)
        self._nodes = self._fold(proto.graph.node, constants)
        read = {name for node in self._nodes for name in node.input} | set(self._outputs)
        self._names: dict[str, str] = {}
        for name, value in constants.items():
            if name in read:
                self._names[name] = f"constant{len(self._names)}"
                self.register_buffer(self._names[name], value)

    def _fold(
        self, nodes: Sequence[onnx.NodeProto], constants: dict[str, torch.Tensor]
    ) -> list[onnx.NodeProto]:
        """Add to `constants` what depends on constants alone; returns the other nodes."""
        left = []
        for node in nodes:
            if _is_fixed(node, constants):
                constants.update(self._run(node, constants, constants)[2])
            else:
                left.append(node)
        return left

    def _run(
        self,
        proto: onnx.NodeProto,
        values: Mapping[str, torch.Tensor],
        constants: Mapping[str, torch.Tensor],
    ) -> tuple[Callable[..., Any], list[str], dict[str, torch.Tensor]]:
        """Run a node; returns its call, the names of what it reads, and its outputs."""
        own = proto.domain in ("", "ai.onnx")
        kind = proto.op_type if own else f"{proto.domain}.{proto.op_type}"
        with _naming(self._stage, f"node {proto.name or proto.output[0]!r} ({kind})"):
            node = Node(proto, values, constants)
            if kind in OPERATORS:
                call = OPERATORS[kind](node)
            elif own and _is_fixed(proto, constants):
                call = self._by_reference(proto)
            else:
                raise Unsupported("there is no call of torch for it")
            names = [name for i, name in enumerate(proto.input) if name and i not in node.taken]
            result = call(*(values[name] for name in names))
            found = list(result) if isinstance(result, tuple | list) else [result]
            if len(found) != len(proto.output):
                raise Unsupported("outputs", got=len(proto.output), expected=len(found))
        return call, names, dict(zip(proto.output, found, strict=True))

    def _by_reference(self, proto: onnx.NodeProto) -> Callable[..., Any]:
        """What computes a node once that has no call of torch."""
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(proto, opsets={"": self._opset})
        names = [name for name in proto.input if name]

        def call(*values: torch.Tensor) -> list[torch.Tensor]:
            feeds = {n: value.cpu().numpy() for n, value in zip(names, values, strict=True)}
            device = values[0].device if values else "cpu"
            outputs = evaluator.run(None, feeds)
            return [torch.from_numpy(np.array(output)).to(device) for output in outputs]

        return call

    def _program(self, inputs: Sequence[torch.Tensor]) -> tuple[list[Any], list[_Step], list[int]]:
        """Values at the start, steps, and places of the outputs, for inputs of these shapes."""
        constants = {name: self.get_buffer(buffer) for name, buffer in self._names.items()}
        values = {**constants, **dict(zip(self._inputs, inputs, strict=True))}
        last = {name: i for i, node in enumerate(self._nodes) for name in node.input}
        calls = []
        for i, node in enumerate(self._nodes):
            call, names, outputs = self._run(node, values, constants)
            values.update(outputs)
            if node.op_type == "Shape" or _is_fixed(node, constants):
                constants.update(outputs)
            else:
                calls.append((call, names, list(outputs)))
            for name in {*node.input, *node.output} - {"", *constants, *self._outputs}:
                if last.get(name, i) <= i:
                    values.pop(name, None)
        return _placed(self._inputs, self._outputs, constants, calls)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the stage.

        Args:
            inputs: In the stage's order.

        Returns:
            Its outputs in the stage's order.
        """
        key = (inputs[0].device, *(value.shape for value in inputs))
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._program(inputs)
        start, steps, outputs = program
        values = start.copy()
        values[: len(inputs)] = inputs
        for call, read, writes, dead in steps:
            result = call(*[values[place] for place in read])
            if len(writes) == 1:
                values[writes[0]] = result
            else:
                for place, value in zip(writes, result, strict=True):
                    values[place] = value
            for place in dead:
                values[place] = None
        return tuple(values[place] for place in outputs)


def _placed(
    inputs: Sequence[str],
    outputs: Sequence[str],
    constants: Mapping[str, torch.Tensor],
    calls: Sequence[tuple[Callable[..., Any], list[str], list[str]]],
) -> tuple[list[Any], list[_Step], list[int]]:
    """Give every tensor a place in a list: the inputs first, then the constants that are read."""
    used = {name for _, names, _ in calls for name in names} | set(outputs)
    places = {name: i for i, name in enumerate(inputs)}
    start: list[Any] = [None] * len(inputs)
    for name in constants.keys() & used:
        places[name] = len(start)
        start.append(constants[name])
    for _, _, written in calls:
        for name in written:
            places[name] = len(start)
            start.append(None)
    kept = {*outputs, *constants}
    seen: set[str] = set(kept)
    steps = []
    for call, names, written in reversed(calls):
        dead = {*names, *written} - seen
        seen |= dead
        steps.append(
            _Step(
                call,
                tuple(places[name] for name in names),
                tuple(places[name] for name in written),
                tuple(places[name] for name in dead),
            )
        )
    return start, steps[::-1], [places[name] for name in outputs]


def _load(stage: Stage, model: bytes) -> onnx.ModelProto:
    """The model without functions of its own, at an opset that `OPERATORS` know."""
    try:
        proto = onnx.load_model_from_string(model)
        onnx.checker.check_model(proto)
        proto = onnx.inliner.inline_local_functions(proto)
        if 0 < opset(proto) < _OPSET:
            proto = onnx.version_converter.convert_version(proto, _OPSET)
    except _ONNX_ERRORS as error:
        raise EngineBuildError(
            f"stage {stage.name!r}: PyTorch eager can't read its model: {_first_line(error)}"
        ) from error
    graph = proto.graph
    with _naming(stage, "its model"):
        if graph.sparse_initializer:
            raise Unsupported("sparse weights")
        weights = {tensor.name for tensor in graph.initializer}
        for what, specs, have in (
            ("inputs", stage.inputs, {value.name for value in graph.input} - weights),
            ("outputs", stage.outputs, {value.name for value in graph.output}),
        ):
            if have != {spec.name for spec in specs}:
                expected = ", ".join(sorted(spec.name for spec in specs))
                raise Unsupported(what, got=", ".join(sorted(have)), expected=expected)
    return proto


def _is_fixed(proto: onnx.NodeProto, constants: Mapping[str, Any]) -> bool:
    """Whether a node's outputs are the same in every call."""
    if subgraphs(proto) or proto.op_type.startswith("Random"):
        return False
    return constants.keys() >= reads(proto)


@contextlib.contextmanager
def _naming(stage: Stage, what: str) -> Iterator[None]:
    """Name the stage and its part that this baseline can't run.

    Raises:
        EngineBuildError: Instead of `Unsupported`, and of what torch raises.
    """
    refused = f"stage {stage.name!r}: PyTorch eager can't run {what}"
    try:
        yield
    except Unsupported as error:
        raise EngineBuildError(
            f"{refused}: {error.what}", got=error.got, expected=error.expected
        ) from error
    except _TORCH_ERRORS as error:
        raise EngineBuildError(
            f"{refused}: {type(error).__name__}: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
