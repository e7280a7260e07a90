"""Quantizing at a real model's width: memory by block, seconds by stage, with random weights.

    python -m benchmarks.speed.full_width make FOLDER --blocks 2 [--shape bluelm-7b|llama-13b-8kv|half|quarter]
    python -m benchmarks.speed.full_width run FOLDER OUT [--max-memory 6GB] [--samples 128] [--length 512]
        [--set key=value …]

`make` writes a checkpoint in bfloat16, a shard a block, without a tokenizer. `run` quantizes it in this process on
random tokens and prints, behind every stage of every block, its seconds (wall and CPU) and the peak memory of the
process so far, beside what it holds now. At the end it writes its rows of results/speed/full_width.json, and the page.
A run that was cut off goes on; what it tells then is that of the process that goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from rich.console import Console
from safetensors.torch import save_file

from benchmarks import pages
from bluelm.checkpoint import Checkpoint, model_shapes
from bluelm.config import ModelConfig
from bluelm.system.files import demo_checkpoint
from bluelm.system.memory import peak
from calibration.samples import CalibrationReport, Samples
from compress.engine import quantize
from compress.recipe import Recipe
from pipeline.run.resources import how_far_off, plan_quantizing, show_resources

SHAPES: dict[str, dict[str, int]] = {
    "bluelm-7b": {
        "vocab_size": 100096,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "half": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "quarter": {
        "vocab_size": 100096,
        "hidden_size": 1024,
        "intermediate_size": 2752,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "llama-13b-8kv": {
        "vocab_size": 100096,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
}

STAGES = ("run", "stage", "CPU s of a block")
MEMORY = ("run", "planned", "peak behind the first block", "peak at the end")


def make(folder: Path, shape: str, blocks: int) -> None:
    """Write a checkpoint whose activations stay near 1: norms of ones, weights scaled by their width."""
    folder.mkdir(parents=True)
    data = json.loads((demo_checkpoint() / "config.json").read_text()) | SHAPES[shape] | {"num_hidden_layers": blocks}
    (folder / "config.json").write_text(json.dumps(data, indent=1))
    shards: dict[str, list[str]] = {}
    shapes = model_shapes(ModelConfig.from_dict(data))
    for name in shapes:
        shards.setdefault(name.split(".")[2] if name.startswith("model.layers.") else name, []).append(name)
    index: dict[str, str] = {}
    for number, names in enumerate(shards.values()):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        generator = torch.Generator().manual_seed(number)
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            size = shapes[name]
            drawn = torch.randn(size, generator=generator) * size[-1] ** -0.5 if len(size) == 2 else torch.ones(size)
            tensors[name] = (torch.zeros(size) if name.endswith("bias") else drawn).to(torch.bfloat16)
        save_file(tensors, folder / file)
        index |= dict.fromkeys(names, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def run(options: argparse.Namespace) -> None:
    """Quantize, print what each step took and write it down."""
    values = dict(pair.split("=", 1) for pair in options.set)
    chosen: dict[str, Any] = {key: yaml.safe_load(value) for key, value in values.items()}
    checkpoint = Checkpoint.open(options.folder)
    recipe = Recipe.make(
        {
            "group_size": -1 if checkpoint.config.intermediate_size % 128 else 128,
            **chosen,
            "samples": options.samples,
            "length": options.length,
        }
    )
    count, length = recipe.samples, recipe.length
    tokens = torch.randint(checkpoint.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))
    about = CalibrationReport("random", "", count, 0, count, length, count * length, 0, 0.0, 0.0, 0.0, 0.0, ())
    planned = plan_quantizing(checkpoint, recipe, options.max_memory)
    show_resources(planned, Console())
    log = logging.getLogger("bluelm_export")
    log.setLevel(logging.INFO)
    watch = _Watch()
    log.addHandler(watch)
    begin, on_disk = time.monotonic(), planned.quantizing.on_disk
    quantize(checkpoint, Samples(tokens, about), recipe, options.out, on_disk=on_disk)
    print(how_far_off(planned, peak(), time.monotonic() - begin), flush=True)
    config = checkpoint.config
    shape = f"{config.hidden_size} wide, {config.num_layers} blocks, {count} x {length}"
    name = ", ".join([shape, "on disk" if on_disk else "in RAM", *options.set])
    stages = [[name, stage, watch.seconds(stage)] for stage in watch.laps]
    memory = [f"{size / 1e9:.2f} GB" for size in (planned.memory, watch.first_peak, peak())]
    pages.save_rows("full_width", "stages", STAGES, stages, key=2)
    pages.save_rows("full_width", "memory", MEMORY, [[name, *memory]])


class _Watch(logging.Handler):
    """Prints what the engine logs, and keeps the CPU seconds of each stage of the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.laps: dict[str, list[float]] = {}
        self.first_peak = 0

    def emit(self, record: logging.LogRecord) -> None:
        held = psutil.Process().memory_info().rss
        print(f"{record.getMessage()}; {held / 1e9:.2f} GB, peak {peak() / 1e9:.2f} GB", flush=True)
        if isinstance(record.args, tuple) and len(record.args) == 4:  # what, stage, seconds, CPU seconds
            block, stage, _, cpu = record.args
            if str(block).startswith("block "):
                self.laps.setdefault(str(stage), []).append(float(str(cpu)))
            if block == "block 0":
                self.first_peak = peak()

    def seconds(self, stage: str) -> str:
        """From the fastest block to the slowest."""
        ends = [f"{seconds:.2g}" for seconds in (min(self.laps[stage]), max(self.laps[stage]))]
        return " to ".join(dict.fromkeys(ends))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--shape", choices=list(SHAPES), default="bluelm-7b")
    making.add_argument("--blocks", type=int, default=2)
    running = commands.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("out", type=Path)
    running.add_argument("--max-memory")
    running.add_argument("--samples", type=int, default=128)
    running.add_argument("--length", type=int, default=512)
    running.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="values of the recipe")
    options = parser.parse_args()
    if options.command == "make":
        make(options.folder, options.shape, options.blocks)
    else:
        run(options)


if __name__ == "__main__":
    main()
