"""What refining is made of, on a block of 64 channels: latents, how far they go, and what is kept."""

from __future__ import annotations

import pytest
import torch

from bluelm.model import DecoderBlock
from calibration.walk import Streams
from compress.checkpoint.quantized import QuantizedTensor
from compress.methods.refine import Refined, _Latent, refine, relative_error
from compress.methods.rtn import round_to_nearest
from tests.support.checkpoints.blocks import random_block, small_config
from tests.support.checkpoints.shapes import LINEARS


def test_latents_begin_at_the_weight_but_near_their_code() -> None:
    """Codes 7 to 10, zero point 8, scale 0.5; weights that lie off by what stands in the third line."""
    codes = torch.tensor([[7, 8, 9, 10]], dtype=torch.uint8)
    scales, zeros = torch.full((1, 1), 0.5, dtype=torch.float16), torch.full((1, 1), 8, dtype=torch.uint8)
    off = torch.tensor([[0.1, -0.05, 0.4, -0.4]])
    latent = _Latent((codes.float() - 8 + off) * 0.5, QuantizedTensor(codes, scales, zeros, 4, 4))
    torch.testing.assert_close(latent.codes.detach().view(1, 4), codes + torch.tensor([[0.1, -0.05, 0.2, -0.2]]))
    torch.testing.assert_close(latent.dequantize(), (codes.float() - 8) * 0.5)
    assert torch.equal(latent.freeze().codes, codes)
    with torch.no_grad():
        latent.codes.view(1, 4).copy_(torch.tensor([[-3.0, 8.6, 40.0, 15.4]]))
        latent.stretch.fill_(1.5)
    torch.testing.assert_close(latent.dequantize(), (torch.tensor([[0.0, 9.0, 15.0, 15.0]]) - 8) * 0.75)
    frozen = latent.freeze()
    assert frozen.codes.tolist() == [[0, 9, 15, 15]] and frozen.scales.tolist() == [[0.75]]
    assert torch.equal(frozen.zeros, zeros) and (frozen.bits, frozen.group_size) == (4, 4)
    latent.dequantize().sum().backward()
    assert latent.codes.grad is not None
    assert latent.codes.grad.view(-1).tolist() == [0.0, 0.75, 0.0, 0.75]  # none beyond the least and greatest code


def pushed(steps: int, *, by: int = 0, stretch: float = 1.0) -> tuple[Refined, QuantizedTensor, float]:
    """What refining a small block came to, down_proj as it began, which lies off on one side, and its loss then."""
    config = small_config(2)
    tensors = random_block(config)
    block = DecoderBlock.from_weights(config, tensors)
    solved = {name: round_to_nearest(tensors[f"{name}.weight"], 4, 32, True) for name in LINEARS}
    streams = Streams(config, torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(0)))
    rotary = (streams.cos, streams.sin)
    targets = block(streams.hidden, *rotary)
    down = solved["mlp.down_proj"]
    codes = (down.codes.int() + by).clamp(0, 15).to(torch.uint8)
    scales = (down.scales.float() * stretch).to(torch.bfloat16).to(torch.float16)
    begun = {**solved, "mlp.down_proj": QuantizedTensor(codes, scales, down.zeros, 4, 32)}
    weights = {name: weight.dequantize() for name, weight in begun.items()}
    found = refine(block, weights, begun, streams.hidden, targets, rotary, steps=steps, seed=0)
    exact = DecoderBlock.from_weights(config, tensors | {f"{n}.weight": w for n, w in weights.items()})
    output = exact(streams.hidden, *rotary).double()
    wrong = ((output - targets).square().sum(-1) / targets.double().square().sum(-1)).mean().item()
    return found, begun["mlp.down_proj"], wrong


def test_codes_go_no_further_than_they_may() -> None:
    """Of a linear whose codes are all 3 too high, pushed one way all the time, a code goes about one step."""
    found, begun, wrong = pushed(60, by=3)
    assert found.before == pytest.approx(wrong, rel=1e-4)  # over all three samples
    assert found.after < found.before
    moved = (found.weights["mlp.down_proj"].codes.int() - begun.codes.int()).abs()
    assert moved.max() == 1 and moved.float().mean() > 0.1


def test_scales_go_no_further_than_they_may() -> None:
    """Of a linear whose scales are all twice as large, a scale goes about a fifth."""
    found, begun, _ = pushed(60, stretch=2.0)
    change = found.weights["mlp.down_proj"].scales.float() / begun.scales.float()
    assert 0.8 < change.min() < 0.86 < change.median() < 0.9


def test_within_a_few_steps_no_code_flips() -> None:
    found, begun, _ = pushed(12, by=3)
    assert found.after < found.before  # by the scales alone
    assert torch.equal(found.weights["mlp.down_proj"].codes, begun.codes)


def test_what_is_told_has_four_digits() -> None:
    assert Refined({}, {}, 0.123456, 2.0).note == {"loss_before": 0.1235, "loss_after": 2.0}


def test_the_loss_is_a_share_of_each_tokens_size() -> None:
    """Tokens of almost nothing count as one of 1e-9."""
    wanted = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert relative_error(torch.tensor([[3.0, 5.0], [0.0, 0.0]]), wanted).item() == pytest.approx(0.5 / 12.5 / 2)
    assert relative_error(torch.tensor([[3.0, 4.0], [1e-5, 0.0]]), wanted).item() == pytest.approx(5e-11 / 1e-9 / 2)


