"""Learned rounding: codes and scales of one block, trained so that the block's output is the float model's.

GPTQ solves one linear at a time for the squared error of its own output. Here all linears of a block are trained
together for a few hundred steps, with the float model's stream behind the block as the target; the stream before the
block is the quantized model's, so that errors of earlier blocks are compensated as well. Codes are trained through
their rounding by the straight-through estimator, in the spirit of AdaRound (Nagel et al., 2020, arXiv 2004.10568) and
auto-round's SignRound (Cheng et al., 2023, arXiv 2309.05516), but starting from GPTQ's codes, and with Adam.

What follows a block reads it through an RMSNorm, which divides each token by its own size. The loss does so too,
else the few tokens with huge activations would dominate training.

Training is noisy, and GPTQ's codes are good: the result is kept only where it is better, on tokens spread over the
whole calibration set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from bluelm.model import DecoderBlock
from compress.checkpoint.quantized import QuantizedTensor
from compress.methods.grid import representable

MARGIN = 0.2  # how far from its code a latent may begin: at the edge, 0.5, the first noisy steps would flip many
TRAVEL = 1.0  # codes that a latent pushed one way all the time goes: with few steps they are longer
SCALE_TRAVEL = 0.2  # the same of a scale, as a share of it
FASTEST = 0.05  # codes a step, however few steps there are
BATCH_TOKENS = 512  # tokens in one step
JUDGED_TOKENS = 8192  # tokens that tell whether training has helped
SMALLEST = 1e-9  # mean square of a token's stream below which it counts as this


@dataclass(frozen=True)
class Refined:
    """What training came to.

    Attributes:
        weights: by local name, of the widths and zero points that they had, on the CPU.
        flipped: share of the codes that changed, by local name.
        before, after: the loss with the codes given, and with these, over the same tokens.
    """

    weights: dict[str, QuantizedTensor]
    flipped: dict[str, float]
    before: float
    after: float

    @property
    def note(self) -> dict[str, float]:
        """The loss, as plain values for the report."""
        return {"loss_before": float(f"{self.before:.4g}"), "loss_after": float(f"{self.after:.4g}")}


class _Latent:
    """A quantized weight whose codes and scales are real numbers."""

    def __init__(self, weight: Tensor, solved: QuantizedTensor) -> None:
        """weight: float32 [out, in], what was quantized."""
        self.solved = solved
        rows, columns = solved.shape
        self.grouped = (rows, solved.groups, columns // solved.groups)
        self.scales = solved.scales.float().unsqueeze(-1)  # [out, groups, 1]
        self.zeros = solved.zeros.float().unsqueeze(-1)
        codes = solved.codes.float().view(self.grouped)
        wanted = weight.view(self.grouped) / self.scales + self.zeros
        self.codes = torch.clamp(wanted, codes - MARGIN, codes + MARGIN).requires_grad_()
        self.stretch = torch.ones_like(self.scales).requires_grad_()

    def dequantize(self) -> Tensor:
        """float32 [out, in]; gradients go through the rounding as if it were not there."""
        rounded = self.codes + (self.codes.round() - self.codes).detach()
        largest = 2**self.solved.bits - 1
        return ((rounded.clamp(0, largest) - self.zeros) * (self.scales * self.stretch)).view(self.solved.shape)

    def freeze(self) -> QuantizedTensor:
        """The weight, its codes and scales as runtimes hold them."""
        old = self.solved
        codes = self.codes.detach().round().clamp(0, 2**old.bits - 1).to(torch.uint8).view(old.shape)
        scales = representable((self.scales * self.stretch).detach().squeeze(-1))
        return QuantizedTensor(codes, scales.to(torch.float16), old.zeros, old.bits, old.group_size)


def refine(
    block: DecoderBlock,
    weights: Mapping[str, Tensor],
    solved: Mapping[str, QuantizedTensor],
    inputs: Tensor,
    targets: Tensor,
    rotary: tuple[Tensor, Tensor],
    *,
    steps: int,
    seed: int,
) -> Refined:
    """Train the codes and scales of a block's linears.

    Args:
        block: with the norms and biases that ship; its linears are not read.
        weights: float32 [out, in] by local name, what was quantized.
        solved: the codes to start from, by the same names.
        inputs: float32 [n, T, hidden], the quantized model's stream in front of the block.
        targets: float32 [n, T, hidden], the float model's stream behind it.
        rotary: (cos, sin) of T positions.
        steps: of about `BATCH_TOKENS` tokens each.
        seed: picks the samples of each step; the same seed gives the same codes.
    """
    with torch.inference_mode(False), torch.enable_grad():
        latents = {name: _Latent(weights[name].clone(), solved[name]) for name in solved}
        learned = {f"{name}.weight" for name in solved}
        fixed = {name: value.clone() for name, value in block.state_dict().items() if name not in learned}
        cos, sin = (table.clone() for table in rotary)
        rate = min(2 * TRAVEL / steps, FASTEST)
        trained = [
            {"params": [latent.codes for latent in latents.values()], "lr": rate},
            {"params": [latent.stretch for latent in latents.values()], "lr": rate * SCALE_TRAVEL / TRAVEL},
        ]
        optimizer = torch.optim.Adam(trained, betas=(0.9, 0.99), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        order = torch.Generator().manual_seed(seed)
        batch = max(1, BATCH_TOKENS // inputs.shape[1])

        def read(kept: Tensor, picked: Tensor) -> Tensor:
            return kept[picked].to(cos.device).float()  # [b, T, hidden]

        def error(chosen: Mapping[str, Tensor], picked: Tensor) -> Tensor:
            state = {**fixed, **{f"{name}.weight": weight for name, weight in chosen.items()}}
            return relative_error(
                functional_call(block, state, (read(inputs, picked), cos, sin)), read(targets, picked)
            )

        def judged(chosen: Mapping[str, QuantizedTensor]) -> float:
            count = min(len(inputs), max(1, JUDGED_TOKENS // inputs.shape[1]))
            spread = torch.linspace(0, len(inputs) - 1, count).round().long()
            dequantized = {name: weight.dequantize() for name, weight in chosen.items()}
            with torch.no_grad():
                return sum(error(dequantized, part).item() * len(part) for part in spread.split(batch)) / count

        before = judged(solved)
        for _ in range(steps):
            picked = torch.randperm(len(inputs), generator=order)[:batch]
            loss = error({name: latent.dequantize() for name, latent in latents.items()}, picked)
            optimizer.zero_grad()
            (loss / max(before, SMALLEST)).backward()
            optimizer.step()
            schedule.step()
        frozen = {name: latent.freeze() for name, latent in latents.items()}
        after = judged(frozen)
    kept = frozen if after < before else solved
    flipped = {name: (weight.codes != solved[name].codes).float().mean().item() for name, weight in kept.items()}
    return Refined({name: weight.to("cpu") for name, weight in kept.items()}, flipped, before, min(before, after))


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of |found - wanted|² / |wanted|², both float32 [..., hidden]."""
    size = wanted.square().mean(-1).clamp_min(SMALLEST)
    return ((found - wanted).square().mean(-1) / size).mean()
