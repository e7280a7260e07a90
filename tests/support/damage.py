"""Damage done on purpose: to the checkpoint that an exporter is given, to a finished artifact, or to how it is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import helper, numpy_helper
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor

from bluelm.checkpoint import Checkpoint
from compress.checkpoint.pieces import Piece, write_piece
from compress.checkpoint.quantized import OrderedWeight, QuantizedTensor
from compress.checkpoint.store import EMBED, QuantizedCheckpoint
from compress.methods.grid import choose_grid
from export.artifacts.artifact import Artifact, list_files
from targets.runtime import Runtime, RuntimeBase
from tests.support.checkpoints.shapes import LINEARS

LAYER = 1
T = TypeVar("T")
Change = Callable[[str, QuantizedTensor], QuantizedTensor]
ChangeVector = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Changed(QuantizedCheckpoint):
    """A quantized checkpoint some of whose weights are others than its files say."""

    change: Change | None = None
    vectors: ChangeVector | None = None

    @staticmethod
    def of(
        whole: QuantizedCheckpoint, change: Change | None = None, vectors: ChangeVector | None = None, **config: Any
    ) -> Changed:
        """On top of the changes that `whole` has already."""
        held = {field.name: getattr(whole, field.name) for field in fields(QuantizedCheckpoint)}
        held["config"] = replace(whole.config, **config)
        before = whole if isinstance(whole, Changed) else Changed(**held)
        return Changed(**held, change=_both(before.change, change), vectors=_both(before.vectors, vectors))

    def ordered(self, name: str) -> OrderedWeight:
        found = super().ordered(name)
        return found if self.change is None else replace(found, weight=self.change(name, found.weight))

    def vector(self, name: str) -> Tensor:
        found = super().vector(name)
        return found if self.vectors is None else self.vectors(name, found)

    def block(self, index: int) -> dict[str, Tensor]:
        at = f"model.layers.{index}"
        block = super().block(index)
        for name in block:
            linear = name.removesuffix(".weight")
            block[name] = (
                self.linear(f"{at}.{linear}").dequantize() if linear in LINEARS else self.vector(f"{at}.{name}")
            )
        return block


def _both(first: Callable[[str, T], T] | None, second: Callable[[str, T], T] | None) -> Callable[[str, T], T] | None:
    """One change behind the other."""
    if first is None or second is None:
        return first or second
    return lambda name, value: second(name, first(name, value))


def scales(whole: QuantizedCheckpoint, layer: int = LAYER) -> QuantizedCheckpoint:
    """One block's scales times 1.05, rounded to what every format holds."""

    def change(name: str, tensor: QuantizedTensor) -> QuantizedTensor:
        if not name.startswith(f"model.layers.{layer}."):
            return tensor
        return replace(tensor, scales=(tensor.scales.float() * 1.05).bfloat16().half())

    return Changed.of(whole, change)


def heads(whole: QuantizedCheckpoint, layer: int = LAYER) -> QuantizedCheckpoint:
    """The first two query heads of one block in each other's place."""
    size = whole.config.head_dim

    def change(name: str, tensor: QuantizedTensor) -> QuantizedTensor:
        if name != f"model.layers.{layer}.self_attn.q_proj":
            return tensor
        order = [*range(size, 2 * size), *range(size), *range(2 * size, tensor.shape[0])]
        return replace(tensor, codes=tensor.codes[order], scales=tensor.scales[order], zeros=tensor.zeros[order])

    return Changed.of(whole, change)


def rope(whole: QuantizedCheckpoint, factor: float = 50.0) -> QuantizedCheckpoint:
    """Rope frequencies of a base `factor` times the model's."""
    return Changed.of(whole, rope_theta=whole.config.rope_theta * factor)


def layer_norm(whole: QuantizedCheckpoint, checkpoint: Checkpoint) -> QuantizedCheckpoint:
    """The embedding table as it is in the float checkpoint, its LayerNorm left out."""
    raw = checkpoint.tensor("model.embed_tokens.weight")

    def change(name: str, tensor: QuantizedTensor) -> QuantizedTensor:
        return choose_grid(raw, tensor.bits, -1, True).nearest(raw) if name == EMBED else tensor

    return Changed.of(whole, change)


def unquantized(whole: QuantizedCheckpoint, checkpoint: Checkpoint, layer: int = LAYER) -> QuantizedCheckpoint:
    """A matrix that was left as it was, as near to it as every format can hold: 8 bits a row."""
    at = f"model.layers.{layer}.mlp.down_proj"
    raw = checkpoint.tensor(f"{at}.weight")

    def change(name: str, tensor: QuantizedTensor) -> QuantizedTensor:
        return choose_grid(raw, 8, -1, True).nearest(raw) if name == at else tensor

    return Changed.of(whole, change)


