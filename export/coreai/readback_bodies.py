"""What the composites of a Core AI program compute: their bodies as nested terms, from the formulas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from export.coreai.reader import Graph, Node

Term = Any
"""A tuple (operation, terms...), the name of an input, or numbers as ("constant", kind, list)."""
HIDDEN_SCORE = -1e4


def term(node: Node, names: Mapping[int, str]) -> Term:
    """What a node is computed from; `names`: of inputs by their nodes' identity. Casts say to what."""
    if id(node) in names:
        return names[id(node)]
    if node.array is not None:
        return ("constant", node.kind, node.array().tolist())
    op = f"cast to {node.kind}" if node.op == "cast" else node.op
    return (op, *(term(one, names) for one in node.inputs))


def body(graph: Graph) -> Term:
    """The term of a graph's one output."""
    names = {id(node): name for name, node in graph.inputs.items()}
    (output,) = graph.outputs.values()
    return term(output, names)


def norm(eps: float, axis: int) -> Term:
    """x / sqrt(mean(x**2) + eps) * scale over one axis, in float32."""
    x = ("cast to f32", "input")
    power = ("reduce_mean", ("mul", x, x), _ints(axis))
    unit = ("mul", x, ("rsqrt", ("add", power, _float(eps))))
    return ("mul", ("cast to f16", unit), "scale")


def attention(scale: float, heads: int, kv_heads: int, size: int) -> Term:
    """softmax(scale q kᵀ + mask) v in float32; of S keys and T queries the last one sees all, each one before it one
    less. Queries that share keys lie below each other."""
    query, key, value = (("cast to f32", name) for name in ("query", "key", "value"))
    count, length = (("slice", ("cast to si32", ("get_shape", name)), _ints(2), _ints(3), _ints(1))
                     for name in ("query", "key"))  # fmt: skip
    rows, shared = ("mul", query, _float(scale)), heads != kv_heads
    rows = ("reshape", rows, _ints(1, kv_heads, -1, size)) if shared else rows
    scores = ("batch_matmul", rows, ("transpose", key, ("constant", "ui32", [0, 1, 3, 2])))
    scores = ("reshape", scores, ("concat", _int(0), _ints(1, heads), count, length)) if shared else scores
    stop = ("reshape", length, ("constant", "ui32", []))
    start = ("reshape", ("sub", length, count), ("constant", "ui32", []))
    behind = ("expand_dims", ("range", _int(0), stop, _int(1)), _ints(0))
    own = ("expand_dims", ("range", start, stop, _int(1)), _ints(1))
    mask = ("mul", ("cast to f32", ("greater", behind, own)), _float(HIDDEN_SCORE))
    shares = ("softmax", ("add", scores, mask), _int(3))
    shares = ("reshape", shares, ("concat", _int(0), _ints(1, kv_heads, -1), length)) if shared else shares
    mixed = ("batch_matmul", shares, value)
    return ("cast to f16", ("reshape", mixed, _ints(1, heads, -1, size)) if shared else mixed)


def _float(value: float) -> Term:
    return ("constant", "f32", float(np.float32(value)))


def _int(value: int) -> Term:
    return ("constant", "si32", value)


def _ints(*values: int) -> Term:
    return ("constant", "si32", list(values))


def first_other(found: Term, wanted: Term) -> str:
    """The first place where two terms differ; "" where they are the same."""
    if found == wanted:
        return ""
    if not isinstance(found, tuple) or not isinstance(wanted, tuple) or found[0] != wanted[0]:
        return f"{_shown(found)} instead of {_shown(wanted)}"
    if len(found) != len(wanted) or found[0] == "constant":
        return f"{found!r:.80} instead of {wanted!r:.80}"
    return next(other for pair in zip(found[1:], wanted[1:], strict=True) if (other := first_other(*pair)))


def _shown(value: Term) -> str:
    return str(value[0] if isinstance(value, tuple) else value)
