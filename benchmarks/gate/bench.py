"""Where the gate's artifacts are made and judged, and the files that hold what was found."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bluelm.checkpoint import Checkpoint
from bluelm.system.files import demo_checkpoint
from bluelm.system.progress import Silent
from calibration.samples import load_samples
from compress.checkpoint.store import QuantizedCheckpoint
from compress.engine import quantize
from compress.recipe import Recipe
from eval import heldout
from eval.budget import budget_file
from eval.budget.budget import Check, Verdict, judge
from eval.budget.limits import Budget
from export.artifacts.artifact import Artifact, Format
from export.coreai import export as coreai
from export.coreml import export as coreml
from export.executorch import coreml as executorch_coreml
from export.executorch import xnnpack as executorch
from export.formats import record
from export.gguf import export as gguf_file
from export.litert import export as litert
from export.litert_lm import export as litert_lm
from export.lowering.ranges import Ranges, calibrate
from export.mlx import export as mlx
from export.npu_genai import export as npu_genai
from export.onnx import cpu as onnx_cpu
from export.onnx import genai as onnx_genai
from export.onnx import npu as onnx_npu
from pipeline.judge import judging
from pipeline.judge.inspecting import Inspector
from pipeline.judge.judging import Subject
from targets.registry import find
from targets.runtime import natural
from tests.support.checkpoints.shapes import shortened

CONTEXT, CHUNK = 512, 128
TOKENS = {"htp": 1536, "interpreter": 1024}  # others: 4096
SECOND_END = 9  # of a cut model, so that one of two can be missing
CUT_TOKENS = 128  # of a cut model, which says little of accuracy: limits on it are left out
CUT_TEXTS = 12  # of a cut model every twelfth text goes through the tokenizer
CUT_LIMITS = {"max_perplexity_ratio": None, "max_mean_kl": None, "min_top1_agreement": None}


@dataclass(frozen=True)
class Bench:
    """Where everything lies, and what artifacts are held against."""

    out: Path
    checkpoint: Checkpoint
    quantized: QuantizedCheckpoint
    cut: bool = False
    texts: tuple[Path, ...] = ()

    @staticmethod
    def open(
        out: Path, name: str, blocks: int | None = None, *, source: Path | None = None, texts: tuple[Path, ...] = (),
        **recipe: object,
    ) -> Bench:  # fmt: skip
        """A checkpoint (default: the demo, or its first blocks) and its quantized form `out`/`name`, made if need be.

        Args:
            texts: to judge on; default: the bundled set.
        """
        source = source or demo_checkpoint()
        if blocks is not None:
            name, cut = f"{name}-{blocks}", out / f"float-{blocks}"
            if not cut.exists():
                shortened(source, blocks, cut)
                _end_twice(cut)
            source = cut
        checkpoint = Checkpoint.open(source)
        chosen = Recipe.load("w4-g32", **recipe)
        folder = out / name
        if not (folder / "quantized.json").exists():
            samples = load_samples(None, checkpoint.tokenizer(), chosen.samples, chosen.length, chosen.seed)
            quantize(checkpoint, samples, chosen, folder)
        return Bench(out, checkpoint, QuantizedCheckpoint.open(folder), blocks is not None, texts)

    @cached_property
    def inspector(self) -> Inspector:
        """What artifacts are held against."""
        held_out = heldout.load(self.texts, self.checkpoint.tokenizer())
        if self.cut:
            held_out = replace(held_out, texts=held_out.texts[::CUT_TEXTS])
        return Inspector(self.checkpoint, self.quantized, held_out, CONTEXT)

    @cached_property
    def budget(self) -> Budget:
        """The default budget without what depends on speed and phone."""
        gone = {"min_decode_tokens_per_s": None, "max_artifact_bytes": None, "max_memory_bytes": None}
        update = gone | (CUT_LIMITS if self.cut else {})
        return budget_file.load(budget_file.DEFAULT_BUDGET).model_copy(update=update)

    def place(self, name: str) -> Path:
        """The folder of artifacts of this name."""
        return self.out / f"{self.quantized.folder.name}-{name}"

    def artifact(self, kind: Format, source: QuantizedCheckpoint, name: str) -> Artifact:
        """An artifact of `source`, made if need be; a compiled one beside what it is made of."""
        folder = self.place(name) / kind
        if (folder / "artifact.json").exists():
            return Artifact.open(folder)
        makers: dict[str, Callable[[], Artifact]] = {
            "onnx-cpu": lambda: onnx_cpu.export(source, folder, context=CONTEXT, chunk=CHUNK),
            "onnx-genai": lambda: onnx_genai.export(source, folder, context=CONTEXT),
            "litert": lambda: litert.export(source, folder, context=CONTEXT, chunk=CHUNK),
            "litert-lm": lambda: litert_lm.export(source, folder, context=CONTEXT, chunk=CHUNK),
            "gguf": lambda: gguf_file.export(source, folder, context=CONTEXT),
            "mlx": lambda: mlx.export(source, folder, context=CONTEXT),
            "coreai": lambda: coreai.export(source, folder, context=CONTEXT),
            "coreai-ane": lambda: coreai.export_static(source, folder, context=CONTEXT, chunk=CHUNK),
            "executorch-xnnpack": lambda: executorch.export(source, folder, kv_bits=32, context=CONTEXT, chunk=CHUNK),
            "executorch-coreml": lambda: executorch_coreml.export(source, folder, context=CONTEXT, chunk=CHUNK),
            "coreml": lambda: coreml.export(source, folder, context=CONTEXT, chunk=CHUNK),
            "onnx-npu": lambda: onnx_npu.export(source, self._ranges(), folder, context=CONTEXT, chunk=CHUNK),
            "onnx-npu-genai": lambda: npu_genai.export(source, self._ranges(), folder, context=CONTEXT, chunk=CHUNK),
        }
        first = record(kind).compiled_from
        if first is not None:
            return find("snapdragon", runtime=kind).compile(self.artifact(first, source, name), folder)
        return makers[kind]()

    def judge(
        self, artifact: Artifact, tokens: int | None = None, limits: dict[str, float] | None = None
    ) -> tuple[Verdict, float]:
        """The verdict on one artifact, and the seconds that it took; `limits` in place of the budget's own."""
        place = natural(artifact.format)
        count = tokens or (CUT_TOKENS if self.cut else TOKENS.get(place, 4096))
        started = time.monotonic()
        name = "npu" if place == "htp" else "cpu"
        with _brief() if self.cut else nullcontext():
            found = judging.judge_artifacts(self.inspector, [Subject(name, artifact, place, count)], Silent())
        budget = self.budget.model_copy(update=limits or {})
        verdict = judge(budget, found.figures, (name,), found.samples)
        return verdict, time.monotonic() - started

    def _ranges(self) -> Ranges:
        """Of activations, from 8 windows of calibration text."""
        path = self.quantized.folder.with_suffix(".ranges.json")
        if not path.exists():
            calibrate(self.quantized, load_samples(None, self.checkpoint.tokenizer(), 8, 256, 0).tokens).save(path)
        return Ranges.load(path)


