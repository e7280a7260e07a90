"""The twin of llama.cpp's arithmetic rounds as ggml does, and lies as far from the weights as llama.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from eval.accuracy import metrics
from eval.runner import twin
from export.gguf import export as gguf_file
from targets.host.torch_runtime import TorchRuntime
from targets.runners.runner import open_runner
from tests.support.checkpoints.rounded import rounded

TEXTS = ("The sea is wide and the sky is blue.", "你好，今天天气怎么样？", "a total number of 12 models")


def test_activations_are_rounded_as_ggml_rounds_them() -> None:
    x = np.random.default_rng(0).normal(size=(3, 96)).astype(np.float32)
    x[0, :32], x[1, 40] = 0, 1e3
    kind = GGMLQuantizationType.Q8_0
    np.testing.assert_array_equal(twin.to_blocks(torch.tensor(x)).numpy(), dequantize(quantize(x, kind), kind))


def test_it_costs_what_llama_cpp_costs(tmp_path: Path) -> None:
    quantized = rounded(tmp_path / "q", blocks=2)
    artifact = gguf_file.export(quantized, tmp_path / "a", context=64)
    tokenizer = quantized.tokenizer()
    prompts = [tokenizer.encode(text * 3, bos=True)[:24] for text in TEXTS]
    weights = TorchRuntime(quantized, 64)
    found = twin.allowance(weights, prompts, 7)
    exact = [metrics.log_softmax(weights.logits(tokens)[-7:]) for tokens in prompts]
    with open_runner(artifact) as runner:
        theirs = [metrics.log_softmax(runner.distributions(tokens, len(tokens) - 6)) for tokens in prompts]
    kl = np.concatenate([metrics.kl_divergence(a, b) for a, b in zip(exact, theirs, strict=True)])
    assert found.range == pytest.approx(twin.FACTOR * kl.mean(), rel=0.7)
    assert twin.allowance(weights, prompts, 7) == found  # and the weights answer as before
