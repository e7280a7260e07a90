"""LoRA adapters: merged exactly, what PEFT itself computes, and everything that does not fit refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bluelm import adapters
from bluelm.adapters import adapted, parse_adapter
from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from bluelm.model import Decoder
from tests.support.checkpoints.adapters import DOWN, SHAPES, Q, write_adapter
from tests.support.checkpoints.shapes import write_checkpoint


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(tmp_path / "base"))


def product(tensors: dict[str, Tensor], module: str) -> Tensor:
    """B @ A in float64, element by element of the definition."""
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return torch.stack(
        [sum((b[:, k] * a[k, j] for k in range(4)), torch.zeros(64).double()) for j in range(a.shape[1])], 1
    )


def test_the_sum_is_that_of_float64(base: Checkpoint, tmp_path: Path) -> None:
    first = write_adapter(tmp_path / "a")
    second = write_adapter(tmp_path / "b", seed=1, use_rslora=True)
    merged = adapted(base, [(tmp_path / "a", 1.0), (tmp_path / "b", 0.5)])
    for module in SHAPES:
        plain = load_file(base.folder / "model.safetensors")[f"{module}.weight"].double()
        wanted = plain + 6 / 4 * product(first, module) + 0.5 * 6 / math.sqrt(4) * product(second, module)
        found = merged.tensor(f"{module}.weight")
        assert (found.double() - wanted).abs().max() <= 2.0**-23 * wanted.abs().max()
    assert torch.equal(merged.block(0)["self_attn.q_proj.weight"], merged.tensor(f"{Q}.weight"))
    assert torch.equal(merged.block(0)["mlp.up_proj.weight"], base.block(0)["mlp.up_proj.weight"])
    digests = {base.digest(), merged.digest(), adapted(base, [(tmp_path / "a", 0.5)]).digest()}
    assert len(digests) == 3


def test_ranks_and_alphas_by_pattern_and_whole_tensors(base: Checkpoint, tmp_path: Path) -> None:
    head = torch.randn(512, 64)
    tensors = write_adapter(
        tmp_path / "a",
        r=8,
        rank_pattern={"down_proj": 4, r"layers\.0\.self_attn\.q_proj": 4},
        alpha_pattern={"q_proj": 2},
        tensors={"base_model.model.lm_head.weight": head},
    )
    merged = adapted(base, [(tmp_path / "a", 1.0)])
    change = merged.tensor(f"{Q}.weight").double() - base.tensor(f"{Q}.weight").double()
    assert torch.allclose(change, 2 / 4 * product(tensors, Q), atol=1e-6)
    change = merged.tensor(f"{DOWN}.weight").double() - base.tensor(f"{DOWN}.weight").double()
    assert torch.allclose(change, 6 / 4 * product(tensors, DOWN), atol=1e-6)
    assert torch.equal(merged.head(), head)
    with pytest.raises(InputError, match="replaces lm_head"):
        adapted(base, [(tmp_path / "a", 0.5)])


def test_an_embeddings_update(base: Checkpoint, tmp_path: Path) -> None:
    a, b = torch.randn(4, 512), torch.randn(64, 4)
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    write_adapter(tmp_path / "a", tensors={f"{name}A": a, f"{name}B": b})
    merged = adapted(base, [(tmp_path / "a", 2.0)])
    embed = "model.embed_tokens.weight"
    wanted = base.tensor(embed).double() + 2 * 1.5 * (b.double() @ a.double()).T
    assert torch.allclose(merged.tensor(embed).double(), wanted, rtol=1e-6, atol=1e-6)


def test_peft_itself_merges_to_the_same(tmp_path: Path) -> None:
    """peft's own merge in float32, of adapters that it initialised, trained (here: drawn) and saved."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(
        r=8, lora_alpha=12, use_rslora=True, target_modules=["q_proj", "o_proj", "down_proj", "embed_tokens"],
        rank_pattern={"down_proj": 4}, alpha_pattern={"o_proj": 3}, init_lora_weights=False,
        modules_to_save=["lm_head"],
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, lora)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    wanted = wrapped.merge_and_unload().state_dict()
    base = Checkpoint.open(tmp_path / "base")
    merged = adapted(base, [(tmp_path / "adapter", 1.0)])
    changed = 0
    for name in base.tensors:
        assert (merged.tensor(name) - wanted[name]).abs().max() <= 3e-7 * max(1, wanted[name].abs().max().item()), name
        changed += not torch.equal(merged.tensor(name), base.tensor(name))
    assert changed == 2 * 3 + 1


