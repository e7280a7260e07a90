"""Damage to what Qualcomm's compiler is given and gives: binaries, wrappers, methods."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from export.artifacts.artifact import MANIFEST, Artifact, list_files, source_of
from tests.support.damages.record import COMPILED, Damage

Change = Callable[[Artifact], None]


def relisted(artifact: Artifact) -> Artifact:
    """The same, its artifact.json listing every file as it is now."""
    about = Artifact.model_validate_json((artifact.folder / MANIFEST).read_text())
    files = list_files(artifact.folder, {file.path: file.role for file in about.files})
    about.model_copy(update={"files": files}).save(artifact.folder)
    return Artifact.open(artifact.folder)


def decode_names_prefill(artifact: Artifact) -> None:
    """The decode wrapper asks for the prefill graph."""
    wrapper, other = (onnx.load(artifact.path(role), load_external_data=False) for role in ("decode", "prefill"))
    wrapper.graph.node[0].CopyFrom(other.graph.node[0])
    onnx.save(wrapper, artifact.path("decode"))


def cut_wrapper(artifact: Artifact) -> None:
    """A wrapper ends in its middle."""
    artifact.path("prefill").write_bytes(artifact.path("prefill").read_bytes()[:200])


def prefill_alone(artifact: Artifact) -> None:
    """The shipped binary is one that holds prefill alone."""
    alone = next(path for path in artifact.paths("simulator-context") if "prefill" in path.name)
    shutil.copyfile(alone, artifact.path("context"))


def other_chip(artifact: Artifact) -> None:
    """artifact.json says another chip than the files are for."""
    artifact.model_copy(update={"soc": "SM8750"}).save(artifact.folder)


def other_encoding(artifact: Artifact) -> None:
    """The ONNX graphs write keys with another scale than what was compiled of them."""
    source = source_of(artifact)
    model = onnx.load(source.path("decode"), load_external_data=False)
    node = next(node for node in model.graph.node if node.output[0] == "keys.1")
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.01), scale.name))
    onnx.save(model, source.path("decode"))
    relisted(source)


def drawn_anew(role: str) -> Change:
    """A 64th of the file of a role, from its middle on, is random: the head's codes, where they are that many."""

    def change(artifact: Artifact) -> None:
        path = artifact.path(role)
        content = bytearray(path.read_bytes())
        start, count = len(content) // 2, len(content) // 64
        content[start : start + count] = np.random.default_rng(0).bytes(count)
        path.write_bytes(content)

    return change


def decode_is_prefill(artifact: Artifact) -> None:
    """The list of methods calls prefill for decode."""
    path: Path = artifact.path("methods")
    methods = json.loads(path.read_text())
    path.write_text(json.dumps(methods | {"decode": methods["prefill"]}))


def _row(name: str, change: Change, *formats: str) -> Damage:
    def files(artifact: Artifact) -> Artifact:
        change(artifact)
        return relisted(artifact)

    return Damage(name, tuple(kind for kind in COMPILED if kind in formats), files=files)


ROWS: tuple[Damage, ...] = (
    _row("decode wrapper names prefill", decode_names_prefill, "qnn-context"),
    _row("wrapper cut", cut_wrapper, "qnn-context"),
    _row("decode missing in what ships", prefill_alone, "qnn-context"),
    _row("for another chip", other_chip, *COMPILED),
    _row("another encoding than was compiled", other_encoding, *COMPILED),
    _row("codes drawn anew in what ships", drawn_anew("context"), "qnn-context"),
    _row("codes drawn anew in the program", drawn_anew("model"), "executorch-qnn"),
    _row("decode method is prefill", decode_is_prefill, "executorch-qnn"),
)
