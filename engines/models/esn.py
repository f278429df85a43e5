"""The Exit Sequence Network: exits that correct a saver's answer as the backbone goes deeper.

Each backbone segment gives one token, the saver the first. A causal transformer decoder runs over
the sequence, and a single-layer head per segment predicts a difference to the saver's logits. In a
bundle each exit is a stage of its own that adds one token to a cache of keys and values; nothing
is computed twice.

Reference:
    Wang et al., TinySaver (papers/tinysaver_appendix.txt), sections 6.3 and 6.4, Fig. 7, Eq. 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edge_runtime.cascade import Exit
from edge_runtime.errors import ConfigError

if TYPE_CHECKING:
    from engines.export import TorchStage
    from engines.models.features import Layout

#: Width of the hidden layer of a block's MLP, in widths of a token. The paper gives none.
_MLP = 4

#: Score of what must not be seen: its softmax is 0, and unlike -inf it converts to FP16.
_NEVER = -1e4

NO_EXITS = "an exit sequence network needs exits of the base to hang its tokens on"
_ADD_EXITS = "Give the base at least one exit before its last layer"


class Esn(nn.Module):
    """Exits that predict differences to a saver's logits.

    Where the paper leaves a choice, or we deviate from it:

    * The saver's token is a linear of its *logits*, not of its features, so that every saver fits,
      a plain ONNX file too.
    * Of a feature of tokens the patch tokens are averaged, and the class token, if there is one,
      is put beside the average; a feature map is averaged over its places.
    * Every position has a linear of its own, whose bias is the learned position embedding.
    * A layer norm stands before the heads, as always behind pre-norm blocks.
    * With no layers there is no sequence: a token of the segment's own feature corrects the saver.

    The last segment needs no exit here: the base's own logits answer behind it. Saver and base stay
    frozen while this is trained, which is the training's business.

    Args:
        layouts: Layout of the feature behind each segment, in order of execution; those of a base
            are `EarlyExit.layouts`.
        classes: Length of the logits.
        layers: Blocks of the decoder, >= 0; the paper tries 0 to 3.
        width: Numbers per token; the paper tries 8, 32, 128 and 512.
        heads: Attention heads of a block; they divide the width.

    Attributes:
        layouts: As given.
        classes: As given.
        layers: As given.
        width: As given.
        attention_heads: The heads of a block.
        embeddings: Per segment, average and linear.
        saver: The saver's linear; None where there are no layers.
        blocks: The decoder's blocks.
        norm: The layer norm before the heads.
        heads: Per segment a linear to the difference, weight and bias 0 at first, so that an
            untrained network repeats the saver.

    Raises:
        ConfigError: From the constructor: no layouts, or sizes that can't be.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        classes: int,
        *,
        layers: int = 1,
        width: int = 32,
        heads: int = 8,
    ) -> None:
        super().__init__()
        if not layouts:
            raise ConfigError(NO_EXITS, remedy=_ADD_EXITS)
        _check_sizes(classes, layers, width, heads)
        self.layouts, self.classes = tuple(layouts), classes
        self.layers, self.width, self.attention_heads = layers, width, heads
        self.embeddings = nn.ModuleList(_Embedding(layout, width) for layout in layouts)
        self.saver = nn.Linear(classes, width) if layers else None
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(_zero_linear(width, classes) for _ in layouts)

    def forward(self, features: Sequence[Tensor], saver_logits: Tensor) -> tuple[Tensor, ...]:
        """Run over the whole sequence at once, as in training.

        Args:
            features: The feature behind each segment, as the backbone writes it, first axis the
                batch.
            saver_logits: Shape (batch, classes), float.

        Returns:
            Logits of each segment's exit, shape (batch, classes).

        Raises:
            ConfigError: Another number of features or of classes than the network has.
        """
        if len(features) != len(self.embeddings):
            raise ConfigError(
                "features of an exit sequence network",
                got=len(features),
                expected=f"{len(self.embeddings)}, one per segment",
            )
        check_logits("logits of the saver", saver_logits, self.classes)
        tokens = [embed(x) for embed, x in zip(self.embeddings, features, strict=True)]
        if self.saver is not None:
            sequence = torch.stack([self.saver(saver_logits), *tokens], dim=1)
            for block in self.blocks:
                sequence, _ = block(sequence, None)
            tokens = list(sequence[:, 1:].unbind(1))
        return tuple(
            saver_logits + head(self.norm(token))
            for head, token in zip(self.heads, tokens, strict=True)
        )

    def stages(
        self,
        labels: Sequence[str],
        feature_names: Sequence[str] | None = None,
        *,
        saver: str = "saver_logits",
    ) -> tuple[list[TorchStage], list[Exit]]:
        """One stage and one exit per segment; the stages share this network's weights.

        Stage `esn_<label>` reads the segment's feature, the saver's logits and what the stage
        before has cached, adds one token (the first stage the saver's too), and writes
        `esn_logits_<label>`, shape (batch, classes), and `esn_cache_<label>`, the keys and values
        of all tokens so far, shape (batch, layers, 2, tokens, width). The last stage writes no
        cache. Without layers there is none.

        Args:
            labels: What the exits are called, one per segment.
            feature_names: Names of the tensors with the features; `features_<label>` where None.
            saver: Name of the tensor with the saver's logits.

        Returns:
            The stages in order of execution, and the exits in order of evaluation.

        Raises:
            ConfigError: Another number of names than there are segments.
        """
        from engines.export import TorchStage

        names = (
            [f"features_{label}" for label in labels] if feature_names is None else feature_names
        )
        for what, found in (("labels", labels), ("names of features", names)):
            if len(found) != len(self.heads):
                raise ConfigError(
                    f"{what} of an exit sequence network",
                    got=len(found),
                    expected=f"{len(self.heads)}, one per segment",
                )
        stages = []
        cache: tuple[str, ...] = ()
        for i, (label, name) in enumerate(zip(labels, names, strict=True)):
            step = _Step(self, i)
            written = (f"esn_cache_{label}",) if step.writes_cache else ()
            outputs = (f"esn_logits_{label}", *written)
            stages.append(TorchStage(f"esn_{label}", "head", step, (name, saver, *cache), outputs))
            cache = written
        return stages, [Exit(f"esn_{label}", f"esn_logits_{label}") for label in labels]

    def parameter_counts(self) -> dict[str, int]:
        """Parameters per component: "embeddings" (the saver's too), "decoder" and "heads"."""
        components: dict[str, list[nn.Module]] = {
            "embeddings": [self.embeddings, *([] if self.saver is None else [self.saver])],
            "decoder": [self.blocks, self.norm],
            "heads": [self.heads],
        }
        return {
            name: sum(p.numel() for module in modules for p in module.parameters())
            for name, modules in components.items()
        }

    def macs(self) -> tuple[int, ...]:
        """Multiply-accumulate operations of each stage, for one sample."""
        width, found = self.width, list[int]()
        for i, layout in enumerate(self.layouts):
            count = _pooled(layout) * width + width * self.classes
            if self.saver is not None:
                new, seen = (2, 2) if i == 0 else (1, i + 2)
                count += self.classes * width if i == 0 else 0
                count += self.layers * new * (2 * width * (2 + _MLP) * width + 2 * width * seen)
            found.append(count)
        return tuple(found)


