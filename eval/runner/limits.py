"""Removes from a text what a program is known to tokenize otherwise than the checkpoint, by a limit of its own."""

from __future__ import annotations

import json
import re

from bluelm.system.reading import MOST_TABLE_BYTES, read_json
from bluelm.text.jsonpieces import JsonPieces
from bluelm.text.tokenizer import Tokenizer

LINES = (
    r"\s*[\r\n]+"  # of the patterns of Llama 3 and Qwen: lines of blanks are one piece of text with the next line's end
)
BLANK = re.compile(r"(?<=[\r\n])[^\S\r\n]+(?=[\r\n])")
END = "</s>"


def for_genai(text: str, tokenizer: Tokenizer) -> str:
    """Without blanks that stand alone in their line, where the tokenizer's pattern takes such lines together.

    onnxruntime-extensions ends the match at the first line's end (`Match_LLAMA3_Pattern_5`).
    """
    if not isinstance(tokenizer.pieces, JsonPieces):
        return text
    cuts = json.dumps(read_json(tokenizer.source, MOST_TABLE_BYTES).get("pre_tokenizer"))
    return BLANK.sub("", text) if json.dumps(LINES)[1:-1] in cuts else text


def for_llama_cpp(text: str, tokenizer: Tokenizer) -> str:
    """Without `</s>` where that is a piece like any other, as Qwen's: llama.cpp takes every piece of that text for an
    end token."""
    piece = tokenizer.pieces.id(END)
    ordinary = piece is not None and piece != tokenizer.eos and isinstance(tokenizer.pieces, JsonPieces)
    return text.replace(END, "") if ordinary else text
