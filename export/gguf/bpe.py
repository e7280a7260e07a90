"""Byte-level BPE inside a GGUF file, llama.cpp's `gpt2` model: what tokenizer.json of Qwen2 and Llama-3 holds.

Tokens and merges go over as they are, bytes written as GPT-2's characters. How text is cut into words before merging
llama.cpp has in code, by a name; only a file that cuts as one of those names does may carry it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf

from bluelm.errors import TargetError
from bluelm.system.reading import MOST_TABLE_BYTES, read_json

Kind = gguf.TokenType
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel does by itself
_CASELESS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# the file's expressions, one behind the other -> llama.cpp's name (llama_vocab::impl::load): they differ in digits
NAMES: Mapping[tuple[str | None, ...], str] = MappingProxyType({
    (GPT2,): "gpt-2",
    (r"\p{N}", GPT2): "smollm",
    (_CASELESS % r"\p{N}{1,3}",): "llama-bpe",
    (_CASELESS % r"\p{N}",): "qwen2",
})  # fmt: skip
FIX = "use the runtime onnx-cpu"


@dataclass(frozen=True)
class BytePairs:
    """What GGUF keeps of a tokenizer.json.

    Attributes:
        tokens, kinds: by id; ids without a token are unused ones.
        merges: two tokens with a space between them, the first to merge first.
        cut: llama.cpp's name for how text is cut into words.
    """

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    cut: str


def read_byte_pairs(path: Path, rows: int) -> BytePairs:
    """Read a tokenizer.json for an embedding of `rows` rows.

    Raises:
        TargetError: no byte-level BPE, or one that llama.cpp has no name for.
        InputError: the file is damaged.
    """
    data = read_json(path, MOST_TABLE_BYTES)
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
        raise TargetError("GGUF supports only SentencePiece and byte-level BPE tokenizers", where=path, fix=FIX)
    cut = _cut(data.get("pre_tokenizer"), path)
    tokens = [f"[unused {index}]" for index in range(rows)]
    kinds = [int(Kind.UNUSED)] * rows
    for text, index in model["vocab"].items():
        tokens[index], kinds[index] = text, int(Kind.NORMAL)
    for added in data.get("added_tokens") or ():
        kind = Kind.CONTROL if added["special"] else Kind.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], int(kind)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return BytePairs(tokens, kinds, merges, cut)


def _cut(part: Any, path: Path) -> str:
    """llama.cpp's name of a pre-tokenizer: digits one by one, a Split that keeps every match, ByteLevel."""
    parts: Sequence[Any] = part["pretokenizers"] if part and part["type"] == "Sequence" else [part]
    expressions = tuple(one for each in parts for one in _expressions(each))
    last = parts[-1] or {}
    if expressions not in NAMES or last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        shown = json.dumps(part)[:200]
        raise TargetError(
            f"llama.cpp has no pre-tokenizer that splits text like this one: {shown}", where=path, fix=FIX
        )
    return NAMES[expressions]


def _expressions(part: Any) -> Sequence[str | None]:
    """What one part of a pre-tokenizer cuts by; None for what no expression says."""
    kind = part["type"] if part else None
    if kind == "ByteLevel":
        return [GPT2] if part.get("use_regex", True) else []
    if kind == "Digits" and part.get("individual_digits"):
        return [r"\p{N}"]
    isolated = kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]
    return [part["pattern"].get("Regex") if isolated else None]
