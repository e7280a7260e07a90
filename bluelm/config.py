"""What config.json says about a model, checked field by field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from bluelm.architectures import ARCHITECTURES, Architecture, find
from bluelm.errors import InputError
from bluelm.system.files import member
from bluelm.system.reading import read_json

GENERATION = "generation_config.json"
NTKMIXED_POWER = "ntkmixed_power"  # beside the factors of a `longrope` that is ntkmixed spelled out
RopeKind = Literal["ntkmixed", "linear", "dynamic", "llama3"]
MOST_TOKENS = 1000  # that end an answer, say
MAX_SIZE = 2**24  # no width, row count or context is larger; keeps nonsense from allocating
MAX_LAYERS = 4096
CHATGLM_ROWS = 65024  # of ChatGLM2 and ChatGLM3; GLM-4 has 151552


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for long contexts; the formulas are in `bluelm/rope.py`.

    `power` belongs to ntkmixed; the last three fields to llama3.
    """

    kind: RopeKind
    factor: float
    power: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder: a plain Llama with few switches (`bluelm/architectures.py`).

    Attributes:
        vocab_size: rows of the embedding; config.json's until a `Checkpoint` replaces it by the rows found.
        num_kv_heads: `num_heads` for MHA, 1 for MQA, a divisor of `num_heads` for GQA.
        embedding_layer_norm: BlueLM's `use_stable_embedding`, a LayerNorm behind the token embedding.
        qkv_bias: the linears of q, k and v have biases.
        rotary_dim: dimensions of a head that turn; the others get the frequency 0.
        eos_token_ids: every token that ends an answer; may be empty.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    embedding_layer_norm: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    qkv_bias: bool = False
    rotary_dim: int = 0  # 0: the whole head; never 0 once made

    def __post_init__(self) -> None:
        if not self.rotary_dim:
            object.__setattr__(self, "rotary_dim", self.head_dim)

    @property
    def shares_table(self) -> bool:
        """True when one table [vocab, hidden] is embedding and head: tied, and no LayerNorm folded in."""
        return self.tie_word_embeddings and not self.embedding_layer_norm

    @property
    def qk_norm(self) -> bool:
        """Each head of q and of k passes an RMSNorm of its own before it is turned."""
        return ARCHITECTURES[self.architecture].qk_norm

    @staticmethod
    def from_folder(folder: Path) -> ModelConfig:
        """Read `folder`/config.json, and from generation_config.json which tokens end an answer.

        Raises:
            InputError: no folder or config.json, unknown architecture or rope type, wrong or missing value.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError("no such checkpoint folder", where=folder, fix="give the folder that holds config.json")
        if not (folder / "config.json").exists():
            raise InputError(
                "the folder has no config.json",
                where=folder,
                fix="give the folder of a Hugging Face checkpoint",
            )
        path = member(folder, "config.json")
        found = ModelConfig.from_dict(read_json(path), path)
        if not (folder / GENERATION).exists():
            return found
        beside = member(folder, GENERATION)
        return _generating(found, _Fields(read_json(beside), beside))

    @staticmethod
    def from_dict(data: Mapping[str, Any], where: object = "config.json") -> ModelConfig:
        """Check a config.json that is already parsed; `where` is named in errors."""
        fields = _Fields(data, where)
        architecture, row = _architecture(fields)
        fields = _Fields(_ntkmixed(_renamed(data, row)), where)
        _refuse_unsupported(fields, row)
        hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
        head_dim = fields.optional_size("head_dim")
        if head_dim is None and hidden % heads:
            raise fields.error(f"hidden_size {hidden} is not divisible by num_attention_heads {heads}")
        kv_heads = fields.optional_size("num_key_value_heads") or heads
        if heads % kv_heads:
            raise fields.error(f"num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}")
        head_dim = head_dim or hidden // heads
        if head_dim % 2:
            raise fields.error(f"the head dimension {head_dim} is odd; rotary embeddings turn pairs")
        max_position = fields.size("max_position_embeddings", 2048)
        rotary_dim = _rotary_dim(fields, row, head_dim)
        ratio = fields.number("rope_ratio", 1.0) if row.rope_ratio else 1.0
        if ratio != 1 and _divides_positions(fields, ratio):
            theta, scaling, max_position = 10000.0, RopeScaling("linear", ratio), max(1, int(max_position / ratio))
        else:
            theta, scaling = _rope(fields, 10000.0 * ratio, max_position, rotary_dim)
        return ModelConfig(
            architecture=architecture,
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.size("intermediate_size"),
            num_layers=fields.size("num_hidden_layers", maximum=MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=max_position,
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            embedding_layer_norm=row.embedding_layer_norm and fields.flag("use_stable_embedding"),
            bos_token_id=fields.token("bos_token_id"),
            eos_token_ids=fields.tokens("eos_token_id"),
            pad_token_id=fields.token("pad_token_id"),
            qkv_bias=fields.flag("add_qkv_bias") if row.qkv_bias == "field" else row.qkv_bias,
            rotary_dim=rotary_dim,
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as a config.json that `from_dict` reads back to an equal ModelConfig."""
        return {
            "architectures": [self.architecture],
            "model_type": ARCHITECTURES[self.architecture].model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self._rope_dict(),
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_stable_embedding": self.embedding_layer_norm,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids) if len(self.eos_token_ids) != 1 else self.eos_token_ids[0],
            "pad_token_id": self.pad_token_id,
            **({"add_qkv_bias": True} if self.qkv_bias else {}),
        }

    def _rope_dict(self) -> dict[str, Any] | None:
        scaling = self.rope_scaling
        if scaling is None:
            return None
        values = {
            "type": scaling.kind,
            **{k: v for k, v in vars(scaling).items() if k != "kind" and v is not None},
        }
        if scaling.kind == "llama3":  # transformers insists on the newer spelling for it
            values["rope_type"] = values.pop("type")
        return values


