"""Core AI's folder for the Neural Engine, read back: each function is followed from what it gives to what it takes.

Formulas beside those of `export/coreai/static/program.py`:

    linear(x)  W * x + b as a 1x1 convolution, W = scale * (code - 0) + 0
    rope(x)    x * cos + [-second half, first half] * sin
    cache      all slots of a layer, once the step's tokens lie in theirs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

from bluelm.block import Add, Attend, Linear, Norm, Product, Silu, Step, block_of
from bluelm.errors import InputError
from bluelm.rope import rope_table
from compress.checkpoint.store import EMBED, HEAD, QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.coreai import ASSET, FOLDER
from export.coreai.nodes import Weights, constant, formed, pointwise, take
from export.coreai.readback_tells import faults as tell_faults
from export.coreai.static import contract as c
from export.coreai.static.views import View, same, shown, unchanged
from export.readback import items
from export.readback.backwards import stream_before, stream_of
from export.readback.trail import OtherProgramError, Trail

if TYPE_CHECKING:
    from export.coreai.reader import Graph, Node, SavedProgram

Change = Callable[[View, int], View]
LAYOUT = "#coreaix.hw_constraints<IOSurface, alignments: [{}], interleave: [{}]>"


def findings(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[items.Finding]:
    """Of every item of the inventory."""
    from export.coreai.reader import read_program

    program, trail = read_program(artifact.folder / FOLDER / ASSET), Trail()
    yield from items.checked(items.TELLS, tell_faults(artifact, quantized))
    try:
        follow(program, artifact, quantized, trail)
        trail.see(items.GRAPH)
    except OtherProgramError as other:
        trail.see(items.GRAPH, str(other))
    except (InputError, ValueError, TypeError, LookupError, AttributeError) as error:
        trail.see(items.GRAPH, f"it cannot be followed: {error!r}")
    yield from trail.findings(artifact, quantized)


def follow(program: SavedProgram, artifact: Artifact, quantized: QuantizedCheckpoint, trail: Trail) -> None:
    """All functions, each to its end."""
    context, chunk = artifact.context, artifact.chunk
    steps = {c.extend(context, tokens): tokens for tokens in c.lengths(chunk)} | {c.prompt(context, chunk): chunk}
    gathers = {c.gather(tokens): tokens for tokens in c.lengths(chunk)}
    if program.graphs.keys() != {c.LOAD, *gathers, *steps}:
        raise OtherProgramError(f"the functions are {', '.join(sorted(program.graphs))}")
    if others := [name for name, graph in program.graphs.items() if graph.private or graph.composite]:
        raise OtherProgramError(f"{', '.join(others)} cannot be called")
    embedding = _Embedding(quantized, trail, program.graphs[c.LOAD])
    for name, tokens in gathers.items():
        embedding.follow(program.graphs[name], tokens)
    for name, tokens in steps.items():
        try:
            _Walk(artifact, quantized, trail, program.graphs[name], tokens).follow(name.startswith("prompt"))
        except OtherProgramError as other:
            raise OtherProgramError(f"{name}: {other}") from None


def laid_out(node: Node, name: str, interleave: tuple[int, ...], alignments: tuple[int, ...]) -> None:
    """What a chip and its host share must lie as both expect it."""
    wanted = LAYOUT.format(*("x".join(map(str, part)) for part in (alignments, interleave)))
    if node.layout != wanted:
        raise OtherProgramError(f"{name} is laid out as {node.layout or 'nothing says'} instead of {wanted}")


class _Embedding:
    """The table, and what looks tokens up in it."""

    def __init__(self, quantized: QuantizedCheckpoint, trail: Trail, load: Graph) -> None:
        self._quantized, self._weights = quantized, Weights(trail, quantized)
        if load.inputs or list(load.outputs) != [c.TABLE]:
            raise OtherProgramError(f"{c.LOAD} takes {', '.join(load.inputs)} and gives {', '.join(load.outputs)}")
        self._table(load.outputs[c.TABLE])
        held, bits = shown(load.outputs[c.TABLE], unchanged, c.TABLE), quantized.embed().bits
        if bits != 8:
            (held,) = take(held, "cast", 1)
        formed(held, "the codes of the embedding", f"si{bits}", load.outputs[c.TABLE].shape)
        self._codes, rest = np.split(constant(held)[:, 0], [quantized.config.vocab_size])
        if rest.any():
            raise OtherProgramError("rows behind the vocabulary are not empty")

    def _table(self, node: Node) -> None:
        config = self._quantized.config
        formed(node, c.TABLE, "si8", (c.table_rows(config.vocab_size), 1, config.hidden_size))
        laid_out(node, c.TABLE, (c.INTERLEAVE, 1, 1), (1, 1, 1, 1))

    def follow(self, gather: Graph, tokens: int) -> None:
        """Rows of the table times their scales."""
        if (list(gather.inputs), list(gather.outputs)) != ([c.TOKENS, c.TABLE], [c.GATHERED]):
            raise OtherProgramError(f"a lookup takes {', '.join(gather.inputs)}")
        ids, table = gather.inputs.values()
        formed(ids, c.TOKENS, "si32", (1, tokens))
        self._table(table)
        made = gather.outputs[c.GATHERED]
        formed(made, c.GATHERED, "f16", (1, tokens, 1, self._quantized.config.hidden_size))
        picked, scale = take(made, "mul", 2)
        (picked,) = take(picked, "cast", 1)
        found, at = take(picked, "gather_nd", 2)
        same(found, table, unchanged, "what tokens are looked up in")
        scales, other = take(shown(scale, unchanged, "the scale of a row"), "gather_nd", 2)
        for rows in (at, other):
            same(rows, ids, unchanged, "the rows of the embedding")
        wanted = self._quantized.embed()
        self._weights.held(EMBED, self._codes, constant(scales), wanted.bits, wanted)


class _Walk:
    """One pass over a function that takes tokens, backwards."""

    def __init__(
        self, artifact: Artifact, quantized: QuantizedCheckpoint, trail: Trail, graph: Graph, tokens: int
    ) -> None:
        self._artifact, self._config, self._trail = artifact, quantized.config, trail
        self._weights, self._graph, self._tokens = Weights(trail, quantized), graph, tokens
        self._block = block_of(self._config)
        self._channels = self._config.num_kv_heads * self._config.head_dim
        self._tables = [table.half().numpy() for table in rope_table(self._config, artifact.context)]
        self._caches: dict[str, Node] = {}

    def follow(self, prompt: bool) -> None:
        """From the logits, or from the caches alone, to the first stream."""
        outputs = self._graph.outputs
        self._border(self._graph.inputs)
        if list(outputs) != [c.KEYS, c.VALUES, c.LOGITS]:
            raise OtherProgramError(f"it gives {', '.join(outputs)}")
        self._caches = {name: shown(outputs[name], unchanged, name) for name in (c.KEYS, c.VALUES)}
        layers = list(reversed(range(self._config.num_layers)))
        x = self._prompt(outputs[c.LOGITS], layers.pop(0)) if prompt else self._head(outputs[c.LOGITS])
        for layer in layers:
            x = stream_before(self._block, x, lambda step, made, at=layer: self._inputs(step, made, at), self._alike)
        same(x, self._graph.inputs[c.STREAM], lambda x: x.transpose(0, 3, 2, 1), "the first stream")
        for name, node in self._caches.items():
            if node.op != "state" or node.extra != name:
                raise OtherProgramError(f"{name} is written by something else as well")

    def _border(self, inputs: Mapping[str, Node]) -> None:
        """Names, types, shapes and layouts of inputs and states."""
        config, context, tokens = self._config, self._artifact.context, self._tokens
        cache = (config.num_layers, 1, self._channels, 1, context)
        wanted = {
            c.STREAM: ("f16", (1, tokens, 1, config.hidden_size)),
            c.POSITIONS: ("ui16", (1, tokens)),
            c.STEP: ("si32", (1,)),
            c.MASK: ("f16", (1, context, 1, tokens)),
            c.KEYS: (inputs[c.KEYS].kind, cache),
            c.VALUES: (inputs[c.VALUES].kind, cache),
        }
        if list(inputs) != list(wanted):
            raise OtherProgramError(f"it takes {', '.join(inputs)}")
        for name, form in wanted.items():
            formed(inputs[name], name, *form)
        self._trail.see(items.CONTEXT)
        for name in (c.KEYS, c.VALUES):
            laid_out(inputs[name], name, (1, 1, c.INTERLEAVE, 1, 1), (1, 1, 1, 1, c.INTERLEAVE * context, 1))
            kind = {"f16": "float16"}.get(inputs[name].kind, inputs[name].kind)
            self._trail.see(items.CACHE, "" if kind == self._artifact.cache else f"{name} is {kind}")

    def _head(self, node: Node) -> Node:
        """The stream behind the last block."""
        formed(node, c.LOGITS, "f16", (1, 1, self._tokens, self._config.vocab_size))
        x, head = take(node, "batch_matmul", 2)
        self._weights.linear(shown(head, np.transpose, "the head"), HEAD)
        normed = shown(x, lambda x: x.transpose(0, 2, 3, 1), "what the head reads")
        return self._norm(normed, "model.norm", (1, self._config.hidden_size, 1, self._tokens), 1)

    def _prompt(self, node: Node, layer: int) -> Node:
        """The stream before the last block, of which only keys and values are computed."""
        first = (slice(0, 1),) * 5
        for name, number in zip(self._caches, take(node, "add", 2), strict=True):
            same(number, self._graph.outputs[name], lambda x: x[first], "what a prompt's function gives")
        one = self._block.attention
        key, value = self._kept(c.KEYS, layer), self._kept(c.VALUES, layer)
        made = {one.keys: self._turned(key, one.kv_heads), one.values: value}
        return stream_of(self._block, made, lambda step, node: self._inputs(step, node, layer), self._alike)

    def _inputs(self, step: Step, node: Node, layer: int) -> tuple[Node, ...]:
        """What a step that makes `node` is made of."""
        at = f"model.layers.{layer}"
        node = shown(node, unchanged, step.makes)
        match step:
            case Norm():
                heads = self._block.heads.get(step.makes)
                whole = (1, step.size, 1, self._tokens)
                form = (whole, 1) if heads is None else ((1, heads, step.size, self._tokens), 2)
                return (self._norm(node, f"{at}.{step.weight}", *form),)
            case Linear():
                return (self._linear(node, step, f"{at}.{step.weight}"),)
            case Attend():
                return self._attention(step, node, layer)
            case Silu() | Product() | Add():
                return pointwise(step, node)

    def _linear(self, node: Node, step: Linear, name: str) -> Node:
        if step.biased:
            node, bias = take(node, "add", 2)
            self._weights.vector(f"{name}.bias", bias, (1, -1, 1, 1))
        formed(node, name, "f16", (1, step.rows, 1, self._tokens))
        x, kernel, strides, dilations, groups = take(node, "conv2d", 5)
        if any(constant(part).ravel().tolist() != [1] * n for part, n in ((strides, 2), (dilations, 2), (groups, 1))):
            raise OtherProgramError(f"{name} is another convolution")
        self._weights.linear(kernel, name, kernel=True)
        return x

    def _norm(self, node: Node, name: str, shape: tuple[int, ...], axis: int) -> Node:
        """What is normed over an axis."""
        formed(node, name, "f16", shape)
        scaled, gamma = take(node, "mul", 2)
        y, unit = take(scaled, "mul", 2)
        (summed,) = take(unit, "rsqrt", 1)
        mean, squared = take(summed, "add", 2)
        power = self._over(mean, "reduce_mean", axis)
        small = self._square(squared)
        self._alike(self._square(power), y, f"what {name} takes the mean of")
        x, largest = take(y, "divide", 2)
        least, divisor = take(small, "divide", 2)
        peak, floor = take(largest, "maximum", 2)
        (size,) = take(self._over(peak, "reduce_max", axis), "abs", 1)
        for found, wanted in ((divisor, largest), (size, x)):
            self._alike(found, wanted, f"what {name} divides by")
        wanted, found = float(np.float16(sqrt(self._config.rms_norm_eps))), [float(constant(n)) for n in (least, floor)]
        self._trail.see(items.eps(f"{name}.weight"), "" if found == [wanted] * 2 else f"{found} instead of {wanted}")
        self._weights.vector(f"{name}.weight", gamma, (1, -1, 1, 1) if axis == 1 else (1, 1, -1, 1))
        return x

    def _over(self, node: Node, op: str, axis: int) -> Node:
        x, axes = take(node, op, 2)
        if constant(axes).tolist() != [axis]:
            raise OtherProgramError(f"a {op} over axes {constant(axes).tolist()}")
        return x

    def _square(self, node: Node) -> Node:
        x, other = take(node, "mul", 2)
        self._alike(other, x, "what is squared")
        return x

    def _attention(self, one: Attend, node: Node, layer: int) -> tuple[Node, Node, Node]:
        """Queries and keys before rope, and values."""
        group, size, mixed = one.heads // one.kv_heads, one.size, self._joined(node, one.heads, 1)
        products = [take(shown(part, _swap, "a head's mixed values"), "batch_matmul", 2) for part in mixed]
        shares = shown_by_all([share for _, share in products], lambda x, at: _swap(x[:, :, at : at + 1]), "shares")
        scores = self._scores(shares, one.heads)
        for head, ((value, _), (_, key)) in enumerate(zip(products, scores, strict=True)):
            for part, cache in ((value, c.VALUES), (key, c.KEYS)):
                held, at = self._caches[cache], head // group
                same(part, held, lambda x, at=at: _swap(_headed(x[layer], at, size)), "what a head attends to")
        queries = [query for query, _ in scores]
        scaled = shown_by_all(queries, lambda x, at: _headed(x, at, size).transpose(0, 2, 3, 1), "a head's queries")
        keys, values = (self._kept(cache, layer) for cache in (c.KEYS, c.VALUES))
        return self._query(scaled, one, layer), self._turned(keys, one.kv_heads), values

    def _scores(self, shares: Node, heads: int) -> list[tuple[Node, ...]]:
        """Queries and keys of each head, from the softmax over all slots."""
        masked, axis = take(shares, "softmax", 2)
        if constant(axis).ravel().tolist() != [1]:
            raise OtherProgramError("shares are not those of a token's slots")
        summed, mask = take(masked, "add", 2)
        formed(mask, "the mask", "f16", (1, self._artifact.context, 1, self._tokens))
        same(mask, self._graph.inputs[c.MASK], unchanged, "the mask")
        self._trail.see(items.MASK)  # what it adds, the engine says
        parts = self._joined(summed, heads, 2)
        turned = [shown(part, lambda x: x.transpose(0, 3, 1, 2), "a head's scores") for part in parts]
        return [take(part, "batch_matmul", 2) for part in turned]

    def _joined(self, node: Node, count: int, axis: int) -> tuple[Node, ...]:
        """The parts of a value, one a head."""
        if count == 1:
            return (node,)
        place, *parts = take(node, "concat", count + 1)
        if constant(place).ravel().tolist() != [axis]:
            raise OtherProgramError("heads lie along another axis")
        return tuple(parts)

    def _query(self, node: Node, one: Attend, layer: int) -> Node:
        rotated, scale = take(node, "mul", 2)
        found, wanted = float(constant(scale)), float(np.float16(one.scale))
        self._trail.see(items.attention_scale(layer), "" if found == wanted else f"{found} instead of {wanted}")
        return self._turned(rotated, one.heads)

    def _kept(self, cache: str, layer: int) -> Node:
        """The step's own keys or values, which are put into their slots; the cache before them is the next one."""
        before, start, stop, strides, new = take(self._caches[cache], "slice_update", 5)
        wanted = [layer, 0, 0, 0, "step"], [layer + 1, 1, self._channels, 1, f"step + {self._tokens}"]
        if (self._places(start), self._places(stop)) != wanted or constant(strides).tolist() != [1] * 5:
            raise OtherProgramError(f"{cache} of layer {layer} is put into other slots")
        self._caches[cache] = shown(before, unchanged, cache)
        return new

    def _places(self, node: Node) -> list[int | str]:
        """Of a vector of integers, where the step's first slot and the one behind its last stand by name."""
        if node.array is not None:
            return [int(each) for each in node.array().ravel()]
        if node is self._graph.inputs[c.STEP]:
            return ["step"]
        if node.op == "add":
            return [" + ".join(str(each) for part in node.inputs for each in self._places(part))]
        axis, *parts = node.inputs
        if node.op != "concat" or self._places(axis) != [0]:
            raise OtherProgramError(f"slots by a {node.op}")
        return [each for part in parts for each in self._places(part)]

    def _turned(self, node: Node, heads: int) -> Node:
        """What rope turns, [1, heads, size, T]."""
        size, node = self._config.head_dim, shown(node, unchanged, "what rope gives")
        formed(node, "what rope gives", "f16", (1, heads, size, self._tokens))
        straight, swapped = take(node, "add", 2)
        x, cos = take(straight, "mul", 2)
        halves, sin = take(swapped, "mul", 2)
        axis, negative, first = take(halves, "concat", 3)
        second, minus = take(negative, "mul", 2)
        if constant(axis).ravel().tolist() != [2] or float(constant(minus)) != -1.0:
            raise OtherProgramError("rope turns otherwise than halves")
        same(first, x, lambda x: x[:, :, : size // 2], "rope's first half")
        same(second, x, lambda x: x[:, :, size // 2 :], "rope's second half")
        for table, rows in zip(self._tables, (cos, sin), strict=True):
            self._rows(rows, table)
        return x

    def _rows(self, node: Node, table: np.ndarray) -> None:
        """Those of the step's positions."""
        shape = (1,) * (4 - len(node.shape)) + node.shape
        if shape != (1, 1, self._config.head_dim, self._tokens):
            raise OtherProgramError(f"rope's factors are {node.shape}")
        held, at = take(shown(node, lambda x: x.transpose(0, 2, 1), "rope's factors"), "gather_nd", 2)
        (places,) = take(shown(at, unchanged, "positions"), "cast", 1)
        same(places, self._graph.inputs[c.POSITIONS], unchanged, "positions")
        self._trail.array(items.ROPE, constant(held), table)

    def _alike(self, found: Node, wanted: Node, what: str) -> None:
        same(found, wanted, unchanged, what)


def shown_by_all(parts: list[Node], change: Change, what: str) -> Node:
    """The value that all parts show, each its own part of it."""
    bases = [shown(part, lambda x, at=at: change(x, at), what) for at, part in enumerate(parts)]
    if any(base is not bases[0] for base in bases):
        raise OtherProgramError(f"{what} are of several values")
    return bases[0]


def _headed(x: View, at: int, size: int) -> View:
    """Channels of one head, [1, size, 1, n]."""
    return x.reshape(1, -1, 1, x.shape[-1], copy=False)[:, at * size : (at + 1) * size]


def _swap(x: View) -> View:
    """Its two middle axes."""
    return x.transpose(0, 2, 1, 3)
