"""ONNX for onnxruntime-genai: one graph with fused norms, rope and attention, and its genai_config.json.

    embedding rows -> [ norm -> q k v (one MatMulNBits) -> GroupQueryAttention (rope, cache) -> o
                        -> norm -> gate, up -> SiLU, product -> down ] x layers -> norm -> head

B sequences, S new tokens, P cached ones, both free. Inputs and outputs have the names that genai knows:

    input_ids int64 [B, S] · attention_mask int64 [B, P + S] · past_key_values.N.key/.value [B,
    kv_heads, P, head_dim] logits float32 [B, S, vocab] · present.N.key/.value [B, kv_heads, P + S, head_dim]
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from onnx import TensorProto, helper

from bluelm.block import Add, Attend, Linear, Norm, Product, Silu, Step, block_of
from bluelm.config import ModelConfig
from bluelm.errors import TargetError
from bluelm.rope import rope_table
from bluelm.system.files import atomic_folder
from bluelm.system.progress import Progress, Silent
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.mobile import KvBits, complete
from export.artifacts.packing import pack
from export.lowering.ranges import Ranges
from export.onnx.cpu import CacheCodec, store_weight
from export.onnx.decoder import IR_VERSION, OPSETS, WEIGHTS
from export.onnx.graph import OnnxGraph, WeightFile
from export.tokenizer.genai import write_tokenizer

MODEL, CONFIG = "model.onnx", "genai_config.json"
CONTRIB = "com.microsoft"
BORDER = {
    "inputs": {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    },
    "outputs": {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    },
}


def export(
    quantized: QuantizedCheckpoint,
    folder: Path,
    *,
    context: int = 512,
    chunk: int = 128,
    accuracy_level: Literal[0, 4] = 0,
    kv_bits: KvBits = 32,
    ranges: Ranges | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write the artifact `folder`: model.onnx, weights.bin, genai_config.json and the tokenizer's files, also as genai
    reads them.

    Args:
        context: rows of the rope tables, and so the longest sequence.
        chunk: tokens of a prompt that genai feeds at once; the graph takes any number.
        accuracy_level, kv_bits, ranges: as in `export/onnx/cpu.py`. With 16 bits attention computes in float16.
    """
    cache = CacheCodec(kv_bits, ranges, quantized)
    with atomic_folder(folder) as temporary:
        steps = (progress or Silent()).task("lower to ONNX for genai", quantized.config.num_layers + 1)
        with steps as task, WeightFile(temporary / WEIGHTS) as weights:
            graph = GenaiGraph(quantized, weights, context, accuracy_level, cache)
            for place in graph.emit():
                task.advance(note=place)
            graph.save(temporary / MODEL, OPSETS, IR_VERSION)
        roles = {MODEL: "model", WEIGHTS: "weights", CONFIG: "genai"}
        if kv_bits == 8 and ranges is not None:
            ranges.save(temporary / "ranges.json")  # what the scales of the cache are held against
            roles["ranges.json"] = "ranges"
        config = json.dumps(genai_config(quantized.config, context, chunk), indent=1) + "\n"
        (temporary / CONFIG).write_text(config, encoding="utf-8")
        roles |= write_tokenizer(temporary, quantized.folder, context)
        complete(
            temporary,
            "onnx-genai",
            quantized,
            roles,
            context=context,
            chunk=chunk,
            kv_bits=kv_bits,
            producers={"onnx": version("onnx")},
        )
    return Artifact.open(folder)


