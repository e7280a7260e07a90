"""The model of a run: a float checkpoint, adapters merged in, or one that is quantized already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bluelm.adapters import adapted
from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError, TargetError
from bluelm.system.files import demo_checkpoint
from bluelm.system.progress import Progress
from calibration.samples import Samples
from compress import engine
from compress.checkpoint.store import QuantizedCheckpoint
from compress.fit import check
from compress.formats.adopt import adopt, given_recipe, scattered
from compress.formats.packed import PackedCheckpoint, open_weights
from compress.recipe import Recipe
from export.formats import record, records

CHOOSES_CODES = frozenset({"method", "bits", "auto", "group_size", "symmetric", "refine", "rotate", "size", "max_kl"})


@dataclass(frozen=True)
class Source:
    """An opened model, and the recipe of the codes that it will have or has."""

    checkpoint: Checkpoint
    recipe: Recipe

    @property
    def given(self) -> str | None:
        """The layout of a checkpoint that is quantized already."""
        return self.checkpoint.layout.name if isinstance(self.checkpoint, PackedCheckpoint) else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know of the model before believing a result."""
        if self.given is None:
            return self.checkpoint.warnings
        return (
            *self.checkpoint.warnings,
            f"the codes are the checkpoint's own ({self.given}): figures compare the artifact with it, and do not "
            "show what its quantizer lost",
        )

    def check_runtime(self, runtime: str) -> None:
        """TargetError if the runtime cannot hold the checkpoint's codes in their order."""
        if isinstance(self.checkpoint, PackedCheckpoint) and not record(runtime).reorders:
            names = scattered(self.checkpoint)
            if names:
                able = [kind.name for kind in records().values() if kind.reorders is True]
                raise TargetError(
                    f"act-order scattered the groups of {len(names)} linears over their inputs; {runtime} cannot put "
                    "inputs in another order",
                    where=names[0],
                    fix=f"use --runtime {able[0]}, or a checkpoint with static groups (desc_act false)",
                )

    def quantize(
        self,
        samples: Samples | None,
        out: Path,
        progress: Progress,
        *,
        device: torch.device | None = None,
        on_disk: bool = False,
        overwrite: bool = False,
    ) -> QuantizedCheckpoint:
        """Our quantized checkpoint, into `out`: codes chosen here, or those that are there.

        Args:
            device, on_disk, overwrite: see `engine.quantize`.
        """
        if isinstance(self.checkpoint, PackedCheckpoint):
            return adopt(self.checkpoint, self.recipe, out, progress, overwrite=overwrite)
        return engine.quantize(
            self.checkpoint, samples, self.recipe, out, progress, device=device, on_disk=on_disk, overwrite=overwrite
        )


def open_source(
    model: Path | None, adapters: Sequence[tuple[Path, float]], recipe: Recipe, chosen: frozenset[str] = frozenset()
) -> Source:
    """Open a model.

    Args:
        chosen: names of the recipe's values that the user chose on the command line.

    Raises:
        InputError: anything that cannot be used; options that choose codes, or adapters, for a model whose
            codes are there already.
    """
    checkpoint = open_weights(model_folder(model))
    if not isinstance(checkpoint, PackedCheckpoint):
        checkpoint = adapted(checkpoint, adapters)
        check(checkpoint.config, recipe.own_widths())
        return Source(checkpoint, recipe)
    if adapters:
        fix = "give the float checkpoint: merged into codes it would have to be quantized again"
        raise InputError("an adapter cannot be merged into a quantized checkpoint", where=model, fix=fix)
    clash = sorted(chosen & CHOOSES_CODES)
    if clash:
        option = f"--{clash[0].replace('_', '-')}"
        fix = f"omit {option}, or give the float checkpoint"
        raise InputError(f"the checkpoint is quantized already, so {option} cannot be chosen", where=model, fix=fix)
    return Source(checkpoint, given_recipe(checkpoint, recipe))


def model_folder(model: Path | None) -> Path:
    """The folder that was named, or the demo's.

    Raises:
        InputError: it is not a folder.
    """
    if model is None:
        return demo_checkpoint()
    if not model.is_dir():
        raise InputError(
            "there is no such model folder" if not model.exists() else "the model is not a folder",
            where=model,
            fix="name the folder that holds config.json, the tensor files and the tokenizer",
        )
    return model
