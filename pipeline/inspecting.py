"""Checks of one artifact of a run that need no float model beside it: its files, its own weights, its blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bluelm.checkpoint import Checkpoint
from bluelm.tokenizer import Tokenizer
from compress.rotate import Rotated
from compress.store import QuantizedCheckpoint
from eval import structure
from eval.compare import local_errors
from eval.heldout import HeldOut
from eval.measurement import Measurement
from export.artifact import SOURCES, Artifact
from targets.block_outputs import open_blocks
from targets.runtime import Place, Runtime
from targets.torch_runtime import TorchRuntime

WINDOWS = 2  # of held-out text, for the KL to the artifact's own weights
BLOCK_TOKENS = 64
# formats that show their blocks at little cost
SHOWN = ("onnx-cpu", "onnx-npu", "onnx-genai", "litert", "gguf", "coreml", "executorch-coreml", *SOURCES)


@dataclass(frozen=True)
class Inspector:
    """What the artifacts of one run are held against.

    Attributes:
        checkpoint: None: the artifacts' own weights are all that they are held against.
        quantized: None: codes and scales are not compared.
        room: whether the dequantized model may be held in memory.
        coarse: activations have 8 bits where a format's table of what is expected means 16.
    """

    checkpoint: Checkpoint | None
    quantized: QuantizedCheckpoint | None
    held_out: HeldOut
    context: int
    room: bool = True
    coarse: bool = False

    def files(self, artifact: Artifact, subject: str) -> list[Measurement]:
        """What the files tell."""
        config, texts = self._model.config, self.held_out.texts
        return structure.files(artifact, config, self.tokenizer, self.quantized, texts, subject)

    def running(self, artifact: Artifact, runtime: Runtime, subject: str) -> list[Measurement]:
        """What the artifact's answers tell: the end token, and the KL to its own weights."""
        tokens = self._texts[0][: max(2, min(16, runtime.context // 2))]
        found = [structure.end_token(artifact, self._model.config, runtime, tokens, subject)]
        limit = structure.expected_runtime_kl(artifact.format)
        if self._compares and limit is not None and not self._too_coarse(artifact):
            answers = [runtime.logits(text) for text in self._texts]
            found += structure.runtime_kl(self._expected, answers, limit, subject)
        return found

    def blocks(self, artifact: Artifact, on: Place, subject: str) -> list[Measurement]:
        """Errors of blocks; [] where showing them would take long (`bluelm-export bisect` does)."""
        if self.quantized is None or artifact.format not in SHOWN or on == "arm64" or self._too_coarse(artifact):
            return []
        tokens = self._texts[0][:BLOCK_TOKENS]
        with (
            tempfile.TemporaryDirectory(prefix="bluelm-blocks-") as scratch,
            open_blocks(artifact, on, Path(scratch)) as runtime,
        ):
            stream = runtime.blocks(tokens)
        own = local_errors(self.quantized, stream, self.context, (artifact.format, "dequantized"), True)
        to_float = None
        if self.checkpoint is not None:
            exact = Rotated(self.checkpoint) if self.quantized.recipe.rotate else self.checkpoint
            to_float = local_errors(exact, stream, self.context, (artifact.format, "float"), False)
        return structure.block_figures(to_float, own, subject)

    def expect(self) -> None:
        """Work out what the artifacts' own weights answer in float32; the model is let go behind it."""
        if self._compares:
            _ = self._expected

    @property
    def given(self) -> bool:
        """Whether the codes came with the checkpoint, so that artifact and float model are read from the same."""
        return self.quantized is not None and self.quantized.recipe.method == "given"

    @property
    def _compares(self) -> bool:
        """Whether answers are compared with the dequantized weights'."""
        return self.room and self.quantized is not None

    @property
    def _model(self) -> Checkpoint | QuantizedCheckpoint:
        """What tells the model's shape and tokenizer."""
        known = self.checkpoint or self.quantized
        assert known is not None, "there is nothing to compare artifacts with"
        return known

    def _too_coarse(self, artifact: Artifact) -> bool:
        """Whether nobody knows what the artifact's activations may cost."""
        return self.coarse and artifact.format in ("onnx-npu", *SOURCES)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's."""
        return self._model.tokenizer()

    @cached_property
    def _texts(self) -> Sequence[list[int]]:
        return [window.tokens.tolist() for window in self.held_out.windows[:WINDOWS]]

    @cached_property
    def _expected(self) -> list[np.ndarray]:
        """Logits [n, vocab] of the dequantized weights, by window."""
        assert self.quantized is not None
        runtime = TorchRuntime(self.quantized, self.context)
        return [runtime.logits(text) for text in self._texts]
