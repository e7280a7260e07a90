"""LiteRT-LM on a phone's CPU: one .litertlm for every arm64 chip, nothing to compile."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from bluelm.config import ModelConfig
from bluelm.text.tokenizer import Tokenizer
from export.artifacts.artifact import Artifact
from targets.arm64.litert_backend import LitertBackend
from targets.backend import LoweringJob


class LitertLmBackend(LitertBackend):
    """The kernels, and so the rules, of LiteRT."""

    def check_tokenizer(self, folder: Path, config: ModelConfig) -> None:
        if importlib.util.find_spec("litert_lm_builder") is None:
            return  # said when it is needed: a plan can be made without it
        from export.litert_lm.export import check_tokenizer

        tokenizer = Tokenizer.from_folder(folder)
        tokenizer.check_rows(config.vocab_size)
        check_tokenizer(tokenizer)

    def lower(self, job: LoweringJob) -> Artifact:
        from export.litert_lm.export import export

        return export(
            job.quantized,
            job.folder,
            context=job.context,
            chunk=job.chunk,
            about=job.about,
            progress=job.progress,
        )
