"""A bundle's stages as torch modules that run eagerly: the baseline "PyTorch eager".

A stage's nodes are called one after another, each as the function of torch that a model's author
would have written, with nothing fused. What depends on weights alone is worked out when a module is
made, and what depends on shapes alone at the first call with inputs of these shapes: the sizes
behind a Reshape are plain numbers in a model's own code too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from edge_runtime.backends.torch import TorchBackend
from edge_runtime.cascade import Stage
from edge_runtime.errors import EngineBuildError, missing_package
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.scheduler import Scheduler
from engines.onnx_graph import opset, reads
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
        proto = _load(stage.name, model)
        self._inputs = [spec.name for spec in stage.inputs]
        self._outputs = [spec.name for spec in stage.outputs]
        self._programs: dict[tuple[Any, ...], tuple[list[Any], list[_Step], list[int]]] = {}
        constants = {}
        for tensor in proto.graph.initializer:
            try:
                constants[tensor.name] = tensor_of(tensor)
            except Unsupported as error:
                raise _refusal(stage.name, f"weight {tensor.name!r}", error) from error
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
            _check_known(self._stage.name, node)
            if constants.keys() >= reads(node):
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
        where = f"node {proto.name or proto.output[0]!r}"
        try:
            node = Node(proto, values, constants)
            call = OPERATORS[proto.op_type](node)
            names = [name for i, name in enumerate(proto.input) if name and i not in node.taken]
            result = call(*(values[name] for name in names))
            found = list(result) if isinstance(result, tuple | list) else [result]
            if len(found) != len(proto.output):
                raise Unsupported("outputs", got=len(proto.output), expected=len(found))
        except Unsupported as error:
            raise _refusal(self._stage.name, where, error, proto.op_type) from error
        except _TORCH_ERRORS as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise _refusal(
                self._stage.name,
                where,
                Unsupported(f"torch says: {type(error).__name__}: {first}"),
                proto.op_type,
            ) from error
        return call, names, dict(zip(proto.output, found, strict=True))

    def _program(self, inputs: Sequence[torch.Tensor]) -> tuple[list[Any], list[_Step], list[int]]:
        """Values at the start, steps, and places of the outputs, for inputs of these shapes."""
        constants = {name: self.get_buffer(buffer) for name, buffer in self._names.items()}
        values = {**constants, **dict(zip(self._inputs, inputs, strict=True))}
        last = {name: i for i, node in enumerate(self._nodes) for name in node.input}
        calls = []
        for i, node in enumerate(self._nodes):
            call, names, outputs = self._run(node, values, constants)
            values.update(outputs)
            if node.op_type == "Shape" or constants.keys() >= reads(node):
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


def _load(stage: str, model: bytes) -> onnx.ModelProto:
    """The model without functions of its own, at an opset that `OPERATORS` know."""
    try:
        proto = onnx.load_model_from_string(model)
        onnx.checker.check_model(proto)
        proto = onnx.inliner.inline_local_functions(proto)
        if 0 < opset(proto) < _OPSET:
            proto = onnx.version_converter.convert_version(proto, _OPSET)
    except _ONNX_ERRORS as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise EngineBuildError(
            f"stage {stage!r}: the baseline PyTorch eager can't read its model: {first}"
        ) from error
    if proto.graph.sparse_initializer:
        raise _refusal(stage, "the model", Unsupported("sparse weights"))
    return proto


def _check_known(stage: str, node: onnx.NodeProto) -> None:
    domain = "" if node.domain == "ai.onnx" else node.domain
    if domain or node.op_type not in OPERATORS:
        full = f"{domain}.{node.op_type}" if domain else node.op_type
        where = f"node {node.name or node.output[0]!r}"
        raise _refusal(stage, where, Unsupported("there is no call of torch for it"), full)


def _refusal(
    stage: str, where: str, error: Unsupported, operator: str | None = None
) -> EngineBuildError:
    """The error for what this baseline can't run."""
    what = f" ({operator})" if operator else ""
    return EngineBuildError(
        f"stage {stage!r}: {where}{what}: the baseline PyTorch eager can't run it: {error.what}",
        got=error.got,
        expected=error.expected,
    )