def small(samples: int, length: int, steps: int, seed: int = 3) -> Refined:
    """A small block refined towards the float one."""
    config = small_config(2)
    tensors = random_block(config)
    block = DecoderBlock.from_weights(config, tensors)
    weights = {name: tensors[f"{name}.weight"] for name in LINEARS}
    solved = {name: round_to_nearest(weight, 4, 32, True) for name, weight in weights.items()}
    streams = Streams(config, torch.randn(samples, length, 64, generator=torch.Generator().manual_seed(0)))
    rotary = (streams.cos, streams.sin)
    targets = block(streams.hidden, *rotary)
    found = refine(block, weights, solved, streams.hidden, targets, rotary, steps=steps, seed=seed)
    for name, weight in found.weights.items():
        flipped = (weight.codes != solved[name].codes).float().mean().item()
        assert found.flipped[name] == pytest.approx(flipped)
        assert torch.equal(weight.zeros, solved[name].zeros)
    output = DecoderBlock.from_weights(
        config, tensors | {f"{name}.weight": weight.dequantize() for name, weight in found.weights.items()}
    )(streams.hidden, *rotary)
    if samples * length <= 8192:
        assert found.after == pytest.approx(relative_error(output, targets).item(), rel=1e-3)
    return found


def test_refining_brings_a_small_block_nearer_and_the_same_each_time() -> None:
    found = small(40, 32, 40)
    assert found.after < 0.9 * found.before
    assert all(0 < share < 0.5 for share in found.flipped.values())
    again, other = small(40, 32, 40), small(40, 32, 40, seed=4)
    for name in LINEARS:
        assert torch.equal(found.weights[name].codes, again.weights[name].codes)
        assert torch.equal(found.weights[name].scales, again.weights[name].scales)
    assert any(not torch.equal(found.weights[name].codes, other.weights[name].codes) for name in LINEARS)


def offset(samples: int, sizes: list[float], steps: int, seed: int) -> tuple[Refined, list[float]]:
    """Refined towards what rounded weights give and a share more, sample by sample; and each sample's loss before."""
    config = small_config(2)
    tensors = random_block(config)
    block = DecoderBlock.from_weights(config, tensors)
    solved = {name: round_to_nearest(tensors[f"{name}.weight"], 4, 32, True) for name in LINEARS}
    streams = Streams(config, torch.randn(samples, 4, 64, generator=torch.Generator().manual_seed(0)))
    rotary = (streams.cos, streams.sin)
    weights = {name: weight.dequantize() for name, weight in solved.items()}
    rounded = tensors | {f"{name}.weight": weight for name, weight in weights.items()}
    output = DecoderBlock.from_weights(config, rounded)(streams.hidden, *rotary)
    targets = output + torch.tensor(sizes).view(-1, 1, 1) * (output - streams.hidden)
    found = refine(block, weights, solved, streams.hidden, targets, rotary, steps=steps, seed=seed)
    return found, [relative_error(output[at], targets[at]).item() for at in range(samples)]


def test_loss_is_judged_over_samples_spread_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 9 samples of 4 tokens 5 are judged, the first and the last among them, in parts of 2 and a rest of 1."""
    sizes = [0.1 * index for index in range(1, 10)]
    monkeypatch.setattr("compress.methods.refine.BATCH_TOKENS", 8)
    for tokens, judged in ((20, [0, 2, 4, 6, 8]), (2, [0]), (1000, list(range(9)))):
        monkeypatch.setattr("compress.methods.refine.JUDGED_TOKENS", tokens)
        found, losses = offset(9, sizes, 1, 0)
        assert found.before == pytest.approx(sum(losses[at] for at in judged) / len(judged), rel=1e-4)


def test_a_step_looks_at_so_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two samples of 4 tokens, of which one is met exactly: a step that sees that one alone changes nothing."""
    for tokens, sees_both in ((4, False), (1, False), (8, True)):
        monkeypatch.setattr("compress.methods.refine.BATCH_TOKENS", tokens)
        for seed in range(4):
            first = int(torch.randperm(2, generator=torch.Generator().manual_seed(seed))[0])
            found, _ = offset(2, [0.5, 0.0], 1, seed)
            assert (found.after < found.before) == (sees_both or first == 0), (tokens, seed)


def test_what_would_be_worse_is_not_kept() -> None:
    """Targets that the codes meet exactly, and weights that lie beside them."""
    config = small_config(2)
    tensors = random_block(config)
    solved = {name: round_to_nearest(tensors[f"{name}.weight"], 4, 32, True) for name in LINEARS}
    exact = tensors | {f"{name}.weight": weight.dequantize() for name, weight in solved.items()}
    block = DecoderBlock.from_weights(config, exact)
    streams = Streams(config, torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)))
    rotary = (streams.cos, streams.sin)
    weights = {name: tensors[f"{name}.weight"] for name in LINEARS}
    targets = block(streams.hidden, *rotary)
    found = refine(block, weights, solved, streams.hidden, targets, rotary, steps=30, seed=0)
    assert found.weights == solved and not any(found.flipped.values())
    assert found.before == found.after == pytest.approx(0, abs=1e-10)
