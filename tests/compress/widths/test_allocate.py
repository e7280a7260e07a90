"""Mixed precision: sensitivities against the whole decoder, the knapsack against trying everything, sizes on disk."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from bluelm.model import Decoder
from bluelm.system.files import demo_checkpoint
from calibration.samples import load_samples
from compress.engine import quantize
from compress.fit import check
from compress.methods.rtn import round_to_nearest
from compress.recipe import Recipe, Widths
from compress.widths.allocate import Allocation, Allowed, Chosen, allocate, choose, knapsack, linear_bytes, sample
from compress.widths.sensitivity import measure
from tests.support.checkpoints.shapes import shortened

W4, W8, ROW4 = Widths(4, 32, True), Widths(8, 32, True), Widths(4, -1, True)
AUTO = {"method": "rtn", "bits": "auto"}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(shortened(demo_checkpoint(), 2, tmp_path_factory.mktemp("short") / "float"))


@pytest.fixture(scope="module")
def tokens(short: Checkpoint) -> Tensor:
    return load_samples(None, short.tokenizer(), 4, 64, 0).tokens


@pytest.fixture(scope="module")
def chosen(short: Checkpoint, tokens: Tensor) -> Chosen:
    return choose(short, tokens, Recipe.make(AUTO))


def kl_with(checkpoint: Checkpoint, tokens: Tensor, name: str, width: Widths) -> float:
    """KL of the whole decoder with one weight rounded."""
    exact, changed = Decoder.from_weights(checkpoint), Decoder.from_weights(checkpoint)
    path = "head" if name == "lm_head" else name.removeprefix("model.").replace("layers", "blocks")
    weight = changed.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    weight.copy_(round_to_nearest(weight, width.bits, width.group_size, width.symmetric).dequantize())
    log_p, log_q = (decoder(tokens).double().log_softmax(-1) for decoder in (exact, changed))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_sensitivities_are_the_whole_models(short: Checkpoint, tokens: Tensor) -> None:
    found = measure(short, tokens, (W4, ROW4), (W4, ROW4))
    assert len(found) == 2 * 7 + 1
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj", "lm_head"):
        assert found[name].kl[W4] == pytest.approx(kl_with(short, tokens, name, W4), rel=0.02, abs=1e-7)
        # another width is scaled from it, not measured
        assert found[name].kl[ROW4] == pytest.approx(kl_with(short, tokens, name, ROW4), rel=0.5)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), classes=st.integers(1, 5), share=st.floats(0, 1), by_loss=st.booleans())
def test_knapsack_is_exact(seed: int, classes: int, share: float, by_loss: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    options = (W4, W8, ROW4)
    sizes = [{w: int(torch.randint(1, 40, (), generator=random)) for w in options} for _ in range(classes)]
    losses = [{w: float(torch.rand((), generator=random)) for w in options} for _ in range(classes)]
    room = int(share * sum(max(size.values()) for size in sizes))
    limit = share * classes if by_loss else None
    every = [
        (sum(s[w] for s, w in zip(sizes, c, strict=True)), sum(x[w] for x, w in zip(losses, c, strict=True)))
        for c in itertools.product(options, repeat=classes)
    ]
    if by_loss:
        room = sum(max(size.values()) for size in sizes)
    found = knapsack(sizes, losses, room, limit)
    fitting = [(size, loss) for size, loss in every if size <= room and (limit is None or loss <= limit + 1e-12)]
    if found is None:
        assert not fitting
        return
    size = sum(s[w] for s, w in zip(sizes, found, strict=True))
    loss = sum(x[w] for x, w in zip(losses, found, strict=True))
    assert size <= room
    if limit is None:
        assert loss == pytest.approx(min(loss for _, loss in fitting))
    else:
        assert loss <= limit + 1e-12
        assert size == min(size for size, _ in fitting)


def test_too_fine_sizes_are_rounded_up_and_still_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.widths.allocate.LONGEST", 50)
    sizes = [{W4: 1000 + 7 * i, W8: 2001 + 13 * i} for i in range(9)]
    losses = [{W4: 1.0 + i, W8: 0.1} for i in range(9)]
    found = knapsack(sizes, losses, 14_000)
    assert found is not None
    assert sum(s[w] for s, w in zip(sizes, found, strict=True)) <= 14_000
    assert found.count(W8) >= 3, "room for four is used but for the rounding"


def test_as_large_as_the_plain_recipe_and_better(short: Checkpoint, chosen: Chosen, tmp_path: Path) -> None:
    plain = quantize(short, None, Recipe.make({"method": "rtn"}), tmp_path / "plain")
    mixed = quantize(short, None, chosen.recipe.model_copy(update={"length": 64}), tmp_path / "mixed")
    stored = [sum(path.stat().st_size for path in made.folder.glob("*.safetensors")) for made in (plain, mixed)]
    overhead = 20_000  # headers
    assert chosen.allocation.size <= stored[1] <= chosen.allocation.size + overhead
    assert stored[1] <= stored[0] + overhead
    for name, width in chosen.allocation.widths.items():
        info = mixed.linears[name]
        assert (info.bits, info.group_size) == (width.bits, width.group_size)
    uniform = sum(found.kl[Recipe().widths(name)] for name, found in chosen.sensitivities.items())
    assert chosen.allocation.kl < uniform
    assert mixed.info["layers"]["lm_head"]["bits"] == chosen.recipe.head_bits


def test_a_size_or_a_loss_is_kept_within(short: Checkpoint, chosen: Chosen) -> None:
    def within(**limit: object) -> Allocation:
        return allocate(chosen.sensitivities, short.config, Recipe.make({**AUTO, **limit}))

    size = chosen.allocation.size * 11 // 10
    larger = within(size=size)
    assert chosen.allocation.size < larger.size <= size
    assert larger.kl < chosen.allocation.kl
    kept = within(max_kl=larger.kl * 1.0001)
    assert kept.kl <= larger.kl * 1.0001
    assert kept.size <= larger.size
    with pytest.raises(InputError, match="are too few"):
        within(size="100KB")
    with pytest.raises(InputError, match="no choice of widths"):
        within(max_kl=1e-12)


def test_what_a_target_cannot_hold_is_not_chosen(short: Checkpoint, tokens: Tensor) -> None:
    allowed = Allowed((W4, Widths(8, -1, True)), (Widths(8, -1, True),))
    found = choose(short, tokens, Recipe.make({**AUTO, "size": "3.5MB", "embed_bits": 4}), allowed)
    assert {width for name, width in found.allocation.widths.items() if name != "lm_head"} <= set(allowed.blocks)
    assert found.allocation.widths["lm_head"] == allowed.head[0]


def test_the_recipe_is_written_and_read_back(short: Checkpoint, chosen: Chosen, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(chosen.recipe.to_yaml())
    assert Recipe.load(path) == chosen.recipe
    assert sum(row["bytes"] for row in chosen.table()) < chosen.allocation.size
    assert "linears at 4 bits" in chosen.summary
    check(short.config, chosen.recipe)
    path.write_text(path.read_text() + "  model.layers.0.mlp.dwn_proj: {bits: 8, group_size: 32}\n")
    with pytest.raises(InputError, match="no linear") as caught:
        check(short.config, Recipe.load(path))
    assert "model.layers.0.mlp.down_proj" in str(caught.value.fix)


def test_auto_must_be_chosen_first(short: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="to be chosen"):
        quantize(short, None, Recipe.load("auto"), tmp_path / "q")


def test_bytes_are_those_of_packed_rows() -> None:
    assert linear_bytes((10, 64), Widths(4, 32, True)) == 10 * 32 + 10 * 2 * 2
    assert linear_bytes((10, 64), Widths(8, -1, True)) == 10 * 64 + 10 * 2
    assert linear_bytes((10, 64), Widths(4, 32, False)) == 10 * 32 + 10 * 2 * 2 + 10


def test_large_models_are_measured_on_fewer_tokens(short: Checkpoint) -> None:
    assert sample(torch.zeros(128, 512), short.config).shape == (8, 256)


@pytest.mark.parametrize(
    ("text", "size"), [("4.2GB", 4_200_000_000), ("700 MiB", 700 * 2**20), ("123", 123), ("1kb", 1000)]
)
def test_sizes_in_words(text: str, size: int) -> None:
    assert Recipe.make({"bits": "auto", "size": text}).size == size


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"bits": "auto", "size": "4.2 parsecs"}, "a size is a number"),
        ({"bits": "auto", "size": "4GB", "max_kl": 0.1}, "not both"),
        ({"size": "4GB"}, "bits: auto"),
        ({"layers": {"model.layers.0.mlp.up_proj": {"bits": 5, "group_size": 32}}}, "layers"),
    ],
)
def test_mistakes_are_named(values: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Recipe.make(values)
