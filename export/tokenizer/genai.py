"""tokenizer.json and tokenizer_config.json: what onnxruntime-genai reads in place of a SentencePiece tokenizer.model.

Its tokenizer (onnxruntime-extensions, `KernelBpeTokenizer::SpmTokenize`) merges as Hugging Face's library does, but
ignores normalizer and post-processor. Without a pattern of its own it splits text as Llama 3 does, and with one that
never matches it splits every run of more than 100 pieces. So the pattern here splits where a run of blanks begins,
which no piece crosses. It has no unbounded repetition, since std::regex takes stack for every one, and so a run of more
than `LONGEST` bytes is split. Characters that are part of no other piece never merge, so text may be split there: they
are added tokens, which makes runs short.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bluelm.errors import TargetError
from bluelm.system.files import write_text
from bluelm.system.reading import MOST_TABLE_BYTES, read_json
from bluelm.text.added_tokens import optional_json
from bluelm.text.sentencepieces import CONTROL, SPACE, UNKNOWN, USER_DEFINED, SentencePieces, read_model
from bluelm.text.tokenizer import Tokenizer
from export.tokenizer.genai_cuts import respelled

TABLE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
ROLE = "runner"
"""Of files that are made for the standard runner and that the checkpoint does not bring."""
LONGEST, BLANKS, SPACES = 500, 256, 63  # most bytes of a run; blanks in front of one; more of them as `SPACE`
CLASS = "LlamaTokenizer"  # its word for SentencePiece's BPE; it refuses names that it does not know
NORMAL, BPE = 1, 2  # ModelProto.SentencePiece.Type, ModelProto.TrainerSpec.ModelType
_REST = "[\\u0080-\\u00BF]{0,3}"  # of a character, where bytes are matched
_MORE = rf"{SPACE}(?:{SPACE}|\n){{0,{SPACES}}}"
RUNS = "|".join((
    rf"[ \n]{{0,{BLANKS}}}(?:{_MORE})?(?!{SPACE})[^ \n]{{1,{LONGEST}}}?(?= |{SPACE}|\n|$)",
    rf"(?!{SPACE})[^ \n]{{1,{LONGEST}}}{_REST}",
    rf"[ \n]{{1,{BLANKS}}}",
    _MORE,
))  # fmt: skip
"""Blanks and the run behind them. To genai a space is a space, to Hugging Face's library `SPACE` already."""
CUT = {"type": "Split", "pattern": {"Regex": RUNS}, "behavior": "Isolated", "invert": False}


def write_tokenizer(folder: Path, source: Path, context: int) -> dict[str, str]:
    """Write what the tokenizer in the folder `source` lacks, or says in a form that genai ignores.

    Returns:
        Path -> role of each file.

    Raises:
        TargetError: its pieces are no BPE, or genai has no words for how it cuts text.
        InputError: it cannot be read.
    """
    if (source / TABLE).is_file():
        return _write_cuts(folder, source)
    if not (source / "tokenizer.model").is_file():
        return {}
    tokenizer = Tokenizer.from_folder(source)
    settings = optional_json(source, SETTINGS)
    table = tokenizer_json(tokenizer)
    write_text(folder / TABLE, json.dumps(table, ensure_ascii=False, separators=(",", ":")) + "\n")
    write_text(folder / SETTINGS, json.dumps(tokenizer_config(tokenizer, settings, context), indent=1) + "\n")
    return {TABLE: ROLE, SETTINGS: ROLE}


def _write_cuts(folder: Path, source: Path) -> dict[str, str]:
    """tokenizer.json with pre-tokenizers that genai applies; {} where it applies those that are there."""
    table = read_json(source / TABLE, MOST_TABLE_BYTES)
    cuts = respelled(table.get("pre_tokenizer"))
    if cuts is None:
        return {}
    table |= {"truncation": None, "padding": None, "pre_tokenizer": cuts}
    write_text(folder / TABLE, json.dumps(table, ensure_ascii=False, separators=(",", ":")) + "\n")
    return {TABLE: ROLE}


def check_tokenizer(source: Path) -> None:
    """Whether genai can read text as the folder's tokenizer does.

    Raises:
        TargetError: it cannot; says why. InputError: the folder's tokenizer cannot be read.
    """
    tokenizer = Tokenizer.from_folder(source)
    if isinstance(tokenizer.pieces, SentencePieces):
        kind = read_model(tokenizer.source).trainer_spec.model_type
        if kind != BPE:
            fix = "use the runtime onnx-cpu"
            raise TargetError("genai reads no SentencePiece model but BPE", where=tokenizer.source, fix=fix)
    elif tokenizer.source.name == TABLE:
        respelled(read_json(tokenizer.source, MOST_TABLE_BYTES).get("pre_tokenizer"))


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The same pieces for Hugging Face's library, and for genai.

    Raises:
        TargetError: they are no BPE.
    """
    check_tokenizer(tokenizer.source.parent)
    assert isinstance(tokenizer.pieces, SentencePieces)
    proto = read_model(tokenizer.source)
    prefix = proto.normalizer_spec.add_dummy_prefix
    marks = {i: (p.piece, p.type == CONTROL) for i, p in enumerate(proto.pieces) if p.type in (CONTROL, USER_DEFINED)}
    marks |= {i: (text, False) for i, text in tokenizer.pieces.added().items()}
    if not prefix:  # it would put one in front of every part
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
        "pre_tokenizer": CUT,
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
    """The checkpoint's own settings, a class that genai knows, and the special tokens by name."""
    named = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
    texts = tokenizer.pieces.texts() if isinstance(tokenizer.pieces, SentencePieces) else {}
    own = {name: texts[token] for name, token in named.items() if token in texts and name not in settings}
    return {**own, "model_max_length": context, **settings, "tokenizer_class": CLASS}


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
