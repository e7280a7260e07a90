"""Dimensity's NPU through ExecuTorch's NeuroPilot delegate, where MediaTek's own SDK is installed.

The SDK (`mtk_converter`, `mtk_neuron`) comes from MediaTek's portal alone. Without it every step says so; the CPU
runtimes of the target dimensity need none of it.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bluelm.config import ModelConfig
from bluelm.errors import TargetError, UnavailableError
from bluelm.files import atomic_folder
from bluelm.progress import Progress
from compress.recipe import Recipe
from compress.store import QuantizedCheckpoint
from export.artifact import Artifact
from export.embedding import write_embedding
from export.mobile_package import describe
from export.ranges import Ranges
from targets.legality import check_groups, check_lengths
from targets.runtime import Place
from targets.socs import Soc

PLATFORMS = ("mt6989", "mt6991", "mt6993")  # that ExecuTorch's delegate knows
SDK = ("mtk_converter", "mtk_neuron")
MODEL, EMBEDDING = "model.pte", "embedding.safetensors"
MASK_VALUE = -10000.0


@dataclass
class NeuropilotBackend:
    """Lowers to a .pte that the NPU of `soc` runs; refuses before any work where chip or SDK are missing."""

    soc: Soc | None = None
    needs_ranges = False
    place: Place = "device"

    def check(self, soc: Soc, config: ModelConfig, recipe: Recipe, context: int, chunk: int) -> None:
        check_lengths(config, context, chunk)
        check_groups(config, recipe)
        platform_of(soc)
        require_sdk()

    def lower(
        self,
        quantized: QuantizedCheckpoint,
        ranges: Ranges | None,
        folder: Path,
        context: int,
        chunk: int,
        progress: Progress | None,
    ) -> Artifact:
        require_sdk()
        assert self.soc is not None, "the registry fills the chip in"
        platform = platform_of(self.soc)
        from executorch.exir.backend.compile_spec_schema import CompileSpec

        from export import executorch_static as static

        # imported by name: the module itself imports MediaTek's SDK
        delegate: Any = importlib.import_module("executorch.backends.mediatek.partitioner")
        programs = static.trace(quantized, context=context, chunk=chunk)
        partitioners = {
            name: delegate.NeuropilotPartitioner(
                [
                    CompileSpec("platform-config", platform.encode()),
                    CompileSpec("ExtractSharedBlobKey", b"weights"),  # both methods share them
                ]
            )
            for name in programs
        }
        with atomic_folder(folder) as temporary:
            left = static.write(programs, partitioners, temporary / MODEL)
            write_embedding(temporary / EMBEDDING, quantized.embed())
            made = describe(
                temporary,
                "executorch-neuropilot",
                quantized,
                {MODEL: "model", EMBEDDING: "embedding"},
                context=context,
                chunk=chunk,
                kv_bits=32,
                mask_value=MASK_VALUE,
                producers={name: version(name) for name in ("executorch", *SDK)},
                notes=tuple(f"not on the NPU: {name}" for name in left),
            )
            made.model_copy(update={"soc": self.soc.id}).save(temporary)
        return Artifact.open(folder)

    def compile(self, artifact: Artifact, target: str, soc: Soc, folder: Path, progress: Progress | None) -> Artifact:
        return artifact


def platform_of(soc: Soc) -> str:
    """The delegate's name of a chip.

    Raises:
        TargetError: it knows no such chip.
    """
    if soc.id.lower() not in PLATFORMS:
        fix = f"name one of {', '.join(PLATFORMS)}, or --runtime executorch-xnnpack"
        raise TargetError(f"the NeuroPilot delegate does not know {soc.name}", fix=fix)
    return soc.id.lower()


def require_sdk() -> None:
    """UnavailableError unless MediaTek's modules are here."""
    missing = [name for name in SDK if importlib.util.find_spec(name) is None]
    if missing:
        raise UnavailableError(
            f"MediaTek's NeuroPilot SDK is not installed: {', '.join(missing)} not found",
            fix="install its wheels from MediaTek's portal, or use --runtime executorch-xnnpack or litert",
        )
