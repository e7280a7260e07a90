"""Walking the decoder block by block over the calibration samples, and observing what its linears read.

One block's weights and the residual streams of all samples are held, nothing else. There may be two streams: the
quantized model's, which the statistics come from, and the float model's, which is the target. Several processes share
the samples; sums are the same to the bit however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from bluelm.block import STREAM, Branch, Stage, block_of
from bluelm.config import ModelConfig
from bluelm.errors import InputError
from bluelm.model import DecoderBlock
from bluelm.rope import rope_table
from calibration.activations import Shelf
from calibration.ranks import ALONE, Ranks
from calibration.steps import Parameters, outcome, outcomes, value

BATCH_TOKENS = 4096  # tokens in one forward step: bounds the memory of a wide MLP
PARTS = 8  # of the samples, each summed by one rank: as many ranks can share a run
KEPT_BYTES = 2**28  # activations between two stages are kept in RAM up to this size, else computed again
PANEL = 256  # columns of a Hessian that are computed together


@dataclass(frozen=True)
class Split:
    """How the samples are cut into batches, the batches into parts, and which of them a rank has.

    All of it follows from the samples alone but for who has which part: sums are made part by part.
    """

    samples: int
    length: int
    ranks: Ranks = ALONE

    @property
    def step(self) -> int:
        """Samples in a batch."""
        return max(1, min(BATCH_TOKENS // self.length, -(-self.samples // PARTS)))

    def parts(self) -> list[list[slice]]:
        """Batches of all samples, part by part."""
        batches = [slice(at, min(at + self.step, self.samples)) for at in range(0, self.samples, self.step)]
        parts = min(PARTS, len(batches))
        edges = [index * len(batches) // parts for index in range(parts + 1)]
        return [batches[begin:end] for begin, end in pairwise(edges)]

    @property
    def mine(self) -> slice:
        """The samples of this rank.

        Raises:
            InputError: there are too few for so many ranks.
        """
        parts, ranks = self.parts(), self.ranks
        if ranks.size > len(parts):
            raise InputError(
                f"{self.samples} samples can be shared by {len(parts)} ranks, not by {ranks.size}",
                fix=f"start {len(parts)} ranks at most{', or give more samples' if len(parts) < PARTS else ''}",
            )
        edges = [rank * len(parts) // ranks.size for rank in (ranks.rank, ranks.rank + 1)]
        own = parts[edges[0] : edges[1]]
        return slice(own[0][0].start, own[-1][-1].stop)


class Streams:
    """The residual stream of this rank's samples where one block begins.

    Attributes:
        hidden: float32 or bfloat16 [n, T, hidden], of the model as quantized so far; overwritten as the walk goes on.
        exact: the same of the float model, or None where nobody asks for it.
        cos, sin: rotary table of T positions.
        shelf: what made them, and makes more of their kind.
        block: what every block of the model is.
    """

    def __init__(
        self,
        config: ModelConfig,
        hidden: Tensor,
        exact: Tensor | None = None,
        *,
        split: Split | None = None,
        shelf: Shelf | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Begin where the embedding ends; both tensors are overwritten as the walk goes on.

        Args:
            split: of all samples, of which `hidden` are this rank's. Default: these are all.
            device: where batches are computed. Default: where `hidden` lies.
        """
        self.hidden, self.exact = hidden, exact
        self.split = split or Split(hidden.shape[0], hidden.shape[1])
        self.shelf = shelf or Shelf(hidden.dtype)
        self.device = device or hidden.device
        self.cos, self.sin = (table.to(self.device) for table in rope_table(config, hidden.shape[1]))
        self.block, self._epsilon = block_of(config), config.rms_norm_eps

    def parameters(self, block: DecoderBlock) -> Parameters:
        """What the steps of a block compute with: its tensors as they are when they are asked for."""
        return Parameters(block.get_parameter, self.cos, self.sin, self._epsilon)

    def parts(self) -> Iterator[tuple[int, slice]]:
        """Part and place in `hidden` of this rank's batches, in order."""
        mine = self.split.mine
        for part, batches in enumerate(self.split.parts()):
            for batch in batches:
                if mine.start <= batch.start < mine.stop:
                    yield part, slice(batch.start - mine.start, batch.stop - mine.start)
                    self.shelf.release()

    def batches(self) -> Iterator[slice]:
        """Samples that are run together, as places in `hidden`."""
        for _, batch in self.parts():
            yield batch

    def read(self, kept: Tensor, batch: slice) -> Tensor:
        """Some samples of a kept tensor, on the device; bfloat16 becomes float32."""
        found = kept[batch].to(self.device)
        return found.float() if found.dtype == torch.bfloat16 else found

    def spread(self, tokens: int) -> Tensor:
        """About so many tokens of `hidden`: whole samples, evenly spread over those of all ranks, the same on each.

        Returns:
            float32 [b, T, hidden], on the device.
        """
        count = min(self.split.samples, max(1, tokens // self.split.length))
        picked = torch.linspace(0, self.split.samples - 1, count).round().long()
        mine = self.split.mine
        own = self.hidden[picked[(picked >= mine.start) & (picked < mine.stop)] - mine.start]
        return torch.cat(self.split.ranks.gathered(own.float())).to(self.device)

    def copy(self) -> Tensor:
        """A copy of `hidden` on the same shelf."""
        copied = self.shelf.empty(*self.hidden.shape)
        for batch in self.batches():
            copied[batch] = self.hidden[batch]
        return copied

    def rounded(self, x: Tensor) -> Tensor:
        """What would be read if x were put on the shelf."""
        return x.bfloat16().float() if self.shelf.dtype == torch.bfloat16 else x

    def advance(self, block: DecoderBlock, exact: DecoderBlock) -> None:
        """Run a block, quantized and as it was: what were its inputs become its outputs.

        The same steps, and the same bits, as those of `moments_in_order`.
        """
        parameters = self.parameters(block)
        for batch in self.batches():
            x = self.read(self.hidden, batch)  # [b, T, hidden]
            for branch in self.block.branches:
                read = value(branch.steps, {branch.begins: x}, parameters, branch.writer.reads)
                read = self.rounded(read) if branch.mixes else read
                x = self.rounded(x + outcome(branch.writer, [read], parameters))
            self.hidden[batch] = x
            if self.exact is not None:
                for branch in self.block.branches:
                    self.advance_exact(branch, exact, batch)

    def advance_exact(self, branch: Branch, exact: DecoderBlock, batch: slice) -> Tensor:
        """The float stream of some samples through one branch of a block; what it is then, [b, T, hidden]."""
        assert self.exact is not None
        x = self.read(self.exact, batch)
        x = x + value(branch.steps, {branch.begins: x}, self.parameters(exact))
        self.exact[batch] = x
        return x


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


class _Sum:
    """Rows of tensors, added up within each part of the samples and then over the parts in order."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._done: list[Sequence[Tensor]] = []
        self._current: Sequence[Tensor] = ()
        self._part: int | None = None

    def of_part(self, part: int, make: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """The row to add to; a new one from `make` where a part begins."""
        if part != self._part:
            self._close()
            self._current, self._part = make(), part
        return self._current

    def total(self) -> Sequence[Tensor]:
        """The sum over all parts of all ranks."""
        self._close()
        total, self._done = self._ranks.total(self._done), []
        return total

    def _close(self) -> None:
        if self._part is None:
            return
        if self._done and self._ranks.leads:  # the first parts of all: nothing comes before them
            for sum_, tensor in zip(self._done[0], self._current, strict=True):
                sum_.add_(tensor)
        else:
            self._done.append(self._current)
        self._current, self._part = (), None


class Hessian:
    """Mean of x xᵀ, added up in float32 a batch at a time."""

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self._sum = _Sum(ranks)

    def add(self, x: Tensor, part: int = 0) -> None:
        """x: float32 [..., in], of a batch in this part of the samples."""
        x = x.flatten(0, -2)  # [tokens, in]
        count, *panels = self._sum.of_part(part, lambda: _panels(x))
        for start, panel in zip(range(0, x.shape[1], PANEL), panels, strict=True):
            panel.addmm_(x[:, start : start + PANEL].T, x[:, start:])
        count.add_(len(x))

    def mean(self) -> Tensor:
        """float32 [in, in], exactly symmetric."""
        count, *panels = self._sum.total()
        whole = panels[0].new_zeros(panels[0].shape[1], panels[0].shape[1])
        for number in range(len(panels)):
            start = number * PANEL
            whole[start : start + PANEL, start:] = panels[number].div_(count)
            whole[start:, start : start + PANEL] = panels[number].T  # and its mirror
            corner = panels[number][:, :PANEL].triu()
            whole[start : start + PANEL, start : start + PANEL] = corner + corner.triu(1).T
            panels[number] = count  # its memory is free again
        return whole


def _panels(x: Tensor) -> list[Tensor]:
    """A count of tokens, and the upper triangle of zeros [in, in] as panels of rows [PANEL, in - start]."""
    width = x.shape[1]
    panels = [x.new_zeros(min(PANEL, width - start), width - start) for start in range(0, width, PANEL)]
    return [x.new_zeros(()), *panels]


class Cross:
    """Mean of y xᵀ, added up in float32 a batch at a time; y = exact - hidden, two states of the stream."""

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self._sum = _Sum(ranks)

    def add(self, exact: Tensor, hidden: Tensor, x: Tensor, part: int = 0) -> None:
        """exact, hidden: float32 [..., out]; x: float32 [..., in], of a batch in this part of the samples."""
        y, x = (exact - hidden).flatten(0, -2), x.flatten(0, -2)  # [tokens, out], [tokens, in]
        count, total = self._sum.of_part(part, lambda: [x.new_zeros(()), x.new_zeros(y.shape[1], x.shape[1])])
        total.addmm_(y.T, x)
        count.add_(len(x))

    def mean(self) -> Tensor:
        """float32 [out, in]."""
        count, total = self._sum.total()
        return total.div_(count)


def collect_hessians(streams: Streams, block: DecoderBlock) -> dict[str, Tensor]:
    """H of every stage, by its name, in one pass of the block as it is. The streams stay where they are."""
    found = {stage.name: Hessian(streams.split.ranks) for stage in streams.block.stages}
    steps, parameters = streams.block.steps, streams.parameters(block)
    for part, batch in streams.parts():
        x = streams.read(streams.hidden, batch)  # [b, T, hidden]
        for name, made in outcomes(steps[: steps.index(streams.block.branches[-1].writer)], {STREAM: x}, parameters):
            if name in found:
                found[name].add(made, part)  # [b, T, in]
    return {name: hessian.mean() for name, hessian in found.items()}


def moments_in_order(streams: Streams, block: DecoderBlock, exact: DecoderBlock) -> Iterator[tuple[Stage, Moments]]:
    """Each stage with its moments, in true sequential order; the streams advance through the block.

    Before asking for the next stage, the caller puts the quantized weights of this one into `block`: later
    stages then see activations that already carry the errors of the earlier ones. `exact` stays as it is.
    """
    for branch in streams.block.branches:
        for stage in branch.stages[:-1]:
            hessian = Hessian(streams.split.ranks)
            for part, batch in streams.parts():
                hessian.add(_read_by(stage, branch, streams, block, batch), part)
            yield stage, Moments(hessian.mean())
        yield from _last_stage(branch, streams, block, exact)


def _last_stage(
    branch: Branch, streams: Streams, block: DecoderBlock, exact: DecoderBlock
) -> Iterator[tuple[Stage, Moments]]:
    """The stage that writes to the stream; behind it, what it writes is added."""
    ranks, follows, stage = streams.split.ranks, streams.exact is not None, branch.stages[-1]
    hessian, cross = Hessian(ranks), Cross(ranks)
    kept = _room(branch, streams)
    for part, batch in streams.parts():
        read = _read_by(stage, branch, streams, block, batch)
        if kept is not None:
            kept[batch] = read
            read = streams.read(kept, batch)
        hessian.add(read, part)
        if follows:
            x = streams.read(streams.hidden, batch)
            if branch.writer.biased:  # what it adds by itself is not asked of its weight
                x = x + block.get_parameter(f"{branch.writer.weight}.bias")
            cross.add(streams.advance_exact(branch, exact, batch), x, read, part)
    yield stage, Moments(hessian.mean(), cross.mean() if follows else None)

    for batch in streams.batches():
        read = streams.read(kept, batch) if kept is not None else _read_by(stage, branch, streams, block, batch)
        x = streams.read(streams.hidden, batch)
        streams.hidden[batch] = x + outcome(branch.writer, [read], streams.parameters(block))


def _read_by(stage: Stage, branch: Branch, streams: Streams, block: DecoderBlock, batch: slice) -> Tensor:
    """What a stage reads of some samples, [b, T, in]."""
    x = streams.read(streams.hidden, batch)  # [b, T, hidden]
    return value(branch.steps, {branch.begins: x}, streams.parameters(block), stage.name)


def _room(branch: Branch, streams: Streams) -> Tensor | None:
    """Where what a branch's writer reads is kept until the writer has its codes, [n, T, width].

    The outcome of attention is expensive to compute again, and kept as the stream is; the rest is kept in float32, or
    computed again (None) where RAM is too small for it.
    """
    shelf, (samples, length, _), width = streams.shelf, streams.hidden.shape, branch.writer.columns
    if branch.mixes:
        return shelf.empty(samples, length, width)
    if not shelf.on_disk and samples * length * width * 4 > KEPT_BYTES:
        return None
    return shelf.empty(samples, length, width, dtype=torch.float32)
