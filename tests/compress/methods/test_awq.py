"""AWQ: folding leaves the function alone, and the search wins back what outlier channels cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bluelm.block import Move, Stage, block_of
from bluelm.checkpoint import Checkpoint
from bluelm.config import ModelConfig
from bluelm.model import DecoderBlock
from bluelm.system.files import demo_checkpoint
from calibration.samples import load_samples
from calibration.walk import Streams, collect_hessians
from compress.engine import quantize
from compress.methods.awq import Scaling, fold, fold_block, search_clips, search_scales
from compress.methods.grid import choose_grid
from compress.methods.probe import Probe
from compress.methods.rtn import round_to_nearest
from compress.recipe import Recipe, Widths
from tests.support.checkpoints.blocks import random_block, small_config
from tests.support.checkpoints.shapes import LINEARS, shortened

W4 = Widths(4, 32, True)
QKV = Stage("attention_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
OUT = Stage("mixed", ("self_attn.o_proj",))
GATE_UP = Stage("mlp_norm", ("mlp.gate_proj", "mlp.up_proj"))
DOWN = Stage("gated", ("mlp.down_proj",))


def run(config: ModelConfig, tensors: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """float64 output of a block."""
    block = DecoderBlock.from_weights(config, {name: tensor.double() for name, tensor in tensors.items()})
    streams = Streams(config, hidden.double())
    return block(streams.hidden, streams.cos.double(), streams.sin.double())


@pytest.mark.parametrize(
    ("kv_heads", "architecture"),
    [(4, "LlamaForCausalLM"), (2, "LlamaForCausalLM"), (1, "LlamaForCausalLM"), (2, "Qwen2ForCausalLM")],
)
def test_folding_leaves_the_function_alone(kv_heads: int, architecture: str) -> None:
    config = small_config(kv_heads, architecture)
    tensors = random_block(config)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 10, 64, generator=generator)
    before = run(config, tensors, hidden)
    folded = tensors
    for place in block_of(config).moves:
        reads = torch.tensor(place.channels)
        scales = torch.randn(int(reads.max()) + 1, generator=generator).exp()
        changed = fold(folded, place, scales, reads)
        assert all(not torch.equal(changed[f"{n}.weight"], folded[f"{n}.weight"]) for n in place.stage.linears)
        folded = changed
    torch.testing.assert_close(run(config, folded, hidden), before, rtol=1e-5, atol=1e-5)
    assert {name: tensor.shape for name, tensor in folded.items()} == {n: t.shape for n, t in tensors.items()}


def test_heads_of_a_group_share_their_value_head() -> None:
    shared = [*range(16), *range(16), *range(16, 32), *range(16, 32)]  # 4 heads of 16, 2 value heads
    assert block_of(small_config(2)).moves == (
        Move(QKV, "input_layernorm", tuple(range(64))),
        Move(OUT, "self_attn.v_proj", tuple(shared)),
        Move(GATE_UP, "post_attention_layernorm", tuple(range(64))),
        Move(DOWN, "mlp.up_proj", tuple(range(96))),
    )


def test_search_is_never_worse_than_no_scales() -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(5):
        weights = [torch.randn(16, 64, generator=generator.manual_seed(seed)) for _ in range(2)]
        x = torch.randn(100, 64, generator=generator)
        found = search_scales(weights, x.T @ x / 100, torch.arange(64), [W4, W4])
        assert found.loss <= found.plain
        assert torch.isfinite(found.scales).all()
        assert (found.scales > 0).all()


def test_channels_without_signal_are_left_alone() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(search_scales([weight], torch.zeros(64, 64), torch.arange(64), [W4]).scales, torch.ones(64))
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(1)) * 10
    x[:, 7] = 0
    assert search_scales([weight], x.T @ x / 100, torch.arange(64), [W4]).scales[7] == 1


def test_columns_of_one_size_each_are_divided_by_it() -> None:
    """Every entry of column j is +c_j or -c_j: divided by c, a row's groups need one scale."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(64, generator=generator).exp()
    weight = torch.randint(0, 2, (16, 64), generator=generator) * 2.0 - 1.0
    x = torch.randn(100, 64, generator=generator) * torch.randn(64, generator=generator).exp()
    silent, unread = 5, 9
    x[:, silent], sizes[unread] = 0, 0
    found = search_scales([weight * sizes], x.T @ x / 100, torch.arange(64), [W4])
    assert (found.by_weight, found.exponent) == (True, 0.0)
    assert found.loss < 0.02 * found.plain
    assert found.scales[[silent, unread]].tolist() == [1.0, 1.0]
    alive = [index for index in range(64) if index not in (silent, unread)]
    wanted = 1 / sizes[alive].double()
    torch.testing.assert_close(found.scales[alive].double(), wanted / wanted.log().mean().exp(), rtol=1e-4, atol=0)


