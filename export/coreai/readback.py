"""Core AI's folder, read back: the program is followed from the logits to the tokens, and all that is told beside it.

Formulas of the program:

    linear(x)  x Wᵀ + b, W = scale * (code - 0) + 0            rope(x)  x * cos + [-second half, first half] * sin
    cache      the first S slots of a layer, once the step's T keys lie behind the S - T before them
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bluelm.block import Add, Attend, Linear, Norm, Product, Silu, Step, block_of
from bluelm.errors import InputError
from bluelm.rope import rope_table
from compress.checkpoint.store import EMBED, HEAD, QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.coreai import ASSET, FOLDER
from export.coreai.nodes import Weights, constant, formed, pointwise, take
from export.coreai.readback_tells import faults as tell_faults
from export.readback import items
from export.readback.backwards import stream_before
from export.readback.trail import OtherProgramError, Trail

if TYPE_CHECKING:
    from export.coreai.reader import Node, SavedProgram

MAIN = "main"
TOKENS, POSITIONS, KEYS, VALUES, LOGITS = "input_ids", "position_ids", "keyCache", "valueCache", "logits"
END = 2**31 - 1
Indices = tuple[Any, ...]


def findings(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[items.Finding]:
    """Of every item of the inventory."""
    from export.coreai.reader import read_program

    program = read_program(artifact.folder / FOLDER / ASSET)
    yield from items.checked(items.TELLS, tell_faults(artifact, quantized))
    walk = Walk(program, artifact, quantized)
    try:
        walk.follow()
        walk.trail.see(items.GRAPH)
    except OtherProgramError as other:
        walk.trail.see(items.GRAPH, str(other))
    except (InputError, ValueError, TypeError, LookupError, AttributeError) as error:
        walk.trail.see(items.GRAPH, f"it cannot be followed: {error!r}")
    yield from walk.trail.findings(artifact, quantized)


class Walk:
    """One pass over `main`, from the logits backwards; composites are looked into where they are called."""

    def __init__(self, program: SavedProgram, artifact: Artifact, quantized: QuantizedCheckpoint) -> None:
        self.trail = Trail()
        self._weights = Weights(self.trail, quantized)
        self._program, self._artifact = program, artifact
        self._quantized, self._config = quantized, quantized.config
        self._tables = [table.half().numpy() for table in rope_table(self._config, artifact.context)]
        self._called: set[str] = {MAIN}
        self._seen: set[int] = set()  # of tables that were compared
        self._caches: dict[str, Node] = {}

    def follow(self) -> None:
        """All of it."""
        main = self._program.graphs.get(MAIN)
        if main is None or main.private or main.composite is not None:
            raise OtherProgramError("there is no function main")
        self._inputs = main.inputs
        self.border(main.inputs)
        if list(main.outputs) != [KEYS, VALUES, LOGITS]:
            raise OtherProgramError(f"main gives {', '.join(main.outputs)}")
        self._caches = {name: main.outputs[name] for name in (KEYS, VALUES)}
        x = self.norm(self.linear(main.outputs[LOGITS], HEAD), "model.norm", self._config.hidden_size)
        for layer in reversed(range(self._config.num_layers)):
            x = self.block(x, layer)
        self.embedding(x)
        for name, node in self._caches.items():
            if node.op != "state" or node.extra != name:
                raise OtherProgramError(f"{name} is written by something else as well")
        if others := self._program.graphs.keys() - self._called:
            raise OtherProgramError(f"nothing calls {', '.join(sorted(others))}")

    def border(self, inputs: Mapping[str, Node]) -> None:
        """Names, order, types and shapes of inputs and states."""
        config = self._config
        if list(inputs) != [TOKENS, POSITIONS, KEYS, VALUES]:
            raise OtherProgramError(f"main takes {', '.join(inputs)}")
        for name in (TOKENS, POSITIONS):
            formed(inputs[name], name, "si32", (1, None))
        shape = (config.num_layers, 1, config.num_kv_heads, None, config.head_dim)
        for name in (KEYS, VALUES):
            formed(inputs[name], name, inputs[name].kind, shape)
            kind = {"f16": "float16", "f32": "float32"}.get(inputs[name].kind, inputs[name].kind)
            self.trail.see(items.CACHE, "" if kind == self._artifact.cache else f"{name} is {kind}")

    def block(self, node: Node, layer: int) -> Node:
        """The stream before a block, from that behind it."""
        return stream_before(
            block_of(self._config), node, lambda step, made: self.inputs(step, made, layer), self.alike
        )

    def inputs(self, step: Step, node: Node, layer: int) -> tuple[Node, ...]:
        """What a step that makes `node` is made of."""
        at = f"model.layers.{layer}"
        match step:
            case Norm():
                return (self.norm(node, f"{at}.{step.weight}", step.size),)
            case Linear():
                heads = block_of(self._config).heads.get(step.makes)
                if heads is not None:
                    node = self.transposed(node, (0, 2, 1, 3))
                    node = self.reshaped(node, (1, -1, heads, step.rows // heads))
                return (self.linear(node, f"{at}.{step.weight}", step.biased),)
            case Attend():
                return self.attention(step, node, layer)
            case Silu() | Product() | Add():
                return pointwise(step, node)

    def attention(self, step: Attend, node: Node, layer: int) -> tuple[Node, Node, Node]:
        """Queries, keys and values [1, heads, T, size], before rope."""
        from export.coreai.readback_bodies import attention

        mixed = self.transposed(self.reshaped(node, (1, -1, step.heads * step.size)), (0, 2, 1, 3))
        (query, key, value), told = self.composite(mixed, "scaled_dot_product_attention", ("query", "key", "value"))
        rest = {"is_causal": True, "window_size": 0, "version": 1}
        if {key: told.get(key) for key in rest} != rest or told.keys() - rest.keys() != {"scale"}:
            raise OtherProgramError(f"attention is told {told}")
        self.bodied(mixed, attention(told["scale"], step.heads, step.kv_heads, step.size))
        wanted = float(np.float32(self._config.head_dim**-0.5))
        same = told["scale"] == wanted
        self.trail.see(items.attention_scale(layer), "" if same else f"{told['scale']} instead of {wanted}")
        self.trail.see(items.MASK)  # of the body
        keys, values = (self.kept(cache, one, layer) for cache, one in ((KEYS, key), (VALUES, value)))
        return self.rotated(query), self.rotated(keys), values

    def kept(self, cache: str, node: Node, layer: int) -> Node:
        """The step's own keys or values, of those that are attended to."""
        held = self.cut(self.squeezed(node), (layer, 0, 0, 0, 0), stop := self.stop(layer))
        self.alike(held, self._caches[cache], f"{cache} of layer {layer}")
        before, start, end, strides, new = take(held, "slice_update", 5)
        begin = (layer, 0, 0, ("less", self.length(POSITIONS), self.length(TOKENS)), 0)
        if (self.indices(start), self.indices(end), self.indices(strides)) != (begin, stop, (1,) * 5):
            raise OtherProgramError(f"{cache} of layer {layer} is put into other slots")
        self._caches[cache] = before
        return self.widened(new, 0)

    def stop(self, layer: int) -> Indices:
        return (layer + 1, END, END, self.length(POSITIONS), END)

    def length(self, name: str) -> Indices:
        """How many columns an input has."""
        return ("length", id(self._inputs[name]), 1)

    def rotated(self, node: Node) -> Node:
        straight, turned = take(node, "add", 2)
        x, cos = take(straight, "mul", 2)
        swapped, sin = take(turned, "mul", 2)
        axis, negative, first = take(swapped, "concat", 3)
        second, minus = take(negative, "mul", 2)
        if self.indices(axis) != (3,) or float(constant(minus)) != -1.0:
            raise OtherProgramError("rope turns otherwise than halves")
        half, none = self._config.head_dim // 2, (0, 0, 0)
        self.alike(self.cut(first, (*none, 0), (END, END, END, half)), x, "rope")
        self.alike(self.cut(second, (*none, half), (END,) * 4), x, "rope")
        for table, rows in zip(self._tables, (cos, sin), strict=True):
            self.rows(rows, table)
        return x

    def rows(self, node: Node, table: np.ndarray) -> None:
        """Those of the step's positions, the last T that are given."""
        held, places = take(node, "gather_nd", 2)
        start = (0, ("less", self.length(POSITIONS), self.length(TOKENS)))
        taken = self.cut(self.widened(places, 2), start, (END, self.length(POSITIONS)))
        self.alike(taken, self._inputs[POSITIONS], "the rows of a rope table")
        if id(held) not in self._seen:
            self._seen.add(id(held))
            found = constant(held)
            self.trail.see(items.CONTEXT, "" if len(found) == self._artifact.context else f"{len(found)} positions")
            self.trail.array(items.ROPE, found, table)

    def linear(self, node: Node, name: str, biased: bool = False) -> Node:
        """The input of a linear."""
        if biased:
            node, bias = take(node, "add", 2)
            self._weights.vector(f"{name}.bias", bias)
        x, turned = take(node, "batch_matmul", 2)
        self._weights.linear(self.transposed(turned, (1, 0)), name)
        return x

    def embedding(self, node: Node) -> None:
        picked, scale = take(node, "mul", 2)
        (picked,) = take(picked, "cast", 1)
        (codes, first), (scales, second) = (take(part, "gather_nd", 2) for part in (picked, scale))
        for rows in (first, second):
            self.alike(self.widened(rows, 2), self._inputs[TOKENS], "the rows of the embedding")
        table = self._quantized.embed()
        if (codes.kind, scales.kind) != (f"si{table.bits}", "f16"):
            self.trail.see(EMBED, f"codes are {codes.kind}, scales {scales.kind}")
        else:
            self._weights.held(EMBED, constant(codes), constant(scales), table.bits, table)

    def norm(self, node: Node, name: str, size: int) -> Node:
        from export.coreai.readback_bodies import norm

        (x, gamma), told = self.composite(node, "rms_norm", ("input", "scale"))
        if told.keys() != {"axes", "eps", "version"} or (told["axes"], told["version"]) != (-1, 1):
            raise OtherProgramError(f"{name} is told {told}")
        self.bodied(node, norm(told["eps"], len(x.shape) - 1))
        wanted = float(np.float32(self._config.rms_norm_eps))
        same = told["eps"] == wanted
        self.trail.see(items.eps(f"{name}.weight"), "" if same else f"{told['eps']} instead of {wanted}")
        self._weights.vector(f"{name}.weight", gamma)
        if x.shape[-1] != size:
            raise OtherProgramError(f"{name} is taken over {x.shape[-1]} numbers")
        return x

    # operations

    def composite(self, node: Node, kind: str, names: tuple[str, ...]) -> tuple[tuple[Node, ...], dict[str, Any]]:
        """The inputs of a call, and the numbers that what is called says it takes."""
        called = self._program.graphs.get(node.extra) if node.op == "invoke" else None
        if called is None or called.composite is None or called.composite[0] != kind or not called.private:
            raise OtherProgramError(f"{node.op} {node.extra} instead of {kind}")
        self._called.add(node.extra)
        told = dict(called.composite[1])
        if (told.pop("input_names"), told.pop("output_names"), tuple(called.inputs)) != ([*names], ["output"], names):
            raise OtherProgramError(f"{kind} takes {', '.join(called.inputs)}")
        return node.inputs, told

    def bodied(self, node: Node, wanted: Any) -> None:
        """What is called computes this."""
        from export.coreai.readback_bodies import body, first_other

        if other := first_other(body(self._program.graphs[node.extra]), wanted):
            raise OtherProgramError(f"{node.extra} computes otherwise: {other}")

    def indices(self, node: Node) -> Indices:
        """Integers, and lengths of inputs, of a vector that is put together of them."""
        if node.array is not None:
            return tuple(np.atleast_1d(node.array()).tolist())
        if node.op == "concat" and self.indices(node.inputs[0]) == (0,):
            return tuple(each for part in node.inputs[1:] for each in self.indices(part))
        if node.op == "sub":
            return (("less", *(each for part in node.inputs for each in self.indices(part))),)
        whole, start, stop, strides = take(node, "slice", 4)
        (shape,) = take(whole, "cast", 1)
        (first,), (last,) = self.indices(start), self.indices(stop)
        if last != first + 1 or self.indices(strides) != (1,):
            raise OtherProgramError("a length of several axes")
        return (("length", id(take(shape, "get_shape", 1)[0]), first),)

    def cut(self, node: Node, start: Indices, stop: Indices) -> Node:
        """What is cut from `start` to before `stop`."""
        x, first, last, strides = take(node, "slice", 4)
        if (self.indices(first), self.indices(last), self.indices(strides)) != (start, stop, (1,) * len(start)):
            raise OtherProgramError(f"a part of another place than {start}")
        return x

    def squeezed(self, node: Node) -> Node:
        x, axes = take(node, "shrink_dims", 2)
        if self.indices(axes) != (0,):
            raise OtherProgramError("another axis is left out")
        return x

    def widened(self, node: Node, axis: int) -> Node:
        x, axes = take(node, "expand_dims", 2)
        if self.indices(axes) != (axis,):
            raise OtherProgramError(f"an axis {self.indices(axes)} is added instead of {axis}")
        return x

    def reshaped(self, node: Node, shape: tuple[int, ...]) -> Node:
        x, sizes = take(node, "reshape", 2)
        if self.indices(sizes) != shape:
            raise OtherProgramError(f"a shape {self.indices(sizes)} instead of {shape}")
        return x

    def transposed(self, node: Node, order: tuple[int, ...]) -> Node:
        x, found = take(node, "transpose", 2)
        if self.indices(found) != order:
            raise OtherProgramError(f"axes {self.indices(found)} instead of {order}")
        return x

    def alike(self, found: Node, wanted: Node, what: str) -> None:
        if found is not wanted:
            raise OtherProgramError(f"{what} is another value")
