"""AWQ: channels that matter are scaled up before rounding, and the scale is folded into what comes before.

    linear(W, x) == linear(W * s, x / s)

with s [in] on the columns of W, and 1/s on the norm's weight or on the rows of the linear that makes x, costs
nothing at run time (Lin et al., 2023, arXiv 2306.00978). s is searched by the error of the linears' output,
tr(E H Eᵀ) with H = mean of x xᵀ, which needs no activations but their Hessian.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bluelm.block import block_of
from bluelm.config import ModelConfig
from calibration.walk import collect_hessians
from compress.methods.folding import fold
from compress.methods.grid import choose_grid
from compress.methods.probe import Judge, Probe, output_judge
from compress.methods.protocol import FloatBlock, Folded, Method, Options, SolvingCost, Statistics
from compress.methods.rtn import Nearest, round_to_nearest
from compress.widths.width import Widths

EXPONENTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
NEARER = (0.1, 0.05)  # then the best exponent's neighbours, so far away
ROWS = 512  # rows of each linear that is its own judge that the search looks at, evenly spread
WIDEST = 1e4  # largest ratio between two scales


@dataclass(frozen=True)
class Scaling:
    """Result of a search.

    Attributes:
        scales: float32 [channels], one for each output channel of what comes before.
        exponent: of the activations' magnitude; 0 with `by_weight` False leaves the weights alone.
        by_weight: divide by the weights' magnitude to the power 1 - exponent.
        loss, plain: error of the output with the scales, and without any.
    """

    scales: Tensor
    exponent: float
    by_weight: bool
    loss: float
    plain: float

    @property
    def note(self) -> dict[str, Any]:
        """The same as plain values, without the scales."""
        ratio = self.loss / self.plain if self.plain > 0 else 1.0
        return {"exponent": self.exponent, "by_weight": self.by_weight, "loss_ratio": float(f"{ratio:.6g}")}


def search_scales(
    weights: Sequence[Tensor], hessian: Tensor, reads: Tensor, widths: Sequence[Widths], judge: Judge | None = None
) -> Scaling:
    """Scales that lose least, all `weights` rounded.

    Args:
        weights: float32 [out, in] each, reading the same input.
        hessian: float32 [in, in], mean of x xᵀ.
        reads: int64 [in], see `Move.channels`; channels that read the same share a scale.
        widths: of each weight.
        judge: tells what rounded weights lose. Default: the error of the linears' own output, of some of their rows.
    """
    if judge is None:
        weights = [_spread(weight) for weight in weights]
        judge = output_judge(weights, hessian)

    def lost(scales: Tensor) -> float:
        wide = scales[reads]
        rounded: list[Tensor] = []
        for weight, width in zip(weights, widths, strict=True):
            scaled = round_to_nearest(weight * wide, width.bits, width.group_size, width.symmetric)
            rounded.append(scaled.dequantize().div_(wide))
        return judge(rounded)

    activation = _shared_rms(hessian.diagonal(), reads)
    rows = sum(len(weight) for weight in weights)
    weight = _shared_rms(torch.stack([weight.square().sum(0) for weight in weights]).sum(0) / rows, reads)
    ones = torch.ones_like(activation)
    plain = lost(ones)
    best = Scaling(ones, 0.0, False, plain, plain)

    def attempt(exponents: Sequence[float], families: Sequence[bool], best: Scaling) -> Scaling:
        for by_weight in families:
            for exponent in exponents:
                scales = _scales(activation, weight if by_weight else None, exponent)
                loss = lost(scales)
                if loss < best.loss:
                    best = Scaling(scales, exponent, by_weight, loss, plain)
        return best

    best = attempt(EXPONENTS, (False, True), best)
    for step in NEARER:
        near = [exponent for exponent in (best.exponent - step, best.exponent + step) if 0 <= exponent <= 1]
        best = attempt(near, (best.by_weight,), best)
    return best


def search_clips(
    weights: Sequence[Tensor], hessian: Tensor, scales: Tensor, widths: Sequence[Widths], judge: Judge
) -> list[bool]:
    """Which linears to clip: round on the spans of least error instead of the groups' extremes.

    The spans themselves come from the errors of each group (`choose_grid`). What is best for every linear by itself
    need not be for the module: queries and keys are multiplied with each other. A linear is left unclipped where
    the module then loses less.

    Args:
        weights, hessian, widths, judge: as in `search_scales`.
        scales: float32 [in], on the columns of the weights.
    """
    seen = hessian / scales / scales.unsqueeze(1)

    def rounded(place: int, clip: bool) -> Tensor:
        width, scaled = widths[place], weights[place] * scales
        search = clip and width.bits < 8  # at 8 bits there is nothing to gain
        grid = choose_grid(scaled, width.bits, width.group_size, width.symmetric, search=search, hessian=seen)
        return grid.nearest(scaled).dequantize().div_(scales)

    clips = [True] * len(weights)
    chosen = [rounded(place, clip) for place, clip in enumerate(clips)]
    least = judge(chosen)
    for place in range(len(weights)):
        kept, chosen[place] = chosen[place], rounded(place, False)
        loss = judge(chosen)
        if loss < least:
            least, clips[place] = loss, False
        else:
            chosen[place] = kept
    return clips


def fold_block(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    widths: Mapping[str, Widths],
    probe: Probe,
    *,
    clip: bool = False,
) -> Folded:
    """Search and fold all places of a block.

    Args:
        tensors: of the block, by local name.
        hessians: by the stage's name, of the block as it is.
        widths: of each linear, by local name.
        probe: of the block as it is.
        clip: find out as well which linears are to be clipped.
    """
    folded, notes, unclipped = dict(tensors), {}, set[str]()
    for place in block_of(config).moves:
        linears, hessian = place.stage.linears, hessians[place.stage.name]
        reads = torch.tensor(place.channels).to(hessian.device)
        # the columns as they are: foldings of earlier places divide rows, which rounding does not see
        weights, asked = [tensors[f"{linear}.weight"] for linear in linears], [widths[linear] for linear in linears]
        judge = probe.judge(place.stage)
        scaling = search_scales(weights, hessian, reads, asked, judge)
        folded = fold(folded, place, scaling.scales, reads)
        notes[place.stage.name] = {"scaling": scaling.note}
        if clip and judge is not None:
            clips = search_clips(weights, hessian, scaling.scales[reads], asked, judge)
            unclipped |= {linear for linear, clipped in zip(linears, clips, strict=True) if not clipped}
    return Folded(folded, notes, frozenset(unclipped))


def fold_searched(block: FloatBlock, *, clip: bool) -> Folded:
    """`fold_block` by what the streams in front of the block tell."""
    hessians, probe = collect_hessians(block.streams, block.block), Probe(block.streams, block.block)
    return fold_block(block.config, block.tensors, hessians, block.widths, probe, clip=clip)


class Awq(Method[Options]):
    """AWQ's scales, then the nearest codes on spans that are searched by the error of the output."""

    options = Options

    def statistics(self, options: Options) -> Statistics:
        return Statistics(inputs=True, float_block=True)

    def fold(self, block: FloatBlock, options: Options) -> Folded:
        return fold_searched(block, clip=block.search)

    def solver(self, hessian: Tensor | None, options: Options) -> Nearest:
        return Nearest(hessian)

    def cost(self, out: int, columns: int, widths: Widths, options: Options) -> SolvingCost:
        # both losses; the search of scales, once a stage, is counted like a factorization
        return SolvingCost(operations=4 * out * columns**2, factorization_operations=columns**3 / 3)


METHOD = Awq()


def _spread(weight: Tensor) -> Tensor:
    step = -(-weight.shape[0] // ROWS)
    return weight[::step]


def _shared_rms(squares: Tensor, reads: Tensor) -> Tensor:
    """Root of the mean square [channels] over the input channels [in] that read the same channel."""
    channels = int(reads.max()) + 1
    total = squares.new_zeros(channels).index_add_(0, reads, squares)
    return (total / torch.bincount(reads, minlength=channels)).sqrt()


def _scales(activation: Tensor, weight: Tensor | None, exponent: float) -> Tensor:
    """activation**exponent, over weight**(1 - exponent) if given, around 1; channels without signal get 1."""
    alive = activation > 0 if weight is None else (activation > 0) & (weight > 0)
    scales = activation.clamp(min=1e-12) ** exponent
    if weight is not None:
        scales = scales / weight.clamp(min=1e-12) ** (1 - exponent)
    if not alive.any():
        return torch.ones_like(scales)
    middle = scales[alive].log().mean().exp()
    scales = (scales / middle).clamp(WIDEST**-0.5, WIDEST**0.5)
    return torch.where(alive, scales, torch.ones_like(scales))
