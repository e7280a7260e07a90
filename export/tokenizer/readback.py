"""The tokenizer that genai reads, held against the checkpoint's own files."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bluelm.errors import InputError
from bluelm.system.reading import MOST_TABLE_BYTES, read_json
from bluelm.text.added_tokens import optional_json
from bluelm.text.jsonpieces import JsonPieces
from bluelm.text.sentencepieces import SentencePieces, read_model
from bluelm.text.tokenizer import Tokenizer
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact

ANY, SETTINGS = "PreTrainedTokenizerFast", "tokenizer_config.json"
KINDS = {"LlamaTokenizer"}  # that take SentencePiece's BPE from tokenizer.json
BLANKS = " ▁\n"
CUT = f"  def f(x):\n    return 'a1'\n\n \n你好，世界 {'x' * 300} é\tb  1\n\n23 4.5\n\n\n6'll x7  "
"""A text with all that must stay together."""
_STATES = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
_MODEL = {
    "type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
    "byte_fallback": True, "ignore_merges": False,
}  # fmt: skip


def faults(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """Of files that the exporter made of tokenizer.model; those that it copied are compared byte for byte."""
    source, theirs = (quantized.folder / name for name in ("tokenizer.model", "tokenizer.json"))
    made = [path.name for path in artifact.paths("runner")]
    if theirs.exists() or not source.exists():
        yield from (f"{name} is not the checkpoint's" for name in made if name not in ("tokenizer.json", SETTINGS))
        if theirs.name in made:
            yield from _cut_faults(artifact.folder / theirs.name, theirs)
        if SETTINGS in made:
            yield from _class_faults(artifact.folder, quantized.folder)
        return
    try:
        table = read_json(artifact.folder / "tokenizer.json", MOST_TABLE_BYTES)
        settings = read_json(artifact.folder / SETTINGS)
        yield from table_faults(table, source)
        yield from _settings_faults(settings, quantized, artifact.context)
    except InputError as error:
        yield str(error)
    except (KeyError, TypeError, AttributeError) as error:
        yield f"tokenizer.json cannot be followed: {error!r}"


def _class_faults(mine: Path, theirs: Path) -> Iterator[str]:
    """Of a tokenizer_config.json that names another class, of those that take any tokenizer.json."""
    try:
        found, wanted = read_json(mine / SETTINGS), optional_json(theirs, SETTINGS)
    except InputError as error:
        yield str(error)
        return
    if found.get("tokenizer_class") != ANY:
        yield f"{SETTINGS} names the class {found.get('tokenizer_class')!r}"
    yield from differing(SETTINGS, found | {"tokenizer_class": ANY}, wanted | {"tokenizer_class": ANY})


def _cut_faults(mine: Path, theirs: Path) -> Iterator[str]:
    """Of a tokenizer.json whose cuts are put otherwise: the tokens of Hugging Face's library, and all the rest."""
    try:
        found, wanted = (read_json(path, MOST_TABLE_BYTES) for path in (mine, theirs))
        tokens, right = (JsonPieces(path).encode(CUT, trusted=False) for path in (mine, theirs))
    except (InputError, OSError) as error:
        yield str(error)
        return
    for key in sorted((found.keys() | wanted.keys()) - {"pre_tokenizer", "truncation", "padding"}):
        if found.get(key, "nothing") != wanted.get(key, "nothing"):
            yield f"tokenizer.json says another {key}"
    if tokens != right:
        yield "tokenizer.json cuts text otherwise"


def table_faults(table: dict[str, Any], source: Path, *, whole: bool = False) -> Iterator[str]:
    """tokenizer.json against the pieces of the tokenizer.model `source`.

    Args:
        whole: for ExecuTorch's reader: a text is not cut, and tokens are decoded one by one.
    """
    proto = read_model(source)
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    normal = {text: score for text, score, kind in pieces if kind == 1}
    model, prefix = table["model"], proto.normalizer_spec.add_dummy_prefix
    for key, value in _STATES.items():
        if table.get(key, "nothing") != value:
            yield f"tokenizer.json says {key} {json.dumps(table.get(key, 'nothing'))[:80]}"
    for key, value in {**_MODEL, "unk_token": next((t for t, _, kind in pieces if kind == 2), None)}.items():
        if model.get(key, "nothing") != value:
            yield f"tokenizer.json's model says {key} {model.get(key, 'nothing')!r} instead of {value!r}"
    if model["vocab"] != {text: index for index, (text, _, _) in enumerate(pieces)}:
        yield "tokenizer.json has other pieces"
    pairs = [tuple(pair.split(" ")) for pair in model["merges"]]
    splits = {(text[:cut], text[cut:]) for text in normal for cut in range(1, len(text))}
    if len(pairs) != len(set(pairs)) or set(pairs) != {(a, b) for a, b in splits if a in normal and b in normal}:
        yield "tokenizer.json has other merges"
    else:
        scores = [normal[a + b] for a, b in pairs]
        if any(first < second for first, second in itertools.pairwise(scores)):
            yield "tokenizer.json has its merges in another order"
    yield from _mark_faults(table["added_tokens"], pieces, source.parent, prefix or whole)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    put = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    if table["normalizer"] != {"type": "Sequence", "normalizers": [*put, space]}:
        yield "tokenizer.json treats spaces otherwise"
    uncut = table["pre_tokenizer"] is None if whole else _cuts_before_blanks(table["pre_tokenizer"])
    if not uncut:
        yield "tokenizer.json cuts text before it merges"
    steps = table["decoder"]["decoders"]
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix and not whole else []
    if steps != [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]:
        yield "tokenizer.json writes text otherwise"


