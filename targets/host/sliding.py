"""Steps of graphs whose cache slides inside them, as steps of graphs whose host keeps it.

    the first C - T slots -> T empty ones in front -> graph -> the last T of what it gives are the step's own

See `export/npu_genai/border.py` for how such a graph names the axes of its cache.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from targets.host.cached_runtime import Feeds, Step

AXES = {"keys": 3, "values": 2}
"""Of the slots: keys [1, kv_heads, head_dim, slots], values [1, kv_heads, slots, head_dim]."""


def kept_by_host(step: Step) -> Step:
    """A step of `export/onnx/decoder.py` around one with a whole cache at its border."""

    def run(feeds: Feeds) -> Mapping[str, np.ndarray]:
        tokens = feeds["hidden"].shape[1]
        found = step({name: _whole(name, array, tokens) for name, array in feeds.items()})
        return {name: _own(name, np.asarray(array), tokens) for name, array in found.items()}

    return run


def _whole(name: str, array: np.ndarray, tokens: int) -> np.ndarray:
    """A cached layer as the graph takes it, [1, kv_heads, C, head_dim]; another input as it is."""
    axis = AXES.get(name.split(".")[0].removeprefix("past_")) if name.startswith("past_") else None
    if axis is None:
        return array
    empty = np.zeros((*array.shape[:axis], tokens, *array.shape[axis + 1 :]), array.dtype)
    slots = np.concatenate([empty, array], axis)
    return slots.reshape(*slots.shape[:2], slots.shape[axis], slots.shape[5 - axis])


def _own(name: str, array: np.ndarray, tokens: int) -> np.ndarray:
    """The slots of the step's own tokens; another output as it is."""
    kind = name.split(".")[0]
    if kind not in AXES:
        return array
    if kind == "keys":
        array = array.reshape(*array.shape[:2], array.shape[3], array.shape[2])
        return np.ascontiguousarray(array[..., -tokens:])
    return np.ascontiguousarray(array[:, :, -tokens:])
