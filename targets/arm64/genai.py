"""The host's side of an onnx-genai artifact: the same graph that onnxruntime-genai loads, run by onnxruntime itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnxruntime

from bluelm.errors import InputError
from export.artifacts.artifact import Artifact
from export.onnx.debug import genai_stream
from targets.arm64.onnx import session_step
from targets.host.cached_runtime import Step
from targets.runtime import RuntimeBase


class GenaiRuntime(RuntimeBase):
    """Hands the present keys and values of one run to the next; a prompt goes in chunk by chunk."""

    def __init__(self, name: str, artifact: Artifact, prefill: Step, decode: Step) -> None:
        self.name = name
        self.vocab_size, self.context = artifact.model.vocab_size, artifact.context
        self._artifact, self._prefill, self._decode = artifact, prefill, decode
        self.reset()

    def reset(self) -> None:
        model = self._artifact.model
        empty = np.zeros((1, model.num_kv_heads, 0, model.head_dim), self._artifact.cache)
        self._past = {
            f"past_key_values.{layer}.{kind}": empty for layer in range(model.num_layers) for kind in ("key", "value")
        }
        self._held = 0

    def rewind(self, held: int) -> None:
        self._past = {name: past[:, :, :held] for name, past in self._past.items()}
        self._held = held

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        return np.concatenate([np.asarray(found["logits"])[0] for found in self._steps(tokens)])

    def blocks(self, tokens: Sequence[int]) -> np.ndarray:
        """Begin anew; the stream before the first block and behind each, float32 [layers + 1, n, hidden].

        Raises:
            InputError: the graph has no such outputs (a debug build gives them).
        """
        names = genai_stream(self._artifact.model)
        self.reset()
        streams: list[np.ndarray] = []
        for found in self._steps(tokens):
            if not set(names) <= set(found):
                raise InputError(f"{self.name} does not show its blocks", fix="open a debug build of it")
            streams.append(np.concatenate([found[name] for name in names]))
        return np.concatenate(streams, axis=1)

    def _steps(self, tokens: Sequence[int]) -> Iterator[Mapping[str, np.ndarray]]:
        """Outputs of one run a chunk; its keys and values are kept for the next."""
        self.check_tokens(tokens, self._held)
        for start in range(0, len(tokens), self._artifact.chunk):
            part = tokens[start : start + self._artifact.chunk]
            total = self._held + len(part)
            feeds = {
                "input_ids": np.array([part], np.int64),
                "attention_mask": np.ones((1, total), np.int64),
                **self._past,
            }
            found = (self._decode if len(part) == 1 else self._prefill)(feeds)
            self._past = {
                name.replace("present", "past_key_values"): np.asarray(value)
                for name, value in found.items()
                if name.startswith("present")
            }
            self._held = total
            yield found


def open_genai(artifact: Artifact) -> GenaiRuntime:
    """The graph in onnxruntime's CPU provider.

    Raises:
        InputError: the graph is damaged.
    """
    step = session_step(artifact.path("model"))
    return GenaiRuntime(f"{artifact.format} in onnxruntime {onnxruntime.__version__}", artifact, step, step)
