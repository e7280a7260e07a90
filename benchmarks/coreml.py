"""Figures of benchmarks/coreml.md: lowering, accuracy and speed on the demo; memory on full-width 7B blocks.

python -m benchmarks.coreml demo WORK        quantizes the demo (GPTQ W4 g32), lowers it, measures the package
python -m benchmarks.coreml memory BLOCKS    lowers that many blocks of 4096 x 11008 and tells the growth
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from bluelm.checkpoint import Checkpoint
from bluelm.config import ModelConfig
from bluelm.files import demo_checkpoint
from compress.quantized import QuantizedTensor
from compress.recipe import Recipe
from eval import heldout
from eval.compare import Subject, compare
from export import coreml
from export.coreml_package import import_coremltools
from targets.apple import open_interpreter
from targets.torch_runtime import TorchRuntime

SEVEN_B = {
    "architectures": ["BlueLMForCausalLM"], "vocab_size": 100096, "hidden_size": 4096,
    "intermediate_size": 11008, "num_attention_heads": 32, "max_position_embeddings": 2048,
    "use_stable_embedding": True, "eos_token_id": 2,
}  # fmt: skip


class Synthetic:
    """Random codes of any shape, made when asked for: a quantized checkpoint that takes no disk."""

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.folder = config, demo_checkpoint()

    def digest(self) -> str:
        return "synthetic"

    def linear(self, name: str) -> QuantizedTensor:
        c = self.config
        wide, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        shapes = {
            "q_proj": (wide, c.hidden_size), "k_proj": (narrow, c.hidden_size),
            "v_proj": (narrow, c.hidden_size), "o_proj": (c.hidden_size, wide),
            "gate_proj": (c.intermediate_size, c.hidden_size),
            "up_proj": (c.intermediate_size, c.hidden_size),
            "down_proj": (c.hidden_size, c.intermediate_size), "lm_head": (c.vocab_size, c.hidden_size),
        }  # fmt: skip
        local = name.rpartition(".")[2]
        bits, group = (8, -1) if local == "lm_head" else (4, 32)
        return self._random(name, shapes[local], bits, group)

    def embed(self) -> QuantizedTensor:
        return self._random("embed", (self.config.vocab_size, self.config.hidden_size), 8, -1)

    def vector(self, name: str) -> torch.Tensor:
        return torch.ones(self.config.hidden_size)

    def _random(self, name: str, shape: tuple[int, int], bits: int, group: int) -> QuantizedTensor:
        generator = torch.Generator().manual_seed(sum(name.encode()))
        codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
        groups = 1 if group == -1 else shape[1] // group
        scales = torch.full((shape[0], groups), 0.01, dtype=torch.float16)
        return QuantizedTensor(codes, scales, torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8), bits, group)


def peak_mb() -> float:
    """Most memory that this process ever held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def memory(blocks: int) -> None:
    """Lower `blocks` full-width blocks with embedding and head; tell size, growth and time."""
    import_coremltools()
    config = ModelConfig.from_dict({**SEVEN_B, "num_hidden_layers": blocks})
    before = peak_mb()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        made = coreml.export(Synthetic(config), Path(folder) / "a", context=512, chunk=128)  # type: ignore[arg-type]
        size = made.bytes / 1e6
    growth = peak_mb() - before
    seconds = time.monotonic() - started
    print(f"| {blocks} | {size:.0f} | {growth:.0f} | {size + 2000:.0f} | {seconds:.0f} |")
    assert growth < size + 2000, "more memory than the artifact's size plus 2 GB"


def demo(work: Path) -> None:
    """Quantize, lower and judge the demo checkpoint."""
    from calibration.samples import load_samples
    from compress.engine import quantize
    from compress.store import QuantizedCheckpoint

    checkpoint = Checkpoint.open(demo_checkpoint())
    if not (work / "quantized").exists():
        recipe = Recipe.load("w4-g32")
        samples = load_samples(None, checkpoint.tokenizer(), recipe.samples, recipe.length, recipe.seed)
        quantize(checkpoint, samples, recipe, work / "quantized")
    quantized = QuantizedCheckpoint.open(work / "quantized")
    import_coremltools()
    windows = [w.tokens.tolist() for w in heldout.load([], quantized.tokenizer(), length=256).first(2048)]
    prompts = [window[:32] for window in windows[:5]]
    reference = Subject("torch", "dequantized", TorchRuntime(quantized, 512), digest=quantized.digest())
    for activations in ("float32", "float16"):
        started = time.monotonic()
        made = coreml.export(quantized, work / activations, activations=activations)
        lowering = time.monotonic() - started
        runtime = open_interpreter(made)
        (found,) = compare(reference, [Subject(activations, "coreml", runtime)], windows, prompts, 64)
        runtime.reset()
        runtime.prefill(prompts[0])
        started = time.monotonic()
        for _ in range(40):
            runtime.decode(5)
        speed = 40 / (time.monotonic() - started)
        apart = [(d.prompt, d.at, d.margin) for d in found.divergences if d.at is not None]
        print(
            f"{activations}: lowering {lowering:.1f} s, {made.bytes / 1e6:.2f} MB, "
            f"mean KL {found.kl.value:.2e}, largest {found.largest_kl:.2e}, "
            f"top-1 {found.top1.value:.4f}, greedy apart at {apart}, "
            f"decode {speed:.1f} tokens/s"
        )


if __name__ == "__main__":
    if sys.argv[1] == "memory":
        memory(int(sys.argv[2]))
    else:
        demo(Path(sys.argv[2]))
