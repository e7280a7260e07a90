"""What a finished .pte for XNNPACK holds against its checkpoint: one that is changed in one place has it named."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from executorch.exir._serialize._program import PTEFile, serialize_pte_binary
from executorch.exir.schema import Bool, DelegateCall, Double, Int, Tensor

from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.executorch import xnnpack as executorch
from export.executorch.readback_xnnpack import findings
from export.executorch.reader import read_program
from export.readback import read_back
from tests.support.checkpoints import lowered
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import write_checkpoint
from tests.support.edits.xnnpack import (
    HEADER,
    Change,
    answer,
    argument,
    at,
    calls,
    crossed,
    inside,
    like,
    nodes,
    number,
    plan,
    product_for_sum,
)


def gone(file: PTEFile) -> None:
    file.program.execution_plan.remove(plan(file, "get_bos_id"))


def crossed_border(file: PTEFile) -> None:
    """Cosines for sines in the last delegate that takes both."""
    steps = [step.instr_args for chain in plan(file).chains for step in chain.instructions]
    given = [step for step in steps if isinstance(step, DelegateCall)][-2].args
    given[4], given[5] = given[5], given[4]


def weights_crossed(graph: dict[str, Any]) -> None:
    """up for gate: two of a shape, behind the same input."""
    gate, up = [node["xnode_union"] for node in nodes(graph, "XNNFullyConnected")][2:4]
    gate["filter_id"], up["filter_id"] = up["filter_id"], gate["filter_id"]


def other_shape(graph: dict[str, Any]) -> None:
    nodes(graph, "XNNStaticReshape")[-1]["xnode_union"]["new_shape"] = [1, 0, 1, 32]


def smaller_cache(file: PTEFile) -> None:
    method = plan(file)
    for call in calls(method, "update_cache"):
        held: Any = method.values[call.args[1]].val
        assert isinstance(held, Tensor)
        held.sizes[1] = 24


@cache  # lowering takes long
def made() -> tuple[QuantizedCheckpoint, Artifact]:
    folder = lowered.folder() / "xnnpack"
    model = rounded(folder / "quantized", source=write_checkpoint(folder / "float", vocab=384))
    return model, executorch.export(model, folder / "artifact", context=32, chunk=8)


def damaged(sound: Artifact, folder: Path, change: Change) -> Artifact:
    """A copy, changed; artifact.json says the old sizes, and nothing opens it again."""
    shutil.copytree(sound.folder, folder)
    made = Artifact.open(folder)
    file = read_program(made.path("model"))
    change(file)
    made.path("model").write_bytes(bytes(serialize_pte_binary(file, extract_delegate_segments=True)))
    return made


def wrong(artifact: Artifact, model: QuantizedCheckpoint) -> list[str]:
    return sorted({finding.item for finding in read_back(artifact, model).wrong})


BLOCK, FIRST = "model.layers.1", "model.layers.0"
EPSILONS = [f"{BLOCK}.post_attention_layernorm epsilon", f"{BLOCK}.input_layernorm epsilon"]
STRUCTURE: dict[str, tuple[Change, str]] = {
    "vocabulary": (answer("get_vocab_size", 383), "metadata"),
    "longest text": (answer("get_max_seq_len", 31), "metadata"),
    "begin token": (answer("get_bos_id", 5), "metadata"),
    "end token": (answer("get_eos_ids", 7), "metadata"),
    "no cache": (answer("use_kv_cache", False), "metadata"),
    "a number for a truth": (answer("enable_dynamic_shape", 1), "metadata"),
    "no begin token": (gone, "metadata"),
    "scale of attention": (argument("custom_sdpa", 7, Double(double_val=0.3)), f"{BLOCK} attention scale"),
    "everything seen": (argument("custom_sdpa", 6, Bool(bool_val=False)), "operations"),
    "dropout": (argument("custom_sdpa", 5, Double(double_val=0.5)), "operations"),
    "keys for values": (crossed("custom_sdpa", 1, 2), "operations"),
    "keys in the values' cache": (crossed("update_cache", 0, 1), "operations"),
    "rows from 0 on": (argument("slice_copy", 2, Int(int_val=0)), "operations"),
    "cosines for sines": (crossed_border, "rope"),
    "a product for a sum": (inside(1, product_for_sum), "operations"),
    "another shape": (inside(1, other_shape), "operations"),
    "slots": (smaller_cache, "context"),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_what_was_changed_in_the_program_is_named(
    model: QuantizedCheckpoint, sound: Artifact, name: str, tmp_path: Path
) -> None:
    change, item = STRUCTURE[name]
    assert wrong(damaged(sound, tmp_path / "a", change), model) == [item]


def test_a_program_that_cannot_be_followed_is_said_to_be_so(
    model: QuantizedCheckpoint, sound: Artifact, tmp_path: Path
) -> None:
    def cut(file: PTEFile) -> None:
        held = file.program.backend_delegate_data[plan(file).delegates[1].processed.index]
        held.data = bytes(held.data)[: HEADER // 2]

    (found,) = read_back(damaged(sound, tmp_path / "a", cut), model).wrong
    assert found.item == "operations" and "cannot be followed" in found.told


def test_what_was_changed_in_its_numbers_is_named(model: QuantizedCheckpoint, sound: Artifact, tmp_path: Path) -> None:
    weight = model.linear(f"{BLOCK}.mlp.up_proj")
    packed = (weight.codes[:, 0::2] | weight.codes[:, 1::2] << 4).numpy()
    scales = model.linear(f"{BLOCK}.self_attn.k_proj").scales.float().numpy().reshape(-1)
    high = (scales.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16
    norm = model.vector(f"{BLOCK}.post_attention_layernorm").numpy()
    table = model.embed()
    cos = np.cos(np.arange(32, dtype=np.float32)[:, None] * np.ones(16, np.float32))[:, 0]
    rows = lambda values: values.size == 512 and np.allclose(values[::16], cos, atol=1e-5)  # noqa: E731
    found: dict[str, tuple[Change, list[str]]] = {
        "a code": (number(like(packed), at(70, lambda x: x ^ 16), np.uint8), [f"{BLOCK}.mlp.up_proj"]),
        "a scale": (number(like(high), at(3, lambda x: x ^ 1), np.uint16), [f"{BLOCK}.self_attn.k_proj"]),
        "a norm": (number(like(norm), at(3, lambda x: np.nextafter(x, x + 1))),
                   [f"{BLOCK}.post_attention_layernorm.weight"]),
        "eps x10": (number(like(np.array([1e-6], np.float32)), at(0, lambda x: x * 10)), [*EPSILONS]),
        "a share": (number(like(np.full(64, 1 / 64, np.float32)), at(0, lambda x: x * 2)), ["operations"]),
        "a cosine": (number(rows, at(400, lambda x: x + 1e-7)), ["rope"]),
        "a code of the table": (number(like(table.signed_codes().numpy()), at(9, lambda x: x ^ 1), np.int8),
                                ["model.embed_tokens"]),
        "a scale of the table": (number(like(table.scales.float().numpy()), at(9, lambda x: x * 2)),
                                 ["model.embed_tokens"]),
        "weights exchanged": (inside(1, weights_crossed), [f"{FIRST}.mlp.gate_proj", f"{FIRST}.mlp.up_proj"]),
    }  # fmt: skip
    for name, (change, items) in found.items():
        missing = set(items) - set(wrong(damaged(sound, tmp_path / name, change), model))
        assert not missing, name
        if name != "eps x10":  # one record of all norms
            assert wrong(Artifact.open(sound.folder), model) == []


def test_a_program_that_is_written_again_is_the_same_to_the_reader(
    model: QuantizedCheckpoint, sound: Artifact, tmp_path: Path
) -> None:
    found = read_back(damaged(sound, tmp_path / "a", lambda _: None), model)
    assert not found.wrong and not found.untold


@cache
def narrow(kv_bits: Any, chunk: int) -> tuple[QuantizedCheckpoint, Artifact]:
    """A block with a narrow cache, and no begin token."""
    folder = lowered.folder() / f"xnnpack-{kv_bits}-{chunk}"
    source = rounded(folder / "q", source=write_checkpoint(folder / "float", vocab=384, layers=1, bos_token_id=None))
    return source, executorch.export(source, folder / "a", context=32, chunk=chunk, kv_bits=kv_bits)


NARROW: dict[str, Change] = {
    "scales of values for those of keys": crossed("custom_quantized_sdpa", 11, 13),
    "zero points of values for those of keys": crossed("custom_quantized_sdpa", 10, 12),
    "scales of queries for those of keys": crossed("custom_quantized_sdpa", 9, 11),
    "a dropout": argument("custom_quantized_sdpa", 5, Double(double_val=0.5)),
    "fewer steps": argument("quantize_per_token", 3, Int(int_val=-127)),
    "a slot of another token": argument("update_cache", 2, Int(int_val=0)),
}


@pytest.mark.parametrize("name", NARROW)
def test_what_was_changed_around_a_narrow_cache_is_named(name: str, tmp_path: Path) -> None:
    source, made = narrow(8, 8)
    assert wrong(damaged(made, tmp_path / "a", NARROW[name]), source) == ["operations"]


def test_rows_of_other_tokens_are_named(tmp_path: Path) -> None:
    """A step of one token has no count of tokens to take rows by."""
    source, made = narrow(16, 1)
    assert wrong(damaged(made, tmp_path / "a", argument("slice_copy", 4, Int(int_val=2))), source) == ["operations"]


@pytest.mark.parametrize(("kv_bits", "chunk"), [(16, 1), (8, 8)])
def test_narrow_caches_and_single_tokens_are_followed_too(kv_bits: Any, chunk: int) -> None:
    source, made = narrow(kv_bits, chunk)
    found = read_back(made, source)
    assert not found.wrong and not found.untold
    states = {finding.item: finding.state for finding in findings(made, source)}
    assert ("activation encodings" in states) == (kv_bits == 8)
