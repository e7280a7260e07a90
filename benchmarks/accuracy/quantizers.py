"""Ours beside the peers: seconds, peak memory and what is lost, from the same checkpoint, tokens and evaluator.

    python -m benchmarks.accuracy.quantizers OUT --train corpus_train.jsonl.gz --text corpus_heldout.jsonl.gz
                                        --peers DIR [--model FOLDER] [--sources d2l_en,wiki] [--only WORDS]

DIR holds one virtual environment a peer (`--setup` makes them): llmcompressor, gptqmodel, autoround, autoawq. Every
quantizer runs in a process of its own with two threads, on the same windows of the training corpus; embedding, last
norm and lm_head stay float. The dequantized weights are judged by one float32 decoder on held-out text. They gather in
OUT/made, with figures beside them: a run may be cut in parts by `--only`, and judged apart from `--make-only`. What is
judged is written to results/accuracy/quantizers.json, part "demo", or "real" with `--model` (a Hugging Face folder that
transformers reads), and to the page; other rows stay where model, texts and windows are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import pages
from benchmarks.accuracy.quality import FloatEnds, Loss, documents, held_out, judge, log_probabilities
from benchmarks.interop.peer_exports import llama_folder
from bluelm.block import block_of
from bluelm.checkpoint import Checkpoint
from bluelm.model import Decoder
from bluelm.system.files import demo_checkpoint
from bluelm.system.memory import peak
from bluelm.text.tokenizer import Tokenizer

WORKERS = Path(__file__).parents[1] / "peers"
PACKAGES = {
    "llmcompressor": ["llmcompressor==0.14.0"],
    "autoround": ["auto-round==0.16.1"],
    "autoawq": ["autoawq==0.2.9", "transformers==4.51.3"],
    "gptqmodel": [
        *(
            "accelerate",
            "transformers>=5,<6",
            "device-smi",
            "pypcre",
            "tokenicer",
            "logbar",
            "defuser",
            "torchao==0.18.0",
        ),
        *("datasets", "dill", "threadpoolctl", "ninja", "pillow", "protobuf", "jinja2", "requests", "sentencepiece"),
    ],
}
DISTRIBUTIONS = {"autoround": "auto-round"}
# (bits, group size, symmetric)
SETTINGS = {"4-bit g32 sym": (4, 32, True), "4-bit g32 asym": (4, 32, False), "4-bit g128 sym": (4, 128, True)}
SETTINGS["3-bit g32 sym"] = (3, 32, True)
# name -> (environment, worker, its own words), or our recipe's values
QUANTIZERS: dict[str, tuple[str, ...] | dict[str, Any]] = {
    "round to nearest": {"method": "rtn"},
    "llm-compressor GPTQ": ("llmcompressor", "llmcompressor_gptq.py"),
    "GPTQModel GPTQ": ("gptqmodel", "gptqmodel_gptq.py"),
    "ours GPTQ, plain": {"method": "gptq", "correction": 0.0, "sweeps": 0},  # without what we add to the method
    "ours GPTQ, no correction": {"method": "gptq", "correction": 0.0},  # one forward pass, as the peers
    "ours GPTQ": {"method": "gptq"},
    "auto-round 200 steps": ("autoround", "autoround.py"),
    "ours GPTQ, refine 120": {"method": "gptq", "refine": 120},
    "ours GPTQ, refine 200": {"method": "gptq", "refine": 200},
    "llm-compressor AWQ (mended)": ("llmcompressor", "llmcompressor_awq.py"),
    "AutoAWQ (as it is)": ("autoawq", "autoawq_awq.py"),
    "AutoAWQ (mended)": ("autoawq", "autoawq_awq.py", "mended"),
    "ours AWQ": {"method": "awq"},
}


@dataclass(frozen=True)
class Replaced:
    """A checkpoint whose blocks' linears are given."""

    ends: Checkpoint
    weights: Mapping[str, Tensor]

    @property
    def config(self) -> Any:
        return self.ends.config

    def block(self, index: int) -> dict[str, Tensor]:
        prefix = f"model.layers.{index}."
        own = self.ends.block(index)
        return own | {n: self.weights[f"{prefix}{n}"] for n in own if f"{prefix}{n}" in self.weights}


