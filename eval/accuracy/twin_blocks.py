"""Compiled graphs on the simulator: each block and the head compared with its twin in torch.

Every block of a debug build gives its output, keys and values; its twin (`export/lowering/torch_ops.py`, every
activation rounded as the graph says) gets the same stream as input, so each block is judged by itself. How far the two
may be apart is not a constant: a second twin, whose matrix products carry the noise of HTP's float16 arithmetic, shows
what such noise does to this block on this input, and the difference that was found is divided by that.

The inputs are random tokens over random caches: they excite every slot and position, and a whole chunk of them every
column of every matrix. A single token does not: most of its columns behind a gate are near zero, and their errors drown
in the noise. So decode is also compared with prefill, on rows of the same chunk. The simulator answers both with the
same bits, while even a column that hardly matters changes thousands of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.embedding import EmbeddingTable
from export.lowering import decoder as lowered
from export.lowering.decoder import KeysValues, block_output
from export.lowering.ranges import Ranges
from export.lowering.torch_ops import Activations, Parameters, Rounded, TorchOps
from targets.host.cached_runtime import Feeds, step_mask

NOISE = 3.5e-4
"""Of a product of matrices on HTP, relative to its row: keys and values of first blocks are 2.4e-4 to 3.5e-4 from their
twins in every model tried (benchmarks/npu/htp_trials.md)."""
DECODE = 3  # positions that the decode graph is tried at
AGAIN = 3  # rows of a chunk that it computes again
SPREAD = 4.5  # standard deviations of a cached value up to the end of its range


@dataclass(frozen=True)
class Apart:
    """One value of one graph: how far it lies from its twin, as a multiple of what the noise explains.

    Attributes:
        value: "block 3", "keys 3", "values 3" or "head". graph: "prefill" or "decode".
        error: the distance itself, relative L2.
    """

    value: str
    graph: str
    ratio: float
    error: float


class Noisy(TorchOps):
    """The twin with the noise of HTP's products of matrices."""

    def __init__(self, parameters: Parameters, epsilon: float, activations: Activations) -> None:
        super().__init__(parameters, epsilon, activations)
        self._weights, self._rounded = parameters, activations
        self._generator = torch.Generator().manual_seed(0)

    def linear(self, x: Tensor, weight: str, name: str) -> Tensor:
        exact = x @ self._weights(weight).T
        size = exact.pow(2).mean(-1, keepdim=True).sqrt()
        noise = torch.randn(exact.shape, generator=self._generator)
        return self._rounded.value(name, exact + NOISE * size * noise)


