"""Torch as a runtime: the float reference, the dequantized model, and twins that round as artifacts do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from bluelm.config import ModelConfig
from bluelm.model import Decoder, KVCache
from bluelm.weights import Weights
from export.lowering import decoder as lowered
from export.lowering.decoder import KeysValues
from export.lowering.ranges import Ranges
from export.lowering.torch_ops import Parameters, Rounded, TorchOps
from targets.host.rounding import RoundedCache, Rounding, rounding_inputs
from targets.runtime import RuntimeBase


class TorchRuntime(RuntimeBase):
    """The decoder of `bluelm/model.py` in float32, the whole model in memory."""

    def __init__(self, weights: Weights, context: int = 512) -> None:
        self.name = "float32 torch"
        self.vocab_size = weights.config.vocab_size
        self.context = context
        self._decoder = Decoder.from_weights(weights)
        self._cache = KVCache(weights.config, context)

    @property
    def weights(self) -> Loaded:
        """What it holds."""
        return Loaded(self._decoder)

    def reset(self) -> None:
        self._cache.reset()

    def rewind(self, held: int) -> None:
        self._cache.length = held

    def seek(self, position: int) -> None:
        """Forget all tokens; the next stands at `position`, and sees none before it."""
        self._cache.seek(position)

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        self.check_tokens(tokens, self._cache.length)
        return self._decoder(torch.tensor([list(tokens)]), self._cache)[0].numpy()

    @contextmanager
    def reading(self, change: Rounding, cache: type[KVCache]) -> Iterator[None]:
        """Linears read `change` of their inputs, and the cache is of another kind, for as long as the context lasts."""
        kept, self._cache = self._cache, cache(self._decoder.config, self.context)
        try:
            with rounding_inputs(self._decoder, change):
                yield
        finally:
            self._cache = kept

    def blocks(self, tokens: Sequence[int]) -> np.ndarray:
        """Begin anew; the stream before the first block and behind each, float32 [layers + 1, n, hidden]."""
        self.reset()
        stream: list[Tensor] = []
        shown = (self._decoder.embed, *self._decoder.blocks)
        hooks = [module.register_forward_hook(lambda *call: stream.append(call[2])) for module in shown]
        try:
            self.prefill(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(stream).numpy()


class Loaded:
    """A `Weights` of what a decoder holds: nothing is copied or read again."""

    def __init__(self, decoder: Decoder) -> None:
        self.config: ModelConfig = decoder.config
        self._decoder = decoder

    def block(self, index: int) -> dict[str, Tensor]:
        return dict(self._decoder.blocks[index].state_dict())

    def embedding(self) -> Tensor:
        return self._decoder.embed.weight

    def final_norm(self) -> Tensor:
        return self._decoder.norm.weight

    def head(self) -> Tensor:
        return self._decoder.head.weight


class RoundingRuntime(TorchRuntime):
    """The weights of another runtime, not copied, every linear reading rounded inputs over a rounded cache."""

    def __init__(self, exact: TorchRuntime, inputs: Rounding | None, cached: Rounding | None) -> None:
        self.name = f"{exact.name}, rounded"
        self.vocab_size, self.context, self._decoder = exact.vocab_size, exact.context, exact._decoder
        self._inputs = inputs
        cache = RoundedCache(self._decoder.config, self.context)
        cache.rounding = cached
        self._cache = cache

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        with nullcontext() if self._inputs is None else rounding_inputs(self._decoder, self._inputs):
            return super().prefill(tokens)


class LoweredRuntime(RuntimeBase):
    """The lowered decoder in torch, by any `TorchOps`.

    Args:
        mask_value: what is added to a hidden score.
    """

    def __init__(self, name: str, weights: Weights, ops: TorchOps, mask_value: float, context: int) -> None:
        self.name, self.context = name, context
        self._config, self._ops, self._mask = weights.config, ops, mask_value
        self.vocab_size = self._config.vocab_size
        self._embedding = weights.embedding()
        self._first = 0  # slots before it are empty, and nothing sees them
        self._past: list[KeysValues[Tensor]] | None = None

    def reset(self) -> None:
        self.seek(0)

    def seek(self, position: int) -> None:
        """Forget all tokens; the next stands at `position`, and sees none before it."""
        self._first, self._past = position, None

    def rewind(self, held: int) -> None:
        past, kept = self._past or [], held - self._first
        self._past = [KeysValues(p.keys[..., :kept], p.values[:, :, :kept]) for p in past] if kept > 0 else None

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        held = 0 if self._past is None else self._past[0].values.shape[2]
        self.check_tokens(tokens, self._first + held)
        count = len(tokens)
        hidden = self._ops.input("hidden", self._embedding[list(tokens)].unsqueeze(0))  # [1, T, hidden]
        mask = torch.zeros(1, 1, count, held + count)
        mask[..., held:] = torch.full((count, count), self._mask).triu(1)
        positions = torch.arange(held, held + count) + self._first
        past = self._past or [None] * self._config.num_layers
        logits, new = lowered.decoder(self._ops, self._config, hidden, positions, mask, past, self.context)
        self._past = [_extended(old, added) for old, added in zip(past, new, strict=True)]
        return logits[0].numpy()


class TwinRuntime(LoweredRuntime):
    """The lowered decoder with every activation, gamma, table and cached key rounded to 16 bits.

    What an NPU artifact of the same checkpoint and ranges computes, but for the compiler's own arithmetic.
    """

    def __init__(self, weights: Weights, ranges: Ranges, context: int = 512) -> None:
        ops = TorchOps(Parameters(weights, keep=True), weights.config.rms_norm_eps, Rounded(ranges))
        super().__init__("16-bit twin in torch", weights, ops, rounded_mask(ranges), context)


def rounded_mask(ranges: Ranges) -> float:
    """What hides a score, as the 16 bits of an NPU artifact hold it."""
    return Rounded(ranges).constant(torch.tensor([ranges.mask_value, 0.0]))[0].item()


def _extended(past: KeysValues[Tensor] | None, new: KeysValues[Tensor]) -> KeysValues[Tensor]:
    """The cache with the step's own keys and values behind it."""
    if past is None:
        return new
    return KeysValues(torch.cat([past.keys, new.keys], 3), torch.cat([past.values, new.values], 2))
