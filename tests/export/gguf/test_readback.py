"""What a finished GGUF file holds against its checkpoint: a file that is changed in one place has that place named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from bluelm.system.files import demo_checkpoint
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.gguf import export as gguf_file
from export.gguf.readback_keys import Value
from export.gguf.readback_keys import differing as gguf_differing
from export.readback import differing, read_back
from tests.support.checkpoints.families import glm
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import write_checkpoint

Damage = Callable[[gguf.GGUFReader], None]


def number(key: str, value: float) -> Damage:
    """A number of the file's keys."""

    def change(reader: gguf.GGUFReader) -> None:
        field = reader.fields[key]
        field.parts[field.data[0]][0] = value

    return change


def text(key: str, new: bytes) -> Damage:
    """A text of the same length."""

    def change(reader: gguf.GGUFReader) -> None:
        field = reader.fields[key]
        field.parts[field.data[0]][:] = np.frombuffer(new, np.uint8)

    return change


def swapped(key: str, length: int = 0) -> Damage:
    """The first two rows of a table that differ, in each other's place; texts of `length` bytes."""

    def change(reader: gguf.GGUFReader) -> None:
        field = reader.fields[key]
        parts = [field.parts[index] for index in field.data]
        parts = [part for part in parts if not length or len(part) == length]
        first = next(part for part in parts if part.tobytes() != parts[0].tobytes())
        first[:], parts[0][:] = parts[0].copy(), first.copy()

    return change


def renamed(old: bytes, new: bytes) -> Damage:
    """A key or a tensor under another name, wherever it stands in the head of the file."""

    def change(reader: gguf.GGUFReader) -> None:
        head = bytes(reader.data[: reader.data_offset])
        assert len(old) == len(new) and old in head
        reader.data[: reader.data_offset] = np.frombuffer(head.replace(old, new), np.uint8)

    return change


def values(name: str, change: Callable[[np.ndarray], None]) -> Damage:
    """The bytes, or the numbers, of a tensor."""
    return lambda reader: change(next(tensor.data for tensor in reader.tensors if tensor.name == name))


def at(index: tuple[int, ...], add: float) -> Callable[[np.ndarray], None]:
    def change(data: np.ndarray) -> None:
        data[index] += np.asarray(add, data.dtype)

    return change


def exchanged(data: np.ndarray) -> None:
    """Two rows in each other's place."""
    data[[0, 2]] = data[[2, 0]].copy()


def step(data: np.ndarray) -> None:
    """A float32 that is one step larger."""
    data[3] = np.nextafter(data[3], np.float32(np.inf))


def another_type(key: str, kind: int) -> Damage:
    """The same bytes, called another type."""

    def change(reader: gguf.GGUFReader) -> None:
        reader.fields[key].parts[2][0] = kind

    return change


def information(name: bytes, at: int, size: int, new: int) -> Damage:
    """Of a tensor: what stands `at` bytes behind its name (4 its length, 12 its type)."""

    def change(reader: gguf.GGUFReader) -> None:
        start = bytes(reader.data[: reader.data_offset]).index(name) + len(name) + at
        reader.data[start : start + size] = np.frombuffer(new.to_bytes(size, "little"), np.uint8)

    return change


BLOCK = "model.layers.1."
SHAPES = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
          "attention.value_length", "rope.dimension_count")  # fmt: skip
