"""Honest runs: every one must pass the gate, with the default limits but for a wider one on top-1.

    python -m benchmarks.gate.honest OUT

The demo checkpoint, and the same weights under three more architectures' names and layouts, through every method,
several widths, seeds and calibration sets, judged on the bundled text or on one of its domains, on every CPU runtime.
OUT keeps what was made, and `honest.jsonl`, so that a run that was broken off goes on; `python -m benchmarks.gate.page`
writes the page from it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.gate.bench import Bench, Results, timed, told
from bluelm.checkpoint import Checkpoint
from bluelm.system.files import demo_checkpoint
from bluelm.text.tokenizer import TOKENIZER_FILES
from eval.heldout import BUNDLED
from export.artifacts.artifact import Format
from tests.support.damages import sound

TOKENS = 2048  # few, so that errors are large
TOP1 = {"min_top1_agreement": 0.9}  # rounding to nearest agrees with the float demo in 0.95 of the tokens
SHORT = {"samples": 16, "length": 128}  # of calibration text: few, so that seeds differ


@dataclass(frozen=True)
class Honest:
    """One run: how the weights were rounded, of which architecture, what it is judged on, and where it runs."""

    name: str
    recipe: dict[str, Any] = field(default_factory=dict[str, Any])
    architecture: str = "BlueLM"
    text: str = "bundled"
    format: Format = "onnx-cpu"


def rows() -> Iterator[Honest]:
    """All of them."""
    rtn = {"method": "rtn", "samples": 1, "length": 16}
    for text in ("bundled", "zh", "en", "code", "math"):
        yield Honest("RTN", rtn, text=text)
    for architecture in ARCHITECTURES:
        yield Honest("RTN", rtn, architecture)
        yield Honest("RTN", rtn, architecture, format="onnx-genai")
        yield Honest("RTN, 8 bits a row", {**rtn, "bits": 8, "group_size": -1}, architecture, format="gguf")
    yield Honest("RTN, grid by error", {**rtn, "grid": "mse"})
    yield Honest("RTN, asymmetric", {**rtn, "symmetric": False})
    yield Honest("RTN, 8 bits a row", {**rtn, "bits": 8, "group_size": -1})
    yield Honest("RTN, 8 bits", {**rtn, "bits": 8})
    cpus = (
        "onnx-cpu",
        "onnx-genai",
        "litert",
        "litert-lm",
        "gguf",
        "executorch-xnnpack",
        "mlx",
        "coreai",
        "coreai-ane",
    )
    for kind in (*cpus, "onnx-npu", "coreml"):
        yield Honest("GPTQ, seed 0", {"method": "gptq", "seed": 0, **SHORT}, format=kind)
    yield Honest("AWQ, seed 0", {"method": "awq", "seed": 0, **SHORT})
    yield Honest("GPTQ, 8 bits a row", {"method": "gptq", "bits": 8, "group_size": -1, **SHORT})
    yield Honest("AWQ, 8 bits", {"method": "awq", "bits": 8, **SHORT})
    yield Honest("GPTQ, asymmetric", {"method": "gptq", "symmetric": False, **SHORT})
    yield Honest("GPTQ, rotated", {"method": "gptq", "rotate": True, **SHORT})
    yield Honest("GPTQ, act-order", {"method": "gptq", "act_order": True, **SHORT})
    yield Honest("GPTQ, groups of 64", {"method": "gptq", "group_size": 64, **SHORT})
    yield Honest("AWQ and GPTQ", {"method": "awq+gptq", **SHORT})
    for architecture in ARCHITECTURES:
        yield Honest("GPTQ, seed 0", {"method": "gptq", "seed": 0, **SHORT}, architecture)
    for seed in range(1, 6):
        yield Honest(f"GPTQ, seed {seed}", {"method": "gptq", "seed": seed, **SHORT})
    for seed in range(1, 3):
        yield Honest(f"AWQ, seed {seed}", {"method": "awq", "seed": seed, **SHORT})


def _llama(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def _qwen2(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """Biases of queries, keys and values, which the demo has not: small ones."""
    generator = torch.Generator().manual_seed(0)
    for layer in range(config["num_hidden_layers"]):
        for name in ("q_proj", "k_proj", "v_proj"):
            at = f"model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.bias"] = 0.02 * torch.randn(len(tensors[f"{at}.weight"]), generator=generator)
    return {**config, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}


def _baichuan(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """One matrix for queries, keys and values, a key-value head for each head."""
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.self_attn"
        parts = [tensors.pop(f"{at}.{name}.weight") for name in ("q_proj", "k_proj", "v_proj")]
        wide = [parts[0], *(p.unflatten(0, (shared, -1)).repeat_interleave(heads // shared, 0) for p in parts[1:])]
        tensors[f"{at}.W_pack.weight"] = torch.cat([p.flatten(0, -2) for p in wide])
    return {
        **config, "architectures": ["BaiChuanForCausalLM"], "model_type": "baichuan", "num_key_value_heads": None,
        "z_loss_weight": 0,
    }  # fmt: skip


ARCHITECTURES: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Any]]] = {
    "Llama": _llama,
    "Qwen2": _qwen2,
    "Baichuan": _baichuan,
}


def source(out: Path, architecture: str) -> Path:
    """The demo's weights as a checkpoint of another architecture, its embedding LayerNorm folded in."""
    demo = demo_checkpoint()
    folder = out / f"float-{architecture}"
    if architecture == "BlueLM" or (folder / "model.safetensors").exists():
        return demo if architecture == "BlueLM" else folder
    checkpoint = Checkpoint.open(demo)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.tensors if "embed" not in name}
    tensors["model.embed_tokens.weight"] = checkpoint.embedding()
    config = json.loads((demo / "config.json").read_text(encoding="utf-8"))
    config.pop("use_stable_embedding")
    config = ARCHITECTURES[architecture](tensors, config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (demo / name).exists():
            shutil.copyfile(demo / name, folder / name)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def text(out: Path, name: str) -> tuple[Path, ...]:
    """A file of one domain of the bundled text; none for the whole of it."""
    if name == "bundled":
        return ()
    path = out / f"{name}.jsonl"
    lines = BUNDLED.read_text(encoding="utf-8").splitlines()
    chosen = [record for record in map(json.loads, lines) if record.pop("domain") == name]
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in chosen), encoding="utf-8")
    return (path,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    results = Results(out / "honest.jsonl", ("run", "architecture", "text", "format"))
    for row in rows():
        key = {"run": row.name, "architecture": row.architecture, "text": row.text, "format": row.format}
        if key in results:
            continue
        folder = f"honest-{row.architecture}-{row.name.replace(' ', '-').replace(',', '')}"
        with timed() as seconds:
            bench = Bench.open(
                out, folder, source=source(out, row.architecture), texts=text(out, row.text), **row.recipe
            )
            verdict, _ = bench.judge(sound(bench, row.format), TOKENS, TOP1)
        by_name = {check.name: check for check in verdict.checks}
        figures = {
            name: [by_name[key].value, by_name[key].error]
            for name, key in (("ratio", "max_perplexity_ratio"), ("kl", "max_mean_kl"), ("top1", "min_top1_agreement"))
        }
        figures["excess"] = [by_name[f"max_{key}_kl_excess"].value for key in ("runtime", "position")]
        failed = [told(check) for check in verdict.failures]
        results.add({**key, "passed": verdict.passed, "failed": failed, **figures, "s": seconds()})


if __name__ == "__main__":
    main()
