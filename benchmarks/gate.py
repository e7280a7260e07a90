"""The gate on purpose-made damage, on every runtime, and on honest runs; the time that judging takes.

    python -m benchmarks.gate damage OUT [--only KIND ...] [--blocks N] [--damages NAME ...] [--tokens N]
                                                                each damage on each runtime must fail
    python -m benchmarks.gate honest OUT [--only KIND ...] [--seeds 20 | --seeds 3 8]
                                                                runs with other calibration seeds must pass
    python -m benchmarks.gate time OUT [--only KIND ...]        seconds for 20,000 tokens
    python -m benchmarks.gate size OUT [--only KIND ...] [--blocks N]
                                                                bytes of the files against the plan
    python -m benchmarks.gate arithmetic OUT [--only KIND ...]  KL to their own weights, sound and hurt

OUT keeps quantized checkpoints and artifacts, so that a run that was broken off goes on; results are printed as
Markdown and appended to OUT/results.md. The demo checkpoint, or its first blocks with `--blocks`, where limits on
accuracy are wider; the default recipe, rounded to nearest but for `honest`, which calibrates on 16 windows of 128
tokens: few, so that seeds differ.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from bluelm.files import demo_checkpoint
from bluelm.progress import Silent
from calibration.samples import load_samples
from compress.engine import quantize
from compress.recipe import Recipe
from compress.store import QuantizedCheckpoint
from eval import budget_file, heldout, size_plan
from eval.budget import Budget, Check, Verdict, judge
from eval.structure import runtime_kl
from export import coreml, executorch, executorch_coreml, gguf_file, litert, onnx_cpu, onnx_genai, onnx_npu
from export.artifact import SOURCES, Artifact
from export.ranges import Ranges, calibrate
from pipeline import judging
from pipeline.inspecting import Inspector
from pipeline.judging import Subject
from targets import runtime as runtimes
from targets.registry import find
from targets.runtime import Place
from targets.torch_runtime import TorchRuntime
from tests import damage
from tests.rounded import shortened

CONTEXT, CHUNK = 512, 128
TOKENS = {"htp": 1536, "interpreter": 1024}  # others: 4096
CUT_TOKENS = 768  # of a cut model
CUT_LIMITS = {"max_perplexity_ratio": 1.1, "max_mean_kl": 0.02, "min_top1_agreement": 0.85}
PLACES: dict[str, Place] = {
    "qnn-context": "htp", "executorch-qnn": "htp", "coreml": "interpreter", "executorch-coreml": "interpreter",
}  # fmt: skip
KINDS = (
    "onnx-cpu", "onnx-genai", "litert", "gguf", "coreml", "onnx-npu", "executorch-xnnpack", "executorch-coreml",
    "qnn-context", "executorch-qnn",
)  # fmt: skip
HONEST_TOKENS = 2048  # few, so that errors are large
DAMAGES = ("none", "scales", "heads", "rope", "layer norm", "tokenizer", "unquantized", "cache")


@dataclass(frozen=True)
class Bench:
    """Where everything lies, and what artifacts are held against."""

    out: Path
    checkpoint: Checkpoint
    quantized: QuantizedCheckpoint
    cut: bool = False

    @staticmethod
    def open(out: Path, name: str, blocks: int | None = None, **recipe: object) -> Bench:
        """The demo checkpoint or its first blocks, and its quantized form in `out`/`name`, made if need be."""
        source = demo_checkpoint()
        if blocks is not None:
            name, source = f"{name}-{blocks}", out / f"float-{blocks}"
            if not source.exists():
                shortened(demo_checkpoint(), blocks, source)
        checkpoint = Checkpoint.open(source)
        chosen = Recipe.load("w4-g32", **recipe)
        folder = out / name
        if not (folder / "quantized.json").exists():
            samples = load_samples(None, checkpoint.tokenizer(), chosen.samples, chosen.length, chosen.seed)
            quantize(checkpoint, samples, chosen, folder)
        return Bench(out, checkpoint, QuantizedCheckpoint.open(folder), blocks is not None)

    @cached_property
    def inspector(self) -> Inspector:
        """What artifacts are held against."""
        return Inspector(self.checkpoint, self.quantized, heldout.load([], self.checkpoint.tokenizer()), CONTEXT)

    @cached_property
    def budget(self) -> Budget:
        """The default budget without what depends on speed and phone."""
        gone = {"min_decode_tokens_per_s": None, "max_artifact_bytes": None, "max_memory_bytes": None}
        update = gone | (CUT_LIMITS if self.cut else {})
        return budget_file.load(budget_file.DEFAULT_BUDGET).model_copy(update=update)

    def ranges(self) -> Ranges:
        """Of activations, from 8 windows of calibration text."""
        path = self.quantized.folder.with_suffix(".ranges.json")
        if not path.exists():
            calibrate(self.quantized, load_samples(None, self.checkpoint.tokenizer(), 8, 256, 0).tokens).save(path)
        return Ranges.load(path)

    def artifact(self, kind: str, source: QuantizedCheckpoint, name: str) -> Artifact:
        """An artifact of `source` below `out`, made if need be."""
        folder = self.out / f"{self.quantized.folder.name}-{name}" / kind
        if (folder / "artifact.json").exists():
            return Artifact.open(folder)
        makers: dict[str, Callable[[], Artifact]] = {
            "onnx-cpu": lambda: onnx_cpu.export(source, folder, context=CONTEXT, chunk=CHUNK),
            "onnx-genai": lambda: onnx_genai.export(source, folder, context=CONTEXT),
            "litert": lambda: litert.export(source, folder, context=CONTEXT, chunk=CHUNK),
            "gguf": lambda: gguf_file.export(source, folder, context=CONTEXT),
            "executorch-xnnpack": lambda: executorch.export(source, folder, kv_bits=32, context=CONTEXT, chunk=CHUNK),
            "executorch-coreml": lambda: executorch_coreml.export(source, folder, context=CONTEXT, chunk=CHUNK),
            "coreml": lambda: coreml.export(source, folder, context=CONTEXT, chunk=CHUNK),
            "onnx-npu": lambda: onnx_npu.export(source, self.ranges(), folder, context=CONTEXT, chunk=CHUNK),
        }
        if kind in SOURCES:
            return find("snapdragon", runtime=kind).compile(self.artifact(SOURCES[kind], source, name), folder)
        return makers[kind]()

    def judge(self, artifact: Artifact, tokens: int | None = None) -> tuple[Verdict, float]:
        """The verdict on one artifact, and the seconds that it took."""
        place = PLACES.get(artifact.format, "cpu")
        count = tokens or (CUT_TOKENS if self.cut else TOKENS.get(place, 4096))
        started = time.monotonic()
        name = "npu" if place == "htp" else "cpu"
        found = judging.judge_artifacts(self.inspector, [Subject(name, artifact, place, count)], Silent())
        verdict = judge(self.budget, found.figures, (name,), found.samples)
        return verdict, time.monotonic() - started


GRAPHS = ("onnx-cpu", "onnx-npu", *SOURCES)
"""Formats whose decode graph is made to forget the cache (before it is compiled); of others, how they are run."""


def damaged(bench: Bench, kind: str, name: str) -> Artifact:
    """An artifact with one damage."""
    whole, checkpoint = bench.quantized, bench.checkpoint
    sources: dict[str, Callable[[], QuantizedCheckpoint]] = {
        "scales": lambda: damage.scales(whole),
        "heads": lambda: damage.heads(whole),
        "rope": lambda: damage.rope(whole),
        "layer norm": lambda: damage.layer_norm(whole, checkpoint),
        "unquantized": lambda: damage.unquantized(whole, checkpoint),
    }
    if name in sources:
        return bench.artifact(kind, sources[name](), name.replace(" ", "-"))
    sound = bench.artifact(kind, whole, "none")
    if name == "none" or (name == "cache" and kind not in GRAPHS):
        return sound
    folder = bench.out / f"{whole.folder.name}-{name}"
    copies: list[Artifact] = []
    for made in (SOURCES[kind], kind) if kind in SOURCES else (kind,):  # what it is compiled from lies beside it
        shutil.rmtree(folder / made, ignore_errors=True)
        if made in SOURCES and name == "cache":
            return find("snapdragon", runtime=made).compile(damage.forget_cache(copies[0]), folder / made)
        copies.append(damage.copied(bench.artifact(made, whole, "none"), folder / made))
    return damage.shift_tokenizer(copies[-1]) if name == "tokenizer" else damage.forget_cache(copies[-1])


def run_damage(
    bench: Bench, kinds: Sequence[str], damages: Sequence[str], tokens: int | None, tell: Callable[[str], None]
) -> None:
    tell("| runtime | damage | verdict | what failed | s |\n|---|---|---|---|---|")
    for kind in kinds:
        for name in damages:
            artifact = damaged(bench, kind, name)
            try:
                with damage.forgetting(name == "cache" and kind not in GRAPHS):
                    verdict, seconds = bench.judge(artifact, tokens)
            except InputError as error:  # a runtime that will not open it
                tell(f"| {kind} | {name} | refused{' **WRONG**' * (name == 'none')} | {error.problem} | |")
                continue
            right = verdict.passed == (name == "none")
            word = ("passed" if verdict.passed else "failed") + ("" if right else " **WRONG**")
            failed = ", ".join(_told(check) for check in verdict.failures)
            tell(f"| {kind} | {name} | {word} | {failed} | {seconds:.0f} |")


def _told(check: Check) -> str:
    """A check that did not pass, and by how much: "runtime_kl_excess 23"."""
    name = check.name.removeprefix("max_").removeprefix("min_")
    value = "not measured" if check.value is None else f"{check.value:.3g}"
    return f"{name} {value}" + (" (too few tokens)" if check.outcome == "undecided" else "")


def run_honest(out: Path, kinds: tuple[str, ...], seeds: range, tell: Callable[[str], None]) -> None:
    tell("| seed | runtime | verdict | perplexity ratio | mean KL | top-1 |\n|---|---|---|---|---|---|")
    for seed in seeds:
        bench = Bench.open(out, f"q{seed}", seed=seed, samples=16, length=128)
        for kind in kinds:
            verdict, _ = bench.judge(bench.artifact(kind, bench.quantized, "none"), HONEST_TOKENS)
            by_name = {check.name: check for check in verdict.checks}
            cells = [
                f"{by_name[key].value:.5f} ± {by_name[key].error:.5f}"
                for key in ("max_perplexity_ratio", "max_mean_kl", "min_top1_agreement")
            ]
            word = "passed" if verdict.passed else f"failed: {[str(f) for f in verdict.failures]}"
            tell(f"| {seed} | {kind} | {word} | {' | '.join(cells)} |")


def run_time(bench: Bench, kinds: tuple[str, ...], tell: Callable[[str], None]) -> None:
    tell("| runtime | tokens | seconds | verdict |\n|---|---|---|---|")
    for kind in kinds:
        artifact = bench.artifact(kind, bench.quantized, "none")
        verdict, seconds = bench.judge(artifact, 20_000)
        tell(f"| {kind} | 20,000 | {seconds:.0f} | {'passed' if verdict.passed else 'failed'} |")


def run_size(bench: Bench, kinds: Sequence[str], tell: Callable[[str], None]) -> None:
    tell("| format | bytes of weight files | planned | beyond, a block | deviation |\n|---|---|---|---|---|")
    for kind in kinds:
        artifact = bench.artifact(kind, bench.quantized, "none")
        held, parts = size_plan.held_bytes(artifact), size_plan.planned_parts(bench.quantized, artifact) or {}
        planned = sum(parts.values())
        beyond = (held - planned) / (artifact.model.num_layers + 1)
        apart = size_plan.deviation(planned, artifact)
        tell(f"| {kind} | {held:,} | {planned:,} | {beyond:,.0f} | {apart:.2%} |")


def run_arithmetic(bench: Bench, kinds: tuple[str, ...], tell: Callable[[str], None]) -> None:
    """What a format's arithmetic costs, beside what one block's scales times 1.05 cost in float32."""
    windows = [w.tokens.tolist() for w in heldout.load([], bench.checkpoint.tokenizer()).windows[:2]]
    own = TorchRuntime(bench.quantized, CONTEXT)
    expected = [own.logits(window) for window in windows]
    tell("| what | KL to its own weights, nats a token |\n|---|---|")
    hurt = TorchRuntime(damage.scales(bench.quantized), CONTEXT)
    (kl, _) = runtime_kl(expected, [hurt.logits(window) for window in windows], 1.0, "")
    tell(f"| scales of block {damage.LAYER} times 1.05, in torch | {kl.value:.1e} |")
    for kind in kinds:
        artifact = bench.artifact(kind, bench.quantized, "none")
        with runtimes.open_runtime(artifact.folder, PLACES.get(kind, "cpu")) as runtime:
            kl, _ = runtime_kl(expected, [runtime.logits(window) for window in windows], 1.0, "")
        tell(f"| {kind} | {kl.value:.1e} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["damage", "honest", "time", "size", "arithmetic"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=KINDS, help="default: all; onnx-cpu for `honest`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[20], help="how many, or from and up to (without)")
    parser.add_argument("--blocks", type=int, help="of the demo model: its first ones; default: all")
    parser.add_argument("--damages", nargs="+", choices=DAMAGES, default=DAMAGES)
    parser.add_argument("--tokens", type=int, help="of held-out text that `damage` judges on; default: by runtime")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    def tell(text: str) -> None:
        print(text, flush=True)
        with (options.out / "results.md").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    if options.what == "honest":
        run_honest(options.out, tuple(options.only or ["onnx-cpu"]), range(*options.seeds), tell)
        return
    bench = Bench.open(options.out, "rtn", options.blocks, method="rtn", samples=1, length=16)
    kinds = tuple(options.only or KINDS)
    if options.what == "damage":
        run_damage(bench, kinds, options.damages, options.tokens, tell)
        return
    {"time": run_time, "size": run_size, "arithmetic": run_arithmetic}[options.what](bench, kinds, tell)


if __name__ == "__main__":
    main()
