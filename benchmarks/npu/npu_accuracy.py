"""What the way to the NPU costs: dequantized weights, 16-bit twin and artifact on the simulator, against float32.

    python -m benchmarks.npu.npu_accuracy OUT [--tokens 1500] [method ...]

The demo checkpoint, default recipe of each method, bundled held-out text: mean KL divergences in nats a token. A run on
the simulator takes about 6 s of one core for 128 tokens. Writes results/npu/npu_accuracy.json and the page;
methods and numbers of tokens that are not run again keep their rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks import pages
from bluelm.checkpoint import Checkpoint
from bluelm.system.files import demo_checkpoint
from calibration.samples import load_samples
from compress.checkpoint.store import QuantizedCheckpoint
from compress.engine import quantize
from compress.recipe import Recipe
from eval import heldout
from eval.accuracy.metrics import kl_divergence, log_softmax
from eval.heldout import Window
from export.lowering.ranges import calibrate
from targets.host.torch_runtime import TorchRuntime, TwinRuntime
from targets.registry import find
from targets.runtime import Runtime, open_runtime

CONTEXT, CHUNK, RANGE_WINDOWS = 512, 128, 64
RUNS = ("dequantized", "twin", "npu")
COLUMNS = (
    "method", "tokens", "dequantized", "16-bit twin", "NPU artifact (simulator)", "NPU artifact to dequantized",
    "the largest of a token", "top-1",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("methods", nargs="*", default=["gptq", "rtn"])
    parser.add_argument("--tokens", type=int, default=1500)
    arguments = parser.parse_intermixed_args()
    checkpoint = Checkpoint.open(demo_checkpoint())
    windows = heldout.load([], checkpoint.tokenizer()).first(arguments.tokens)
    reference = answers(TorchRuntime(checkpoint, CONTEXT), windows)
    rows: list[list[str]] = []
    for method in arguments.methods:
        found = trial(checkpoint, method, windows, arguments.out / method)
        kl = [f"{divergences(reference, found[name]).mean():.3e}" for name in RUNS]
        own = divergences(found["dequantized"], found["npu"])
        same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(reference, found["npu"], strict=True)]
        cells = [f"{own.mean():.1e}", f"{own.max():.1e}", f"{np.concatenate(same).mean():.4f}"]
        rows.append([method, str(sum(map(len, reference))), *kl, *cells])
        print(rows[-1], flush=True)
        pages.save_rows("npu_accuracy", "methods", COLUMNS, rows, key=2)


def trial(checkpoint: Checkpoint, method: str, windows: tuple[Window, ...], out: Path) -> dict[str, list[np.ndarray]]:
    """Logits of each window by each of `RUNS`."""
    recipe = Recipe.make({"method": method})
    samples = load_samples(None, checkpoint.tokenizer(), recipe.samples, recipe.length, recipe.seed)
    place = out / "quantized"
    quantized = QuantizedCheckpoint.open(place) if place.exists() else quantize(checkpoint, samples, recipe, place)
    ranges = calibrate(quantized, samples.tokens[:RANGE_WINDOWS])
    target = find("snapdragon")
    lowered = target.lower(quantized, ranges, out / "lowered", context=CONTEXT, chunk=CHUNK)
    compiled = target.compile(lowered, out / "compiled")
    with open_runtime(compiled.folder, on="htp") as npu:
        runtimes = (TorchRuntime(quantized, CONTEXT), TwinRuntime(quantized, ranges, CONTEXT), npu)
        return {name: answers(runtime, windows) for name, runtime in zip(RUNS, runtimes, strict=True)}


def answers(runtime: Runtime, windows: tuple[Window, ...]) -> list[np.ndarray]:
    """Logits of each window."""
    return [runtime.logits(window.tokens.tolist()) for window in windows]


def divergences(expected: list[np.ndarray], found: list[np.ndarray]) -> np.ndarray:
    """KL of every row of all windows, float64 [n]."""
    pairs = zip(expected, found, strict=True)
    return np.concatenate([kl_divergence(log_softmax(a), log_softmax(b)) for a, b in pairs])


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
