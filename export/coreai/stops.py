"""Which tokens end an answer in Apple's `CoreAILanguageModel`: it reads no config.json, but tokenizer_config.json.

Rules: `LanguageConfig.additionalStopTokenIds` of github.com/apple/coreai-models.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bluelm.system.reading import MOST_TABLE_BYTES, read_json
from bluelm.text.tokenizer import Tokenizer
from export.tokenizer.table import SETTINGS, TABLE

SPECIAL, DECODER, END = "additional_special_tokens", "added_tokens_decoder", "eos_token"
TURNS = ("end_of_turn", "im_end", "eot_id", "endoftext", "eot_token")
"""A control token with such a word in it ends an answer, where `added_tokens_decoder` or a key of this name has it."""
KEYS = (SPECIAL, DECODER, *TURNS)
"""Of tokenizer_config.json, which say what ends an answer beside `eos_token`."""


def with_stops(settings: Mapping[str, Any], tokenizer: Tokenizer, ends: Collection[int]) -> dict[str, Any]:
    """tokenizer_config.json for these end tokens, and no others but the tokenizer's own."""
    others = [tokenizer.pieces.text(token) for token in ends if token != tokenizer.eos]
    return {key: value for key, value in settings.items() if key not in KEYS} | {SPECIAL: others}


def stops(folder: Path) -> set[int]:
    """What ends an answer by the files in `folder`.

    Raises:
        InputError: one of them cannot be read.
    """
    settings, table = read_json(folder / SETTINGS), read_json(folder / TABLE, MOST_TABLE_BYTES)
    ids = {**table["model"]["vocab"], **{token["content"]: token["id"] for token in table["added_tokens"]}}
    named = [settings.get(END), *settings.get(SPECIAL, []), *(settings.get(key) for key in TURNS)]
    named += settings[END] if isinstance(settings.get(END), list) else []
    texts = [one.get("content") if isinstance(one, dict) else one for one in named]
    found = {int(ids[text]) for text in texts if isinstance(text, str) and text in ids}
    for index, one in settings.get(DECODER, {}).items():
        if one.get("special") and any(word in one["content"].lower() for word in TURNS):
            found.add(int(index))
    return found
