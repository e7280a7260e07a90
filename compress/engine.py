"""Quantizing a checkpoint: piece by piece, one block's weights resident, resumable at every piece.

Pieces are written into `<out>.partial`, each under the fingerprint of all that it depends on; a run that finds
pieces of the same fingerprint there goes on behind them. The last step renames the folder.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Set
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bluelm.block import Stage, block_of
from bluelm.checkpoint import Checkpoint
from bluelm.errors import ChangedInputError, InputError
from bluelm.model import DecoderBlock
from bluelm.system.files import removed_meanwhile
from bluelm.system.memory import give_back
from bluelm.system.progress import Progress, Silent
from calibration.activations import Shelf
from calibration.ranks import ALONE, Ranks
from calibration.samples import Samples
from calibration.walk import Hessian, Moments, Split, Streams, moments_in_order
from compress.checkpoint import store
from compress.checkpoint.fingerprint import inputs_of
from compress.checkpoint.pieces import Piece, read_header, read_linear
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.work import Work, finished
from compress.fit import check
from compress.layers import Solved, round_plainly, solve_stage, solve_without_text
from compress.methods.balance import Balance, divided
from compress.methods.protocol import FloatBlock
from compress.methods.refine import refine
from compress.methods.rotate import Rotated, as_quantized
from compress.recipe import Recipe, Widths

log = logging.getLogger("bluelm_export")


def quantize(
    checkpoint: Checkpoint,
    samples: Samples | None,
    recipe: Recipe,
    out: Path | str,
    progress: Progress | None = None,
    *,
    device: torch.device | None = None,
    ranks: Ranks = ALONE,
    on_disk: bool = False,
    overwrite: bool = False,
) -> store.QuantizedCheckpoint:
    """Quantize a checkpoint into a folder; the same input gives the same bytes.

    A finished folder of the same checkpoint, recipe, text and code is returned as it is, an unfinished one completed.

    Args:
        samples: calibration windows; None only for a recipe that reads no text.
        device: where to compute. Default: the CPU.
        ranks: the processes that share the work; each calls this with the same arguments.
        on_disk: activations of the calibration set lie in memory-mapped files beside `out` instead of in RAM; the
            codes are the same.
        overwrite: replace what lies at `out` or unfinished beside it.

    Raises:
        InputError: the recipe does not fit the model, the text is missing, a weight or an activation is not
            finite; `out` is something else than a quantized checkpoint, or of other inputs; the checkpoint was
            written into meanwhile. But for the last, finished pieces are kept.
        InterruptedRun: another rank was lost; what is finished is kept.
    """
    out, device = Path(out), device or torch.device("cpu")
    check(checkpoint.config, recipe)
    if recipe.reads_text and samples is None:
        raise InputError(f"{recipe.method} needs calibration text")
    tokens = samples.tokens if samples is not None and recipe.reads_text else None
    inputs = inputs_of(checkpoint, recipe, tokens, device)
    found = ranks.shared(lambda: finished(out, inputs, overwrite=overwrite))
    if found is not None:
        return found
    work = Work(out, inputs, ranks, overwrite=overwrite)
    with closing(work), removed_meanwhile(work.folder):
        shelf = Shelf(getattr(torch, recipe.activations), work.folder if on_disk else None)
        run = _Run(as_quantized(checkpoint, recipe), recipe, work, shelf, device)
        run.all_pieces(tokens, progress or Silent())
        described = {
            "checkpoint": inputs["checkpoint"],
            "calibration": samples.report.to_json() if samples is not None and tokens is not None else None,
            "fingerprint": work.fingerprint,
            "inputs": inputs,
        }
        work.clear_streams()
        ranks.gathered(None)  # nobody writes into the folder any more

        def publish() -> store.QuantizedCheckpoint:
            _check_inputs(checkpoint, work)
            work.check_pieces()
            store.finish(work.folder, run.config, recipe, checkpoint.folder, described)
            work.publish(out)
            return store.QuantizedCheckpoint.open(out)

        return ranks.shared(publish)


def _check_inputs(checkpoint: Checkpoint, work: Work) -> None:
    """What was read is what was hashed, or the pieces are worth nothing: nobody knows which weights each is of."""
    try:
        checkpoint.check_unchanged()
    except ChangedInputError:
        work.discard()
        raise


class _Run:
    """One run over the pieces, each made or, if it is there already, taken as it is."""

    def __init__(
        self, checkpoint: Checkpoint | Rotated, recipe: Recipe, work: Work, shelf: Shelf, device: torch.device
    ) -> None:
        self.checkpoint, self.recipe, self.work, self.shelf, self.device = checkpoint, recipe, work, shelf, device
        self.config, self.ranks = checkpoint.config, work.ranks

    def all_pieces(self, tokens: Tensor | None, progress: Progress) -> None:
        """Make every piece that is not there yet."""
        layers = self.config.num_layers
        with progress.task("quantize", len(store.piece_files(self.config))) as task, torch.inference_mode():
            streams = self.embedding(tokens)
            task.advance(note="embedding")
            begin = self.resume(streams)
            if begin:
                task.advance(begin, note=f"{begin} blocks of an earlier run")
            for index in range(begin, layers):
                self.block(index, streams)
                task.advance(note=f"block {index}")
            self.head(streams)
            task.advance(note="head")

    def embedding(self, tokens: Tensor | None) -> Streams | None:
        """The table; and the streams that begin with its rows, for a recipe that reads text."""
        watch = _Watch("embedding")
        made = self._is_made(store.EMBEDDING_FILE)
        if made and tokens is None:
            return None
        table = self.checkpoint.embedding()
        if made:
            weight = self.ranks.shared(lambda: _read_table(self.work.folder / store.EMBEDDING_FILE))
        else:
            solved = round_plainly(table, Widths(self.recipe.embed_bits, -1, True), self.recipe)
            self._write(store.EMBEDDING_FILE, {store.EMBED: solved}, {})
            weight = solved.weight
        if tokens is None:
            return None
        split = Split(tokens.shape[0], tokens.shape[1], self.ranks)
        tokens = tokens[split.mine]
        hidden = self.shelf.empty(*tokens.shape, self.config.hidden_size)
        exact = self.shelf.empty(*hidden.shape) if self.recipe.follows_float else None
        for sample, row in enumerate(tokens):
            hidden[sample] = _rows(weight, row)
            if exact is not None:
                exact[sample] = table[row]
            self.shelf.release()
        watch.lap("codes and streams")
        return Streams(self.config, hidden, exact, split=split, shelf=self.shelf, device=self.device)

    def resume(self, streams: Streams | None) -> int:
        """The block to go on with, and the streams in front of it: behind all blocks, if their states were kept."""
        if streams is None:
            return 0
        made = self.ranks.shared(self._leading_blocks)
        return self.work.load_streams(made, streams)

    def block(self, index: int, streams: Streams | None) -> None:
        """One block; the streams advance to the next."""
        prefix = f"model.layers.{index}."
        made = self._is_made(store.block_file(index))
        if made and streams is None:
            return
        give_back()
        watch = _Watch(f"block {index}")
        tensors = {name: tensor.to(self.device) for name, tensor in self.checkpoint.block(index).items()}
        watch.lap("weights read")
        if made and streams is not None:
            found = self.ranks.shared(lambda: store.read_block(self.work.folder / store.block_file(index), prefix))
            block = DecoderBlock.from_weights(self.config, {name: t.to(self.device) for name, t in found.items()})
            streams.advance(block, DecoderBlock.from_weights(self.config, tensors))
        else:
            try:
                solved, vectors = self._solve_block(index, tensors, streams)
            except InputError as error:
                raise InputError(error.problem, where=error.where or f"block {index}", fix=error.fix) from None
            self._write(
                store.block_file(index),
                {f"{prefix}{name}": result for name, result in solved.items()},
                {f"{prefix}{name}": vector.cpu() for name, vector in vectors.items()},
            )
        if streams is not None:
            watch = _Watch(f"block {index}")
            self.work.save_streams(index + 1, streams)
            watch.lap("stream kept")

    def head(self, streams: Streams | None) -> None:
        """Last norm and lm_head."""
        if self._is_made(store.HEAD_FILE):
            return
        give_back()
        watch, norm = _Watch("head"), self.checkpoint.final_norm()
        solved: dict[str, Solved] = {}
        if not self.config.shares_table:
            widths = self.recipe.widths(store.HEAD)
            if streams is None:
                solved[store.HEAD] = solve_without_text(self.checkpoint.head(), widths, self.recipe)
            else:
                hessian, scale = Hessian(self.ranks), norm.to(self.device)
                for part, batch in streams.parts():
                    x = streams.read(streams.hidden, batch)
                    hessian.add(F.rms_norm(x, scale.shape, scale, self.config.rms_norm_eps), part)
                weight = {store.HEAD: self.checkpoint.head()}
                solved = solve_stage(weight, Moments(hessian.mean()), {store.HEAD: widths}, self.recipe, self.ranks)
        self._write(store.HEAD_FILE, solved, {store.FINAL_NORM: norm})
        watch.lap("codes")

    def _solve_block(
        self, index: int, tensors: dict[str, Tensor], streams: Streams | None
    ) -> tuple[dict[str, Solved], dict[str, Tensor]]:
        """Codes of the linears, and the norms and biases beside them, all by local name."""
        solved: dict[str, Solved] = {}
        linears = block_of(self.config).linears
        widths = {name: self.recipe.widths(f"model.layers.{index}.{name}") for name in linears}
        if streams is None:
            for name in linears:
                solved[name] = solve_without_text(tensors[f"{name}.weight"], widths[name], self.recipe)
        else:
            exact = DecoderBlock.from_weights(self.config, tensors)
            scalings: dict[str, dict[str, Any]] = {}
            unclipped: Set[str] = frozenset()
            if self.recipe.statistics.float_block:
                found = FloatBlock(self.config, tensors, exact, streams, widths, self.recipe.grid == "mse")
                folded = self.recipe.quantizer.fold(found, self.recipe.quantizer_options)
                tensors, scalings, unclipped = folded.tensors, dict(folded.notes), folded.unclipped
            block = DecoderBlock.from_weights(self.config, tensors)
            inputs = streams.copy() if self.recipe.refine else None
            watch = _Watch(f"block {index}")
            for stage, moments in moments_in_order(streams, block, exact):
                give_back()
                watch.lap(f"moments of {stage.name}")
                balance = self._balance(stage, moments, solved)
                if balance is not None:
                    moments, tensors = balance.moments(moments), balance.tensors(tensors)
                    scalings[stage.name] = balance.note
                weights = {name: tensors[f"{name}.weight"] for name in stage.linears}
                for name, result in solve_stage(weights, moments, widths, self.recipe, self.ranks, unclipped).items():
                    result.note.update(scalings.get(stage.name, {}))
                    solved[name] = result
                    _install(block, name, result.weight, balance)
                del moments  # before the next ones are summed
                watch.lap(f"codes of {stage.name}")
            watch.lap("stream behind the block")
            if inputs is not None:
                if self.recipe.balance:  # what reads balanced inputs was installed for those that are not
                    block = DecoderBlock.from_weights(self.config, tensors)
                    for name, result in solved.items():
                        _install(block, name, result.weight)
                self._refine(block, tensors, solved, streams, inputs)
                watch.lap("learned rounding")
        return solved, {name: tensor for name, tensor in tensors.items() if tensor.ndim == 1}

    def _balance(self, stage: Stage, moments: Moments, solved: dict[str, Solved]) -> Balance | None:
        """What the stage's inputs are balanced by; the linear that makes them is changed in `solved`."""
        if not self.recipe.balance or self.recipe.statistics.float_block:  # then the method has moved scales itself
            return None
        move = next((move for move in block_of(self.config).moves if move.stage == stage), None)
        if move is None or move.before not in solved:
            return None
        before = solved[move.before]
        balance = Balance.of(moments.hessian, move, before.weight)
        solved[move.before] = replace(before, weight=divided(before.weight, balance.rows))
        return balance

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
        fronts, targets = self._whole(inputs), self._whole(streams.exact)
        refined = self.ranks.shared(
            lambda: refine(
                block,
                {name: tensors[f"{name}.weight"] for name in solved},
                {name: result.weight.to(self.device) for name, result in solved.items()},
                fronts,
                targets,
                (streams.cos, streams.sin),
                steps=self.recipe.refine,
                seed=self.recipe.seed,
            )
        )
        for name, weight in refined.weights.items():
            note = refined.note | {"flipped": round(refined.flipped[name], 4)}
            solved[name] = Solved(weight, solved[name].note | {"refine": note})
            _install(block, name, weight)
        for batch in streams.batches():
            streams.hidden[batch] = block(streams.read(inputs, batch), streams.cos, streams.sin)

    def _whole(self, kept: Tensor) -> Tensor:
        """A kept tensor with the samples of all ranks."""
        return kept if self.ranks.size == 1 else torch.cat(self.ranks.gathered(kept))

    def _is_made(self, name: str) -> bool:
        return self.ranks.shared(lambda: self.work.is_made(name))

    def _leading_blocks(self) -> int:
        """How many blocks are made, from the first on."""
        count = self.config.num_layers
        return next((index for index in range(count) if not self.work.is_made(store.block_file(index))), count)

    def _write(self, name: str, solved: Mapping[str, Solved], vectors: Mapping[str, Tensor]) -> None:
        weights = {name: result.weight for name, result in solved.items()}
        notes = {name: result.note for name, result in solved.items()}
        self.work.write(name, Piece(weights, vectors, notes))


class _Watch:
    """Writes into the log how long each step took, in all and on the CPUs."""

    def __init__(self, what: str) -> None:
        self._what, self._began, self._cpu = what, time.perf_counter(), time.process_time()

    def lap(self, step: str) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        log.info("%s: %s: %.2f s, CPU %.2f s", self._what, step, now - self._began, cpu - self._cpu)
        self._began, self._cpu = now, cpu


def _install(block: DecoderBlock, name: str, weight: QuantizedTensor, balance: Balance | None = None) -> None:
    """Let a linear of the block compute with the quantized weight; `balance`: of inputs that are not balanced."""
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    values = weight.to(linear.weight.device).dequantize()
    values = values if balance is None else values.div_(balance.columns.to(values.device))
    linear.weight = nn.Parameter(values, requires_grad=False)


def _rows(table: QuantizedTensor, row: Tensor) -> Tensor:
    """float32 [T, hidden]: dequantized rows of the tokens [T]."""
    part = QuantizedTensor(table.codes[row], table.scales[row], table.zeros[row], table.bits, table.group_size)
    return part.dequantize()


def _read_table(path: Path) -> QuantizedTensor:
    return read_linear(path, store.EMBED, read_header(path).linears[store.EMBED])
