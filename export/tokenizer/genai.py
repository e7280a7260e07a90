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
from pathlib import Path

from bluelm.system.files import write_text
from bluelm.system.reading import MOST_TABLE_BYTES, read_json
from bluelm.text.added_tokens import optional_json
from bluelm.text.sentencepieces import SPACE, SentencePieces
from bluelm.text.tokenizer import Tokenizer
from export.tokenizer.genai_cuts import respelled
from export.tokenizer.table import FAST, ROLE, SETTINGS, TABLE, check_pieces, tokenizer_config, tokenizer_json

LONGEST, BLANKS, SPACES = 500, 256, 63  # most bytes of a run; blanks in front of one; more of them as `SPACE`
CLASS = "LlamaTokenizer"  # its word for SentencePiece's BPE; it refuses names that it does not know
CLASSES = {
    "BaichuanTokenizer", "CLIPTokenizer", "ChatGLMTokenizer", "CodeGenTokenizer", "CodeLlamaTokenizer", "GPT2Tokenizer",
    "GPTNeoXTokenizer", "GemmaTokenizer", "InternLM2Tokenizer", "LlamaTokenizer", "Phi3Tokenizer",
    "PreTrainedTokenizer", "Qwen2Tokenizer", "TokenizersBackend",
}  # fmt: skip
"""Of decoders, and their "Fast" ones: what onnxruntime-extensions takes beside tokenizer.json."""
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
        return _write_cuts(folder, source) | _write_class(folder, source)
    if not (source / "tokenizer.model").is_file():
        return {}
    tokenizer = Tokenizer.from_folder(source)
    settings = tokenizer_config(tokenizer, optional_json(source, SETTINGS), context) | {"tokenizer_class": CLASS}
    table = tokenizer_json(tokenizer, CUT)
    write_text(folder / TABLE, json.dumps(table, ensure_ascii=False, separators=(",", ":")) + "\n")
    write_text(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
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


def _write_class(folder: Path, source: Path) -> dict[str, str]:
    """tokenizer_config.json with a class that genai knows; {} where it knows the checkpoint's.

    Where there is none it reads no template; others it refuses.
    """
    settings = optional_json(source, SETTINGS)
    if str(settings.get("tokenizer_class")).removesuffix("Fast") in CLASSES:
        return {}
    write_text(folder / SETTINGS, json.dumps(settings | {"tokenizer_class": FAST}, indent=1) + "\n")
    return {SETTINGS: ROLE}


def check_tokenizer(source: Path) -> None:
    """Whether genai can read text as the folder's tokenizer does.

    Raises:
        TargetError: it cannot; says why. InputError: the folder's tokenizer cannot be read.
    """
    tokenizer = Tokenizer.from_folder(source)
    if isinstance(tokenizer.pieces, SentencePieces):
        check_pieces(tokenizer.source)
    elif tokenizer.source.name == TABLE:
        respelled(read_json(tokenizer.source, MOST_TABLE_BYTES).get("pre_tokenizer"))
