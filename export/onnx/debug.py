"""An ONNX graph with the outputs of its blocks.

   x -> block 0 -> layers.0.output -> ... -> logits        outputs: logits, keys.N, values.N
becomes the same with                                     outputs: ..., layers.0.output, layers.1.output, ...

The fused graph of onnx-genai adds what a block gives last in the norm behind it: that norm's sum is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from bluelm.block import STREAM, block_of
from bluelm.config import ModelConfig
from bluelm.errors import InputError
from export.artifacts.artifact import Artifact
from export.lowering.decoder import block_output
from export.onnx.reader import read_model


def genai_stream(config: ModelConfig) -> list[str]:
    """Names in the onnx-genai graph: the stream before the first block and behind each."""
    first = next(norm.weight for norm in block_of(config).norms.values() if norm.reads == STREAM)
    norms = [*(f"model.layers.{layer}.{first}" for layer in range(1, config.num_layers)), "model.norm"]
    return ["embed", *(f"{norm}.sum" for norm in norms)]


def open_up(artifact: Artifact, source: Path, target: Path, values: Sequence[str]) -> None:
    """Write `source` to `target` with the stream behind every block among its outputs.

    Args:
        values: more values of the lowered decoder, shown where the graph has them.

    Raises:
        InputError: the graph has no such stream.
    """
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
