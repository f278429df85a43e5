"""The stages that an exit needs as one ONNX model: the baseline "the model as one session"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    parts = stage_models(bundle, plan.stages, variants or {})
    return merge(cascade.image, parts, plan.steps[-1].exit.logits)


def stage_models(
    bundle: Bundle, stages: Sequence[Stage], variants: Mapping[str, str]
) -> list[tuple[Stage, bytes]]:
    """Stages with their models.

    Args:
        bundle: Where the models come from.
        stages: Some of its stages.
        variants: Stage name -> precision, for stages that are not taken at their first variant.

    Raises:
        ConfigError: There is no such variant.
    """
    return [
        (stage, bundle.stage_model(stage.name, bundle.precision(stage.name, variants)))
        for stage in stages
    ]


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
    stages = [stage for stage, _ in parts]
    joined = join(parts)
    single = any(spec.shape[0] == 1 for stage in stages for spec in stage.inputs)
    output = next(spec for stage in stages for spec in stage.outputs if spec.name == logits)
    merged = onnx.helper.make_graph(
        [], "one_piece", [value_info(_batch(image, single))], [value_info(_batch(output, single))]
    )
    for stage in stages:
        joined.append(stage, merged)
    return joined.finish(merged)


@dataclass(frozen=True)
class Joined:
    """Stages that fit into one model: their boundary tensors meet, and no other names do.

    Attributes:
        graphs: Stage name -> graph.
        opsets: Operator domain -> version.
        ir_version: Version of the file format.
    """

    graphs: Mapping[str, onnx.GraphProto]
    opsets: Mapping[str, int]
    ir_version: int

    def append(self, stage: Stage, graph: onnx.GraphProto) -> None:
        """Put the nodes and weights of a stage behind those of a graph."""
        own = self.graphs[stage.name]
        graph.node.extend(own.node)
        graph.initializer.extend(own.initializer)
        graph.sparse_initializer.extend(own.sparse_initializer)

    def finish(self, graph: onnx.GraphProto) -> bytes:
        """Make the model.

        Raises:
            EngineBuildError: The graph is not valid.
        """
        whole = onnx.helper.make_model(
            graph,
            producer_name="edge-runtime",
            ir_version=self.ir_version,
            opset_imports=[onnx.helper.make_opsetid(*item) for item in self.opsets.items()],
        )
        try:
            onnx.checker.check_model(whole)
        except (onnx.checker.ValidationError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise EngineBuildError(
                f"the stages make no valid model in one piece: {first}"
            ) from error
        data: bytes = whole.SerializeToString()
        return data


def join(parts: Sequence[tuple[Stage, bytes]], renamed: Mapping[str, str] | None = None) -> Joined:
    """Prepare stages for one model.

    Args:
        parts: Stages with their models, in order of execution.
        renamed: Names that no tensor may have -> what a boundary tensor of that name is called.

    Raises:
        EngineBuildError: The opsets differ.
    """
    models = [onnx.load_model_from_string(model) for _, model in parts]
    stages = [stage for stage, _ in parts]
    versions = _common_opsets(stages, models)
    taken = {*(renamed or {}), *(name for stage in stages for name in _boundary(stage))}
    graphs = {
        stage.name: _apart(
            stage, onnx.inliner.inline_local_functions(model).graph, taken, renamed or {}
        )
        for stage, model in zip(stages, models, strict=True)
    }
    return Joined(graphs, versions, max(model.ir_version for model in models))


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


def _apart(
    stage: Stage, graph: onnx.GraphProto, taken: set[str], renamed: Mapping[str, str]
) -> onnx.GraphProto:
    """The graph with a prefix on its inner names if one of them is taken; adds its names there."""
    names = {name: renamed.get(name, name) for name in _boundary(stage)}
    inner = _names(graph) - set(names)
    if not inner.isdisjoint(taken) or not renamed.keys().isdisjoint(names):
        graph = rename(graph, f"{stage.name}/", names)
        inner = _names(graph) - set(names.values())
    taken |= inner
    return graph


def _boundary(stage: Stage) -> set[str]:
    return {spec.name for spec in (*stage.inputs, *stage.outputs)}


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
