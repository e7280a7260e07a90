"""MLX's folders, run by mlx-lm: on this machine's CPU, or on a Mac's GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bluelm.config import ModelConfig
from bluelm.errors import TargetError
from compress.recipe import Recipe
from export.artifacts.artifact import Artifact
from export.mlx import FOLDER
from targets.backend import LoweringJob, Uncompiled
from targets.runtime import RuntimeBase
from targets.socs import Soc
from targets.tools import require


class MlxBackend(Uncompiled):
    """Symmetric weights in groups of 32, 64 or 128, or one scale a row of such a multiple."""

    def check(self, soc: Soc, config: ModelConfig, recipe: Recipe, context: int, chunk: int) -> None:
        from export.mlx.export import check_model, check_recipe

        super().check(soc, config, recipe, context, chunk)
        check_model(config)
        check_recipe(config, recipe)

    def lower(self, job: LoweringJob) -> Artifact:
        from export.mlx.export import export

        return export(job.quantized, job.folder, context=job.context, about=job.about, progress=job.progress)


class MlxRuntime(RuntimeBase):
    """mlx-lm's own model and cache.

    Args:
        unit: `cpu`, or `gpu` of a Mac.

    Raises:
        TargetError: mlx-lm refuses the folder.
    """

    def __init__(self, artifact: Artifact, unit: str) -> None:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        from targets.apple.mlx_model import choose, prepared

        choose(unit)
        self._mx: Any = mx
        self.name, self.context = f"mlx-lm on {unit}", artifact.context
        self.vocab_size = artifact.model.vocab_size
        try:
            self._model: Any = prepared(load_model(artifact.folder / FOLDER)[0], unit)
        except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
            problem = f"mlx-lm refuses the folder: {error}"
            raise TargetError(problem, where=artifact.folder, fix="export it again") from None
        self._new_cache = lambda: make_prompt_cache(self._model)
        self.reset()

    def reset(self) -> None:
        self._cache: Any = self._new_cache()

    def rewind(self, held: int) -> None:
        for layer in self._cache:
            layer.trim(layer.offset - held)

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        self.check_tokens(tokens, self._cache[0].offset)
        ids = self._mx.array([list(map(int, tokens))])
        logits = self._model(ids, cache=self._cache)[0].astype(self._mx.float32)
        self._mx.eval(logits, [layer.state for layer in self._cache])  # another thread may ask next
        return np.array(logits)

    def blocks(self, tokens: Sequence[int]) -> np.ndarray:
        """Begin anew; the stream before the first block and behind each, float32 [layers + 1, n, hidden]."""
        seen: list[Any] = []
        layers = self._model.model.layers
        self._model.model.layers = [_Shown(layer, seen) for layer in layers]
        try:
            self.logits(tokens)
        finally:
            self._model.model.layers = layers
        stream = [seen[0][0], *(made for _, made in seen)]
        return np.stack([np.array(each[0].astype(self._mx.float32)) for each in stream])


class _Shown:
    """A block whose input and output are kept."""

    def __init__(self, layer: Any, seen: list[Any]) -> None:
        self._layer, self._seen = layer, seen

    def __call__(self, x: Any, *arguments: Any, **more: Any) -> Any:
        made = self._layer(x, *arguments, **more)
        self._seen.append((x, made))
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)  # what mlx-lm asks of a block, as use_sliding


def open_mlx(artifact: Artifact, unit: str = "cpu") -> MlxRuntime:
    """The artifact's folder in mlx-lm.

    Raises:
        UnavailableError: mlx-lm is not installed, or a GPU is asked for and this is no Mac.
        TargetError: mlx-lm refuses it.
    """
    require("mlx-lm")
    return MlxRuntime(artifact, unit)