def test_every_field_that_peft_writes_is_known_here(base: Checkpoint, tmp_path: Path) -> None:
    """What PEFT writes by default is read; each field of its configuration is in one of the two tables."""
    import peft

    default = json.loads(json.dumps(peft.LoraConfig(r=4, lora_alpha=6).to_dict(), default=str))
    assert default.keys() - adapters._READ == adapters._REFUSED.keys()
    write_adapter(tmp_path / "a", **(default | {"peft_type": "LORA", "target_modules": ["q_proj"]}))
    adapted(base, [(tmp_path / "a", 1.0)])
    write_adapter(tmp_path / "b", **{"of next year": None, "switched_off": False, "empty": {}})
    adapted(base, [(tmp_path / "b", 1.0)])


TIED = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding, tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "embedding, tied, of two scales": {
        "target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True, "alpha_pattern": {"lm_head": 3},
    },
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head, tied": {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    "both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole embedding, tied": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    },
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "neither": {"target_modules": ["q_proj"]},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TIED)
def test_tied_tables_are_what_peft_runs(name: str, tmp_path: Path) -> None:
    """PEFT's model with the adapter beside the weights: the one that was trained. (Its merge changes both roles.)"""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **TIED[name])).eval()
    for parameter, values in wrapped.named_parameters():
        if "lora_" in parameter or "modules_to_save" in parameter:
            values.data.add_(torch.randn_like(values) * 0.1)  # in place: tied ones share their values
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        wanted = wrapped(tokens).logits
    base = Checkpoint.open(tmp_path / "base")
    merged = adapted(base, [(tmp_path / "adapter", 1.0)])
    found = Decoder.from_weights(merged)(tokens)
    torch.testing.assert_close(found, wanted, atol=2e-4 * wanted.abs().max().item(), rtol=2e-4)
    stays = name in ("embedding, tied", "head, tied", "whole embedding, tied", "neither")
    assert merged.config.tie_word_embeddings == stays
    assert bool(merged.warnings) != stays


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for name in [name for name in tensors if old in name]:
        tensors[name.replace(old, new)] = tensors.pop(name)


