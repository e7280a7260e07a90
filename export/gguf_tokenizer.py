"""The tokenizer inside a GGUF file: llama.cpp's `llama` model is SentencePiece BPE with byte fallback, `gpt2` is
byte-level BPE."""

from __future__ import annotations

from pathlib import Path

import gguf
from sentencepiece import SentencePieceProcessor

from bluelm.config import ModelConfig
from bluelm.tokenizer import Tokenizer
from export.gguf_bpe import read_byte_pairs

Kind = gguf.TokenType


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: ModelConfig) -> None:
    """The folder's tokenizer with a token for every row of the embedding; rows beyond it are unused ones.

    Raises:
        TargetError: a tokenizer that llama.cpp does not have.
        InputError: the folder has none, a damaged one, or one of another model.
    """
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.source.name == "tokenizer.json":
        tokenizer.check_rows(config.vocab_size)
        _add_byte_pairs(writer, tokenizer.source, config)
    else:
        _add_pieces(writer, tokenizer, config)
    writer.add_add_eos_token(False)
    for token, add in (
        (config.bos_token_id if tokenizer.bos is None else tokenizer.bos, writer.add_bos_token_id),
        (config.eos_token_ids[0] if config.eos_token_ids else tokenizer.eos, writer.add_eos_token_id),
        (config.pad_token_id if tokenizer.pad is None else tokenizer.pad, writer.add_pad_token_id),
    ):
        if token is not None:
            add(token)


def _add_byte_pairs(writer: gguf.GGUFWriter, path: Path, config: ModelConfig) -> None:
    found = read_byte_pairs(path, config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(found.cut)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.kinds)
    writer.add_token_merges(found.merges)
    writer.add_add_bos_token(found.begins is not None)


def _add_pieces(writer: gguf.GGUFWriter, tokenizer: Tokenizer, config: ModelConfig) -> None:
    model = SentencePieceProcessor(model_file=str(tokenizer.source))
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
