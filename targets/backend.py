"""The interface of a runtime's backend, and what most backends have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypedDict

from bluelm.config import ModelConfig
from bluelm.system.progress import Progress
from compress.checkpoint.store import QuantizedCheckpoint
from compress.recipe import Recipe
from export.artifacts.artifact import Artifact
from export.formats import Numbers
from export.lowering.ranges import Ranges
from targets.legality import check_groups, check_lengths
from targets.socs import Soc


class Sized(TypedDict):
    """What the exporters of every runtime that chooses the width of its cache take."""

    context: int
    chunk: int
    kv_bits: Numbers
    progress: Progress | None


@dataclass(frozen=True)
class LoweringJob:
    """What is lowered into a new `folder`: steps of `chunk` tokens and of one, over a cache of `context` tokens.

    Attributes:
        ranges: of the activations, where the format needs them.
        soc: the chip that it is for.
        kv_bits: width of the KV cache's numbers. float_bits: of activations that are floats of a choice.
        about: what files say of the model: `name`, `license`, `version`, where they are known.
    """

    quantized: QuantizedCheckpoint
    ranges: Ranges | None
    folder: Path
    context: int
    chunk: int
    progress: Progress | None
    soc: Soc
    kv_bits: Numbers
    float_bits: Numbers = 16
    about: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def sized(self) -> Sized:
        """As keyword arguments of an exporter."""
        return Sized(context=self.context, chunk=self.chunk, kv_bits=self.kv_bits, progress=self.progress)


class Backend(Protocol):
    """Legality, lowering, compiling for one runtime; what may be chosen stands in its `Record`."""

    def check(self, soc: Soc, config: ModelConfig, recipe: Recipe, context: int, chunk: int) -> None: ...

    def check_tokenizer(self, folder: Path, config: ModelConfig) -> None: ...

    def lower(self, job: LoweringJob) -> Artifact: ...

    def compile(
        self, artifact: Artifact, target: str, soc: Soc, folder: Path, progress: Progress | None
    ) -> Artifact: ...


class Uncompiled:
    """The part of a backend whose runtime takes what was lowered as it is, or compiles it on the phone."""

    def check(self, soc: Soc, config: ModelConfig, recipe: Recipe, context: int, chunk: int) -> None:
        """Lengths and groups that suit the model; a backend adds its own rules."""
        check_lengths(config, context, chunk)
        check_groups(config, recipe)

    def check_tokenizer(self, folder: Path, config: ModelConfig) -> None:
        """Nothing: its files hold no tokenizer of their own."""

    def compile(self, artifact: Artifact, target: str, soc: Soc, folder: Path, progress: Progress | None) -> Artifact:
        return artifact
