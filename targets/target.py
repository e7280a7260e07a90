"""A target: a chip and the runtime that an artifact is made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bluelm.config import ModelConfig
from bluelm.system.progress import Progress
from compress.checkpoint.store import QuantizedCheckpoint
from compress.recipe import Recipe
from export.artifacts.artifact import Artifact, Format
from export.formats import Numbers, record
from export.lowering.ranges import Ranges
from targets.backend import Backend, LoweringJob
from targets.memory import check_memory
from targets.runtime import Place, natural
from targets.socs import Soc


@dataclass(frozen=True)
class Target:
    """What `--target` and `--soc` name; `targets/registry.py` finds it.

    Attributes:
        kv_bits: width of the KV cache's numbers.
        float_bits: of activations that are floats of a choice.
        device_ram_gb: RAM of the phones that it must run on; None: not checked.
    """

    name: str
    soc: Soc
    runtime: Format
    backend: Backend
    kv_bits: Numbers
    float_bits: Numbers = 16
    device_ram_gb: float | None = None

    @property
    def needs_ranges(self) -> bool:
        """Whether lowering needs activation ranges."""
        when = record(self.runtime).ranges
        return when == "always" or (when == "for an 8-bit cache" and self.kv_bits == 8)

    @property
    def default_on(self) -> Place:
        """Where `open_runtime` runs its artifacts here."""
        return natural(self.runtime)

    def check(self, config: ModelConfig, recipe: Recipe, context: int = 512, chunk: int = 128) -> None:
        """Whether the target can hold and run the model, before any work.

        Raises:
            TargetError: it cannot; says why, and what would work.
            InputError: context or chunk make no sense for the model.
        """
        self.backend.check(self.soc, config, recipe, context, chunk)
        if self.device_ram_gb is not None:
            check_memory(config, recipe, context, chunk, self.kv_bits, self.device_ram_gb)

    def check_tokenizer(self, folder: Path, config: ModelConfig) -> None:
        """Whether the runtime's files can hold the tokenizer of a checkpoint's folder, before any work.

        Raises:
            TargetError: they cannot. InputError: it is damaged, or of another model.
        """
        self.backend.check_tokenizer(folder, config)

    def lower(
        self,
        quantized: QuantizedCheckpoint,
        ranges: Ranges | None,
        folder: Path,
        *,
        context: int = 512,
        chunk: int = 128,
        about: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> Artifact:
        """Write the graphs into a new `folder`; `ranges` where `needs_ranges`."""
        job = LoweringJob(
            quantized, ranges, folder, context, chunk, progress, self.soc, self.kv_bits, self.float_bits, about or {}
        )
        return self.backend.lower(job)

    def compile(self, artifact: Artifact, folder: Path, progress: Progress | None = None) -> Artifact:
        """Compile for the chip into a new `folder`; where there is nothing to compile, the artifact as it is.

        Raises:
            TargetError: the vendor's compiler refuses.
            UnavailableError: it is not installed.
        """
        return self.backend.compile(artifact, self.name, self.soc, folder, progress)
