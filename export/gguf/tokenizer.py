"""The tokenizer inside a GGUF file: llama.cpp's `llama` model is SentencePiece BPE with byte fallback, `gpt2` is
byte-level BPE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf

from bluelm.config import ModelConfig
from bluelm.errors import TargetError
from bluelm.text.sentencepieces import SentencePieces, read_model
from bluelm.text.tokenizer import Tokenizer
from export.gguf.bpe import FIX, read_byte_pairs

Kind = gguf.TokenType
ENDS = ("eos", "eot", "eom")
"""llama.cpp's keys for tokens that end an answer; it looks for more by their texts alone."""


def check_tokenizer(folder: Path, config: ModelConfig) -> None:
    """Whether llama.cpp can read text as the folder's tokenizer does, before any work.

    Raises:
        TargetError: it cannot; says why.
        InputError: the folder has no tokenizer, a damaged one, or one of another model.
    """
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.check_rows(config.vocab_size)
    if tokenizer.source.name == "tokenizer.json":
        read_byte_pairs(tokenizer.source, config.vocab_size)
    if tokenizer.front not in ((), (_begin(tokenizer, config),)):
        texts = " ".join(str(token) for token in tokenizer.front)
        problem = f"llama.cpp begins a text with the bos token or with none, this tokenizer with the tokens {texts}"
        raise TargetError(problem, where=tokenizer.source, fix=FIX)
    _ends(tokenizer, config)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: ModelConfig) -> None:
    """The folder's tokenizer with a token for every row of the embedding, and its chat template.

    Rows beyond the tokenizer are unused tokens. Without a template llama.cpp takes ChatML, whatever the model learned.

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
    writer.add_add_bos_token(bool(tokenizer.front) and tokenizer.front == (_begin(tokenizer, config),))
    writer.add_add_eos_token(False)
    found = {"bos": _begin(tokenizer, config), **_ends(tokenizer, config)}
    found["padding"] = config.pad_token_id if tokenizer.pad is None else tokenizer.pad
    for name, token in found.items():
        if token is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    if tokenizer.template is not None:
        _add_templates(writer, tokenizer.template.sources)


def _begin(tokenizer: Tokenizer, config: ModelConfig) -> int | None:
    return config.bos_token_id if tokenizer.bos is None else tokenizer.bos


def _ends(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, int]:
    """End tokens by llama.cpp's names, the one that a template's `eos_token` means first."""
    own = [] if tokenizer.eos is None else [tokenizer.eos]
    ends = list(dict.fromkeys([*own, *config.eos_token_ids]))
    if len(ends) > len(ENDS):
        problem = f"a GGUF file names {len(ENDS)} end tokens, this model has {len(ends)}: {ends}"
        raise TargetError(problem, where=tokenizer.source, fix=FIX)
    return dict(zip(ENDS, ends, strict=False))


def _add_templates(writer: gguf.GGUFWriter, templates: Mapping[str, str]) -> None:
    """Jinja sources by name; gguf-py's own function lists the names in another order every time."""
    keys, others = gguf.Keys.Tokenizer, sorted(templates.keys() - {"default"})
    if others:
        writer.add_array(keys.CHAT_TEMPLATES, others)
    for name in others:
        writer.add_string(keys.CHAT_TEMPLATE_N.format(name=name), templates[name])
    if "default" in templates:
        writer.add_string(keys.CHAT_TEMPLATE, templates["default"])


def _add_byte_pairs(writer: gguf.GGUFWriter, path: Path, config: ModelConfig) -> None:
    found = read_byte_pairs(path, config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(found.cut)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.kinds)
    writer.add_token_merges(found.merges)


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
