"""Damage that shows at some positions of the context alone, in prefill or in decode."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import Tensor

from bluelm.config import ModelConfig
from bluelm.rope import rope_table
from export.artifacts.artifact import Artifact, Format
from targets.host.cached_runtime import Feeds
from targets.runtime import Runtime, RuntimeBase
from tests.support import damage
from tests.support.damages.record import ALL, COMPILED, Damage

FROM = 0.55  # of the context: where a table freezes, a share that the windows of old never came to
DECODE_FROM = 0.3  # of the context: from there on decode turns by wrong angles
SLOTS = (0.4, 0.5)  # of the context: slots that decode forgets
SHIFT = 7
TABLES = (
    "export.coreai.program", "export.coreai.static.program", "export.executorch.model", "export.executorch.static",
    "export.lowering.decoder", "export.onnx.genai",
)  # fmt: skip
GRAPHS: tuple[Format, ...] = ("onnx-cpu", "onnx-npu")
HOST_CACHED: tuple[Format, ...] = ("onnx-cpu", "onnx-npu", "litert", "executorch-coreml", *COMPILED)
"""Formats whose host keeps the cache and gives positions and mask: a graph that errs is stood for by other inputs."""
OWN_CACHE: dict[Format, str] = {
    "executorch-xnnpack": "_held", "litert-lm": "_held", "coreml": "_position", "coreai": "_held",
}  # fmt: skip
"""Formats that keep the cache themselves; where their runtimes count its tokens."""


@contextmanager
def tables(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Exporters get other rope tables; `change` is of one [context, head_dim]."""

    def changed(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
        cos, sin = rope_table(config, length)
        return change(cos), change(sin)

    patches = [patch.object(importlib.import_module(name), "rope_table", changed) for name in TABLES]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def frozen(table: Tensor) -> Tensor:
    """From a position on the row of that position again."""
    at = int(FROM * len(table))
    return table[[*range(at), *[at] * (len(table) - at)]]


def last_row(table: Tensor) -> Tensor:
    """The last position's row is that of position 0."""
    return table[[*range(len(table) - 1), 0]]


def mapped_positions(artifact: Artifact) -> Artifact:
    """The decode graph of an ONNX artifact turns by other angles: positions -> Gather(map, positions)."""
    others = np.arange(artifact.context, dtype=np.int32)
    at = int(DECODE_FROM * artifact.context)
    others[at:] = np.minimum(others[at:] + SHIFT, artifact.context - 1)
    return _passed_through(artifact, "positions", "Gather", others, first=True)


def forgotten_slots(artifact: Artifact) -> Artifact:
    """The decode graph of an onnx-cpu artifact sees nothing in some slots: mask -> Min(mask, forgotten)."""
    seen = np.zeros((1, 1, 1, artifact.context), np.float32)
    seen[..., slice(*(int(share * artifact.context) for share in SLOTS))] = artifact.mask_value
    return _passed_through(artifact, "mask", "Min", seen)


def _passed_through(artifact: Artifact, name: str, kind: str, table: np.ndarray, first: bool = False) -> Artifact:
    """The decode graph's input passes through one node before any use: name -> kind(name, table), or the other way
    round with `first`.
    """
    path, changed, held = artifact.path("decode"), f"{name}.other", f"{name}.table"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.input[:] = [changed if one == name else one for one in node.input]
    model.graph.initializer.append(numpy_helper.from_array(table, held))
    model.graph.node.insert(0, helper.make_node(kind, [held, name] if first else [name, held], [changed]))
    onnx.save(model, path)
    return damage.again(artifact)


def stepping(change: Callable[[Feeds, int], Feeds]) -> Callable[[Runtime], Runtime]:
    """A runtime of the host's cache whose graphs see other inputs; `change` gets them and the number of rows."""

    def wrap(runtime: Runtime) -> Runtime:
        steps: dict[int, Any] = cast(Any, runtime)._steps

        def changed(width: int, step: Callable[[Feeds], Any]) -> Callable[[Feeds], Any]:
            return lambda feeds: step(change(dict(feeds), width))

        cast(Any, runtime)._steps = {width: changed(width, step) for width, step in steps.items()}
        return runtime

    return wrap


def _context(feeds: Feeds) -> int:
    return feeds["mask"].shape[-1]


def blind_chunk(feeds: Feeds, width: int) -> Feeds:
    """The third chunk sees nothing before itself."""
    if width > 1 and feeds["positions"][0] == 2 * width:
        feeds["mask"] = feeds["mask"].copy()
        feeds["mask"][..., : _context(feeds) - width] = feeds["mask"].min()
    return feeds


def blind_decode(feeds: Feeds, width: int) -> Feeds:
    """Decode sees nothing in some slots."""
    if width == 1:
        first, last = (int(share * _context(feeds)) for share in SLOTS)
        feeds["mask"] = feeds["mask"].copy()
        feeds["mask"][..., first:last] = feeds["mask"].min()
    return feeds


def turned_decode(feeds: Feeds, width: int) -> Feeds:
    """Decode turns by the angles of other positions from one on."""
    if width == 1 and feeds["positions"][0] >= DECODE_FROM * _context(feeds):
        feeds["positions"] = np.minimum(feeds["positions"] + SHIFT, _context(feeds) - 1).astype(np.int32)
    return feeds


def last_slot(feeds: Feeds, width: int) -> Feeds:
    """The newest tokens of the cache are hidden when it is all but full."""
    if width == 1 and feeds["positions"][0] >= _context(feeds) - 4:
        feeds["mask"] = feeds["mask"].copy()
        feeds["mask"][..., _context(feeds) - 8 : _context(feeds) - 1] = feeds["mask"].min()
    return feeds


class Misplaced(RuntimeBase):
    """A runtime of its own cache that puts tokens elsewhere: `where` maps the place (and the number of new ones)."""

    def __init__(self, inner: Runtime, where: Callable[[int, int, int], int]) -> None:
        self._inner, self._where = inner, where
        self.name, self.vocab_size, self.context = inner.name, inner.vocab_size, inner.context
        (self._count,) = {name for name in OWN_CACHE.values() if hasattr(inner, name)}
        self._chunk = int(getattr(inner, "chunk", 0)) or cast(Any, inner)._artifact.chunk

    def reset(self) -> None:
        self._inner.reset()

    def rewind(self, held: int) -> None:
        self._inner.rewind(held)

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        rows: list[np.ndarray] = []
        for start in range(0, len(tokens), self._chunk):
            part = tokens[start : start + self._chunk]
            held = getattr(self._inner, self._count)
            other = self._where(held, len(part), self.context)
            setattr(self._inner, self._count, min(other, self.context - len(part)))
            rows.append(self._inner.prefill(part))
            setattr(self._inner, self._count, held + len(part))
        return np.concatenate(rows)

    def close(self) -> None:
        self._inner.close()


def misplaced_chunk(held: int, count: int, context: int) -> int:
    """The third chunk is put where the first was."""
    return 0 if count > 1 and held == 2 * count else held


def misplaced_decode(held: int, count: int, context: int) -> int:
    """Decode puts tokens too far from a position on."""
    return held + SHIFT if count == 1 and held >= DECODE_FROM * context else held


def misplaced_end(held: int, count: int, context: int) -> int:
    """The last tokens of the context are put over others, far enough that it costs more than 8-bit activations do."""
    return held - 64 if count == 1 and held >= context - 8 else held


def forgetful_decode(runtime: Runtime) -> Runtime:
    """onnxruntime-genai's cache loses some slots when one token comes."""
    genai = cast(Any, runtime)
    step = genai._decode

    def run(feeds: Feeds) -> Any:
        first, last = (int(share * runtime.context) for share in SLOTS)
        changed = dict(feeds)
        for name, past in feeds.items():
            if name.startswith("past"):
                changed[name] = past.copy()
                changed[name][:, :, first:last] = 0
        return step(changed)

    genai._decode = run
    return runtime


def window(feeds: Feeds, width: int) -> Feeds:
    """Attention sees 0.4 of the context at most."""
    seen, held = int(0.4 * _context(feeds)), int(feeds["positions"][0])
    feeds["mask"] = feeds["mask"].copy()
    if held > seen:
        feeds["mask"][..., : held - seen] = feeds["mask"].min()
    return feeds


OTHERS: tuple[Format, ...] = tuple(kind for kind in HOST_CACHED if kind not in GRAPHS)
TABLED = tuple(kind for kind in ALL if kind not in ("gguf", "mlx"))  # hold cosines and sines
ROWS = (
    Damage("cache", GRAPHS, files=damage.forget_cache),
    Damage("cache", COMPILED, before=damage.forget_cache),
    Damage("cache", tuple(k for k in ALL if k not in (*GRAPHS, *COMPILED)), run=damage.Forgetful),
    Damage("frozen rope", TABLED, exporting=lambda: tables(frozen)),
    Damage("rope of the last position", TABLED, exporting=lambda: tables(last_row)),
    Damage("decode turns wrongly", GRAPHS, files=mapped_positions),
    Damage("decode turns wrongly", OTHERS, run=stepping(turned_decode)),
    Damage("decode turns wrongly", tuple(OWN_CACHE), run=lambda r: Misplaced(r, misplaced_decode)),
    Damage("forgotten slots", ("onnx-cpu",), files=forgotten_slots),
    Damage("forgotten slots", ("onnx-npu", *OTHERS), run=stepping(blind_decode)),
    Damage("forgotten slots", ("onnx-genai",), run=forgetful_decode),
    Damage("blind third chunk", HOST_CACHED, run=stepping(blind_chunk)),
    Damage("blind third chunk", tuple(OWN_CACHE), run=lambda r: Misplaced(r, misplaced_chunk)),
    Damage("end of the context", HOST_CACHED, run=stepping(last_slot)),
    Damage("end of the context", tuple(OWN_CACHE), run=lambda r: Misplaced(r, misplaced_end)),
    Damage("sliding window", HOST_CACHED, run=stepping(window)),
)
