"""What a damage is, and how an artifact comes to have it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

from bluelm.checkpoint import Checkpoint
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact, Format
from export.formats import record
from pipeline.judge import judging
from targets import runtime as runtimes
from targets.registry import find
from targets.runtime import Runtime

ALL: tuple[Format, ...] = (
    "onnx-cpu", "onnx-genai", "litert", "gguf", "coreml", "onnx-npu", "executorch-xnnpack", "executorch-coreml",
    "qnn-context", "executorch-qnn", "mlx", "litert-lm", "coreai",
    "coreai-ane", "onnx-npu-genai",
)  # fmt: skip
COMPILED: tuple[Format, ...] = ("qnn-context", "executorch-qnn")


@dataclass(frozen=True)
class Damage:
    """One damage, and where it is done; several rows may have the same name and other formats.

    Attributes:
        name: words that tables and folders show.
        formats: of the artifacts that it is done to.
        source: gives another checkpoint to the exporter than the one that the artifact is held against.
        exporting: surrounds the export.
        files: changes a copy of the finished artifact where it lies, and gives it back with what it is now.
        before: the same for the onnx-npu artifact that a compiled one is made of, before it is compiled.
        run: stands for a graph that cannot be cut into: the runtime that is judged in its place.
    """

    name: str
    formats: tuple[Format, ...]
    source: Callable[[QuantizedCheckpoint, Checkpoint], QuantizedCheckpoint] | None = None
    exporting: Callable[[], AbstractContextManager[Any]] | None = None
    files: Callable[[Artifact], Artifact] | None = None
    before: Callable[[Artifact], Artifact] | None = None
    run: Callable[[Runtime], Runtime] | None = None


class Bench(Protocol):
    """Where artifacts are made and lie, each in `<place of its name>/<format>`."""

    @property
    def quantized(self) -> QuantizedCheckpoint:
        """What artifacts are held against."""
        ...

    @property
    def checkpoint(self) -> Checkpoint:
        """What it was made of."""
        ...

    def artifact(self, kind: Format, source: QuantizedCheckpoint, name: str) -> Artifact:
        """The artifact of `source` below `name`, made if need be; a compiled one beside what it is made of."""
        ...

    def place(self, name: str) -> Path:
        """The folder that holds artifacts of this name."""
        ...


def sound(bench: Bench, kind: Format) -> Artifact:
    """The artifact without damage, made once."""
    return bench.artifact(kind, bench.quantized, "none")


def damaged(bench: Bench, kind: Format, damage: Damage) -> Artifact:
    """An artifact with the damage, in a folder of its own."""
    name = damage.name.replace(" ", "-")
    if damage.run is not None:
        return sound(bench, kind)
    if damage.files is None and damage.before is None:
        source = damage.source(bench.quantized, bench.checkpoint) if damage.source else bench.quantized
        with damage.exporting() if damage.exporting else nullcontext():
            return bench.artifact(kind, source, name)
    folder = bench.place(name)
    compiled_from = record(kind).compiled_from
    for made in (kind, compiled_from):
        shutil.rmtree(folder / str(made), ignore_errors=True)
    if compiled_from is not None:  # it lies beside
        first = copied(sound(bench, compiled_from), folder / compiled_from)
        if damage.before is not None:
            return find("snapdragon", runtime=kind).compile(damage.before(first), folder / kind)
    change = damage.files
    assert change is not None, f"{damage.name} is done before compiling, and {kind} is not compiled"
    return change(copied(sound(bench, kind), folder / kind))


def copied(artifact: Artifact, folder: Path) -> Artifact:
    """The same artifact in another folder, to be damaged."""
    shutil.copytree(artifact.folder, folder)
    return Artifact.open(folder)


@contextmanager
def judged_as(damage: Damage | None) -> Iterator[None]:
    """Judging meets the damage's runtimes in place of the artifact's."""
    change = damage.run if damage else None
    if change is None:
        yield
        return
    opened = runtimes.open_runtime
    with patch.object(judging, "open_runtime", lambda *a, **k: change(opened(*a, **k))):
        yield
