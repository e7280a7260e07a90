"""A debug build of an ONNX or LiteRT artifact: the same graphs and weights, every block's output shown.

   x -> block 0 -> layers.0.output -> ... -> logits        outputs: logits, keys.N, values.N
becomes the same with                                     outputs: ..., layers.0.output, layers.1.output, ...

The fused graph of onnx-genai adds what a block gives last in the norm behind it: that norm's sum is shown.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from bluelm.block import STREAM, block_of
from bluelm.config import ModelConfig
from bluelm.errors import InputError
from bluelm.system.files import atomic_folder
from export.artifacts.artifact import Artifact, list_files
from export.lowering.decoder import block_output
from export.onnx.reader import read_model

DEBUG_NOTE = "debug build: block outputs"


def genai_stream(config: ModelConfig) -> list[str]:
    """Names in the onnx-genai graph: the stream before the first block and behind each."""
    first = next(norm.weight for norm in block_of(config).norms.values() if norm.reads == STREAM)
    norms = [*(f"model.layers.{layer}.{first}" for layer in range(1, config.num_layers)), "model.norm"]
    return ["embed", *(f"{norm}.sum" for norm in norms)]


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
    graphs = {path.name for role in artifact.record.graphs for path in artifact.paths(role)}
    with atomic_folder(folder) as temporary:
        for file in artifact.files:
            target = temporary / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.path in graphs:
                _rewrite(artifact, artifact.folder / file.path, target, values)
            else:
                _link(artifact.folder / file.path, target)
        files = list_files(temporary, {file.path: file.role for file in artifact.files})
        notes = (*artifact.notes, DEBUG_NOTE)
        artifact.model_copy(update={"files": files, "notes": notes}).save(temporary)
    return Artifact.open(folder)


def _rewrite(artifact: Artifact, source: Path, target: Path, values: Sequence[str]) -> None:
    if artifact.format == "litert":
        from export.litert.debug import open_up

        open_up(source, target, [block_output(layer) for layer in range(artifact.model.num_layers)], values)
    else:
        _open_up(artifact, source, target, values)


def _open_up(artifact: Artifact, source: Path, target: Path, values: Sequence[str]) -> None:
    model = read_model(source)
    made = {name for node in model.graph.node for name in node.output}
    shown = {value.name for value in model.graph.output}  # a part shows its last block anyway
    fused = artifact.format == "onnx-genai"
    tokens = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    shape = ("B", "S", artifact.model.hidden_size) if fused else (1, tokens, artifact.model.hidden_size)
    parts = 1 if fused else len(artifact.paths("decode"))
    layers = range(artifact.model.num_layers)
    for name in genai_stream(artifact.model) if fused else map(block_output, layers):
        if name in made and name not in shown:
            model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        elif name not in made and parts == 1:
            raise InputError(f"the graph has no value {name}", where=source, fix="export it again")
    shown |= {value.name for value in model.graph.output}
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in values if name in made - shown
    )
    onnx.save(model, target)


def _link(source: Path, target: Path) -> None:
    """A hard link where the file system has them; weights are large."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
