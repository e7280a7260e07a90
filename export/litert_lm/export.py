"""LiteRT-LM: one .litertlm that it opens by itself, and apps on it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from bluelm.system.files import atomic_folder
from bluelm.system.progress import Progress, Silent
from bluelm.text.sentencepieces import SentencePieces
from bluelm.text.tokenizer import Tokenizer
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.mobile import complete
from export.litert.file import LitertModel
from export.litert_lm import graph
from export.litert_lm.container import Kind, Section, write
from export.litert_lm.metadata import entries, llm_metadata
from export.litert_lm.template import check_begin
from export.tokenizer.llm_runner import runner_table
from export.tokenizer.table import check_pieces

MODEL = "model.litertlm"
GRAPHS = {"model_type": "tf_lite_prefill_decode", "prefer_activation_type": "fp32"}
"""Floats of 32 bits, as what is judged here has; else LiteRT-LM takes 16 where a phone has them."""
SIZE_BYTES = 8  # in front of a compressed tokenizer


def export(
    quantized: QuantizedCheckpoint,
    folder: Path,
    *,
    context: int = 512,
    chunk: int = 128,
    about: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write the artifact `folder`: model.litertlm, and the tokenizer's files beside it.

    Args:
        context: tokens that LiteRT-LM takes and answers in all.
        chunk: tokens that the prefill signature takes.
        about: what the file says of the model: `name`, `license`, `version`, where they are known.

    Raises:
        TargetError: LiteRT has no kernel for a weight, or LiteRT-LM cannot read the tokenizer; says which.
    """
    with atomic_folder(folder) as temporary:
        tables = temporary / "model.tflite"
        write_model(quantized, tables, context, chunk, progress)
        tokenizer = Tokenizer.from_folder(quantized.folder)
        check_tokenizer(tokenizer)
        sections = [
            Section(Kind.TFLiteModel, tables, GRAPHS),
            Section(Kind.HF_Tokenizer_Zlib, compressed(tokenizer_json(tokenizer))),
            Section(Kind.LlmMetadataProto, llm_metadata(quantized, tokenizer, context)),
        ]
        write(temporary / MODEL, sections, entries(quantized, about or {}))
        tables.unlink()
        complete(
            temporary,
            "litert-lm",
            quantized,
            {MODEL: "model"},
            context=context,
            chunk=chunk,
            kv_bits=32,
            producers={name: version(name) for name in ("ai-edge-litert", "litert-lm-builder")},
            about=about,
        )
    return Artifact.open(folder)


def write_model(
    quantized: QuantizedCheckpoint, path: Path, context: int, chunk: int, progress: Progress | None = None
) -> None:
    """Write the .tflite `path`; both signatures share every weight."""
    model = LitertModel("bluelm-export")
    with (progress or Silent()).task("lower to LiteRT-LM", 2) as task:
        for name in graph.lower(model, quantized, context, chunk):
            task.advance(note=name)
        model.save(path)


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Whether LiteRT-LM can read text and chats as this tokenizer does.

    Raises:
        TargetError: it cannot; says why.
    """
    check_begin(tokenizer)
    if isinstance(tokenizer.pieces, SentencePieces):
        check_pieces(tokenizer.source)


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """The checkpoint's own; of a tokenizer.model the same pieces: in that LiteRT-LM finds no `</s>` in a text."""
    if not isinstance(tokenizer.pieces, SentencePieces):
        return tokenizer.source.read_bytes()
    return json.dumps(runner_table(tokenizer), ensure_ascii=False, separators=(",", ":")).encode()


def compressed(table: bytes) -> bytes:
    """As LiteRT-LM's builder stores it."""
    return len(table).to_bytes(SIZE_BYTES, "little") + zlib.compress(table)
