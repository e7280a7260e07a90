"""Decoding speed of our artifacts beside what the runtimes' own exporters make of the same weights.

    python -m benchmarks.interop.peer_exports OUT [--rounds 5] [--peer-path DIR] [--only KIND] [--count]

- onnxruntime-genai's model builder (int4, its defaults) against our onnx-genai artifact, both run by onnxruntime-genai;
- ExecuTorch's llama export (8da4w, groups of 32, 8-bit embedding, XNNPACK, attention with KV cache) against our
  executorch-xnnpack artifact, both run by ExecuTorch's runtime; once as ours ships, with a head of 8 bits, and once
  with one of 4 bits in groups of 32, which theirs always has.

A round is a process with two threads that holds both and decodes with them in turn, 32 tokens each, so that what else
the machine does meets both alike, and each finds its own weights in the cache and no waiting threads of the other; its
ratio is that of the median steps. Who is opened first changes from round to round. Written are the medians of all
rounds, to the part "peers" of results/speed/runtimes.json, and the page; pairs that are not run again stay. A process
of the scheduler's idle class keeps each core awake, as idle=poll would: in a virtual machine a core that halts takes 50
us to wake, a fifth of a step of the demo model, and how often it halts depends on microseconds.
`--count` counts the instructions of arm64 code under qemu instead, of the pair of onnxruntime-genai: the part "builder"
of results/speed/instructions.json.
`--peer-path` is a folder with what the builder wants besides: `pip install --target DIR --no-deps onnx_ir`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import pages
from benchmarks.speed.runtimes import demo
from bluelm.text.tokenizer import Tokenizer
from bluelm.weights import Weights
from export.artifacts.artifact import Artifact, list_files
from export.onnx import genai as onnx_genai
from targets.emulator import count as qemu_count

CONTEXT, CHUNK, PROMPT, DECODED = 512, 128, 128, 352
PAIRS = ("pair", "rounds", "ours, tokens/s", "theirs, tokens/s", "ratio")
COUNTED = ("artifact", "prefill", "decode", "logits differ by")
RUN, WARM = 32, 8  # tokens that one side decodes before the other's turn; the first of them do not count
Step = Callable[[int], object]  # decodes one token at this position


def main() -> None:
    options = _options()
    if options.time:
        print(json.dumps(pair(OPENERS[options.time.partition("-")[0]], options.out, options.beside)))
        return
    out: Path = options.out
    if options.count:
        _count(genai_sides(out, options.peer_path), out)
        return
    rows: list[list[str]] = []
    for kind, sides in SIDES.items():
        if options.only in (None, kind):
            made = sides(out, options.peer_path)
            with awake():
                rows.append(_rates(kind, made, options.rounds))
            print(rows[-1], flush=True)
            pages.save_rows("runtimes", "peers", PAIRS, rows, names=TITLES.values())


def _rates(kind: str, sides: dict[str, Path], rounds: int) -> list[str]:
    """Ours and theirs in tokens/s, and how many times as fast ours is; medians and ranges of the rounds."""
    pairs = [_round(kind, list(sides.values()), turned=number % 2 == 1) for number in range(rounds)]
    own, other = ([1 / pair[side] for pair in pairs] for side in (0, 1))
    ratios = [mine / theirs for mine, theirs in zip(own, other, strict=True)]
    return [TITLES[kind], str(rounds), _range(own, 0), _range(other, 0), _range(ratios, 2)]


def _range(values: list[float], digits: int) -> str:
    """Median, least and largest."""
    median, low, high = (f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})"


def _count(sides: dict[str, Path], out: Path) -> None:
    """Instructions a token, of prefill and of decode behind it; theirs gets a description to be opened by."""
    ours, theirs = (Path(folder) for folder in sides.values())
    described = out / "builder-described"
    if not described.exists():
        shutil.copytree(theirs, described)
        held = Artifact.open(ours)
        for name in ("config.json", "tokenizer.model"):
            shutil.copyfile(ours / name, described / name)
        roles = {"model.onnx": "model", "model.onnx.data": "weights", "genai_config.json": "genai"}
        files = list_files(described, {**roles, "config.json": "config", "tokenizer.model": "tokenizer"})
        held.model_copy(update={"files": files}).save(described)
    rows: list[list[str]] = []
    for name, folder in zip(sides, (ours, described), strict=True):
        found = qemu_count.count(Artifact.open(folder))
        rows.append([name, f"{found.prefill:,.0f}", f"{found.decode:,.0f}", f"{found.relative_error:.1e}"])
        print(rows[-1], flush=True)
        pages.save_rows("instructions", "builder", COUNTED, rows, names=sides, tools=found.tools)


@contextmanager
def awake() -> Iterator[None]:
    """No core halts meanwhile; who computes anything else goes first."""
    loops = [
        subprocess.Popen(["taskset", "-c", str(core), "chrt", "-i", "0", "sh", "-c", "while :; do :; done"])
        for core in sorted(os.sched_getaffinity(0))
    ]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def genai_sides(out: Path, peer_path: Path | None) -> dict[str, Path]:
    """Our artifact as it ships, and the builder's with its defaults."""
    quantized = demo(out / "quantized")
    ours, theirs = out / "ours-genai-4", out / "builder-defaults"
    if not ours.exists():
        onnx_genai.export(quantized, ours, context=CONTEXT, accuracy_level=4)
    source = llama_folder(quantized, out / "llama")
    environment = {**os.environ, "PYTHONPATH": str(peer_path or ""), "HF_HUB_OFFLINE": "1"}
    if not theirs.exists():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(theirs)]
        command += ["-p", "int4", "-e", "cpu", "-c", str(out / "cache")]
        subprocess.run(command, check=True, env=environment)
    return {"ours, onnx-genai": ours, "onnxruntime-genai model builder, int4": theirs}


