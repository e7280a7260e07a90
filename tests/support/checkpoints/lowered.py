"""Small quantized checkpoints and the artifacts made of them, built once a test session."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bluelm.checkpoint import Checkpoint
from calibration.samples import CalibrationReport, Samples
from compress.checkpoint.store import QuantizedCheckpoint
from compress.engine import quantize
from compress.recipe import Recipe
from export.artifacts.artifact import Artifact
from export.lowering.ranges import Ranges, calibrate
from export.onnx import cpu as onnx_cpu
from export.onnx import npu as onnx_npu
from export.readback import read_back
from tests.support.checkpoints.shapes import write_checkpoint

VOCAB, CONTEXT, CHUNK = 384, 32, 8
SYMMETRIC = {
    "w4-g32": {},
    "w8-g32": {"bits": 8},
    "w4-row": {"group_size": -1},
    "w8-row-head4": {"bits": 8, "group_size": -1, "head_bits": 4, "head_group_size": 64},
}
ASYMMETRIC = {
    "w4-g32-asymmetric": {"symmetric": False},
    "w8-row-asymmetric-embed4": {"symmetric": False, "bits": 8, "group_size": -1, "embed_bits": 4},
    "w4-row-asymmetric-head4": {"symmetric": False, "group_size": -1, "head_bits": 4},
}
RECIPES = SYMMETRIC | ASYMMETRIC
PLAIN = "w4-g32"
_HOME = tempfile.TemporaryDirectory(prefix="bluelm-tests-")


@cache
def folder() -> Path:
    """Removed when Python ends."""
    return Path(_HOME.name)


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random tokens of the vocabulary."""
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def windows(count: int = 6, length: int = CONTEXT) -> Tensor:
    """int64 [count, length]."""
    return torch.tensor([tokens(length, seed) for seed in range(100, 100 + count)])


@cache
def checkpoint(rope: str = "", **shape: Any) -> Checkpoint:
    """A random BlueLM: 2 layers, 64 wide, 4 heads over 2; `rope` is its rope_scaling as JSON."""
    if rope:
        shape["rope_scaling"] = json.loads(rope)
    place = folder() / f"checkpoint-{len(list(folder().iterdir()))}"
    return Checkpoint.open(write_checkpoint(place, vocab=VOCAB, **shape))


@cache
def quantized(recipe: str = PLAIN, **shape: Any) -> QuantizedCheckpoint:
    """By a recipe of the table above."""
    report = CalibrationReport("random", "", 0, 0, 1, 4, 4, 0, 0.0, 0.0, 0.0, 0.0, ())
    samples = Samples(windows(1, 4), report)
    place = folder() / f"quantized-{recipe}-{_slug(shape)}"
    return quantize(checkpoint(**shape), samples, Recipe.make({"method": "rtn", **RECIPES[recipe]}), place)


@cache
def ranges(recipe: str = PLAIN, **shape: Any) -> Ranges:
    return calibrate(quantized(recipe, **shape), windows())


@cache
def npu(recipe: str = PLAIN, context: int = CONTEXT, chunk: int = CHUNK, **shape: Any) -> Artifact:
    """An onnx-npu artifact."""
    source = quantized(recipe, **shape)
    place = folder() / f"npu-{context}-{chunk}-{source.folder.name}"
    return onnx_npu.export(source, ranges(recipe, **shape), place, context=context, chunk=chunk)


@cache
def cpu(recipe: str = PLAIN, context: int = CONTEXT, chunk: int = CHUNK, **shape: Any) -> Artifact:
    """An onnx-cpu artifact."""
    source = quantized(recipe, **shape)
    place = folder() / f"cpu-{context}-{chunk}-{source.folder.name}"
    return onnx_cpu.export(source, place, context=context, chunk=chunk)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative L2 distance of logits."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def mean_kl(reference: np.ndarray, found: np.ndarray) -> float:
    """Mean KL divergence over the rows of two arrays of logits, in nats, float64."""
    p = torch.log_softmax(torch.from_numpy(reference).double(), -1)
    q = torch.log_softmax(torch.from_numpy(found).double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def untold(artifact: Artifact, weights: QuantizedCheckpoint) -> list[str]:
    """What the artifact's files do not tell of codes and scales."""
    return [told for told in read_back(artifact, weights).sentences if "only codes and scales" not in told]


def _slug(shape: dict[str, Any]) -> str:
    return "-".join(f"{key}{value}" for key, value in sorted(shape.items())) or "plain"