def told(check: Check) -> str:
    """A check that did not pass, and by how much: "runtime_kl_excess 23"."""
    name = check.name.removeprefix("max_").removeprefix("min_")
    value = "not measured" if check.value is None else f"{check.value:.3g}"
    return f"{name} {value}" + (" (too few tokens)" if check.outcome == "undecided" else "")


class Results:
    """Rows of a JSON Lines file, each with a key; what is there already is not done again."""

    def __init__(self, path: Path, key: tuple[str, ...]) -> None:
        self.path, self._key = path, key
        path.parent.mkdir(parents=True, exist_ok=True)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The newest row of each key."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        rows = {self._of(row): row for row in map(json.loads, lines)}
        return iter(rows.values())

    def __contains__(self, row: dict[str, Any]) -> bool:
        return self._of(row) in {self._of(other) for other in self}

    def add(self, row: dict[str, Any]) -> None:
        """Append it, and say so."""
        text = json.dumps(row, ensure_ascii=False)
        print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def _of(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in self._key)


def _end_twice(folder: Path) -> None:
    """A second end token in a checkpoint's config."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"eos_token_id": [config["eos_token_id"], SECOND_END]}), encoding="utf-8")


@contextmanager
def _brief() -> Iterator[None]:
    """One short greedy answer: of a cut model it says little."""
    with patch.object(judging, "PROMPTS", 1), patch.object(judging, "GREEDY_TOKENS", 8):
        yield


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Seconds since it was entered."""
    started = time.monotonic()
    yield lambda: round(time.monotonic() - started, 1)
