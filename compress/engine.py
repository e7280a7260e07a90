"""Quantizing a checkpoint: piece by piece, one block's weights resident, resumable at every piece.

Pieces are written into `<out>.partial`, each under the fingerprint of all that it depends on; a run that finds
pieces of the same fingerprint there goes on behind them. The last step renames the folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bluelm.checkpoint import Checkpoint, block_shapes
from bluelm.config import ModelConfig
from bluelm.errors import ExportError, InputError
from bluelm.files import read_json
from bluelm.model import DecoderBlock
from bluelm.progress import Progress, Silent
from bluelm.weights import LINEARS
from calibration.samples import Samples
from calibration.walk import Hessian, Moments, Streams, collect_hessians, moments_in_order
from compress.awq import fold_block
from compress.layers import Solved, Widths, round_plainly, solve_stage
from compress.pieces import Piece, read_header, read_linear, write_piece
from compress.quantized import QuantizedTensor
from compress.recipe import Recipe
from compress.refine import refine
from compress.store import (
    EMBED,
    EMBEDDING_FILE,
    FINAL_NORM,
    HEAD,
    HEAD_FILE,
    MANIFEST,
    QuantizedCheckpoint,
    block_file,
    finish,
    piece_files,
    read_block,
)

ALGORITHM = 2  # part of the fingerprint: raise it when the same input gives other codes


def quantize(
    checkpoint: Checkpoint,
    samples: Samples | None,
    recipe: Recipe,
    out: Path | str,
    progress: Progress | None = None,
) -> QuantizedCheckpoint:
    """Quantize a checkpoint into a folder; the same input gives the same bytes.

    A finished folder of the same checkpoint, recipe and text is returned as it is, an unfinished one
    completed, another quantized checkpoint replaced.

    Args:
        samples: calibration windows; None only for a recipe that reads no text.

    Raises:
        InputError: the recipe does not fit the model, the text is missing, a weight or an activation is not
            finite, or `out` is something else than a quantized checkpoint. Nothing is left behind then.
    """
    out = Path(out)
    check(checkpoint.config, recipe)
    if recipe.reads_text and samples is None:
        raise InputError(f"{recipe.method} needs calibration text")
    tokens = samples.tokens if samples is not None and recipe.reads_text else None
    described = {
        "checkpoint": checkpoint.digest(),
        "calibration": samples.report.to_json() if samples is not None and tokens is not None else None,
        "fingerprint": fingerprint(checkpoint, recipe, tokens),
    }
    found = _finished(out, described["fingerprint"])
    if found is not None:
        return found
    work = out.with_name(f"{out.name}.partial")
    work.mkdir(parents=True, exist_ok=True)
    try:
        run = _Run(checkpoint, recipe, work, described["fingerprint"])
        files = piece_files(checkpoint.config)
        with (progress or Silent()).task("quantize", len(files)) as task, torch.inference_mode():
            streams = run.embedding(tokens)
            task.advance(note="embedding")
            for index in range(checkpoint.config.num_layers):
                run.block(index, streams)
                task.advance(note=f"block {index}")
            run.head(streams)
            task.advance(note="head")
        finish(work, checkpoint.config, recipe, checkpoint.folder, described)
    except ExportError:
        shutil.rmtree(work)
        raise
    if out.exists():
        shutil.rmtree(out)
    work.rename(out)
    return QuantizedCheckpoint.open(out)


def check(config: ModelConfig, recipe: Recipe) -> None:
    """Make sure that a recipe fits a model.

    Raises:
        InputError: a group size does not divide a layer's width; a table that serves as embedding and head is
            to have two widths.
    """
    shapes = {name.removesuffix(".weight"): shape for name, shape in block_shapes(config).items() if len(shape) == 2}
    groups = {name: (recipe.group_size, shape[1]) for name, shape in shapes.items()}
    groups[HEAD] = (recipe.head_group_size, config.hidden_size)
    for name, (size, columns) in groups.items():
        if size != -1 and columns % size:
            fitting = [str(fit) for fit in (128, 64, 32) if all(shape[1] % fit == 0 for shape in shapes.values())]
            raise InputError(
                f"group size {size} does not divide the {columns} columns of {name}",
                fix=f"choose {', '.join([*fitting, '-1 (one scale a row)'])}",
            )
    if config.shares_table and (recipe.head_bits, recipe.head_group_size) != (recipe.embed_bits, -1):
        raise InputError(
            "head and embedding of this model are one table, but the recipe gives them two widths",
            fix="set head_bits equal to embed_bits, and head_group_size to -1",
        )


def fingerprint(checkpoint: Checkpoint, recipe: Recipe, tokens: Tensor | None) -> str:
    """Hex SHA-256 of all that the codes depend on: checkpoint, recipe, calibration tokens, this code."""
    read = None if tokens is None else hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
    parts = {
        "algorithm": ALGORITHM,
        "checkpoint": checkpoint.digest(),
        "recipe": recipe.digest(),
        "tokens": read,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Run:
    """One run over the pieces, each made or, if it is there already, taken as it is."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, folder: Path, fingerprint: str) -> None:
        self.checkpoint, self.recipe, self.folder = checkpoint, recipe, folder
        self.config, self.fingerprint = checkpoint.config, fingerprint
        self.widths = Widths(recipe.bits, recipe.group_size, recipe.symmetric)

    def embedding(self, tokens: Tensor | None) -> Streams | None:
        """The table; and the streams that begin with its rows, for a recipe that reads text."""
        path = self.folder / EMBEDDING_FILE
        corrects = self.recipe.follows_float
        made = self._is_made(path)
        table = self.checkpoint.embedding() if not made or (tokens is not None and corrects) else None
        if made:
            weight = read_linear(path, EMBED, read_header(path).linears[EMBED])
        else:
            assert table is not None
            solved = round_plainly(table, Widths(self.recipe.embed_bits, -1, True), self.recipe)
            self._write(path, {EMBED: solved}, {})
            weight = solved.weight
        if tokens is None:
            return None
        return Streams(self.config, _look_up(weight, tokens), table[tokens] if table is not None and corrects else None)

    def block(self, index: int, streams: Streams | None) -> None:
        """One block; the streams advance to the next."""
        path = self.folder / block_file(index)
        prefix = f"model.layers.{index}."
        made = self._is_made(path)
        if made and streams is None:
            return
        tensors = self.checkpoint.block(index)
        if made and streams is not None:
            block = DecoderBlock.from_weights(self.config, read_block(path, prefix))
            streams.advance(block, DecoderBlock.from_weights(self.config, tensors))
            return
        try:
            solved, vectors = self._solve_block(tensors, streams)
        except InputError as error:
            raise InputError(error.problem, where=error.where or f"block {index}", fix=error.fix) from None
        self._write(
            path,
            {f"{prefix}{name}": result for name, result in solved.items()},
            {f"{prefix}{name}": vector for name, vector in vectors.items()},
        )

    def head(self, streams: Streams | None) -> None:
        """Last norm and lm_head."""
        path = self.folder / HEAD_FILE
        if self._is_made(path):
            return
        norm = self.checkpoint.final_norm()
        solved: dict[str, Solved] = {}
        if not self.config.shares_table:
            widths = Widths(self.recipe.head_bits, self.recipe.head_group_size, self.recipe.symmetric)
            weight = self.checkpoint.head()
            if streams is None:
                solved[HEAD] = round_plainly(weight, widths, self.recipe)
            else:
                hessian = Hessian()
                for batch in streams.batches():
                    hessian.add(F.rms_norm(streams.hidden[batch], norm.shape, norm, self.config.rms_norm_eps))
                solved = solve_stage({HEAD: weight}, Moments(hessian.mean()), widths, self.recipe)
        self._write(path, solved, {FINAL_NORM: norm})

    def _solve_block(
        self, tensors: dict[str, Tensor], streams: Streams | None
    ) -> tuple[dict[str, Solved], dict[str, Tensor]]:
        """Codes of the linears, and the norms and biases beside them, all by local name."""
        solved: dict[str, Solved] = {}
        if streams is None:
            for name in LINEARS:
                solved[name] = round_plainly(tensors[f"{name}.weight"], self.widths, self.recipe)
        else:
            exact = DecoderBlock.from_weights(self.config, tensors)
            scalings: Mapping[str, dict[str, Any]] = {}
            if self.recipe.method == "awq":
                hessians = collect_hessians(streams, exact)
                tensors, scalings = fold_block(self.config, tensors, hessians, self.widths)
            block = DecoderBlock.from_weights(self.config, tensors)
            inputs = streams.hidden.clone() if self.recipe.refine else None
            for stage, moments in moments_in_order(streams, block, exact):
                weights = {name: tensors[f"{name}.weight"] for name in stage.linears}
                for name, result in solve_stage(weights, moments, self.widths, self.recipe).items():
                    result.note.update(scalings.get(stage.name, {}))
                    solved[name] = result
                    _install(block, name, result.weight)
            if inputs is not None:
                self._refine(block, tensors, solved, streams, inputs)
        return solved, {name: tensor for name, tensor in tensors.items() if tensor.ndim == 1}

    def _refine(
        self,
        block: DecoderBlock,
        tensors: Mapping[str, Tensor],
        solved: dict[str, Solved],
        streams: Streams,
        inputs: Tensor,
    ) -> None:
        """Train the codes of `solved` and run the block again; inputs: float32 [n, T, hidden], the stream in front."""
        assert streams.exact is not None
        refined = refine(
            block,
            {name: tensors[f"{name}.weight"] for name in solved},
            {name: result.weight for name, result in solved.items()},
            inputs,
            streams.exact,
            (streams.cos, streams.sin),
            steps=self.recipe.refine,
            seed=self.recipe.seed,
        )
        for name, weight in refined.weights.items():
            note = refined.note | {"flipped": round(refined.flipped[name], 4)}
            solved[name] = Solved(weight, solved[name].note | {"refine": note})
            _install(block, name, weight)
        for batch in streams.batches():
            streams.hidden[batch] = block(inputs[batch], streams.cos, streams.sin)

    def _is_made(self, path: Path) -> bool:
        """True for a piece of this very run; a damaged one, or one of another run, is made again."""
        try:
            return path.exists() and read_header(path).fingerprint == self.fingerprint
        except InputError:
            return False

    def _write(self, path: Path, solved: Mapping[str, Solved], vectors: Mapping[str, Tensor]) -> None:
        weights = {name: result.weight for name, result in solved.items()}
        notes = {name: result.note for name, result in solved.items()}
        write_piece(path, Piece(weights, vectors, notes), self.fingerprint)


