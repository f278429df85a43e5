"""The stages that an exit needs as one ONNX model: the baseline "the model as one session"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_runtime.cascade import Stage
from edge_runtime.errors import ConfigError, EngineBuildError
from edge_runtime.manifest import Bundle
from edge_runtime.schema import nearest
from edge_runtime.tensors import TensorSpec
from engines.onnx_graph import opsets, rename, subgraphs, value_info
from engines.onnx_package import onnx


def one_piece(bundle: Bundle, exit_name: str, variants: Mapping[str, str] | None = None) -> bytes:
    """Merge the stages that one exit needs.

    Args:
        bundle: Where the stages come from.
        exit_name: The exit; other exits' heads are left out.
        variants: Stage name -> precision, for stages that are not taken at their first variant.

    Returns:
        An ONNX model: the cascade's image in, the exit's logits out.

    Raises:
        ConfigError: There is no such exit or variant.
        EngineBuildError: The stages can't be merged: their opsets differ.
        BackendUnavailable: The onnx package is missing.
    """
    cascade = bundle.cascade
    names = [exit_.name for exit_ in cascade.exits]
    if exit_name not in names:
        raise ConfigError(f"the bundle has no exit {exit_name!r}", remedy=nearest(exit_name, names))
    plan = cascade.plan([names.index(exit_name)])
    parts = [
        (stage, bundle.stage_model(stage.name, bundle.precision(stage.name, variants or {})))
        for stage in plan.stages
    ]
    return merge(cascade.image, parts, plan.steps[-1].exit.logits)


def merge(image: TensorSpec, parts: Sequence[tuple[Stage, bytes]], logits: str) -> bytes:
    """Merge stages into one model.

    The library's `onnx.compose.merge_models` joins two models, each tensor to one reader; here two
    stages may read the same tensor or the image, so the nodes are put behind each other.

    Args:
        image: Spec of the input. Its batch axis becomes 1 if a stage takes one sample at a time.
        parts: Stages with their models, in order of execution.
        logits: Name of the output.

    Raises:
        EngineBuildError: The opsets differ, or the parts make no valid model.
    """
    models = [onnx.load_model_from_string(model) for _, model in parts]
    stages = [stage for stage, _ in parts]
    versions = _common_opsets(stages, models)
    single = any(spec.shape[0] == 1 for stage in stages for spec in stage.inputs)
    output = next(spec for stage in stages for spec in stage.outputs if spec.name == logits)
    merged = onnx.helper.make_graph(
        [], "one_piece", [value_info(_batch(image, single))], [value_info(_batch(output, single))]
    )
    taken: set[str] = set()
    for stage, model in zip(stages, models, strict=True):
        graph = _apart(stage, onnx.inliner.inline_local_functions(model).graph, taken)
        merged.node.extend(graph.node)
        merged.initializer.extend(graph.initializer)
        merged.sparse_initializer.extend(graph.sparse_initializer)
    whole = onnx.helper.make_model(
        merged,
        producer_name="edge-runtime",
        ir_version=max(model.ir_version for model in models),
        opset_imports=[onnx.helper.make_opsetid(*item) for item in versions.items()],
    )
    try:
        onnx.checker.check_model(whole)
    except (onnx.checker.ValidationError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise EngineBuildError(f"the stages make no valid model in one piece: {first}") from error
    data: bytes = whole.SerializeToString()
    return data


def _common_opsets(stages: Sequence[Stage], models: Sequence[onnx.ModelProto]) -> dict[str, int]:
    versions: dict[str, int] = {}
    users: dict[str, str] = {}
    for stage, model in zip(stages, models, strict=True):
        for domain, version in opsets(model).items():
            if versions.setdefault(domain, version) != version:
                raise EngineBuildError(
                    f"stages {users[domain]!r} and {stage.name!r} can't be merged: their opsets "
                    f"of {domain or 'ai.onnx'} differ",
                    got=f"{versions[domain]} and {version}",
                    expected="one opset",
                    remedy="Convert one with onnx.version_converter.convert_version and export "
                    "again",
                )
            users.setdefault(domain, stage.name)
    return versions


def _apart(stage: Stage, graph: onnx.GraphProto, taken: set[str]) -> onnx.GraphProto:
    """The graph with a prefix on its inner names if one of them is taken; adds its names there."""
    boundary = {spec.name for spec in (*stage.inputs, *stage.outputs)}
    inner = _names(graph) - boundary
    if not inner.isdisjoint(taken):
        graph = rename(graph, f"{stage.name}/", {name: name for name in boundary})
        inner = _names(graph) - boundary
    taken |= inner | boundary
    return graph


def _names(graph: onnx.GraphProto) -> set[str]:
    """Names of tensors and nodes, of subgraphs too."""
    names = {tensor.name for tensor in graph.initializer}
    names |= {tensor.values.name for tensor in graph.sparse_initializer}
    for node in graph.node:
        names.update(node.output)
        names.add(node.name)
        for inner in subgraphs(node):
            names |= _names(inner)
    return names - {""}


def _batch(spec: TensorSpec, single: bool) -> TensorSpec:
    return TensorSpec(spec.name, (1, *spec.shape[1:]), spec.dtype) if single else spec