def esn_loss(logits: Sequence[Tensor], targets: Tensor, saver_logits: Tensor) -> Tensor:
    """The loss of all exits: cross entropy, less of it where the saver is sure.

    A sample weighs 2 (1 - max softmax(y_S)): one that the saver answers will hardly get here. The
    weights carry no gradient. The paper sums over the samples; here it is their mean, so that the
    learning rate does not depend on the batch.

    Args:
        logits: Of each exit, shape (batch, classes), float.
        targets: Classes, shape (batch,), int64; or probabilities, shape (batch, classes), float,
            as mixup makes them.
        saver_logits: Shape (batch, classes), float.

    Returns:
        Sum over the exits of the mean over the batch, float32, without axes.

    Raises:
        ConfigError: No exits, or shapes that don't fit together.

    Reference:
        Wang et al., TinySaver, appendix 6.4, Eq. 11.
    """
    if not logits:
        raise ConfigError(NO_EXITS, remedy=_ADD_EXITS)
    shape = tuple(saver_logits.shape)
    for i, one in enumerate(logits):
        if tuple(one.shape) != shape:
            raise ConfigError(f"logits of exit {i}", got=tuple(one.shape), expected=shape)
    soft = targets.is_floating_point()
    if tuple(targets.shape) != (shape if soft else shape[:1]):
        raise ConfigError(
            "targets",
            got=f"{tuple(targets.shape)} {str(targets.dtype).removeprefix('torch.')}",
            expected=f"{shape[:1]} int64 or {shape} float",
        )
    confidence = saver_logits.detach().float().softmax(1).amax(1)
    losses = [
        (2 * (1 - confidence) * nn.functional.cross_entropy(one.float(), targets, reduction="none"))
        for one in logits
    ]
    return torch.stack(losses).mean(1).sum()