def genai_config(config: ModelConfig, context: int, chunk: int) -> dict[str, Any]:
    """What onnxruntime-genai reads beside the graph."""
    ends = list(config.eos_token_ids)
    pad = config.pad_token_id if config.pad_token_id is not None else (ends or [0])[0]
    decoder = {
        "session_options": {
            "log_id": "onnxruntime-genai",
            "provider_options": [],
            "enable_mem_pattern": False,  # a plan of memory for each length, made once and never used again
        },
        "filename": MODEL,
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "num_hidden_layers": config.num_layers,
        **BORDER,
    }
    model = {
        "type": "llama",
        **({} if config.bos_token_id is None else {"bos_token_id": config.bos_token_id}),
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": pad,
        "vocab_size": config.vocab_size,
        "context_length": context,
        "decoder": decoder,
    }
    search = {
        "do_sample": False,
        "max_length": context,
        "past_present_share_buffer": True,
        "num_beams": 1,
        "chunk_size": chunk,
    }
    return {"model": model, "search": search}


class GenaiGraph(OnnxGraph):
    """Emits the fused decoder; `_stream` and `_branch` are the residual and what is yet to be added to it."""

    def __init__(
        self,
        quantized: QuantizedCheckpoint,
        weights: WeightFile,
        context: int,
        accuracy_level: int,
        cache: CacheCodec,
    ) -> None:
        super().__init__("decoder", weights)
        self._cache = cache
        self._quantized, self._config, self._context = quantized, quantized.config, context
        self._block = block_of(quantized.config)
        self._accuracy_level = accuracy_level
        self._stream, self._branch = "", ""

    def emit(self) -> Iterator[str]:
        """All of it; the place after each step."""
        self.begin()
        for layer in range(self._config.num_layers):
            self.block(layer)
            yield f"block {layer}"
        self.end()
        yield "head"

    def begin(self) -> None:
        """Inputs, embedding rows, lengths for attention, rope tables."""
        self.input("input_ids", TensorProto.INT64, ("B", "S"))
        self.input("attention_mask", TensorProto.INT64, ("B", "T"))
        self._stream = self._rows("embed", self._quantized.embed())  # [B, S, hidden]
        one = self.initializer("one", np.array([1], np.int64))
        self._node("ReduceSum", ["attention_mask", one], "lengths.all", keepdims=0)
        self._node("Sub", ["lengths.all", one], "lengths.last")
        self._node("Cast", ["lengths.last"], "lengths", to=TensorProto.INT32)  # [B]: P + S - 1
        self._node("Shape", ["attention_mask"], "total.int64", start=1, end=2)
        self._node("Cast", ["total.int64"], "total", to=TensorProto.INT32)  # [1]: P + S
        cos, sin = rope_table(self._config, self._context)
        half_width = self._config.head_dim // 2
        for name, angles in (("rope.cos", cos), ("rope.sin", sin)):
            half_table = angles[:, :half_width].numpy()
            self.initializer(name, half_table.astype(np.float16) if self._cache.bits == 16 else half_table)

    def block(self, layer: int) -> None:
        """One decoder block: its steps, linears that read the same value together."""
        for branch in self._block.branches:
            place = f"model.layers.{layer}.{branch.writer.weight.rpartition('.')[0]}"
            values: dict[str, str] = {}
            for step in branch.steps:
                if step.makes not in values:
                    inputs = [values.get(name, "") for name in step.inputs]
                    values |= self._values(step, inputs, layer, place)
            self._branch = values[branch.writer.makes]

    def _values(self, step: Step, inputs: list[str], layer: int, place: str) -> dict[str, str]:
        """Values of the graph by their names in the description: a step's, or those of all linears of its stage."""
        at = f"model.layers.{layer}"
        match step:
            case Norm() if step.reads in self._block.stream:
                return {step.makes: self._norm(f"{at}.{step.weight}")}
            case Norm():
                return {step.makes: self._inner_norm(inputs[0], step, f"{at}.{step.weight}")}
            case Linear():
                linears = [one for one in self._block.linears.values() if one.reads == step.reads]
                made = self._stage(inputs[0], linears, at, place)
                return {one.makes: value for one, value in zip(linears, made, strict=True)}
            case Attend():
                return {step.makes: self._attention(layer, step, inputs, f"{place}.{step.makes}")}
            case Silu():  # x * sigmoid(x)
                return {step.makes: self._node("QuickGelu", inputs, f"{inputs[0]}.silu", domain=CONTRIB, alpha=1.0)}
            case Product():
                return {step.makes: self._node("Mul", inputs, f"{place}.inner")}
            case Add():
                raise AssertionError("the sum of a branch is that of the norm behind it")

    def end(self) -> None:
        """Last norm and head."""
        logits = self._linear(self._norm("model.norm"), "lm_head")
        self.rename(logits, "logits")
        self.output("logits", TensorProto.FLOAT, ("B", "S", self._config.vocab_size))

    def _node(self, kind: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        self.node(kind, inputs, output, domain, **attributes)
        return output

    def _rows(self, name: str, table: QuantizedTensor) -> str:
        """The tokens' rows, dequantized as they are looked up."""
        if table.groups != 1 or not table.symmetric:
            raise TargetError(
                "the embedding needs one scale a row and no zero points", fix="quantize with embed_bits 8"
            )
        codes = self.initializer(f"{name}.codes", pack(table.codes.numpy(), table.bits))  # uint8 [rows, bytes]
        scales = self.initializer(f"{name}.scales", table.scales.numpy())  # [rows, 1]
        if table.scales.dtype != torch.float32:
            scales = self._node("Cast", [scales], f"{scales}.float32", to=TensorProto.FLOAT)
        block = 1 << (table.shape[1] - 1).bit_length()  # must be a power of two; the only block of a row may be short
        layout = {"bits": table.bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
        return self._node("GatherBlockQuantized", [codes, "input_ids", scales], name, domain=CONTRIB, **layout)

    def _norm(self, weight: str) -> str:
        """RMSNorm of the stream, to which the branch is added first."""
        gamma = self.initializer(weight, self._quantized.vector(weight).numpy())
        epsilon, name = self._config.rms_norm_eps, f"{weight}.out"
        if not self._branch:
            return self._node("SimplifiedLayerNormalization", [self._stream, gamma], name, epsilon=epsilon, axis=-1)
        total = f"{weight}.sum"
        self._nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [self._stream, self._branch, gamma],
                [name, "", "", total],
                name=name,
                domain=CONTRIB,
                epsilon=epsilon,
            )
        )
        self._stream, self._branch = total, ""
        return name

    def _inner_norm(self, x: str, step: Norm, weight: str) -> str:
        """RMSNorm of a value that is not the stream: of x [B, S, size], or of each head of x [B, S, heads * size]."""
        gamma = self.initializer(weight, self._quantized.vector(weight).numpy())
        heads, how = self._block.heads.get(step.makes), {"epsilon": self._config.rms_norm_eps, "axis": -1}
        if heads is None:
            return self._node("SimplifiedLayerNormalization", [x, gamma], f"{weight}.out", **how)
        widths = (step.size, heads * step.size)
        split, joined = (self.initializer(f"rows.{n}", np.array([0, -1, n], np.int64)) for n in widths)
        rows = self._node("Reshape", [x, split], f"{weight}.heads")  # [B, S * heads, size]
        normed = self._node("SimplifiedLayerNormalization", [rows, gamma], f"{weight}.out", **how)
        return self._node("Reshape", [normed, joined], f"{weight}.joined")

    def _attention(self, layer: int, step: Attend, given: list[str], name: str) -> str:
        shape = ("B", step.kv_heads, "P", step.size)
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        present = [f"present.{layer}.{kind}" for kind in ("key", "value")]
        for cached in past:
            self.input(cached, self._cache.dtype, shape)
        if self._cache.bits == 16:  # the kernel has one type for all
            given = [one and self._node("Cast", [one], f"{one}.float16", to=TensorProto.FLOAT16) for one in given]
        inputs = [*given, *past, "lengths", "total", "rope.cos", "rope.sin"]
        codes: dict[str, Any] = {}
        if self._cache.bits == 8:
            inputs += [""] * 3 + [self._cache_scale(layer, kind) for kind in ("keys", "values")]
            codes = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
        node = helper.make_node(
            "GroupQueryAttention",
            inputs,
            [name, *present],
            name=name,
            domain=CONTRIB,
            num_heads=step.heads,
            kv_num_heads=step.kv_heads,
            scale=step.scale,
            do_rotary=1,
            rotary_interleaved=0,
            **codes,
        )
        self._nodes.append(node)
        for output in present:
            self.output(output, self._cache.dtype, (*shape[:2], "T", shape[3]))
        if self._cache.bits == 16:
            return self._node("Cast", [name], f"{name}.float32", to=TensorProto.FLOAT)
        return name

    def _cache_scale(self, layer: int, kind: str) -> str:
        """float32 [1], of a layer's cached keys or values."""
        scale = np.array([self._cache.encoding(f"layers.{layer}.{kind}").scale], np.float32)
        return self.initializer(f"layers.{layer}.{kind}.scale", scale)

    def _stage(self, x: str, linears: list[Linear], at: str, place: str) -> list[str]:
        """Outcomes of linears that read x; queries, keys and values are one packed [B, S, q + k + v], and two "" behind
        it, where attention itself reads them and their weights are alike."""
        names = [f"{at}.{linear.weight}" for linear in linears]
        if tuple(linear.makes for linear in linears) != self._block.attention.inputs or not self._alike(names):
            return [self._biased(self._linear(x, n), n, one) for n, one in zip(names, linears, strict=True)]
        packed = self._matmul(x, f"{place}.qkv", stacked([self._quantized.linear(name) for name in names]))
        if linears[0].biased:
            bias = torch.cat([self._quantized.vector(f"{name}.bias") for name in names])
            biases = self.initializer(f"{place}.qkv.bias", bias.numpy())
            packed = self._node("Add", [packed, biases], f"{packed}.biased")
        return [packed, "", ""]

    def _alike(self, names: list[str]) -> bool:
        """Whether weights can lie below one another."""
        found = [self._quantized.ordered(name) for name in names]
        kinds = {(w.bits, w.columns_per_group, w.symmetric, w.scales.dtype) for w in (one.weight for one in found)}
        return len(kinds) == 1 and all(one.order is None for one in found)

    def _biased(self, x: str, name: str, linear: Linear) -> str:
        if not linear.biased:
            return x
        bias = self.initializer(f"{name}.bias", self._quantized.vector(f"{name}.bias").numpy())
        return self._node("Add", [x, bias], f"{x}.biased")

    def _linear(self, x: str, weight: str) -> str:
        found = self._quantized.ordered(weight)
        if found.order is not None:
            order = self.initializer(f"{weight}.order", found.order.numpy())
            x = self._node("Gather", [x, order], f"{weight}.inputs", axis=-1)
        return self._matmul(x, weight, found.weight)

    def _matmul(self, x: str, name: str, weight: QuantizedTensor) -> str:
        held = store_weight(self.weights, name, weight)
        scales = self.stored(f"{name}.scales")
        if not held.exact_scales:
            scales = self._node("Cast", [scales], f"{scales}.float32", to=TensorProto.FLOAT)
        inputs = [x, self.stored(f"{name}.codes"), scales]
        if held.zeros:
            inputs.append(self.stored(f"{name}.zeros"))
        return self._node(
            "MatMulNBits",
            inputs,
            f"{name}.out",
            domain=CONTRIB,
            accuracy_level=self._accuracy_level,
            K=weight.shape[1],
            N=held.rows,
            bits=held.bits,
            block_size=held.block_size,
        )


def stacked(weights: list[QuantizedTensor]) -> QuantizedTensor:
    """Weights of equal layout on top of one another: [sum of out, in]."""
    first = weights[0]
    codes, scales, zeros = (
        torch.cat([getattr(weight, part) for weight in weights]) for part in ("codes", "scales", "zeros")
    )
    return QuantizedTensor(codes, scales, zeros, first.bits, first.group_size)
