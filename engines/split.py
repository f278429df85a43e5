"""Splits a torch model into segments, one after another, at the outputs of named modules.

The model is exported as a graph and cut there: its own code needs no change, whatever its forward
does between the modules. A model can be cut where one tensor carries everything that comes after:
at the end of a block, but not inside of one that adds its input to its output.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edge_runtime.errors import ConfigError, EdgeRuntimeError, EngineBuildError
from edge_runtime.schema import nearest
from engines.eval_mode import evaluating
from engines.graph_cut import CutGraph
from engines.torch_exporter import MODULE_ERRORS, torch_error
from engines.verify import TOLERANCE

#: Two samples are traced (one would be folded into the graph); three show whatever took the traced
#: batch for a constant.
_TRACED, _CHECKED = 2, (2, 3)
_NUMBERED = re.compile(r"(.*[._])?\d+")


class Taps(nn.Module):
    """A model that gives the outputs of some of its modules besides its own; trainable.

    A tapped tensor is a copy, so that no later operation of the model writes into it.

    Args:
        model: The model; it is not changed.
        names: Modules of it, as in `model.named_modules()`.

    Raises:
        ConfigError: A name is unknown, or names what another one names.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        _modules(model, names)
        self.model = model
        self.names = tuple(names)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run the model.

        Args:
            x: Its input, first axis the batch.

        Returns:
            The output of each named module in the order of the names, then the model's own.

        Raises:
            ConfigError: A named module runs more than once or not at all, or it or the model
                returns something else than one tensor.
        """
        outputs: dict[str, Tensor] = {}

        def keep(name: str, output: Any) -> None:
            _check_output(f"module {name!r}", output)
            outputs[name] = output.clone()

        with _watch(self.model, self.names, keep):
            final = self.model(x)
        _check_output("the model", final)
        return (*(outputs[name] for name in self.names), final)


def layers(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Find the layers of a model: the places to cut it at.

    A layer is a module with a number as the last part of its name (after a dot or an underscore)
    and children of its own, whose output separates the model: no other tensor that depends on the
    image is read after it. Of modules inside each other the deepest count, where all of their kind
    (the names that differ in numbers only) are separators.

    Args:
        model: The model.
        example: Its input, float, first axis the batch, of any size.

    Returns:
        Names in order of execution, without one that gives the model's own output; none where the
        model has no such module.

    Raises:
        ConfigError: The example is not a batch of floats, or the model returns no tensor.
        EngineBuildError: The model fails on it, or torch can't export it with a dynamic batch.
    """
    with _evaluation(model):
        return _Traced(model, _samples(model, example), ()).layers()


def split(
    model: nn.Module, example: Tensor, at: Sequence[str], *, needed_only: bool = True
) -> list[nn.Module]:
    """Split a model into segments that compute, one after another, what it computes.

    A classifier that reads one token of a transformer has the last block compute the others for
    nothing. That is left out of the last segment, see `engines.needed_tokens`.

    Args:
        model: The model; it keeps its modes.
        example: Its input, float, first axis the batch, of any size.
        at: Names of modules, in order of execution: a segment ends with the output of each, a last
            one with the model's own.
        needed_only: Whether to leave out what is computed for tokens that nothing reads.

    Returns:
        `len(at) + 1` modules in eval mode, each of one tensor (batch, ...) -> one tensor
        (batch, ...), for any batch; their parameters and buffers are the model's own. Compared with
        the model on batches of two and of three.

    Raises:
        ConfigError: A name is unknown, given twice or out of order; its module does not run exactly
            once, gives no tensor, or gives one that does not carry everything that is needed later.
        EngineBuildError: The model fails, torch can't export it with a dynamic batch, or the
            segments differ from it.
    """
    _modules(model, at)
    with _evaluation(model):
        samples = _samples(model, example)
        traced = _Traced(model, samples, at)
        segments = traced.segments(needed_only)
        for count in _CHECKED:
            _compare(segments, Taps(model, at), at, samples[:count])
    return segments


