"""config.json: every field that a checkpoint may have, and every mistake in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bluelm.config import ModelConfig, RopeScaling
from bluelm.errors import InputError
from bluelm.system.files import demo_checkpoint
from tests.support.checkpoints.shapes import config_dict

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(**more: Any) -> ModelConfig:
    return ModelConfig.from_dict(config_dict(**more))


def refused(**more: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(**more)
    assert caught.value.exit_code == 2
    assert "config.json" in str(caught.value.where)
    return str(caught.value)


def test_demo() -> None:
    assert ModelConfig.from_folder(demo_checkpoint()) == ModelConfig(
        "BlueLMForCausalLM", 6144, 256, 768, 6, 8, 4, 32, 1e-6, 10000.0, None, 2048, False, True, 1, (2,), 3
    )


def test_bluelm_7b_32k() -> None:
    """config.json of BlueLM-7B-Chat-32K, with what this tool has no use for."""
    config = ModelConfig.from_dict({
        "architectures": ["BlueLMForCausalLM"], "model_type": "BlueLM", "vocab_size": 100096,
        "auto_map": {"AutoModelForCausalLM": "modeling_bluelm.BlueLMForCausalLM"},
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "hidden_act": "silu", "rms_norm_eps": 1e-06, "max_position_embeddings": 2048,
        "rope_scaling": {"type": "ntkmixed", "factor": 16.0, "power": 0.3},
        "tie_word_embeddings": False, "use_stable_embedding": True, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "use_cache": True,
    })  # fmt: skip
    assert (config.num_kv_heads, config.head_dim, config.pad_token_id) == (32, 128, None)
    assert config.rope_scaling == RopeScaling("ntkmixed", 16.0, power=0.3)
    assert config.embedding_layer_norm


@pytest.mark.parametrize(("given_", "found"), [(None, 4), (4, 4), (2, 2), (1, 1)])
def test_key_value_heads(given_: int | None, found: int) -> None:
    assert read(kv_heads=given_).num_kv_heads == found
    data = config_dict()
    del data["num_key_value_heads"]
    assert ModelConfig.from_dict(data).num_kv_heads == 4


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("kind", "values", "want"),
    [
        ("default", {}, None),
        ("linear", {"factor": 4}, RopeScaling("linear", 4.0)),
        ("dynamic", {"factor": 2.0}, RopeScaling("dynamic", 2.0)),
        ("ntkmixed", {"factor": 16, "power": 0.3}, RopeScaling("ntkmixed", 16.0, 0.3)),
        ("llama3", LLAMA3, RopeScaling("llama3", 8.0, None, 1.0, 4.0, 128)),
        (
            "llama3",
            LLAMA3 | {"original_max_position_embeddings": 64},
            RopeScaling("llama3", 8.0, None, 1.0, 4.0, 64),
        ),
    ],
)
def test_rope(spelling: str, field: str, kind: str, values: dict[str, Any], want: RopeScaling | None) -> None:
    assert read(**{field: {spelling: kind} | values}).rope_scaling == want


def test_transformers_5_keeps_theta_among_the_rope_parameters() -> None:
    config = read(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    assert (config.rope_theta, config.rope_scaling) == (500000.0, None)
    assert read(rope_theta=20000).rope_theta == 20000.0


def test_end_tokens() -> None:
    assert read(eos_token_id=[2, 5]).eos_token_ids == (2, 5)
    assert read(eos_token_id=None).eos_token_ids == ()
    assert read(pad_token_id=-1).pad_token_id is None
    with pytest.raises(InputError, match="at most 1000 token ids, found 1001"):
        read(eos_token_id=[2] * 1001)


def test_the_layer_norm_is_bluelms_alone() -> None:
    assert not read(architecture="LlamaForCausalLM", use_stable_embedding=True).embedding_layer_norm
    assert not read(layer_norm=False).embedding_layer_norm
    assert read(tied=True, layer_norm=False).shares_table
    assert not read(tied=True, layer_norm=True).shares_table


def test_model_type_where_architectures_are_missing() -> None:
    assert read(architectures=None, model_type="BlueLM").architecture == "BlueLMForCausalLM"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"architecture": "GPT2LMHeadModel"}, "LlamaForCausalLM"),  # the known ones are listed
        ({"architectures": []}, "unknown architecture"),
        ({"architectures": "BlueLMForCausalLM"}, "unknown architecture"),
        ({"architectures": [["BlueLMForCausalLM"]]}, "unknown architecture"),
        ({"architectures": None}, "unknown architecture"),
        ({"hidden": None}, "hidden_size is missing"),
        ({"hidden": "64"}, "hidden_size must be a whole number"),
        ({"hidden": 64.0}, "hidden_size must be a whole number"),
        ({"hidden": True}, "hidden_size must be a whole number"),
        ({"hidden": -64}, "hidden_size must be a whole number"),
        ({"hidden": 10**400}, "a huge number"),
        ({"layers": 0}, "num_hidden_layers"),
        ({"layers": 10**9}, "num_hidden_layers"),
        ({"heads": 3}, "64 is not divisible by num_attention_heads 3"),
        ({"kv_heads": 3}, "4 is not divisible by num_key_value_heads 3"),
        ({"heads": 64, "kv_heads": 1}, "odd"),
        ({"head_dim": 7}, "odd"),
        (
            {"architecture": "Qwen3ForCausalLM", "layer_norm": False},
            "head_dim is missing: transformers makes heads of 128",
        ),
        ({"vocab": 0}, "vocab_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"tied": "yes"}, "tie_word_embeddings must be true or false"),
        ({"layer_norm": 1}, "use_stable_embedding must be true or false"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": [2, "3"]}, "eos_token_id"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": 4}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "ntkmixed, linear, dynamic, llama3"),
        ({"rope_scaling": {"type": ["linear"], "factor": 4.0}}, "unknown rope type"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be a number at least 1"),
        ({"rope_scaling": {"type": "ntkmixed", "factor": 16}}, "power is missing"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "low_freq_factor is missing"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "low_freq_factor 4 must be below",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}, "head_dim": 2}, "at least 4 dimensions"),
    ],
)
def test_mistakes(more: dict[str, Any], said: str) -> None:
    assert said in refused(**more)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not readable as JSON"),
        (b"{", "not readable as JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b"[" * 100_000, "not readable as JSON"),
    ],
)
def test_files_that_are_no_json(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=said):
        ModelConfig.from_folder(tmp_path)


def test_no_folder_and_no_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint folder"):
        ModelConfig.from_folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no config\.json"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match="not a regular file"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"eos_token_id": [2, 5]},
        {"eos_token_id": None, "tied": True, "head_dim": 32},
        {"architecture": "LlamaForCausalLM", "rope_scaling": {"type": "llama3"} | LLAMA3},
        {"rope_scaling": {"type": "ntkmixed", "factor": 16, "power": 0.3}},
    ],
)
def test_to_dict_reads_back_equal(more: dict[str, Any]) -> None:
    config = read(**more)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = [*config_dict(), "head_dim", "rope_parameters", "model_type", "mlp_bias", "partial_rotary_factor"]


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=4))
def test_nonsense_is_read_or_refused_but_never_crashes(more: dict[str, Any]) -> None:
    try:
        config = ModelConfig.from_dict(config_dict() | more)
    except InputError:
        return
    assert ModelConfig.from_dict(config.to_dict()) == config


ROPE_KEYS = ["type", "rope_type", "factor", "power", "rope_theta", "low_freq_factor", "high_freq_factor"]


@settings(max_examples=60)
@given(
    st.sampled_from(["ntkmixed", "linear", "dynamic", "llama3"]),
    st.dictionaries(st.sampled_from(ROPE_KEYS), JSON, max_size=4),
)
def test_nonsense_in_rope_scaling(kind: str, more: dict[str, Any]) -> None:
    try:
        config = read(rope_scaling={"type": kind, "factor": 2, "power": 0.3} | more)
    except InputError:
        return
    assert ModelConfig.from_dict(config.to_dict()) == config
