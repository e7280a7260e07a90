"""What Core AI's folder tells of itself beside the program: both metadata.json, and the tokenizer's files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bluelm.errors import InputError
from bluelm.system.reading import read_json
from bluelm.text.tokenizer import Tokenizer
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.coreai import ASSET, FOLDER, METADATA, TOKENIZER
from export.coreai.stops import KEYS, SPECIAL, stops
from export.tokenizer.readback import differing
from export.tokenizer.readback_fast import faults as tokenizer_faults


def faults(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """A clause each."""
    bundle = artifact.folder / FOLDER
    try:
        yield from _bundle_faults(read_json(bundle / METADATA), artifact)
        yield from _asset_faults(read_json(bundle / ASSET / METADATA), artifact, quantized)
        yield from tokenizer_faults(bundle / TOKENIZER, artifact, quantized, apart=KEYS)
        if (bundle / TOKENIZER / "tokenizer.json").is_file():
            yield from _stop_faults(artifact, quantized)
    except InputError as error:
        yield str(error)
    except (KeyError, TypeError, AttributeError) as error:
        yield f"what the folder tells cannot be followed: {error!r}"
    extra = {path.name for path in bundle.iterdir()} - {METADATA, ASSET, TOKENIZER}
    extra |= {path.name for path in (bundle / ASSET).iterdir()} - {METADATA, "main.mlirb", "main.hash"}
    yield from (f"{name} does not belong there" for name in sorted(extra))


def _bundle_faults(found: dict[str, Any], artifact: Artifact) -> Iterator[str]:
    about = artifact.about
    name = about.get("name", "model")
    wanted = {
        "metadata_version": "0.2",
        "kind": "llm",
        "name": name,
        "assets": {"main": ASSET},
        "source": {"model_definition": "torch", "hf_model_id": name},
        "language": {
            "tokenizer": name,
            "vocab_size": artifact.model.vocab_size,
            "max_context_length": artifact.context,
            "embedded_tokenizer": True,
            "function_map": {"main": ["main"]},
        },
    }
    own = {key: about[key] for key in ("license", "version") if key in about}
    yield from differing(METADATA, found, wanted | ({"user_data": own} if own else {}))


def _asset_faults(found: dict[str, Any], artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    about = artifact.about
    own = {"quantized": quantized.digest()} | ({"version": about["version"]} if "version" in about else {})
    wanted = {
        "assetVersion": "2.0",
        "producer": f"coreai-core {artifact.producers.get('coreai-core')}",
        "creatorDefinedMetadata": own,
        **({"description": about["name"]} if "name" in about else {}),
        **({"license": about["license"]} if "license" in about else {}),
    }
    yield from differing(f"{METADATA} of the program", found, wanted)


def _stop_faults(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """Every end token and no other but the tokenizer's own ends an answer, by Apple's rules."""
    folder = artifact.folder / FOLDER / TOKENIZER
    own = {Tokenizer.from_folder(quantized.folder).eos} - {None}
    wanted, found = {*quantized.config.eos_token_ids}, stops(folder)
    if not wanted <= found <= wanted | own:
        yield f"answers end with {sorted(found)} instead of {sorted(wanted)}"
    if not isinstance(read_json(folder / "tokenizer_config.json").get(SPECIAL), list):
        yield f"tokenizer_config.json has no {SPECIAL}"
