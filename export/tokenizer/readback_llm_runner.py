"""The tokenizer that ExecuTorch's TextLLMRunner reads, held against the checkpoint's own files."""

from __future__ import annotations

from collections.abc import Iterator

from bluelm.errors import InputError
from bluelm.system.reading import MOST_TABLE_BYTES, read_json
from bluelm.text.sentencepieces import SentencePieces
from bluelm.text.tokenizer import Tokenizer
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.tokenizer.readback import ANY, begin_faults, differing, settings_wanted, table_faults

TABLE, SETTINGS = "tokenizer.json", "tokenizer_config.json"


def faults(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """Of files that the exporter made of tokenizer.model; those that it copied are compared byte for byte."""
    source, made = quantized.folder, [path.name for path in artifact.paths("runner")]
    if not any((source / name).is_file() for name in ("tokenizer.model", TABLE)):
        yield from (f"the checkpoint has no {name}" for name in made)
        return
    tokenizer = Tokenizer.from_folder(source)
    if not isinstance(tokenizer.pieces, SentencePieces):
        yield from (f"{name} is not the checkpoint's" for name in made)
        return
    try:
        table = read_json(artifact.folder / TABLE, MOST_TABLE_BYTES)
        yield from begin_faults(table, tokenizer)
        yield from table_faults({**table, "post_processor": None}, tokenizer.source, whole=True)
        wanted = {
            key: value for key, value in settings_wanted(quantized, artifact.context).items() if key != "auto_map"
        }
        settings = read_json(artifact.folder / SETTINGS)
        yield from differing(SETTINGS, settings, wanted | {"tokenizer_class": ANY})
    except InputError as error:
        yield str(error)
    except (KeyError, TypeError, AttributeError) as error:
        yield f"{TABLE} cannot be followed: {error!r}"
