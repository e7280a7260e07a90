"""A .litertlm that tells of itself what another one does, and whose likeliest token is always the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from export.litert.file import LitertModel, Type
from export.litert.ops import LitertOps
from export.litert_lm.container import Kind, Section, write
from export.litert_lm.graph import DECODE, KEYS, VALUES, prefill
from export.litert_lm.reader import MODEL, LitertLmFile

CERTAIN = 100.0  # logit of the token, those of the others are 0
CHUNK, SLOTS = 16, 64


def write_constant(source: Path, target: Path, token: int, vocab_size: int) -> None:
    """Write the file `target` with all sections of `source` but the model.

    Raises:
        InputError: `source` is damaged.
    """
    file, model = LitertLmFile(source), target.with_suffix(".tflite")
    _write_model(model, token, vocab_size)
    sections = [
        Section(getattr(Kind, held.kind), model if held.kind == MODEL else file.content(held), held.items)
        for held in file.sections
    ]
    write(target, sections, file.entries)
    model.unlink()


def _write_model(path: Path, token: int, vocab_size: int) -> None:
    row = np.zeros((1, vocab_size), np.float32)
    row[0, token] = CERTAIN
    model = LitertModel("bluelm-export")
    for name, tokens in ((prefill(CHUNK), CHUNK), (DECODE, 1)):
        graph = model.subgraph(name)
        ops = LitertOps(graph, _no_weight, _no_weight, 0.0, Type.FLOAT32)
        inputs = {
            "tokens": ops.input("tokens", (1, tokens), Type.INT32),
            "input_pos": ops.input("input_pos", (tokens,), Type.INT32),
            "mask": ops.input("mask", (1, 1, tokens, SLOTS)),
            **{f"{kind}0": ops.input(f"{kind}0", (1, 1, SLOTS, 1)) for kind in (KEYS, VALUES)},
        }
        start = ops.place(ops.slice(inputs["input_pos"], 0, 0, 1), 4, 2, "start")
        step = ops.constant(np.zeros((1, 1, tokens, 1)), f"{name}.step")
        outputs = {
            f"{kind}0": ops.write_slice(inputs[f"{kind}0"], step, start, f"{kind}out") for kind in (KEYS, VALUES)
        }
        if name == DECODE:
            first = ops.place(ops.reshape(inputs["tokens"], (1,)), 1, 1, "first")  # 0, whatever the token
            outputs["logits"] = ops.reshape(
                ops.gather(ops.constant(row, "row"), first, "logits.row"), (1, 1, vocab_size)
            )
        names = {key: symbol.index for key, symbol in inputs.items()}
        model.signature(name, graph, names, {key: symbol.index for key, symbol in outputs.items()})
    model.save(path)


def _no_weight(name: str) -> Any:
    raise AssertionError(name)
