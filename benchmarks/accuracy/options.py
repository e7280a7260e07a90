"""What the recipe's further options do: mixed precision, AWQ and rotations where channels are outliers, activations.

    python -m benchmarks.accuracy.options OUT --text corpus_heldout.jsonl.gz [--windows 24] [--only WORD]

On the demo checkpoint, and on the same function with planted outlier channels: in every block 5 channels of both norms'
weights are multiplied by c from 20 to 50, and the columns behind them divided by it. Calibration: the bundled set, 32
windows of 256 tokens. KL to the float model on held-out windows of 256 tokens, of the dequantized weights in the float
decoder; "a16", "a8": through the twin of the NPU artifact, with calibrated activations of 16 and 8 bits and a cache of
16 bits. Everything is quantized, head and embedding too. Writes the part "options" of results/accuracy/quantizers.json
and the page; rows that are not run again stay where text and number of windows are the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import pages
from benchmarks.accuracy.quality import LENGTH, held_out, log_probabilities
from bluelm.checkpoint import Checkpoint
from bluelm.model import Decoder
from bluelm.system.files import demo_checkpoint
from calibration.samples import load_samples
from compress.checkpoint.store import QuantizedCheckpoint
from compress.engine import quantize
from compress.recipe import Recipe
from compress.widths.allocate import choose
from eval.accuracy import metrics
from eval.accuracy.metrics import Float
from export.lowering.ranges import Ranges, calibrate
from targets.host.torch_runtime import TwinRuntime
from tests.support.checkpoints.rounded import linear_names

COLUMNS = ("model", "recipe", "MB", "linears of 8 bits", "KL", "KL, a16", "KL, a8")
CHANNELS, FACTORS = [3, 50, 77, 120, 201], [50.0, 30.0, 50.0, 20.0, 40.0]
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
RTN, GPTQ, AWQ = {"method": "rtn"}, {"method": "gptq"}, {"method": "awq"}
# name -> recipe; a size is a share of what w4-g32 takes
WEIGHTS: dict[str, dict[str, Any]] = {
    "rtn w4-g32": RTN,
    "rtn auto, as large": {**RTN, "bits": "auto"},
    "rtn auto, 0.95 of it": {**RTN, "bits": "auto", "share": 0.95},
    "rtn auto, 1.15 of it": {**RTN, "bits": "auto", "share": 1.15},
    "awq w4-g32": AWQ,
    "gptq w4-g32": GPTQ,
    "gptq auto, as large": {**GPTQ, "bits": "auto"},
}
OUTLIERS: dict[str, dict[str, Any]] = {
    "rtn w4-g32": RTN,
    "rtn w4-g32, rotated": {**RTN, "rotate": True},
    "awq w4-g32": AWQ,
    "gptq w4-g32": GPTQ,
    "awq+gptq w4-g32": {"method": "awq+gptq"},
    "gptq w4-g32, rotated": {**GPTQ, "rotate": True},
}


def main() -> None:
    options = _options()
    out: Path = options.out
    shutil.rmtree(out, ignore_errors=True)
    demo = Checkpoint.open(demo_checkpoint())
    planted = Checkpoint.open(plant(demo, out / "planted"))
    windows = held_out(options.text, demo.tokenizer(), options.windows)
    reference = list(log_probabilities(Decoder.from_weights(demo), windows))
    rows: list[list[str]] = []
    cases = {"demo": (demo, WEIGHTS), "planted outliers": (planted, OUTLIERS)}
    for model, (checkpoint, recipes) in cases.items():
        for name, values in recipes.items():
            if options.only not in f"{model} {name}":
                continue
            folder = out / f"{model} {name}".replace(" ", "-")
            quantized = make(checkpoint, dict(values), folder)
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
            wide = sum(quantized.linear(linear).bits == 8 for linear in linear_names(quantized) if linear != "lm_head")
            found = [divergence(reference, log_probabilities(Decoder.from_weights(quantized), windows))]
            if checkpoint is planted:
                ranges = calibrate(quantized, windows_of(checkpoint)[:8])
                found += [divergence(reference, twin(quantized, ranges, bits, windows)) for bits in (16, 8)]
            shown = [f"{value:.5f}" for value in found] + ["-"] * (3 - len(found))
            rows.append([model, name, f"{size:.2f}", str(wide), *shown])
            print(rows[-1], flush=True)
            names = [f"{one}, {recipe}" for one, (_, chosen) in cases.items() for recipe in chosen]
            about = {"text": options.text.name, "windows": len(windows)}
            pages.save_rows("quantizers", "options", COLUMNS, rows, names=names, key=2, **about)


def windows_of(checkpoint: Checkpoint) -> Tensor:
    """Calibration windows, int64 [32, LENGTH]."""
    return load_samples(None, checkpoint.tokenizer(), 32, LENGTH, 0).tokens


def make(checkpoint: Checkpoint, values: dict[str, Any], folder: Path) -> QuantizedCheckpoint:
    """Quantize; `share` of the plain recipe's size where the widths are chosen."""
    share = values.pop("share", 1.0)
    recipe = Recipe.make({**values, "samples": 32, "length": LENGTH})
    samples = load_samples(None, checkpoint.tokenizer(), 32, LENGTH, 0)
    if recipe.auto:
        chosen = choose(checkpoint, samples.tokens, recipe)
        if share != 1:
            limit = int(share * chosen.allocation.size)
            chosen = choose(checkpoint, samples.tokens, Recipe.make({**recipe.model_dump(), "size": limit}))
        recipe = chosen.recipe
    return quantize(checkpoint, samples, recipe, folder)


def twin(quantized: QuantizedCheckpoint, ranges: Ranges, bits: int, windows: Tensor) -> Any:
    """Log-probabilities of the NPU artifact's twin, window by window."""
    runtime = TwinRuntime(quantized, ranges.model_copy(update={"activation_bits": bits}), LENGTH)
    for window in windows:
        yield metrics.log_softmax(runtime.logits(window.tolist())[:-1])


def divergence(reference: list[Float], candidate: Any) -> float:
    """Mean KL in nats a token."""
    pairs = zip(reference, candidate, strict=True)
    return float(torch.tensor([metrics.kl_divergence(exact, found).mean() for exact, found in pairs]).mean())


def plant(checkpoint: Checkpoint, folder: Path) -> Path:
    """A folder of the same function with outlier channels."""
    folder.mkdir(parents=True)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.tensors}
    factor = torch.ones(checkpoint.config.hidden_size)
    factor[CHANNELS] = torch.tensor(FACTORS)
    for index in range(checkpoint.config.num_layers):
        prefix = f"model.layers.{index}."
        for norm, linears in READERS.items():
            tensors[f"{prefix}{norm}.weight"] *= factor
            for linear in linears:
                tensors[f"{prefix}{linear}.weight"] /= factor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((checkpoint.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    for path in checkpoint.folder.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    return folder


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="held-out documents, .jsonl.gz")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--only", default="", help="rows that contain this")
    return parser.parse_args()


if __name__ == "__main__":
    main()
