"""Looks for the first fault of an artifact, from the embedding to the decode graph."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from bluelm.weights import Weights
from compress.checkpoint.store import EMBED, QuantizedCheckpoint
from compress.methods.rotate import as_quantized
from eval.accuracy import judge
from eval.accuracy.arithmetic import RANGE
from eval.accuracy.bisect import Cause, FirstFault, apart, block_values, costliest_tensor, first_apart, probe_names
from eval.accuracy.compare import BlockErrors, local_errors, weights_steps
from eval.accuracy.metrics import kl_of_logits
from eval.accuracy.twins import Twin, twin_of
from export.artifacts.artifact import Artifact, source_of
from export.lowering.ranges import Ranges
from export.readback import differing, listed, readable, weight_names
from targets.block_outputs import ValueRuntime, open_blocks
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import Place, open_runtime

FORGETS = 1e-3  # nats a token between decoding and one prefill, and what rounding costs the artifact's twin
DECODED = 4
HALF = 0.5  # of an error: with so much of it, one part is held to account


@dataclass(frozen=True)
class Bisection:
    """One artifact, and what it is held against.

    Attributes:
        checkpoint: the float model; None where it is not at hand.
        tokens: a text that fits one chunk.
        scratch: an empty folder for debug builds.
    """

    artifact: Artifact
    on: Place
    quantized: QuantizedCheckpoint
    checkpoint: Checkpoint | None
    tokens: Sequence[int]
    scratch: Path

    def find(self) -> FirstFault | None:
        """The first fault; None if nothing is beyond what is expected.

        Raises:
            InputError: the artifact cannot show its blocks.
        """
        if self.artifact.quantized_digest != self.quantized.digest():
            raise InputError(
                "the artifact was made from another quantized checkpoint than lies beside it",
                where=self.artifact.folder,
                fix="run it again",
            )
        return self._closed() or self._table() or self._blocks() or self._head() or self._decode() or self._rounding()

    def _closed(self) -> FirstFault | None:
        """The first weight that is another, where only the files can tell."""
        if self.artifact.record.inside or not self._wrong:
            return None
        name = self._wrong[0]
        layer = name.split(".")[2] if name.startswith("model.layers.") else None
        place = f"block {layer}" if layer is not None else "embedding" if name == EMBED else "head"
        cause, why = self._held_to_account(name, None, 0.0)
        return FirstFault(place, name, self._answers_apart(), self._largest, cause, why)

    def _answers_apart(self) -> float:
        """Relative error of the logits on the artifact's own last stream (of a closed format: its weights' stream)."""
        with open_runtime(self.artifact.folder, self.on) as runtime:
            logits = runtime.logits(self.tokens)
        last = torch.from_numpy(np.ascontiguousarray(self._stream[-1]))  # [n, hidden]
        unit = last * torch.rsqrt(last.pow(2).mean(-1, keepdim=True) + self.quantized.config.rms_norm_eps)
        expected = (unit * self.quantized.final_norm()) @ self.quantized.head().T  # [n, vocab]
        return apart(expected.numpy(), logits)

    def _table(self) -> FirstFault | None:
        """The rows of the embedding."""
        rows = self.quantized.embedding()[list(self.tokens)].numpy()
        error, limit = apart(rows, self._stream[0]), max(self._largest, 1e-6)
        if error <= limit:
            return None
        return FirstFault("embedding", EMBED, error, limit, *self._held_to_account(EMBED, None, 0.0))

    def _blocks(self) -> FirstFault | None:
        """The first block beyond what its runtime may cost, and the first value in it."""
        layer = self._errors.first_outside
        if layer is None:
            return None
        limit = self._errors.expected[layer]
        start = self._stream[layer]
        expected = block_values(self.quantized, layer, start, self.artifact.context)
        found = first_apart(self.artifact.model, expected, self._values(layer), layer, limit)
        if found is None:
            wrong = [name for name in self._wrong if name.startswith(f"model.layers.{layer}.")]
            tensor = wrong[0] if wrong else f"model.layers.{layer}"
            return FirstFault(
                f"block {layer}", tensor, self._errors.errors[layer], limit, *self._held_to_account(tensor, None, 0.0)
            )
        value, made_by, error = found
        tensor = f"model.layers.{layer}.{made_by}" if "." in made_by or made_by.endswith("norm") else made_by
        cause = self._held_to_account(tensor, self._rounded(layer, value, expected), error)
        return FirstFault(f"block {layer}", tensor, error, limit, *cause)

    def _head(self) -> FirstFault | None:
        """Last norm and head, on the artifact's own last stream; of a compiled artifact, all of it."""
        error, limit = self._answers_apart(), max(self._largest, 1e-5)
        if error <= limit:
            return None
        if self._shown is not self.artifact or not self.artifact.record.inside:
            compiled = self._shown is not self.artifact
            why = "its graphs do better before compiling" if compiled else "this format is looked at as a whole"
            return FirstFault("the whole artifact", "logits", error, limit, "runtime", why)
        return FirstFault("head", "lm_head", error, limit, *self._held_to_account("lm_head", None, 0.0))

    def _decode(self) -> FirstFault | None:
        """Token by token against one prefill."""
        with open_runtime(self.artifact.folder, self.on) as runtime:
            steps = min(DECODED, len(self.tokens) - 1)
            kl, _ = judge.prefill_decode(runtime, self.tokens, steps, "")
        limit = FORGETS + self._rounding_costs()
        if kl.value <= limit:
            return None
        why = f"{kl.value:.2g} nats a token from a prefill of the same text: it forgets or misplaces the cache"
        return FirstFault("decode", "keys and values", kl.value, limit, "runtime", why)

    def _rounding_costs(self) -> float:
        """Nats a token that rounding as the artifact's runtime does may cost its own weights."""
        if self._twin is None:
            return 0.0
        plain, rounded = self._twin.pair(TorchRuntime(self.quantized, self.artifact.context))
        return RANGE * float(kl_of_logits(plain.logits(self.tokens), rounded.logits(self.tokens)).mean())

    def _rounding(self) -> FirstFault | None:
        """Where rounding the weights cost more than in other blocks: the artifact is what its weights say."""
        if self.checkpoint is None:
            return None
        exact = as_quantized(self.checkpoint, self.quantized.recipe)
        errors = local_errors(exact, self._stream, self.artifact.context, self._kinds("float"), False, self._twin)
        layer = errors.first_outside
        if layer is None:
            return None
        x, context = self._stream[layer], self.artifact.context
        name, alone, together = costliest_tensor(exact, self.quantized, layer, x, context)
        why = f"the artifact computes what its weights say; rounding this one alone costs {alone:.2e} of {together:.2e}"
        tensor = f"model.layers.{layer}.{name}"
        return FirstFault(f"block {layer}", tensor, errors.errors[layer], errors.expected[layer], "weights", why)

    def _held_to_account(self, tensor: str, rounded: float | None, error: float) -> tuple[Cause, str]:
        """Who made a tensor's values wrong.

        Args:
            rounded: the error that rounding activations alone gives there; None where they are not rounded.
        """
        if tensor in self._wrong:
            wrong = [tensor, *(name for name in self._wrong if name != tensor)]
            return "weights", f"the artifact holds other codes or scales in {listed(wrong)}"
        if rounded is not None and rounded >= HALF * error:
            return "activations", f"rounding them to the artifact's ranges costs {rounded:.2e} in torch"
        return "runtime", "codes and scales are the checkpoint's" if self._readable else "nothing else is left"

    def _rounded(self, layer: int, value: str, expected: dict[str, np.ndarray]) -> float | None:
        """The error that rounding activations alone gives a value."""
        held = self._shown
        if held.record.ranges != "always":
            return None
        ranges = Ranges.load(held.path("ranges"))
        there = block_values(self.quantized, layer, self._stream[layer], self.artifact.context, ranges)
        return apart(expected[value], there[value])

    @cached_property
    def _shown(self) -> Artifact:
        """The artifact whose values can be seen: a compiled one's source."""
        return source_of(self.artifact) if self.artifact.record.blocks == "source" else self.artifact

    @cached_property
    def _wrong(self) -> list[str]:
        shown = differing(self._shown, self.quantized)
        compiled = [] if self._shown is self.artifact else differing(self.artifact, self.quantized)
        held = weight_names(self.quantized)
        return [name for name in dict.fromkeys([*shown, *compiled]) if name in held]

    @cached_property
    def _readable(self) -> bool:
        return readable(self._shown)

    @cached_property
    def _seen(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The stream, and every block's values where the format shows them."""
        if not self.artifact.record.inside:
            return weights_steps(self.quantized, self.artifact.context)(self.tokens), {}
        layers = range(self.artifact.model.num_layers)
        names = [name for layer in layers for name in probe_names(self.artifact.model, layer)]
        with ExitStack() as stack:
            runtime = stack.enter_context(open_blocks(self.artifact, self.on, self.scratch, names))
            stream = runtime.blocks(list(self.tokens))
            values = runtime.values(list(self.tokens), names) if isinstance(runtime, ValueRuntime) else {}
        return stream, values

    @property
    def _stream(self) -> np.ndarray:
        return self._seen[0]

    def _values(self, layer: int) -> dict[str, np.ndarray]:
        names = set(probe_names(self.artifact.model, layer))
        return {name: value for name, value in self._seen[1].items() if name in names}

    @cached_property
    def _errors(self) -> BlockErrors:
        """Of blocks against the artifact's own weights."""
        weights: Weights = self.quantized
        return local_errors(weights, self._stream, self.artifact.context, self._kinds("dequantized"), True, self._twin)

    @cached_property
    def _twin(self) -> Twin | None:
        """What rounds as its runtime does; None where calibrated ranges decide, which are on trial here."""
        return None if self.artifact.record.ranges == "always" else twin_of(self.artifact, self.on)

    @property
    def _largest(self) -> float:
        """The largest error that is expected of any block."""
        return max(self._errors.expected)

    def _kinds(self, reference: str) -> tuple[str, str]:
        return self._shown.format, reference
