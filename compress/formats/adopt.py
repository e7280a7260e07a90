"""Converts another tool's quantized checkpoint to ours: codes unchanged, float tensors rounded to 8 bits."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from bluelm.block import Block, block_of
from bluelm.errors import InputError
from bluelm.system.files import atomic_folder
from bluelm.system.progress import Progress, Silent
from compress.checkpoint import store
from compress.checkpoint.pieces import LinearInfo, Piece, write_piece
from compress.checkpoint.quantized import OrderedWeight
from compress.checkpoint.work import finished
from compress.formats.packed import PackedCheckpoint, header_of
from compress.layers import Solved, round_plainly
from compress.recipe import Recipe, Widths


def given_recipe(packed: PackedCheckpoint, asked: Recipe) -> Recipe:
    """The recipe that describes a checkpoint's codes: widths that most linears of the blocks have.

    What the checkpoint keeps in float (embedding, mostly the head) takes its width from `asked`.

    Raises:
        InputError: no linear of the blocks is quantized, or what is stored cannot be.
    """
    blocks = [info for name, info in packed.survey.items() if name != store.HEAD]
    if not blocks:
        raise InputError("no linear of the blocks is quantized", where=packed.folder, fix="give the float checkpoint")
    widths = Counter((info.bits, info.group_size) for info in blocks).most_common(1)[0][0]
    head = packed.survey.get(store.HEAD)
    head_width = (head.bits, head.group_size) if head else (asked.head_bits, asked.head_group_size)
    if packed.config.shares_table:
        head_width = (asked.embed_bits, -1)
    return Recipe.make(
        {
            "method": "given",
            "bits": widths[0],
            "group_size": widths[1],
            "symmetric": all(info.symmetric for info in packed.survey.values()),
            "head_bits": head_width[0],
            "head_group_size": head_width[1],
            "embed_bits": asked.embed_bits,
            "samples": asked.samples,
            "length": asked.length,
            "seed": asked.seed,
        }
    )


def scattered(packed: PackedCheckpoint) -> list[str]:
    """Linears whose inputs some runtime must put in order, because no neighbour can.

    Raises:
        InputError: what is stored cannot be.
    """
    block = block_of(packed.config)
    inner = tuple(f".{name}" for name in block.linears if block.factors(name))
    return [name for name, info in packed.survey.items() if info.ordered and not name.endswith(inner)]


def adopt(
    packed: PackedCheckpoint,
    recipe: Recipe,
    out: Path | str,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
) -> store.QuantizedCheckpoint:
    """Write a quantized checkpoint of the codes, scales and zero points that `packed` has.

    Where act-order scattered the groups of down_proj, the rows of gate_proj and up_proj are put in its order
    instead: the product silu(gate) * up has one row of each a column of down_proj, so nothing changes.

    Args:
        recipe: of `given_recipe`.
        overwrite: replace what lies at `out`.

    Raises:
        InputError: what is stored cannot be, or `out` is something else than a quantized checkpoint.
    """
    out = Path(out)
    parts = {"adopted": packed.digest(), "recipe": recipe.digest()}
    found = finished(out, parts, overwrite=overwrite)
    if found is not None:
        return found
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    files = store.piece_files(packed.config)
    with atomic_folder(out) as folder, (progress or Silent()).task("read the codes", len(files)) as task:
        table = round_plainly(packed.embedding(), Widths(recipe.embed_bits, -1, True), recipe)
        write_piece(
            folder / store.EMBEDDING_FILE,
            Piece({store.EMBED: table.weight}, {}, {store.EMBED: table.note}),
            fingerprint,
        )
        task.advance(note="embedding")
        for index in range(packed.config.num_layers):
            write_piece(folder / store.block_file(index), _block(packed, index, recipe), fingerprint)
            task.advance(note=f"block {index}")
        write_piece(folder / store.HEAD_FILE, _head(packed, recipe), fingerprint)
        task.advance(note="head")
        described: dict[str, Any] = {
            "checkpoint": packed.digest(),
            "calibration": None,
            "fingerprint": fingerprint,
            "given": packed.layout.name,
            "inputs": parts,
        }
        packed.check_unchanged()
        store.finish(folder, packed.config, recipe, packed.folder, described)
    return store.QuantizedCheckpoint.open(out)


def _block(packed: PackedCheckpoint, index: int, recipe: Recipe) -> Piece:
    """The piece of one block."""
    prefix, block = f"model.layers.{index}.", block_of(packed.config)
    given = {name: packed.linear(f"{prefix}{name}") for name in block.linears}
    kept = {name: weight for name, weight in given.items() if weight is not None}
    rounded = {name: _rounded(packed.weight(f"{prefix}{name}"), recipe) for name in block.linears if name not in kept}
    notes = {name: _note(header_of(weight), packed) for name, weight in kept.items()}
    notes |= {name: solved.note for name, solved in rounded.items()}
    weights = kept | {name: OrderedWeight(solved.weight) for name, solved in rounded.items()}
    _fold_order(block, weights, notes)
    vectors = [name for name, shape in block.shapes.items() if len(shape) == 1]
    return Piece(
        {f"{prefix}{name}": weight.weight for name, weight in weights.items()},
        {f"{prefix}{name}": packed.vector(f"{prefix}{name}") for name in vectors},
        {f"{prefix}{name}": note for name, note in notes.items()},
        {f"{prefix}{name}": weight.order for name, weight in weights.items() if weight.order is not None},
    )


def _fold_order(block: Block, weights: dict[str, OrderedWeight], notes: dict[str, dict[str, Any]]) -> None:
    """Put the rows of gate and up in the order of down's columns, in place.

    down[:, order] (silu(gate x) * up x)[order]  ->  down' (silu(gate' x) * up' x),  gate' = gate[order]
    """
    for down in block.linears:
        order, factors = weights[down].order, block.factors(down)
        if order is None or not factors:
            continue
        weights[down] = OrderedWeight(weights[down].weight)
        names = " and ".join(name.rpartition(".")[2] for name in factors)
        notes[down]["inputs"] = f"reordered, and the rows of {names} with them"
        for name in factors:
            old = weights[name]
            weights[name] = OrderedWeight(old.weight.with_rows(lambda part, order=order: part[order.long()]), old.order)


def _head(packed: PackedCheckpoint, recipe: Recipe) -> Piece:
    """The piece of the last norm and lm_head."""
    norm = {store.FINAL_NORM: packed.final_norm()}
    if packed.config.shares_table:
        return Piece({}, norm)
    given = packed.linear(store.HEAD)
    if given is not None:
        orders = {} if given.order is None else {store.HEAD: given.order}
        return Piece({store.HEAD: given.weight}, norm, {store.HEAD: _note(header_of(given), packed)}, orders)
    widths = Widths(recipe.head_bits, recipe.head_group_size, recipe.symmetric)
    solved = round_plainly(packed.head(), widths, recipe)
    return Piece({store.HEAD: solved.weight}, norm, {store.HEAD: solved.note})


def _rounded(weight: Tensor, recipe: Recipe) -> Solved:
    """A linear that the checkpoint keeps in float: 8 bits, one scale a row."""
    solved = round_plainly(weight, Widths(8, -1, True), recipe)
    return Solved(solved.weight, solved.note | {"given": "float"})


def _note(info: LinearInfo, packed: PackedCheckpoint) -> dict[str, Any]:
    note = {"bits": info.bits, "group_size": info.group_size, "symmetric": info.symmetric, "method": "given"}
    return note | {"given": packed.layout.name} | ({"inputs": "in an order of their own"} if info.ordered else {})
