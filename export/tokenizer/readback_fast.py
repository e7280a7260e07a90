"""The tokenizer's files of a folder that Hugging Face's library reads, held against the checkpoint's own."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from bluelm.errors import InputError
from bluelm.system.reading import MOST_TABLE_BYTES, read_json
from bluelm.text.added_tokens import optional_json
from bluelm.text.sentencepieces import SentencePieces
from bluelm.text.tokenizer import Tokenizer, tokenizer_files
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.tokenizer.readback import ANY, begin_faults, differing, settings_wanted, table_faults

MADE = {
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
}


def faults(
    folder: Path, artifact: Artifact, quantized: QuantizedCheckpoint, apart: Collection[str] = ()
) -> Iterator[str]:
    """What those in `folder` say otherwise, a clause each; keys of tokenizer_config.json that are `apart` are not
    looked at."""
    source = quantized.folder
    if not any((source / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return
    tokenizer = Tokenizer.from_folder(source)
    try:
        if isinstance(tokenizer.pieces, SentencePieces):
            table = read_json(folder / "tokenizer.json", MOST_TABLE_BYTES)
            yield from begin_faults(table, tokenizer)
            yield from table_faults({**table, "post_processor": None}, tokenizer.source)
            wanted = settings_wanted(quantized, artifact.context)
        else:
            yield from _copied(folder, source, "tokenizer.json")
            wanted = optional_json(source, "tokenizer_config.json")
        wanted = {key: value for key, value in wanted.items() if key != "auto_map"} | {"tokenizer_class": ANY}
        settings = read_json(folder / "tokenizer_config.json")
        sides = ({key: value for key, value in side.items() if key not in apart} for side in (settings, wanted))
        yield from differing("tokenizer_config.json", *sides)
        config = quantized.config
        ids = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
        ids |= {"eos_token_id": list(config.eos_token_ids)}
        yield from differing("generation_config.json", read_json(folder / "generation_config.json"), ids)
    except InputError as error:
        yield str(error)
    except (KeyError, TypeError, AttributeError) as error:
        yield f"tokenizer.json cannot be followed: {error!r}"
    for name in sorted(
        {*tokenizer_files(source), *tokenizer_files(artifact.folder)} - MADE - {"generation_config.json"}
    ):
        yield from _copied(folder, artifact.folder, name)  # that one is held against the checkpoint's


def _copied(folder: Path, source: Path, name: str) -> Iterator[str]:
    theirs = (source / name).read_bytes() if (source / name).is_file() else None
    if (found := (folder / name).read_bytes() if (folder / name).is_file() else None) != theirs:
        yield f"{name} is missing" if found is None else f"{name} is not the checkpoint's"