def _install(block: DecoderBlock, name: str, weight: QuantizedTensor) -> None:
    """Let a linear of the block compute with the quantized weight."""
    block.get_submodule(name).weight = nn.Parameter(weight.dequantize(), requires_grad=False)


def _look_up(table: QuantizedTensor, tokens: Tensor) -> Tensor:
    """float32 [n, T, hidden]: dequantized rows of the tokens [n, T]."""
    hidden = torch.empty(*tokens.shape, table.shape[1])
    for sample, row in enumerate(tokens):
        part = QuantizedTensor(table.codes[row], table.scales[row], table.zeros[row], table.bits, table.group_size)
        hidden[sample] = part.dequantize()
    return hidden


def _finished(out: Path, fingerprint: str) -> QuantizedCheckpoint | None:
    """What lies at `out`, if it is complete, whole and of this fingerprint.

    Raises:
        InputError: `out` is a file, or a folder with something else in it.
    """
    if not out.exists():
        return None
    if not (out / MANIFEST).is_file():
        if out.is_dir() and not any(out.iterdir()):
            return None
        raise InputError(
            "the output exists and is not a quantized checkpoint", where=out, fix="name another output folder"
        )
    try:
        if read_json(out / MANIFEST).get("fingerprint") != fingerprint:
            return None
        found = QuantizedCheckpoint.open(out)
        found.verify()
        return found
    except InputError:
        return None
