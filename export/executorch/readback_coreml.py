"""ExecuTorch programs for Core ML, read back: each function of the package is followed from the logits to the inputs.

coremltools names the operations, so where a constant is used says what it must be. Formulas of the program:

    norm(x)  the first half of LayerNorm([x, -x]), whose mean is 0 and whose variance is mean(x**2)
    rope(x)  x * cos + [second half, first half] * sin, where sin is negative in its first half
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bluelm.block import Add, Attend, Linear, Norm, Product, Silu, Step, block_of
from bluelm.errors import ExportError
from compress.checkpoint.store import HEAD, QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.onnx.readback_constants import HIDDEN_SCORE, Constants
from export.onnx.reader import HeldWeight
from export.readback import items
from export.readback.backwards import stream_before
from export.readback.held import faults, table
from export.readback.trail import OtherProgramError, Trail

if TYPE_CHECKING:
    from export.coreml.package import Package
    from export.executorch.coreml_reader import Method

METHODS = ("prefill", "decode")
TYPES = {"float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
CACHES = {"fp16": "float16", "fp32": "float32"}
Shape = tuple[int, ...]


def findings(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[items.Finding]:
    """Of the program, and of the embedding table beside it."""
    from export.executorch.coreml_reader import unpack

    trail = Trail()
    with tempfile.TemporaryDirectory(prefix="bluelm-pte-") as scratch:
        program = unpack(artifact.path("model"), Path(scratch))
        yield from items.checked(items.TELLS, _tell_faults(program.methods, quantized))
        trail.see(items.GRAPH)
        for name in METHODS:
            tokens = artifact.chunk if name == "prefill" else 1
            try:
                Walk(program.package, program.methods[name], artifact, quantized, tokens, trail).follow()
            except OtherProgramError as other:
                trail.see(items.GRAPH, f"{name}: {other}")
            except (ExportError, ValueError, TypeError, LookupError, AttributeError) as error:
                trail.see(items.GRAPH, f"{name} cannot be followed: {error!r}")
    yield from trail.findings(artifact, quantized)
    yield from table(artifact, quantized)
    yield from items.equal(items.MASK, artifact.mask_value, HIDDEN_SCORE)


def _tell_faults(methods: dict[str, Method], quantized: QuantizedCheckpoint) -> Iterator[str]:
    """Methods and the order of their inputs, which is all that a host knows them by."""
    if set(methods) != set(METHODS):
        yield f"the methods are {', '.join(methods)}"
    wanted = ("hidden", "positions", "mask", *(f"past_{place}" for place in range(2 * quantized.config.num_layers)))
    for method in methods.values():
        if method.inputs != wanted:
            yield f"{method.name} takes {', '.join(method.inputs[:5])} ..."


class Walk:
    """One pass over a function, from its outputs backwards; values by their names."""

    def __init__(
        self, package: Package, method: Method, artifact: Artifact, quantized: QuantizedCheckpoint, tokens: int,
        trail: Trail,
    ) -> None:  # fmt: skip
        self._package, self._method, self._artifact, self.trail = package, method, artifact, trail
        self._quantized, self._config, self._tokens = quantized, quantized.config, tokens
        self._made = {op.outputs[0].name: op for op in package.operations(method.function) if op.outputs}
        self._constants = dict(package.constants(method.function))
        self._tables = Constants(quantized, artifact.context).tables
        wide = next((name for name in TYPES if f"{name} activations" in artifact.notes), "float16")
        self._dtype = TYPES[wide]

    def follow(self) -> None:
        """All of the function."""
        config = self._config
        self.inputs()
        logits, *new = self._method.outputs
        x = self.norm(self.linear(logits, HEAD), "model.norm", config.hidden_size)
        for layer in reversed(range(config.num_layers)):
            x = self.block(x, layer, new[2 * layer : 2 * layer + 2])
        self.alike(self.uncast(x), "hidden", "the first block's input")
        if len(new) != 2 * config.num_layers:
            raise OtherProgramError(f"{len(new)} keys and values are given")

    def inputs(self) -> None:
        """Slots and type of the cache as the function declares them."""
        from export.coreml.package import value_type

        heads, size = self._config.num_kv_heads, self._config.head_dim
        slots = self._artifact.context - self._tokens
        for named in self._package.functions[self._method.function].inputs:
            kind = value_type(named.type)
            if named.name == "mask":
                found = (kind.shape or (0,))[-1]
                self.trail.see(items.CONTEXT, "" if found == self._artifact.context else f"a mask of {found} slots")
            elif named.name.startswith("past_"):
                keys = int(named.name.removeprefix("past_")) % 2 == 0
                wanted = (1, heads, size, slots) if keys else (1, heads, slots, size)
                self.trail.see(
                    items.CONTEXT, "" if kind.shape == wanted else f"{named.name} is {kind.shape}, not {wanted}"
                )
                there = CACHES.get(kind.dtype, kind.dtype)
                self.trail.see(items.CACHE, "" if there == self._artifact.cache else f"{named.name} is {there}")

    def block(self, node: str, layer: int, new: list[str]) -> str:
        """The stream before a block, from that behind it."""
        return stream_before(
            block_of(self._config), node, lambda step, made: self.made_of(step, made, layer, new), self.alike
        )

    def made_of(self, step: Step, node: str, layer: int, new: list[str]) -> tuple[str, ...]:
        """What a step that makes `node` is made of."""
        at = f"model.layers.{layer}"
        match step:
            case Norm():
                return (
                    self.norm(node, f"{at}.{step.weight}", step.size, block_of(self._config).heads.get(step.makes)),
                )
            case Linear():
                return (self.linear(node, f"{at}.{step.weight}", step.biased),)
            case Attend():
                return self.attention(node, layer, new)
            case Silu():
                return self.take(node, "silu", "x")
            case Product():
                return self.take(node, "mul", "x", "y")
            case Add():
                return self.take(node, "add", "x", "y")

    def attention(self, node: str, layer: int, new: list[str]) -> tuple[str, str, str]:
        """Queries, keys and values, [1, T, heads * head_dim]."""
        config, tokens, slots = self._config, self._tokens, self._artifact.context
        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        rows = heads // kv_heads * tokens
        mixed = self.transposed(self.reshaped(node, (1, tokens, heads * size)), (0, 2, 1, 3))
        shares, values = self.product(self.regrouped(mixed, (1, heads, tokens, size)))
        scores = self.take(self.regrouped(shares, (1, kv_heads, rows, slots)), "softmax", "x", axis=-1)[0]
        scores, mask = self.take(scores, "add", "x", "y")
        self.alike(self.uncast(mask), "mask", "the mask")
        query, keys = self.product(self.regrouped(scores, (1, heads, tokens, slots)))
        query, factor = self.take(self.regrouped(query, (1, kv_heads, rows, size)), "mul", "x", "y")
        wanted = np.array(config.head_dim**-0.5, self._dtype)
        self.trail.array(items.attention_scale(layer), self.value(factor), wanted)
        key = self.rotated(self.transposed(self.cached(keys, 3, f"past_{2 * layer}", new[0]), (0, 1, 3, 2)))
        value = self.cached(values, 2, f"past_{2 * layer + 1}", new[1])
        parts = ((self.rotated(query), heads), (key, kv_heads), (value, kv_heads))
        query, key, value = (
            self.reshaped(self.transposed(part, (0, 2, 1, 3)), (1, tokens, count, size)) for part, count in parts
        )
        return query, key, value

    def regrouped(self, node: str, shape: tuple[int, ...]) -> str:
        """Heads put with those that they share keys with; where each has its own, nothing is to be done."""
        alone = self._config.num_heads == self._config.num_kv_heads
        return node if alone and self.kind(self.uncast(node)) != "reshape" else self.reshaped(node, shape)

    def product(self, node: str) -> tuple[str, str]:
        x, y = self.take(node, "matmul", "x", "y", transpose_x=False, transpose_y=False)
        return x, y

    def cached(self, node: str, axis: int, past: str, new: str) -> str:
        """The step's own keys or values, which come behind the cached ones and are given out."""
        before, own = self.several(node, axis)
        self.alike(self.uncast(before), past, "the cached keys or values")
        self.alike(self.uncast(new), self.uncast(own), "the keys or values that are given out")
        return own

    def rotated(self, node: str) -> str:
        straight, turned = self.take(node, "add", "x", "y")
        (x, cos), (swapped, sin) = (self.take(part, "mul", "x", "y") for part in (straight, turned))
        half, size = self._config.head_dim // 2, self._config.head_dim
        for part, start in zip(self.several(swapped, 3), (half, 0), strict=True):
            self.alike(self.cut(part, start, start + half), x, "rope")
        for name, rows in (("rope.cos.table", cos), ("rope.sin.table", sin)):
            gathered = self.reshaped(rows, (1, 1, self._tokens, size))
            held, places = self.take(gathered, "gather", "x", "indices", axis=0, batch_dims=0)
            self.alike(self.place(places), "positions", "the rows of a rope table")
            self.trail.array(self._tables[name].item, self.value(held), self._tables[name].values().astype(self._dtype))
        return x

    def place(self, node: str) -> str:
        """A row's number: as it is, or from behind where it is negative."""
        node = self.uncast(node)
        if self.kind(node) != "select":
            return node
        condition, plain, _ = self.take(node, "select", "cond", "a", "b")
        asked = self.take(condition, "greater_equal", "x", y=0)[0]
        self.alike(self.uncast(asked), self.uncast(plain), "what is asked of a row's number")
        return self.uncast(plain)

    def norm(self, node: str, name: str, size: int, heads: int | None = None) -> str:
        """The input of a norm of `size` numbers: layer_norm of [x, -x], cut in half; heads are rows of their own."""
        if heads is not None and self.kind(self.uncast(node)) == "reshape":  # Core ML makes one of two
            node = self.reshaped(node, (1, self._tokens, heads * size))
        whole = self.cut(node, 0, size)
        both, weight, epsilon = self.take(whole, "layer_norm", "x", "gamma", "epsilon", axes=[-1])
        if "beta" in self._made[whole].inputs:
            raise OtherProgramError(f"{name} adds something")
        x, negative = self.several(both, -1)
        self.alike(self.take(negative, "mul", "x", y=-1)[0], x, f"the second half of {name}")
        wanted = np.tile(self._quantized.vector(name).numpy().astype(self._dtype), 2)
        self.trail.array(f"{name}.weight", self.value(weight), wanted)
        self.trail.array(
            items.eps(f"{name}.weight"), self.value(epsilon), np.array(self._config.rms_norm_eps, self._dtype)
        )
        return x if heads is None else self.reshaped(x, (1, self._tokens * heads, size))

    def linear(self, node: str, name: str, biased: bool = False) -> str:
        """The input of a linear; a bias may stand in it, or be added behind."""
        found: np.ndarray | None = None
        if biased and self.kind(self.uncast(node)) == "add":
            node, bias = self.take(node, "add", "x", "y")
            found = self.value(bias)
        x, weight = self.take(node, "linear", "x", "weight")
        inner = self._made[self.uncast(node)].inputs.get("bias")
        held = None if inner is None else self.value(inner.arguments[0].name)
        if held is not None and (np.any(held) or found is None):
            if found is not None:
                raise OtherProgramError(f"two biases of {name}")
            found = held
        if biased:
            self.trail.array(f"{name}.bias", found, self._quantized.vector(f"{name}.bias").numpy().astype(self._dtype))
        elif found is not None and np.any(found):
            raise OtherProgramError(f"{name} has a bias")
        self.trail.see(name, self._weight(weight, name))
        return x

    def _weight(self, node: str, name: str) -> str:
        """Codes and zero points less their middle."""
        from export.coreml.package import value_type

        values = self._constants.get(node, {})
        if "data" not in values:
            return "is not quantized"
        data, scales = (self._package.value(values[part]) for part in ("data", "scale"))
        zeros = self._package.value(values["offset"]) if "offset" in values else np.zeros(scales.shape, np.int8)
        bits = value_type(values["data"].type).bits
        if data.dtype != np.int8 or zeros.dtype != np.int8:
            return f"codes are {data.dtype}, zero points {zeros.dtype}"
        shifted = [(part.view(np.uint8) + np.uint8(2 ** (bits - 1))) for part in (data, zeros)]
        return ", ".join(faults(self._quantized.linear(name), HeldWeight(shifted[0], scales, shifted[1], bits)))

    # operations

    def take(self, node: str, kind: str, *names: str, **numbers: object) -> tuple[str, ...]:
        """The inputs `names` of the operation that makes a value; its parameters must be `numbers`."""
        op = self._made.get(self.uncast(node))
        if op is None or op.type != kind:
            raise OtherProgramError(f"{op.type if op else node} instead of {kind} makes {node}")
        for name, wanted in numbers.items():
            found = self.value(op.inputs[name].arguments[0].name) if name in op.inputs else None
            if found is None or np.asarray(found).tolist() != wanted:
                raise OtherProgramError(f"{name} of {node} is {found} instead of {wanted}")
        if any(name not in op.inputs or len(op.inputs[name].arguments) != 1 for name in names):
            raise OtherProgramError(f"{node} has the inputs {', '.join(op.inputs)}")
        return tuple(op.inputs[name].arguments[0].name for name in names)

    def several(self, node: str, axis: int) -> tuple[str, str]:
        """The two values that are put one behind the other."""
        op = self._made.get(self.uncast(node))
        if op is None or op.type != "concat" or len(op.inputs["values"].arguments) != 2:
            raise OtherProgramError(f"{op.type if op else node} instead of the concat of two makes {node}")
        found, interleaved = (self.value(op.inputs[name].arguments[0].name) for name in ("axis", "interleave"))
        if found not in (axis, -1 if axis == 3 else axis) or interleaved:
            raise OtherProgramError(f"{node} lies along axis {found}")
        first, second = (argument.name for argument in op.inputs["values"].arguments)
        return first, second

    def cut(self, node: str, start: int, stop: int) -> str:
        """What is cut along its last axis, and along no other."""
        x, begin = self.take(node, "slice_by_index", "x", "begin")
        whole, part = self.shape(x), self.shape(node)
        first = self.value(begin)
        if first[-1] != start or part != (*whole[:-1], stop - start) or {*self._made[node].inputs} & {"stride"}:
            raise OtherProgramError(f"{node} is cut from {first.tolist()}, {part} of {whole}")
        return x

    def reshaped(self, node: str, shape: Shape) -> str:
        if self.shape(self.uncast(node)) != shape:
            raise OtherProgramError(f"{node} is {self.shape(node)} instead of {shape}")
        return self.take(node, "reshape", "x")[0]

    def transposed(self, node: str, order: Shape) -> str:
        x, found = self.take(node, "transpose", "x", "perm")
        rank = len(order)
        if tuple(int(axis) % rank for axis in self.value(found)) != order:
            raise OtherProgramError(f"{node} has the axes {self.value(found).tolist()} instead of {list(order)}")
        return x

    def uncast(self, node: str) -> str:
        """Before changes of type alone."""
        while self.kind(node) == "cast":
            node = self._made[node].inputs["x"].arguments[0].name
        return node

    def kind(self, node: str) -> str:
        return self._made[node].type if node in self._made else ""

    def shape(self, node: str) -> tuple[int | None, ...]:
        from export.coreml.package import value_type

        named = next((i for i in self._package.functions[self._method.function].inputs if i.name == node), None)
        return tuple(value_type((named or self._made[node].outputs[0]).type).shape or ())

    def value(self, node: str) -> Any:
        """A constant."""
        if "val" not in self._constants.get(node, {}):
            raise OtherProgramError(f"{node} is computed, and should be a constant")
        return self._package.value(self._constants[node]["val"])

    def alike(self, found: str, wanted: str, what: str) -> None:
        if found != wanted:
            raise OtherProgramError(f"{what} is {found} instead of {wanted}")
