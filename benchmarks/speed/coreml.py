"""Core ML on Linux: lowering, accuracy and speed on the demo; memory on full-width 7B blocks.

    python -m benchmarks.speed.coreml demo WORK [FORMAT ...]           quantizes the demo (GPTQ W4 g32), lowers it
    python -m benchmarks.speed.coreml memory BLOCKS WORK [FORMAT ...]  lowers so many blocks of 4096 x 11008

FORMAT: coreml, parts (coreml in programs of at most 550 MB; memory alone) or executorch-coreml. Writes the part
"demo" or "memory" of results/speed/coreml.json, and the page; rows that are not measured again stay.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import pages
from benchmarks.speed.wide import peak, write_random
from bluelm.checkpoint import Checkpoint
from bluelm.system.files import demo_checkpoint
from calibration.samples import load_samples
from compress.checkpoint.store import QuantizedCheckpoint
from compress.engine import quantize
from compress.recipe import Recipe
from eval import heldout
from eval.accuracy.compare import Comparison, Side, compare
from export.artifacts.artifact import Artifact
from export.coreml import export as coreml
from export.coreml.package import import_coremltools
from export.executorch import coreml as executorch_coreml
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import open_runtime

PARTS_BYTES = 550_000_000
FORMATS = ("coreml", "parts", "executorch-coreml")
WIDTHS = ("float32", "float16")
TOKENS, GREEDY, DECODED = 2048, 64, 40
DEMO = (
    "program", "activations", "lowering", "size", "mean KL", "largest KL", "top-1", "greedy tokens that differ",
    "decode",
)  # fmt: skip
MEMORY = (
    "program", "blocks", "programs", "artifact, MB", "growth, MB", "allowed: artifact + 2000 MB", "wall s", "CPU s"
)  # fmt: skip


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
    rows: list[list[str]] = []
    for kind in kinds:
        command = [sys.executable, "-m", "benchmarks.speed.coreml", "growth", str(blocks), str(work), kind]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode:  # it said why
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
        pages.save_rows("coreml", "memory", MEMORY, rows, key=2)


def measure_growth(blocks: int, work: Path, kind: str) -> None:
    """Print a row: size, growth of memory beyond what the imports hold, and time."""
    import_coremltools()
    quantized = QuantizedCheckpoint.open(work / f"quantized-{blocks}")
    before, started, cpu = peak() / 1e6, time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(dir=work) as folder:
        made = lower(quantized, kind, Path(folder) / "a", context=512, chunk=128)
        size, programs = made.bytes / 1e6, len(list(made.folder.glob("*.mlpackage"))) or 1
    grown = peak() / 1e6 - before
    growth = f"{grown:.0f}" if grown < size + 2000 else f"**{grown:.0f}**"
    seconds = [f"{time.monotonic() - started:.0f}", f"{time.process_time() - cpu:.0f}"]
    print(json.dumps([kind, str(blocks), str(programs), f"{size:.0f}", growth, f"{size + 2000:.0f}", *seconds]))


def demo(work: Path, kinds: list[str]) -> None:
    """Quantize, lower and judge the demo checkpoint."""
    checkpoint = Checkpoint.open(demo_checkpoint())
    if not (work / "quantized").exists():
        recipe = Recipe.load("w4-g32")
        samples = load_samples(None, checkpoint.tokenizer(), recipe.samples, recipe.length, recipe.seed)
        quantize(checkpoint, samples, recipe, work / "quantized")
    quantized = QuantizedCheckpoint.open(work / "quantized")
    import_coremltools()
    windows = [w.tokens.tolist() for w in heldout.load([], quantized.tokenizer(), length=256).first(TOKENS)]
    prompts = [window[:32] for window in windows[:5]]
    reference = Side("torch", "dequantized", TorchRuntime(quantized, 512), digest=quantized.digest())
    rows: list[list[str]] = []
    for kind, activations in [(kind, width) for kind in kinds for width in WIDTHS]:
        place = work / f"{kind}-{activations}"
        shutil.rmtree(place, ignore_errors=True)
        started = time.monotonic()
        made = lower(quantized, kind, place, activations=activations)
        cells = [kind, activations, f"{time.monotonic() - started:.1f} s", f"{made.bytes / 1e6:.2f} MB"]
        runtime = open_runtime(made.folder, "interpreter")
        (found,) = compare(reference, [Side(activations, kind, runtime)], windows, prompts, GREEDY)
        runtime.reset()
        runtime.prefill(prompts[0])
        started = time.monotonic()
        for _ in range(DECODED):
            runtime.decode(5)
        rows.append([*cells, *_figures(found), f"{DECODED / (time.monotonic() - started):.1f} tokens/s"])
        print(rows[-1], flush=True)
        names = [f"{kind}, {width}" for kind in FORMATS for width in WIDTHS]
        pages.save_rows("coreml", "demo", DEMO, rows, names=names, key=2, tokens=sum(map(len, windows)))


def _figures(found: Comparison) -> list[str]:
    """Divergence, top-1, and where greedy tokens part."""
    apart = [
        f"prompt {one.prompt}, token {one.at}: the top two are {one.margin:.4f} apart"
        for one in found.divergences
        if one.at is not None
    ]
    kl = [f"{found.kl.value:.1e}", f"{found.largest_kl:.1e}"]
    return [*kl, f"{found.top1.value:.4f}", "; ".join(apart) or "none"]


if __name__ == "__main__":
    if sys.argv[1] == "growth":
        measure_growth(int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    elif sys.argv[1] == "memory":
        memory(int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:] or list(FORMATS))
    else:
        demo(Path(sys.argv[2]), sys.argv[3:] or ["coreml", "executorch-coreml"])
