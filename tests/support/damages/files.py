"""Damage to numbers and operations in finished files, done as the tests of reading them back do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from executorch.exir._serialize._program import serialize_pte_binary
from executorch.exir.schema import Double

from export.artifacts.artifact import Artifact, Format
from export.coreai.static.contract import extend, prompt
from export.coreml.export import packages
from export.coreml.package import Package
from export.executorch.reader import read_program
from tests.support import damage
from tests.support.damages.record import Damage
from tests.support.edits import coreai, coreml, litert, litert_lm, xnnpack

Files = Callable[[Artifact], Artifact]


def in_tflite(change: Any) -> Files:
    def files(artifact: Artifact) -> Artifact:
        litert.rewritten(artifact.path("model"), change)
        return damage.again(artifact)

    return files


def in_package(change: Any) -> Files:
    def files(artifact: Artifact) -> Artifact:
        package = Package.open(packages(artifact)[0])
        change(package)
        (package.root / "model.mlmodel").write_bytes(package.spec.SerializeToString(deterministic=True))
        return damage.again(artifact)

    return files


def in_program(change: Any) -> Files:
    def files(artifact: Artifact) -> Artifact:
        file = read_program(artifact.path("model"))
        change(file)
        artifact.path("model").write_bytes(bytes(serialize_pte_binary(file, extract_delegate_segments=True)))
        return damage.again(artifact)

    return files


def in_aimodel(change: Any) -> Files:
    def files(artifact: Artifact) -> Artifact:
        coreai.rewritten(artifact.folder / "model" / "model.aimodel", change)
        return damage.again(artifact)

    return files


def in_function(kind: str, make: Callable[..., coreai.Change], *arguments: Any) -> Files:
    """A change of one function of the static form: "decode", "prefill" or "prompt"."""

    def files(artifact: Artifact) -> Artifact:
        context, chunk = artifact.context, artifact.chunk
        names = {"decode": extend(context, 1), "prefill": extend(context, chunk), "prompt": prompt(context, chunk)}
        return in_aimodel(make(names[kind], *arguments))(artifact)

    return files


NORM, FACTOR, COSINES = "model.layers.1.post_attention_layernorm", "layers.1.q_scaled.factor", "rope.cos.table"
SCALE, SEEN, ENDS = Double(double_val=0.3), "custom_sdpa", "get_eos_ids"
LITERT: tuple[Format, ...] = ("litert",)
COREML: tuple[Format, ...] = ("coreml",)
XNNPACK: tuple[Format, ...] = ("executorch-xnnpack",)
TFLITE: dict[str, litert.Change] = {
    "tflite: a norm's number": litert.number(NORM, 3, lambda x: 1.02 * x),
    "tflite: eps x10": litert.number("epsilon", 0, lambda x: 10 * x),
    "tflite: attention scale": litert.number(FACTOR, 0, lambda x: 1.02 * x),
    "tflite: one cosine": litert.number(COSINES, -3, lambda x: np.float32(x + 0.1)),
    "tflite: softer softmax": litert.operator(litert.Op.SOFTMAX, 1, litert.soft),
}
COREAI: tuple[Format, ...] = ("coreai",)
STATIC: tuple[Format, ...] = ("coreai-ane",)
Q_PROJ, K_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
MATMUL, UPDATE = "coreai.decomposable.broadcasting_batch_matmul", "coreai.slice_update"


def numbered(graph: str, name: str, place: int, value: int) -> coreai.Change:
    """As `coreai.number`, of a function."""
    return coreai.number(name, place, value, graph)


def halved(graph: str, old: float, new: float) -> coreai.Change:
    """A float16 number of a function."""
    return coreai.scalar(graph, old, new, np.float16)


FUNCTIONS: dict[str, Files] = {
    "decode: attention scale": in_function("decode", halved, 32**-0.5, 1.02 * 32**-0.5),
    "prefill: eps": in_function("prefill", halved, 1e-3, 1e-1),
    "decode: one code": in_function("decode", numbered, f"{Q_PROJ}.codes", 301, 0x10),
    "prefill: one scale": in_function("prefill", numbered, f"{Q_PROJ}.scales", 301, 0x10),
    "prompt: one code": in_function("prompt", numbered, f"{K_PROJ}.codes", 301, 0x10),
    "decode: one cosine": in_function("decode", numbered, "rope.cos", 901, 0x40),
    "prompt: a norm's number": in_function("prompt", numbered, "model.layers.0.input_layernorm.weight", 7, 0x04),
    "prefill: no mask": in_function("prefill", coreai.unmasked),
    "decode: keys for values": in_function("decode", coreai.taken, UPDATE, 0, 1, 4),
    "prompt: keys for values": in_function("prompt", coreai.taken, UPDATE, 0, 1, 4),
    "decode: the first slots": in_function("decode", coreai.first_slots),
    "prompt: the first slots": in_function("prompt", coreai.first_slots),
    "prefill: another head's keys": in_function("prefill", coreai.taken, MATMUL, 0, 7, 1),
    "decode: product for sum": in_function("decode", coreai.product_for_sum),
    "prefill: sigmoid for silu": in_function("prefill", coreai.sigmoid_for_silu),
    "prompt: another name": in_function("prompt", coreai.renamed, "prompt_opt"),
}
"""Each changes one function of the static form and leaves the others."""
DEMO = {"scale": 32**-0.5, "eps": 1e-6}  # of the demo's attention and norms
SOFTER = coreai.both(
    coreai.scalar("attention", DEMO["scale"], 1.02 * DEMO["scale"]), coreai.told("attention", scale=0.18031223)
)
WIDER = coreai.both(coreai.scalar("rms_norm_256", DEMO["eps"], 1e-2), coreai.told("rms_norm_256", eps=1e-2))
ROWS = (
    *(Damage(name, LITERT, files=in_tflite(change)) for name, change in TFLITE.items()),
    *(Damage(name, ("litert-lm",), files=litert_lm.graph(change)) for name, change in TFLITE.items()),
    Damage("mlpackage: eps x10", COREML, files=in_package(coreml.immediate("final_norm_layer_norm_epsilon_0", 10))),
    Damage("mlpackage: attention scale", COREML, files=in_package(coreml.immediate("layers_1_q_scaled_y_0", 1.02))),
    Damage("mlpackage: one cosine", COREML, files=in_package(coreml.blob("rope_cos_table", 901, 0x40))),
    Damage("mlpackage: slots seen", COREML, files=in_package(coreml.blob("mask_seen_x_0", 8, 1))),
    Damage("pte: attention scale", XNNPACK, files=in_program(xnnpack.argument(SEEN, 7, SCALE))),
    Damage("pte: another end token", XNNPACK, files=in_program(xnnpack.answer(ENDS, 7))),
    Damage("aimodel: attention scale", COREAI, files=in_aimodel(SOFTER)),
    Damage("aimodel: eps 1e-2", COREAI, files=in_aimodel(WIDER)),
    Damage("aimodel: another scale is told", COREAI, files=in_aimodel(coreai.told("attention", scale=0.3))),
    Damage("aimodel: a window is told", COREAI, files=in_aimodel(coreai.told("attention", window_size=64))),
    Damage("aimodel: no mask is told", COREAI, files=in_aimodel(coreai.told("attention", is_causal="false"))),
    Damage("aimodel: a weak mask", COREAI, files=in_aimodel(coreai.scalar("attention", -1e4, -4.0))),
    Damage("aimodel: one cosine", COREAI, files=in_aimodel(coreai.number("rope.cos", 901, 0x40))),
    Damage("aimodel: a norm's number", COREAI, files=in_aimodel(coreai.number("model.norm.weight", 7, 0x04))),
    Damage("aimodel: product for sum", COREAI, files=in_aimodel(coreai.product_for_sum())),
    Damage("aimodel: sigmoid for silu", COREAI, files=in_aimodel(coreai.sigmoid_for_silu())),
    *(Damage(f"aimodel, {name}", STATIC, files=change) for name, change in FUNCTIONS.items()),
    Damage("pte: product for sum", XNNPACK, files=in_program(xnnpack.inside(1, xnnpack.product_for_sum))),
)  # fmt: skip
