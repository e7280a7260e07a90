"""KV caches of 16 and 8 bits in every runtime with a choice: the type in the files, and what it costs."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from bluelm.errors import InputError
from export.artifacts.artifact import Artifact
from export.artifacts.mobile import KvBits
from export.litert import export as litert
from export.lowering.ranges import Ranges
from export.onnx import cpu as onnx_cpu
from export.onnx import genai as onnx_genai
from export.onnx import npu as onnx_npu
from targets.host.torch_runtime import TorchRuntime, TwinRuntime
from targets.registry import find
from targets.runtime import Place, open_runtime
from tests.packages import requires
from tests.support.checkpoints import lowered as lowering

TOKENS = lowering.tokens(lowering.CHUNK + 3)
EXPORTERS = {"onnx-cpu": onnx_cpu.export, "onnx-genai": onnx_genai.export, "litert": litert.export}


def answers(artifact: Artifact, on: Place = "cpu") -> np.ndarray:
    """Logits of a prefill in chunks, and of two tokens decoded behind it."""
    with open_runtime(artifact.folder, on) as runtime:
        rows = [runtime.logits(TOKENS[:-2]), *(runtime.decode(token)[None] for token in TOKENS[-2:])]
    return np.concatenate(rows)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("runtime", list(EXPORTERS))
def test_narrow_caches_cost_little(runtime: str, bits: int, tmp_path):
    quantized, ranges = lowering.quantized(), lowering.ranges() if bits == 8 else None
    width = cast(KvBits, bits)
    made = EXPORTERS[runtime](
        quantized, tmp_path / "a", context=lowering.CONTEXT, chunk=lowering.CHUNK, kv_bits=width, ranges=ranges
    )
    wide = EXPORTERS[runtime](quantized, tmp_path / "b", context=lowering.CONTEXT, chunk=lowering.CHUNK)
    assert made.cache == {16: "float16", 8: "int8"}[bits] and wide.cache == "float32"
    found, exact = answers(made), TorchRuntime(quantized, lowering.CONTEXT).logits(TOKENS)
    assert lowering.mean_kl(exact, found) < (5e-3 if bits == 8 else 1e-3)
    assert not np.array_equal(found, answers(wide))


@requires("libatomic1")
def test_an_8_bit_cache_on_the_npu_is_the_twins(tmp_path):
    quantized, ranges = lowering.quantized(), lowering.ranges()
    target, context, chunk = find("snapdragon", kv_bits=8), lowering.CONTEXT, lowering.CHUNK
    made = target.lower(quantized, ranges, tmp_path / "a", context=context, chunk=chunk)
    assert made.cache == "int8"
    narrow = ranges.model_copy(update={"cache_bits": 8})
    twin = TwinRuntime(quantized, narrow, lowering.CONTEXT).logits(TOKENS)
    exact = TorchRuntime(quantized, lowering.CONTEXT).logits(TOKENS)
    places: tuple[Place, ...] = ("cpu", "htp")
    for place in places:
        found = answers(made, place)
        assert lowering.mean_kl(twin, found) < 1e-5
        assert lowering.mean_kl(exact, found) < 1e-3


@pytest.mark.parametrize("runtime", list(EXPORTERS))
def test_8_bits_need_ranges_of_these_weights(runtime: str, tmp_path):
    other = Ranges(weights="other", samples=1, length=1, values={})
    for ranges, why in ((None, "needs activation ranges"), (other, "belong to other weights")):
        with pytest.raises(InputError, match=why):
            EXPORTERS[runtime](lowering.quantized(), tmp_path / "a", context=16, chunk=4, kv_bits=8, ranges=ranges)
    with pytest.raises(InputError, match="belong to other weights"):
        onnx_npu.export(lowering.quantized(), other, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_every_runtime_says_what_widths_it_has():
    assert find("generic-arm64", kv_bits=8).needs_ranges and not find("generic-arm64", kv_bits=16).needs_ranges
    assert find("snapdragon").kv_bits == 16 and find("snapdragon", kv_bits=8).kv_bits == 8
    with pytest.raises(InputError, match="does not support --kv-bits 32") as caught:
        find("snapdragon", kv_bits=32)
    assert "16, 8" in str(caught.value.fix)
