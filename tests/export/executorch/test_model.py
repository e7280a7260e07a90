"""The module that ExecuTorch lowers, run by torch as it is: each piece against float64, the whole against the model."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.checkpoint.quantized import QuantizedTensor
from compress.methods.grid import choose_grid
from export.executorch.cache import make_cache, quantize
from export.executorch.model import (
    Embedding,
    ExecutorchDecoder,
    QuantizedLinear,
    RMSNorm,
    parts,
    quarter_turn,
    round_to_8_bits,
)
from targets.host.torch_runtime import TorchRuntime
from tests.support.answers import mean_kl
from tests.support.checkpoints import lowered as lowering
from tests.support.checkpoints.shapes import LINEARS

CONTEXT = 16
QWEN: dict[str, Any] = {"architecture": "Qwen2ForCausalLM", "layer_norm": False, "tokenizer": False}
TOKENS = lowering.tokens(9)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(bits: int, group: int) -> QuantizedTensor:
    values = numbers(8, 64)
    return choose_grid(values, bits, group, True).nearest(values)


@pytest.mark.parametrize(("bits", "group", "range_"), [(4, 32, (-8, 7)), (8, -1, (-128, 127))])
def test_a_linear_holds_codes_and_multiplies_by_what_they_stand_for(
    bits: int, group: int, range_: tuple[int, int]
) -> None:
    held, x, bias = weight(bits, group), numbers(1, 3, 64, seed=1), numbers(8, seed=2)
    made = QuantizedLinear("name", held, bias)
    assert (made.least, made.greatest) == range_ and made.name == "name"
    assert made.codes.dtype == torch.int8 and torch.equal(made.codes, (held.codes.int() - 2 ** (bits - 1)).char())
    assert not made.zeros.any() and made.zeros.shape == made.scales.shape == held.scales.shape
    wanted = x.double() @ held.dequantize().double().T
    torch.testing.assert_close(made(x).double(), wanted + bias.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(QuantizedLinear("n", held)(x).double(), wanted, rtol=1e-5, atol=1e-5)
    seen: list[Tensor] = []
    QuantizedLinear("n", held, hold=lambda tensor: seen.append(tensor) or tensor)
    assert all(torch.equal(one, other) for one, other in zip(seen, parts(held).values(), strict=True))


def test_a_token_is_rounded_to_256_steps_of_its_own_range() -> None:
    x = torch.cat([numbers(1, 2, 64), 100 * numbers(1, 1, 64).abs()], 1)
    low, high = x.double().amin(-1, keepdim=True).clamp(max=0), x.double().amax(-1, keepdim=True).clamp(min=0)
    step = (high - low) / 255
    found = round_to_8_bits(x).double()
    assert ((found - x.double()).abs() <= 0.501 * step).all()
    whole = found / step
    assert (whole - whole.round()).abs().max() < 1e-3 and (whole.round() != (x.double() / step).round()).sum() < 3


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_the_table_are_looked_up(bits: int) -> None:
    table = weight(bits, -1)
    tokens = torch.tensor([[5, 0, 5, 7]])
    torch.testing.assert_close(Embedding(table)(tokens)[0], table.dequantize()[[5, 0, 5, 7]], rtol=1e-6, atol=0)
    (step,) = (
        node for node in torch.export.export(Embedding(table), (tokens,)).graph.nodes if node.op == "call_function"
    )
    assert "embedding_byte" in str(step.target) and step.args[3:5] == (-128, 127)


def test_a_norm_divides_by_the_root_of_the_mean_square() -> None:
    x, gamma = numbers(1, 3, 64), numbers(64, seed=1)
    wide = x.double()
    wanted = wide / (wide.pow(2).mean(-1, keepdim=True) + 0.5).sqrt() * gamma.double()
    torch.testing.assert_close(RMSNorm(gamma, 0.5)(x).double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_quarter_turn_is_a_matrix() -> None:
    assert quarter_turn(4).tolist() == [[0, 0, -1, 0], [0, 0, 0, -1], [1, 0, 0, 0], [0, 1, 0, 0]]


def test_a_cache_rounds_each_head_of_each_token() -> None:
    x = numbers(1, 3, 2, 16)
    codes, scales, zeros = quantize(x)
    assert (codes.dtype, scales.dtype, zeros.dtype) == (torch.int8, torch.float32, torch.int8)
    assert codes.shape == x.shape and scales.shape == zeros.shape == (1, 3, 2, 1)
    found = (codes.double() - zeros.double()) * scales.double()
    assert ((found - x.double()).abs() <= 0.501 * scales.double()).all()
    assert codes.amax() == 127 and codes.amin() == -128


@cache
def decoder(kv_bits: int = 32, debug: bool = False) -> ExecutorchDecoder:
    """Of a model with biases."""
    return ExecutorchDecoder(
        lowering.quantized(**QWEN), context=CONTEXT, kv_bits=kv_bits, check=lambda *_: None, debug=debug
    ).eval()


@cache
def wanted() -> np.ndarray:
    return TorchRuntime(lowering.quantized(**QWEN), CONTEXT).logits(TOKENS)


@torch.inference_mode()
def steps(model: ExecutorchDecoder, *counts: int) -> np.ndarray:
    """Logits of the tokens, so many a call."""
    rows, start = list[np.ndarray](), 0
    for count in counts:
        tokens = torch.tensor([TOKENS[start : start + count]])
        rows.append(model(tokens, torch.tensor([start]))[0].numpy())
        start += count
    return np.concatenate(rows)


@pytest.mark.parametrize("kv_bits", [32, 8])  # torch gives kernels no memory, which those of float16 need
def test_chunks_and_single_tokens_answer_as_the_model(kv_bits: int) -> None:
    found = steps(decoder(kv_bits), 5, 1, 3)
    assert found.shape == wanted().shape
    assert mean_kl(wanted(), found) < 2e-3  # 8-bit activations


@pytest.mark.parametrize(("bits", "kinds"), [(32, {torch.float32}), (16, {torch.float16})])
def test_a_cache_is_of_the_asked_width(bits: int, kinds: set[torch.dtype]) -> None:
    made = make_cache(lowering.quantized(**QWEN).config, CONTEXT, bits)
    assert {one.dtype for one in made.buffers()} == kinds
    assert {one.shape for one in made.buffers()} == {(1, CONTEXT, 2, 16)}


def test_every_linear_reads_numbers_that_8_bits_hold() -> None:
    model, read = decoder(), dict[str, float]()

    def seen(module: Any, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        read[module.name] = float((round_to_8_bits(x) - x).abs().max() / x.abs().max())

    hooks = [one.register_forward_pre_hook(seen) for one in model.modules() if isinstance(one, QuantizedLinear)]
    steps(model, 5)
    for hook in hooks:
        hook.remove()
    assert len(read) == 15 and max(read.values()) < 1e-5


def test_a_debug_build_gives_the_stream_too() -> None:
    model = decoder(debug=True)
    with torch.inference_mode():
        logits, stream = model(torch.tensor([TOKENS[:5]]), torch.tensor([0]))
    assert stream.shape == (3, 5, 64)
    rows = lowering.quantized(**QWEN).embed().dequantize()[TOKENS[:5]]
    torch.testing.assert_close(stream[0], rows, rtol=1e-6, atol=0)
    normed = model.head(round_to_8_bits(model.norm(stream[-1:])))
    assert torch.equal(logits, normed) and np.array_equal(logits[0].numpy(), steps(decoder(), 5))


def test_what_does_not_fit_the_cache_is_no_call() -> None:
    model = decoder()
    for start, count in ((-1, 1), (CONTEXT, 0), (CONTEXT - 1, 2)):
        with pytest.raises(RuntimeError, match="Expected cond"):  # before any kernel sees it
            model(torch.zeros(1, count, dtype=torch.long), torch.tensor([start]))
    with torch.inference_mode():
        assert model(torch.zeros(1, 2, dtype=torch.long), torch.tensor([CONTEXT - 2])).shape == (1, 2, lowering.VOCAB)


def test_every_weight_is_checked_and_has_its_place() -> None:
    quantized, checked = lowering.quantized(**QWEN), list[str]()

    def check(held: QuantizedTensor, name: str) -> None:
        assert torch.equal(held.codes, quantized.linear(name).codes)
        checked.append(name)

    model = ExecutorchDecoder(quantized, context=4, kv_bits=32, check=check)
    names = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in LINEARS]
    assert checked == [*names, "lm_head"]
    assert sorted(model.sources().values()) == sorted(checked)
    for path, name in model.sources().items():
        assert torch.equal(model.get_submodule(path).get_buffer("codes"), quantized.linear(name).signed_codes())