A_OF_Q, B_OF_Q = (f"base_model.model.{Q}.lora_{side}.weight" for side in "AB")


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        ({}, lambda t: t.update({A_OF_Q: torch.ones(4, 63)}), [A_OF_Q, "[4, 63]", "[4, 64]"]),
        ({}, lambda t: t.update({B_OF_Q: torch.ones(65, 4)}), [B_OF_Q, "[65, 4]", "[64, 4]"]),
        ({}, lambda t: t.update({A_OF_Q: torch.ones(4)}), [A_OF_Q, "[4]"]),
        ({}, lambda t: t.update({A_OF_Q: torch.tensor(1.0)}), [A_OF_Q, "[]"]),
        ({}, lambda t: t.pop(B_OF_Q), [Q, "no lora_B"]),
        ({}, lambda t: rename(t, "layers.1.", "layers.7."), ["layers.7", "no tensor of this model"]),
        ({}, lambda t: t.clear(), ["no tensors"]),
        ({"r": 8}, lambda t: None, ["rank 4", "8"]),
        ({"lora_alpha": "much"}, lambda t: None, ["lora_alpha", "much"]),
        ({"rank_pattern": {"(": 4}}, lambda t: None, ["not a valid pattern"]),
        ({"rank_pattern": [4]}, lambda t: None, ["rank_pattern must be an object"]),
        ({"alpha_pattern": {"(?=q)q_proj": 4}}, lambda t: None,
         ["not a valid pattern", "alpha_pattern", "without lookaround"]),
        ({"alpha_pattern": {"(" * 2000 + ")" * 2000: 4}}, lambda t: None, ["characters"]),
        ({"rank_pattern": {"((a{1000}){1000}){1000}": 4}}, lambda t: None, ["not a valid pattern"]),
        ({"rank_pattern": {f"q{i}": 4 for i in range(2001)}}, lambda t: None, ["2001 patterns"]),
        ({"lora_alpha": 10**400}, lambda t: None, ["401 digits"]),
        ({"peft_type": "IA3"}, lambda t: None, ["IA3"]),
        ({"use_dora": True}, lambda t: None, ["DoRA"]),
        ({"bias": "all"}, lambda t: None, ["biases"]),
        ({"init_lora_weights": "pissa_niter_4"}, lambda t: None, ["pissa", "changed the base model"]),
        ({"init_lora_weights": "lora_ga"}, lambda t: None, ["lora_ga", "changed the base model"]),
        ({"init_lora_weights": "next_year"}, lambda t: None, ["next_year"]),
        ({"init_lora_weights": 1}, lambda t: None, ["init_lora_weights 1"]),
        ({"alora_invocation_tokens": [5, 6]}, lambda t: None, ["alora_invocation_tokens", "behind its invocation"]),
        ({"kasa_config": {"beta": 1}}, lambda t: None, ["kasa_config"]),
        ({"use_bdlora": {"nblocks": 2}}, lambda t: None, ["use_bdlora"]),
        ({"fan_in_fan_out": True}, lambda t: None, ["fan_in_fan_out"]),
        ({"turn_everything": 0.5}, lambda t: None, ["turn_everything", "not known here"]),
        ({"zero_is_a_value": 0}, lambda t: None, ["zero_is_a_value", "not known here"]),
    ],
)  # fmt: skip
def test_what_does_not_fit(base: Checkpoint, tmp_path: Path, config: Any, change: Any, said: list[str]) -> None:
    tensors = write_adapter(tmp_path / "a", **config)
    change(tensors)
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(InputError) as caught:
        adapted(base, [(tmp_path / "a", 1.0)])
    for words in said:
        assert words in str(caught.value)


def test_a_pattern_takes_no_longer_than_a_name(base: Checkpoint, tmp_path: Path) -> None:
    """Python's own `re` has not finished such a match in a day."""
    endless = {r"(([a-z0-9_.]|[a-z0-9_.]+)*)*!": 9}
    write_adapter(tmp_path / "a", rank_pattern=endless, alpha_pattern=endless)
    write_adapter(tmp_path / "b")

    with_it, without = (adapted(base, [(tmp_path / name, 1.0)]) for name in "ab")

    assert torch.equal(with_it.tensor(f"{Q}.weight"), without.tensor(f"{Q}.weight"))


def test_adapters_of_nan_or_nowhere(base: Checkpoint, tmp_path: Path) -> None:
    tensors = write_adapter(tmp_path / "a")
    tensors[A_OF_Q][0, 0] = math.nan
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="NaN"):
        adapted(base, [(tmp_path / "a", 1.0)]).tensor(f"{Q}.weight")
    with pytest.raises(InputError, match="not a LoRA adapter"):
        adapted(base, [(tmp_path / "nowhere", 1.0)])


def test_weights_behind_a_colon(tmp_path: Path) -> None:
    (tmp_path / "a:2").mkdir()
    assert parse_adapter("style:0.5") == (Path("style"), 0.5)
    assert parse_adapter("style") == (Path("style"), 1.0)
    assert parse_adapter(str(tmp_path / "a:2")) == (tmp_path / "a:2", 1.0)
    for text in ("style:much", "style:nan", "style:inf"):
        with pytest.raises(InputError, match="not a weight"):
            parse_adapter(text)
