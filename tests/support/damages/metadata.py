"""Damage to what lies beside the weights: tokenizers, end tokens, the configurations that runners read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from gguf import GGUFReader, ReaderField
from sentencepiece import sentencepiece_model_pb2

from export.artifacts.artifact import Artifact, Format
from tests.support import damage
from tests.support.damages.record import ALL, Damage

Table = dict[str, Any]


def edited(name: str, change: Callable[[Table], Any]) -> Callable[[Artifact], Artifact]:
    """A JSON file of the artifact, changed."""

    def files(artifact: Artifact) -> Artifact:
        path = artifact.folder / name
        table = json.loads(path.read_text(encoding="utf-8"))
        change(table)
        path.write_text(json.dumps(table), encoding="utf-8")
        return damage.again(artifact)

    return files


def model(**values: Any) -> Callable[[Artifact], Artifact]:
    """genai_config.json with other values of its model."""
    return edited("genai_config.json", lambda table: table["model"].update(values))


def search(**values: Any) -> Callable[[Artifact], Artifact]:
    """genai_config.json with other values of its search."""
    return edited("genai_config.json", lambda table: table["search"].update(values))


def decoder(**values: Any) -> Callable[[Artifact], Artifact]:
    """genai_config.json with other values of its decoder."""
    return edited("genai_config.json", lambda table: table["model"]["decoder"].update(values))


def config(**values: Any) -> Callable[[Artifact], Artifact]:
    """config.json beside the artifact with other values."""
    return edited("config.json", lambda table: table.update(values))


def described(**values: Any) -> Callable[[Artifact], Artifact]:
    """artifact.json that says something else of the model."""

    def files(artifact: Artifact) -> Artifact:
        path = artifact.folder / "artifact.json"
        table = json.loads(path.read_text(encoding="utf-8"))
        table["model"].update(values)
        path.write_text(json.dumps(table), encoding="utf-8")
        return Artifact.open(artifact.folder)

    return files


def piece(**values: Any) -> Callable[[Artifact], Artifact]:
    """tokenizer.model with another score or kind of one piece."""

    def files(artifact: Artifact) -> Artifact:
        path = artifact.folder / "tokenizer.model"
        table: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
        table.ParseFromString(path.read_bytes())
        for name, value in values.items():
            setattr(table.pieces[3000], name, value)
        path.write_bytes(table.SerializeToString())
        return damage.again(artifact)

    return files


def attributes(kind: str, **values: Any) -> Callable[[Artifact], Artifact]:
    """Every node of a kind in an ONNX artifact's graphs with other attributes."""

    def files(artifact: Artifact) -> Artifact:
        for path in {path for role in ("model", "prefill", "decode") for path in artifact.paths(role)}:
            found = onnx.load(path, load_external_data=False)
            for node in found.graph.node:
                if node.op_type == kind:
                    kept = [a for a in node.attribute if a.name not in values]
                    del node.attribute[:]
                    node.attribute.extend([*kept, *(onnx.helper.make_attribute(k, v) for k, v in values.items())])
            onnx.save(found, path)
        return damage.again(artifact)

    return files


def gguf(key: str, change: Callable[[ReaderField], None]) -> Callable[[Artifact], Artifact]:
    """model.gguf with another value of a key, in place."""

    def files(artifact: Artifact) -> Artifact:
        reader = GGUFReader(Path(artifact.path("model")), "r+")
        change(reader.fields[key])
        del reader
        return damage.again(artifact)

    return files


def to(value: float) -> Callable[[ReaderField], None]:
    """A number."""

    def change(field: ReaderField) -> None:
        field.parts[field.data[0]][0] = value

    return change


def spelled(text: str) -> Callable[[ReaderField], None]:
    """A string of the same length."""

    def change(field: ReaderField) -> None:
        field.parts[field.data[0]][:] = np.frombuffer(text.encode(), np.uint8)

    return change


def mlx(name: str = "config", **values: Any) -> Callable[[Artifact], Artifact]:
    """A JSON file of MLX's folder with other values."""
    return edited(f"model/{name}.json", lambda table: table.update(values))


def coreai(**values: Any) -> Callable[[Artifact], Artifact]:
    """What Core AI's folder says of the language model, with other values."""
    return edited("model/metadata.json", lambda table: table["language"].update(values))


