"""onnx-genai artifacts on this machine: the same graph that onnxruntime-genai loads, run by
onnxruntime itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime

from bluelm.errors import InputError
from export.artifact import Artifact
from export.debug import genai_stream
from targets.ort_errors import ORT_ERRORS
from targets.runtime import RuntimeBase


class GenaiRuntime(RuntimeBase):
    """Hands the present keys and values of one run to the next."""

    def __init__(self, artifact: Artifact, session: onnxruntime.InferenceSession) -> None:
        self.name = f"{artifact.format} in onnxruntime {onnxruntime.__version__}"
        self.vocab_size, self.context = artifact.model.vocab_size, artifact.context
        self._session, self._model = session, artifact.model
        self._outputs = [output.name for output in session.get_outputs()]
        self.reset()

    def reset(self) -> None:
        model = self._model
        empty = np.zeros((1, model.num_kv_heads, 0, model.head_dim), np.float32)
        self._past = {
            f"past_key_values.{layer}.{kind}": empty for layer in range(model.num_layers) for kind in ("key", "value")
        }
        self._held = 0

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        return self._step(tokens)["logits"][0]

    def blocks(self, tokens: Sequence[int]) -> np.ndarray:
        """Begin anew; the stream before the first block and behind each, float32 [layers + 1, n, hidden].

        Raises:
            InputError: the graph has no such outputs (`export/debug.py` gives them).
        """
        names = genai_stream(self._model.num_layers)
        if not set(names) <= set(self._outputs):
            raise InputError(f"{self.name} does not show its blocks", fix="open a debug build of it")
        self.reset()
        found = self._step(tokens)
        return np.concatenate([found[name] for name in names])

    def _step(self, tokens: Sequence[int]) -> dict[str, np.ndarray]:
        """Outputs of one run; its keys and values are kept for the next."""
        self.check_tokens(tokens, self._held)
        total = self._held + len(tokens)
        feeds = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            **self._past,
        }
        values = self._session.run(self._outputs, feeds)
        found = {name: np.asarray(value) for name, value in zip(self._outputs, values, strict=True)}
        self._past = {
            name.replace("present", "past_key_values"): value
            for name, value in found.items()
            if name.startswith("present")
        }
        self._held = total
        return found


def open_genai(artifact: Artifact) -> GenaiRuntime:
    """The graph in onnxruntime's CPU provider.

    Raises:
        InputError: the graph is damaged.
    """
    path = artifact.path("model")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        raise InputError(f"onnxruntime cannot load the graph: {error}", where=path) from None
    return GenaiRuntime(artifact, session)
