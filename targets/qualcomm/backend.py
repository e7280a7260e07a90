"""Snapdragons: onnx-npu graphs compiled to QNN context binaries for the Hexagon Tensor Processor (HTP).

What HTP takes was found by trial with QNN 2.49 on all four chips of the table (benchmarks/npu/htp_trials.md):
symmetric int4 and int8, in blocks of 32, 64 or 128 or one scale a row, agree with float arithmetic within
4e-4. Weights with zero points do not: per row they are refused, in int4 blocks they compile and are then
ignored (relative error 1.2), so they are refused here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bluelm.config import ModelConfig
from bluelm.errors import InputError, TargetError
from bluelm.system.progress import Progress
from compress.recipe import Recipe
from export.artifacts.artifact import Artifact
from export.onnx import npu as onnx_npu
from targets.backend import LoweringJob, Uncompiled
from targets.legality import check_groups, check_lengths, weight_bytes
from targets.qualcomm.compile import compile_contexts
from targets.qualcomm.messages import Chip
from targets.socs import Soc

MIB = 2**20
PART_SHARE = 0.5
"""Of what one binary may hold, the weights of a part: the compiler's estimate, which the limit is for, counts its own
copies and the activations as well. A 7B in 4 bits becomes 5 parts, a 1B one."""


class HtpBackend(Uncompiled):
    """Checks, lowers and compiles for HTP; models beyond one binary are cut into parts."""

    def check(self, soc: Soc, config: ModelConfig, recipe: Recipe, context: int, chunk: int) -> None:
        check_lengths(config, context, chunk)
        if not recipe.symmetric:
            raise TargetError(
                f"the NPU of {soc.name} computes wrongly with asymmetric weights",
                fix="use --symmetric, or --target generic-arm64, which runs them on the CPU",
            )
        check_groups(config, recipe)
        _check_size(soc, config, recipe)

    def lower(self, job: LoweringJob) -> Artifact:
        return lowered(job, onnx_npu.export)

    def compile(self, artifact: Artifact, target: str, soc: Soc, folder: Path, progress: Progress | None) -> Artifact:
        return compile_contexts(artifact, chip_of(soc), target, soc.id, folder, progress)


def lowered(job: LoweringJob, export: Callable[..., Artifact]) -> Artifact:
    """The job by an exporter of quantized graphs, in parts that fit a binary.

    Raises:
        InputError: it has no ranges.
    """
    if job.ranges is None:
        raise InputError("16-bit activations need activation ranges", fix="calibrate them first")
    return export(
        job.quantized,
        job.ranges.model_copy(update={"cache_bits": job.kv_bits}),
        job.folder,
        context=job.context,
        chunk=job.chunk,
        part_bytes=part_limit(job.soc),
        progress=job.progress,
    )


def chip_of(soc: Soc) -> Chip:
    """Qualcomm's numbers of a chip.

    Raises:
        InputError: it has no Hexagon NPU.
    """
    if soc.qnn_soc_model is None or soc.hexagon_arch is None:
        raise InputError(f"{soc.name} has no Hexagon NPU", fix="name a Snapdragon")
    return Chip(soc.qnn_soc_model, soc.hexagon_arch)


def part_limit(soc: Soc) -> int:
    """Most bytes of weights in one part."""
    return int((soc.context_binary_mib or 2048) * MIB * PART_SHARE)


def _check_size(soc: Soc, config: ModelConfig, recipe: Recipe) -> None:
    """TargetError if a block or the head alone is too large for a part."""
    block, head = weight_bytes(config, recipe)
    limit = part_limit(soc)
    for name, size, option, bits in (
        ("a block", block, "--bits", recipe.bits),
        ("the head", head, "--head-bits", recipe.head_bits),
    ):
        if size > limit:
            fewer = f"use {option} 4, or " if bits == 8 and size / 2 <= limit else ""
            raise TargetError(
                f"{name} of {size / MIB:.0f} MiB does not fit one context binary of {soc.name}, "
                f"which holds {limit // MIB} MiB of weights",
                fix=f"{fewer}--target generic-arm64, which has no such limit",
            )
