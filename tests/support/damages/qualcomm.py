"""Damage to what Qualcomm's compiler is given and gives: binaries, wrappers, methods."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import ModelProto, external_data_helper, numpy_helper

from bluelm.system.files import sha256
from export.artifacts.artifact import MANIFEST, Artifact, list_files, source_of
from targets.qualcomm.border import binary_of
from targets.registry import find
from tests.support.damages.onnx_edits import edited, tensor
from tests.support.damages.record import COMPILED, Damage, copied

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


def weak_decode_column(artifact: Artifact) -> None:
    """The decode that runs here is compiled of a graph with other codes in one column, and no file tells."""
    source = source_of(artifact)
    with TemporaryDirectory() as scratch:
        other = edited(copied(source, Path(scratch) / source.folder.name), "decode", _weak_column)
        made = find("snapdragon", runtime=artifact.format).compile(other, Path(scratch) / "compiled")
        changed = [str(path.relative_to(made.folder)) for path in _decode_files(made)]
        for path in changed:
            shutil.copyfile(made.folder / path, artifact.folder / path)
    assert artifact.given is not None
    digests = artifact.given.made | {path: sha256(artifact.folder / path) for path in changed}
    artifact.model_copy(update={"given": artifact.given.model_copy(update={"made": digests})}).save(artifact.folder)


def _decode_files(artifact: Artifact) -> list[Path]:
    """What of an artifact runs decode here; an ExecuTorch program holds prefill too."""
    if artifact.format == "executorch-qnn":
        return [artifact.path("model"), artifact.path("methods")]
    wrappers = artifact.paths("simulator-decode")
    return [*wrappers, *(path for path in map(binary_of, wrappers) if path is not None)]


def _weak_column(model: ModelProto, folder: Path) -> None:
    """Draw anew the codes of the first block's down_proj at the input that its gate and weights let count least."""
    external_data_helper.load_external_data_for_model(model, str(folder))

    def weight(name: str) -> np.ndarray:
        """float32 [in, out]."""
        codes, scales = (
            numpy_helper.to_array(tensor(model, f"model.layers.0.mlp.{name}.{part}")).astype(np.float32)
            for part in ("codes", "scales")
        )
        return codes * np.repeat(scales, len(codes) // len(scales), axis=0)

    gate, up, down = (weight(f"{name}_proj") for name in ("gate", "up", "down"))
    reach = np.linalg.norm(gate, axis=0) * np.linalg.norm(up, axis=0) * np.linalg.norm(down, axis=1)
    codes = tensor(model, "model.layers.0.mlp.down_proj.codes")
    content = np.frombuffer(codes.raw_data, np.uint8).reshape(len(down), -1).copy()  # a row an input
    content[reach.argmin()] = np.random.default_rng(0).integers(0, 256, content.shape[1])
    codes.raw_data = content.tobytes()


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
    _row("weak column of down_proj in decode", weak_decode_column, *COMPILED),
)