def test_scales_are_no_further_apart_than_the_widest_ratio() -> None:
    x = torch.eye(64) * 8
    x[0, 0], x[1, 1], x[7, 7] = 1e9, 1e-9, 0
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 0] *= 1e-8  # what speaks loudest is weighed least
    found = search_scales([weight], x.T @ x / 64, torch.arange(64), [W4], judge=_in_turn(5))
    assert not found.by_weight and found.scales[7] == 1  # without a signal
    assert found.scales.max() <= 100.0 and found.scales.min() >= 0.01
    assert found.scales.max() / found.scales.min() == pytest.approx(1e4, rel=1e-3)


def _in_turn(best: int, losses: list[float] | None = None) -> Any:
    """A judge whose `best`-th answer, counted from 0, is the least of the first 13; those behind are worse."""
    asked = losses if losses is not None else []

    def judge(rounded: list[Tensor]) -> float:
        asked.append(1.0 if len(asked) == best else 2.0)
        return asked[-1]

    return judge


@pytest.mark.parametrize(
    ("best", "by_weight", "exponent", "near"),
    [
        (0, False, 0.0, 2),  # without scales nothing was gained: 0.1 and 0.05 are tried beside 0
        (2, False, 0.2, 4),
        (6, False, 1.0, 2),
        (7, True, 0.0, 2),
        (12, True, 1.0, 2),
    ],
)
def test_exponents_are_tried_from_0_to_1(best: int, by_weight: bool, exponent: float, near: int) -> None:
    losses: list[float] = []
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    found = search_scales([weight], torch.eye(64), torch.arange(64), [W4], judge=_in_turn(best, losses))
    assert (found.by_weight, found.loss, found.plain) == (by_weight, min(losses), losses[0])
    assert found.exponent == pytest.approx(exponent)
    assert len(losses) == 1 + 2 * 6 + near


