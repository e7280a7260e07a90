"""Walking the decoder block by block over the calibration samples, and watching what its linears read.

One block's weights and the residual streams of all samples are held, nothing else. There may be two streams:
the quantized model's, which the statistics come from, and the float model's, which tells where it should be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from bluelm.config import ModelConfig
from bluelm.model import DecoderBlock
from bluelm.rope import rope_table

BATCH_TOKENS = 4096  # tokens in one forward step: bounds the memory of a wide MLP
KEPT_BYTES = 2**28  # activations between two stages are kept up to this size, else computed again
PANEL = 256  # columns of a Hessian that are computed together


@dataclass(frozen=True)
class Stage:
    """Linears of a block that read the same activations, by their local names."""

    name: str
    linears: tuple[str, ...]


QKV = Stage("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
OUT = Stage("o", ("self_attn.o_proj",))
GATE_UP = Stage("gate_up", ("mlp.gate_proj", "mlp.up_proj"))
DOWN = Stage("down", ("mlp.down_proj",))
STAGES = (QKV, OUT, GATE_UP, DOWN)  # in the order in which a block reads them


class Streams:
    """The residual stream of every sample where one block begins.

    Attributes:
        hidden: float32 [n, T, hidden], of the model as quantized so far; overwritten as the walk goes on.
        exact: the same of the float model, or None where nobody asks for it.
        cos, sin: rotary table of T positions.
    """

    def __init__(self, config: ModelConfig, hidden: Tensor, exact: Tensor | None = None) -> None:
        """Begin where the embedding ends; both tensors are overwritten as the walk goes on."""
        self.hidden, self.exact = hidden, exact
        self.cos, self.sin = rope_table(config, hidden.shape[1])

    def batches(self) -> Iterator[slice]:
        """Samples that are run together."""
        step = max(1, BATCH_TOKENS // self.hidden.shape[1])
        for start in range(0, len(self.hidden), step):
            yield slice(start, start + step)

    def advance(self, block: DecoderBlock, exact: DecoderBlock) -> None:
        """Run a block, quantized and as it was: what were its inputs become its outputs."""
        for batch in self.batches():
            self.hidden[batch] = block(self.hidden[batch], self.cos, self.sin)
            if self.exact is not None:
                self.exact[batch] = exact(self.exact[batch], self.cos, self.sin)


@dataclass(frozen=True)
class Moments:
    """What calibration tells about the linears of one stage.

    Attributes:
        hessian: float32 [in, in], mean of x xᵀ over all tokens, x being what the linears read.
        cross: float32 [out, in], mean of y xᵀ, y being what the stage's one linear would have to add to bring
            the stream to where the float model's is; None where the linears do not write to the stream, or
            there is no float stream.
    """

    hessian: Tensor
    cross: Tensor | None = None


class Hessian:
    """Mean of x xᵀ, added up in float32 a batch at a time."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        """x: float32 [..., in]."""
        x = x.flatten(0, -2)  # [tokens, in]
        if self._sum is None:
            self._sum = x.new_zeros(x.shape[1], x.shape[1])
        for start in range(0, x.shape[1], PANEL):  # the upper triangle; the lower is its mirror
            self._sum[start : start + PANEL, start:].addmm_(x[:, start : start + PANEL].T, x[:, start:])
        self._tokens += len(x)

    def mean(self) -> Tensor:
        """float32 [in, in], exactly symmetric."""
        assert self._sum is not None, "nothing was added"
        upper = self._sum.triu()
        return (upper + upper.triu(1).T).div_(self._tokens)


class Cross:
    """Mean of y xᵀ, added up in float32 a batch at a time; y = exact - hidden, two states of the stream."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._tokens = 0

    def add(self, exact: Tensor, hidden: Tensor, x: Tensor) -> None:
        """exact, hidden: float32 [..., out]; x: float32 [..., in]."""
        y, x = (exact - hidden).flatten(0, -2), x.flatten(0, -2)  # [tokens, out], [tokens, in]
        if self._sum is None:
            self._sum = x.new_zeros(y.shape[1], x.shape[1])
        self._sum.addmm_(y.T, x)
        self._tokens += len(x)

    def mean(self) -> Tensor | None:
        """float32 [out, in]; None if nothing was added."""
        return None if self._sum is None else self._sum / self._tokens


def collect_hessians(streams: Streams, block: DecoderBlock) -> dict[str, Tensor]:
    """H of every stage, by its name, in one pass of the block as it is. The streams stay where they are."""
    found = {stage.name: Hessian() for stage in STAGES}
    for batch in streams.batches():
        x = streams.hidden[batch]  # [b, T, hidden]
        normed = block.input_layernorm(x)
        found[QKV.name].add(normed)
        mixed = block.self_attn.mix(normed, streams.cos, streams.sin)  # [b, T, heads * head_dim]
        found[OUT.name].add(mixed)
        normed = block.post_attention_layernorm(x + block.self_attn.o_proj(mixed))
        found[GATE_UP.name].add(normed)
        found[DOWN.name].add(block.mlp.gated(normed))  # [b, T, intermediate]
    return {name: hessian.mean() for name, hessian in found.items()}


def moments_in_order(streams: Streams, block: DecoderBlock, exact: DecoderBlock) -> Iterator[tuple[Stage, Moments]]:
    """Each stage with its moments, in true sequential order; the streams advance through the block.

    Before asking for the next stage, the caller puts the quantized weights of this one into `block`: later
    stages then see activations that already carry the errors of the earlier ones. `exact` stays as it is.
    """
    hidden, cos, sin = streams.hidden, streams.cos, streams.sin
    attention, mlp = block.self_attn, block.mlp

    hessian = Hessian()
    for batch in streams.batches():
        hessian.add(block.input_layernorm(hidden[batch]))
    yield QKV, Moments(hessian.mean())

    hessian, cross = Hessian(), Cross()
    mixed = hidden.new_empty((*hidden.shape[:2], attention.o_proj.in_features))
    for batch in streams.batches():
        mixed[batch] = attention.mix(block.input_layernorm(hidden[batch]), cos, sin)
        hessian.add(mixed[batch])
        if streams.exact is not None:
            streams.exact[batch] += exact.self_attn(exact.input_layernorm(streams.exact[batch]), cos, sin)
            cross.add(streams.exact[batch], hidden[batch], mixed[batch])
    yield OUT, Moments(hessian.mean(), cross.mean())

    hessian = Hessian()
    for batch in streams.batches():
        hidden[batch] += attention.o_proj(mixed[batch])
        hessian.add(block.post_attention_layernorm(hidden[batch]))
    del mixed
    yield GATE_UP, Moments(hessian.mean())

    hessian, cross = Hessian(), Cross()
    keeps = hidden[..., 0].numel() * mlp.down_proj.in_features * hidden.element_size() <= KEPT_BYTES
    kept: list[Tensor] = []
    for batch in streams.batches():
        gated = mlp.gated(block.post_attention_layernorm(hidden[batch]))
        hessian.add(gated)
        if streams.exact is not None:
            streams.exact[batch] += exact.mlp(exact.post_attention_layernorm(streams.exact[batch]))
            cross.add(streams.exact[batch], hidden[batch], gated)
        if keeps:
            kept.append(gated)
    yield DOWN, Moments(hessian.mean(), cross.mean())

    for index, batch in enumerate(streams.batches()):
        gated = kept[index] if keeps else mlp.gated(block.post_attention_layernorm(hidden[batch]))
        hidden[batch] += mlp.down_proj(gated)
