"""Decoding speed of our artifacts beside what the runtimes' own exporters make of the same weights.

    python -m benchmarks.peer_exports OUT [--rounds 5] [--peer-path DIR] [--only genai|executorch]

- onnxruntime-genai's model builder (int4, its defaults) against our onnx-genai artifact, both run by onnxruntime-genai;
- ExecuTorch's llama export (8da4w, groups of 32, 8-bit embedding, XNNPACK, attention with KV cache) against our
  executorch-xnnpack artifact, both run by ExecuTorch's runtime.

Every measurement is a process of its own with two threads, ours and theirs in turn; the ratio is that of the medians.
`--peer-path` is a folder with what the builder wants besides: `pip install --target DIR --no-deps onnx_ir`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.runtimes import demo
from bluelm.tokenizer import Tokenizer
from bluelm.weights import Weights
from compress.store import QuantizedCheckpoint
from export import onnx_genai

CONTEXT, CHUNK, PROMPT, DECODED = 512, 128, 128, 256


def main() -> None:
    options = _options()
    if options.time:
        print(json.dumps(TIMERS[options.time](options.out)))
        return
    out: Path = options.out
    quantized = demo(out / "quantized")
    sides = genai_sides(quantized, out, options.peer_path) if options.only != "executorch" else {}
    sides |= executorch_sides(quantized, out) if options.only != "genai" else {}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, (timer, folder) in sides.items():
            found[name].append(_child(["--time", timer, str(folder)]))
    for name, rates in found.items() if options.rounds else ():
        print(f"| {name} | {statistics.median(rates):.0f} | {min(rates):.0f} to {max(rates):.0f} |", flush=True)


def genai_sides(quantized: QuantizedCheckpoint, out: Path, peer_path: Path | None) -> dict[str, tuple[str, Path]]:
    """Our artifact in both accuracy levels, and the builder's in its default and in level 0."""
    sides: dict[str, tuple[str, Path]] = {}
    for level in (4,):
        folder = out / f"ours-genai-{level}"
        if not folder.exists():
            onnx_genai.export(quantized, folder, context=CONTEXT, accuracy_level=level)
        sides[f"ours, onnx-genai, accuracy level {level}"] = ("genai", folder)
    source = llama_folder(quantized, out / "llama")
    environment = {**os.environ, "PYTHONPATH": str(peer_path or ""), "HF_HUB_OFFLINE": "1"}
    for name, extra in (("defaults", []),):
        folder = out / f"builder-{name.replace(' ', '-')}"
        if not folder.exists():
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(folder)]
            command += ["-p", "int4", "-e", "cpu", "-c", str(out / "cache")]
            subprocess.run(command + (["--extra_options", *extra] if extra else []), check=True, env=environment)
        sides[f"onnxruntime-genai model builder, int4, {name}"] = ("genai", folder)
    return sides


def executorch_sides(quantized: QuantizedCheckpoint, out: Path) -> dict[str, tuple[str, Path]]:
    """Our program and that of ExecuTorch's llama export."""
    from export import executorch  # takes long; who only times does without

    ours, theirs = out / "ours-executorch", out / "llama-export"
    if not ours.exists():
        executorch.export(quantized, ours, context=CONTEXT, chunk=CHUNK)
    if not (theirs / "model.pte").exists():
        _llama_export(quantized, theirs)
    return {
        "ours, executorch-xnnpack": ("executorch", ours),
        "ExecuTorch llama export, 8da4w g32": ("executorch", theirs),
    }


def llama_folder(weights: Weights, folder: Path) -> Path:
    """A Hugging Face Llama folder of these weights, float32, with the tokenizer as transformers reads it."""
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    config = weights.config
    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": weights.embedding(),
        "model.norm.weight": weights.final_norm(),
        "lm_head.weight": weights.head(),
    }
    for layer in range(config.num_layers):
        tensors |= {f"model.layers.{layer}.{name}": tensor for name, tensor in weights.block(layer).items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    about: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0],
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(about))
    source: Path = weights.folder  # pyright: ignore[reportAttributeAccessIssue]
    (folder / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())
    tokenizer_config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


