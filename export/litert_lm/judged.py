"""The .tflite of a .litertlm by itself, for LiteRT's interpreter, whose prefill gives logits for every token.

On a phone a prompt's logits would be thrown away, so what ships does not compute them. Here the head of `decode`, its
operators and the very same weights, stands behind the stream of `prefill` as well. All else is as it ships.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bluelm.errors import InputError
from export.artifacts.artifact import Artifact
from export.litert import debug as litert
from export.litert.debug import add_output, rewrite
from export.litert_lm.container import Kind, Section, write
from export.litert_lm.graph import DECODE, HIDDEN
from export.litert_lm.reader import FIX, MODEL, LitertLmFile
from export.lowering.decoder import block_output

LOGITS = "logits"


def write_judged(source: Path, target: Path, blocks: int) -> str:
    """Write the .tflite `target` of the .litertlm `source`, a model of so many blocks.

    Returns:
        The name of its prefill signature.

    Raises:
        InputError: the file is damaged, or has other signatures.
    """
    file = LitertLmFile(source).model(blocks)
    names = [signature.signatureKey.decode() for signature in file.model.signatureDefs]
    prefill = next((name for name in names if name != DECODE), "")
    if sorted(names) != sorted([DECODE, prefill]):
        raise InputError(f"the model has the signatures {', '.join(names)}", where=source, fix=FIX)
    try:
        rewrite(file.data, target, lambda model: _add_head(model, prefill, block_output(blocks - 1)))
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"the head cannot be followed: {error!r}", where=source, fix=FIX) from None
    return prefill


def _add_head(model: Any, prefill: str, stream: str) -> None:
    """What `decode` makes of the stream, behind that of `prefill`."""
    signatures = {signature.signatureKey.decode(): signature for signature in model.signatureDefs}
    mine, theirs = (model.subgraphs[signatures[name].subgraphIndex] for name in (prefill, DECODE))
    begin, tokens = _index(mine, stream), int(mine.tensors[_index(mine, stream)].shape[1])
    moved = {_index(theirs, stream): begin, -1: -1}
    head = list(theirs.operators)[_producer(theirs, _index(theirs, stream)) + 1 :]

    def here(index: int) -> int:
        """The tensor of `prefill` that stands for one of `decode`."""
        if index not in moved:
            tensor = theirs.tensors[index]
            known = [i for i, one in enumerate(mine.tensors) if tensor.buffer and one.name == tensor.name]
            moved[index] = known[0] if known else len(mine.tensors)
            if not known:
                mine.tensors.append(_copy(tensor))
                mine.tensors[-1].quantization = moved_scales(tensor.quantization)
                _widen(mine.tensors[-1], tokens)
        return moved[index]

    def moved_scales(how: Any) -> Any:
        """The same quantization: that of blocks names a tensor of its graph."""
        if how is None or how.details is None:
            return how
        found = _copy(how)
        found.details = _copy(how.details)
        found.details.scales = here(int(how.details.scales))
        return found

    for operator in head:
        copy = _copy(operator)
        copy.inputs = [here(int(index)) for index in operator.inputs]
        copy.outputs = [here(int(index)) for index in operator.outputs]
        mine.operators.append(copy)
    add_output(model, signatures[prefill], LOGITS, moved[_index(theirs, LOGITS)])


def _widen(tensor: Any, tokens: int) -> None:
    """A value is of so many tokens; a constant is as it is."""
    if not tensor.buffer:
        tensor.shape = [tensor.shape[0], tokens, *tensor.shape[2:]]


def _copy(table: Any) -> Any:
    """Another one of the same fields."""
    found = type(table)()
    vars(found).update(vars(table))
    return found


def _index(graph: Any, name: str) -> int:
    return next(index for index, tensor in enumerate(graph.tensors) if tensor.name.decode() == name)


def _producer(graph: Any, tensor: int) -> int:
    """Place of the operator that makes it."""
    return next(at for at, operator in enumerate(graph.operators) if tensor in list(operator.outputs))


def open_up(artifact: Artifact, source: Path, target: Path, values: Sequence[str]) -> None:
    """Write the .litertlm `source` to `target` with the stream before and behind every block among the outputs.

    Args:
        values: more values of the lowered decoder, shown where a graph has them.

    Raises:
        InputError: as `write_judged`.
    """
    file, blocks, tables = LitertLmFile(source), artifact.model.num_layers, target.with_suffix(".tflite")
    litert.show(file.model(blocks).data, tables, source, blocks, (HIDDEN, *values))
    sections: list[Section] = []
    for held in file.sections:
        content = tables if held.kind == MODEL else file.content(held)
        sections.append(Section(getattr(Kind, held.kind), content, held.items))
    write(target, sections, file.entries)
    tables.unlink()