def _generating(config: ModelConfig, fields: _Fields) -> ModelConfig:
    """End tokens as transformers' generate takes them: generation_config.json's where it names any."""
    ends, begin, pad = fields.tokens("eos_token_id"), fields.token("bos_token_id"), fields.token("pad_token_id")
    return replace(
        config,
        eos_token_ids=ends or config.eos_token_ids,
        bos_token_id=begin if config.bos_token_id is None else config.bos_token_id,
        pad_token_id=pad if config.pad_token_id is None else config.pad_token_id,
    )


class _Fields:
    """Typed access to one JSON object; every mistake is an InputError that names file and field."""

    def __init__(self, data: Mapping[str, Any], where: object) -> None:
        self.data, self.where = data, where

    def error(self, problem: str, fix: str | None = None) -> InputError:
        return InputError(problem, where=self.where, fix=fix)

    def integer(self, name: str, default: int | None, minimum: int, maximum: int) -> int:
        value = self.data.get(name)
        value = default if value is None else value
        if value is None:
            raise self.error(f"{name} is missing", fix="take config.json from the original checkpoint")
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.error(f"{name} must be a whole number from {minimum} to {maximum}, found {_short(value)}")
        return value

    def size(self, name: str, default: int | None = None, maximum: int = MAX_SIZE) -> int:
        return self.integer(name, default, 1, maximum)

    def optional_size(self, name: str) -> int | None:
        return None if self.data.get(name) is None else self.size(name)

    def number(self, name: str, default: float | None = None, minimum: float = 0.0) -> float:
        """A finite number above 0 and not below `minimum`."""
        value = self.data.get(name)
        value = default if value is None else value
        if value is None:
            raise self.error(f"{name} is missing")
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not minimum <= value <= 1e30 or value <= 0 or math.isnan(value):
            least = f"at least {minimum:g}" if minimum else "above 0"
            raise self.error(f"{name} must be a number {least}, found {_short(value)}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.data.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{name} must be true or false, found {_short(value)}")
        return bool(value)

    def token(self, name: str) -> int | None:
        """A token id; null, or -1 in old configurations, means that there is none."""
        value = self.data.get(name)
        return None if value is None or value == -1 else self.integer(name, None, 0, MAX_SIZE)

    def tokens(self, name: str) -> tuple[int, ...]:
        value = self.data.get(name)
        if not isinstance(value, list):
            one = self.token(name)
            return () if one is None else (one,)
        if len(value) > MOST_TOKENS:
            raise self.error(f"{name} must be at most {MOST_TOKENS} token ids, found {len(value)}")
        return tuple(_Fields({name: item}, self.where).integer(name, None, 0, MAX_SIZE) for item in value)


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."


def _architecture(fields: _Fields) -> tuple[str, Architecture]:
    found, kind = fields.data.get("architectures"), fields.data.get("model_type")
    if found is None:  # older configurations name the model type alone
        names = [name for name, row in ARCHITECTURES.items() if row.model_type == kind]
        if len(names) > 1:
            fix = f'set architectures to ["{names[0]}"] or ["{names[1]}"]'
            raise fields.error(f"model_type {_short(kind)} alone says not which of {', '.join(names)} it is", fix=fix)
        found = names or [kind]
    known = find(found[0]) if isinstance(found, list) and len(found) == 1 else None
    if not known:
        raise fields.error(
            f"unknown architecture {_short(found)}",
            fix=f"use a checkpoint of one of: {', '.join(ARCHITECTURES)}",
        )
    name, row = known
    if kind is not None and str(kind).lower() != row.model_type.lower():
        raise fields.error(
            f"architectures says {name}, model_type says {_short(kind)}: transformers goes by model_type, and computes "
            "another model",
            fix=f'set model_type to "{row.model_type}" if these are weights of {name}',
        )
    rows = fields.data.get(row.fields.get("vocab_size", "vocab_size"))
    if isinstance(rows, int) and rows in row.foreign_rows:
        raise fields.error(f"a vocabulary of {rows} is {row.foreign_rows[rows]}", fix="set architectures accordingly")
    return known


