"""Small artifacts of the phone formats, whole, and how they are read back: for `tests/support/readers`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from bluelm.errors import InputError
from bluelm.system.reading import read_bytes
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import MANIFEST, Artifact
from export.readback import read_back
from tests.support.checkpoints.shapes import write_checkpoint

SHAPE: dict[str, Any] = {
    "layers": 1,
    "hidden": 64,
    "inner": 64,
    "heads": 2,
    "kv_heads": 1,
    "vocab": 384,
    "layer_norm": False,
}
CONTEXT, CHUNK = 16, 8


def _onnx(quantized: QuantizedCheckpoint, folder: Path) -> None:
    from export.onnx import cpu

    cpu.export(quantized, folder, context=CONTEXT, chunk=CHUNK)


def _litert(quantized: QuantizedCheckpoint, folder: Path) -> None:
    from export.litert import export as litert

    litert.export(quantized, folder, context=CONTEXT, chunk=CHUNK)


def _coreml(quantized: QuantizedCheckpoint, folder: Path) -> None:
    from export.coreml import export as coreml

    coreml.export(quantized, folder, context=CONTEXT, chunk=CHUNK)


def _executorch(quantized: QuantizedCheckpoint, folder: Path) -> None:
    from export.executorch import xnnpack

    xnnpack.export(quantized, folder, context=CONTEXT, chunk=CHUNK)


MAKERS: dict[str, Callable[[QuantizedCheckpoint, Path], None]] = {
    "onnx": _onnx,
    "litert": _litert,
    "coreml": _coreml,
    "executorch": _executorch,
}


@cache
def artifact_files(kind: str) -> Mapping[str, bytes]:
    """An artifact of a model of one block in `a`, and the quantized checkpoint that it was made of in `q`."""
    from tests.support.checkpoints.rounded import rounded

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        made = rounded(folder / "q", source=write_checkpoint(folder / "m", **SHAPE), group_size=32)
        MAKERS[kind](made, folder / "a")
        paths = [p for name in ("a", "q") for p in sorted((folder / name).rglob("*")) if p.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def flattened() -> bytes:
    """A small folder as ExecuTorch's writer for Core ML flattens it: bytes, then the table of contents backwards."""
    files = {"metadata.json": b"{}", "weight.bin": bytes(range(256))}
    nodes: list[dict[str, Any]] = []
    start = 0
    for name, data in files.items():
        region = {"offset": start, "size": len(data)}
        nodes.append({"children": {}, "dataRegion": region, "kind": 0, "name": name})
        start += len(data)
    nothing = {"offset": 0, "size": 0}
    nodes.append({"children": {"weight.bin": 1}, "dataRegion": nothing, "kind": 1, "name": "模型"})
    children = {"metadata.json": 0, "模型": 2}
    nodes.append({"children": children, "dataRegion": nothing, "kind": 1, "name": "package"})
    return b"".join(files.values()) + json.dumps({"nodes": nodes}, ensure_ascii=False).encode()[::-1]


def read_flattened(path: Path) -> None:
    """Into a folder beside it."""
    from export.executorch.flattened import unflatten

    unflatten(read_bytes(path), path.parent / "out", path)


def read_artifact(folder: Path) -> None:
    """As `evaluate` and `bundle` do: opened, and held against its checkpoint.

    Whoever changes a file of an artifact writes its size anew.
    """
    manifest = folder / "a" / MANIFEST
    said = json.loads(manifest.read_bytes())
    for file in said["files"]:
        path = folder / "a" / file["path"]
        file["bytes"] = path.stat().st_size if path.is_file() else file["bytes"]
    manifest.write_text(json.dumps(said))
    found = read_back(Artifact.open(folder / "a"), QuantizedCheckpoint.open(folder / "q"))
    if found.wrong:
        raise InputError("; ".join(map(str, found.wrong[:3])), where=folder)
