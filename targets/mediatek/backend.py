"""Dimensity's NPU through ExecuTorch's NeuroPilot delegate, where MediaTek's own SDK is installed.

The SDK (`mtk_converter`, `mtk_neuron`) comes from MediaTek's portal alone. Without it every step says so; the CPU
runtimes of the target dimensity need none of it.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from bluelm.config import ModelConfig
from bluelm.errors import TargetError
from bluelm.system.files import atomic_folder
from compress.recipe import Recipe
from export.artifacts.artifact import Artifact
from export.artifacts.mobile import MODEL, complete_steps
from targets.backend import LoweringJob, Uncompiled
from targets.socs import Soc
from targets.tools import require

PLATFORMS = ("mt6989", "mt6991", "mt6993")  # that ExecuTorch's delegate knows
SDK = ("mtk_converter", "mtk_neuron")
MASK_VALUE = -10000.0


class NeuropilotBackend(Uncompiled):
    """Lowers to a .pte that the NPU of a chip runs; refuses before any work where chip or SDK are missing."""

    def check(self, soc: Soc, config: ModelConfig, recipe: Recipe, context: int, chunk: int) -> None:
        super().check(soc, config, recipe, context, chunk)
        platform_of(soc)
        require_sdk()

    def lower(self, job: LoweringJob) -> Artifact:
        require_sdk()
        platform = platform_of(job.soc)
        from executorch.exir.backend.compile_spec_schema import CompileSpec

        from export.executorch import static

        # imported by name: the module itself imports MediaTek's SDK
        delegate: Any = importlib.import_module("executorch.backends.mediatek.partitioner")
        programs = static.trace(job.quantized, context=job.context, chunk=job.chunk)
        partitioners = {
            name: delegate.NeuropilotPartitioner(
                [
                    CompileSpec("platform-config", platform.encode()),
                    CompileSpec("ExtractSharedBlobKey", b"weights"),  # both methods share them
                ]
            )
            for name in programs
        }
        with atomic_folder(job.folder) as temporary:
            left = static.write(programs, partitioners, temporary / MODEL)
            made = complete_steps(
                temporary,
                "executorch-neuropilot",
                job.quantized,
                context=job.context,
                chunk=job.chunk,
                mask_value=MASK_VALUE,
                producers=("executorch", *SDK),
                notes=tuple(f"not on the NPU: {name}" for name in left),
            )
            made.model_copy(update={"soc": job.soc.id}).save(temporary)
        return Artifact.open(job.folder)


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
    require(*SDK, otherwise="use --runtime executorch-xnnpack or litert")
