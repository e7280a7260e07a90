"""A second small model to compare quantizers on: a Llama of another shape than the demo's, trained here.

    python -m benchmarks.accuracy.train_small OUT --train corpus_train.jsonl.gz [--steps 450]

4 blocks, 256 wide, 4 heads of 64 (each with its own keys and values), MLP of 640, no embedding LayerNorm; the demo's
tokenizer. One thread, fixed seeds. OUT/state.pt is written every 50 steps: a killed run goes on there; OUT itself is a
Hugging Face folder in bfloat16 at the end. AdamW; the rate is constant, then falls to 0 over the last third.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from bluelm.config import ModelConfig
from bluelm.model import Decoder
from bluelm.system.files import atomic_file, demo_checkpoint
from bluelm.text.tokenizer import Tokenizer

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 6144,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "torch_dtype": "bfloat16",
}
LENGTH, BATCH = 256, 8  # tokens in a window, windows in a step
RATE, WARMUP, DECAY = 2e-3, 50, 1 / 3
KEEP_EVERY = 50


def main() -> None:
    options = _options()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for path in demo_checkpoint().glob("tokenizer*"):
        shutil.copyfile(path, out / path.name)
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    windows = corpus_windows(options.train, Tokenizer.from_folder(out))
    decoder = fresh(ModelConfig.from_folder(out))
    train(decoder, windows, options.steps, out / "state.pt")
    save(decoder, out / "model.safetensors")


def corpus_windows(path: Path, tokenizer: Tokenizer) -> Tensor:
    """int64 [n, LENGTH + 1]: all documents laid end to end."""
    stream: list[int] = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            stream += [*tokenizer.encode(json.loads(line)["text"], bos=True, marks=True), tokenizer.eos or 0]
    step = LENGTH + 1
    return torch.tensor(stream[: len(stream) // step * step]).view(-1, step)


def fresh(config: ModelConfig) -> Decoder:
    """Normal weights of deviation 0.02; those that write to the stream are smaller by its depth."""
    torch.manual_seed(0)
    decoder = Decoder(config)
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=0.02 / (2 * config.num_layers) ** 0.5 if writes else 0.02)
    return decoder


def train(decoder: Decoder, windows: Tensor, steps: int, state: Path) -> None:
    """Next-token loss for `steps` steps; goes on where `state` ends."""
    groups = [
        {"params": [p for p in decoder.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in decoder.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    done = 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        decoder.load_state_dict(kept["decoder"])
        optimizer.load_state_dict(kept["optimizer"])
        done = kept["done"]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0)).repeat(
        -(-steps * BATCH // len(windows))
    )
    begin = time.monotonic()
    for step in range(done, steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP, (steps - step) / (steps * DECAY))
        rows = windows[order[step * BATCH : (step + 1) * BATCH]]  # [BATCH, LENGTH + 1]
        loss = F.cross_entropy(decoder(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % KEEP_EVERY == 0 or step + 1 == steps:
            print(f"step {step + 1} of {steps}, loss {loss.item():.3f}, {time.monotonic() - begin:.0f} s", flush=True)
            with atomic_file(state) as temporary:
                torch.save(
                    {"decoder": decoder.state_dict(), "optimizer": optimizer.state_dict(), "done": step + 1}, temporary
                )


def save(decoder: Decoder, path: Path) -> None:
    """The weights in bfloat16, under Llama's names."""
    ends = {
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    tensors = {
        ends.get(name, f"model.layers.{name.removeprefix('blocks.')}"): tensor.to(torch.bfloat16).contiguous()
        for name, tensor in decoder.state_dict().items()
    }
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=Path, required=True, help="documents, .jsonl.gz")
    parser.add_argument("--steps", type=int, default=450)
    return parser.parse_args()


if __name__ == "__main__":
    main()