def begin_faults(table: dict[str, Any], tokenizer: Tokenizer) -> Iterator[str]:
    """What the library puts in front of a text."""
    told = table.get("post_processor") or {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]}
    front: list[int] = []
    for step in told["single"]:
        if "SpecialToken" not in step:
            break
        front += told["special_tokens"][step["SpecialToken"]["id"]]["ids"]
    if told["type"] != "TemplateProcessing" or front != list(tokenizer.front) or "Sequence" not in told["single"][-1]:
        yield f"tokenizer.json begins a text with {front} instead of {list(tokenizer.front)}"


def differing(name: str, found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """Keys of a file that have other values."""
    for key in sorted(wanted.keys() | found.keys()):
        mine, theirs = found.get(key, "nothing"), wanted.get(key, "nothing")
        if mine != theirs:
            yield f"{name} says {key} {mine!r} instead of {theirs!r}"


def _cuts_before_blanks(cut: dict[str, Any]) -> bool:
    """Whether text is cut only where a blank follows a character that is none: no piece goes on over that."""
    if (cut["type"], cut["behavior"], cut["invert"], *cut["pattern"]) != ("Split", "Isolated", False, "Regex"):
        return False
    try:
        parts = [list(re.finditer(cut["pattern"]["Regex"], text)) for text in (CUT, CUT.replace(" ", "▁"))]
    except re.error:
        return False
    for found, text in zip(parts, (CUT, CUT.replace(" ", "▁")), strict=True):
        starts = [one.start() for one in found]
        blank = [character in BLANKS for character in text]
        wanted = [i for i in range(len(text)) if i == 0 or (blank[i] and not blank[i - 1])]
        if starts != wanted or sum(len(one[0]) for one in found) != len(text):
            return False
    return True


def _mark_faults(
    added: list[dict[str, Any]], pieces: list[tuple[str, float, int]], folder: Path, prefix: bool
) -> Iterator[str]:
    """Marks are one token wherever they stand; characters that never merge may be so as well."""
    marks = {index: text for index, (text, _, kind) in enumerate(pieces) if kind in (3, 4)}
    own = Tokenizer.from_folder(folder).pieces
    marks |= own.added() if isinstance(own, SentencePieces) else {}
    found = {token["id"]: token["content"] for token in added}
    if len(found) != len(added) or any(found.get(index) != text for index, text in marks.items()):
        yield "tokenizer.json knows other marks"
    holders = Counter(character for text, _, kind in pieces if kind == 1 for character in set(text))
    for token in added:
        if token["id"] in marks:
            special = token["id"] < len(pieces) and pieces[token["id"]][2] == 3
            if token["special"] != special:
                yield f"tokenizer.json says that {token['content']!r} is {'no' if special else 'a'} control token"
        elif prefix or len(token["content"]) != 1 or holders[token["content"]] != 1:
            yield f"tokenizer.json makes {token['content']!r} a mark"
        if any(token[key] for key in ("single_word", "lstrip", "rstrip", "normalized")):
            yield f"tokenizer.json lets {token['content']!r} take more than its text"


def _settings_faults(settings: dict[str, Any], quantized: QuantizedCheckpoint, context: int) -> Iterator[str]:
    """tokenizer_config.json: the checkpoint's, but for the class, and with names for special tokens."""
    if settings.get("tokenizer_class") not in KINDS:
        yield f"tokenizer_config.json names the class {settings.get('tokenizer_class')!r}"
    found = {key: value for key, value in settings.items() if key != "tokenizer_class"}
    yield from differing("tokenizer_config.json", found, settings_wanted(quantized, context))


def settings_wanted(quantized: QuantizedCheckpoint, context: int) -> dict[str, Any]:
    """tokenizer_config.json without its class: the checkpoint's, and the special tokens by name."""
    theirs = optional_json(quantized.folder, "tokenizer_config.json")
    tokenizer = Tokenizer.from_folder(quantized.folder)
    assert isinstance(tokenizer.pieces, SentencePieces)
    texts = tokenizer.pieces.texts()
    named = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
    wanted: dict[str, Any] = {"model_max_length": context}
    for name, token in named.items():
        wanted |= {name: texts[token]} if token in texts else {}
    return wanted | {key: value for key, value in theirs.items() if key != "tokenizer_class"}
