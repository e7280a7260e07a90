"""Time and memory of lowering a model of BlueLM-7B's width with a few blocks, for each runtime.

    python -m benchmarks.speed.wide 1|2 OUT [runtime ...]

Each runtime lowers a quantized checkpoint of random codes (4 bits in groups of 32, head and embedding 8 bits a row) in
a process of its own. Growth is its peak resident memory less that behind its imports; the bound is the artifact's own
size plus 2 GB. What a vendor's compiler makes of it is another table: seconds, and the peak of the largest process.
Writes the parts "wide" and "compiled" of results/speed/runtimes.json, and the page; rows that are not run again stay.
"""

from __future__ import annotations

import importlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import pages
from bluelm.block import block_of
from bluelm.config import ModelConfig
from bluelm.system.files import demo_checkpoint
from bluelm.system.memory import peak
from compress.checkpoint.pieces import Piece, write_piece
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import EMBED, EMBEDDING_FILE, HEAD, HEAD_FILE, QuantizedCheckpoint, block_file, finish
from compress.recipe import Recipe
from export.artifacts.artifact import Artifact
from export.formats import record
from export.lowering import decoder as lowered
from export.lowering.ranges import Ranges
from export.lowering.torch_ops import Parameters, Recorded, TorchOps

TARGETS = {
    "onnx-cpu": "generic-arm64",
    "onnx-genai": "generic-arm64",
    "litert": "generic-arm64",
    "gguf": "generic-arm64",
    "executorch-xnnpack": "generic-arm64",
    "qnn-context": "snapdragon",
    "executorch-qnn": "snapdragon",
    "coreml": "apple",
}
LIBRARIES = {
    "executorch-xnnpack": "export.executorch.xnnpack",
    "litert": "export.litert.export",
    "coreml": "coremltools",
}
WIDE = ("runtime", "blocks", "s", "CPU s", "artifact, GB", "memory added, GB", "bound kept")
COMPILED = ("runtime", "blocks", "s", "CPU s", "artifact, GB", "largest process, GB")
COUNTS = (1, 2)  # of blocks
HIDDEN, INNER, HEADS, ROWS = 4096, 11008, 32, 100096


def main(blocks: int, out: Path, runtimes: list[str]) -> None:
    source = out / f"quantized-{blocks}"
    if not source.exists():
        write_random(source, blocks)
    wide: list[list[str]] = []
    compiled: list[list[str]] = []
    names = [f"{runtime}, {count}" for runtime in TARGETS for count in COUNTS]
    for runtime in runtimes or TARGETS:
        place = out / f"{runtime}-{blocks}"
        if _child("--lower", [runtime, str(source), str(place)], wide):
            pages.save_rows("runtimes", "wide", WIDE, wide, names=names, key=2)
        words = [runtime, str(place), f"{place}-compiled"]
        if record(runtime).compiled_from and place.exists() and _child("--compile", words, compiled):
            pages.save_rows("runtimes", "compiled", COMPILED, compiled, names=names, key=2)


def _child(step: str, words: list[str], rows: list[list[str]]) -> bool:
    """Let a process of its own add a row; False where it failed, and said why."""
    command = [sys.executable, "-m", "benchmarks.speed.wide", step, *words]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode == 0:
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    return done.returncode == 0


def compile_lowered(runtime: str, lowered: Path, out: Path) -> list[str]:
    """Compile in children of this process; the row of what it took."""
    from targets.registry import find

    begin = time.perf_counter()
    artifact = find(TARGETS[runtime], runtime=runtime).compile(Artifact.open(lowered), out)
    wall, children = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = [f"{wall:.1f}", f"{children.ru_utime + children.ru_stime:.1f}"]
    sizes = [f"{artifact.bytes / 1e9:.2f}", f"{children.ru_maxrss * 1024 / 1e9:.2f}"]
    return [runtime, str(artifact.model.num_layers), *seconds, *sizes]


