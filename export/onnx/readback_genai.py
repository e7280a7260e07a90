"""onnx-genai, read back: the one graph, its embedding rows, and genai_config.json field by field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np

from bluelm.block import block_of
from bluelm.config import ModelConfig
from bluelm.errors import ExportError, InputError
from bluelm.rope import rope_table
from bluelm.system.reading import read_json
from compress.checkpoint.store import EMBED, QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.mobile import CACHES, KvBits
from export.artifacts.packing import unpack
from export.lowering.ranges import Ranges
from export.onnx import genai as onnx_genai
from export.onnx.cpu import CacheCodec
from export.onnx.decoder import IR_VERSION, OPSETS, WEIGHTS
from export.onnx.graph import NoFile
from export.onnx.readback import TYPES, accuracy_level, attributes, told
from export.onnx.readback_constants import HEADROOM_8_BITS, around
from export.onnx.readback_structure import structure_faults
from export.onnx.reader import HeldWeight, OnnxFile, kind
from export.readback import held, items
from export.tokenizer import readback as readback_tokenizer

PACKED = ("q_proj", "k_proj", "v_proj")  # rows of one matrix, in this order


def findings(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[items.Finding]:
    """What is right and wrong in it."""
    file = OnnxFile(artifact.path("model"))
    ranges = Ranges.load(artifact.path("ranges")) if artifact.paths("ranges") else None
    for name in items.linear_names(quantized):
        yield from items.checked(name, _weight_faults(file, quantized, name))
    yield from items.checked(EMBED, _row_faults(file, quantized))
    yield from _numbers(artifact, quantized, file, ranges)
    yield from _attributes(quantized, file)
    yield from _caches(artifact, file)
    yield from _graph(artifact, quantized, file, ranges)
    yield from items.right(items.MASK)  # attention makes its own
    yield from items.checked(
        items.TELLS, [*_config_faults(artifact, quantized.config), *readback_tokenizer.faults(artifact, quantized)]
    )


def _weight_faults(file: OnnxFile, quantized: QuantizedCheckpoint, name: str) -> Iterator[str]:
    """Weights of q, k and v may be one matrix, their rows below one another."""
    wanted, place = quantized.ordered(name).weight, name.rpartition(".")[0]
    try:
        if name in file:
            found = file.weight(name)
        elif f"{place}.qkv" in file and name.removeprefix(f"{place}.") in PACKED:
            heights = [quantized.linears[f"{place}.{part}"].shape[0] for part in PACKED]
            at = PACKED.index(name.removeprefix(f"{place}."))
            rows = slice(sum(heights[:at]), sum(heights[: at + 1]))
            whole = file.weight(f"{place}.qkv")
            zeros = None if whole.zeros is None else whole.zeros[rows]
            found = HeldWeight(whole.codes[rows], whole.scales[rows], zeros, whole.bits, whole.spare)
        else:
            yield "is not in the graph"
            return
    except InputError as error:
        yield str(error)
        return
    yield from held.faults(wanted, found)


def _row_faults(file: OnnxFile, quantized: QuantizedCheckpoint) -> Iterator[str]:
    table = quantized.embed()
    try:
        codes = unpack(file.array("embed.codes"), table.bits, table.shape[1])  # uint8 [rows, hidden]
        yield from held.faults(table, HeldWeight(codes, file.array("embed.scales"), None, table.bits))
    except (InputError, KeyError) as error:
        yield str(error)


def _numbers(
    artifact: Artifact, quantized: QuantizedCheckpoint, file: OnnxFile, ranges: Ranges | None
) -> Iterator[items.Finding]:
    """Every constant that is no code or scale of a weight; one that nothing explains is wrong."""
    wanted = _constants(artifact, quantized, file)
    weights = {f"{name}.{part}" for name in (*file.weights, "embed") for part in ("codes", "scales", "zeros")}
    layers = range(quantized.config.num_layers if artifact.cache == "int8" else 0)
    cached = {f"layers.{layer}.{kind}.scale" for layer in layers for kind in ("keys", "values")}
    wrong: dict[str, list[str]] = {item: [] for held_by, _ in wanted.values() for item in held_by}
    for name in file.tensors.keys() - weights - cached:
        if name not in wanted:
            yield items.Finding(items.GRAPH, "wrong", f"{name} belongs to nothing of the model")
    for name, (held_by, values) in wanted.items():
        fault = _number_fault(file, name, values)
        for item in held_by if fault else ():
            wrong[item].append(fault)
    for item, faults in wrong.items():
        yield from items.checked(item, faults)
    if artifact.cache == "int8":
        if ranges is None:
            yield from items.untold("the ranges that they were made of do not lie beside the graph", items.ENCODINGS)
        else:
            yield from items.checked(items.ENCODINGS, _cache_faults(file, quantized, ranges, cached))


def _number_fault(file: OnnxFile, name: str, wanted: np.ndarray) -> str:
    if name not in file.tensors:
        return f"{name} is missing"
    try:
        found = file.array(name)
    except InputError as error:
        return str(error)
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return f"{name} is {found.dtype} {list(found.shape)} instead of {wanted.dtype} {list(wanted.shape)}"
    return "" if found.tobytes() == wanted.tobytes() else f"{name} has other numbers"


def _constants(
    artifact: Artifact, quantized: QuantizedCheckpoint, file: OnnxFile
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """By name: the items that a constant holds, and its numbers. Vectors are small: hidden floats a norm."""
    kind = np.float16 if artifact.cache == "float16" else np.float32
    half = quantized.config.head_dim // 2
    cos, sin = (table.numpy()[:, :half].astype(kind) for table in rope_table(quantized.config, artifact.context))
    found = {
        "rope.cos": ((items.ROPE,), cos),
        "rope.sin": ((items.ROPE,), sin),
        "one": ((items.GRAPH,), np.array([1], np.int64)),
    }
    vectors = {name: quantized.vector(name).numpy() for name in items.vector_names(quantized)}
    for name, vector in vectors.items():
        place, _, part = name.removesuffix(".bias").rpartition(".")  # of a bias: model.layers.0.self_attn, q_proj
        if name.endswith(".bias") and part in PACKED and f"{place}.qkv" in file:
            names = tuple(f"{place}.{part}.bias" for part in PACKED)
            found[f"{place}.qkv.bias"] = (names, np.concatenate([vectors[one] for one in names]))
        else:
            found[name.removesuffix(".weight")] = ((name,), vector)
    for norm in block_of(quantized.config).norms.values():
        heads = block_of(quantized.config).heads.get(norm.makes)
        for size in () if heads is None else (norm.size, heads * norm.size):  # heads are cut apart, and joined again
            found[f"rows.{size}"] = ((items.GRAPH,), np.array([0, -1, size], np.int64))
    for name in quantized.linears:
        order = quantized.ordered(name).order if quantized.linears[name].ordered else None
        if order is not None:
            found[f"{name}.order"] = ((items.GRAPH,), order.numpy())
    return found


def _cache_faults(file: OnnxFile, quantized: QuantizedCheckpoint, ranges: Ranges, names: set[str]) -> Iterator[str]:
    """float32 [1], what one step of a cached number stands for."""
    if ranges.weights != quantized.digest():
        yield "ranges.json is of another quantized checkpoint"
    for name in sorted(names):
        seen = ranges.values.get(name.removesuffix(".scale"))
        if seen is None:
            yield f"{name} has no range"
            continue
        low, high = (bound * HEADROOM_8_BITS for bound in seen)
        fault = _number_fault(file, name, np.array([around(low, high, np.int8).scale]))
        if fault:
            yield fault


def _attributes(quantized: QuantizedCheckpoint, file: OnnxFile) -> Iterator[items.Finding]:
    """Numbers that are attributes of nodes: epsilons, and what attention multiplies by."""
    config, nodes = quantized.config, {node.name: attributes(node) for node in file.graph.node}
    for norm in items.norm_names(quantized):
        found = nodes.get(f"{norm.removesuffix('.weight')}.out", {}).get("epsilon", "nothing")
        wanted = np.float32(config.rms_norm_eps)
        yield from items.checked(
            items.eps(norm), [] if found == wanted else [f"{told(found)} instead of {told(wanted)}"]
        )
    wanted = {
        "scale": np.float32(config.head_dim**-0.5),
        "num_heads": config.num_heads,
        "kv_num_heads": config.num_kv_heads,
        "do_rotary": 1,
        "rotary_interleaved": 0,
        "local_window_size": -1,
    }
    for layer in range(config.num_layers):
        held_there = {"local_window_size": -1} | nodes.get(f"model.layers.{layer}.self_attn.mixed", {})
        faults = [
            f"{name} is {told(held_there.get(name, 'nothing'))} instead of {told(value)}"
            for name, value in wanted.items()
            if held_there.get(name) != value
        ]
        yield from items.checked(items.attention_scale(layer), faults)


def _caches(artifact: Artifact, file: OnnxFile) -> Iterator[items.Finding]:
    """Types of past and present; rows of the rope tables."""
    faults = [
        f"{value.name} is {kind(value.type.tensor_type.elem_type)}"
        for value in (*file.graph.input, *file.graph.output)
        if value.name.startswith(("past_", "present.")) and value.type.tensor_type.elem_type != TYPES[artifact.cache]
    ]
    yield from items.checked(items.CACHE, [f"{fault} instead of {artifact.cache}" for fault in faults])
    rows = [next(iter(file.tensors[name].dims), 0) for name in ("rope.cos", "rope.sin") if name in file.tensors]
    right_rows = rows == [artifact.context] * 2
    yield from items.checked(
        items.CONTEXT, [] if right_rows else [f"rope tables of {rows} rows instead of {artifact.context}"]
    )


def _graph(
    artifact: Artifact, quantized: QuantizedCheckpoint, file: OnnxFile, ranges: Ranges | None
) -> Iterator[items.Finding]:
    """The graph against what is emitted for this model."""
    bits = cast(KvBits, next(width for width, name in CACHES.items() if name == artifact.cache))
    if bits == 8 and ranges is None:
        yield from items.untold("they cannot be emitted again without the ranges", items.GRAPH)
        return
    try:
        cache = CacheCodec(bits, ranges, quantized)
        weights = NoFile(artifact.folder / WEIGHTS)
        graph = onnx_genai.GenaiGraph(quantized, weights, artifact.context, accuracy_level([file]), cache)
        for _ in graph.emit():
            pass
        faults = list(structure_faults(file, graph.model(OPSETS, IR_VERSION)))
    except ExportError as error:
        faults = [f"they cannot be emitted again: {error}"]
    yield from items.checked(items.GRAPH, faults)


def _config_faults(artifact: Artifact, config: ModelConfig) -> Iterator[str]:
    """genai_config.json, every field: one that is not expected changes what genai does."""
    try:
        found = flat(read_json(artifact.path("genai")))
    except InputError as error:
        yield str(error)
        return
    wanted = flat(_wanted_config(artifact, config))
    for key in sorted(found.keys() | wanted.keys()):
        mine, theirs = (repr(side.get(key, "nothing")) for side in (found, wanted))
        if mine != theirs:
            yield f"genai_config.json says {key} {mine} instead of {theirs}"


def flat(value: object, at: str = "") -> dict[str, object]:
    """Leaves by their path; an empty object or a list is a leaf."""
    if not isinstance(value, Mapping) or not value:
        return {at: value}
    found: dict[str, object] = {}
    for key, below in cast(Mapping[str, Any], value).items():
        found |= flat(below, f"{at}.{key}" if at else str(key))
    return found


def _wanted_config(artifact: Artifact, config: ModelConfig) -> dict[str, Any]:
    """As genai's documentation names the fields: greedy, one beam, no window, this graph, these special tokens."""
    ends = list(config.eos_token_ids)
    first_end = ends[0] if ends else 0
    names = {"inputs": "past_key_values", "outputs": "present"}
    border = {
        side: {f"{kind}_{part}_names": f"{stem}.%d.{part}" for part in ("key", "value")}
        for (side, stem), kind in zip(names.items(), ("past", "present"), strict=True)
    }
    return {
        "model": {
            "type": "llama",
            **({} if config.bos_token_id is None else {"bos_token_id": config.bos_token_id}),
            "eos_token_id": first_end if len(ends) == 1 else ends,
            "pad_token_id": first_end if config.pad_token_id is None else config.pad_token_id,
            "vocab_size": config.vocab_size,
            "context_length": artifact.context,
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "provider_options": [],
                    "enable_mem_pattern": False,
                },
                "filename": artifact.path("model").name,
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "num_hidden_layers": config.num_layers,
                "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **border["inputs"]},
                "outputs": {"logits": "logits", **border["outputs"]},
            },
        },
        "search": {
            "do_sample": False,
            "max_length": artifact.context,
            "past_present_share_buffer": True,
            "num_beams": 1,
            "chunk_size": artifact.chunk,
        },
    }
