"""Every architecture of the table, quantized and lowered: each runtime answers as the dequantized model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bluelm.checkpoint import Checkpoint
from bluelm.system.files import demo_checkpoint
from compress.checkpoint.store import QuantizedCheckpoint
from eval.accuracy.metrics import kl_divergence, log_softmax
from export.artifacts.artifact import Artifact
from export.coreml import export as coreml
from export.gguf import export as gguf_file
from export.litert import export as litert
from export.lowering.ranges import calibrate
from export.onnx import cpu as onnx_cpu
from export.onnx import genai as onnx_genai
from export.onnx import npu as onnx_npu
from targets.apple.backend import open_interpreter
from targets.host.cached_runtime import step_mask
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import open_runtime
from tests.support.checkpoints.families import (
    baichuan,
    glm,
    llama,
    qwen2,
    qwen3,
)
from tests.support.checkpoints.rounded import rounded

TOKENS = list(range(5, 45))


@pytest.fixture(scope="module", params=[llama, qwen2, qwen3, baichuan, glm], ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    make: Callable[[Path], Path] = request.param
    folder = tmp_path_factory.mktemp("architecture")
    return rounded(folder / "quantized", source=make(folder / "float"), bits=8, group_size=-1)


def mean_kl(q: QuantizedCheckpoint, logits: np.ndarray) -> float:
    want = TorchRuntime(q, 64).logits(TOKENS)
    return float(kl_divergence(log_softmax(want), log_softmax(logits)).mean())


def test_quantizing_keeps_the_model(model: QuantizedCheckpoint) -> None:
    """8 bits a row are close to the float checkpoint: biases, permuted pairs and cut tensors came through."""
    original = Checkpoint.open(model.folder.parent / "float")
    assert mean_kl(model, TorchRuntime(original, 64).logits(TOKENS)) < 1e-1
    assert model.config == original.config


def test_onnx_on_the_cpu(model: QuantizedCheckpoint, tmp_path: Path) -> None:
    made = onnx_cpu.export(model, tmp_path / "a", context=64, chunk=16)
    with open_runtime(made.folder) as runtime:
        assert mean_kl(model, runtime.logits(TOKENS)) < 1e-6


def test_onnx_for_npus(model: QuantizedCheckpoint, tmp_path: Path) -> None:
    ranges = calibrate(model, torch.tensor([TOKENS]))
    made = onnx_npu.export(model, ranges, tmp_path / "a", context=64, chunk=16)
    with open_runtime(made.folder) as runtime:
        assert mean_kl(model, runtime.logits(TOKENS)) < 1e-2


def test_genai_and_gguf(model: QuantizedCheckpoint, tmp_path: Path) -> None:
    shutil.copyfile(demo_checkpoint() / "tokenizer.model", model.folder / "tokenizer.model")  # GGUF holds one
    made = onnx_genai.export(model, tmp_path / "genai", context=64)
    with open_runtime(made.folder) as runtime:
        assert mean_kl(model, runtime.logits(TOKENS)) < 1e-6
    made = gguf_file.export(model, tmp_path / "gguf", context=64)
    with open_runtime(made.folder) as runtime:
        assert mean_kl(model, runtime.logits(TOKENS)) < 1e-9


def test_litert(model: QuantizedCheckpoint, tmp_path: Path) -> None:
    made = litert.export(model, tmp_path / "a", context=64, chunk=16)
    with open_runtime(made.folder) as runtime:
        assert mean_kl(model, runtime.logits(TOKENS)) < 5e-2  # 8-bit activations, logits of 10 and more


@torch.no_grad()
def test_what_executorch_lowers(model: QuantizedCheckpoint) -> None:
    """The torch modules that XNNPACK's, Core ML's and NPUs' delegates get; lowering one takes most of a minute."""
    from export.executorch.model import ExecutorchDecoder
    from export.executorch.static import StaticDecoder, example
    from export.executorch.xnnpack import check_weight

    decoder = ExecutorchDecoder(model, context=64, kv_bits=32, check=check_weight).eval()
    logits = decoder(torch.tensor([TOKENS]), torch.tensor([0]))[0].numpy()
    assert mean_kl(model, logits) < 5e-2  # 8-bit activations, logits of 10 and more
    hidden, positions, _, *past = example(model.config, len(TOKENS), 64)
    hidden = model.embedding()[TOKENS][None]
    mask = torch.from_numpy(step_mask(0, len(TOKENS), 64, -1e4))
    static = StaticDecoder(model, 64, doubled_norms=True).eval()
    found = static(hidden, torch.arange(len(TOKENS), dtype=positions.dtype), mask, *past)
    assert mean_kl(model, found[0][0].numpy()) < 1e-8


@pytest.mark.parametrize(("activations", "limit"), [("float32", 1e-4), ("float16", 1e-3)])
def test_core_ml(model: QuantizedCheckpoint, tmp_path: Path, activations, limit: float) -> None:
    made: Artifact = coreml.export(model, tmp_path / "a", context=64, chunk=16, activations=activations)
    assert mean_kl(model, open_interpreter(made).logits(TOKENS)) < limit
