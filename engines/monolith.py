"""A whole cascade as one ONNX model that decides by itself: the baseline "If nodes in the graph".

Each early exit is an If. Its then-branch hands out the exit's logits; its else-branch holds the
stages up to the next exit, and that exit's If. Branches read what was computed outside of them by
name. `engines.fast_pass` exports the other baseline, from torch, in which every layer is an If.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.cascade import Plan, Step
from edge_runtime.confidence import Metric
from edge_runtime.errors import ConfigError, EngineBuildError
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.policy import Never, Threshold
from edge_runtime.tensors import TensorSpec
from engines.one_piece import Joined, join, stage_models
from engines.onnx_graph import value_info
from engines.onnx_package import onnx

#: What the model hands out.
OUTPUTS = ("logits", "exit")

#: The first opset that has GreaterOrEqual.
_MIN_OPSET = 12


def if_model(
    bundle: Bundle, point: OperatingPoint, variants: Mapping[str, str] | None = None
) -> bytes:
    """Make one model of a bundle at an operating point.

    It takes one image: an If has one condition, so the batch axis of input and outputs is 1. It
    decides as the scheduler does, by the point's metric, temperatures and thresholds in float32,
    to the rounding of other kernels. Stages that the point does not reach are left out. Nothing
    checks that logits are finite: an exit with NaN is not confident.

    Args:
        bundle: Where the stages come from.
        point: Policy "threshold"; or "never", which makes a model without an If.
        variants: Stage name -> precision, for stages that are not taken as the point has them.
            TensorRT needs a variant of its own of preprocessing stages, see
            `edge_runtime.backends.tensorrt.keys.precision_of`.

    Returns:
        An ONNX model. Its input is the cascade's image, shape (1, ...). Its outputs are `logits`,
        shape (1, classes), float32, of the exit that answered, and `exit`, shape (1,), int64, its
        index among the exits that the point evaluates.

    Raises:
        ConfigError: The point has another policy, or names an exit, stage or variant that the
            bundle lacks.
        EngineBuildError: The stages can't be merged: their opsets differ, or are too old.
        BackendUnavailable: The onnx package is missing.
    """
    cascade = bundle.cascade
    policy = point.policy_for(cascade)
    if not isinstance(policy, (Threshold, Never)):
        raise ConfigError(
            f"operating point {point.name!r}: policy of a model with If nodes",
            got=repr(point.policy),
            expected="threshold or never",
        )
    chosen = {**point.variants, **(variants or {})}
    for name in chosen:
        bundle.precision(name, chosen)
    plan = cascade.plan(policy.evaluated(len(cascade.exits)))
    renamed = {name: f"boundary/{name}" for name in OUTPUTS}
    joined = join(stage_models(bundle, plan.stages, chosen), renamed)
    opset = joined.opsets.get("", 0)
    if len(plan.steps) > 1 and opset < _MIN_OPSET:
        raise EngineBuildError(
            "stages of a model with If nodes",
            got=f"opset {opset}",
            expected=f"opset {_MIN_OPSET} or later",
            remedy="Convert them with onnx.version_converter.convert_version and export again",
        )
    return _Writer(bundle, point, plan, joined, renamed).model()


class _Writer:
    """Writes the model, step by step."""

    def __init__(
        self,
        bundle: Bundle,
        point: OperatingPoint,
        plan: Plan,
        joined: Joined,
        renamed: Mapping[str, str],
    ) -> None:
        self._point = point
        self._plan = plan
        self._joined = joined
        self._renamed = renamed
        self._classes = len(bundle.cascade.classes)
        self._specs = {spec.name: spec for stage in plan.stages for spec in stage.outputs}

    def model(self) -> bytes:
        image = self._plan.image
        name = self._renamed.get(image.name, image.name)
        graph = self._graph("cascade", OUTPUTS)
        graph.input.append(value_info(TensorSpec(name, (1, *image.shape[1:]), image.dtype)))
        self._write(_Part(graph, self._plan.steps[0]), 0)
        return self._joined.finish(graph)

    def _graph(self, name: str, outputs: Sequence[str]) -> onnx.GraphProto:
        logits, position = outputs
        specs = [TensorSpec(logits, (1, self._classes), "float32")]
        specs.append(TensorSpec(position, (1,), "int64"))
        return onnx.helper.make_graph([], name, [], [value_info(spec) for spec in specs])

    def _write(self, part: _Part, index: int) -> None:
        """Append the stages of a step, the exit's decision, and what follows from it."""
        step = part.step
        for stage in step.stages:
            self._joined.append(stage, part.graph)
        logits = self._renamed.get(step.exit.logits, step.exit.logits)
        if self._specs[step.exit.logits].dtype != "float32":
            logits = part.add("Cast", [logits], to=onnx.TensorProto.FLOAT)
        if index + 1 == len(self._plan.steps):
            _answer(part, logits, index)
            return
        leaves = self._leaves(part, logits)
        leave = _Part(self._graph("leave", [part.name(f"answer/{o}") for o in OUTPUTS]), step)
        _answer(leave, logits, index)
        following = self._plan.steps[index + 1]
        go_on = _Part(self._graph("go on", [part.name(f"later/{o}") for o in OUTPUTS]), following)
        self._write(go_on, index + 1)
        part.add("If", [leaves], part.outputs, then_branch=leave.graph, else_branch=go_on.graph)

    def _leaves(self, part: _Part, logits: str) -> str:
        """Whether the signal reaches the exit's threshold: a bool without axes."""
        name = part.step.exit.name
        temperature = self._point.temperatures.get(name, 1.0)
        if temperature != 1.0:
            divisor = part.constant("temperature", np.array(temperature, np.float32))
            logits = part.add("Div", [logits, divisor])
        signal = _signal(part, logits, self._point.metric)
        threshold = np.array(self._point.thresholds[name], np.float32)
        return part.add("GreaterOrEqual", [signal, part.constant("threshold", threshold)])


