"""What each method and width loses on held-out text: dequantized weights in the float decoder, against float32.

    python -m benchmarks.accuracy.quality --text FILE.jsonl[.gz] [--windows 128] [--only NAME]

Calibrates with the bundled set, 128 windows of 256 tokens. Held-out documents are laid end to end, each as `<s> text
</s>`, and cut into windows of 256 tokens; `--windows` of them are taken, evenly spread. Errors are standard errors over
windows. Writes results/accuracy/quality.json and the page; settings that are not run again keep their rows where text
and number of windows are the same.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import pages
from bluelm.checkpoint import Checkpoint
from bluelm.model import Decoder
from bluelm.system.files import demo_checkpoint
from bluelm.text.tokenizer import Tokenizer
from calibration.samples import load_samples
from calibration.sources import document
from compress.engine import quantize
from compress.recipe import Recipe
from eval.accuracy import metrics
from eval.accuracy.metrics import Estimate, Float

LENGTH = 256
COLUMNS = ("setting", "mean KL", "99 % KL", "top-1", "perplexity / float")
HELDOUT = Path(__file__).parents[2] / "eval" / "data" / "heldout.jsonl"
G32: dict[str, Any] = {"bits": 4, "group_size": 32}
G128: dict[str, Any] = {"bits": 4, "group_size": 128}
ROW: dict[str, Any] = {"bits": 4, "group_size": -1}

# name -> (recipe, float head and embedding: comparable with quantizers that leave those alone)
SETTINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "rtn g32 symmetric": ({"method": "rtn", **G32}, False),
    "gptq g32 symmetric": ({"method": "gptq", **G32}, False),
    "awq g32 symmetric": ({"method": "awq", **G32}, False),
    "rtn g32 asymmetric": ({"method": "rtn", **G32, "symmetric": False}, False),
    "gptq g32 asymmetric": ({"method": "gptq", **G32, "symmetric": False}, False),
    "awq g32 asymmetric": ({"method": "awq", **G32, "symmetric": False}, False),
    "rtn g128 symmetric": ({"method": "rtn", **G128}, False),
    "gptq g128 symmetric": ({"method": "gptq", **G128}, False),
    "awq g128 symmetric": ({"method": "awq", **G128}, False),
    "rtn row symmetric": ({"method": "rtn", **ROW}, False),
    "gptq row symmetric": ({"method": "gptq", **ROW}, False),
    "rtn 8 bit g32": ({"method": "rtn", "bits": 8, "group_size": 32}, False),
    "gptq 8 bit g32": ({"method": "gptq", "bits": 8, "group_size": 32}, False),
    "gptq 8 bit g32, head g32": (
        {"method": "gptq", "bits": 8, "group_size": 32, "head_group_size": 32},
        False,
    ),
    "float head, rtn g32 symmetric": ({"method": "rtn", **G32}, True),
    "float head, gptq g32 symmetric": ({"method": "gptq", **G32}, True),
    "float head, gptq g32 symmetric, correction 0": ({"method": "gptq", **G32, "correction": 0.0}, True),
    "float head, gptq g32 asymmetric": ({"method": "gptq", **G32, "symmetric": False}, True),
    "float head, gptq g128 symmetric": ({"method": "gptq", **G128}, True),
}


@dataclass(frozen=True)
class FloatEnds:
    """Weights whose blocks are quantized and whose embedding, last norm and head are the float model's."""

    blocks: Any
    ends: Checkpoint

    @property
    def config(self) -> Any:
        return self.ends.config

    def block(self, index: int) -> dict[str, Tensor]:
        return self.blocks.block(index)

    def embedding(self) -> Tensor:
        return self.ends.embedding()

    def final_norm(self) -> Tensor:
        return self.ends.final_norm()

    def head(self) -> Tensor:
        return self.ends.head()


@dataclass(frozen=True)
class Loss:
    """Figures of one model beside the float one."""

    kl: Estimate
    kl_99: Estimate
    top1: Estimate
    perplexity_ratio: Estimate