def executorch_sides(
    out: Path, peer_path: Path | None, head: Mapping[str, int] = MappingProxyType({})
) -> dict[str, Path]:
    """Our program and that of ExecuTorch's llama export, which wants no further folder."""
    from export.executorch import xnnpack as executorch  # takes long; who only times does without

    suffix = "-head4" if head else ""
    ours, theirs = out / f"ours-executorch{suffix}", out / "llama-export"
    if not ours.exists():
        executorch.export(demo(out / f"quantized{suffix}", **head), ours, context=CONTEXT, chunk=CHUNK)
    if not (theirs / "model.pte").exists():
        _llama_export(demo(out / "quantized"), theirs)
    return {f"ours, executorch-xnnpack{suffix}": ours, "ExecuTorch llama export, 8da4w g32": theirs}


SIDES = {
    "genai": genai_sides,
    "executorch": executorch_sides,
    "executorch-head4": partial(executorch_sides, head={"head_bits": 4, "head_group_size": 32}),
}

TITLES = {
    "genai": "onnxruntime-genai: onnx-genai, model builder (int4, its defaults)",
    "executorch": "ExecuTorch: executorch-xnnpack, llama export (8da4w, groups of 32)",
    "executorch-head4": "the same, our head with 4 bits in groups of 32, as theirs",
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


def open_genai(folder: Path) -> Step:
    """onnxruntime-genai behind the prompt."""
    genai: Any = importlib.import_module("onnxruntime_genai")  # has no annotations
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=CONTEXT, do_sample=False, min_length=CONTEXT)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(_prompt())
    return lambda position: generator.generate_next_token()


def open_executorch(folder: Path) -> Step:
    """ExecuTorch's runtime behind the prompt."""
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers the attention operators)
    from executorch.kernels import quantized  # noqa: F401  (registers the embedding operator)
    from executorch.runtime import Runtime, Verification

    torch.set_num_threads(2)
    program = Runtime.get().load_program(folder / "model.pte", verification=Verification.InternalConsistency)
    method = program.load_method("forward")
    assert method is not None
    method.execute([torch.tensor([_prompt()]), torch.tensor([0])])
    return lambda position: method.execute([torch.tensor([[5]]), torch.tensor([position])])


OPENERS: dict[str, Callable[[Path], Step]] = {"genai": open_genai, "executorch": open_executorch}


def pair(opener: Callable[[Path], Step], ours: Path, theirs: Path) -> list[float]:
    """Seconds of the median step of both."""
    steps = [opener(ours), opener(theirs)]
    seconds: list[list[float]] = [[], []]
    for start in range(PROMPT, PROMPT + DECODED, RUN):
        for side in (0, 1) if start // RUN % 2 else (1, 0):
            for position in range(start, start + RUN):
                begin = time.perf_counter()
                steps[side](position)
                if position >= start + WARM:
                    seconds[side].append(time.perf_counter() - begin)
    return [statistics.median(found) for found in seconds]


def _prompt() -> list[int]:
    tokenizer = Tokenizer.from_folder(Path(__file__).parents[2] / "bluelm" / "demo")
    return (tokenizer.encode("手机上的语言模型 runs on a phone. " * PROMPT, bos=True))[:PROMPT]


def _round(kind: str, sides: list[Path], turned: bool) -> list[float]:
    """`pair` in a process of its own; `turned` opens theirs first."""
    first, second = reversed(sides) if turned else sides
    command = [
        sys.executable,
        "-m",
        "benchmarks.interop.peer_exports",
        str(first),
        "--time",
        kind,
        "--beside",
        str(second),
    ]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds: list[float] = json.loads(ran.stdout.strip().splitlines()[-1])
    return seconds[::-1] if turned else seconds


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-path", type=Path)
    parser.add_argument("--only", choices=SIDES, help="one pair alone")
    parser.add_argument("--time", choices=SIDES, help="time OUT and another in this process")
    parser.add_argument("--count", action="store_true", help="instructions of arm64 code instead")
    parser.add_argument("--beside", type=Path, help="the other artifact")
    return parser.parse_args()


if __name__ == "__main__":
    main()