def equal_macs(
    model: nn.Module, example: Tensor, count: int, among: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Choose the cuts that come nearest to segments of equal cost.

    Args:
        model: The model.
        example: Its input, float, first axis the batch, of any size.
        count: Number of cuts; the segments are one more.
        among: Names to choose from, None for `layers`.

    Returns:
        `count` names in order of execution, those whose distances in MACs from the equal shares
        have the smallest sum.

    Raises:
        ConfigError: Fewer than one cut or more than there are names, or what `macs_until` refuses.
        EngineBuildError: The model fails, or torch can't export it.
    """
    names = tuple(among) if among is not None else layers(model, example)
    if not 1 <= count <= len(names):
        raise ConfigError(
            "count of cuts",
            got=count,
            expected=f"1 to {len(names)}, the number of layers" if names else "a model with layers",
            remedy=None if names else "Name the modules to choose from: `among`",
        )
    *until, total = macs_until(model, example, names)
    places = sorted(zip(until, names, strict=True), key=lambda place: place[0])
    # best[k]: the smallest sum with the last of k cuts at or before the place that was seen last.
    best: list[tuple[float, tuple[str, ...]]] = [(0.0, ()), *[(math.inf, ())] * count]
    for macs, name in places:
        for k in range(count, 0, -1):
            cost, chosen = best[k - 1]
            cost += abs(macs - total * k / (count + 1))
            if cost < best[k][0]:
                best[k] = (cost, (*chosen, name))
    return best[count][1]


def macs_until(model: nn.Module, example: Tensor, names: Sequence[str]) -> tuple[int, ...]:
    """Count multiply-accumulate operations up to places in a model, for one sample.

    Counted are convolutions and matrix products, those of attention included.

    Args:
        model: The model.
        example: Its input, float, first axis the batch, of any size.
        names: Modules of it.

    Returns:
        What has been computed when each named module is done, then what the whole model takes.

    Raises:
        ConfigError: A name is unknown, names what another one names, or its module does not run
            exactly once.
        EngineBuildError: The model fails.
    """
    until: dict[str, int] = {}
    # Of attention as one operation the counter knows the kernels for CUDA only.
    with (
        _evaluation(model),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        note = functools.partial(_note_macs, counter, until)
        with _watch(model, names, note):
            _run(model, _samples(model, example)[:1])
    return (*(until[name] for name in names), counter.get_total_flops() // 2)


def _note_macs(counter: FlopCounterMode, until: dict[str, int], name: str, _output: Any) -> None:
    until[name] = counter.get_total_flops() // 2


class _Traced:
    """A model's graph with the modules at which it might be cut.

    Args:
        model: In eval mode.
        samples: Its input.
        at: The modules at which it is to be cut.
    """

    def __init__(self, model: nn.Module, samples: Tensor, at: Sequence[str]) -> None:
        _run(Taps(model, at), samples[:_TRACED])
        order = _candidates(model, samples[:_TRACED])
        self._candidates = tuple(order)
        self._at = tuple(at)
        names = tuple(dict.fromkeys((*at, *order)))
        _forget(model)
        try:
            self._graph = CutGraph(Taps(model, names), samples[:_TRACED])
        except EdgeRuntimeError:
            raise
        except MODULE_ERRORS as error:
            remedy = "Take the batch from tensor.shape[0], and turn no tensor into Python values"
            raise torch_error("the model can't be exported", error, remedy) from error
        finally:
            _forget(model)
        *copies, self._final = self._graph.outputs
        taps = [copied.all_input_nodes[0] for copied in copies]
        self._nodes: dict[str, fx.Node] = dict(zip(names, taps, strict=True))

    def layers(self) -> tuple[str, ...]:
        """As the function of this name."""
        separators = [name for name in self._candidates if self._is_cut(self._nodes[name])]
        whole = {_kind(name) for name in self._candidates}
        whole -= {_kind(name) for name in self._candidates if name not in separators}
        found: dict[fx.Node, str] = {}
        for name in separators:
            inside = [other for other in separators if other.startswith(f"{name}.")]
            around = [other for other in separators if name.startswith(f"{other}.")]
            if any(_kind(other) in whole for other in inside):
                continue
            if not around or _kind(name) in whole:
                found.setdefault(self._nodes[name], name)
        return tuple(found[node] for node in sorted(found, key=self._graph.position))

    def segments(self, needed_only: bool) -> list[nn.Module]:
        """One per cut, and the last."""
        start, before = self._graph.image, ""
        segments: list[nn.Module] = []
        for name in self._at:
            end = self._nodes[name]
            self._check_cut(name)
            if self._graph.position(end) <= self._graph.position(start):
                raise ConfigError(
                    f"cut after {name!r}: it does not come later than the cut after {before!r}",
                    remedy="List the modules in order of execution, each place once",
                )
            segments.append(self._graph.segment(start, end))
            start, before = end, name
        segments.append(self._graph.segment(start, self._final, needed_only=needed_only))
        return segments

    def _is_cut(self, node: fx.Node) -> bool:
        inner = node is not self._graph.image and node is not self._final
        return inner and self._graph.separates(node) and self._graph.is_batch(node)

    def _check_cut(self, name: str) -> None:
        node = self._nodes[name]
        if self._is_cut(node):
            return
        if node is self._graph.image or node is self._final:
            end = "input" if node is self._graph.image else "output"
            why = f"its output is the model's own {end}, which leaves a segment without work"
        elif not self._graph.is_batch(node):
            why = "its output is no tensor that has the batch as its first axis"
        else:
            why = "its output doesn't carry everything: what comes later reads other tensors too"
        raise ConfigError(f"cut after {name!r}: {why}", remedy=self._near(node))

    def _near(self, node: fx.Node) -> str:
        """The layers just before and just after a place."""
        place = self._graph.position(node)
        places = [(self._graph.position(self._nodes[name]), name) for name in self.layers()]
        near = [name for position, name in places if position <= place][-1:]
        near += [name for position, name in places if position > place][:1]
        which = " or ".join(map(repr, near)) or "the model has none that is found by its name"
        return f"Cut after a whole block; the nearest: {which}"


def _kind(name: str) -> str:
    """The name without its numbers."""
    return re.sub(r"\d+", "#", name)


def _candidates(model: nn.Module, samples: Tensor) -> list[str]:
    """Numbered modules with children that run exactly once and return a tensor, as they end."""
    outputs: dict[str, list[Any]] = {
        name: []
        for name, module in model.named_modules()
        if _NUMBERED.fullmatch(name) and any(True for _ in module.children())
    }
    order: list[str] = []

    def note(name: str, output: Any) -> None:
        outputs[name].append(output)
        order.append(name)

    with _hooks({name: model.get_submodule(name) for name in outputs}, note):
        _run(model, samples)
    return [n for n in order if len(outputs[n]) == 1 and isinstance(outputs[n][0], Tensor)]


def _modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The named modules."""
    if isinstance(names, str):
        raise ConfigError("names of modules", got=f"one text, {names!r}", expected="a list of them")
    known = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    found: dict[str, nn.Module] = {}
    for name in names:
        if name not in known:
            raise ConfigError(f"the model has no module {name!r}", remedy=nearest(str(name), known))
        if name in found:
            raise ConfigError(f"module {name!r} is named twice")
        for other, module in found.items():
            if module is known[name]:
                raise ConfigError(f"{other!r} and {name!r} are names of one and the same module")
        found[name] = known[name]
    return found


@contextlib.contextmanager
def _watch(
    model: nn.Module, names: Sequence[str], note: Callable[[str, Any], None]
) -> Iterator[None]:
    """Note the output of each named module, each of which must run once before this ends."""
    seen: set[str] = set()

    def once(name: str, output: Any) -> None:
        if name in seen:
            raise ConfigError(
                f"module {name!r} runs more than once per image",
                remedy="Name one that runs once, such as the block around it",
            )
        seen.add(name)
        note(name, output)

    with _hooks(_modules(model, names), once):
        yield
    for name in names:
        if name not in seen:
            raise ConfigError(
                f"module {name!r} is not run: the model does not call it",
                remedy="Name a module that the model calls",
            )


@contextlib.contextmanager
def _hooks(modules: dict[str, nn.Module], note: Callable[[str, Any], None]) -> Iterator[None]:
    def hook(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        note(name, output)

    handles = [
        module.register_forward_hook(functools.partial(hook, name))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; each submodule gets its own mode back.

    Without torch's fused attention for this case too: no exporter and no counter knows it.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with evaluating(model), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _forget(model: nn.Module) -> None:
    """Have it compute anew what some models keep, in eval mode, of what weights give.

    Such a tensor would be a copy of weights in the graph, or the graph's tensor in the model.
    """
    model.train()
    model.eval()


def _run(module: nn.Module, samples: Tensor) -> Any:
    try:
        return module(samples)
    except EdgeRuntimeError:
        raise
    except MODULE_ERRORS as error:
        raise torch_error(f"the model failed on shape {tuple(samples.shape)}", error) from error


def _check_output(what: str, output: Any) -> None:
    if not isinstance(output, Tensor):
        raise ConfigError(f"{what} returns", got=type(output).__name__, expected="one tensor")


def _samples(model: nn.Module, example: Tensor) -> Tensor:
    """Enough samples: those given, then others that have the values in new places."""
    if not isinstance(example, Tensor) or not example.is_floating_point():
        got = str(example.dtype) if isinstance(example, Tensor) else type(example).__name__
        raise ConfigError("example", got=got, expected="a tensor of floats")
    if example.ndim < 2 or not example.shape[0]:
        raise ConfigError(
            "example", got=f"shape {tuple(example.shape)}", expected="a batch of samples"
        )
    given = example.detach()[: max(_CHECKED)]
    generator = torch.Generator().manual_seed(0)
    order = [
        torch.randperm(given[0].numel(), generator=generator).to(given.device)
        for _ in range(max(_CHECKED) - len(given))
    ]
    more = [given[0].flatten()[places].reshape(given[:1].shape) for places in order]
    device = next((tensor.device for tensor in model.parameters()), given.device)
    return torch.cat([given, *more]).to(device)


def _compare(segments: list[nn.Module], taps: Taps, at: Sequence[str], samples: Tensor) -> None:
    have = samples
    for name, segment, want in zip((*at, ""), segments, taps(samples.clone()), strict=True):
        have = _run(segment, have)
        error = _relative_error(have, want)
        if not error <= TOLERANCE:
            raise EngineBuildError(
                f"split: for a batch of {len(samples)} the segments give for "
                + (f"the output of {name!r}" if name else "the model's output"),
                got=f"a relative error of {error:.3g}",
                expected=f"<= {TOLERANCE:g}",
            )


def _relative_error(have: Tensor, want: Tensor) -> float:
    if have.shape != want.shape:
        return math.inf
    difference = float((have.double() - want.double()).abs().max())
    magnitude = float(want.double().abs().max())
    return difference / magnitude if magnitude else difference and math.inf