def main() -> None:
    options = _options()
    checkpoint = Checkpoint.open(demo_checkpoint())
    tokenizer = checkpoint.tokenizer()
    windows = held_out(options.text, tokenizer, options.windows)
    reference = list(log_probabilities(Decoder.from_weights(checkpoint), windows))
    samples = load_samples(None, tokenizer, 128, LENGTH, 0)
    rows: list[list[str]] = []
    for name, (values, float_ends) in SETTINGS.items():
        if options.only not in name:
            continue
        recipe = Recipe.make({"length": LENGTH, **values})
        with tempfile.TemporaryDirectory() as folder:
            quantized = quantize(checkpoint, samples, recipe, Path(folder) / "q")
            weights = FloatEnds(quantized, checkpoint) if float_ends else quantized
            loss = judge(reference, log_probabilities(Decoder.from_weights(weights), windows), windows)
        rows.append([name, *_cells(loss)])
        print(rows[-1], flush=True)
        of = {"text": options.text.name, "windows": len(windows), "tokens": windows.numel()}
        pages.save_rows("quality", "settings", COLUMNS, rows, names=SETTINGS, **of)


def documents(path: Path, sources: Sequence[str] = ()) -> Iterator[str]:
    """Texts of a .jsonl or .jsonl.gz file, of those sources alone if any are named; a .txt file is one text."""
    if path.suffix == ".txt":
        yield path.read_text(encoding="utf-8")
        return
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if not sources or row["source"] in sources:
                yield document(row, str(path)).content


def held_out(path: Path, tokenizer: Tokenizer, count: int, sources: Sequence[str] = ()) -> Tensor:
    """int64 [windows, LENGTH], evenly spread over a file's documents."""
    stream: list[int] = []
    for text in documents(path, sources):
        stream += [*tokenizer.encode(text, bos=True, marks=True), tokenizer.eos or 0]
    windows = torch.tensor(stream[: len(stream) // LENGTH * LENGTH]).view(-1, LENGTH)
    chosen = torch.linspace(0, len(windows) - 1, min(count, len(windows))).round().long()
    return windows[chosen]


def log_probabilities(decoder: Decoder, windows: Tensor) -> Iterator[Float]:
    """float64 [LENGTH - 1, vocab] of each window: predictions of its tokens from the second on."""
    with torch.inference_mode():
        for window in windows:
            yield metrics.log_softmax(decoder(window[None])[0, :-1].numpy())


def judge(reference: Iterable[Float], candidate: Iterator[Float], windows: Tensor) -> Loss:
    """The candidate's figures, window by window."""
    kl, same, worse = [], [], []
    for exact, found, window in zip(reference, candidate, windows, strict=True):
        targets = window[1:].numpy()
        kl.append(metrics.kl_divergence(exact, found))
        same.append(metrics.top1_agreement(exact, found))
        worse.append(metrics.negative_log_likelihood(found, targets) - metrics.negative_log_likelihood(exact, targets))
    clusters = np.repeat(np.arange(len(kl)), LENGTH - 1)
    divergence = np.concatenate(kl)
    return Loss(
        metrics.mean(divergence, clusters),
        metrics.quantile(divergence, clusters, 0.99),
        metrics.mean(np.concatenate(same), clusters),
        metrics.exp_mean(np.concatenate(worse), clusters),
    )


def _cells(loss: Loss) -> list[str]:
    def show(found: Estimate, digits: int) -> str:
        return f"{found.value:.{digits}f} ± {found.error or 0:.{digits}f}"

    return [show(loss.kl, 5), show(loss.kl_99, 4), show(loss.top1, 4), show(loss.perplexity_ratio, 4)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=HELDOUT, help="held-out documents, .jsonl or .jsonl.gz")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--only", default="", help="settings whose name contains this")
    return parser.parse_args()


if __name__ == "__main__":
    main()
