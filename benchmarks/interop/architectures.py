"""Every architecture of the table as ExecuTorch programs, lowered and run.

    python -m benchmarks.interop.architectures WORK [FORMAT ...]

Small random checkpoints (2 blocks, 64 wide; transformers' own Llama, Qwen2 and GLM under ChatGLM3's names, and
Baichuan2's formula) are rounded to 8 bits a row and lowered. What the finished file answers, in chunks and token by
token, is held against the dequantized model and against the float model of whoever wrote the architecture. Writes
results/interop/architectures.json and the page; formats that are not named keep their rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks import pages
from compress.checkpoint.store import QuantizedCheckpoint
from eval.accuracy.metrics import kl_divergence, log_softmax
from export.executorch import coreml as executorch_coreml
from export.executorch import xnnpack as executorch
from export.lowering.ranges import calibrate
from targets.host.torch_runtime import TorchRuntime
from targets.registry import find
from targets.runtime import Place, Runtime, open_runtime
from tests.bluelm import test_architectures as formulas
from tests.bluelm.test_compare_architectures import TOKENS
from tests.support.checkpoints.families import baichuan, glm, llama, qwen2
from tests.support.checkpoints.rounded import rounded

CONTEXT, CHUNK, DECODED = 64, 16, 12
Maker = Callable[[QuantizedCheckpoint, Path], object]


def _qnn(q: QuantizedCheckpoint, folder: Path) -> object:
    target, beside = find("snapdragon", runtime="executorch-qnn"), folder.with_name(f"{folder.name}-onnx")
    ranges = calibrate(q, torch.tensor([TOKENS]))
    return target.compile(target.lower(q, ranges, beside, context=CONTEXT, chunk=CHUNK), folder)


FORMATS: dict[str, tuple[Maker, Place]] = {
    "executorch-xnnpack": (lambda q, f: executorch.export(q, f, context=CONTEXT, chunk=CHUNK), "cpu"),
    "executorch-coreml": (lambda q, f: executorch_coreml.export(q, f, context=CONTEXT, chunk=CHUNK), "interpreter"),
    "executorch-qnn": (_qnn, "htp"),
}
MODELS: dict[str, Callable[[Path], Path]] = {"Llama": llama, "Qwen2": qwen2, "Baichuan2": baichuan, "ChatGLM3": glm}
COLUMNS = (
    "program", "model", "KL to the dequantized model, in chunks", "the same, last tokens decoded", "top-1",
    "KL of the dequantized model to the float one", "KL of the program to the float one",
)  # fmt: skip


@torch.no_grad()
def float_logits(name: str, folder: Path) -> np.ndarray:
    """Float32 [T, V] of the code that defines the architecture: transformers', or Baichuan2's formula."""
    import transformers

    tokens = torch.tensor([TOKENS])
    if name == "Baichuan2":
        formulas.TOKENS = tokens
        return formulas.baichuan_logits(load_file(folder / "model.safetensors"), normalised=True)[0].numpy()
    if name == "ChatGLM3":  # its tensors are renamed on the way to `folder`: the same seed makes them again
        config = transformers.GlmConfig(
            **formulas.COMMON, head_dim=16, attention_bias=True, pad_token_id=0, eos_token_id=2
        )
        model = formulas.randomised(transformers.GlmForCausalLM(config))
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(tokens).logits[0].numpy()


def mean_kl(want: np.ndarray, found: np.ndarray) -> float:
    """Nats a token."""
    return float(kl_divergence(log_softmax(want), log_softmax(found)).mean())


def decoded(runtime: Runtime) -> np.ndarray:
    """[T, V]: all but the last tokens in chunks, then one at a time."""
    rows = list(runtime.logits(TOKENS[:-DECODED]))
    return np.stack([*rows, *(runtime.decode(token) for token in TOKENS[-DECODED:])])


def row(work: Path, name: str, kind: str) -> list[str]:
    """One row of the table; the artifact is made where it is not there yet."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "quantized").exists():
        rounded(work / "quantized", source=MODELS[name](work / "float"), bits=8, group_size=-1)
    q = QuantizedCheckpoint.open(work / "quantized")
    make, place = FORMATS[kind]
    if not (work / kind).exists():
        make(q, work / kind)
    want, float_ = TorchRuntime(q, CONTEXT).logits(TOKENS), float_logits(name, work / "float")
    with open_runtime(work / kind, place) as runtime:
        chunks = runtime.logits(TOKENS)
        runtime.reset()
        steps = decoded(runtime)
    top = float((chunks.argmax(-1) == want.argmax(-1)).mean())
    cells = [f"{mean_kl(want, chunks):.1e}", f"{mean_kl(want, steps):.1e}", f"{top:.3f}"]
    return [kind, name, *cells, f"{mean_kl(float_, want):.1e}", f"{mean_kl(float_, chunks):.1e}"]


def main(work: Path, kinds: list[str]) -> None:
    """A row for each architecture and format."""
    rows: list[list[str]] = []
    for kind in kinds:
        for name in MODELS:
            rows.append(row(work / name, name, kind))
            print(rows[-1], flush=True)
    shape: dict[str, Any] = {"tokens": len(TOKENS), "chunk": CHUNK, "decoded": DECODED}
    names = [f"{kind}, {name}" for kind in FORMATS for name in MODELS]
    pages.save_rows("architectures", "demo", COLUMNS, rows, names=names, key=2, **shape)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(FORMATS))
