"""The folder that Apple's `CoreAILanguageModel(resourcesAt:)` opens, with a program of either form:

    model/metadata.json         what it is: vocabulary, context, where program and tokenizer lie
    model/model.aimodel/        the program with its weights, as Apple's package writes it
    model/tokenizer/            tokenizer.json, tokenizer_config.json, chat template, as Hugging Face's libraries do it

Form: `coreai_models.export.bundle` and `ModelBundle.swift` of github.com/apple/coreai-models, metadata version 0.2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bluelm.system.files import atomic_folder, write_text
from bluelm.system.progress import Progress, Silent
from bluelm.system.reading import read_json
from bluelm.text.tokenizer import Tokenizer
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact, Format
from export.artifacts.mobile import complete
from export.coreai import ASSET, FOLDER, METADATA, TOKENIZER
from export.coreai.stops import with_stops
from export.tokenizer.fast import write_tokenizer
from export.tokenizer.table import SETTINGS

PACKAGE = "coreai-core"
NOTE = "float16 activations"


def export(
    quantized: QuantizedCheckpoint,
    folder: Path,
    *,
    context: int = 512,
    about: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write the artifact `folder` for GPUs: one function for lengths of any kind.

    Args:
        context: the longest sequence.
        about: what it says of the model: `name`, `license`, `version`, where they are known.

    Raises:
        TargetError: the program cannot hold a weight exactly; says which.
    """
    from export.coreai.program import build

    return _written("coreai", partial(build, quantized, context), quantized, folder, context, context, about, progress)


def export_static(
    quantized: QuantizedCheckpoint,
    folder: Path,
    *,
    context: int = 512,
    chunk: int = 128,
    about: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write the artifact `folder` for the Neural Engine: functions for fixed lengths.

    Args:
        context: slots of the caches. chunk: tokens of a prompt in one call. about: as for `export`.

    Raises:
        TargetError: as `export`; or Apple's engine opens no program of these lengths.
    """
    from export.coreai.static.program import build

    program = partial(build, quantized, context, chunk)
    return _written("coreai-ane", program, quantized, folder, context, chunk, about, progress)


def _written(
    kind: Format,
    program: Callable[[], Any],
    quantized: QuantizedCheckpoint,
    folder: Path,
    context: int,
    chunk: int,
    about: Mapping[str, str] | None,
    progress: Progress | None,
) -> Artifact:
    """The artifact; what Apple's runtime opens is `model` in it."""
    about = about or {}
    with atomic_folder(folder) as temporary, (progress or Silent()).task("write Core AI", 1) as task:
        bundle = temporary / FOLDER
        bundle.mkdir()
        program().save_asset(bundle / ASSET)
        _write(bundle / ASSET / METADATA, asset_metadata(quantized, about))
        _write(bundle / METADATA, bundle_metadata(quantized, context, about))
        written = _tokenizer(quantized, bundle / TOKENIZER, context)
        roles = {f"{FOLDER}/{ASSET}/main.mlirb": "model", f"{FOLDER}/{ASSET}/main.hash": "hash"}
        roles |= {f"{FOLDER}/{path}": "runner" for path in (f"{ASSET}/{METADATA}", METADATA, *written)}
        told = {PACKAGE: version(PACKAGE)}
        complete(
            temporary, kind, quantized, roles, context=context, chunk=chunk, kv_bits=16, producers=told, notes=(NOTE,),
            about=about,
        )  # fmt: skip
        task.advance(note=ASSET)
    return Artifact.open(folder)


def asset_metadata(quantized: QuantizedCheckpoint, about: Mapping[str, str]) -> dict[str, Any]:
    """metadata.json of the program: keys of Apple's `AIModelAssetMetadata`, without the time of day."""
    told = {"description": about["name"]} if "name" in about else {}
    told |= {"license": about["license"]} if "license" in about else {}
    own = {"quantized": quantized.digest()} | ({"version": about["version"]} if "version" in about else {})
    return {"assetVersion": "2.0", "producer": f"{PACKAGE} {version(PACKAGE)}", "creatorDefinedMetadata": own, **told}


def bundle_metadata(quantized: QuantizedCheckpoint, context: int, about: Mapping[str, str]) -> dict[str, Any]:
    """metadata.json of the folder, kind "llm"."""
    name, config = about.get("name", "model"), quantized.config
    language = {
        "tokenizer": name,
        "vocab_size": config.vocab_size,
        "max_context_length": context,
        "embedded_tokenizer": True,
        "function_map": {"main": ["main"]},
    }
    own = {key: about[key] for key in ("license", "version") if key in about}
    return {
        "metadata_version": "0.2",
        "kind": "llm",
        "name": name,
        "assets": {"main": ASSET},
        "language": language,
        "source": {"model_definition": "torch", "hf_model_id": name},
        **({"user_data": own} if own else {}),
    }


def _tokenizer(quantized: QuantizedCheckpoint, folder: Path, context: int) -> list[str]:
    """Its files, named from the bundle on."""
    folder.mkdir()
    written = write_tokenizer(quantized, folder, context)
    if SETTINGS in written:
        tokenizer = Tokenizer.from_folder(quantized.folder)
        settings = with_stops(read_json(folder / SETTINGS), tokenizer, quantized.config.eos_token_ids)
        _write(folder / SETTINGS, settings)
    return [f"{TOKENIZER}/{name}" for name in written]


def _write(path: Path, values: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")