def main() -> None:
    options = _options()
    if options.setup:
        setup(options.peers)
    if options.ours:
        ours(options.model, options.tokens, options.out, json.loads(options.ours))
        return
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(options.model)
    tokenizer = checkpoint.tokenizer()
    count, length = map(int, options.calibration.split("x"))
    sources = options.sources.split(",") if options.sources else []
    tokens = training_windows(documents(options.train, sources), tokenizer, count, length)
    save_file({"tokens": tokens}, out / "tokens.safetensors")
    demo = options.model == demo_checkpoint()
    peers = Peers(llama_folder(checkpoint, out / "llama") if demo else options.model, out, options.peers)
    for setting, (bits, group_size, symmetric) in SETTINGS.items():
        for name, how in QUANTIZERS.items():
            if not all(word in f"{setting}, {name}." for word in options.only.split(",")):
                continue
            made = out / "made" / f"{setting}, {name}.safetensors".replace(" ", "-")
            if not made.with_suffix(".json").exists():
                made.parent.mkdir(exist_ok=True)
                if isinstance(how, dict):
                    values = {**how, "bits": bits, "group_size": group_size, "symmetric": symmetric}
                    arguments = ["-m", "benchmarks.accuracy.quantizers", str(made), "--model", str(options.model)]
                    arguments += ["--tokens", str(peers.tokens), "--ours", json.dumps(values)]
                    figures, version = _run([sys.executable, *arguments], out / "log.txt"), ""
                else:
                    figures = peers.run(how, made, bits, group_size, symmetric)
                    version = versions(peers.python(how[0]), [DISTRIBUTIONS.get(how[0], how[0])])
                if figures is None:
                    print(f"{setting}, {name}: failed, see {out / 'log.txt'}", flush=True)
                    continue
                row = {"setting": setting, "quantizer": name, "version": version, **figures}
                made.with_suffix(".json").write_text(json.dumps(row))
                print(f"{setting}, {name}: {figures['seconds']:.0f} s", flush=True)
    if not options.make_only:
        texts = {path.name: held_out(path, tokenizer, options.windows, sources) for path in options.text}
        about = {
            "model": "demo" if demo else options.model.name,
            "texts": {name: len(windows) for name, windows in texts.items()},
            "train": options.train.name,
            "sources": sources,
            "calibration": f"{len(tokens)} x {length}",
        }
        judge_made(out, checkpoint, texts, "demo" if demo else "real", about)


@dataclass(frozen=True)
class Peers:
    """What their workers read, and where their environments are."""

    model: Path
    out: Path
    environments: Path

    @property
    def tokens(self) -> Path:
        return self.out / "tokens.safetensors"

    def python(self, environment: str) -> Path:
        return self.environments / environment / "bin" / "python"

    def run(
        self, how: tuple[str, ...], made: Path, bits: int, group_size: int, symmetric: bool
    ) -> dict[str, float] | None:
        """Let a peer quantize into `made`; its figures, or None where it failed."""
        environment, worker, *words = how
        width = [str(bits), str(group_size), "sym" if symmetric else "asym"]
        command = [str(self.python(environment)), str(WORKERS / worker), str(self.model), str(self.tokens), str(made)]
        command += [*width, *words]
        return _run(command, self.out / "log.txt")


