"""Activation ranges: which real interval each value of the decoder spans, found on calibration text.

The text walks through the lowered decoder block by block; one block is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from bluelm.errors import InputError
from bluelm.system.files import write_text
from bluelm.system.progress import Progress, Silent
from bluelm.system.reading import first_fault, read_record
from bluelm.weights import Weights
from compress.checkpoint.store import QuantizedCheckpoint
from export.lowering import decoder as lowered
from export.lowering.encoding import Bits, Encoding
from export.lowering.torch_ops import Parameters, Recorded, TorchOps

Bound = Annotated[float, Field(ge=-1e30, le=1e30)]
"""Of a range: finite, also as a float32 and widened."""
HEADROOM = 1.5
"""Ranges are widened by this factor. Half a bit of noise costs less than the rare text that leaves a tight
range: on the demo checkpoint the KL to float32 is 8e-6 at 1.0, 1.7e-6 at 1.1, 3e-7 at 1.25 and at 1.5, 5e-7
at 2."""
HEADROOM_8_BITS = 1.25
"""The same of an 8-bit cache, whose steps are 256 times as wide: on the demo checkpoint a KL of 5.3e-5 at 1.0,
7.3e-5 at 1.25, 1.2e-4 at 1.5, and 1.8e-4 at 0.8, where keys are cut off."""
LEAST_MASK = 100.0


class Ranges(BaseModel):
    """Least and greatest value seen on calibration text, by value name of the lowered decoder.

    Attributes:
        weights: digest of the weights that the values belong to.
        samples, length: calibration windows and tokens in each.
        activation_bits: width of the codes that span a range. Masked scores stay at 16: hidden ones are far below.
        cache_bits: the same of keys and values in the cache.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: str
    samples: int
    length: int
    values: dict[str, tuple[Bound, Bound]]
    headroom: Annotated[float, Field(gt=0, le=100)] = HEADROOM
    activation_bits: Bits = 16
    cache_bits: Bits = 16

    def encoding(self, name: str) -> Encoding:
        """Unsigned encoding of a value, uint16 or uint8.

        Raises:
            InputError: the value was never calibrated.
        """
        bits = 16 if name.endswith(".masked") else self.activation_bits
        return Encoding.of_range(*self._widened(name), bits)

    def cache_encoding(self, name: str) -> Encoding:
        """Signed encoding, int16 or int8, zero point 0, of keys or values in the cache.

        HTP multiplies two 16-bit activations at full width only if the second is signed and symmetric; of a
        uint16 one it drops the low byte (relative error 1e-2 instead of 2e-4, tried with QNN 2.49).
        """
        headroom = HEADROOM_8_BITS if self.cache_bits == 8 else self.headroom
        return Encoding.symmetric(*self._widened(name, headroom), self.cache_bits)

    @property
    def mask_value(self) -> float:
        """What is added to a hidden score: enough to push any below all that masked scores can hold."""
        depth = LEAST_MASK
        for name in self.values:
            if name.endswith(".masked"):
                scores = self._widened(name.removesuffix("shares.masked") + "scores")
                depth = max(depth, scores[1] - self._widened(name)[0])
        return -float(math.ceil(depth))

    def save(self, path: Path) -> None:
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Ranges:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, or is something else.
        """
        try:
            return Ranges.model_validate_json(read_record(path))
        except ValidationError as error:
            raise InputError(f"not a file of activation ranges: {first_fault(error)}", where=path) from None

    def _widened(self, name: str, headroom: float | None = None) -> tuple[float, float]:
        if name not in self.values:
            raise InputError(
                f"there is no activation range for {name!r}", fix="calibrate the ranges on this very model"
            )
        low, high = self.values[name]
        factor = self.headroom if headroom is None else headroom
        return low * factor, high * factor

    def check(self, quantized: QuantizedCheckpoint) -> None:
        """InputError unless the ranges were found on this quantized checkpoint."""
        if self.weights != quantized.digest():
            raise InputError(
                "the activation ranges belong to other weights",
                where=quantized.folder,
                fix="calibrate the ranges on this quantized checkpoint",
            )


def int8_cache(ranges: Ranges | None, quantized: QuantizedCheckpoint) -> Callable[[str], Encoding]:
    """The encoding of each cached value, `layers.N.keys` or `layers.N.values`, in 8 bits.

    Raises:
        InputError: no ranges, or another checkpoint's.
    """
    if ranges is None:
        raise InputError("an 8-bit KV cache needs activation ranges", fix="calibrate them first")
    ranges.check(quantized)
    return ranges.model_copy(update={"cache_bits": 8}).cache_encoding


class DigestedWeights(Weights, Protocol):
    """Weights that know their identity: a checkpoint, float or quantized."""

    def digest(self) -> str: ...


@torch.no_grad()
def calibrate(weights: DigestedWeights, tokens: Tensor, progress: Progress | None = None) -> Ranges:
    """Least and greatest of every value over `tokens`.

    Args:
        weights: what the artifact will compute with, so a quantized checkpoint's dequantized weights.
        tokens: int64 [n, length], the calibration windows.

    Memory: one block, and the hidden states of all windows [n, length, hidden] float32.

    Raises:
        InputError: no tokens, or activations that are not finite.
    """
    if tokens.numel() == 0:
        raise InputError("no calibration tokens to find activation ranges with")
    config, (count, length) = weights.config, tokens.shape
    recorded = Recorded()
    ops = TorchOps(Parameters(weights), config.rms_norm_eps, recorded)
    embedding = weights.embedding()
    hidden = [ops.input("hidden", embedding[row].unsqueeze(0)) for row in tokens]  # [1, length, hidden] each
    del embedding
    mask = causal_mask(length)
    rotary = lowered.rotary_factors(ops, config, torch.arange(length), length)
    with (progress or Silent()).task("activation ranges", config.num_layers + 1) as task:
        for layer in range(config.num_layers):
            task.advance(note=f"block {layer}")
            for index in range(count):
                hidden[index], _ = lowered.block(ops, config, layer, hidden[index], rotary, mask, None)
        task.advance(note="head")
        for row in hidden:
            lowered.head(ops, row)
    _check_finite(recorded.seen)
    return Ranges(weights=weights.digest(), samples=count, length=length, values=recorded.seen)


def causal_mask(length: int) -> Tensor:
    """Additive float32 [1, 1, length, length]: 0 on and below the diagonal."""
    return torch.full((length, length), -LEAST_MASK).triu(1)[None, None]


def _check_finite(seen: dict[str, tuple[float, float]]) -> None:
    for name, (low, high) in seen.items():
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise InputError(
                f"the activation {name!r} is not finite on the calibration text", fix="check the checkpoint"
            )
