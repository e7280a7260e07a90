"""The tokenizer that a GGUF file must hold: read from the checkpoint's own files by their own libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from bluelm.config import ModelConfig
from bluelm.system.reading import MOST_TABLE_BYTES, read_json
from bluelm.text.sentencepieces import SentencePieces, read_model
from bluelm.text.tokenizer import Tokenizer
from compress.checkpoint.store import QuantizedCheckpoint
from export.gguf.readback_keys import Value

Type, Kind = gguf.GGUFValueType, gguf.TokenType  # kinds of pieces have sentencepiece's own numbers


@dataclass(frozen=True)
class Token:
    """A token: its text, its kind, and how early it is merged (SentencePiece)."""

    text: str
    kind: int
    score: float = 0.0


def keys(quantized: QuantizedCheckpoint) -> dict[str, Value]:
    """All keys `tokenizer.*`.

    Raises:
        InputError: the checkpoint's tokenizer cannot be read.
    """
    tokenizer, config = Tokenizer.from_folder(quantized.folder), quantized.config
    named = tokenizer.source.name == "tokenizer.json"
    found = _byte_pairs(tokenizer.source, config) if named else _pieces(tokenizer, config)
    begin = config.bos_token_id if tokenizer.bos is None else tokenizer.bos
    begins = len(tokenizer.front) == 1 and tokenizer.front[0] == begin
    found |= {"add_eos_token": Value(Type.BOOL, False), "add_bos_token": Value(Type.BOOL, begins)}
    first = config.eos_token_ids[:1] if tokenizer.eos is None else (tokenizer.eos,)
    others = [token for token in config.eos_token_ids if token not in first]
    ids = {
        "bos": begin,
        "padding": config.pad_token_id if tokenizer.pad is None else tokenizer.pad,
        **dict(zip(("eos", "eot", "eom"), (*first, *others), strict=False)),
    }
    found |= {f"{name}_token_id": Value(Type.UINT32, token) for name, token in ids.items() if token is not None}
    named = {f"tokenizer.ggml.{name}": value for name, value in found.items()}
    return named | _templates({} if tokenizer.template is None else tokenizer.template.sources)


def _templates(sources: Mapping[str, str]) -> dict[str, Value]:
    """Of chats: the default one without a name in its key."""
    others = sorted(sources.keys() - {"default"})
    found = {f"tokenizer.chat_template.{name}": Value(Type.STRING, sources[name]) for name in others}
    if others:
        found["tokenizer.chat_templates"] = Value(Type.STRING, others, array=True)
    if "default" in sources:
        found["tokenizer.chat_template"] = Value(Type.STRING, sources["default"])
    return found


def _table(rows: Sequence[Token]) -> dict[str, Value]:
    return {
        "tokens": Value(Type.STRING, [row.text for row in rows], array=True),
        "token_type": Value(Type.INT32, [row.kind for row in rows], array=True),
    }


def _pieces(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Value]:
    """Of a tokenizer.model and the tokens added to it."""
    assert isinstance(tokenizer.pieces, SentencePieces)
    proto = read_model(tokenizer.source)
    rows = [Token(piece.piece, piece.type, piece.score) for piece in proto.pieces][: config.vocab_size]
    added = tokenizer.pieces.added()
    for index in range(len(rows), config.vocab_size):
        rows.append(Token(added[index], Kind.USER_DEFINED) if index in added else _unused(index))
    return {
        "model": Value(Type.STRING, "llama"),
        "pre": Value(Type.STRING, "default"),
        **_table(rows),
        "scores": Value(Type.FLOAT32, [row.score for row in rows], array=True),
        "unknown_token_id": Value(Type.UINT32, proto.trainer_spec.unk_id),
        "add_space_prefix": Value(Type.BOOL, proto.normalizer_spec.add_dummy_prefix),
        "remove_extra_whitespaces": Value(Type.BOOL, proto.normalizer_spec.remove_extra_whitespaces),
    }


def _byte_pairs(path: Path, config: ModelConfig) -> dict[str, Value]:
    """Of a tokenizer.json with byte-level BPE."""
    import tokenizers

    from export.gguf.bpe import read_byte_pairs

    library: Any = tokenizers.Tokenizer.from_file(str(path))
    library.no_truncation()
    library.no_padding()
    rows = [_unused(index) for index in range(config.vocab_size)]
    for text, index in library.get_vocab(with_added_tokens=False).items():
        rows[index] = Token(text, Kind.NORMAL)
    for index, token in library.get_added_tokens_decoder().items():
        rows[index] = Token(token.content, Kind.CONTROL if token.special else Kind.USER_DEFINED)
    pairs = read_json(path, MOST_TABLE_BYTES)["model"]["merges"]
    merges = [pair if isinstance(pair, str) else f"{pair[0]} {pair[1]}" for pair in pairs]
    return {
        "model": Value(Type.STRING, "gpt2"),
        "pre": Value(Type.STRING, read_byte_pairs(path, config.vocab_size).cut),  # llama.cpp's name for an expression
        **_table(rows),
        "merges": Value(Type.STRING, merges, array=True),
    }


def _unused(index: int) -> Token:
    return Token(f"[unused {index}]", Kind.UNUSED)
