"""Any arm64 phone's CPU: formats of onnxruntime and llama.cpp, run as they are."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from bluelm.block import block_of
from bluelm.config import ModelConfig
from bluelm.errors import TargetError
from compress.recipe import Recipe
from export.artifacts.artifact import Artifact
from export.gguf.names import architecture
from export.onnx import cpu as onnx_cpu
from targets.backend import LoweringJob, Uncompiled
from targets.socs import Soc


class CpuBackend(Uncompiled):
    """Every width, group size and symmetry runs; nothing is compiled."""

    def lower(self, job: LoweringJob) -> Artifact:
        return onnx_cpu.export(job.quantized, job.folder, ranges=job.ranges, **job.sized)


class GenaiBackend(CpuBackend):
    """One graph for onnxruntime-genai: every recipe that onnx-cpu takes."""

    def check_tokenizer(self, folder: Path, config: ModelConfig) -> None:
        from export.tokenizer.genai import check_tokenizer

        check_tokenizer(folder)

    def lower(self, job: LoweringJob) -> Artifact:
        from export.onnx import genai as onnx_genai

        # 8-bit activations, as the runtime's own model builder chooses: seven times the tokens/s of level 0
        return onnx_genai.export(job.quantized, job.folder, accuracy_level=4, ranges=job.ranges, **job.sized)


class GgufBackend(CpuBackend):
    """llama.cpp's blocks of 32 without zero points; the width of the cache is an option of its runtime."""

    def check(self, soc: Soc, config: ModelConfig, recipe: Recipe, context: int, chunk: int) -> None:
        super().check(soc, config, recipe, context, chunk)
        architecture(config)
        if not recipe.symmetric:
            raise TargetError("GGUF's Q4_0 and Q8_0 have no zero points", fix="use a symmetric recipe")
        for linear in block_of(config).linears.values():
            if linear.columns % 32:
                text = f"GGUF's blocks of 32 do not divide the {linear.columns} inputs of {linear.weight}"
                raise TargetError(text, fix="use the runtime onnx-cpu")

    def check_tokenizer(self, folder: Path, config: ModelConfig) -> None:
        if importlib.util.find_spec("gguf") is None:
            return  # said when it is needed: a plan can be made without it
        from export.gguf.tokenizer import check_tokenizer

        check_tokenizer(folder, config)

    def lower(self, job: LoweringJob) -> Artifact:
        from export.gguf import export as gguf_file

        return gguf_file.export(job.quantized, job.folder, context=job.context, about=job.about, progress=job.progress)