def probes(artifact: Artifact, ranges: Ranges, seed: int = 0) -> dict[str, list[Feeds]]:
    """Inputs by graph: for prefill the last chunk of the context, for decode positions spread over it.

    Each is whole: random tokens, random codes in every cached slot, those behind the position hidden.
    """
    generator = np.random.default_rng(seed)
    context, chunk = artifact.context, artifact.chunk
    table = EmbeddingTable.open(artifact.path("embedding"))

    def feeds(start: int, width: int) -> Feeds:
        rows = table.rows(generator.integers(0, artifact.model.vocab_size, width).tolist())
        found: Feeds = {
            "hidden": np.asarray(rows, np.float32)[None],
            "positions": np.arange(start, start + width, dtype=np.int32),
            "mask": step_mask(start, width, context, artifact.mask_value),
        }
        slots, model = context - width, artifact.model
        heads, size = model.num_kv_heads, model.head_dim
        for layer in range(model.num_layers if slots else 0):
            for name, shape in (("keys", (1, heads, size, slots)), ("values", (1, heads, slots, size))):
                limit = ranges.cache_encoding(f"layers.{layer}.{name}").bounds[1]
                codes = np.clip(generator.normal(0, limit / SPREAD, shape), -limit, limit)
                found[f"past_{name}.{layer}"] = codes.astype(artifact.cache)
        return found

    spread = sorted({context * (step + 1) // DECODE - 1 for step in range(DECODE)})
    return {"prefill": [feeds(context - chunk, chunk)], "decode": [feeds(position, 1) for position in spread]}


def again(artifact: Artifact, feeds: Feeds, outputs: Mapping[str, np.ndarray]) -> Iterator[tuple[Feeds, Feeds]]:
    """Rows of a prefill step as decode steps, each with what prefill answered there.

    Args:
        feeds, outputs: of one chunk that ends with the context, as `probes` makes it; its keys and values fill the
            cache of the rows behind them.
    """
    context, chunk, layers = artifact.context, artifact.chunk, range(artifact.model.num_layers)
    filled: Feeds = {}  # [1, heads, size, context] and [1, heads, context, size]
    for name, axis in (("keys", 3), ("values", 2)):
        for layer in layers:
            own = np.asarray(outputs[f"{name}.{layer}"])
            past = feeds.get(f"past_{name}.{layer}")
            filled[f"past_{name}.{layer}"] = (
                own if past is None else np.concatenate([past, own.astype(past.dtype)], axis)
            )
    for row in sorted({chunk * (step + 1) // AGAIN - 1 for step in range(min(AGAIN, chunk))}):
        position = context - chunk + row
        step: Feeds = {
            "hidden": np.ascontiguousarray(feeds["hidden"][:, row : row + 1]),
            "positions": np.ascontiguousarray(feeds["positions"][row : row + 1]),
            "mask": step_mask(position, 1, context, artifact.mask_value),
        }
        for name, cache in filled.items():
            slots = slice(0, context - 1)
            cut = cache[..., slots] if "keys" in name else cache[:, :, slots]
            step[name] = np.ascontiguousarray(cut)
        wanted: Feeds = {"logits": outputs["logits"][:, row : row + 1]}
        for layer in layers:
            wanted[f"keys.{layer}"] = outputs[f"keys.{layer}"][..., row : row + 1]
            wanted[f"values.{layer}"] = outputs[f"values.{layer}"][:, :, row : row + 1]
        yield step, wanted


def unlike(pairs: Iterable[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]]) -> float:
    """The share of values that differ in any bit, of pairs of outputs; the second of a pair may have more than the
    first."""
    compared = [(array, np.asarray(theirs[name])) for mine, theirs in pairs for name, array in mine.items()]
    return sum(int((a != b).sum()) for a, b in compared) / sum(a.size for a, _ in compared)


def apart(
    quantized: QuantizedCheckpoint,
    ranges: Ranges,
    context: int,
    runs: Mapping[str, Sequence[tuple[Feeds, Mapping[str, np.ndarray]]]],
) -> list[Apart]:
    """Every block and the head of every graph.

    Args:
        runs: by graph, inputs and the outputs of a debug build, with the stream behind every block.
    """
    twins = _Twins(quantized, ranges, context)
    found: list[Apart] = []
    for graph, pairs in runs.items():
        values: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        for feeds, outputs in pairs:
            for name, *sides in twins.values(feeds, outputs):
                values.setdefault(name, []).append((sides[0], sides[1], sides[2]))
        for name, rows in values.items():
            seen, exact, noisy = (np.concatenate(side).astype(np.float64) for side in zip(*rows, strict=True))
            found.append(_apart(name, graph, seen - exact, noisy - exact, exact))
    return found


def whole(
    quantized: QuantizedCheckpoint,
    ranges: Ranges,
    context: int,
    runs: Mapping[str, Sequence[tuple[Feeds, Mapping[str, np.ndarray]]]],
    own: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
) -> list[Apart]:
    """Of two compilations of the same graphs: how far their logits are apart, by what the noise of all blocks does."""
    twins = _Twins(quantized, ranges, context)
    found: list[Apart] = []
    for graph, pairs in runs.items():
        rows = [
            (mine["logits"][0] - shown["logits"][0], *twins.logits(feeds))
            for (feeds, shown), mine in zip(pairs, own[graph], strict=True)
        ]
        error, exact, noisy = (np.concatenate(side).astype(np.float64) for side in zip(*rows, strict=True))
        found.append(_apart("the artifact's own answer", graph, error, noisy - exact, exact))
    return found


def _apart(name: str, graph: str, error: np.ndarray, noise: np.ndarray, exact: np.ndarray) -> Apart:
    relative = float(np.linalg.norm(error) / max(float(np.linalg.norm(exact)), float(np.finfo(np.float64).tiny)))
    return Apart(name, graph, _ratio(error, noise, exact), relative)


def _ratio(error: np.ndarray, noise: np.ndarray, exact: np.ndarray) -> float:
    """The largest of: the whole, the worst row, the worst column; [n, m] each."""
    floor = 0.1 * NOISE * float(np.sqrt(np.mean(exact**2))) + float(np.finfo(np.float64).tiny)
    if not np.isfinite(error).all():
        return float("inf")

    def worst(x: np.ndarray, axis: int | None) -> float:
        return float(np.sqrt(np.mean(x**2, axis=axis)).max())

    return max(worst(error, axis) / max(worst(noise, axis), floor) for axis in (None, 0, 1))


class _Twins:
    """Both twins of each block, one block's weights in memory at a time."""

    def __init__(self, quantized: QuantizedCheckpoint, ranges: Ranges, context: int) -> None:
        self._config, self._ranges, self._context = quantized.config, ranges, context
        parameters, rounded = Parameters(quantized), Rounded(ranges)
        epsilon = quantized.config.rms_norm_eps
        self._exact, self._noisy = TorchOps(parameters, epsilon, rounded), Noisy(parameters, epsilon, rounded)
        self._mask = rounded.constant(torch.tensor([ranges.mask_value, 0.0]))[0].item()

    @torch.no_grad()
    def values(
        self, feeds: Feeds, outputs: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
        """(name, found, twin, noisy twin), each [rows, width]."""
        ops = self._exact
        mask = self._masked(feeds)
        rotary = lowered.rotary_factors(ops, self._config, torch.from_numpy(feeds["positions"]), self._context)
        x = ops.input("hidden", torch.from_numpy(feeds["hidden"]))
        for layer in range(self._config.num_layers):
            past = self._past(feeds, layer)
            (twin, mine), (noisy, theirs) = (
                lowered.block(side, self._config, layer, x, rotary, mask, past) for side in (ops, self._noisy)
            )
            after = torch.from_numpy(np.asarray(outputs[block_output(layer)], np.float32))
            yield f"block {layer}", after[0].numpy(), twin[0].numpy(), noisy[0].numpy()
            for name, axis, of_twin, of_noisy in (
                ("keys", 3, mine.keys, theirs.keys),
                ("values", 2, mine.values, theirs.values),
            ):
                codes = self._beside(self._cached(outputs[f"{name}.{layer}"], layer, name), of_twin, layer, name)
                yield f"{name} {layer}", _by_row(codes, axis), _by_row(of_twin, axis), _by_row(of_noisy, axis)
            x = after
        twin, noisy = (lowered.head(side, x)[0].numpy() for side in (ops, self._noisy))
        yield "head", np.asarray(outputs["logits"][0], np.float32), twin, noisy

    @torch.no_grad()
    def logits(self, feeds: Feeds) -> Iterator[np.ndarray]:
        """Those of the twin and of the noisy twin, [rows, vocab] each."""
        positions, mask = torch.from_numpy(feeds["positions"]), self._masked(feeds)
        past = [self._past(feeds, layer) for layer in range(self._config.num_layers)]
        for ops in (self._exact, self._noisy):
            x = ops.input("hidden", torch.from_numpy(feeds["hidden"]))
            yield lowered.decoder(ops, self._config, x, positions, mask, past, self._context)[0][0].numpy()

    def _masked(self, feeds: Feeds) -> Tensor:
        return torch.where(torch.from_numpy(feeds["mask"]) < 0, self._mask, 0.0)

    def _past(self, feeds: Feeds, layer: int) -> KeysValues[Tensor] | None:
        if f"past_keys.{layer}" not in feeds:
            return None
        return KeysValues(*(self._cached(feeds[f"past_{name}.{layer}"], layer, name) for name in ("keys", "values")))

    def _cached(self, codes: np.ndarray, layer: int, name: str) -> Tensor:
        return torch.from_numpy(self._ranges.cache_encoding(f"layers.{layer}.{name}").dequantize(codes))

    def _beside(self, found: Tensor, twin: Tensor, layer: int, name: str) -> Tensor:
        """The next code to the twin's is the twin's: which of two is rounded to hangs on less than the noise, and of 8
        bits it happens so seldom that the noisy twin may not show it."""
        step = self._ranges.cache_encoding(f"layers.{layer}.{name}").scale
        return torch.where((found - twin).abs() < 1.5 * step, twin, found)


def _by_row(x: Tensor, axis: int) -> np.ndarray:
    """[1, heads, ..] -> [rows, heads * head_dim]; `axis` counts the rows."""
    return x[0].movedim(axis - 1, 0).flatten(1).numpy()
