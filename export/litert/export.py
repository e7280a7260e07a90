"""LiteRT: one .tflite with the signatures `prefill` (a chunk of tokens) and `decode` (one token).

Inputs and outputs are those of the ONNX graphs (`export/onnx/decoder.py`), so one host drives both:
embedded tokens, positions, mask and past keys and values in; logits and the step's own keys and values out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from bluelm.errors import TargetError
from bluelm.system.files import atomic_folder
from bluelm.system.progress import Progress, Silent
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.embedding import write_embedding
from export.artifacts.mobile import KvBits, complete
from export.litert.file import LitertModel, Type
from export.litert.ops import LitertOps, Symbol
from export.lowering.decoder import KeysValues, decoder
from export.lowering.encoding import Encoding
from export.lowering.ranges import Ranges, int8_cache

MODEL = "model.tflite"
EMBEDDING, RANGES = "embedding.safetensors", "ranges.json"
MASK_VALUE = -10000.0
CACHE_TYPES = {32: Type.FLOAT32, 16: Type.FLOAT16, 8: Type.INT8}


def export(
    quantized: QuantizedCheckpoint,
    folder: Path,
    *,
    context: int = 512,
    chunk: int = 128,
    kv_bits: KvBits = 32,
    ranges: Ranges | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write the artifact `folder`: model.tflite, the embedding rows and the tokenizer's files.

    Args:
        context: tokens that the host's cache holds.
        chunk: tokens that the prefill signature takes.
        kv_bits: width of the cache's numbers; 8 bits take their scales from `ranges`.

    Raises:
        TargetError: LiteRT has no kernel for a weight (says which).
        InputError: 8 bits without ranges, or with another checkpoint's.
    """
    with atomic_folder(folder) as temporary:
        write(
            quantized,
            temporary / MODEL,
            context=context,
            chunk=chunk,
            kv_bits=kv_bits,
            ranges=ranges,
            progress=progress,
        )
        write_embedding(temporary / EMBEDDING, quantized.embed())
        roles = {MODEL: "model", EMBEDDING: "embedding"}
        if kv_bits == 8 and ranges is not None:
            ranges.save(temporary / RANGES)  # what the scales of the cache are held against
            roles[RANGES] = "ranges"
        complete(
            temporary,
            "litert",
            quantized,
            roles,
            context=context,
            chunk=chunk,
            kv_bits=kv_bits,
            mask_value=MASK_VALUE,
            producers={"ai-edge-litert": version("ai-edge-litert")},
        )
    return Artifact.open(folder)


def write(
    quantized: QuantizedCheckpoint,
    path: Path,
    *,
    context: int,
    chunk: int,
    kv_bits: KvBits,
    ranges: Ranges | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the file `path`; both signatures share every weight."""
    encoding = int8_cache(ranges, quantized) if kv_bits == 8 else None
    model = LitertModel("bluelm-export")
    with (progress or Silent()).task("lower to LiteRT", 2) as task:
        for name in lower(model, quantized, context, chunk, kv_bits, encoding):
            task.advance(note=name)
        model.save(path)


def lower(
    model: LitertModel,
    quantized: QuantizedCheckpoint,
    context: int,
    chunk: int,
    kv_bits: KvBits,
    encoding: Callable[[str], Encoding] | None,
) -> Iterator[str]:
    """Put both signatures into `model`; gives the name of each before it is made.

    Args:
        encoding: of the cached keys and values of an 8-bit cache, by their names.
    """

    def linear(name: str) -> QuantizedTensor:
        weight = quantized.linear(name)
        check_weight(weight, name)
        return weight

    for name, tokens in (("prefill", chunk), ("decode", 1)):
        yield name
        graph = model.subgraph(name)
        epsilon = quantized.config.rms_norm_eps
        ops = LitertOps(graph, linear, quantized.vector, epsilon, CACHE_TYPES[kv_bits], encoding)
        inputs, outputs = _emit(ops, quantized, tokens, context)
        model.signature(name, graph, inputs, outputs)


def check_weight(weight: QuantizedTensor, name: str) -> None:
    """TargetError unless LiteRT holds this weight exactly: symmetric, 4 bits in groups of a multiple
    of 32 or one scale a row, 8 bits with one scale a row."""
    if not weight.symmetric:
        raise TargetError("LiteRT has no zero points for weights", where=name, fix="use a symmetric recipe")
    if weight.groups == 1:
        return
    if weight.bits == 8:
        fix = "use one scale a row (group size -1) for 8 bits"
        raise TargetError("LiteRT has no groups for 8-bit weights", where=name, fix=fix)
    if not bool((weight.scales.bfloat16() == weight.scales).all()):
        fix = "quantize with bluelm-export, whose scales are exact in float16 and bfloat16"
        raise TargetError("XNNPACK computes with bfloat16 scales, and these have more digits", where=name, fix=fix)


def _emit(
    ops: LitertOps, quantized: QuantizedCheckpoint, tokens: int, context: int
) -> tuple[dict[str, int], dict[str, int]]:
    """The graph of `tokens` tokens; its inputs and outputs by name."""
    config = quantized.config
    heads, size, slots = config.num_kv_heads, config.head_dim, context - tokens
    border = {
        "hidden": ops.input("hidden", (1, tokens, config.hidden_size)),
        "positions": ops.input("positions", (tokens,), Type.INT32),
        "mask": ops.input("mask", (1, 1, tokens, context)),
    }
    past: list[KeysValues[Symbol] | None] = []
    for layer in range(config.num_layers):
        if slots == 0:
            past.append(None)
            continue
        pair: list[Symbol] = []
        for kind, shape in (("keys", (1, heads, size, slots)), ("values", (1, heads, slots, size))):
            name = f"past_{kind}.{layer}"
            border[name] = ops.cache_input(name, shape, f"layers.{layer}.{kind}")
            pair.append(ops.read_cache(border[name], f"{name}.float32"))
        past.append(KeysValues(*pair))
    logits, new = decoder(ops, config, border["hidden"], border["positions"], border["mask"], past, context)
    outputs = {"logits": logits.index}
    for layer, keys_values in enumerate(new):
        for kind, made in (("keys", keys_values.keys), ("values", keys_values.values)):
            outputs[f"{kind}.{layer}"] = ops.write_cache(made, f"{kind}.{layer}", f"layers.{layer}.{kind}").index
    return {name: symbol.index for name, symbol in border.items()}, outputs
