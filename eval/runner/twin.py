"""llama.cpp's arithmetic on a CPU, in torch: what it costs with this model, and so how far its answers may differ.

Linears read activations rounded to int8 in blocks of 32, each with a float16 scale (ggml's `block_q8_0`: d = max|x| /
127, q = round(x / d)), and the cache is float16. An activation between two codes is rounded to one or the other
depending on the order of a sum, and the effect grows from block to block: two sound computations differ as much from
each other as each does from the exact one. So the twin says how far answers may differ, not which they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bluelm.model import KVCache
from eval.accuracy import arithmetic, metrics
from eval.accuracy.positions import Allowance
from eval.accuracy.twins import twin_of
from export.artifacts.artifact import Artifact
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import Runtime, natural

BLOCK, LARGEST = 32, 127
FACTOR = 5.0  # of few positions' mean and maximum against those of others as many (benchmarks/interop/runners.md)


class HalfCache(KVCache):
    """Keys and values rounded to float16."""

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return super().extend(layer, keys.half().float(), values.half().float())


def to_blocks(x: Tensor) -> Tensor:
    """x float32 [..., n] as int8 codes times a float16 scale for every 32 columns."""
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True) / LARGEST
    codes = torch.round(blocks / scales.clamp_min(torch.finfo(torch.float32).tiny))
    return (codes * scales.half().float()).reshape(x.shape)


def allowance(weights: TorchRuntime, prompts: Sequence[Sequence[int]], last: int) -> Allowance:
    """What such arithmetic may cost behind the last `last` tokens of each prompt, from what it costs the twin there."""
    exact = [_answers(weights, tokens, last) for tokens in prompts]
    with weights.reading(to_blocks, HalfCache):
        return _beside(exact, [_answers(weights, tokens, last) for tokens in prompts])


def of_format(artifact: Artifact, weights: TorchRuntime, prompts: Sequence[Sequence[int]], last: int) -> Allowance:
    """The same of a program that computes as the format's own runtime does."""
    twin = twin_of(artifact, natural(artifact.format))
    if twin is None:
        return arithmetic.allowance(artifact)
    plain, rounded = ([_answers(one, tokens, last) for tokens in prompts] for one in twin.pair(weights))
    return _beside(plain, rounded) + arithmetic.allowed("float32", "float32")


def _beside(exact: Sequence[NDArray[np.float64]], rounded: Sequence[NDArray[np.float64]]) -> Allowance:
    kl = np.concatenate([metrics.kl_divergence(a, b) for a, b in zip(exact, rounded, strict=True)])
    mean, largest = FACTOR * float(kl.mean()), FACTOR * float(kl.max())
    return Allowance(mean, largest, mean)


def _answers(runtime: Runtime, tokens: Sequence[int], last: int) -> NDArray[np.float64]:
    """Log-probabilities [last, vocab]."""
    return metrics.log_softmax(runtime.logits(tokens)[-last:])
