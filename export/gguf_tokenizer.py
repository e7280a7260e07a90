"""The tokenizer inside a GGUF file: llama.cpp's `llama` model is SentencePiece BPE with byte fallback."""

from __future__ import annotations

from pathlib import Path

import gguf
from sentencepiece import SentencePieceProcessor

from bluelm.config import ModelConfig
from bluelm.errors import TargetError
from bluelm.tokenizer import Tokenizer

Kind = gguf.TokenType


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: ModelConfig) -> None:
    """Pieces, scores and kinds of the folder's tokenizer.model; rows beyond it are unused pieces.

    Raises:
        TargetError: the tokenizer is not SentencePiece.
    """
    path = folder / "tokenizer.model"
    if not path.exists():
        fix = "use the runtime onnx-cpu"
        raise TargetError("GGUF export knows SentencePiece tokenizers alone", where=folder, fix=fix)
    model = SentencePieceProcessor(model_file=str(path))
    tokenizer = Tokenizer.from_folder(folder)
    pieces: list[bytes] = []
    scores: list[float] = []
    kinds: list[int] = []
    for index in range(config.vocab_size):
        if index < model.vocab_size():
            pieces.append(model.id_to_piece(index).encode())
            scores.append(model.get_score(index))
            kinds.append(int(_kind(model, index)))
            continue
        added = index < tokenizer.vocab_size
        pieces.append(tokenizer.decode([index]).encode() if added else f"[unused {index}]".encode())
        scores.append(0.0)
        kinds.append(int(Kind.USER_DEFINED if added else Kind.UNUSED))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if config.eos_token_ids:
        writer.add_eos_token_id(config.eos_token_ids[0])
    if config.pad_token_id is not None:
        writer.add_pad_token_id(config.pad_token_id)


def _kind(model: SentencePieceProcessor, index: int) -> gguf.TokenType:
    if model.is_unknown(index):
        return Kind.UNKNOWN
    if model.is_control(index):
        return Kind.CONTROL
    if model.is_byte(index):
        return Kind.BYTE
    if model.is_unused(index):
        return Kind.UNUSED
    return Kind.NORMAL