def lower(runtime: str, source: Path, out: Path) -> list[str]:
    """Lower in this process; the row of what it took."""
    from targets.registry import find

    target = find(TARGETS[runtime], runtime=runtime)
    if runtime in LIBRARIES:
        importlib.import_module(LIBRARIES[runtime])  # not what is measured
    quantized = QuantizedCheckpoint.open(source)
    ranges = any_ranges(quantized) if target.needs_ranges else None
    before, begin, cpu = peak(), time.perf_counter(), time.process_time()
    artifact = target.lower(quantized, ranges, out, context=512, chunk=128)
    seconds = [f"{time.perf_counter() - begin:.1f}", f"{time.process_time() - cpu:.1f}"]
    grown, size = peak() - before, artifact.bytes
    sizes = [f"{size / 1e9:.2f}", f"{grown / 1e9:.2f}"]
    return [runtime, str(quantized.config.num_layers), *seconds, *sizes, "yes" if grown <= size + 2e9 else "**no**"]


def any_ranges(quantized: QuantizedCheckpoint) -> Ranges:
    """Ranges of the right names: those of a narrow model with as many blocks."""
    config = ModelConfig.from_dict(quantized.config.to_dict() | narrow())
    recorded = Recorded()
    ops = TorchOps(Parameters(Narrow(config)), config.rms_norm_eps, recorded)
    x, mask = ops.input("hidden", torch.randn(1, 4, config.hidden_size)), torch.zeros(1, 1, 4, 4)
    lowered.decoder(ops, config, x, torch.arange(4), mask, [None] * config.num_layers, 4)
    return Ranges(weights=quantized.digest(), samples=1, length=4, values=recorded.seen)


def narrow() -> dict[str, int]:
    return {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4}


class Narrow:
    """Random float weights, 8 wide."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def block(self, index: int) -> dict[str, torch.Tensor]:
        shapes = block_of(self.config).shapes.items()
        return {name: torch.randn(shape) if len(shape) == 2 else torch.ones(shape) for name, shape in shapes}

    def embedding(self) -> torch.Tensor:
        return torch.randn(8, 8)

    def final_norm(self) -> torch.Tensor:
        return torch.ones(8)

    def head(self) -> torch.Tensor:
        return torch.randn(8, 8)


def write_random(folder: Path, blocks: int) -> None:
    """A quantized checkpoint of BlueLM-7B's width: 4 bits in groups of 32, head and embedding 8 bits a row."""
    config = ModelConfig.from_dict(
        {
            "architectures": ["BlueLMForCausalLM"],
            "vocab_size": ROWS,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": blocks,
            "num_attention_heads": HEADS,
            "use_stable_embedding": True,
        }
    )
    folder.mkdir(parents=True)
    ones = torch.ones(HIDDEN)
    table = random_tensor(ROWS, HIDDEN, 8, -1)
    write_piece(folder / EMBEDDING_FILE, Piece({EMBED: table}), "")
    write_piece(folder / HEAD_FILE, Piece({HEAD: table}, {"model.norm.weight": ones}), "")
    del table
    block = block_of(config)
    for index in range(blocks):
        prefix = f"model.layers.{index}"
        linears = {f"{prefix}.{name}": random_tensor(at.rows, at.columns, 4, 32) for name, at in block.linears.items()}
        vectors = {f"{prefix}.{name}.weight": torch.ones(norm.size) for name, norm in block.norms.items()}
        write_piece(folder / block_file(index), Piece(linears, vectors), "")
    finish(folder, config, Recipe.make({"method": "rtn"}), demo_checkpoint(), {})


def random_tensor(rows: int, columns: int, bits: int, group: int) -> QuantizedTensor:
    """Random codes; scales that float16 and bfloat16 both hold."""
    groups = 1 if group == -1 else columns // group
    return QuantizedTensor(
        torch.randint(2**bits, (rows, columns), dtype=torch.uint8),
        (torch.rand(rows, groups) * 0.01 + 0.001).bfloat16().half(),
        torch.full((rows, groups), 2 ** (bits - 1), dtype=torch.uint8),
        bits,
        group,
    )


if __name__ == "__main__":
    if sys.argv[1] == "--lower":
        print(json.dumps(lower(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
    elif sys.argv[1] == "--compile":
        print(json.dumps(compile_lowered(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
    else:
        main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