IDS = ("bos_token_id", "eos_token_id", "padding_token_id", "unknown_token_id")
FLAGS = ("add_space_prefix", "remove_extra_whitespaces", "add_bos_token", "add_eos_token")
EPS, BASE, KEY = "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base", "llama.attention.key_length"
NORMS = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")]
EPSILONS = [f"{name} epsilon" for name in [*NORMS, "model.norm"]]
SCALES = [f"model.layers.{layer} attention scale" for layer in (0, 1)]
TABLES = {"tokens": 6, "scores": 0, "token_type": 0}
DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    **{name: (number(f"llama.{name}", 7), ["operations"]) for name in SHAPES},
    **{f"{name} of 9": (number(f"tokenizer.ggml.{name}", 9), ["metadata"]) for name in IDS},
    **{
        f"{name} of {value}": (number(f"tokenizer.ggml.{name}", value), ["metadata"])
        for name, value in zip(FLAGS, (1, 1, 0, 1), strict=True)
    },
    **{f"two {name} swapped": (swapped(f"tokenizer.ggml.{name}", size), ["metadata"]) for name, size in TABLES.items()},
    "context": (number("llama.context_length", 7), ["context"]),
    "context as an int32": (another_type("llama.context_length", 5), ["context"]),
    "rows": (number("llama.vocab_size", 7), ["metadata"]),
    "eps 1e-2": (number(EPS, 1e-2), EPSILONS),
    "eps x10": (number(EPS, 1e-5), EPSILONS),
    "scale of attention": (number(KEY, 7), ["operations", *SCALES]),
    "base 5 % off": (number(BASE, 10500.0), ["rope"]),
    "base 0.01 % off": (number(BASE, 10001.0), ["rope"]),
    "another tokenizer model": (text("tokenizer.ggml.model", b"plamo"), ["metadata"]),
    "another cut": (text("tokenizer.ggml.pre", b"falcon3"), ["metadata"]),
    "a window": (renamed(b"llama.vocab_size", b"llama.swa_window"), ["metadata", "operations"]),
    "a code": (values("blk.1.ffn_up.weight", at((5, 2), 1)), [f"{BLOCK}mlp.up_proj"]),
    "a scale": (values("blk.1.attn_v.weight", at((5, 0), 1)), [f"{BLOCK}self_attn.v_proj"]),
    "rows of q": (values("blk.1.attn_q.weight", exchanged), [f"{BLOCK}self_attn.q_proj"]),
    "a row of the table": (values("token_embd.weight", exchanged), ["model.embed_tokens"]),
    "a code of the head": (values("output.weight", at((70, 9), 1)), ["lm_head"]),
    "a norm's last digit": (values("blk.1.ffn_norm.weight", step), [f"{BLOCK}post_attention_layernorm.weight"]),
    "the last norm": (values("output_norm.weight", at((3,), 0.01)), ["model.norm.weight"]),
    "a tensor under another name": (
        renamed(b"blk.1.attn_norm.weight", b"blk.1.attn_sink.weight"),
        ["operations", f"{BLOCK}input_layernorm.weight"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    folder = tmp_path_factory.mktemp("gguf")
    return rounded(folder / "quantized", source=write_checkpoint(folder / "float", vocab=384))


@pytest.fixture(scope="module")
def sound(model: QuantizedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return gguf_file.export(model, tmp_path_factory.mktemp("gguf") / "artifact", context=64)


def damaged(sound: Artifact, folder: Path, damage: Damage) -> Artifact:
    shutil.copytree(sound.folder, folder)
    damage(gguf.GGUFReader(folder / "model.gguf", "r+"))
    return Artifact.open(folder)


@pytest.mark.parametrize("name", DAMAGES)
def test_what_was_changed_in_the_file_is_named(
    model: QuantizedCheckpoint, sound: Artifact, name: str, tmp_path: Path
) -> None:
    damage, wrong = DAMAGES[name]
    found = read_back(damaged(sound, tmp_path / "a", damage), model)
    assert sorted({finding.item for finding in found.wrong}) == sorted(wrong)
    assert not found.untold


def test_every_key_and_every_tensor_of_the_file_is_held_against_something(
    model: QuantizedCheckpoint, sound: Artifact, tmp_path: Path
) -> None:
    """Whatever the writer may write one day: a key or a tensor that nobody knows is wrong."""
    assert differing(sound, model) == []

    def all_renamed(reader: gguf.GGUFReader) -> None:
        for name in names(reader):
            if name.encode() in bytes(reader.data[: reader.data_offset]):  # the beginning of another name is gone
                renamed(name.encode(), f"{name[:-1]}#".encode())(reader)

    made = damaged(sound, tmp_path / "a", all_renamed)
    wrong = {finding.told for finding in read_back(made, model).wrong}
    for name in [*names(gguf.GGUFReader(sound.path("model"))), *names(gguf.GGUFReader(made.path("model")))]:
        assert any(f"{name}:" in told or f"{name} is" in told for told in wrong), name


def names(reader: gguf.GGUFReader) -> list[str]:
    """Keys but those about the file, and tensors."""
    keys = [key for key in reader.fields if not key.startswith(("GGUF.", "general."))]
    return [*keys, *(tensor.name for tensor in reader.tensors)]


@pytest.fixture(scope="module")
def half_turned(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedCheckpoint, Artifact]:
    """A ChatGLM: half of a head turns, and the biases lie as the rows of their weights do."""
    folder = tmp_path_factory.mktemp("glm")
    made = rounded(folder / "quantized", source=glm(folder / "float"), bits=8, group_size=-1)
    shutil.copyfile(demo_checkpoint() / "tokenizer.model", made.folder / "tokenizer.model")
    return made, gguf_file.export(made, folder / "a", context=64)


def test_biases_are_held_too(half_turned: tuple[QuantizedCheckpoint, Artifact], tmp_path: Path) -> None:
    made, artifact = half_turned
    assert differing(artifact, made) == []
    one = damaged(artifact, tmp_path / "bias", values("blk.1.attn_k.bias", at((0,), 0.5)))
    assert differing(one, made) == ["model.layers.1.self_attn.k_proj.bias"]


def test_factors_are_held_but_for_how_processors_differ(
    half_turned: tuple[QuantizedCheckpoint, Artifact], tmp_path: Path
) -> None:
    made, artifact = half_turned
    one = damaged(artifact, tmp_path / "turn", values("rope_freqs.weight", step))
    assert differing(one, made) == []  # one float32 step
    one = damaged(artifact, tmp_path / "more", values("rope_freqs.weight", at((3,), 1e-3)))
    assert differing(one, made) == ["rope"]
    one = damaged(artifact, tmp_path / "steps", values("rope_freqs.weight", three_steps))
    assert differing(one, made) == ["rope"]


@pytest.mark.parametrize(("place", "size", "new", "told"), [(12, 4, 1, "is F16 [8]"), (4, 8, 4, "is F32 [4]")])
def test_factors_of_another_kind_are_named(
    place: int, size: int, new: int, told: str, half_turned: tuple[QuantizedCheckpoint, Artifact], tmp_path: Path
) -> None:
    made, artifact = half_turned
    one = damaged(artifact, tmp_path / "a", information(b"rope_freqs.weight", place, size, new))
    (wrong,) = [finding for finding in read_back(one, made).wrong if finding.item == "rope"]
    assert f"rope_freqs.weight {told}" in str(wrong.told)


def three_steps(data: np.ndarray) -> None:
    """Or a little more."""
    data[3] *= np.float32(1 + 3.5e-7)


def field(kinds: list[gguf.GGUFValueType], *parts: bytes | np.ndarray) -> gguf.ReaderField:
    arrays = [np.frombuffer(part, np.uint8) if isinstance(part, bytes) else part for part in parts]
    return gguf.ReaderField(0, "key", arrays, list(range(len(parts))), kinds)


def test_what_is_told_of_a_key() -> None:
    kinds = gguf.GGUFValueType
    name, some = field([kinds.STRING], b"x" * 50), field([kinds.UINT32], np.array([7], np.uint32))
    table = field([kinds.ARRAY, kinds.INT32], *(np.array([value], np.int32) for value in (1, 2, 3, 4)))
    empty = field([kinds.ARRAY, kinds.STRING])
    many = field([kinds.UINT32], np.arange(5, dtype=np.uint32))
    fields = {"a": name, "b": some, "c": table, "d": empty, "e": some, "f": many, "general.author": name}
    wanted = {
        "a": Value(kinds.STRING, "y"),
        "b": Value(kinds.UINT32, 8),
        "c": Value(kinds.INT32, [1, 2, 3, 5], array=True),
        "d": Value(kinds.FLOAT32, 0.5),
        "f": Value(kinds.UINT32, 9),
        "g": Value(kinds.UINT32, 1),
    }
    assert dict(gguf_differing(fields, wanted)) == {
        "a": f"{b'x' * 40!r} instead of 'y'",
        "b": "7 instead of 8",
        "c": "is another table",
        "d": " instead of 0.5",
        "e": "is none of this model's",
        "f": "0, 1, 2 instead of 9",
        "g": "is missing",
    }
    right = {"a": Value(kinds.STRING, "x" * 50), "c": Value(kinds.INT32, [1, 2, 3, 4], array=True)}
    assert not list(gguf_differing({"a": name, "c": table}, right))
