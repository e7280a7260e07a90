"""A model that we did not train, from the command line to its answer: each target with default recipe and budget.

    python -m benchmarks.interop.real_models OUT --smollm2 FOLDER [--only RUNTIME ...]

FOLDER is a Hugging Face folder of SmolLM2-135M-Instruct. Each run is the command that a user gives; its report says
what was found, `generate` what the artifact answers, and transformers what the float model does. Runs stay in OUT, so
a broken-off series goes on where it stopped. Writes results/interop/real_models.json and the page.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import pages
from eval.report import Report

RUNS: dict[str, str] = {
    "onnx-genai": "--target generic-arm64",
    "gguf": "--target generic-arm64 --runtime gguf",
    "litert": "--target generic-arm64 --runtime litert",
    "litert-lm": "--target generic-arm64 --runtime litert-lm",
    "executorch-xnnpack": "--target generic-arm64 --runtime executorch-xnnpack",
    "qnn-context": "--target snapdragon",
    "qnn-genai": "--target snapdragon --runtime qnn-genai",
    "dimensity": "--target dimensity",
    "coreml": "--target apple",
    "coreai": "--target apple --runtime coreai",
    "coreai-ane": "--target apple --runtime coreai-ane",
    "mlx": "--target apple --runtime mlx",
}
"""What is run: options behind the model's, by the name of the row."""
COLUMNS = ("run", "options", "verdict", "failed", "perplexity ratio", "KL, nats a token", "top-1",
           "KL to its own weights", "MB", "memory and time", "answer", "as transformers")  # fmt: skip
QUESTION, TOKENS = "What is the capital of France?", 16


def tool(*words: str) -> subprocess.CompletedProcess[str]:
    """The command line, as a user calls it."""
    return subprocess.run([sys.executable, "-m", "pipeline", *words], capture_output=True, text=True)


@cache
def float_answer(model: Path) -> str:
    """Greedy, by transformers, in the model's own template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForCausalLM.from_pretrained(model)
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = network.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
    return tokenizer.decode(found[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def take_over(run: Path) -> None:
    """Codes of an earlier run beside it, as a CI cache brings them: a run reuses what has its own inputs."""
    made = next(iter(sorted(run.parent.glob("*/.stages/quantized.json"))), None)
    if not run.exists() and made is not None:
        (run / ".stages").mkdir(parents=True)
        shutil.copy2(made, run / ".stages")
        shutil.copytree(made.parents[1] / "quantized", run / "quantized")


def row(out: Path, name: str, model: Path) -> list[str]:
    """Run it, and ask what came out."""
    run = out / "dist" / name
    take_over(run)
    done = tool(*RUNS[name].split(), "--model", str(model), "--out", str(run.parent), "--name", name)
    (out / f"{name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode not in (0, 3):
        return [name, RUNS[name], f"exit code {done.returncode}", _problem(done.stderr), *[""] * 8]
    report = Report.open(run)
    figures = {(m.name, m.subject): m.value for m in report.measurements}
    subject = next(iter(report.artifacts))
    asked = tool("generate", str(run), "--prompt", QUESTION, "--max-tokens", str(TOKENS))
    answer = asked.stdout.strip() if asked.returncode == 0 else _problem(asked.stderr)
    planned = re.search(r"Planned.*", done.stdout + done.stderr)

    def told(figure: str, form: str) -> str:
        value = figures.get((figure, subject))
        return "" if value is None else format(value, form)

    failed = [f"{check.name} ({check.subject})" for check in report.checks if not check.passed]
    return [
        name, RUNS[name], "PASSED" if report.passed else "FAILED", ", ".join(failed),
        told("perplexity_ratio", ".3f"), told("mean_kl", ".3g"), told("top1_agreement", ".1%"),
        told("runtime_kl", ".2g"),
        f"{figures['artifact_bytes', 'files'] / 1e6:.0f}", " ".join(planned[0].split()) if planned else "",
        answer.replace("\n", " "), "the same" if answer == float_answer(model) else "another",
    ]  # fmt: skip


def _problem(said: str) -> str:
    """The first line of an error, for a cell."""
    line = next((line for line in said.splitlines() if "error" in line.lower()), said[-200:])
    return line.strip().replace("|", "/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--smollm2", type=Path, metavar="FOLDER", required=True)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=RUNS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows: list[list[str]] = []
    for name in given.only:
        rows.append(row(given.out.resolve(), name, given.smollm2.resolve()))
        print(rows[-1], flush=True)
        pages.save_rows("real_models", "smollm2", COLUMNS, rows, names=RUNS, question=QUESTION,
                        float_answer=float_answer(given.smollm2.resolve()))  # fmt: skip


if __name__ == "__main__":
    main()
