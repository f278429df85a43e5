"""A whole early-exit model as one ONNX graph in which every layer is an If: the baseline of EEVIT.

Nothing leaves such a graph early. Once an exit has answered, a fast-pass token at the end of the
sequence says so, and each later layer reads it and hands on its inputs instead of running. Branches
are traced by `torch.cond`. `engines.monolith` writes another baseline by hand, from the stages of a
bundle: there later layers stand inside the branch that is not taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_runtime.errors import ConfigError
from engines.eval_mode import evaluating
from engines.models.early_exit import EarlyExit, Highway
from engines.monolith import OUTPUTS
from engines.onnx_graph import strip_debug_info
from engines.onnx_package import onnx
from engines.split import split
from engines.torch_exporter import MODULE_ERRORS, silenced, torch_error

#: What the graph reads.
INPUTS = ("pixels", "thresholds")

#: Features with what says that an exit has answered, then the answer: logits and index of the exit.
_State = tuple[Tensor, ...]


def fast_pass_onnx(
    model: EarlyExit, thresholds: Sequence[float], example: Tensor, *, opset: int = 20
) -> bytes:
    """Export a model with its exits as one graph that decides by itself.

    An exit answers if its largest softmax probability reaches its threshold. What travels is as in
    the thesis where all layers hand on sequences of one shape, as those of a ViT do: the
    sequence with a fast-pass token, which each layer takes off and puts back. Other backbones
    carry a flag beside the features, and a layer that is passed over hands on zeros where its
    output has another shape than its input. The first layer runs without an If, since no exit can
    have answered before it.

    Args:
        model: Backbone and exits; it keeps its modes.
        thresholds: One per early exit, in order. They are the defaults of an input, so that one
            graph serves them all: 0 and less forces an exit, more than 1 rules it out.
        example: A valid input of the backbone, any batch, float.
        opset: ONNX operator set, 18 or later.

    Returns:
        An ONNX model for one image. Its inputs are `pixels`, shape (1, ...) as the example, and
        `thresholds`, shape (exits,), float32, which may be left out. Its outputs are `logits`,
        shape (1, classes), float32, of the exit that answered, and `exit`, shape (1,), int64, its
        index; the backbone's own answer comes after all exits.

    Raises:
        ConfigError: The model has no exits, there are more or fewer thresholds, one is not a
            float32 number, or the example is no batch of floats.
        EngineBuildError: The model fails on the example, or torch can't export it.
        BackendUnavailable: The onnx package is missing.

    Reference:
        Thesis, sections 5.2.2 and 5.2.5.
    """
    defaults = _defaults(model, thresholds)
    with evaluating(model), torch.no_grad():
        segments = split(model.backbone, example, model.layer_names, needed_only=False)
        weights = next(model.parameters())
        pixels = example.detach()[:1].to(weights.device, weights.dtype)
        try:
            network = _FastPass(*_layers(model, segments, pixels), len(model.heads)).eval()
            return _export(network, pixels, defaults, opset)
        except MODULE_ERRORS as error:
            cause = error.__cause__ or error
            raise torch_error("the fast pass can't be exported", cause) from error


def _export(network: nn.Module, pixels: Tensor, defaults: NDArray[np.float32], opset: int) -> bytes:
    arguments = (pixels, torch.from_numpy(defaults).to(pixels.device))
    with silenced("fast pass"):
        # Strictly: the default capture looks at each If alone, and takes axes that differ from
        # those of the one before for dynamic.
        captured = torch.export.export(network, arguments, strict=True)
        program = torch.onnx.export(
            captured,
            dynamo=True,
            input_names=INPUTS,
            output_names=OUTPUTS,
            opset_version=opset,
            external_data=False,
            verbose=False,
        )
    assert program is not None  # what dynamo=True promises
    made = program.model_proto
    strip_debug_info(made)
    made.graph.initializer.append(onnx.numpy_helper.from_array(defaults, INPUTS[1]))
    return cast("bytes", made.SerializeToString())


def _defaults(model: EarlyExit, thresholds: Sequence[float]) -> NDArray[np.float32]:
    if not len(model.heads):
        raise ConfigError("a fast pass needs exits", got="a model without any")
    if len(thresholds) != len(model.heads):
        raise ConfigError(
            "thresholds of a fast pass", got=len(thresholds), expected=f"{len(model.heads)}"
        )
    largest = float(np.finfo(np.float32).max)
    for label, threshold in zip(model.labels, thresholds, strict=True):
        if not (math.isfinite(threshold) and abs(threshold) <= largest):
            raise ConfigError(
                f"threshold of exit {label}",
                got=threshold,
                expected="a float32 number",
                remedy="Rule an exit out with a threshold above 1",
            )
    return np.asarray(thresholds, np.float32)


def _layers(
    model: EarlyExit, segments: Sequence[nn.Module], pixels: Tensor
) -> tuple[list[_Layer], nn.Module]:
    """The layers with their highways, and what follows on the last of them."""
    shapes = []
    feature = pixels
    for segment in segments[:-1]:
        feature = segment(feature)
        shapes.append(tuple(feature.shape))
    is_sequence = len(shapes[0]) == 3 and len(set(shapes)) == 1
    carrier: _Token | _Flag = _Token() if is_sequence else _Flag()
    position = {int(spec.layer): i for i, spec in enumerate(model.exits)}
    layers = []
    for i, (segment, shape) in enumerate(zip(segments[:-1], shapes, strict=True)):
        place = position.get(i)
        highway = None if place is None else _Highway(cast("Highway", model.heads[place]), place)
        layers.append(_Layer(segment, highway, carrier, shape, model.classes))
    return layers, segments[-1]


class _Token:
    """Says in a last token of the sequence whether an exit has answered."""

    def start(self, feature: Tensor) -> _State:
        return (torch.cat([feature, torch.zeros_like(feature[:, :1])], 1),)

    def fired(self, state: _State) -> Tensor:
        return state[0][:, -1].any()

    def feature(self, state: _State) -> Tensor:
        return state[0][:, :-1]

    def replace(self, state: _State, feature: Tensor) -> _State:
        return (torch.cat([feature, state[0][:, -1:]], 1), *state[1:])

    def set(self, state: _State, fired: Tensor) -> _State:
        # A copy, as in the thesis: what is exported may not write into what others read.
        sequence = state[0].clone()
        sequence[:, -1] = fired.to(sequence.dtype)
        return (sequence, *state[1:])


class _Flag:
    """Says in a tensor of its own, shape (1,), whether an exit has answered."""

    def start(self, feature: Tensor) -> _State:
        return feature, feature.new_zeros(1, dtype=torch.bool)

    def fired(self, state: _State) -> Tensor:
        return state[1].any()

    def feature(self, state: _State) -> Tensor:
        return state[0]

    def replace(self, state: _State, feature: Tensor) -> _State:
        return (feature, *state[1:])

    def set(self, state: _State, fired: Tensor) -> _State:
        return (state[0], fired, *state[2:])


class _Highway(nn.Module):
    """An exit and its index."""

    def __init__(self, highway: Highway, index: int) -> None:
        super().__init__()
        self.highway, self.index = highway, index


class _Layer(nn.Module):
    """A layer, and the exit behind it where there is one.

    Args:
        segment: The layer.
        exit_: Behind it.
        carrier: Of what travels.
        shape: Of the layer's output.
        classes: Number of logits.
    """

    def __init__(
        self,
        segment: nn.Module,
        exit_: _Highway | None,
        carrier: _Token | _Flag,
        shape: tuple[int, ...],
        classes: int,
    ) -> None:
        super().__init__()
        self.segment, self.exit = segment, exit_
        self.carrier, self.shape, self.classes = carrier, shape, classes

    def start(self, pixels: Tensor, thresholds: Tensor) -> _State:
        """Run as the first layer."""
        feature = self.segment(pixels)
        answer = torch.zeros(1, self.classes, device=feature.device)
        exit_ = torch.zeros(1, dtype=torch.int64, device=feature.device)
        return self._judge((*self.carrier.start(feature), answer, exit_), thresholds)

    def forward(self, state: _State, thresholds: Tensor) -> _State:
        """Run, or hand on where an exit has answered."""
        fired = self.carrier.fired(state)
        operands = (*state, thresholds)
        return cast("_State", tuple(torch.cond(fired, self._pass_on, self._run, operands)))

    def _run(self, *operands: Tensor) -> _State:
        *state, thresholds = operands
        feature = self.segment(self.carrier.feature(tuple(state)))
        made = self._judge(self.carrier.replace(tuple(state), feature), thresholds)
        # What a branch hands out may not be what it was given.
        return tuple(o.clone() if any(o is s for s in state) else o for o in made)

    def _pass_on(self, *operands: Tensor) -> _State:
        feature, *others = (tensor.clone() for tensor in operands[:-1])
        if self.carrier.feature((feature, *others)).shape != self.shape:
            feature = feature.new_zeros(self.shape)
        return feature, *others

    def _judge(self, state: _State, thresholds: Tensor) -> _State:
        if self.exit is None:
            return state
        index = self.exit.index
        logits = self.exit.highway(self.carrier.feature(state)).float()
        fired = logits.softmax(-1).amax(-1) >= thresholds[index]
        exit_ = torch.full((1,), index, dtype=torch.int64, device=logits.device)
        return (*self.carrier.set(state, fired)[:-2], logits, exit_)


class _FastPass(nn.Module):
    """The layers, and the backbone's own answer where no exit has given one."""

    def __init__(self, layers: Sequence[_Layer], classifier: nn.Module, exits: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.classifier, self.exits = classifier, exits
        self.carrier = layers[-1].carrier

    def forward(self, pixels: Tensor, thresholds: Tensor) -> _State:
        first, *others = self.layers
        state = cast("_Layer", first).start(pixels, thresholds)
        for layer in others:
            state = layer(state, thresholds)
        fired = self.carrier.fired(state)
        return cast("_State", tuple(torch.cond(fired, _answer, self._classify, state)))

    def _classify(self, *state: Tensor) -> _State:
        logits = self.classifier(self.carrier.feature(state)).float()
        return logits, torch.full((1,), self.exits, dtype=torch.int64, device=logits.device)


def _answer(*state: Tensor) -> _State:
    return state[-2].clone(), state[-1].clone()