def settings(**values: Any) -> Callable[[Artifact], Artifact]:
    """tokenizer_config.json of Core AI's folder with other values."""
    return edited("model/tokenizer/tokenizer_config.json", lambda table: table.update(values))


CORE_AI: tuple[Format, ...] = ("coreai", "coreai-ane")
ROWS = (
    Damage("tokenizer", ALL, files=damage.shift_tokenizer),
    Damage("artifact.json: another end token", ALL, files=described(eos_token_ids=[7])),
    Damage("config.json: another rope base", ("onnx-cpu", "litert", "coreml"), files=config(rope_theta=5e5)),
    Damage("config.json: other heads", ("onnx-npu", "gguf", "executorch-coreml"), files=config(num_key_value_heads=2)),
    Damage("config.json: eps 1e-2", ALL, files=config(rms_norm_eps=1e-2)),
    Damage("config.json: another begin token", ALL, files=config(bos_token_id=5)),
    Damage("artifact.json: eps 1e-2", ALL, files=described(rms_norm_eps=1e-2)),
    Damage("a score of the tokenizer", ALL, files=piece(score=-1e4)),
    Damage("a kind of the tokenizer", ALL, files=piece(type=5)),
    Damage("genai_config: another end token", ("onnx-genai",), files=model(eos_token_id=7)),
    Damage("genai_config: another begin token", ("onnx-genai",), files=model(bos_token_id=5)),
    Damage("genai_config: temperature 2", ("onnx-genai",), files=search(do_sample=True, temperature=2.0)),
    Damage("genai_config: other heads", ("onnx-genai",), files=decoder(num_key_value_heads=2)),
    Damage("attention scale", ("onnx-genai",), files=attributes("GroupQueryAttention", scale=0.18)),
    Damage("attention window", ("onnx-genai",), files=attributes("GroupQueryAttention", local_window_size=48)),
    Damage("eps of the norms", ("onnx-genai",), files=attributes("SkipSimplifiedLayerNormalization", epsilon=1e-5)),
    Damage("gguf: eps 1e-2", ("gguf",), files=gguf("llama.attention.layer_norm_rms_epsilon", to(1e-2))),
    Damage("gguf: rope base 5 %", ("gguf",), files=gguf("llama.rope.freq_base", to(10500))),
    Damage("gguf: another end token", ("gguf",), files=gguf("tokenizer.ggml.eos_token_id", to(7))),
    Damage("gguf: another tokenizer", ("gguf",), files=gguf("tokenizer.ggml.model", spelled("other"))),
    Damage("mlx: other kv heads", ("mlx",), files=mlx(num_key_value_heads=2)),
    Damage("mlx: eps 1e-2", ("mlx",), files=mlx(rms_norm_eps=1e-2)),
    Damage("mlx: rope base 5 %", ("mlx",), files=mlx(rope_theta=10500.0)),
    Damage("mlx: rope by half", ("mlx",), files=mlx(rope_scaling={"rope_type": "linear", "factor": 2.0})),
    Damage("mlx: a window", ("mlx",), files=mlx(sliding_window=200)),
    Damage("mlx: the head is the embedding", ("mlx",), files=mlx(tie_word_embeddings=True)),
    Damage("mlx: generation's end token", ("mlx",), files=mlx("generation_config", eos_token_id=[7])),
    Damage("mlx: another begin token", ("mlx",), files=mlx(bos_token_id=5)),
    Damage("mlx: bits of another width", ("mlx",), files=mlx(quantization={"group_size": 32, "bits": 2})),
    Damage("coreai: another tokenizer", CORE_AI, files=coreai(embedded_tokenizer=False)),
    Damage("coreai: one more end token", CORE_AI, files=settings(additional_special_tokens=["<s>"])),
    Damage("coreai: another end token", CORE_AI, files=settings(eos_token="<s>")),
    Damage("coreai: an end token by its words", CORE_AI, files=settings(im_end="<s>")),
    Damage("coreai: another begin token", CORE_AI, files=settings(bos_token="</s>")),
    Damage(
        "coreai: another checkpoint's", CORE_AI,
        files=edited("model/model.aimodel/metadata.json", lambda t: t["creatorDefinedMetadata"].update(quantized="")),
    ),
    Damage(
        "mlx: groups of 64", ("mlx",),
        files=edited("model/config.json", lambda table: table["quantization"].update(group_size=64)),
    ),
)  # fmt: skip
