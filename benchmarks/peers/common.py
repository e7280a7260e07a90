"""What every peer's worker does: run by the peer's own Python, with torch, transformers and the peer alone.

    PYTHON worker.py MODEL TOKENS OUT BITS GROUP_SIZE sym|asym [WORDS OF THE WORKER'S OWN]

TOKENS is a safetensors file with `tokens` int64 [n, T]. OUT gets the dequantized weights under their Hugging Face
names; one line of JSON says how long quantizing took and the process's peak memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Task:
    """What to quantize, and how."""

    model: str
    tokens: torch.Tensor
    bits: int
    group_size: int
    symmetric: bool


def serve(quantize: Callable[[Task, Any], dict[str, torch.Tensor]], *, loads: bool = True) -> None:
    """Load the model in float32, hand it to the peer, save what comes back and print the figures.

    Args:
        loads: False for a peer that loads the folder itself; it is handed None.
    """
    torch.set_num_threads(2)
    model, tokens, out, bits, group_size, symmetry = sys.argv[1:7]
    task = Task(model, load_file(tokens)["tokens"], int(bits), int(group_size), symmetry == "sym")
    loaded = _load(model) if loads else None
    begin, cpu = time.perf_counter(), time.process_time()
    weights = quantize(task, loaded)
    figures = {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu,
        "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    save_file({name: weight.detach().float().contiguous() for name, weight in weights.items()}, Path(out))
    print(json.dumps(figures))


def _load(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def linears(model: Any) -> dict[str, torch.Tensor]:
    """The blocks' two-dimensional weights by name."""
    return {
        name: weight
        for name, weight in model.state_dict().items()
        if ".layers." in name and name.endswith("proj.weight")
    }


def with_norms(model: Any) -> dict[str, torch.Tensor]:
    """The same, with the norms and biases that AWQ folds its scales into."""
    ends = ("proj.bias", "layernorm.weight")
    others = {name: value for name, value in model.state_dict().items() if ".layers." in name and name.endswith(ends)}
    return linears(model) | others


def any_tokenizer() -> Any:
    """What peers insist on having; the tokens are there already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
    )
