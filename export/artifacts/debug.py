"""A debug build of an artifact: the same graphs and weights, every block's output shown.

   x -> block 0 -> layers.0.output -> ... -> logits        outputs: logits, keys.N, values.N
becomes the same with                                     outputs: ..., layers.0.output, layers.1.output, ...

The record of a format says what writes its graphs once more (`open_up`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from bluelm.errors import InputError
from bluelm.system.files import atomic_folder
from export.artifacts.artifact import Artifact, list_files
from export.formats import function

DEBUG_NOTE = "debug build: block outputs"
OpenUp = Callable[[Artifact, Path, Path, Sequence[str]], None]
"""Writes a graph of the artifact from one path to another, with the outputs of blocks and of more values."""


def debug_build(artifact: Artifact, folder: Path, values: Sequence[str] = ()) -> Artifact:
    """Write the artifact once more into `folder`, its graphs with the outputs of the blocks.

    Args:
        values: more values of the lowered decoder to show, where a graph has them.

    Raises:
        InputError: an artifact of another kind, or one whose graphs have no such values.
    """
    if artifact.record.blocks != "rewritten":
        raise InputError(
            f"a {artifact.format} artifact cannot be opened up",
            where=artifact.folder,
            fix="give the artifact that it was compiled from, or export a debug build",
        )
    assert artifact.record.open_up is not None, f"{artifact.format}: blocks are rewritten by nobody"
    open_up: OpenUp = function(artifact.record.open_up)
    graphs = {path.name for role in artifact.record.graphs for path in artifact.paths(role)}
    with atomic_folder(folder) as temporary:
        for file in artifact.files:
            target = temporary / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.path in graphs:
                open_up(artifact, artifact.folder / file.path, target, values)
            else:
                _link(artifact.folder / file.path, target)
        files = list_files(temporary, {file.path: file.role for file in artifact.files})
        notes = (*artifact.notes, DEBUG_NOTE)
        artifact.model_copy(update={"files": files, "notes": notes}).save(temporary)
    return Artifact.open(folder)


def _link(source: Path, target: Path) -> None:
    """A hard link where the file system has them; weights are large."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
