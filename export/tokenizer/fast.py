"""The tokenizer's files as Hugging Face's fast library and swift-transformers read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bluelm.system.files import write_text
from bluelm.text.added_tokens import optional_json
from bluelm.text.sentencepieces import SentencePieces
from bluelm.text.tokenizer import Tokenizer, copy_own
from compress.checkpoint.store import QuantizedCheckpoint
from export.tokenizer.genai import CUT
from export.tokenizer.table import FAST, SETTINGS, TABLE, beginning, tokenizer_config, tokenizer_json

GENERATION = "generation_config.json"


def write_tokenizer(quantized: QuantizedCheckpoint, folder: Path, context: int) -> list[str]:
    """Write them into the folder; their names.

    Raises:
        TargetError: no tokenizer.json can be made of the checkpoint's. InputError: it cannot be read.
    """
    source, before = quantized.folder, {path.name for path in folder.iterdir()}
    if not any((source / name).is_file() for name in ("tokenizer.model", TABLE)):
        return []
    tokenizer = Tokenizer.from_folder(source)
    copy_own(source, folder)
    if isinstance(tokenizer.pieces, SentencePieces):
        for name in ("tokenizer.model", "added_tokens.json", "special_tokens_map.json"):
            (folder / name).unlink(missing_ok=True)
        table = tokenizer_json(tokenizer, CUT) | {"post_processor": beginning(tokenizer)}
        _write(folder / TABLE, table)
        _write(folder / SETTINGS, tokenizer_config(tokenizer, optional_json(source, SETTINGS), context))
    settings = optional_json(folder, SETTINGS)
    settings.pop("auto_map", None)
    _write(folder / SETTINGS, settings | {"tokenizer_class": FAST})
    config = quantized.config
    ends = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }
    _write(folder / GENERATION, ends)
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name not in before
    )


def _write(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")
