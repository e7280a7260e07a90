"""Torch as a runtime: the float reference, the dequantized model, and the twin of the NPU artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from bluelm.model import Decoder, KVCache
from bluelm.weights import Weights
from export.lowering import decoder as lowered
from export.lowering.decoder import KeysValues
from export.lowering.ranges import Ranges
from export.lowering.torch_ops import Parameters, Rounded, TorchOps
from targets.runtime import RuntimeBase


class TorchRuntime(RuntimeBase):
    """The decoder of `bluelm/model.py` in float32, the whole model in memory."""

    def __init__(self, weights: Weights, context: int = 512) -> None:
        self.name = "float32 torch"
        self.vocab_size = weights.config.vocab_size
        self.context = context
        self._decoder = Decoder.from_weights(weights)
        self._cache = KVCache(weights.config, context)

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
    def reading(self, change: Callable[[Tensor], Tensor], cache: type[KVCache]) -> Iterator[None]:
        """Linears read `change` of their inputs, and the cache is of another kind, for as long as the context lasts."""
        kept, self._cache = self._cache, cache(self._decoder.config, self.context)
        linears = [module for module in self._decoder.modules() if isinstance(module, nn.Linear)]
        hooks = [one.register_forward_pre_hook(lambda _, read: (change(read[0]),)) for one in linears]
        try:
            yield
        finally:
            self._cache = kept
            for hook in hooks:
                hook.remove()

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


class TwinRuntime(RuntimeBase):
    """The lowered decoder in torch with every activation, gamma, table and cached key rounded to 16 bits.

    What an NPU artifact of the same checkpoint and ranges computes, but for the compiler's own arithmetic.
    """

    def __init__(self, weights: Weights, ranges: Ranges, context: int = 512) -> None:
        config = weights.config
        self.name = "16-bit twin in torch"
        self.vocab_size = config.vocab_size
        self.context = context
        self._config, self._mask_value = config, ranges.mask_value
        self._ops = TorchOps(Parameters(weights, keep=True), config.rms_norm_eps, Rounded(ranges))
        self._embedding = weights.embedding()
        self._mask = Rounded(ranges).constant(torch.tensor([ranges.mask_value, 0.0]))[0].item()
        self._past: list[KeysValues[Tensor]] | None = None

    def reset(self) -> None:
        self._past = None

    def rewind(self, held: int) -> None:
        past = self._past or []
        self._past = [KeysValues(p.keys[..., :held], p.values[:, :, :held]) for p in past] if held else None

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        held = 0 if self._past is None else self._past[0].values.shape[2]
        self.check_tokens(tokens, held)
        count = len(tokens)
        hidden = self._ops.input("hidden", self._embedding[list(tokens)].unsqueeze(0))  # [1, T, hidden]
        mask = torch.zeros(1, 1, count, held + count)
        mask[..., held:] = torch.full((count, count), self._mask).triu(1)
        positions = torch.arange(held, held + count)
        past = self._past or [None] * self._config.num_layers
        logits, new = lowered.decoder(self._ops, self._config, hidden, positions, mask, past, self.context)
        self._past = [_extended(old, added) for old, added in zip(past, new, strict=True)]
        return logits[0].numpy()


def _extended(past: KeysValues[Tensor] | None, new: KeysValues[Tensor]) -> KeysValues[Tensor]:
    """The cache with the step's own keys and values behind it."""
    if past is None:
        return new
    return KeysValues(torch.cat([past.keys, new.keys], 3), torch.cat([past.values, new.values], 2))