class _Part:
    """The main graph or a branch, to which the decision of one exit is appended."""

    def __init__(self, graph: onnx.GraphProto, step: Step) -> None:
        self.graph = graph
        self.step = step

    @property
    def outputs(self) -> list[str]:
        return [value.name for value in self.graph.output]

    def name(self, what: str) -> str:
        # A stage can't have a colon in its name, so no prefix of a stage's tensors is like this.
        return f"exit:{self.step.exit.name}/{what}"

    def add(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str] = (), **attributes: Any
    ) -> str:
        """Append a node, which is named after its operator; returns its first output."""
        name = self.name(operator)
        node = onnx.helper.make_node(operator, inputs, outputs or [name], name, **attributes)
        self.graph.node.append(node)
        return str(node.output[0])

    def constant(self, what: str, values: NDArray[Any]) -> str:
        self.graph.initializer.append(onnx.numpy_helper.from_array(values, self.name(what)))
        return self.name(what)


def _answer(part: _Part, logits: str, index: int) -> None:
    """Hand out an exit's logits and its index."""
    out, position = part.outputs
    part.add("Identity", [logits], [out])
    value = onnx.numpy_helper.from_array(np.array([index], np.int64))
    part.add("Constant", [], [position], value=value)


def _signal(part: _Part, logits: str, metric: Metric) -> str:
    """The confidence of one sample, without axes; the operators are alike in every opset."""
    if metric == "entropy":
        logarithms = part.add("LogSoftmax", [logits], axis=1)
        probabilities = part.add("Exp", [logarithms])
        return _reduced(part, "ReduceSum", part.add("Mul", [probabilities, logarithms]))
    values = logits if metric == "logits_margin" else part.add("Softmax", [logits], axis=1)
    if metric == "max_softmax":
        return _reduced(part, "ReduceMax", values)
    two = part.constant("two", np.array([2], np.int64))
    top = part.name("top")
    part.add("TopK", [values, two], [top, part.name("top_classes")], axis=1)
    signs = part.constant("signs", np.array([[1, -1]], np.float32))
    return _reduced(part, "ReduceSum", part.add("Mul", [top, signs]))


def _reduced(part: _Part, operator: str, values: str) -> str:
    return part.add(operator, [values], keepdims=0)
