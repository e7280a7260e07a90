"""Damage located in an artifact of every runtime: one block's scales times 1.05.

    python -m benchmarks.accuracy.block_damage WORK [--blocks N] [FORMAT ...]

The demo checkpoint, or its first N blocks, 4 bits in groups of 32, is lowered as it is and with block 3 (or the last)
damaged; then `compare --blocks` holds both against the sound checkpoint, as a user would call it. The sound checkpoint
lies beside the artifact, but for formats that are compiled: what shows their blocks is built from the source beside
them, so that is damaged too. Writes results/accuracy/block_damage.json and the page; rows that are not measured again
stay.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import pages
from bluelm.checkpoint import Checkpoint
from bluelm.system.files import demo_checkpoint
from calibration.samples import load_samples
from compress.checkpoint.pieces import Piece, read_header, read_linear, read_vector, write_piece
from compress.checkpoint.store import QuantizedCheckpoint, block_file
from compress.engine import quantize
from compress.recipe import Recipe
from eval import heldout
from eval.accuracy.compare import block_errors
from export.coreai import export as coreai
from export.coreml import export as coreml
from export.executorch import coreml as executorch_coreml
from export.executorch import xnnpack as executorch
from export.gguf import export as gguf_file
from export.litert import export as litert
from export.litert_lm import export as litert_lm
from export.lowering.ranges import calibrate
from export.mlx import export as mlx
from export.onnx import cpu as onnx_cpu
from export.onnx import genai as onnx_genai
from export.onnx import npu as onnx_npu
from pipeline.commands.compare import open_subjects
from targets.registry import find
from tests.support.checkpoints.shapes import shortened

CONTEXT, CHUNK, TOKENS = 128, 64, 64
SOUND_DIGEST = "quantized.json keeps the sound checkpoint's digests: damage is what nobody wrote down"
COLUMNS = (
    "artifact", "blocks", "damaged is", "sound: that block", "largest of the others", "damaged: that block",
    "largest of the others", "named", "largest expected",
)  # fmt: skip
Maker = Callable[[QuantizedCheckpoint, Path], object]


def _npu(quantized: QuantizedCheckpoint, folder: Path) -> object:
    tokens = torch.tensor([_window(quantized)])
    return onnx_npu.export(quantized, calibrate(quantized, tokens), folder, context=CONTEXT, chunk=CHUNK)


def _compiled(quantized: QuantizedCheckpoint, folder: Path) -> object:
    source = onnx_npu.Artifact.open(folder.parent / "onnx-npu")
    return find("snapdragon", runtime=folder.name).compile(source, folder)


MAKERS: dict[str, Maker] = {
    "onnx-cpu": lambda q, f: onnx_cpu.export(q, f, context=CONTEXT, chunk=CHUNK),
    "onnx-npu": _npu,
    "qnn-context": _compiled,
    "onnx-genai": lambda q, f: onnx_genai.export(q, f, context=CONTEXT, accuracy_level=4),
    "litert": lambda q, f: litert.export(q, f, context=CONTEXT, chunk=CHUNK),
    "litert-lm": lambda q, f: litert_lm.export(q, f, context=CONTEXT, chunk=CHUNK),
    "gguf": lambda q, f: gguf_file.export(q, f, context=CONTEXT),
    "mlx": lambda q, f: mlx.export(q, f, context=CONTEXT),
    "coreai": lambda q, f: coreai.export(q, f, context=CONTEXT),
    "coreai-ane": lambda q, f: coreai.export_static(q, f, context=CONTEXT, chunk=CHUNK),
    "coreml": lambda q, f: coreml.export(q, f, context=CONTEXT, chunk=CHUNK),
    "executorch-coreml": lambda q, f: executorch_coreml.export(q, f, context=CONTEXT, chunk=CHUNK),
    "executorch-xnnpack": lambda q, f: executorch.export(q, f, context=CONTEXT, chunk=CHUNK),
    "executorch-qnn": _compiled,
}


def hurt_block(sound: QuantizedCheckpoint) -> int:
    """The block that is damaged."""
    return min(3, sound.config.num_layers - 1)


def damage(sound: QuantizedCheckpoint, folder: Path) -> QuantizedCheckpoint:
    """A copy whose block `hurt_block` has every scale times 1.05, as bfloat16 holds it."""
    shutil.copytree(sound.folder, folder)
    path = folder / block_file(hurt_block(sound))
    header = read_header(path)
    linears = {name: read_linear(path, name, info) for name, info in header.linears.items()}
    hurt = {n: replace(w, scales=(w.scales.float() * 1.05).bfloat16().half()) for n, w in linears.items()}
    vectors = {name: read_vector(path, name) for name in header.vectors}
    write_piece(path, Piece(hurt, vectors, header.notes), header.fingerprint)
    return QuantizedCheckpoint.open(folder)


def row(work: Path, kind: str, sources: dict[str, QuantizedCheckpoint]) -> list[str]:
    """Make both artifacts of a format and hold their blocks against the sound checkpoint."""
    blocks, at = sources["sound"].config.num_layers, hurt_block(sources["sound"])
    cells, named, expected = [kind, str(blocks), str(at)], None, 0.0
    for state, quantized in sources.items():
        folder = work / state / kind
        if not folder.exists():
            MAKERS[kind](quantized, folder)
        with ExitStack() as stack:
            (reference,) = open_subjects(str(sources["sound"].folder), True, work / "scratch", stack)
            scratch = work / "scratch" / state / kind
            (subject,) = open_subjects(str(folder), True, scratch, stack)
            stack.callback(subject.runtime.close)
            found = block_errors(reference, subject, _window(sources["sound"]))
        rest = max(error for layer, error in enumerate(found.errors) if layer != at)
        named, expected = found.first_outside, found.expected
        cells += [f"{found.errors[at]:.1e}", f"{rest:.1e}"]
        assert named == (at if state == "hurt" else None) and found.same_twin, found
    return [*cells, str(named), f"{expected:.1e}"]


def _window(quantized: QuantizedCheckpoint) -> list[int]:
    return heldout.load([], quantized.tokenizer(), length=TOKENS).windows[0].tokens.tolist()


def main(work: Path, kinds: list[str], blocks: int | None) -> None:
    """A row for each format."""
    if not (work / "sound" / "quantized").exists():
        source = demo_checkpoint() if blocks is None else shortened(demo_checkpoint(), blocks, work / "float")
        checkpoint, recipe = Checkpoint.open(source), Recipe.load("w4-g32", method="rtn")
        samples = load_samples(None, checkpoint.tokenizer(), recipe.samples, recipe.length, recipe.seed)
        sound = quantize(checkpoint, samples, recipe, work / "sound" / "quantized")
        damage(sound, work / "damaged")
        shutil.copytree(sound.folder, work / "hurt" / "quantized")
    sources = {
        "sound": QuantizedCheckpoint.open(work / "sound" / "quantized"),
        "hurt": QuantizedCheckpoint.open(work / "damaged"),
    }
    assert json.loads((work / "damaged" / "quantized.json").read_text()) == sources["sound"].info, SOUND_DIGEST
    rows: list[list[str]] = []
    for kind in kinds:
        rows.append(row(work, kind, sources))
        print(rows[-1], flush=True)
        pages.save_rows("block_damage", "demo", COLUMNS, rows, key=2, tokens=TOKENS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("formats", nargs="*", default=list(MAKERS), metavar="FORMAT")
    parser.add_argument("--blocks", type=int)
    asked = parser.parse_intermixed_args()
    main(asked.work, asked.formats, asked.blocks)
