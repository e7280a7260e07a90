"""What a block's attention and MLP answer on a few of the calibration samples, with other weights in them.

AWQ judges the scales of the linears that read a norm by the output of the module around them (Lin et al., 2023, arXiv
2306.00978): what an error in q costs depends on the keys, one in gate on up and down. A linear that is followed by
the residual sum, o_proj or down_proj, is its own judge: its error needs the Hessian alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.func import functional_call

from bluelm.model import DecoderBlock
from calibration.walk import GATE_UP, QKV, Stage, Streams

TOKENS = 2048  # that the modules are run on

Judge = Callable[[Sequence[Tensor]], float]  # weights of a stage's linears, float32 [out, in] each -> what they lose


class Probe:
    """Inputs of the attention and of the MLP of a block, and what it makes of them."""

    def __init__(self, streams: Streams, block: DecoderBlock) -> None:
        """Run the block, as it is, on samples spread over the streams. These stay where they are."""
        rotary = (streams.cos, streams.sin)
        x = streams.spread(TOKENS)  # [b, T, hidden]
        attends = block.input_layernorm(x)
        attended = block.self_attn(attends, *rotary)
        reads = block.post_attention_layernorm(x + attended)
        self._modules: dict[str, tuple[nn.Module, tuple[Tensor, ...], Tensor]] = {
            QKV.name: (block.self_attn, (attends, *rotary), attended),
            GATE_UP.name: (block.mlp, (reads,), block.mlp(reads)),
        }

    def judge(self, stage: Stage) -> Judge | None:
        """The mean squared error of the output of the module around a stage's linears; None where there is none."""
        if stage.name not in self._modules:
            return None
        module, inputs, wanted = self._modules[stage.name]
        names = [f"{linear.rpartition('.')[2]}.weight" for linear in stage.linears]

        def lost(weights: Sequence[Tensor]) -> float:
            found = functional_call(module, dict(zip(names, weights, strict=True)), inputs)
            return (found - wanted).square().mean().item()

        return lost


def output_judge(weights: Sequence[Tensor], hessian: Tensor) -> Judge:
    """The squared error of the linears' own output, tr(E H Eᵀ), against that of `weights`, float32 [out, in] each."""

    def lost(found: Sequence[Tensor]) -> float:
        errors = [new - old for new, old in zip(found, weights, strict=True)]
        return sum(((error @ hessian) * error).sum().item() for error in errors)

    return lost