@pytest.mark.parametrize("seed", range(4))
def test_the_exponents_neighbours_are_no_better(seed: int) -> None:
    """The scales of exponents 0.05 away, made from their formula in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(32, 64, generator=generator) * torch.randn(64, generator=generator).mul(0.7).exp()
    x = torch.randn(200, 64, generator=generator) * torch.randn(64, generator=generator).mul(1.5).exp()
    hessian = x.T @ x / 200
    found = search_scales([weight], hessian, torch.arange(64), [W4])
    a, w = x.double().square().mean(0).sqrt(), weight.double().square().mean(0).sqrt()

    def lost(exponent: float) -> float:
        scales = a**exponent / (w ** (1 - exponent) if found.by_weight else 1)
        scales = (scales / scales.log().mean().exp()).float()
        error = round_to_nearest(weight * scales, 4, 32, True).dequantize() / scales - weight
        return float((error.double() @ hessian.double() * error.double()).sum())

    assert lost(found.exponent) == pytest.approx(lost(0.0) if found.exponent == 0 else lost(found.exponent))
    for exponent in (found.exponent - 0.05, found.exponent + 0.05):
        assert not 0 <= exponent <= 1 or lost(exponent) >= lost(found.exponent) * 0.9999


def test_notes_tell_what_a_search_found() -> None:
    ones = torch.ones(4)
    assert Scaling(ones, 0.5, True, 0.2, 0.4).note == {"exponent": 0.5, "by_weight": True, "loss_ratio": 0.5}
    assert Scaling(ones, 0.0, False, 0.0, 0.0).note == {"exponent": 0.0, "by_weight": False, "loss_ratio": 1.0}


def test_folding_a_block_names_the_linears_to_leave_unclipped() -> None:
    """A block drawn so that clipping its keys costs attention more than it brings them."""
    config, generator = small_config(2), torch.Generator().manual_seed(1)
    tensors = {
        name: 1 + 0.3 * torch.randn(shape, generator=generator)
        if name.endswith("norm.weight")
        else torch.randn(shape, generator=generator) / 8
        for name, shape in block_of(config).shapes.items()
    }
    streams = Streams(config, torch.randn(3, 10, 64, generator=generator))
    block = DecoderBlock.from_weights(config, tensors)
    hessians, probe, widths = collect_hessians(streams, block), Probe(streams, block), Widths(3, 32, True)
    wanted: set[str] = set()
    for stage in (QKV, GATE_UP):
        weights, asked = [tensors[f"{name}.weight"] for name in stage.linears], [widths] * len(stage.linears)
        judge = probe.judge(stage)
        assert judge is not None
        scales = search_scales(weights, hessians[stage.name], torch.arange(64), asked, judge).scales
        clips = search_clips(weights, hessians[stage.name], scales, asked, judge)
        wanted |= {name for name, clip in zip(stage.linears, clips, strict=True) if not clip}
    assert wanted == {"self_attn.k_proj"}
    everywhere: dict[str, Widths] = {name: widths for name in LINEARS}  # noqa: C420  (fromkeys keeps the names' own type)
    assert fold_block(config, tensors, hessians, everywhere, probe, clip=True).unclipped == wanted
    assert not fold_block(config, tensors, hessians, everywhere, probe).unclipped


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_modules_judge_the_linears_that_read_a_norm(kv_heads: int) -> None:
    """The error of attention and MLP written out in float64, each query head with the keys of its group."""
    config = small_config(kv_heads)
    tensors = random_block(config)
    streams = Streams(config, torch.randn(3, 10, 64, generator=torch.Generator().manual_seed(1)))
    block = DecoderBlock.from_weights(config, tensors)
    probe = Probe(streams, block)

    def attention(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        q, k, v = (
            (x @ weights[f"self_attn.{name}_proj.weight"].double().T).unflatten(-1, (-1, 16)) for name in "qkv"
        )  # [b, T, heads, 16]
        cos, sin = streams.cos.double().unsqueeze(1), streams.sin.double().unsqueeze(1)  # [T, 1, 16]
        q, k = (t * cos + torch.cat((-t[..., 8:], t[..., :8]), -1) * sin for t in (q, k))
        k, v = (t.repeat_interleave(4 // kv_heads, 2) for t in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / 4
        scores = scores.masked_fill(torch.ones(10, 10).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2)
        return mixed @ weights["self_attn.o_proj.weight"].double().T

    def mlp(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        gate, up, down = (weights[f"mlp.{name}_proj.weight"].double().T for name in ("gate", "up", "down"))
        return (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight.double()

    x = streams.hidden.double()
    attends = norm(x, tensors["input_layernorm.weight"])
    middle = x + attention(attends, tensors)
    reads = norm(middle, tensors["post_attention_layernorm.weight"])
    end = middle + mlp(reads, tensors)
    for stage, module, inputs, stream in ((QKV, attention, attends, middle), (GATE_UP, mlp, reads, end)):
        rounded = {f"{name}.weight": tensors[f"{name}.weight"].mul(4).round().div(4) for name in stage.linears}
        judge = probe.judge(stage)
        assert judge is not None
        error = module(inputs, tensors | rounded) - module(inputs, tensors)
        wanted = (error.square().mean(-1) / stream.square().mean(-1)).mean()  # as a share of each token's stream
        assert judge(list(rounded.values())) == pytest.approx(wanted.item(), rel=1e-4)
        assert judge([tensors[name] for name in rounded]) < 1e-9
    assert probe.judge(OUT) is None and probe.judge(DOWN) is None


@pytest.mark.parametrize("stage", [QKV, GATE_UP])
def test_scales_and_clips_lose_least_at_the_output_of_the_module(stage: Stage) -> None:
    """On the demo's first block, planted: never more than what each linear's own error would choose."""
    checkpoint = Checkpoint.open(demo_checkpoint())
    config, tensors = checkpoint.config, planted(checkpoint.block(0))
    streams = Streams(config, checkpoint.embedding()[load_samples(None, checkpoint.tokenizer(), 8, 128, 0).tokens])
    block = DecoderBlock.from_weights(config, tensors)
    hessian, judge = collect_hessians(streams, block)[stage.name], Probe(streams, block).judge(stage)
    assert judge is not None
    weights, widths = [tensors[f"{name}.weight"] for name in stage.linears], [W4] * len(stage.linears)

    def lost(scales: Tensor, clips: list[bool]) -> float:
        rounded: list[Tensor] = []
        for weight, clip in zip(weights, clips, strict=True):
            seen = hessian / scales / scales.unsqueeze(1)
            grid = choose_grid(weight * scales, 4, 32, True, search=clip, hessian=seen)
            rounded.append(grid.nearest(weight * scales).dequantize() / scales)
        return judge(rounded)

    none = [False] * len(weights)
    found = search_scales(weights, hessian, torch.arange(config.hidden_size), widths, judge)
    assert lost(found.scales, none) == pytest.approx(found.loss, rel=1e-4)
    assert found.loss < 0.5 * found.plain
    alone = search_scales(weights, hessian, torch.arange(config.hidden_size), widths)  # by the linears' own output
    assert found.loss <= lost(alone.scales, none) * 1.0001
    clips = search_clips(weights, hessian, found.scales, widths, judge)
    everything = [True] * len(weights)
    for tried in (everything, [False, *everything[1:]]):  # both were tried
        assert lost(found.scales, clips) <= lost(found.scales, tried) * 1.0001


def planted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function with outlier channels: a norm's weight times c, the columns behind it divided by c."""
    changed = dict(tensors)
    for norm, stage in (("input_layernorm", QKV), ("post_attention_layernorm", GATE_UP)):
        factor = torch.ones(len(tensors[f"{norm}.weight"]))
        factor[[3, 50, 77, 120, 201]] = torch.tensor([50.0, 30.0, 50.0, 20.0, 40.0])
        changed[f"{norm}.weight"] = tensors[f"{norm}.weight"] * factor
        for linear in stage.linears:
            changed[f"{linear}.weight"] = changed[f"{linear}.weight"] / factor
    return changed


