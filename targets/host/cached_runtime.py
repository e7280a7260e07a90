"""The host's side of an ONNX artifact: embedding lookup, KV cache, mask, prefill in chunks, decode."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from bluelm.errors import InputError
from export.artifacts.artifact import Artifact
from export.artifacts.embedding import EmbeddingTable
from export.lowering.decoder import block_output
from targets.runtime import RuntimeBase

Feeds = dict[str, np.ndarray]
Step = Callable[[Feeds], Mapping[str, np.ndarray]]
"""Runs a graph of `export/onnx/decoder.py`: inputs by name, of which it takes its own, to outputs by name."""


def chain(steps: Sequence[Step]) -> Step:
    """One step of a model in parts: each part sees what came in and what the parts before it gave."""

    def run(feeds: Feeds) -> Mapping[str, np.ndarray]:
        outputs: Feeds = {}
        for step in steps:
            outputs |= step({**feeds, **outputs})
        return outputs

    return run


class CachedRuntime(RuntimeBase):
    """Drives the two graphs of an artifact.

    Tokens beyond the end of a chunk are padding: they stand behind the real ones, so no real token sees
    them, and what they leave is not stored. The prefill graph has room for C - T past slots; a chunk that
    would begin further on is moved back over tokens that are cached already and computes them again, to the
    same values.
    """

    def __init__(self, name: str, artifact: Artifact, prefill: Step, decode: Step) -> None:
        self.name = name
        self.vocab_size = artifact.model.vocab_size
        self.context = artifact.context
        self._artifact = artifact
        self._embedding = EmbeddingTable.open(artifact.path("embedding"))
        self._steps = {artifact.chunk: prefill, 1: decode}
        self._tokens: list[int] = []
        self._first = 0  # slots before it are empty, and the mask hides them
        self._stream: list[np.ndarray] | None = None  # what `blocks` collects
        model, dtype = artifact.model, np.dtype(artifact.cache)
        heads, size = model.num_kv_heads, model.head_dim
        self._keys = [np.zeros((1, heads, size, self.context), dtype) for _ in range(model.num_layers)]
        self._values = [np.zeros((1, heads, self.context, size), dtype) for _ in range(model.num_layers)]

    def reset(self) -> None:
        self.seek(0)

    def seek(self, position: int) -> None:
        """Forget all tokens; the next stands at `position`, and sees none before it."""
        self._first, self._tokens = position, [0] * position

    def rewind(self, held: int) -> None:
        del self._tokens[held:]

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        self.check_tokens(tokens, len(self._tokens))
        rows: list[np.ndarray] = []
        done = 0
        while done < len(tokens):
            count = min(self._artifact.chunk, len(tokens) - done)
            width = 1 if count == 1 else self._artifact.chunk
            rows.append(self._advance(list(tokens[done : done + count]), width))
            done += count
        return np.concatenate(rows)

    def blocks(self, tokens: Sequence[int]) -> np.ndarray:
        """Begin anew; the stream before the first block and behind each, float32 [layers + 1, n, hidden].

        Raises:
            InputError: the graphs have no such outputs (a debug build gives them).
        """
        self.reset()
        self._stream = []
        try:
            self.prefill(tokens)
            return np.concatenate(self._stream, axis=1)
        finally:
            self._stream = None

    def values(self, tokens: Sequence[int], names: Collection[str]) -> dict[str, np.ndarray]:
        """Begin anew; those of the named values that a debug build shows, each [1, ..., chunk, ...], pads included.

        Raises:
            InputError: more tokens than a chunk.
        """
        self.reset()
        width = self._artifact.chunk
        self.check_tokens(tokens, self.context - width)
        outputs = self._steps[width](self._feeds(0, list(tokens), width))
        return {name: np.asarray(outputs[name]) for name in names if name in outputs}

    def run(self, feeds: Feeds) -> Mapping[str, np.ndarray]:
        """Outputs by name of the graph that takes as many rows as `feeds["hidden"]` [1, rows, hidden] has.

        Nothing is kept: caches are what `feeds` says.
        """
        return self._steps[feeds["hidden"].shape[1]](feeds)

    def _advance(self, tokens: list[int], width: int) -> np.ndarray:
        """Run one step of `width` rows that ends in `tokens`; float32 [tokens, vocab]."""
        held = len(self._tokens)
        start = min(held, self.context - width)  # moved back if the past slots end before `held`
        again = self._tokens[start:]
        real = again + tokens
        feeds = self._feeds(start, real, width)
        outputs = self._steps[width](feeds)
        if self._stream is not None:
            self._stream.append(self._seen(feeds, outputs)[:, len(again) : len(real)])
        stop = start + len(real)
        for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            keys[..., start:stop] = outputs[f"keys.{layer}"][..., : len(real)]
            values[:, :, start:stop] = outputs[f"values.{layer}"][:, :, : len(real)]
        self._tokens += tokens
        return np.array(outputs["logits"][0, len(again) : len(real)], np.float32)

    def _seen(self, feeds: Feeds, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The stream of one step of a debug build, float32 [layers + 1, width, hidden]."""
        names = [block_output(layer) for layer in range(self._artifact.model.num_layers)]
        if names[0] not in outputs:
            raise InputError(f"{self.name} does not show its blocks", fix="open a debug build of it")
        return np.concatenate([feeds["hidden"], *(outputs[name] for name in names)])

    def _feeds(self, start: int, tokens: list[int], width: int) -> Feeds:
        """Inputs of a step of `width` rows whose first token has position `start`."""
        hidden = np.zeros((1, width, self._artifact.model.hidden_size), np.float32)
        hidden[0, : len(tokens)] = self._embedding.rows(tokens)
        slots = self.context - width
        feeds: Feeds = {
            "hidden": hidden,
            "positions": np.minimum(np.arange(start, start + width), self.context - 1).astype(np.int32),
            "mask": step_mask(start, width, self.context, self._artifact.mask_value, self._first),
        }
        for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            if slots == 0:
                break
            feeds[f"past_keys.{layer}"] = np.ascontiguousarray(keys[..., :slots])
            feeds[f"past_values.{layer}"] = np.ascontiguousarray(values[:, :, :slots])
        return feeds


def step_mask(past: int, width: int, context: int, hidden: float, first: int = 0) -> np.ndarray:
    """Additive float32 [1, 1, width, context]: `past` filled slots, empty ones, the step's own tokens.

    Args:
        first: position of the first token that there is; what stands before it is hidden from it and those behind.
    """
    mask = np.full((width, context), hidden, np.float32)
    mask[:, first:past] = 0
    own = mask[:, context - width :]
    own[:] = np.triu(np.full((width, width), hidden, np.float32), 1)
    absent = max(0, first - past)
    own[absent:, :absent] = hidden
    return mask[None, None]
