"""LiteRT-LM's graph on this machine's CPU, its cache inside: XNNPACK's kernels, by ai-edge-litert's interpreter."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from bluelm.errors import InputError
from export.artifacts.artifact import Artifact
from export.litert_lm import graph
from export.litert_lm.judged import LOGITS, write_judged
from export.lowering.decoder import block_output
from targets.arm64.litert import signature_steps
from targets.host.cached_runtime import Feeds, Step
from targets.runtime import RuntimeBase

UNSEEN = -1e9
"""Added to a score by this host, as LiteRT-LM adds its own: a mask is no part of the file."""
MODEL = "model.tflite"


class LitertLmRuntime(RuntimeBase):
    """Hands the caches of one step to the next, as LiteRT-LM does.

    Tokens behind a chunk's last one are padding: they stand behind the real ones, so no real token sees them, and the
    slots that they leave are written again before one is seen.
    """

    def __init__(self, name: str, artifact: Artifact, prefill: Step, decode: Step) -> None:
        self.name = name
        self.vocab_size, self.context = artifact.model.vocab_size, artifact.context
        self._artifact = artifact
        self._steps = {1: decode, artifact.chunk: prefill} if artifact.chunk > 1 else {1: decode}
        self._slots = graph.slots(artifact.context, artifact.chunk)
        self.reset()

    def reset(self) -> None:
        self.seek(0)

    def seek(self, position: int) -> None:
        """Forget all tokens; the next stands at `position`, and sees none before it."""
        model = self._artifact.model
        heads, size = model.num_kv_heads, model.head_dim
        shapes = {graph.KEYS: (1, heads, size, self._slots), graph.VALUES: (1, heads, self._slots, size)}
        self._caches: dict[str, np.ndarray] = {
            f"{kind}{layer}": np.zeros(shape, np.float32)
            for layer in range(model.num_layers)
            for kind, shape in shapes.items()
        }
        self._first = self._held = position

    def rewind(self, held: int) -> None:
        self._held = held

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        return np.concatenate([np.asarray(found[LOGITS])[0, :count] for found, count in self._run(tokens)])

    def blocks(self, tokens: Sequence[int]) -> np.ndarray:
        """Begin anew; the stream before the first block and behind each, float32 [layers + 1, n, hidden].

        Raises:
            InputError: the graphs have no such outputs (a debug build gives them).
        """
        names = [graph.HIDDEN, *(block_output(layer) for layer in range(self._artifact.model.num_layers))]
        self.reset()
        streams: list[np.ndarray] = []
        for found, count in self._run(tokens):
            if not set(names) <= set(found):
                raise InputError(f"{self.name} does not show its blocks", fix="open a debug build of it")
            shown = [np.asarray(found[name]).reshape(-1, self._artifact.model.hidden_size) for name in names]
            streams.append(np.stack([rows[:count] for rows in shown]))
        return np.concatenate(streams, axis=1)

    def values(self, tokens: Sequence[int], names: Collection[str]) -> dict[str, np.ndarray]:
        """Begin anew; those of the named values that a debug build shows, each [1, ..., chunk, ...], pads included.

        Raises:
            InputError: more tokens than a chunk.
        """
        self.reset()
        self.check_tokens(tokens, self.context - self._artifact.chunk)
        outputs = self._steps[self._artifact.chunk](self._feeds(list(tokens), self._artifact.chunk))
        return {name: np.asarray(outputs[name]) for name in names if name in outputs}

    def _run(self, tokens: Sequence[int]) -> list[tuple[Mapping[str, np.ndarray], int]]:
        """Outputs of one step a chunk, and how many tokens were in it."""
        self.check_tokens(tokens, self._held)
        found: list[tuple[Mapping[str, np.ndarray], int]] = []
        for start in range(0, len(tokens), self._artifact.chunk):
            part = list(tokens[start : start + self._artifact.chunk])
            width = 1 if len(part) == 1 else self._artifact.chunk
            outputs = self._steps[width](self._feeds(part, width))
            self._caches = {name: np.asarray(outputs[name]) for name in self._caches}
            self._held += len(part)
            found.append(({name: value for name, value in outputs.items() if name not in self._caches}, len(part)))
        return found

    def _feeds(self, tokens: list[int], width: int) -> Feeds:
        """Inputs of a step of `width` tokens that begins with these."""
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(tokens)] = tokens
        places = np.zeros(width, np.int32)
        places[: len(tokens)] = np.arange(self._held, self._held + len(tokens))
        at, slots = np.arange(self._held, self._held + width)[:, None], np.arange(self._slots)[None]
        seen = (slots <= at) & (slots >= self._first)
        mask = np.where(seen, np.float32(0), np.float32(UNSEEN))[None, None]
        return {"tokens": padded, "input_pos": places, "mask": mask, **self._caches}


def open_litert_lm(artifact: Artifact) -> LitertLmRuntime:
    """Both signatures in one interpreter.

    Raises:
        InputError: the file is damaged.
    """
    name = f"litert-lm in ai-edge-litert {version('ai-edge-litert')}"
    return LitertLmRuntime(name, artifact, *steps(artifact.path("model"), artifact.model.num_layers))


def steps(model: Path, blocks: int) -> tuple[Step, Step]:
    """(prefill, decode) of a .litertlm of so many blocks."""
    with tempfile.TemporaryDirectory(prefix="bluelm-litert-lm-") as scratch:  # it is mapped, and then has no name
        target = Path(scratch) / MODEL
        return signature_steps(target, names=(write_judged(model, target, blocks), graph.DECODE))
