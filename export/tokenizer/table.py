"""A SentencePiece tokenizer.model as Hugging Face's tokenizer.json, and tokenizer_config.json beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bluelm.errors import TargetError
from bluelm.text.sentencepieces import CONTROL, SPACE, UNKNOWN, USER_DEFINED, SentencePieces, read_model
from bluelm.text.tokenizer import Tokenizer

TABLE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
FAST = "PreTrainedTokenizerFast"
"""The class that takes tokenizer.json as it is; LlamaTokenizer would cut text in its own way."""
ROLE = "runner"
"""Of files that are made for the standard runner and that the checkpoint does not bring."""
NORMAL, BPE = 1, 2  # ModelProto.SentencePiece.Type, ModelProto.TrainerSpec.ModelType


def check_pieces(source: Path) -> None:
    """Whether the tokenizer.model can be said so.

    Raises:
        TargetError: its pieces are no BPE.
    """
    if read_model(source).trainer_spec.model_type != BPE:
        fix = "use a runtime that reads tokenizer.model, such as onnx-cpu"
        raise TargetError("tokenizer.json holds no SentencePiece model but BPE", where=source, fix=fix)


def tokenizer_json(tokenizer: Tokenizer, cut: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The same pieces for Hugging Face's library; nothing begins a text.

    Args:
        cut: a pre-tokenizer, for a program that takes short runs of text only. Characters that are part of no other
            piece are then added tokens, where text may be cut as well.

    Raises:
        TargetError: they are no BPE.
    """
    check_pieces(tokenizer.source)
    assert isinstance(tokenizer.pieces, SentencePieces)
    proto = read_model(tokenizer.source)
    prefix = proto.normalizer_spec.add_dummy_prefix
    marks = {i: (p.piece, p.type == CONTROL) for i, p in enumerate(proto.pieces) if p.type in (CONTROL, USER_DEFINED)}
    marks |= {i: (text, False) for i, text in tokenizer.pieces.added().items()}
    if cut is not None and not prefix:  # it would put one in front of every part
        marks |= {i: (text, False) for i, text in unmerged(proto).items()}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, text, special) for i, (text, special) in sorted(marks.items())],
        "normalizer": {"type": "Sequence", "normalizers": [
            *([{"type": "Prepend", "prepend": SPACE}] if prefix else []),
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        ]},
        "pre_tokenizer": None if cut is None else dict(cut),
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
        ]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next((p.piece for p in proto.pieces if p.type == UNKNOWN), None),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.piece: index for index, piece in enumerate(proto.pieces)},
            "merges": merges(proto),
        },
    }  # fmt: skip


def tokenizer_config(tokenizer: Tokenizer, settings: Mapping[str, Any], context: int) -> dict[str, Any]:
    """The checkpoint's own settings, and the special tokens by name."""
    named = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
    texts = tokenizer.pieces.texts() if isinstance(tokenizer.pieces, SentencePieces) else {}
    own = {name: texts[token] for name, token in named.items() if token in texts and name not in settings}
    return {**own, "model_max_length": context, **settings}


def beginning(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """What stands in front of a text, as the library's TemplateProcessing."""
    if not tokenizer.front:
        return None
    texts = {token: tokenizer.pieces.text(token) for token in tokenizer.front}
    front = [{"SpecialToken": {"id": texts[token], "type_id": 0}} for token in tokenizer.front]
    pair = [{"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1))]
    tokens = {text: {"id": text, "ids": [token], "tokens": [text]} for token, text in texts.items()}
    return {
        "type": "TemplateProcessing",
        "single": [*front, pair[0]],
        "pair": [*front, *pair],
        "special_tokens": tokens,
    }


def merges(proto: Any) -> list[str]:
    """Every pair of pieces that makes a piece, "left right", the best score first."""
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces) if piece.type == NORMAL}
    found: list[tuple[float, int, int, str]] = []
    for text, index in ids.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                found.append((-proto.pieces[index].score, ids[left], ids[right], f"{left} {right}"))
    return [pair for *_, pair in sorted(found)]


def unmerged(proto: Any) -> dict[int, str]:
    """Pieces of one character that no other piece holds, by id: nothing ever merges with them."""
    plain = [(index, piece.piece) for index, piece in enumerate(proto.pieces) if piece.type == NORMAL]
    holders = Counter(character for _, text in plain for character in set(text))
    return {index: text for index, text in plain if len(text) == 1 and text != SPACE and holders[text] == 1}


def _added(index: int, text: str, special: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": text, **plain, "special": special}
