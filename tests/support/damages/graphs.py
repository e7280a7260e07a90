"""Damage to finished ONNX graphs: one number, attribute or connection, in one of the graphs or in both."""

from __future__ import annotations

from collections.abc import Callable

from export.artifacts.artifact import Artifact, Format
from tests.support.damage import LAYER
from tests.support.damages.onnx_edits import Edit, add_node, attribute, bump, edited, rewire
from tests.support.damages.record import Damage

ONNX: tuple[Format, ...] = ("onnx-cpu", "onnx-npu")
AT, LOW = f"model.layers.{LAYER}", f"layers.{LAYER}"
NORM, MIXED = f"{AT}.post_attention_layernorm", f"{AT}.self_attn.mixed"


def graphs(edit: Edit, *roles: str) -> Callable[[Artifact], Artifact]:
    """The same edit of each of these graphs."""

    def change(artifact: Artifact) -> Artifact:
        for role in roles:
            artifact = edited(artifact, role, edit)
        return artifact

    return change


def both(name: str, formats: tuple[Format, ...], edit: Edit) -> Damage:
    return Damage(name, formats, files=graphs(edit, "prefill", "decode"))


def shared(name: str, formats: tuple[Format, ...], edit: Edit) -> Damage:
    """Of numbers that both graphs point at: edited through one of them."""
    return Damage(name, formats, files=graphs(edit, "prefill"))


def decode(name: str, formats: tuple[Format, ...], edit: Edit) -> Damage:
    return Damage(name, formats, files=graphs(edit, "decode"))


def genai(name: str, edit: Edit) -> Damage:
    return Damage(name, ("onnx-genai",), files=graphs(edit, "model"))


ROWS = (
    both("eps 1e-2 in the graph", ("onnx-cpu",), attribute(f"{LOW}.mlp_norm", "epsilon", 1e-2)),
    both("eps 1e-2 in the graph", ("onnx-npu",), attribute(f"{LOW}.mlp_norm.unit.exact", "epsilon", 1e-2)),
    genai("eps 1e-2 in the graph", attribute(f"{NORM}.out", "epsilon", 1e-2)),
    decode("eps 1e-2 in decode", ("onnx-cpu",), attribute("final_norm", "epsilon", 1e-2)),
    decode("eps 1e-2 in decode", ("onnx-npu",), attribute("final_norm.unit.exact", "epsilon", 1e-2)),
    shared("a bit of a norm", ("onnx-cpu",), bump(NORM, 2)),
    shared("a bit of a norm", ("onnx-npu",), bump(f"{NORM}.codes", 1)),
    genai("a bit of a norm", bump(NORM, 2)),
    both("a bit of the scale of attention", ("onnx-cpu",), bump(f"{LOW}.q_scaled.factor", 2)),
    both("a bit of the scale of attention", ("onnx-npu",), bump(f"{LOW}.q_scaled.factor.codes", 1)),
    genai("rope of neighbours", attribute(MIXED, "rotary_interleaved", 1)),
    genai("another activation", attribute(f"{AT}.mlp.gate_proj.out.silu", "alpha", 1.7)),
    decode("cosines for sines in decode", ("onnx-cpu",), rewire(f"{LOW}.k_rope.sin", 1, "rope.cos")),
    decode("keys of another rope in decode", ("onnx-cpu",), rewire(f"{LOW}.k_rope.cos", 1, "rope.sin")),
    both("one more operation", ("onnx-cpu",), add_node),
    both("an encoding of another value", ("onnx-npu",), rewire(f"{LOW}.up.codes", 1, "ones.scale")),
    decode("a zero point of another value", ("onnx-npu",), rewire(f"{LOW}.up", 2, "zero.uint16.0")),
    shared("a code of the head", ONNX, bump("lm_head.codes", 1000)),
    genai("a code of the head", bump("lm_head.codes", 1000)),
    genai("a scale of the embedding", bump("embed.scales", 401)),
)
