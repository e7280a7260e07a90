"""Which tokenizer.json the Kotlin app's own tokenizer is not given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.bundle.byte_pairs import unread
from tests.support.files.tokenizers import write_tokenizer

CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "pieces are Unigram": lambda table: table["model"].update(type="Unigram"),
    "does not know byte_fallback": lambda table: table["model"].update(byte_fallback=True),
    "does not change text as Lowercase": lambda table: table.update(normalizer={"type": "Lowercase"}),
    "not cut into bytes": lambda table: table["pre_tokenizer"]["pretokenizers"].pop(),
    "does not cut text as Split": lambda table: table["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
    "does not cut text as ByteLevel": lambda table: table["pre_tokenizer"]["pretokenizers"][1].update(
        add_prefix_space=True
    ),
    "does not find '<|end|>'": lambda table: table["added_tokens"][0].update(lstrip=True),
}


@pytest.mark.parametrize(("why", "change"), CHANGES.items(), ids=CHANGES)
def test_what_it_reads_otherwise_is_named(why: str, change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "qwen2")
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    assert unread(table) is None
    change(table)
    assert why in str(unread(table))
