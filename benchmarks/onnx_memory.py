"""Time and memory of lowering to ONNX at BlueLM-7B's width, from a quantized checkpoint of random codes.

    python -m benchmarks.onnx_memory OUT [--blocks 2]

Each export runs in a process of its own; growth is its peak resident memory less that after its imports.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from bluelm.config import ModelConfig
from bluelm.weights import LINEARS, NORMS
from compress.pieces import Piece, write_piece
from compress.quantized import QuantizedTensor
from compress.recipe import Recipe
from compress.store import EMBED, EMBEDDING_FILE, HEAD, HEAD_FILE, QuantizedCheckpoint, block_file, finish
from export import lowered, onnx_cpu, onnx_npu
from export.ranges import Ranges
from export.torch_ops import Parameters, Recorded, TorchOps

KINDS = ("onnx-npu", "onnx-cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--kind", choices=KINDS, help="export in this process")
    arguments = parser.parse_args()
    source = arguments.out / f"quantized-{arguments.blocks}"
    if arguments.kind:
        export(source, arguments.out / f"{arguments.kind}-{arguments.blocks}", arguments.kind)
        return
    if not source.exists():
        write_random(source, arguments.blocks)
    for kind in KINDS:
        command = [sys.executable, "-m", "benchmarks.onnx_memory", str(arguments.out), "--kind", kind]
        subprocess.run([*command, "--blocks", str(arguments.blocks)], check=True)


def export(source: Path, out: Path, kind: str) -> None:
    """Lower and print time, growth and size."""
    before, began, used = peak(), time.perf_counter(), time.process_time()
    quantized = QuantizedCheckpoint.open(source)
    if kind == "onnx-npu":
        artifact = onnx_npu.export(quantized, any_ranges(quantized), out)
    else:
        artifact = onnx_cpu.export(quantized, out)
    wall, cpu = time.perf_counter() - began, time.process_time() - used
    print(
        f"{kind}: {quantized.config.num_layers} blocks, {wall:.0f} s ({cpu:.0f} s of CPU), "
        f"grew by {(peak() - before) / 1e9:.2f} GB, artifact {artifact.bytes / 1e9:.2f} GB",
        flush=True,
    )


def peak() -> int:
    """Peak resident memory of this process in bytes. (ru_maxrss would begin with the parent's.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


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
        linears = {f"{name}.weight": torch.randn(8, 8) for name in LINEARS}
        return linears | {f"{n}.weight": torch.ones(8) for n in NORMS}

    def embedding(self) -> torch.Tensor:
        return torch.randn(8, 8)

    def final_norm(self) -> torch.Tensor:
        return torch.ones(8)

    def head(self) -> torch.Tensor:
        return torch.randn(8, 8)


def write_random(folder: Path, blocks: int) -> None:
    """A quantized checkpoint of BlueLM-7B's width: 4 bits in groups of 32, head and embedding 8 bits a row."""
    hidden, inner, rows = 4096, 11008, 100096
    config = ModelConfig.from_dict(
        {
            "architectures": ["BlueLMForCausalLM"],
            "vocab_size": rows,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": blocks,
            "num_attention_heads": 32,
            "use_stable_embedding": True,
        }
    )
    folder.mkdir(parents=True)
    ones = torch.ones(hidden)
    table = random_tensor(rows, hidden, 8, -1)
    write_piece(folder / EMBEDDING_FILE, Piece({EMBED: table}), "")
    write_piece(folder / HEAD_FILE, Piece({HEAD: table}, {"model.norm.weight": ones}), "")
    del table
    shapes = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    for index in range(blocks):
        prefix = f"model.layers.{index}"
        linears = {f"{prefix}.{name}": random_tensor(*shapes.get(name, (hidden, hidden)), 4, 32) for name in LINEARS}
        vectors = {f"{prefix}.{name}.weight": torch.ones(hidden) for name in NORMS}
        write_piece(folder / block_file(index), Piece(linears, vectors), "")
    finish(folder, config, Recipe.make({"method": "rtn"}), folder, {})


def random_tensor(rows: int, columns: int, bits: int, group: int) -> QuantizedTensor:
    groups = 1 if group == -1 else columns // group
    return QuantizedTensor(
        torch.randint(2**bits, (rows, columns), dtype=torch.uint8),
        (torch.rand(rows, groups) * 0.01 + 0.001).half(),
        torch.full((rows, groups), 2 ** (bits - 1), dtype=torch.uint8),
        bits,
        group,
    )


if __name__ == "__main__":
    main()
