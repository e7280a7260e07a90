"""Time and memory of lowering a model of BlueLM-7B's width with a few blocks, for each runtime.

    python -m benchmarks.wide BLOCKS OUT [runtime ...]

Each runtime lowers in a process of its own. Weights are drawn a layer at a time, so what is counted is the exporter's
own memory: peak resident bytes less those before it began.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import torch

from bluelm.config import ModelConfig
from bluelm.files import demo_checkpoint
from compress.quantized import QuantizedTensor

RUNTIMES = ("onnx-cpu", "onnx-genai", "litert", "gguf", "executorch-xnnpack")
HIDDEN, INNER, HEADS, ROWS = 4096, 11008, 32, 100096


class Wide:
    """What exporters read of a `QuantizedCheckpoint`, drawn when asked for."""

    def __init__(self, blocks: int) -> None:
        demo = ModelConfig.from_folder(demo_checkpoint())
        self.folder = demo_checkpoint()
        self.config = replace(
            demo,
            vocab_size=ROWS,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_layers=blocks,
            num_heads=HEADS,
            num_kv_heads=HEADS,
            head_dim=HIDDEN // HEADS,
        )

    def linear(self, name: str) -> QuantizedTensor:
        shapes = {
            "lm_head": (ROWS, HIDDEN),
            "gate_proj": (INNER, HIDDEN),
            "up_proj": (INNER, HIDDEN),
            "down_proj": (HIDDEN, INNER),
        }
        shape = shapes.get(name.rpartition(".")[2], (HIDDEN, HIDDEN))
        return self._draw(name, shape, 8 if name == "lm_head" else 4)

    def embed(self) -> QuantizedTensor:
        return self._draw("embed", (ROWS, HIDDEN), 8)

    def vector(self, name: str) -> torch.Tensor:
        return torch.ones(HIDDEN)

    def digest(self) -> str:
        return f"wide-{self.config.num_layers}"

    def _draw(self, name: str, shape: tuple[int, int], bits: int) -> QuantizedTensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
        groups = shape[1] // 32 if bits == 4 else 1
        scales = torch.full((shape[0], groups), 2.0**-10, dtype=torch.float16)
        zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
        return QuantizedTensor(codes, scales, zeros, bits, 32 if bits == 4 else -1)


def lower(runtime: str, blocks: int, out: Path) -> None:
    """Lower in this process and print what it took."""
    from targets.registry import find

    target = find("generic-arm64", runtime=runtime)
    if runtime == "executorch-xnnpack":
        import export.executorch  # noqa: F401  (its libraries are not what is measured)
    before, begin, cpu = peak(), time.perf_counter(), time.process_time()
    artifact = target.lower(Wide(blocks), None, out, context=512, chunk=128)  # pyright: ignore[reportArgumentType]
    grown, size = peak() - before, artifact.bytes
    row = {
        "runtime": runtime,
        "blocks": blocks,
        "wall_s": round(time.perf_counter() - begin, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "artifact_GB": round(size / 1e9, 2),
        "memory_grown_GB": round(grown / 1e9, 2),
        "kept": grown <= size + 2e9,
    }
    print(json.dumps(row), flush=True)


def peak() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    if sys.argv[1] == "--lower":
        lower(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    else:
        for each in sys.argv[3:] or RUNTIMES:
            place = Path(sys.argv[2]) / each
            command = [sys.executable, "-m", "benchmarks.wide", "--lower", each, sys.argv[1], str(place)]
            subprocess.run(command, check=False)