def meta_checkpoint(weights: Weights) -> dict[str, Tensor]:
    """The same weights under the names, and in the rotary order, of Meta's checkpoints."""
    config = weights.config
    names = {
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    tensors = {
        "tok_embeddings.weight": weights.embedding(),
        "norm.weight": weights.final_norm(),
        "output.weight": weights.head(),
    }
    for layer in range(config.num_layers):
        for name, tensor in weights.block(layer).items():
            local = name.removesuffix(".weight")
            if local in ("self_attn.q_proj", "self_attn.k_proj"):  # pairs (j, j + D/2) -> (2j, 2j + 1)
                halves = tensor.view(-1, 2, config.head_dim // 2, tensor.shape[1])  # [heads, 2, D/2, in]
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
            tensors[f"layers.{layer}.{names[local]}.weight"] = tensor.contiguous()
    return tensors


def _llama_export(weights: Weights, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = weights.config
    torch.save(meta_checkpoint(weights), folder / "checkpoint.pth")
    params = {
        "dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
    }
    (folder / "params.json").write_text(json.dumps(params))
    arguments = ["--model", "llama2", "-c", str(folder / "checkpoint.pth"), "-p", str(folder / "params.json")]
    arguments += ["-kv", "--use_sdpa_with_kv_cache", "-X", "--xnnpack-extended-ops", "-qmode", "8da4w", "-G", "32"]
    arguments += ["-d", "fp32", "-E", "8,0", "--max_seq_length", str(CONTEXT), "--max_context_length", str(CONTEXT)]
    arguments += ["-o", str(folder), "-n", "model.pte"]
    module = "executorch.examples.models.llama.export_llama"
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, cwd=folder)


def time_genai(folder: Path) -> float:
    """Tokens/s of onnxruntime-genai behind a prompt: median step."""
    genai: Any = importlib.import_module("onnxruntime_genai")  # has no annotations
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=CONTEXT, do_sample=False, min_length=CONTEXT)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(_prompt())
    seconds: list[float] = []
    for _ in range(DECODED):
        begin = time.perf_counter()
        generator.generate_next_token()
        seconds.append(time.perf_counter() - begin)
    return 1 / statistics.median(seconds[10:])


def time_executorch(folder: Path) -> float:
    """Tokens/s of ExecuTorch's runtime behind a prompt: median step."""
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers the attention operators)
    from executorch.kernels import quantized  # noqa: F401  (registers the embedding operator)
    from executorch.runtime import Runtime, Verification

    torch.set_num_threads(2)
    program = Runtime.get().load_program(folder / "model.pte", verification=Verification.InternalConsistency)
    method = program.load_method("forward")
    assert method is not None
    method.execute([torch.tensor([_prompt()]), torch.tensor([0])])
    seconds: list[float] = []
    for position in range(PROMPT, PROMPT + DECODED):
        begin = time.perf_counter()
        method.execute([torch.tensor([[5]]), torch.tensor([position])])
        seconds.append(time.perf_counter() - begin)
    return 1 / statistics.median(seconds[10:])


TIMERS = {"genai": time_genai, "executorch": time_executorch}


def _prompt() -> list[int]:
    tokenizer = Tokenizer.from_folder(Path(__file__).parent.parent / "bluelm" / "demo")
    return (tokenizer.encode("手机上的语言模型 runs on a phone. " * PROMPT, bos=True))[:PROMPT]


def _child(arguments: list[str]) -> float:
    command = [sys.executable, "-m", "benchmarks.peer_exports", arguments[2], *arguments[:2]]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(ran.stdout.strip().splitlines()[-1]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-path", type=Path)
    parser.add_argument("--only", choices=("genai", "executorch"), help="one pair alone")
    parser.add_argument("--time", choices=("genai", "executorch"), help="time one artifact in this process")
    return parser.parse_args()


if __name__ == "__main__":
    main()
