"""The pieces that readers of finished artifacts are made of, by known answers: arrays, trails, items, files beside."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sentencepiece import sentencepiece_model_pb2

from bluelm.checkpoint import Checkpoint
from bluelm.system.files import demo_checkpoint
from compress.checkpoint.quantized import QuantizedTensor
from export.litert.readback import _differences
from export.readback import beside, items
from export.readback.beside import config_faults
from export.readback.items import Finding
from export.readback.numbers import array_fault
from export.readback.trail import BEHIND, Trail

CONFIG = Checkpoint.open(demo_checkpoint()).config


@pytest.mark.parametrize(("found", "wanted", "told"), [
    (None, np.zeros(2), "is no constant"),
    (np.zeros(2, np.float32), np.zeros(2, np.float64), "float32 [2] instead of float64 [2]"),
    (np.zeros((2, 1)), np.zeros(2), "float64 [2, 1] instead of float64 [2]"),
    (np.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 4]]), ""),
    (np.array([[1, 2], [5, 4]]), np.array([[1, 2], [3, 6]]), "5 instead of 3 at [1, 0]; 2 of 4 differ"),
    (np.array(2, np.int8), np.array(3, np.int8), "2 instead of 3 at [0]; 1 of 1 differ"),
    (np.array([0.0, -0.0]), np.zeros(2), "-0 instead of 0 at [1]; 1 of 2 differ"),  # bits, not values
    (np.array([np.nan]), np.array([np.nan]), ""),
    (np.arange(6).reshape(2, 3).T, np.arange(6).reshape(3, 2), "3 instead of 1 at [0, 1]; 4 of 6 differ"),
    (np.array([1 / 3], np.float16), np.array([0.5], np.float16), "0.333251953 instead of 0.5 at [0]; 1 of 1 differ"),
])  # fmt: skip
def test_arrays_differ_by_type_shape_or_bits(found: np.ndarray | None, wanted: np.ndarray, told: str) -> None:
    assert array_fault(found, wanted) == told


def stand_in(**changes: Any) -> tuple[Any, Any]:
    """(artifact, quantized checkpoint) of one block, as far as items are concerned."""
    heads = {"block": SimpleNamespace(vectors=["model.layers.0.input_layernorm.weight", "model.layers.0.q.bias"]),
             "end": SimpleNamespace(vectors=["model.norm.weight"])}  # fmt: skip
    quantized = SimpleNamespace(
        linears={"model.layers.0.q": 1, "model.embed_tokens": 2, **changes.pop("linears", {})}, headers=heads,
        config=replace(CONFIG, num_layers=2),
    )  # fmt: skip
    return SimpleNamespace(record=SimpleNamespace(encodings=False), cache="float32", **changes), quantized


def test_an_inventory_names_everything() -> None:
    artifact, quantized = stand_in()
    whole = [
        "model.layers.0.q", "lm_head", "model.embed_tokens", "model.layers.0.input_layernorm.weight",
        "model.layers.0.q.bias", "model.norm.weight", "model.layers.0.input_layernorm epsilon", "model.norm epsilon",
        "model.layers.0 attention scale", "model.layers.1 attention scale", "rope", "context", "KV cache", "mask value",
        "operations", "metadata",
    ]  # fmt: skip
    assert items.inventory(artifact, quantized) == whole
    artifact.cache = "int8"
    assert items.inventory(artifact, quantized) == [*whole, "activation encodings"]
    artifact.cache, artifact.record.encodings = "float16", True
    assert items.inventory(artifact, quantized) == [*whole, "activation encodings"]
    _, own_head = stand_in(linears={"lm_head": 3})
    assert items.weight_names(own_head) == ["model.layers.0.q", "lm_head", "model.embed_tokens"]


def test_findings_are_right_wrong_or_untold() -> None:
    assert list(items.right("a", "b")) == [Finding("a", "right"), Finding("b", "right")]
    assert list(items.untold("why", "a", "b")) == [Finding("a", "untold", "why"), Finding("b", "untold", "why")]
    assert list(items.checked("a", [])) == [Finding("a")]
    assert list(items.checked("a", iter(["x", "y"]))) == [Finding("a", "wrong", "x"), Finding("a", "wrong", "y")]
    assert list(items.equal("a", 1, 1)) == [Finding("a")]
    assert list(items.equal("a", 1, 2)) == [Finding("a", "wrong", "1 instead of 2")]
    assert (str(Finding("a")), str(Finding("a", "wrong", "x"))) == ("a", "a: x")


def test_a_trail_keeps_what_was_met() -> None:
    artifact, quantized = stand_in()
    weight = QuantizedTensor(
        torch.ones(2, 4, dtype=torch.uint8), torch.ones(2, 1).half(), torch.full((2, 1), 8, dtype=torch.uint8), 4, 4
    )
    trail = Trail()
    trail.see("rope")
    trail.array("context", np.zeros(1), np.zeros(1))
    for fault in ("a", "b", "a", "c", "d", ""):
        trail.see("metadata", fault)
    trail.weight("lm_head", weight, weight)
    trail.weight("model.layers.0.q", replace(weight, codes=weight.codes + 1), weight)
    trail.array("mask value", np.zeros(1), np.ones(1))
    found = list(trail.findings(artifact, quantized))
    assert found == [
        Finding("rope"), Finding("context"), Finding("metadata", "wrong", "a"), Finding("metadata", "wrong", "b"),
        Finding("metadata", "wrong", "c"), Finding("lm_head"), Finding("model.layers.0.q", "wrong", "codes"),
        Finding("mask value", "wrong", "0 instead of 1 at [0]; 1 of 1 differ"),
    ]  # fmt: skip
    trail.see("operations", "Sin instead of Cos")
    left = list(trail.findings(artifact, quantized))[len(found) :]
    met = {finding.item for finding in found}
    rest = [item for item in items.inventory(artifact, quantized) if item not in {*met, "operations"}]
    assert left == [Finding("operations", "wrong", "Sin instead of Cos"), *(Finding(i, "untold", BEHIND) for i in rest)]
    assert "KV cache" in rest


def test_fields_of_a_config_that_are_others() -> None:
    assert not list(config_faults(CONFIG, CONFIG))
    other = replace(CONFIG, rms_norm_eps=1e-3, num_kv_heads=1)
    heads = f"num_kv_heads is 1 instead of {CONFIG.num_kv_heads}"
    assert list(config_faults(other, CONFIG)) == [heads, f"rms_norm_eps is 0.001 instead of {CONFIG.rms_norm_eps}"]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """An artifact's and its checkpoint's, with config.json and tokenizer.model alike."""
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "tokenizer.model"):
            shutil.copy(demo_checkpoint() / file, tmp_path / name)
    return tmp_path / "mine", tmp_path / "theirs"


def told(mine: Path, theirs: Path, digest: str = "d", heads: int = CONFIG.num_kv_heads) -> list[str]:
    """What is wrong beside the program."""
    model = replace(CONFIG, num_kv_heads=heads)
    artifact: Any = SimpleNamespace(
        model=model, quantized_digest=digest, folder=mine, paths=lambda role: [], record=SimpleNamespace(made=())
    )
    quantized: Any = SimpleNamespace(config=CONFIG, digest=lambda: "d", folder=theirs)
    found = list(beside.findings(artifact, quantized))
    assert {finding.item for finding in found} >= {"artifact.json", "config.json", "tokenizer.model", "tokenizer.json"}
    return [str(finding) for finding in found if finding.state == "wrong"]


def test_what_lies_beside_is_the_checkpoints(folders: tuple[Path, Path]) -> None:
    mine, theirs = folders
    assert told(mine, theirs) == []
    assert told(mine, theirs, "e") == ["artifact.json: quantized_digest is that of another quantized checkpoint"]
    assert told(mine, theirs, heads=1) == [f"artifact.json: num_kv_heads is 1 instead of {CONFIG.num_kv_heads}"]
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps({**config, "bos_token_id": True, "new": None}))
    assert told(mine, theirs) == [
        "config.json: bos_token_id is true instead of 1", 'config.json: new is null instead of "nothing"'
    ]  # fmt: skip
    (mine / "config.json").write_text("[")
    (fault,) = told(mine, theirs)
    assert fault.startswith("config.json: cannot be read: ")


def test_pieces_scores_and_kinds_are_the_checkpoints(folders: tuple[Path, Path]) -> None:
    mine, theirs = folders
    path, sound = mine / "tokenizer.model", (theirs / "tokenizer.model").read_bytes()

    def changed(change: Any) -> list[str]:
        model: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
        model.ParseFromString(sound)
        change(model)
        path.write_bytes(model.SerializeToString())
        return told(mine, theirs)

    original: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    original.ParseFromString(sound)
    piece = original.pieces[9]
    was = f"{piece.piece!r} (score {piece.score:g}, kind {piece.type})"
    assert changed(lambda model: None) == []
    for field, value, shown in [
        ("piece", "x", f"'x' (score {piece.score:g}, kind {piece.type})"),
        ("score", -7.5, f"{piece.piece!r} (score -7.5, kind {piece.type})"),
        ("type", 4, f"{piece.piece!r} (score {piece.score:g}, kind 4)"),
    ]:
        found = changed(lambda model, field=field, value=value: setattr(model.pieces[9], field, value))
        assert found == [f"tokenizer.model: piece 9 is {shown} instead of {was}"]
    count = len(original.pieces)
    assert changed(lambda model: model.pieces.pop()) == [f"tokenizer.model: {count - 1} pieces instead of {count}"]
    assert changed(lambda model: setattr(model.trainer_spec, "unk_id", 5)) == [
        "tokenizer.model: the pieces are the checkpoint's, what it says of itself is not"
    ]
    path.write_bytes(b"\xff")
    assert told(mine, theirs) == ["tokenizer.model: is not the checkpoint's, byte for byte"]
    path.unlink()
    assert told(mine, theirs) == ["tokenizer.model: is missing"]
    path.write_bytes(sound)
    (mine / "added_tokens.json").write_text("{}")
    assert told(mine, theirs) == ["added_tokens.json: the checkpoint has no such file"]
    (theirs / "added_tokens.json").write_text("{} ")
    assert told(mine, theirs) == ["added_tokens.json: is not the checkpoint's, byte for byte"]


class Node:
    """As the objects of a FlatBuffer's schema: what they hold is in their __dict__."""

    def __init__(self, **held: Any) -> None:
        self.__dict__.update(held)


def test_trees_differ_at_places() -> None:
    wanted = Node(name=b"x", sizes=np.array([1, 2]), parts=[Node(at=1), Node(at=2)], bare=None)

    def told(**changes: Any) -> list[tuple[str, str]]:
        return list(_differences(Node(**{**vars(wanted), **changes}), wanted, ""))

    assert told() == []
    assert told(name=b"y", sizes=np.array([1, 3])) == [
        ("name", "b'y' instead of b'x'"), ("sizes", "[1, 3] instead of [1, 2]")
    ]  # fmt: skip
    assert told(parts=[Node(at=1), Node(at=5)]) == [("parts[1].at", "5 instead of 2")]
    assert told(parts=[Node(at=4)]) == [("parts", "1 instead of 2"), ("parts[0].at", "4 instead of 1")]
    assert told(bare=[1]) == [("bare", "[1] instead of None")]
    assert [place for place, _ in told(parts=None)] == ["parts"]
    assert list(_differences(Node(a=Node(b=1)), Node(a=Node(b=2)), "top")) == [("top.a.b", "1 instead of 2")]
    (long,) = told(name=b"z" * 100)
    assert long[1].startswith("b'zzz") and len(long[1]) == 60 + len(" instead of b'x'")
