"""The output of a block's attention and MLP on a few calibration samples, with other weights in them.

AWQ judges the scales of the linears that read a norm by the output of the module around them (Lin et al., 2023, arXiv
2306.00978): the effect of an error in q depends on the keys, that of one in gate on up and down. A linear that is
followed by the residual sum, o_proj or down_proj, needs no module: the Hessian alone gives its error.

The output is added to the stream, and what follows reads that through an RMSNorm: a token's squared error is divided by
the size of its stream, else the few tokens with huge activations would dominate the search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from bluelm.block import Stage, Step
from bluelm.model import DecoderBlock
from calibration.steps import outcomes, value
from calibration.walk import Streams

TOKENS = 2048  # that the modules are run on
SMALLEST = 1e-9  # mean square of a token's stream below which it counts as this

Judge = Callable[[Sequence[Tensor]], float]  # weights of a stage's linears, float32 [out, in] each -> what they lose


class Probe:
    """Inputs of the attention and of the MLP of a block, and what it makes of them."""

    def __init__(self, streams: Streams, block: DecoderBlock) -> None:
        """Run the block, as it is, on samples spread over the streams. These stay where they are."""
        self._parameters = streams.parameters(block)
        self._modules: dict[str, _Module] = {}
        x = streams.spread(TOKENS)  # [b, T, hidden]
        for branch in streams.block.branches:
            judged = {stage.name for stage in branch.stages[:-1]}
            values = dict(outcomes(branch.steps, {branch.begins: x}, self._parameters))
            output = values[branch.writer.makes]
            x = x + output
            for name in judged:
                behind = branch.steps[[step.makes for step in branch.steps].index(name) + 1 :]
                made = {step.makes for step in behind}
                inputs = {read: values[read] for step in behind for read in step.inputs if read not in made}
                self._modules[name] = _Module(behind, inputs, output, _size(x))

    def judge(self, stage: Stage) -> Judge | None:
        """The error of the module around a stage's linears, a mean over tokens; None where there is no module."""
        asked = self._modules.get(stage.name)
        if asked is None:
            return None
        names = [f"{linear}.weight" for linear in stage.linears]

        def lost(weights: Sequence[Tensor]) -> float:
            parameters = self._parameters.but(dict(zip(names, weights, strict=True)))
            found = value(asked.steps, asked.inputs, parameters)
            return ((found - asked.output).square().mean(-1) / asked.size).mean().item()

        return lost


@dataclass(frozen=True)
class _Module:
    """The steps behind what a stage reads, up to the sum: what they read, what they give, [b, T, hidden] or another
    width, and the mean square of the stream behind them, [b, T]."""

    steps: Sequence[Step]
    inputs: Mapping[str, Tensor]
    output: Tensor
    size: Tensor


def _size(stream: Tensor) -> Tensor:
    return stream.square().mean(-1).clamp_min(SMALLEST)


def output_judge(weights: Sequence[Tensor], hessian: Tensor) -> Judge:
    """The squared error of the linears' own output, tr(E H Eᵀ), against that of `weights`, float32 [out, in] each."""

    def lost(found: Sequence[Tensor]) -> float:
        errors = [new - old for new, old in zip(found, weights, strict=True)]
        return sum(((error @ hessian) * error).sum().item() for error in errors)

    return lost
