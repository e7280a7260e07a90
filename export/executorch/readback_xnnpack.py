"""ExecuTorch programs for XNNPACK, read back: `forward` is followed from the logits to the tokens.

What is in a delegate has no names; where a constant is used says what it must be. Formulas of the program:

    norm(x)  x * rsqrt(x**2 @ share + eps) * weight, share 1/n        rope(x)  x * cos + (x @ turn) * sin
    block    m = x + o(attend(rope(q n), rope(k n), v n)), n = norm(x);  m + down(silu(gate l) * up l), l = norm(m)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from bluelm.block import Add, Attend, Linear, Norm, Product, Silu, Step, block_of
from bluelm.errors import ExportError
from bluelm.rope import rope_table
from compress.checkpoint.store import EMBED, HEAD, QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.onnx.reader import HeldWeight
from export.readback import items
from export.readback.backwards import stream_before
from export.readback.held import faults
from export.readback.trail import OtherProgramError, Trail
from export.tokenizer import readback_llm_runner as readback_tokenizer

if TYPE_CHECKING:
    from executorch.exir._serialize._program import PTEFile

    from export.executorch.graph import Node

CASTS = ("dim_order_ops::_to_dim_order_copy.out", "aten::_to_copy.out", "aten::to.dtype_out")
RANGES = "quantized_decomposed::choose_qparams_per_token_asymmetric.out"
FLOATS = ("xnn_datatype_fp32", "xnn_datatype_fp16")
CACHES = {"float32": 6, "float16": 5, "int8": 1}  # ExecuTorch's ScalarType


def findings(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[items.Finding]:
    """Of the whole program."""
    from export.executorch.reader import read_program

    file = read_program(artifact.path("model"), quantized.config.num_layers)
    tells = [*_tell_faults(file, artifact, quantized), *readback_tokenizer.faults(artifact, quantized)]
    yield from items.checked(items.TELLS, tells)
    walk = Walk(artifact, quantized)
    try:
        walk.program(file)
        walk.trail.see(items.GRAPH)
    except OtherProgramError as other:
        walk.trail.see(items.GRAPH, str(other))
    except (ExportError, ValueError, TypeError, LookupError, AttributeError) as error:
        walk.trail.see(items.GRAPH, f"it cannot be followed: {error}")
    yield from walk.trail.findings(artifact, quantized)


def _tell_faults(file: PTEFile, artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """What ExecuTorch's runners ask a program: methods without inputs, all of them and no others."""
    from export.executorch.reader import constants

    config, context = quantized.config, artifact.context
    bos = -1 if config.bos_token_id is None else config.bos_token_id
    wanted: dict[str, list[Any]] = {
        "get_vocab_size": [config.vocab_size],
        "get_max_seq_len": [artifact.chunk],
        "get_max_context_len": [context],
        "get_bos_id": [bos],
        "get_eos_ids": list(config.eos_token_ids),
        "get_n_layers": [config.num_layers],
        "use_kv_cache": [True],
        "use_sdpa_with_kv_cache": [True],
        "enable_dynamic_shape": [True],
    }
    found = constants(file)
    for name in wanted.keys() | found.keys():
        mine, theirs = found.get(name, "nothing"), wanted.get(name, "nothing")
        if repr(mine) != repr(theirs):  # true is not 1
            yield f"{name} answers {mine} instead of {theirs}"