def _renamed(data: Mapping[str, Any], row: Architecture) -> dict[str, Any]:
    """The fields under our names; where both names are there, ours counts (a config.json that we wrote)."""
    return {name: data[theirs] for name, theirs in row.fields.items() if theirs in data} | dict(data)


def _ntkmixed(data: dict[str, Any]) -> dict[str, Any]:
    """A rope that was written for other tools, as `longrope` with a factor for each frequency, under its own name."""
    rope = data.get("rope_scaling") or data.get("rope_parameters")
    if not isinstance(rope, dict) or NTKMIXED_POWER not in rope:
        return data
    own = {"type": "ntkmixed", "factor": rope.get("factor"), "power": rope[NTKMIXED_POWER]}
    length = rope.get("original_max_position_embeddings")
    return data | {"rope_scaling": own, "rope_parameters": None, "max_position_embeddings": length}


def _rotary_dim(fields: _Fields, row: Architecture, head_dim: int) -> int:
    turning = int(head_dim * row.rotary_factor)
    if turning < 2 or turning % 2 or (head_dim - turning) % 2:
        raise fields.error(f"{turning} of {head_dim} dimensions of a head cannot turn in pairs")
    return turning


def _refuse_unsupported(fields: _Fields, row: Architecture) -> None:
    for name, why in row.must.items():
        if fields.data.get(name) is None:
            raise fields.error(f"{name} is missing: {why}")
    for name, value in row.needs.items():
        if fields.data.get(name, value) != value:
            raise fields.error(
                f"{name} is {_short(fields.data[name])}; a {row.model_type} model needs {value} here",
                fix="use a checkpoint of a version that the table of architectures knows",
            )
    activation = fields.data.get("hidden_act")
    if activation not in (None, "silu", "swish"):
        raise fields.error(f"hidden_act {_short(activation)} is not supported", fix="BlueLM and Llama use silu")
    for name in ("attention_bias", "mlp_bias"):
        if fields.flag(name):
            raise fields.error(f"{name} is true; linears with biases are not supported")


def _divides_positions(fields: _Fields, ratio: float) -> bool:
    """What ChatGLM's `rope_ratio` means: ChatGLM2-32K divides positions by it, ChatGLM3-32K and GLM-4 multiply theta.

    The code of each model says so, config.json only by the model's name; GLM-4 has a larger vocabulary. Where
    positions are divided, `seq_length` is the long context already.

    Raises:
        InputError: the name is not there.
    """
    named = f"{fields.data.get('_name_or_path')} {fields.data.get('auto_map')}".lower()
    second, later = "chatglm2" in named, "chatglm3" in named or "glm-4" in named
    if not second and not later and fields.size("vocab_size") <= CHATGLM_ROWS:
        raise fields.error(
            f"rope_ratio {ratio:g} divides positions by {ratio:g} in ChatGLM2-32K, and makes the rope's base "
            f"{10000 * ratio:g} in ChatGLM3-32K; this file does not say which model it is",
            fix='set "_name_or_path" to "THUDM/chatglm2-6b-32k" or to "THUDM/chatglm3-6b-32k"',
        )
    return second and not later


def _rope(fields: _Fields, base: float, max_position: int, head_dim: int) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from `rope_theta` and `rope_scaling`, or from transformers 5's `rope_parameters`.

    Where both are there transformers takes `rope_scaling` and nothing of the other. `base`: theta where none is given.
    """
    name = "rope_scaling" if fields.data.get("rope_scaling") else "rope_parameters"
    raw = fields.data.get(name)
    if raw is not None and not isinstance(raw, dict):
        raise fields.error(f"{name} must be an object or null, found {_short(raw)}")
    rope = _Fields(raw or {}, f"{fields.where}, {name}")
    for owner in (rope, fields):
        if owner.data.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise owner.error("partial_rotary_factor is not supported", fix="rotary must turn whole heads")
    theta = (rope if rope.data.get("rope_theta") is not None else fields).number("rope_theta", base)
    kind = rope.data.get("rope_type", rope.data.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in get_args(RopeKind):
        known = ", ".join(("default", *get_args(RopeKind)))
        raise rope.error(f"unknown rope type {_short(kind)}", fix=f"known types: {known}")
    if kind == "dynamic" and head_dim < 4:
        raise rope.error("dynamic rope needs heads of at least 4 dimensions")
    factor = rope.number("factor", minimum=1.0)
    if kind == "ntkmixed":
        return theta, RopeScaling(kind, factor, power=rope.number("power"))
    if kind != "llama3":
        return theta, RopeScaling(kind, factor)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise rope.error(f"low_freq_factor {low:g} must be below high_freq_factor {high:g}")
    original = rope.size("original_max_position_embeddings", max_position)
    return theta, RopeScaling(kind, factor, None, low, high, original)
