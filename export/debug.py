"""A debug build of an ONNX or LiteRT artifact: the same graphs and weights, every block's output shown.

   x -> block 0 -> layers.0.output -> ... -> logits        outputs: logits, keys.N, values.N
becomes the same with                                     outputs: ..., layers.0.output, layers.1.output, ...
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from bluelm.errors import InputError
from bluelm.files import atomic_folder
from export.artifact import Artifact, list_files
from export.onnx_decoder import GRAPHS

DEBUG_NOTE = "debug build: block outputs"
REWRITTEN = {"onnx-cpu": GRAPHS, "onnx-npu": GRAPHS, "litert": ("model",)}  # format: roles of its graphs


def block_name(layer: int) -> str:
    """The lowered decoder's name of a block's output."""
    return f"layers.{layer}.output"


def debug_build(artifact: Artifact, folder: Path) -> Artifact:
    """Write the artifact once more into `folder`, its graphs with the outputs of the blocks.

    Raises:
        InputError: an artifact of another kind, or one whose graphs have no such values.
    """
    if artifact.format not in REWRITTEN:
        raise InputError(
            f"a {artifact.format} artifact cannot be opened up",
            where=artifact.folder,
            fix="give the artifact that it was compiled from, or export a debug build",
        )
    graphs = {artifact.path(role).name for role in REWRITTEN[artifact.format]}
    with atomic_folder(folder) as temporary:
        for file in artifact.files:
            target = temporary / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.path in graphs:
                _rewrite(artifact, artifact.folder / file.path, target)
            else:
                _link(artifact.folder / file.path, target)
        files = list_files(temporary, {file.path: file.role for file in artifact.files})
        notes = (*artifact.notes, DEBUG_NOTE)
        artifact.model_copy(update={"files": files, "notes": notes}).save(temporary)
    return Artifact.open(folder)


def _rewrite(artifact: Artifact, source: Path, target: Path) -> None:
    if artifact.format == "litert":
        from export.litert_debug import open_up

        open_up(source, target, [block_name(layer) for layer in range(artifact.model.num_layers)])
    else:
        _open_up(artifact, source, target)


def _open_up(artifact: Artifact, source: Path, target: Path) -> None:
    model = onnx.load(source, load_external_data=False)
    made = {name for node in model.graph.node for name in node.output}
    tokens = next(i for i in model.graph.input if i.name == "positions").type.tensor_type.shape.dim[0].dim_value
    shape = (1, tokens, artifact.model.hidden_size)
    for layer in range(artifact.model.num_layers):
        if block_name(layer) not in made:
            raise InputError(f"the graph has no value {block_name(layer)}", where=source, fix="export it again")
        model.graph.output.append(helper.make_tensor_value_info(block_name(layer), TensorProto.FLOAT, shape))
    onnx.save(model, target)


def _link(source: Path, target: Path) -> None:
    """A hard link where the file system has them; weights are large."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