class Walk:
    """One pass over the graph of `forward`, from the logits backwards."""

    def __init__(self, artifact: Artifact, quantized: QuantizedCheckpoint) -> None:
        self.trail = Trail()
        self._artifact, self._quantized, self._config = artifact, quantized, quantized.config
        self._tables = rope_table(quantized.config, artifact.context)  # cosines, sines
        self._seen: set[tuple[str, int]] = set()

    def program(self, file: PTEFile) -> None:
        """All of it."""
        from export.executorch.graph import forward

        outputs = forward(file)
        if len(outputs) != 1:
            raise OtherProgramError(f"forward gives {len(outputs)} outputs instead of 1")
        x = self.norm(self.linear(outputs[0], HEAD), "model.norm", self._config.hidden_size)
        for layer in reversed(range(self._config.num_layers)):
            x = self.block(x, layer)
        self.embedding(x)

    def block(self, node: Any, layer: int) -> Node:
        """The stream before a block, from that behind it."""
        return stream_before(
            block_of(self._config), node, lambda step, made: self.inputs(step, made, layer), self.alike
        )

    def inputs(self, step: Step, node: Any, layer: int) -> tuple[Node, ...]:
        """What a step that makes `node` is made of."""
        at = f"model.layers.{layer}"
        match step:
            case Norm():
                return (self.norm(node, f"{at}.{step.weight}", step.size),)
            case Linear():
                heads = block_of(self._config).heads.get(step.makes)
                node = node if heads is None else self.reshaped(node, [1, 0, heads, step.rows // heads])
                return (self.linear(node, f"{at}.{step.weight}", step.biased),)
            case Attend():
                return self.attention(self.reshaped(node, [1, 0, step.heads * step.size]), layer)
            case Silu():
                gate, sigmoid = self.take(node, "XNNMultiply", 2)
                self.alike(self.take(sigmoid, "XNNSigmoid", 1)[0], gate, "silu")
                return (gate,)
            case Product():
                return self.take(node, "XNNMultiply", 2)
            case Add():
                return self.take(node, "XNNAdd", 2)

    def attention(self, node: Any, layer: int) -> tuple[Node, Node, Node]:
        """Queries, keys and values [1, T, heads, head_dim], before rope."""
        node = self.uncast(node)
        int8 = self._artifact.cache == "int8"
        name, count = ("llama::custom_quantized_sdpa.out", 15) if int8 else ("llama::custom_sdpa.out", 8)
        query, keys, values, start, mask, dropout, causal, factor, *codes = self.take(node, name, count)
        if mask is not None or dropout != 0.0 or causal is not True or any(codes[6:]):
            raise OtherProgramError(f"attention of layer {layer} has mask {mask}, dropout {dropout}, causal {causal}")
        self.trail.see(items.attention_scale(layer), "" if factor is None else f"{factor} instead of head_dim**-0.5")
        self.position(start)
        parts = [query, *(self.written(cache, start, self._artifact.cache) for cache in (keys, values))]
        if int8:
            kinds = ["int8", "float32"] * 2  # zero points, scales
            kept = [self.written(cache, start, kind) for cache, kind in zip(codes[2:6], kinds, strict=True)]
            ranges = [codes[:2], kept[:2], kept[2:]]
            parts = [self.rounded(part, *told) for part, told in zip(parts, ranges, strict=True)]
            self.trail.see(items.ENCODINGS)  # of each token, when it comes
        query, keys, values = map(self.uncast, parts)
        return self.rotated(query), self.rotated(keys), values

    def rounded(self, codes: Any, zeros: Any, scales: Any) -> Node:
        """What was rounded to int8 codes, a scale and a zero point a token."""
        x, scale, zero, *bounds = self.take(codes, "quantized_decomposed::quantize_per_token.out", 6)
        for found, made in ((scales, scale), (zeros, zero)):
            self.alike(self.uncast(found), made, "a token's range")
            if not self._is(made, RANGES) or made.inputs[0] is not x:
                raise OtherProgramError("a token's range is that of another value")
        if (bounds, scale.extra["result"], zero.extra["result"]) != ([-128, 127, 1], 0, 1):
            raise OtherProgramError(f"a token is rounded to {bounds}")
        return x

    def written(self, cache: Any, start: Any, kind: str) -> Node:
        """What a cache holds last: update_cache(value, cache, start)."""
        value, held, place = self.take(cache, "llama::update_cache.out", 3)
        self.alike(place, start, "the slot of keys and values")
        if not self._is(held, "cache"):
            raise OtherProgramError("keys and values are written twice")
        sizes, found = held.extra["sizes"], held.extra["type"]
        self.trail.see(items.CONTEXT, "" if sizes[1] == self._artifact.context else f"{sizes[1]} slots in a cache")
        self.trail.see(items.CACHE, "" if found == CACHES[kind] else f"type {found} instead of {CACHES[kind]}")
        return value

    def rotated(self, node: Any) -> Node:
        straight, turned = self.take(node, "XNNAdd", 2)
        (x, cos), (swapped, sin) = (self.take(part, "XNNMultiply", 2) for part in (straight, turned))
        again, turn, bias = self.take(swapped, "XNNFullyConnected", 3)
        self.alike(again, x, "rope")
        self.alike(bias, None, "rope's bias")
        half = np.eye(self._config.head_dim // 2, dtype=np.float32)
        zero = np.zeros_like(half)
        if not np.array_equal(self.constant(turn), np.block([[zero, -half], [half, zero]])):  # (a, b) -> (-b, a)
            raise OtherProgramError("rope turns otherwise than halves")
        for place, rows in enumerate((cos, sin)):
            table = self.rows(rows)
            if (f"rope {place}", id(table)) not in self._seen:
                self._seen.add((f"rope {place}", id(table)))
                wanted = self._tables[place].numpy()
                self.trail.array(items.ROPE, self.constant(table), wanted[:, None])
        return x

    def rows(self, node: Any) -> Node:
        """The table of which a step's rows are taken, from `start` on, as many as tokens."""
        table, axis, start, stop, stride = self.take(node, "aten::slice_copy.Tensor_out", 5)
        first, count = self.take(stop, "executorch_prim::add.Scalar", 2)
        self.position(start)
        self.alike(first, start, "the last row of a step")
        counted = getattr(count, "inputs", ()) if self._is(count, "aten::sym_size.int") else ()
        free = len(counted) == 2 and self._is(counted[0], "input", 0) and counted[1] == 1
        if (axis, stride) != (0, 1) or not (free or (self._artifact.chunk == 1 and count == 1)):
            raise OtherProgramError("a step takes other rows of a table than those of its tokens")
        return table

    def position(self, node: Any) -> None:
        """input_pos[0]."""
        (picked,) = self.take(node, "aten::_local_scalar_dense", 1)
        place, axis, index = self.take(picked, "aten::select_copy.int_out", 3)
        if (axis, index) != (0, 0) or not self._is(place, "input", 1):
            raise OtherProgramError("a step's position is not input_pos")

    def linear(self, node: Any, name: str, biased: bool = False) -> Node:
        """The input of a linear before it is rounded to 8 bits a token."""
        x, weight, bias = self.take(node, "XNNFullyConnected", 3)
        if not self._is(weight, "weight") or weight.weight is None:
            self.trail.see(name, "is not quantized")
        else:
            self.trail.weight(name, weight.weight(), self._quantized.linear(name))
        if biased:
            self.vector(f"{name}.bias", bias)
        else:
            self.alike(bias, None, f"the bias of {name}")
        if not self._is(x, "XNNConvert") or x.extra["to"] != "xnn_datatype_qdint8":
            raise OtherProgramError(f"the input of {name} is not rounded to 8 bits a token")
        return self.take(x, "XNNConvert", 1)[0]

    def norm(self, node: Any, name: str, size: int) -> Node:
        unit, weight = self.take(node, "XNNMultiply", 2)
        x, spread = self.take(unit, "XNNMultiply", 2)
        squares, share, epsilon = self.take(self.take(spread, "XNNReciprocalSquareRoot", 1)[0], "XNNFullyConnected", 3)
        for part in self.take(squares, "XNNMultiply", 2):
            self.alike(part, x, f"the squares of {name}")
        self.vector(f"{name}.weight", weight)
        self.trail.array(
            items.eps(f"{name}.weight"), self.constant(epsilon), np.array([self._config.rms_norm_eps], np.float32)
        )
        if not np.array_equal(self.constant(share), np.full((1, size), 1 / size, np.float32)):
            raise OtherProgramError(f"{name} takes another mean")
        return x

    def embedding(self, node: Any) -> None:
        name = "quantized_decomposed::embedding_byte.dtype_out"
        codes, scales, zeros, least, most, tokens, kind = self.take(node, name, 7)
        if (least, most, kind) != (-128, 127, 6) or not self._is(tokens, "input", 0):
            raise OtherProgramError("the embedding is not that of the tokens in float32")
        wanted = self._quantized.embed()
        half = 2 ** (wanted.bits - 1)
        shifted = [self.constant(part).astype(np.float32) + half for part in (codes, zeros)]
        held = HeldWeight(shifted[0].astype(np.uint8), self.constant(scales), shifted[1], wanted.bits)
        self.trail.see(EMBED, ", ".join(faults(wanted, held)))
        self.trail.see(items.MASK)  # a step sees the slots up to its own: `causal` above

    def vector(self, name: str, node: Any) -> None:
        self.trail.array(name, self.constant(node), self._quantized.vector(name).numpy())

    def constant(self, node: Any) -> np.ndarray:
        if not self._is(node, "constant") or node.array is None:
            raise OtherProgramError("something computed stands in a constant's place")
        return node.array()

    def reshaped(self, node: Any, shape: list[int]) -> Node:
        (x,) = self.take(self.uncast(node), "XNNStaticReshape", 1)
        found = self.uncast(node).extra["new_shape"]
        if list(found) not in (shape, [1, 1, *shape[2:]] if self._artifact.chunk == 1 else shape):
            raise OtherProgramError(f"a shape {found} instead of {shape}")
        return x

    def uncast(self, node: Any) -> Any:
        """Before changes of type alone, which a cache that is not float32 needs."""
        while self._artifact.cache != "float32" and hasattr(node, "op"):
            if node.op not in CASTS and not (node.op == "XNNConvert" and node.extra["to"] in FLOATS):
                break
            node = node.inputs[0]
        return node

    def take(self, node: Any, op: str, count: int) -> tuple[Any, ...]:
        """The inputs of a node that must be an `op` with `count` of them, and nothing else."""
        if not self._is(node, op):
            raise OtherProgramError(f"{getattr(node, 'op', node)} instead of {op}")
        if len(node.inputs) != count or node.extra.get("flags") or node.extra.get("range") or node.extra.get("result"):
            raise OtherProgramError(f"{op} of {len(node.inputs)} inputs, {dict(node.extra)}")
        return node.inputs

    def alike(self, found: Any, wanted: Any, what: str) -> None:
        if found is not wanted:
            raise OtherProgramError(f"{what} is another value")

    @staticmethod
    def _is(node: Any, op: str, place: int | None = None) -> bool:
        return getattr(node, "op", None) == op and (place is None or node.inputs == (place,))
