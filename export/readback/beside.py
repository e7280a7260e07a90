"""Readback of the files beside every artifact's program: artifact.json, config.json and the tokenizer's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from bluelm.config import ModelConfig
from bluelm.errors import InputError
from bluelm.system.reading import read_json
from bluelm.text.tokenizer import TOKENIZER_FILES, tokenizer_files
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import MANIFEST, Artifact
from export.readback import items

CONFIG = "config.json"
_ModelProto: Any = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]


def findings(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[items.Finding]:
    """Of every format."""
    yield from items.checked(MANIFEST, _manifest_faults(artifact, quantized))
    yield from items.checked(CONFIG, _config_faults(artifact.folder / CONFIG, quantized.folder / CONFIG))
    made = {path.name for path in artifact.paths("runner")} & {*(artifact.record.made or ())}
    files = {*TOKENIZER_FILES, *tokenizer_files(artifact.folder), *tokenizer_files(quantized.folder)}
    for name in sorted(files - made):
        yield from items.checked(name, _tokenizer_faults(artifact.folder / name, quantized.folder / name))


def config_faults(found: ModelConfig, wanted: ModelConfig) -> Iterator[str]:
    """Fields that are others."""
    for field in fields(ModelConfig):
        mine, theirs = getattr(found, field.name), getattr(wanted, field.name)
        if mine != theirs:
            yield f"{field.name} is {mine} instead of {theirs}"


def _manifest_faults(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    yield from config_faults(artifact.model, quantized.config)
    if artifact.quantized_digest != quantized.digest():
        yield "quantized_digest is that of another quantized checkpoint"


def _config_faults(mine: Path, theirs: Path) -> Iterator[str]:
    """Keys whose values are others; types count, so that true is not 1."""
    try:
        found, wanted = read_json(mine), read_json(theirs)
    except (InputError, OSError) as error:
        yield f"cannot be read: {error}"
        return
    for key in sorted(found.keys() | wanted.keys()):
        first, second = (json.dumps(side.get(key, "nothing")) for side in (found, wanted))
        if first != second:
            yield f"{key} is {first} instead of {second}"


def _tokenizer_faults(mine: Path, theirs: Path) -> Iterator[str]:
    """Byte for byte."""
    if not theirs.is_file():
        if mine.exists():
            yield "the checkpoint has no such file"
        return
    if not mine.is_file():
        yield "is missing"
        return
    found, wanted = mine.read_bytes(), theirs.read_bytes()
    if found != wanted:
        yield _first_piece(found, wanted) if mine.suffix == ".model" else "is not the checkpoint's, byte for byte"


def _first_piece(found: bytes, wanted: bytes) -> str:
    """The first of the pieces, scores and kinds that is another."""
    mine, theirs = _ModelProto(), _ModelProto()
    try:
        mine.ParseFromString(found)
        theirs.ParseFromString(wanted)
    except DecodeError:
        return "is not the checkpoint's, byte for byte"
    if len(mine.pieces) != len(theirs.pieces):
        return f"{len(mine.pieces)} pieces instead of {len(theirs.pieces)}"
    for index, (a, b) in enumerate(zip(mine.pieces, theirs.pieces, strict=True)):
        if a != b:
            first, second = (f"{p.piece!r} (score {p.score:g}, kind {p.type})" for p in (a, b))
            return f"piece {index} is {first} instead of {second}"
    return "the pieces are the checkpoint's, what it says of itself is not"
