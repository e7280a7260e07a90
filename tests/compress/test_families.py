"""Blocks that differ: every method quantizes them, and what is lowered computes what the reference does.

Qwen3 has norms on the heads of q and k. `Sub` is a family that nobody has: a norm before o, which has a bias. Its block
is changed in the two places that docs/extending/architecture.md names, the description and the reference, and nowhere
else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bluelm import block, model
from bluelm.block import Linear, Norm, Step, block_of
from bluelm.checkpoint import Checkpoint
from bluelm.config import ModelConfig
from bluelm.errors import TargetError
from bluelm.model import Decoder, KVCache, RMSNorm
from calibration.samples import CalibrationReport, Samples
from compress.checkpoint.store import QuantizedCheckpoint
from compress.engine import quantize
from compress.recipe import Recipe
from export.artifacts.artifact import Artifact
from export.gguf.names import architecture
from export.litert import export as litert
from export.lowering import decoder as lowered
from export.lowering.ranges import causal_mask
from export.lowering.torch_ops import Parameters, TorchOps
from export.onnx import cpu as onnx_cpu
from export.onnx import genai as onnx_genai
from export.readback import read_back
from targets.runtime import open_runtime
from tests.support.checkpoints.shapes import write_checkpoint

TOKENS = torch.randint(3, 96, (12, 24), generator=torch.Generator().manual_seed(1))
PLAIN: dict[str, Any] = {"vocab": 96, "layer_norm": False, "tokenizer": False, "head_dim": 32}
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "gptq, no correction": {"method": "gptq", "correction": 0.0},
    "awq": {"method": "awq"},
    "rotated gptq": {"method": "gptq", "rotate": True},
    "refined gptq": {"method": "gptq", "refine": 4},
}


def sub_steps(config: ModelConfig) -> list[Step]:
    """As a Llama's, but mixed -> mixed_norm -> o."""
    found: list[Step] = []
    for step in PLAIN_STEPS(config):
        if isinstance(step, Linear) and step.reads == "mixed":
            found.append(Norm("mixed_norm", "mixed", "self_attn.sub_norm", step.columns))
            step = Linear(step.makes, "mixed_norm", step.weight, step.rows, step.columns, biased=True)
        found.append(step)
    return found


PLAIN_STEPS = block.steps


class SubAttention(model.Attention):
    """The same for the reference."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.sub_norm = RMSNorm(config, self.o_proj.in_features)
        self.o_proj = nn.Linear(self.o_proj.in_features, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        return self.o_proj(self.sub_norm(self.mix(x, cos, sin, cache, layer)))


@pytest.fixture(params=["Qwen3", "Sub"])
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A float checkpoint of the family."""
    if request.param == "Sub":
        monkeypatch.setattr(block, "steps", sub_steps)
        monkeypatch.setattr(model, "Attention", SubAttention)
    block_of.cache_clear()
    architecture = {"Qwen3": "Qwen3ForCausalLM", "Sub": "LlamaForCausalLM"}[request.param]
    yield write_checkpoint(tmp_path / "float", architecture=architecture, **PLAIN)
    block_of.cache_clear()


def made(source: Path, **recipe: Any) -> QuantizedCheckpoint:
    count, length = TOKENS.shape
    report = CalibrationReport("given", "", count, 0, count, length, TOKENS.numel(), 0, 0.0, 0.0, 0.0, 0.0, ())
    chosen = Recipe.make({"samples": count, "length": length, **recipe})
    return quantize(Checkpoint.open(source), Samples(TOKENS, report), chosen, source.parent / f"q{len(recipe)}")


def loss(logits: Tensor, wanted: Tensor) -> float:
    """Mean KL, nats a token."""
    p, q = (x.double().log_softmax(-1) for x in (wanted, logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_gguf_takes_the_tensors_that_llama_cpp_names(source: Path) -> None:
    config = Checkpoint.open(source).config
    if config.qk_norm:
        assert architecture(config) == "qwen3"
        return
    with pytest.raises(TargetError, match=r"llama\.cpp has no self_attn\.sub_norm"):
        architecture(config)


@pytest.mark.parametrize("name", RECIPES)
def test_every_method_quantizes_it(source: Path, name: str) -> None:
    exact = Decoder.from_weights(Checkpoint.open(source))(TOKENS)
    assert exact.std() > 0.3
    plain = made(source, method="rtn", bits=4)
    quantized = made(source, **{"bits": 4, **RECIPES[name], "seed": 1})
    lost = loss(Decoder.from_weights(quantized)(TOKENS), exact)
    assert lost < (0.1 if name == "rtn" else 0.9 * loss(Decoder.from_weights(plain)(TOKENS), exact))
    assert {key: tuple(tensor.shape) for key, tensor in quantized.block(0).items()} == block_of(quantized.config).shapes


def test_the_lowered_decoder_is_the_reference(source: Path) -> None:
    weights, count = Checkpoint.open(source), TOKENS.shape[1]
    ops = TorchOps(Parameters(weights), weights.config.rms_norm_eps)
    x, nothing = weights.embedding()[TOKENS[:1]], [None] * weights.config.num_layers
    with torch.no_grad():
        found, _ = lowered.decoder(ops, weights.config, x, torch.arange(count), causal_mask(count), nothing, 64)
        expected = Decoder.from_weights(weights)(TOKENS[:1])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("export", "allowed"),
    [(onnx_cpu.export, 1e-6), (onnx_genai.export, 1e-6), (litert.export, 1e-3)],  # LiteRT rounds what linears read
)
def test_artifacts_answer_as_the_reference_and_are_read_back(source: Path, export: Any, allowed: float) -> None:
    quantized = made(source, method="rtn", bits=8, group_size=-1)
    artifact: Artifact = export(quantized, source.parent / "artifact", context=64, chunk=16)
    tokens = TOKENS[0].tolist()
    wanted = Decoder.from_weights(quantized)(TOKENS[:1])[0]
    with open_runtime(artifact.folder) as runtime:
        assert loss(torch.from_numpy(runtime.logits(tokens)), wanted) < allowed
    found = read_back(artifact, quantized)
    assert not [str(finding) for finding in found.wrong]
    assert not found.sentences
