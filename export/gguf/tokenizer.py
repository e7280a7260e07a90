"""The tokenizer inside a GGUF file: llama.cpp's `llama` model is SentencePiece BPE with byte fallback, `gpt2` is
byte-level BPE."""

from __future__ import annotations

from pathlib import Path

import gguf

from bluelm.config import ModelConfig
from bluelm.text.sentencepieces import SentencePieces, read_model
from bluelm.text.tokenizer import Tokenizer
from export.gguf.bpe import read_byte_pairs

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
    """Kinds of pieces have the same numbers in both formats.

    Whether a space stands in front of every text llama.cpp asks the file; its default is true.
    """
    assert isinstance(tokenizer.pieces, SentencePieces)
    model, added = read_model(tokenizer.source), tokenizer.pieces.added()
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces][: config.vocab_size]
    for index in range(len(pieces), config.vocab_size):
        text = added.get(index)
        pieces.append((f"[unused {index}]", 0.0, Kind.UNUSED) if text is None else (text, 0.0, Kind.USER_DEFINED))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([int(kind) for _, _, kind in pieces])
    writer.add_unk_token_id(model.trainer_spec.unk_id)
    writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(model.normalizer_spec.remove_extra_whitespaces)
    writer.add_add_bos_token(tokenizer.front == (tokenizer.bos,))
