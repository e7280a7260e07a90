"""What a finished .pte for Core ML holds against its checkpoint: one that is changed in one place has it named."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from executorch.backends.apple.coreml import executorchcoreml
from executorch.exir._serialize._program import serialize_pte_binary

from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.coreml.package import RECORD, Package
from export.executorch import coreml as executorch_coreml
from export.executorch.coreml_reader import unpack
from export.executorch.reader import read_program
from export.readback import read_back
from tests.support.checkpoints import lowered
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import write_checkpoint

Change = Callable[[Package], None]
Fits = Callable[[np.ndarray], bool]


def constants(package: Package) -> dict[str, dict[str, Any]]:
    return dict(package.constants("decode"))


def record(fits: Fits, index: int, flip: int, part: str = "val") -> Change:
    """A bit of the first constant of `decode` that `fits`; the record serves both functions."""

    def change(package: Package) -> None:
        for values in constants(package).values():
            if part in values and values[part].WhichOneof("value") == "blobFileValue":
                held = package.value(values[part])
                if fits(held):
                    at = values[part].blobFileValue.offset
                    data = np.memmap(package.root / "weights" / "weight.bin", np.uint8, "r+")
                    data[RECORD.unpack(data[at : at + RECORD.size].tobytes())[3] + index] ^= flip
                    data.flush()
                    return
        raise AssertionError("there is no such constant")

    return change


def like(wanted: np.ndarray) -> Fits:
    return lambda held: held.shape == wanted.shape and np.array_equal(held, wanted)


def argument(kind: str, name: str, factor: float) -> Change:
    """A float16 inside the program: what the last operation of a kind is given under a name."""

    def change(package: Package) -> None:
        op = [op for op in package.operations("decode") if op.type == kind and name in op.inputs][-1]
        held = constants(package)[op.inputs[name].arguments[0].name]["val"].immediateValue.tensor
        held.bytes.values = (np.frombuffer(held.bytes.values, np.float16) * factor).astype(np.float16).tobytes()

    return change


def factor_of_attention(package: Package) -> None:
    values = [v["val"] for name, v in constants(package).items() if name.startswith("c_lifted_tensor")]
    tensor = values[-1].immediateValue.tensor
    tensor.bytes.values = np.array(0.26, np.float16).tobytes()


def exchanged(kind: str, name: str) -> Change:
    """What the last two operations of a kind are given, in each other's place."""

    def change(package: Package) -> None:
        ops = [op for op in package.operations("decode") if op.type == kind]
        first, second = (op.inputs[name].arguments[0] for op in ops[-3:-1])
        first.name, second.name = second.name, first.name

    return change


def other_kind(package: Package) -> None:
    [op for op in package.operations("decode") if op.type == "silu"][-1].type = "relu"


def forgotten_cache(package: Package) -> None:
    """Own keys twice in the last block, the cached ones nowhere."""
    op = [op for op in package.operations("decode") if op.type == "concat"][-2]
    held = op.inputs["values"].arguments
    held[0].name = held[1].name


def turned(package: Package) -> None:
    op = [op for op in package.operations("decode") if op.type == "transpose"][-1]
    tensor = constants(package)[op.inputs["perm"].arguments[0].name]["val"].immediateValue.tensor
    tensor.ints.values[:] = [0, 1, 2, 3]


@cache  # lowering takes long
def made() -> tuple[QuantizedCheckpoint, Artifact]:
    folder = lowered.folder() / "executorch-coreml"
    model = rounded(folder / "quantized", source=write_checkpoint(folder / "float", vocab=384))
    return model, executorch_coreml.export(model, folder / "a", context=32, chunk=8)


def damaged(sound: Artifact, folder: Path, change: Change) -> Artifact:
    """A copy, its package changed; artifact.json says the old sizes, and nothing opens it again."""
    shutil.copytree(sound.folder, folder)
    made = Artifact.open(folder)
    file = read_program(made.path("model"))
    assert file.named_data is not None
    with tempfile.TemporaryDirectory() as scratch:
        package = unpack(made.path("model"), Path(scratch)).package
        change(package)
        (package.root / "model.mlmodel").write_bytes(package.spec.SerializeToString(deterministic=True))
        flat = executorchcoreml.flatten_directory_contents(scratch)
    assert flat is not None
    (entry,) = file.named_data.pte_data.values()
    buffers: Any = file.named_data.buffers
    buffers[entry.buffer_index] = flat
    made.path("model").write_bytes(bytes(serialize_pte_binary(file, extract_delegate_segments=True)))
    return made


