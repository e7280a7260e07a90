"""Every architecture in every format: nothing that lies in a sound artifact is called wrong, and all of it is read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bluelm.block import block_of
from bluelm.checkpoint import Checkpoint
from bluelm.errors import TargetError
from bluelm.system.files import demo_checkpoint
from compress.checkpoint.store import QuantizedCheckpoint
from eval.files import compiled, size_plan
from export.artifacts.artifact import Artifact
from export.coreai import export as coreai
from export.coreml import export as coreml
from export.executorch import coreml as executorch_coreml
from export.executorch import xnnpack as executorch
from export.formats import record
from export.gguf import export as gguf_file
from export.litert import export as litert
from export.litert_lm import export as litert_lm
from export.lowering.ranges import calibrate
from export.mlx import export as mlx
from export.npu_genai import export as npu_genai
from export.onnx import cpu as onnx_cpu
from export.onnx import genai as onnx_genai
from export.onnx import npu as onnx_npu
from export.readback import items, read_back
from targets.registry import find
from tests.packages import requires
from tests.support.checkpoints import lowered as lowering
from tests.support.checkpoints.families import baichuan, glm, llama, qwen2, qwen3
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import write_checkpoint

CONTEXT, CHUNK = 64, 16
Make = Callable[[QuantizedCheckpoint, Path], Artifact]


def _npu(export: Callable[..., Artifact]) -> Make:
    tokens = torch.arange(5, 45).unsqueeze(0)
    return lambda source, folder: export(source, calibrate(source, tokens), folder, context=CONTEXT, chunk=CHUNK)


def _steps(export: Callable[..., Artifact], **options: Any) -> Make:
    return lambda source, folder: export(source, folder, context=CONTEXT, chunk=CHUNK, **options)


EXPORTERS: dict[str, Make] = {
    "onnx-cpu": _steps(onnx_cpu.export),
    "onnx-npu": _npu(onnx_npu.export),
    "onnx-npu-genai": _npu(npu_genai.export),
    "onnx-genai": _steps(onnx_genai.export),
    "gguf": lambda source, folder: gguf_file.export(source, folder, context=CONTEXT),
    "mlx": lambda source, folder: mlx.export(source, folder, context=CONTEXT),
    "coreai": lambda source, folder: coreai.export(source, folder, context=CONTEXT),
    "coreai-ane": _steps(coreai.export_static),
    "litert": _steps(litert.export),
    "litert-lm": _steps(litert_lm.export),
    "coreml": _steps(coreml.export),
    "coreml-float32": _steps(coreml.export, activations="float32"),
    "executorch-xnnpack": _steps(executorch.export),
    "executorch-coreml": _steps(executorch_coreml.export),
}


def bluelm(folder: Path) -> Path:
    return write_checkpoint(folder, vocab=96, tokenizer=False)


def tied(folder: Path) -> Path:
    return write_checkpoint(
        folder, vocab=96, tokenizer=False, architecture="LlamaForCausalLM", layer_norm=False, tied=True
    )


def inner_172(folder: Path) -> Path:
    return write_checkpoint(folder, vocab=96, tokenizer=False, inner=172)


MODELS = {make.__name__: make for make in (llama, bluelm, qwen2, qwen3, baichuan, glm, tied, inner_172)}
WIDTHS: dict[str, dict[str, Any]] = {
    "w4-g32": {"bits": 4, "group_size": 32},
    "w4-g32-asymmetric": {"bits": 4, "group_size": 32, "symmetric": False},
    "w8-g32": {"bits": 8, "group_size": 32},
    "w8-row": {"bits": 8, "group_size": -1},
}
SLOW = ("coreml", "coreml-float32", "executorch-xnnpack", "executorch-coreml")
"""Formats that take seconds to write: every kind of block at one width, every width on one of them, one block."""
ALIKE = {"baichuan": "llama"}
"""Families whose block, once read, is another's: formats that are slow to write take one of them."""
CASES = [
    (model, width, kind)
    for model in MODELS
    for width in WIDTHS
    for kind in EXPORTERS
    if width == "w8-row" or model == "bluelm" or (model == "glm" and kind not in SLOW)
    if kind != "coreml-float32" or model in ("bluelm", "glm")
    if kind not in SLOW or model not in ALIKE
]


