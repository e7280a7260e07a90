"""Figures of benchmarks/coreml.md: lowering, accuracy and speed on the demo; memory on full-width 7B blocks.

python -m benchmarks.coreml demo WORK [FORMAT ...]           quantizes the demo (GPTQ W4 g32), lowers it, measures
python -m benchmarks.coreml memory BLOCKS WORK [FORMAT ...]  lowers that many blocks of 4096 x 11008, tells the growth

FORMAT: coreml, parts (coreml in programs of at most 550 MB; memory alone) or executorch-coreml.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.wide import peak, write_random
from bluelm.checkpoint import Checkpoint
from bluelm.files import demo_checkpoint
from calibration.samples import load_samples
from compress.engine import quantize
from compress.recipe import Recipe
from compress.store import QuantizedCheckpoint
from eval import heldout
from eval.compare import Subject, compare
from export import coreml, executorch_coreml
from export.artifact import Artifact
from export.coreml_package import import_coremltools
from targets.runtime import open_runtime
from targets.torch_runtime import TorchRuntime

PARTS_BYTES = 550_000_000
FORMATS = ("coreml", "parts", "executorch-coreml")


def lower(quantized: QuantizedCheckpoint, kind: str, folder: Path, **options: Any) -> Artifact:
    """A package, a package of several programs, or a .pte."""
    if kind == "executorch-coreml":
        return executorch_coreml.export(quantized, folder, **options)
    limits = {"program_bytes": PARTS_BYTES} if kind == "parts" else {}
    return coreml.export(quantized, folder, **limits, **options)


def memory(blocks: int, work: Path, kinds: list[str]) -> None:
    """Lower `blocks` full-width blocks with embedding and head, each format in a process of its own."""
    if not (work / f"quantized-{blocks}").exists():
        write_random(work / f"quantized-{blocks}", blocks)
    for kind in kinds:
        command = [sys.executable, "-m", "benchmarks.coreml", "growth", str(blocks), str(work), kind]
        subprocess.run(command, check=False)


def growth(blocks: int, work: Path, kind: str) -> None:
    """Print size, growth of memory beyond what the imports hold, and time."""
    import_coremltools()
    quantized = QuantizedCheckpoint.open(work / f"quantized-{blocks}")
    before, started, cpu = peak() / 1e6, time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(dir=work) as folder:
        made = lower(quantized, kind, Path(folder) / "a", context=512, chunk=128)
        size, programs = made.bytes / 1e6, len(list(made.folder.glob("*.mlpackage"))) or 1
    grown = peak() / 1e6 - before
    seconds = f"{time.monotonic() - started:.0f} | {time.process_time() - cpu:.0f}"
    print(f"| {kind} | {blocks} | {programs} | {size:.0f} | {grown:.0f} | {size + 2000:.0f} | {seconds} |", flush=True)
    assert grown < size + 2000, "more memory than the artifact's size plus 2 GB"


def demo(work: Path, kinds: list[str]) -> None:
    """Quantize, lower and judge the demo checkpoint."""
    checkpoint = Checkpoint.open(demo_checkpoint())
    if not (work / "quantized").exists():
        recipe = Recipe.load("w4-g32")
        samples = load_samples(None, checkpoint.tokenizer(), recipe.samples, recipe.length, recipe.seed)
        quantize(checkpoint, samples, recipe, work / "quantized")
    quantized = QuantizedCheckpoint.open(work / "quantized")
    import_coremltools()
    windows = [w.tokens.tolist() for w in heldout.load([], quantized.tokenizer(), length=256).first(2048)]
    prompts = [window[:32] for window in windows[:5]]
    reference = Subject("torch", "dequantized", TorchRuntime(quantized, 512), digest=quantized.digest())
    for kind, activations in [(kind, width) for kind in kinds for width in ("float32", "float16")]:
        place = work / f"{kind}-{activations}"
        shutil.rmtree(place, ignore_errors=True)
        started = time.monotonic()
        made = lower(quantized, kind, place, activations=activations)
        lowering = time.monotonic() - started
        runtime = open_runtime(made.folder, "interpreter")
        (found,) = compare(reference, [Subject(activations, kind, runtime)], windows, prompts, 64)
        runtime.reset()
        runtime.prefill(prompts[0])
        started = time.monotonic()
        for _ in range(40):
            runtime.decode(5)
        speed = 40 / (time.monotonic() - started)
        apart = [(d.prompt, d.at, d.margin) for d in found.divergences if d.at is not None]
        print(
            f"{kind} {activations}: lowering {lowering:.1f} s, {made.bytes / 1e6:.2f} MB, "
            f"mean KL {found.kl.value:.2e}, largest {found.largest_kl:.2e}, "
            f"top-1 {found.top1.value:.4f}, greedy apart at {apart}, "
            f"decode {speed:.1f} tokens/s",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1] == "growth":
        growth(int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    elif sys.argv[1] == "memory":
        memory(int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:] or list(FORMATS))
    else:
        demo(Path(sys.argv[2]), sys.argv[3:] or ["coreml", "executorch-coreml"])
