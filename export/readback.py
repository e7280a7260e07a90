"""Whether a finished artifact holds the codes and scales of a quantized checkpoint: read from its files again.

Also from what Qualcomm's compiler wrote, which does not tell all. MediaTek's cannot be read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from compress.quantized import QuantizedTensor
from compress.store import EMBED, QuantizedCheckpoint
from export import htp_reader
from export.artifact import Artifact, Format
from export.embedding import EmbeddingTable
from export.onnx_decoder import GRAPHS
from export.onnx_reader import OnnxWeights, Stored
from export.packing import unpack

COPIES: Mapping[str, Mapping[str, int]] = {
    "qnn-context": {"context": 1, "simulator-context": 2},
    "executorch-qnn": {"model": 2},
}
"""Of formats with compiled graphs: the files' roles, and how often they hold each weight, all files together."""


@dataclass(frozen=True)
class ReadBack:
    """What an artifact's files tell of a checkpoint's weights.

    Attributes:
        wrong: names of those whose codes or scales are others, or that the artifact does not hold as such.
        untold: what the files do not tell, a sentence each.
    """

    wrong: list[str]
    untold: list[str] = field(default_factory=list[str])


def read_back(artifact: Artifact, quantized: QuantizedCheckpoint) -> ReadBack | None:
    """Hold the artifact's codes and scales against the checkpoint's; None where the format cannot be read.

    Raises:
        InputError: a file is damaged.
    """
    if artifact.format in COPIES:
        return _compiled(artifact, quantized)
    reader = _READERS.get(artifact.format)
    return None if reader is None else ReadBack(list(dict.fromkeys(reader(artifact, quantized))))


def differing(artifact: Artifact, quantized: QuantizedCheckpoint) -> list[str] | None:
    """The weights that `read_back` finds wrong."""
    found = read_back(artifact, quantized)
    return None if found is None else found.wrong


def readable(artifact: Artifact) -> bool:
    """Whether the format's codes and scales can be read back."""
    return artifact.format in _READERS or artifact.format in COPIES