def check_logits(what: str, logits: object, classes: int) -> None:
    """Refuse what are not logits of as many classes.

    Raises:
        ConfigError: It is not a tensor of shape (batch, classes).
    """
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] != classes:
        raise ConfigError(
            what,
            got=shape,
            expected=f"(batch, {classes})",
            remedy="Saver and base must name the same classes, in the same order",
        )


class _Embedding(nn.Module):
    """A segment's feature -> its token, shape (batch, width)."""

    def __init__(self, layout: Layout, width: int) -> None:
        super().__init__()
        self.layout = layout
        self.linear = nn.Linear(_pooled(layout), width)

    def forward(self, features: Tensor) -> Tensor:
        read = self.layout.read(features)
        average = read.map.mean(dim=(2, 3))
        pooled = average if read.cls is None else torch.cat([average, read.cls], dim=1)
        token: Tensor = self.linear(pooled)
        return token


class _Block(nn.Module):
    """Pre-norm transformer block that continues a sequence."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, _MLP * width), nn.Linear(_MLP * width, width)

    def forward(self, tokens: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add tokens to a sequence.

        Args:
            tokens: The new ones, shape (batch, new, width).
            past: Keys and values of those before, shape (batch, 2, old, width).

        Returns:
            The new tokens, transformed; and keys and values of all, shape
            (batch, 2, old + new, width).
        """
        batch, new, width = tokens.shape
        made = self.qkv(self.norm1(tokens)).reshape(batch, new, 3, width).transpose(1, 2)
        known = made[:, 1:] if past is None else torch.cat([past, made[:, 1:]], dim=2)
        query, key, value = (self._split(part) for part in (made[:, 0], known[:, 0], known[:, 1]))
        scores = query @ key.transpose(2, 3) * (width // self.heads) ** -0.5
        if new > 1:  # one new token sees all there are
            scores = scores + _hidden(new, known)
        mixed = scores.softmax(3) @ value
        tokens = tokens + self.out(mixed.transpose(1, 2).reshape(batch, new, width))
        return tokens + self.down(nn.functional.gelu(self.up(self.norm2(tokens)))), known

    def _split(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, width) -> (batch, heads, tokens, width / heads)."""
        batch, count, width = tokens.shape
        return tokens.reshape(batch, count, self.heads, width // self.heads).transpose(1, 2)


class _Step(nn.Module):
    """What one exit adds to the sequence; the weights are the network's own."""

    def __init__(self, esn: Esn, index: int) -> None:
        super().__init__()
        self.embed = esn.embeddings[index]
        self.saver = esn.saver if index == 0 else None
        self.blocks = esn.blocks
        self.norm = esn.norm
        self.head = esn.heads[index]
        self.writes_cache = bool(esn.layers) and index + 1 < len(esn.heads)

    def forward(
        self, features: Tensor, saver_logits: Tensor, cache: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        tokens = self.embed(features)[:, None]
        if self.saver is not None:
            tokens = torch.cat([self.saver(saver_logits)[:, None], tokens], dim=1)
        grown = []
        for i, block in enumerate(self.blocks):
            tokens, known = block(tokens, None if cache is None else cache[:, i])
            grown.append(known)
        logits: Tensor = saver_logits + self.head(self.norm(tokens[:, -1]))
        return (logits, torch.stack(grown, dim=1)) if self.writes_cache else logits


def _pooled(layout: Layout) -> int:
    """Numbers in a pooled feature: the average, and the class token beside it."""
    return layout.width * (2 if layout.prefix and layout.has_cls else 1)


def _zero_linear(width: int, classes: int) -> nn.Linear:
    linear = nn.Linear(width, classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _hidden(new: int, known: Tensor) -> Tensor:
    """Added to the scores, shape (new, all): `_NEVER` where a new token would see a later one."""
    total = known.shape[2]
    return known.new_full((new, total), _NEVER).triu(total - new + 1)


def _check_sizes(classes: int, layers: int, width: int, heads: int) -> None:
    sizes = (("classes", classes, 2), ("layers", layers, 0), ("width", width, 1))
    for name, value, least in (*sizes, ("heads", heads, 1)):
        if value < least:
            raise ConfigError(
                f"{name} of an exit sequence network", got=value, expected=f">= {least}"
            )
    if layers and width % heads:
        raise ConfigError(
            "width of an exit sequence network",
            got=f"{width} for {heads} heads",
            expected="a multiple of the heads",
            remedy="The paper's are 8, 32, 128 and 512, with 8 heads",
        )
