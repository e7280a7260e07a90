"""The lowered decoder computes what the model does, and calibration sees what it computes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bluelm.errors import InputError
from bluelm.model import Decoder
from export.lowering import decoder as lowered
from export.lowering.parts import Part
from export.lowering.ranges import Ranges, calibrate
from export.lowering.torch_ops import Parameters, TorchOps
from targets.host.torch_runtime import TorchRuntime, TwinRuntime
from tests.support.checkpoints import lowered as lowering


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"kv_heads": 1},
        {"kv_heads": 4, "layer_norm": False, "architecture": "LlamaForCausalLM"},
        {"head_dim": 32},
        {"rope": '{"type": "ntkmixed", "factor": 16.0, "power": 0.3}'},
        {"architecture": "Qwen2ForCausalLM", "layer_norm": False},
        {"architecture": "Qwen3ForCausalLM", "layer_norm": False, "head_dim": 32},
    ],
    ids=str,
)
def test_lowered_equals_model(shape: dict) -> None:
    weights = lowering.checkpoint(**shape)
    tokens = torch.tensor(lowering.tokens(13))
    config = weights.config
    ops = TorchOps(Parameters(weights), config.rms_norm_eps)
    mask = torch.full((13, 13), -100.0).triu(1)[None, None]
    x = weights.embedding()[tokens].unsqueeze(0)
    with torch.no_grad():
        found, new = lowered.decoder(
            ops, config, x, torch.arange(13), mask, [None] * config.num_layers, lowering.CONTEXT
        )
        expected = Decoder.from_weights(weights)(tokens.unsqueeze(0))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert new[0].keys.shape == (1, config.num_kv_heads, config.head_dim, 13)
    assert new[0].values.shape == (1, config.num_kv_heads, 13, config.head_dim)


def test_steps_over_a_cache_answer_as_the_whole() -> None:
    weights, tokens = lowering.checkpoint(), torch.tensor(lowering.tokens(6))
    config, context = weights.config, 8
    ops, rows = TorchOps(Parameters(weights, keep=True), config.rms_norm_eps), list[torch.Tensor]()
    keys = torch.zeros(config.num_layers, 1, config.num_kv_heads, config.head_dim, context)
    values = torch.zeros(config.num_layers, 1, config.num_kv_heads, context, config.head_dim)
    with torch.no_grad():
        for start, stop in ((0, 3), (3, 4), (4, 6)):
            count = stop - start
            seen = torch.arange(context - count) < start
            own = torch.ones(count, count).tril() == 1
            mask = torch.where(torch.cat([seen.expand(count, -1), own], 1), 0.0, -1e4)[None, None]
            past = [lowered.KeysValues(k[..., :-count], v[:, :, :-count]) for k, v in zip(keys, values, strict=True)]
            x = weights.embedding()[tokens[start:stop]].unsqueeze(0)
            logits, new = lowered.decoder(ops, config, x, torch.arange(start, stop), mask, past, context)
            keys[..., start:stop] = torch.stack([one.keys for one in new])
            values[..., start:stop, :] = torch.stack([one.values for one in new])
            rows.append(logits[0])
        expected = Decoder.from_weights(weights)(tokens.unsqueeze(0))[0]
    torch.testing.assert_close(torch.cat(rows), expected, atol=2e-5, rtol=1e-5)


def test_a_part_gives_its_stream_and_the_next_takes_it() -> None:
    weights, tokens = lowering.checkpoint(), torch.tensor(lowering.tokens(5))
    ops, mask = TorchOps(Parameters(weights), weights.config.rms_norm_eps), torch.full((5, 5), -1e4).triu(1)[None, None]
    hidden, positions = weights.embedding()[tokens].unsqueeze(0), torch.arange(5)
    with torch.no_grad():
        x, (wanted, _) = hidden, lowered.decoder(ops, weights.config, hidden, positions, mask, [None, None], 8)
        for held, count in ((Part(True, 0, 1, False), 1), (Part(False, 1, 2, False), 1), (Part(False, 2, 2, True), 0)):
            x, new = lowered.part(ops, weights.config, held, x, positions, mask, [None] * count, 8)
            assert len(new) == count
        assert torch.equal(x, wanted)
        with pytest.raises(ValueError, match="shorter"):
            lowered.part(ops, weights.config, Part(True, 0, 2, True), hidden, positions, mask, [None], 8)
    assert lowered.block_output(3) == "layers.3.output"


def test_ranges_hold_what_a_step_by_step_walk_sees() -> None:
    """Extremes of hidden states and logits, found again with the model's own code."""
    weights = lowering.quantized()
    windows = lowering.windows(3, 20)
    found = calibrate(weights, windows)
    decoder = Decoder.from_weights(weights)
    logits = decoder(windows)
    embedded = decoder.embed(windows)
    for name, values in (("logits", logits), ("hidden", embedded)):
        low, high = found.values[name]
        assert low == pytest.approx(values.min().item(), rel=1e-4)
        assert high == pytest.approx(values.max().item(), rel=1e-4)
    masked = found.values["layers.0.shares.masked"]
    scores = found.values["layers.0.scores"]
    assert scores[0] - 20.001 <= masked[0] <= masked[1] - 20 and masked[1] <= scores[1]
    assert found.mask_value <= -100


def test_ranges_round_trip(tmp_path: Path) -> None:
    ranges = lowering.ranges()
    ranges.save(tmp_path / "ranges.json")
    assert Ranges.load(tmp_path / "ranges.json") == ranges
    assert calibrate(lowering.quantized(), lowering.windows()) == ranges


def test_bad_ranges(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        Ranges.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text('{"values": 3}')
    with pytest.raises(InputError, match="not a file of activation ranges"):
        Ranges.load(tmp_path / "broken.json")
    sound = json.loads(lowering.ranges().model_dump_json())
    for change in (
        {"headroom": math.nan},
        {"headroom": 0},
        {"values": {"x": [-1e308, 1e308]}},
        {"values": {"x": [0, math.inf]}},
    ):
        (tmp_path / "broken.json").write_text(json.dumps(sound | change))
        with pytest.raises(InputError, match=r"not a file of activation ranges: (headroom|values)"):
            Ranges.load(tmp_path / "broken.json")
    with pytest.raises(InputError, match=r"layers\.9\.q"):
        lowering.ranges().encoding("layers.9.q")
    with pytest.raises(InputError, match="no calibration tokens"):
        calibrate(lowering.quantized(), torch.zeros(0, 4, dtype=torch.int64))


def test_twin_is_near_the_dequantized_model() -> None:
    weights, tokens = lowering.quantized(), lowering.tokens(30)
    exact = TorchRuntime(weights, lowering.CONTEXT).logits(tokens)
    twin = TwinRuntime(weights, lowering.ranges(), lowering.CONTEXT)
    assert 0 < lowering.mean_kl(exact, twin.logits(tokens)) < 1e-6
    whole = twin.logits(tokens)
    twin.reset()
    parts = np.concatenate([twin.prefill(tokens[:11]), twin.prefill(tokens[11:29]), twin.decode(tokens[29])[None]])
    assert lowering.distance(parts, whole) < 1e-3


def test_ranges_know_their_weights() -> None:
    assert lowering.ranges().weights == lowering.quantized().digest()
    assert lowering.quantized("w8-g32").digest() != lowering.quantized().digest()