def listed(names: Sequence[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def same(wanted: QuantizedTensor, found: Stored) -> bool:
    """Equal codes, zero points and scales; a scale may be repeated over smaller blocks, exactly."""
    if found.bits != wanted.bits or found.codes.shape != wanted.shape or found.scales.shape[1] % wanted.groups:
        return False
    repeat = found.scales.shape[1] // wanted.groups
    scales = wanted.scales.float().numpy().repeat(repeat, axis=1)
    zeros = wanted.zeros.numpy().repeat(repeat, axis=1)
    held = np.full(zeros.shape, 2 ** (wanted.bits - 1)) if found.zeros is None else found.zeros
    return (
        np.array_equal(found.codes, wanted.codes.numpy())
        and np.array_equal(found.scales.astype(np.float32), scales)
        and np.array_equal(held, zeros)
    )


def linear_names(quantized: QuantizedCheckpoint) -> list[str]:
    """The quantized weights of blocks and head, in the checkpoint's order."""
    names = [name for name in quantized.linears if name != EMBED]
    return names if "lm_head" in names else [*names, "lm_head"]


def _graphs(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """onnx-cpu and onnx-npu: prefill and decode, each of one part or several, and the table beside them."""
    prefill, decode = ([OnnxWeights(path) for path in artifact.paths(role)] for role in GRAPHS)
    for name in linear_names(quantized):
        first, second = (next((graph for graph in graphs if name in graph), None) for graphs in (prefill, decode))
        wanted = quantized.ordered(name).weight
        if (
            first is None
            or second is None
            or not same(wanted, first.read(name))
            or (second.place(name) != first.place(name) and not same(wanted, second.read(name)))
        ):
            yield name
    yield from _table(artifact, quantized)


def _table(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """The file of embedding rows."""
    wanted, found = quantized.embed(), EmbeddingTable.open(artifact.path("embedding"))
    codes = unpack(np.asarray(found.codes[:]), found.bits, found.hidden)
    if not same(wanted, Stored(codes, found.scales, found.zeros, found.bits)):
        yield EMBED


def _genai(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """Weights of q, k and v may be one matrix; the table lies in the graph."""
    graph = OnnxWeights(artifact.path("model"))
    for name in linear_names(quantized):
        wanted, place, _ = quantized.linear(name), *name.rpartition(".")[::2]
        packed = f"{place}.qkv"
        if name in graph:
            found = graph.read(name)
        elif packed in graph and name.endswith(("q_proj", "k_proj", "v_proj")):
            heights = [quantized.linears[f"{place}.{kind}_proj"].shape[0] for kind in "qkv"]
            at = "qkv".index(name[-6])
            start = sum(heights[:at])
            whole = graph.read(packed)
            part = slice(start, start + heights[at])
            zeros = None if whole.zeros is None else whole.zeros[part]
            found = Stored(whole.codes[part], whole.scales[part], zeros, whole.bits)
        else:
            yield name
            continue
        if not same(wanted, found):
            yield name
    table, packed = quantized.embed(), graph.initializer("embed.codes")  # uint8 [rows, hidden * bits / 8]
    codes = unpack(packed, table.bits, table.shape[1])
    if not same(table, Stored(codes, graph.initializer("embed.scales"), None, table.bits)):
        yield EMBED


def _compiled(artifact: Artifact, quantized: QuantizedCheckpoint) -> ReadBack:
    """All files of compiled graphs, and the table beside them."""
    names = linear_names(quantized)
    answers: list[htp_reader.Answer] = []
    for role, copies in COPIES[artifact.format].items():
        weights = ((name, quantized.ordered(name).weight) for name in names)  # one at a time
        answers.append(htp_reader.compare(artifact.paths(role), weights, copies))
    wrong = [name for name in names if any(name in answer.wrong for answer in answers)]
    missing = [name for name in names if any(name in answer.unread for answer in answers)]
    folded = [name for name in names if any(name in answer.folded for answer in answers)]
    untold: list[str] = []
    if missing:
        untold.append(f"codes and scales of {listed(missing)}: how they lie in the compiled file is not known")
    if folded:
        untold.append(f"scales of {listed(folded)}: of rows of 8 bits, they are part of other compiled numbers")
    return ReadBack([*wrong, *_table(artifact, quantized)], untold)


def _litert(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    from export.litert_reader import read

    found = read(artifact.path("model")).linears
    for name in linear_names(quantized):
        if name not in found or not same(quantized.linear(name), _stored(found[name])):
            yield name
    yield from _table(artifact, quantized)


def _executorch(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """The program's weights have no names: each of the checkpoint's must be among them, as often."""
    from export.executorch_reader import embedding_codes, read

    contents = read(artifact.path("model"))
    there = Counter(_fingerprint(weight) for weight in contents.linears)
    for name in linear_names(quantized):
        key = _fingerprint(quantized.linear(name))
        there[key] -= 1
        if there[key] < 0:
            yield name
    table = quantized.embed()
    wanted = table.signed_codes().numpy()
    if not any(np.array_equal(codes, wanted) for codes in embedding_codes(contents, table.shape)):
        yield EMBED


def _executorch_coreml(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    from export.executorch_coreml import other_weights

    yield from other_weights(artifact.path("model"), quantized)
    yield from _table(artifact, quantized)


def _gguf(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """Rows of a Llama's q and k lie in neighbouring pairs."""
    from export.gguf_file import LOCAL_NAMES, interleaved
    from export.gguf_reader import GgufWeights

    config = quantized.config
    found = GgufWeights(artifact.path("model"), config)
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    for name in [*linear_names(quantized), EMBED]:
        weight = quantized.linear(name)
        short = {EMBED: "token_embd", "lm_head": "output"}.get(name, "")
        if not short:
            _, _, layer, local = name.split(".", 3)
            local = LOCAL_NAMES[local]
            short = f"blk.{layer}.{local}"
            if local in heads and not config.qkv_bias:
                codes, scales, zeros = (
                    interleaved(t, heads[local]) for t in (weight.codes, weight.scales, weight.zeros)
                )
                weight = QuantizedTensor(codes, scales, zeros, weight.bits, weight.group_size)
        try:
            held = found.quantized(f"{short}.weight")
        except (KeyError, AssertionError):  # not there, or not quantized
            yield name
            continue
        if not same(weight, _stored(held)):
            yield name


def _coreml(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    from export.coreml import holds, packages
    from export.coreml_package import Package
    from export.coreml_program import DECODE, PREFILL

    functions = [
        (package, dict(package.constants(function)))
        for package in map(Package.open, packages(artifact))
        for function in (PREFILL, DECODE)
    ]
    for name in [*linear_names(quantized), "embed"]:
        tensor = quantized.embed() if name == "embed" else quantized.linear(name)
        found = [holds(package, constants, name, tensor) for package, constants in functions]
        if sum(one is True for one in found) != 2 or False in found:
            yield EMBED if name == "embed" else name


def _stored(tensor: QuantizedTensor) -> Stored:
    return Stored(tensor.codes.numpy(), tensor.scales.numpy(), tensor.zeros.numpy(), tensor.bits)


def _fingerprint(weight: QuantizedTensor) -> tuple[bytes, bytes, int, int]:
    return weight.codes.numpy().tobytes(), weight.scales.numpy().tobytes(), weight.bits, weight.groups


_READERS: dict[Format, Callable[[Artifact, QuantizedCheckpoint], Iterator[str]]] = {
    "onnx-cpu": _graphs,
    "onnx-npu": _graphs,
    "onnx-genai": _genai,
    "litert": _litert,
    "executorch-xnnpack": _executorch,
    "executorch-coreml": _executorch_coreml,
    "gguf": _gguf,
    "coreml": _coreml,
}