def written(hurt: QuantizedCheckpoint, folder: Path) -> QuantizedCheckpoint:
    """A changed checkpoint in files, under the manifest of the sound one: damage is what nobody wrote down."""
    shutil.copytree(hurt.folder, folder)
    (folder / "config.json").write_text(json.dumps(hurt.config.to_dict()), encoding="utf-8")
    for file, header in hurt.headers.items():
        linears = {name: hurt.linear(name) for name in header.linears}
        vectors = {name: hurt.vector(name) for name in header.vectors}
        write_piece(folder / file, Piece(linears, vectors, header.notes), header.fingerprint)
    return QuantizedCheckpoint.open(folder)


def shift_tokenizer(artifact: Artifact) -> Artifact:
    """Every ordinary piece under the number of the one before it, in each of the tokenizer's files."""
    path = artifact.folder / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(path.read_bytes())
    ordinary = [i for i, piece in enumerate(model.pieces) if piece.type == 1]
    texts = [(model.pieces[i].piece, model.pieces[i].score) for i in ordinary]
    moved = dict(zip(ordinary, texts[1:] + texts[:1], strict=True))
    for i, (text, score) in moved.items():
        model.pieces[i].piece, model.pieces[i].score = text, score
    path.write_bytes(model.SerializeToString())
    table = artifact.folder / "tokenizer.json"
    if table.is_file():  # made of it for the format's runner
        data = json.loads(table.read_text(encoding="utf-8"))
        data["model"]["vocab"] |= {text: i for i, (text, _) in moved.items() if text in data["model"]["vocab"]}
        table.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return again(artifact)


def forget_cache(artifact: Artifact) -> Artifact:
    """A decode graph of onnx-cpu or onnx-npu whose cached keys and values are next to nothing.

    past -> Mul(past, 1e-12), or its scale in DequantizeLinear(past, scale) -> 1e-12.
    """
    path = artifact.path("decode")
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer.append(numpy_helper.from_array(np.array(1e-12, np.float32), "nothing"))
    past = [value.name for value in model.graph.input if value.name.startswith("past_")]
    for node in list(model.graph.node):
        if node.op_type == "DequantizeLinear" and node.input[0] in past:
            node.input[1] = "nothing"
            continue
        for index, name in enumerate(node.input):
            if name in past:
                node.input[index] = f"{name}.forgotten"
                if not any(f"{name}.forgotten" in other.output for other in model.graph.node):
                    mul = helper.make_node("Mul", [name, "nothing"], [f"{name}.forgotten"])
                    model.graph.node.insert(0, mul)
    onnx.save(model, path)
    return again(artifact)


def float_matrix(artifact: Artifact, checkpoint: Checkpoint) -> Artifact:
    """One matrix of an onnx-cpu artifact as float32, in both graphs: MatMulNBits -> MatMul."""
    name = f"model.layers.{LAYER}.mlp.down_proj"
    weight = checkpoint.tensor(f"{name}.weight").T.contiguous().numpy()
    (artifact.folder / "more.bin").write_bytes(weight.tobytes())
    for role in ("prefill", "decode"):
        model = onnx.load(artifact.path(role), load_external_data=False)
        for index, node in enumerate(model.graph.node):
            if node.op_type == "MatMulNBits" and node.input[1] == f"{name}.codes":
                matmul = helper.make_node("MatMul", [node.input[0], name], list(node.output), name=node.name)
                model.graph.node.remove(node)
                model.graph.node.insert(index, matmul)
                break
        tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=weight.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "more.bin"), ("offset", "0"), ("length", str(weight.nbytes))):
            tensor.external_data.add(key=key, value=value)
        model.graph.initializer.append(tensor)
        onnx.save(model, artifact.path(role))
    return again(artifact, {"more.bin": "weights"})


def again(artifact: Artifact, more: dict[str, str] | None = None) -> Artifact:
    """artifact.json with the sizes and hashes that the files have now."""
    roles = {file.path: file.role for file in artifact.files} | (more or {})
    artifact.model_copy(update={"files": list_files(artifact.folder, roles)}).save(artifact.folder)
    return Artifact.open(artifact.folder)


class Forgetful(RuntimeBase):
    """A runtime whose decode begins anew with every token, for formats whose decode graph cannot be cut into."""

    def __init__(self, inner: Runtime) -> None:
        self._inner, self._tokens = inner, list[int]()
        self.name, self.vocab_size, self.context = inner.name, inner.vocab_size, inner.context

    def reset(self) -> None:
        self._inner.reset()
        self._tokens = []

    def rewind(self, held: int) -> None:
        before = self._tokens[:held]
        self.reset()
        if before:
            self.prefill(before)

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        self._tokens += tokens
        return self._inner.prefill(tokens)

    def decode(self, token: int) -> np.ndarray:
        self._tokens.append(token)
        self._inner.reset()
        return self._inner.decode(token)

    def close(self) -> None:
        self._inner.close()
