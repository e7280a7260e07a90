"""Changes of a .litertlm file, one section at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from export.artifacts.artifact import Artifact
from export.litert_lm.container import Kind, Section, write
from export.litert_lm.export import compressed
from export.litert_lm.reader import METADATA, MODEL, TOKENIZER, LitertLmFile
from tests.support import damage
from tests.support.edits import litert

Files = Callable[[Artifact], Artifact]
NAME = "model.litertlm"


def sections(path: Path) -> dict[str, Section]:
    """By kind; all bytes in memory."""
    file, whole = LitertLmFile(path), path.read_bytes()
    return {
        held.kind: Section(getattr(Kind, held.kind), whole[held.begin : held.end], held.items) for held in file.sections
    }


def repacked(path: Path, change: Callable[[dict[str, Section]], None], **entries: str) -> None:
    """The file with other sections, and more or other entries of its header."""
    held, told = sections(path), LitertLmFile(path).entries
    change(held)
    write(path, list(held.values()), {**told, **entries})


def graph(change: litert.Change) -> Files:
    """The .tflite in it, changed as one by itself."""

    def files(artifact: Artifact) -> Artifact:
        alone = artifact.folder / "alone.tflite"

        def rewrite(held: dict[str, Section]) -> None:
            content = held[MODEL].content
            assert isinstance(content, bytes)
            alone.write_bytes(content)
            litert.rewritten(alone, change)
            held[MODEL] = replace(held[MODEL], content=alone.read_bytes())

        repacked(artifact.folder / NAME, rewrite)
        alone.unlink()
        return damage.again(artifact)

    return files


def table(change: Callable[[dict[str, Any]], Any]) -> Files:
    """Its tokenizer.json."""

    def files(artifact: Artifact) -> Artifact:
        path = artifact.folder / NAME
        found = LitertLmFile(path).table()
        change(found)
        content = compressed(json.dumps(found, ensure_ascii=False).encode())
        repacked(path, lambda held: held.update({TOKENIZER: replace(held[TOKENIZER], content=content)}))
        return damage.again(artifact)

    return files


def told(change: Callable[[Any], Any]) -> Files:
    """Its `LlmMetadata`."""

    def files(artifact: Artifact) -> Artifact:
        path = artifact.folder / NAME
        found = LitertLmFile(path).metadata()
        change(found)
        content = found.SerializeToString()
        repacked(path, lambda held: held.update({METADATA: replace(held[METADATA], content=content)}))
        return damage.again(artifact)

    return files
