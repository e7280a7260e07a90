"""The functions of a Core ML program: a part of the decoder for a chunk of tokens, and for one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bluelm.block import block_of
from bluelm.config import ModelConfig
from export.coreml.importing import import_coremltools
from export.coreml.ops import MASKED, Constants, MilOps, Quantized, Slots, fresh_names, identifier
from export.lowering.decoder import KeysValues, block, head, rotary_factors
from export.lowering.parts import Part

PREFILL, DECODE = "prefill", "decode"
TOKENS, HIDDEN, POSITION = "tokens", "hidden", "position"  # inputs
LOGITS, HIDDEN_OUT = "logits", "hidden_out"  # outputs
EMBEDDED = "embedded"  # in a debug build, with `block_output`


@dataclass(frozen=True)
class ProgramSizes:
    """Sizes that are fixed in a program.

    Attributes:
        context: slots of the cache.
        chunk: tokens a call of `prefill`.
        debug: every block's output is an output of the function too.
    """

    context: int
    chunk: int
    debug: bool = False


def block_output(layer: int) -> str:
    """Name of a block's output in a debug build."""
    return identifier(f"layers.{layer}.output")


def part_bytes(weights: Constants, config: ModelConfig) -> tuple[int, list[int], int]:
    """Stored bytes of the embedding, of each block, and of the head."""
    linears = [
        sum(weights.layout(f"model.layers.{i}.{name}").nbytes for name in block_of(config).linears)
        for i in range(config.num_layers)
    ]
    return weights.layout("embed").nbytes, linears, weights.layout("lm_head").nbytes


def build(weights: Constants, part: Part, shape: ProgramSizes) -> Any:
    """A MIL program with the functions `prefill` and `decode`, states shared by name.

    Inputs: tokens int32 [1, T] or hidden [1, T, hidden]; position int32 [1], slot of the first token.
    Outputs: logits [1, T, vocab] or hidden [1, T, hidden], in the activations' type.
    States: layers_N_keys [1, kv_heads, head_dim, context], layers_N_values [1, kv_heads, context, head_dim],
    float16.
    """
    import_coremltools()
    from coremltools.converters.mil.mil import Program

    program: Any = Program()
    for name, tokens in ((PREFILL, shape.chunk), (DECODE, 1)):
        with fresh_names():
            program.add_function(name, _function(weights, part, shape, tokens))
    program.default_function_name = DECODE
    program.export_as_multifunction = True
    program.skip_all_passes = True
    return program


def _function(weights: Constants, part: Part, shape: ProgramSizes, tokens: int) -> Any:
    from coremltools import target
    from coremltools.converters.mil.mil import Builder, Function, types

    mb: Any = Builder
    config = weights.quantized.config
    wide = types.fp16 if weights.activations == "float16" else types.fp32
    inputs: dict[str, Any] = {
        POSITION: mb.TensorSpec((1,), types.int32),
        **{n: mb.state_tensor_placeholder(s, types.fp16) for n, s in states(weights.quantized, part, shape)},
    }
    if part.embeds:
        inputs[TOKENS] = mb.TensorSpec((1, tokens), types.int32)
    else:
        inputs[HIDDEN] = mb.TensorSpec((1, tokens, config.hidden_size), wide)
    with Function(inputs, target.iOS18) as function:
        found: Any = function.inputs
        ops = MilOps(weights, config.rms_norm_eps, found[POSITION], tokens)
        x = ops.rows("embed", found[TOKENS], EMBEDDED) if part.embeds else found[HIDDEN]
        outputs = _body(ops, weights.quantized, part, shape, x, found)
        function.set_outputs(outputs)
    return function


def _body(ops: MilOps, quantized: Quantized, part: Part, shape: ProgramSizes, x: Any, inputs: Any) -> list[Any]:
    """Blocks and head of a part; returns the function's outputs, the last one first."""
    config, tokens = quantized.config, x.shape[1]
    positions = ops._mb.add(x=inputs[POSITION], y=np.arange(tokens, dtype=np.int32).reshape(tokens), name="positions")
    mask: Any = causal_mask(ops, positions, shape.context) if part.layers else None
    rotary: Any = rotary_factors(ops, config, positions, shape.context) if part.layers else None
    seen = [x] if part.embeds else []
    kept = {name: Slots(inputs[name], s) for name, s in states(quantized, part, shape)}
    for layer in part.layers:
        past = KeysValues(kept[state_name(layer, "keys")], kept[state_name(layer, "values")])
        x, _ = block(ops, config, layer, x, rotary, mask, past)
        seen.append(x)
    last = head(ops, x) if part.heads else ops._mb.identity(x=x, name=HIDDEN_OUT)
    return [last, *seen] if shape.debug else [last]


def causal_mask(ops: MilOps, positions: Any, context: int) -> Any:
    """Additive [1, 1, T, context]: a token at `positions[t]` sees the slots up to its own."""
    mb = ops._mb
    slots = np.arange(context, dtype=np.int32).reshape(1, 1, 1, context)
    rows = mb.reshape(x=positions, shape=[1, 1, positions.shape[0], 1], name="mask_rows")
    seen = mb.less_equal(x=slots, y=rows, name="mask_seen")  # [1, 1, T, context]
    return mb.select(cond=seen, a=ops.dtype(0), b=ops.dtype(MASKED), name="mask")


def state_name(layer: int, kind: str) -> str:
    """Name of a state: `layers_0_keys`."""
    return identifier(f"layers.{layer}.{kind}")


def states(quantized: Quantized, part: Part, shape: ProgramSizes) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a part's states."""
    config = quantized.config
    kv_heads, size = config.num_kv_heads, config.head_dim
    found: list[tuple[str, tuple[int, ...]]] = []
    for layer in part.layers:
        found.append((state_name(layer, "keys"), (1, kv_heads, size, shape.context)))
        found.append((state_name(layer, "values"), (1, kv_heads, shape.context, size)))
    return found