def test_planted_outliers_are_won_back() -> None:
    checkpoint = Checkpoint.open(demo_checkpoint())
    config = checkpoint.config
    tokens = load_samples(None, checkpoint.tokenizer(), 8, 128, 0).tokens
    streams = Streams(config, checkpoint.embedding()[tokens])
    original = checkpoint.block(0)
    tensors = planted(original)
    block = DecoderBlock.from_weights(config, tensors)

    def lost(changed: dict[str, Tensor]) -> float:
        rounded = {
            name: round_to_nearest(tensor, 4, 32, True).dequantize() if tensor.ndim == 2 else tensor
            for name, tensor in changed.items()
        }
        return float((run(config, rounded, streams.hidden) - exact).square().mean())

    exact = run(config, tensors, streams.hidden)
    found = fold_block(
        config, tensors, collect_hessians(streams, block), dict.fromkeys(LINEARS, W4), Probe(streams, block)
    )
    without, planted_loss, awq = lost(original), lost(tensors), lost(found.tensors)
    assert planted_loss > 1.5 * without
    assert planted_loss - awq >= 0.8 * (planted_loss - without)
    assert found.notes["attention_norm"]["scaling"]["exponent"] > 0


def test_gptq_on_awqs_scales_loses_less_than_either_alone(tmp_path: Path) -> None:
    """Whole runs over one block with outlier channels, judged by its output in float64."""
    folder = shortened(demo_checkpoint(), 1, tmp_path / "float")
    path, prefix = folder / "model.safetensors", "model.layers.0."
    stored = load_file(path)
    block = {name.removeprefix(prefix): t.float() for name, t in stored.items() if name.startswith(prefix)}
    save_file(stored | {f"{prefix}{name}": t.contiguous() for name, t in planted(block).items()}, path)
    checkpoint = Checkpoint.open(folder)
    samples = load_samples(None, checkpoint.tokenizer(), 16, 128, 0)
    unseen = load_samples(None, checkpoint.tokenizer(), 16, 128, 1).tokens
    hidden = checkpoint.embedding()[unseen]
    exact = run(checkpoint.config, checkpoint.block(0), hidden)

    def lost(method: str) -> float:
        made = quantize(checkpoint, samples, Recipe.make({"method": method, "length": 128}), tmp_path / method)
        notes = made.info["layers"][f"{prefix}self_attn.q_proj"]
        assert ("scaling" in notes) == ("awq" in method) and ("damping" in notes) == ("gptq" in method)
        return float((run(checkpoint.config, made.block(0), hidden) - exact).square().mean())

    loss = {method: lost(method) for method in ("awq", "gptq", "awq+gptq")}
    assert loss["awq+gptq"] < 0.95 * min(loss["awq"], loss["gptq"]), loss
