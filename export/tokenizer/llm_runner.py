"""tokenizer.json and tokenizer_config.json as ExecuTorch's TextLLMRunner reads them, in place of tokenizer.model.

From a SentencePiece tokenizer.model it reads `<s>` and `</s>` in a text as any other characters, and so no chat of
several turns. Of tokenizer.json its reader (`HFTokenizer` of pytorch/tokenizers) makes what Hugging Face's library
does. A pattern that cuts text would have to match all of it, and there is none. It decodes one token at a time, so that
`Strip` would take the space in front of each word; an answer goes on behind a prompt, where the first space counts as
well. What begins a text is in the post-processor, which `num_bos` calls for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bluelm.errors import TargetError
from bluelm.system.files import write_text
from bluelm.system.reading import MOST_TABLE_BYTES, read_json
from bluelm.text.added_tokens import optional_json
from bluelm.text.sentencepieces import SentencePieces
from bluelm.text.tokenizer import Tokenizer
from export.tokenizer.table import (
    FAST,
    ROLE,
    SETTINGS,
    TABLE,
    beginning,
    check_pieces,
    tokenizer_config,
    tokenizer_json,
)

READ = {
    "model": {"BPE"},
    "normalizer": {"Sequence", "Replace", "Prepend", "NFC"},
    "pre_tokenizer": {"Sequence", "Split", "Digits", "ByteLevel"},
    "post_processor": {"Sequence", "TemplateProcessing", "ByteLevel"},
    "decoder": {"Sequence", "ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip"},
}
"""By part of tokenizer.json, the types that its reader knows; it refuses the whole file for any other."""


def write_tokenizer(folder: Path, source: Path, context: int) -> dict[str, str]:
    """Write what the tokenizer in the folder `source` has in tokenizer.model alone.

    Returns:
        Path -> role of each file; {} where tokenizer.json is the checkpoint's own.

    Raises:
        TargetError: its pieces are no BPE. InputError: it cannot be read.
    """
    if not any((source / name).is_file() for name in ("tokenizer.model", TABLE)):
        return {}
    tokenizer = Tokenizer.from_folder(source)
    if not isinstance(tokenizer.pieces, SentencePieces):
        return {}
    settings = tokenizer_config(tokenizer, optional_json(source, SETTINGS), context)
    settings.pop("auto_map", None)
    table = runner_table(tokenizer)
    write_text(folder / TABLE, json.dumps(table, ensure_ascii=False, separators=(",", ":")) + "\n")
    write_text(folder / SETTINGS, json.dumps(settings | {"tokenizer_class": FAST}, indent=1) + "\n")
    return {TABLE: ROLE, SETTINGS: ROLE}


def runner_table(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json of a tokenizer.model.

    Raises:
        TargetError: its pieces are no BPE.
    """
    table = tokenizer_json(tokenizer)
    steps = [step for step in table["decoder"]["decoders"] if step["type"] != "Strip"]
    decoder = table["decoder"] | {"decoders": steps}
    return table | {"decoder": decoder, "post_processor": beginning(tokenizer)}


def check_tokenizer(source: Path) -> None:
    """Whether TextLLMRunner can read text as the folder's tokenizer does.

    Raises:
        TargetError: it cannot; says why. InputError: the folder's tokenizer cannot be read.
    """
    tokenizer = Tokenizer.from_folder(source)
    if isinstance(tokenizer.pieces, SentencePieces):
        check_pieces(tokenizer.source)
        return
    table = read_json(tokenizer.source, MOST_TABLE_BYTES)
    for part, known in READ.items():
        others = sorted({*_types(table.get(part))} - known)
        if others:
            problem = f"ExecuTorch's TextLLMRunner does not know {others[0]!r} as {part} of tokenizer.json"
            raise TargetError(problem, where=tokenizer.source, fix="use the runtime onnx-cpu")


def _types(part: Any) -> Iterator[str]:
    """Of a part and of those in its sequence."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for name in ("normalizers", "pretokenizers", "processors", "decoders"):
            for one in part.get(name) or ():
                yield from _types(one)