SYMMETRIC = ("onnx-npu", "onnx-npu-genai", "gguf", "mlx", "coreai", "coreai-ane")


def refusal(model: str, width: str, kind: str) -> str | None:
    """What an exporter says of what its format cannot hold; None where it must write it."""
    narrow = kind in ("litert", "litert-lm", "executorch-xnnpack")
    if kind == "mlx" and model == "glm":
        return "no Llama turns 8 of 16 dimensions"
    if model == "inner_172" and kind in ("gguf", "mlx"):
        return "172"
    if width == "w8-g32" and narrow:
        return "no groups for 8-bit weights"
    if width == "w4-g32-asymmetric" and (narrow or kind in SYMMETRIC):
        return "zero points"
    if kind == "litert-lm" and model == "glm":
        return "begins a text with one token"
    return None


def first_block(folder: Path) -> Path:
    """The checkpoint without its other blocks, in its own names."""
    path, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    tensors = {name: tensor for name, tensor in load_file(path).items() if not re.search(r"layers\.[1-9]", name)}
    save_file(tensors, path)
    config |= {key: 1 for key in ("num_hidden_layers", "num_layers") if key in config}
    config |= {key: config[key][:1] for key in ("layer_types",) if key in config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@cache
def source(model: str, width: str, slow: bool) -> QuantizedCheckpoint:
    home = lowering.folder() / f"architectures-{model}-{width}{'-slow' * slow}"
    made = MODELS[model](home / "float")
    found = rounded(home / "quantized", source=first_block(made) if slow else made, **WIDTHS[width])
    shutil.copyfile(demo_checkpoint() / "tokenizer.model", found.folder / "tokenizer.model")
    return found


@pytest.mark.parametrize(("model", "width", "kind"), CASES)
def test_a_sound_artifact_has_no_fault(model: str, width: str, kind: str, tmp_path: Path) -> None:
    held = source(model, width, kind in SLOW)
    assert held.config == Checkpoint.open(held.folder.parent / "float").config
    refused = refusal(model, width, kind)
    if refused is not None:
        with pytest.raises(TargetError, match=refused):
            EXPORTERS[kind](held, tmp_path / "a")
        return
    artifact = EXPORTERS[kind](held, tmp_path / "a")
    found = read_back(artifact, held)
    assert not [str(finding) for finding in found.wrong]
    assert not found.sentences
    parts = size_plan.planned_parts(held, artifact)
    if parts is not None:
        assert size_plan.deviation(sum(parts.values()), artifact) < 0.05  # so narrow, tensors' alignment counts


@pytest.mark.parametrize(("name", "other"), ALIKE.items())
def test_a_family_that_slow_formats_leave_out_has_anothers_block(name: str, other: str, tmp_path: Path) -> None:
    left_out, taken = (Checkpoint.open(MODELS[model](tmp_path / model)).config for model in (name, other))
    assert block_of(replace(left_out, num_kv_heads=taken.num_kv_heads)) == block_of(taken)
    assert left_out.tie_word_embeddings == taken.tie_word_embeddings


COMPILED = {
    "qnn-context": [name for name in MODELS if name not in (*ALIKE, "inner_172")],  # HTP takes no row of 172
    "qnn-genai": ["qwen3"],
    "executorch-qnn": ["glm"],  # packs the same compiler's binaries
}


@requires("libatomic1")
@pytest.mark.parametrize(("model", "runtime"), [(name, kind) for kind, names in COMPILED.items() for name in names])
def test_a_sound_compiled_artifact_has_no_fault(model: str, runtime: str, tmp_path: Path) -> None:
    """One block through Qualcomm's compiler."""
    held = source(model, "w8-row", True)
    graphs = EXPORTERS[record(runtime).lowered_as](held, tmp_path / "npu")
    artifact = find("snapdragon", runtime=runtime).compile(graphs, tmp_path / "compiled")
    assert not compiled.mismatches(artifact, "npu").note
    found = read_back(artifact, held)
    assert not [str(finding) for finding in found.wrong]
    told = {finding.item for finding in found.untold}
    assert told >= {*items.linear_names(held), *items.vector_names(held), items.ROPE, items.GRAPH}
