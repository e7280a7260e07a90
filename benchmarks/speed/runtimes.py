"""Every runtime from one quantized demo checkpoint: lowering time, size, divergence, greedy agreement, speed.

    python -m benchmarks.speed.runtimes OUT [--busy] [runtime ...]

The reference is the dequantized torch model. Writes the parts "demo" and "speed" of results/speed/runtimes.json and the
page; runtimes that are not named keep their rows. With `--busy`, on a machine with other work, "speed" stays.
`benchmarks/interop/peer_exports.py` runs the runtimes' own exporters beside ours.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import pages
from bluelm.checkpoint import Checkpoint
from bluelm.system.files import demo_checkpoint
from calibration.samples import load_samples
from compress.checkpoint.store import QuantizedCheckpoint
from compress.engine import quantize
from compress.recipe import Recipe
from targets.host.torch_runtime import TorchRuntime
from targets.registry import find
from targets.runtime import Runtime, open_runtime

CONTEXT, CHUNK, GREEDY, CLOSE = 512, 128, 64, 1e-2
PROMPTS = ("手机上的语言模型", "The weather today", "def add(a, b):", "Once upon a time", "北京是中国的")
ACTIVATIONS = {
    "onnx-cpu": "float32",
    "onnx-genai": "8 bit, in blocks",
    "litert": "8 bit, a range a token",
    "gguf": "float32",
    "executorch-xnnpack": "8 bit, a range a token",
}
RUNTIMES = tuple(ACTIVATIONS)
DEMO = ("runtime", "activations", "MB", "mean KL", "top-1", "greedy")
SPEED = ("runtime", "lowering, s (CPU s)", "tokens/s, Python host")
BUSY = "--busy"


def main(out: Path, runtimes: list[str], busy: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    quantized = demo(out / "quantized")
    tokenizer = quantized.tokenizer()
    tokens = load_samples(None, tokenizer, 4, 256, 7).tokens.tolist()
    reference = TorchRuntime(quantized, CONTEXT)
    expected = [reference.logits(window) for window in tokens]
    prompts = [tokenizer.encode(prompt, bos=True) for prompt in PROMPTS]
    rows = []
    for name in runtimes or RUNTIMES:
        wall, cpu = time.perf_counter(), cpu_seconds()
        target = find("generic-arm64", runtime=name)
        artifact = target.lower(quantized, None, out / name, context=CONTEXT, chunk=CHUNK)
        row = {
            "runtime": name,
            "wall_s": round(time.perf_counter() - wall, 1),
            "cpu_s": round(cpu_seconds() - cpu, 1),
            "MB": round(artifact.bytes / 1e6, 2),
        }
        with open_runtime(artifact.folder) as runtime:
            found = [runtime.logits(window) for window in tokens]
            kl, top1 = divergence(np.concatenate(expected), np.concatenate(found))
            row |= {"kl": kl, "top1": top1}
            row["greedy"] = sum(greedy_agrees(reference, runtime, prompt) for prompt in prompts)
            row["decode_tok_s"] = round(decode_rate(runtime, tokens[0][:128]), 1)
        rows.append(row)
        print(json.dumps(row), flush=True)
    pages.save_rows("runtimes", "demo", DEMO, _accuracy(rows), names=RUNTIMES)
    if not busy:
        pages.save_rows("runtimes", "speed", SPEED, _speed(rows), names=RUNTIMES)


def _accuracy(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            row["runtime"],
            ACTIVATIONS[row["runtime"]],
            f"{row['MB']:.2f}",
            f"{row['kl']:.2g}",
            f"{row['top1']:.4f}",
            f"{row['greedy']} of {len(PROMPTS)}",
        ]
        for row in rows
    ]


def _speed(rows: list[dict[str, Any]]) -> list[list[str]]:
    """GGUF's decoding is torch's in llama.cpp's place, and is left out."""
    rates = ["" if row["runtime"] == "gguf" else f"{row['decode_tok_s']:.0f}" for row in rows]
    return [[row["runtime"], f"{row['wall_s']} ({row['cpu_s']})", rate] for row, rate in zip(rows, rates, strict=True)]


def demo(folder: Path, **recipe: object) -> QuantizedCheckpoint:
    """The demo checkpoint by the default recipe with fewer windows; kept between calls."""
    if not folder.exists():
        checkpoint = Checkpoint.open(demo_checkpoint())
        chosen = Recipe.load("w4-g32", samples=32, length=128, **recipe)
        quantize(checkpoint, load_samples(None, checkpoint.tokenizer(), 32, 128, 0), chosen, folder)
    return QuantizedCheckpoint.open(folder)


def divergence(reference: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Mean KL(reference || other) a token, and the share of equal first choices."""
    p, q = (torch.from_numpy(logits).double().log_softmax(-1) for logits in (reference, other))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    return float(f"{kl:.3g}"), round(float((p.argmax(-1) == q.argmax(-1)).float().mean()), 4)


def greedy_agrees(reference: Runtime, runtime: Runtime, prompt: list[int]) -> bool:
    """64 greedy tokens are the reference's, but for a choice where its best two logits are closer than 1e-2."""
    row, answer = reference.logits(prompt)[-1], runtime.logits(prompt)[-1]
    for _ in range(GREEDY):
        best = int(row.argmax())
        if int(answer.argmax()) != best:
            first, second = np.sort(row)[-2:][::-1]
            return bool(first - second < CLOSE)
        row, answer = reference.decode(best), runtime.decode(best)
    return True


def decode_rate(runtime: Runtime, prompt: list[int], count: int = 100) -> float:
    """Median tokens/s behind a prompt."""
    runtime.logits(prompt)
    seconds: list[float] = []
    for _ in range(count):
        begin = time.perf_counter()
        runtime.decode(5)
        seconds.append(time.perf_counter() - begin)
    return 1 / float(np.median(seconds[10:]))


def cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    torch.set_num_threads(2)
    words = [word for word in sys.argv[1:] if word != BUSY]
    main(Path(words[0]), words[1:], BUSY in sys.argv)