def wrong(artifact: Artifact, model: QuantizedCheckpoint) -> list[str]:
    return sorted({finding.item for finding in read_back(artifact, model).wrong})


BLOCK = "model.layers.1"


@cache
def with_head_norms() -> tuple[QuantizedCheckpoint, Artifact]:
    """A block whose queries and keys have norms, and whose heads have keys of their own."""
    folder = lowered.folder() / "executorch-coreml-norms"
    shape: dict[str, Any] = {
        "architecture": "Qwen3ForCausalLM",
        "layer_norm": False,
        "head_dim": 16,
        "heads": 4,
        "kv_heads": 4,
    }
    model = rounded(folder / "q", source=write_checkpoint(folder / "float", vocab=384, layers=1, **shape))
    return model, executorch_coreml.export(model, folder / "a", context=32, chunk=8)


def code(model: QuantizedCheckpoint) -> Change:
    return record(like(model.linear(f"{BLOCK}.mlp.up_proj").signed_codes().numpy()), 70, 0x10, "data")


def scale(model: QuantizedCheckpoint) -> Change:
    return record(like(model.linear(f"{BLOCK}.self_attn.k_proj").scales.numpy()), 6, 1, "scale")


def norm(model: QuantizedCheckpoint) -> Change:
    held = model.vector(f"{BLOCK}.post_attention_layernorm").numpy().astype(np.float16)
    return record(like(np.tile(held, 2)), 6, 1)


def cosine(_: QuantizedCheckpoint) -> Change:
    return record(lambda held: held.shape == (32, 16) and held[0, 0] == 1, 900, 1)


CASES: dict[str, tuple[Callable[[QuantizedCheckpoint], Change], list[str]]] = {
    "nothing": (lambda _: lambda _: None, []),
    "a code": (code, [f"{BLOCK}.mlp.up_proj"]),
    "a scale": (scale, [f"{BLOCK}.self_attn.k_proj"]),
    "a norm": (norm, [f"{BLOCK}.post_attention_layernorm.weight"]),
    "a cosine": (cosine, ["rope"]),
    "eps x10": (lambda _: argument("layer_norm", "epsilon", 10), ["model.norm epsilon"]),
    "scale of attention": (lambda _: factor_of_attention, [f"{BLOCK} attention scale"]),
    "down for up": (lambda _: exchanged("linear", "weight"), [f"{BLOCK}.mlp.{name}_proj" for name in ("down", "up")]),
    "another operation": (lambda _: other_kind, ["operations"]),
    "a forgotten cache": (lambda _: forgotten_cache, ["operations"]),
    "not transposed": (lambda _: turned, ["operations"]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_was_changed_in_the_package_is_named(
    name: str, model: QuantizedCheckpoint, sound: Artifact, tmp_path: Path
) -> None:
    change, items = CASES[name]
    assert wrong(damaged(sound, tmp_path / "a", change(model)), model) == sorted(items)


def test_a_norm_of_heads_is_held(tmp_path: Path) -> None:
    model, sound = with_head_norms()
    held = np.tile(model.vector("model.layers.0.self_attn.k_norm").numpy().astype(np.float16), 2)
    hurt = damaged(sound, tmp_path / "a", record(like(held), 6, 1))
    assert wrong(hurt, model) == ["model.layers.0.self_attn.k_norm.weight"]


@pytest.mark.parametrize("kind", [made, with_head_norms])
def test_a_sound_program_is_followed_whole(kind: Callable[[], tuple[QuantizedCheckpoint, Artifact]]) -> None:
    model, sound = kind()
    found = read_back(sound, model)
    assert not found.wrong and not found.untold


def test_a_table_beside_the_program_is_held_too(model: QuantizedCheckpoint, sound: Artifact, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound.folder, tmp_path / "a"))
    path = folder / "embedding.safetensors"
    data = bytearray(path.read_bytes())
    data[-400] ^= 1
    path.write_bytes(data)
    assert wrong(Artifact.open(folder), model) == ["model.embed_tokens"]