def judge_made(
    out: Path, checkpoint: Checkpoint, texts: Mapping[str, Tensor], part: str, about: dict[str, Any]
) -> None:
    """Judge what was made and not judged yet, and write it down.

    The float model runs again for each: its answers over a real vocabulary would take gigabytes.
    """
    exact = Decoder.from_weights(checkpoint)
    ends = ("KL", "top-1", "perplexity / float")
    heads = [f"{head}, {name.partition('.')[0]}" if len(texts) > 1 else head for name in texts for head in ends]
    columns = ("setting", "quantizer", "version", *heads, "s", "CPU s", "MiB")
    rows: list[list[str]] = []
    pairs = [(setting, name) for setting in SETTINGS for name in QUANTIZERS]
    for setting, name in pairs:
        made = out / "made" / f"{setting}, {name}.safetensors".replace(" ", "-")
        path = made.with_suffix(".json")
        if not path.exists() or "kl" in (row := json.loads(path.read_text())):
            continue
        rounded = Decoder.from_weights(FloatEnds(Replaced(checkpoint, load_file(made)), checkpoint))
        losses = [
            judge(log_probabilities(exact, windows), log_probabilities(rounded, windows), windows)
            for windows in texts.values()
        ]
        path.write_text(json.dumps({**row, "kl": [loss.kl.value for loss in losses]}))
        cost = [f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", f"{row['MiB']:.0f}"]
        rows.append([setting, name, row["version"], *(cell for loss in losses for cell in _cells(loss)), *cost])
        print(rows[-1], flush=True)
        names = [", ".join(pair) for pair in pairs]
        pages.save_rows("quantizers", part, columns, rows, names=names, key=2, **about)


def _cells(loss: Loss) -> list[str]:
    kl = f"{loss.kl.value:.5f} ± {loss.kl.error or 0:.5f}"
    return [kl, f"{loss.top1.value:.4f}", f"{loss.perplexity_ratio.value:.4f}"]


def versions(python: Path, packages: Sequence[str]) -> str:
    """Of packages in a peer's environment."""
    code = f"from importlib.metadata import version\nprint(*[version(name) for name in {list(packages)!r}], sep=', ')"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def ours(model: Path, tokens: Path, out: Path, values: dict[str, Any]) -> None:
    """Quantize in this process, as the peers' workers do."""
    from calibration.samples import CalibrationReport, Samples
    from compress.engine import quantize
    from compress.recipe import Recipe

    torch.set_num_threads(2)
    checkpoint, windows = Checkpoint.open(model), load_file(tokens)["tokens"]
    count, length = windows.shape
    about = CalibrationReport("given", "", count, 0, count, length, count * length, 0, 0.0, 0.0, 0.0, 0.0, ())
    folder = out.with_suffix(".ours")
    shutil.rmtree(folder, ignore_errors=True)
    begin, cpu = time.perf_counter(), time.process_time()
    quantized = quantize(checkpoint, Samples(windows, about), Recipe.make({**values, "length": length}), folder)
    figures = {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu,
        "MiB": peak() / 2**20,
    }
    config = checkpoint.config
    names = [f"model.layers.{layer}.{name}" for layer in range(config.num_layers) for name in block_of(config).linears]
    found = {f"{name}.weight": quantized.linear(name).dequantize() for name in names}
    for layer in range(checkpoint.config.num_layers):  # AWQ's foldings change the norms as well
        local = quantized.block(layer)
        found |= {f"model.layers.{layer}.{name}": value for name, value in local.items() if value.ndim == 1}
    save_file(found, out)
    print(json.dumps(figures))


def training_windows(texts: Iterable[str], tokenizer: Tokenizer, count: int, length: int) -> Tensor:
    """int64 [count, length]: windows evenly spread over the beginning of a corpus, its documents laid end to end."""
    stream: list[int] = []
    for text in texts:
        stream += [*tokenizer.encode(text, bos=True, marks=True), tokenizer.eos or 0]
        if len(stream) > 40 * count * length:
            break
    windows = torch.tensor(stream[: len(stream) // length * length]).view(-1, length)
    return windows[torch.linspace(0, len(windows) - 1, count).round().long()]


def setup(folder: Path) -> None:
    """One environment a peer; torch first, in the version here, so that pip does not fetch another one."""
    here = f"torch=={torch.__version__.partition('+')[0]}"
    for name, packages in PACKAGES.items():
        pip = [str(folder / name / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        subprocess.run([*pip, here], check=True)
        subprocess.run([*pip, here, *packages], check=True)
        if name == "gptqmodel":  # it declares a newer torch than there is for CPUs
            subprocess.run([*pip, "--no-deps", "gptqmodel==7.7.0", "optimum==2.3.0"], check=True)


def _run(command: list[str], log: Path) -> dict[str, float] | None:
    """Figures that a worker printed last, or None where it failed; what it said is appended to the log."""
    threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "GPTQMODEL_CPU_WORKERS": "2"}  # waiting is no work
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    with log.open("a") as file:
        file.write(f"{command}\n{ran.stdout}\n{ran.stderr}\n")
    if ran.returncode:
        return None
    return json.loads(next(line for line in reversed(ran.stdout.splitlines()) if line.startswith('{"seconds"')))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=demo_checkpoint())
    parser.add_argument("--train", type=Path, help="calibration documents, .jsonl.gz")
    parser.add_argument("--text", type=Path, nargs="+", help="held-out documents, .jsonl.gz or .txt")
    parser.add_argument("--sources", default="", help="of .jsonl.gz documents, take these alone")
    parser.add_argument("--calibration", default="128x256", help="windows of the training corpus, and tokens in each")
    parser.add_argument("--windows", type=int, default=128, help="windows of each held-out text")
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="folder of the peers' environments")
    parser.add_argument("--setup", action="store_true", help="make the environments first")
    parser.add_argument(
        "--only", default="", help="words, separated by commas, that `SETTING, QUANTIZER.` must contain"
    )
    parser.add_argument("--make-only", action="store_true", help="quantize, and leave judging to a later run")
    parser.add_argument("--ours", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
