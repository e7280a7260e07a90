"""What a budget may limit: its keys with their types, and which figure each is about."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
)

from eval.measurement import How
from export import formats

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Bytes = Annotated[
    ByteSize, WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}], "examples": ["4 GB"]})
]
_HOWS = {"enum": ["measured", "emulated", "estimated"]}
Kinds = Annotated[
    tuple[How, ...],
    BeforeValidator(lambda v: (v,) if isinstance(v, str) else v),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [_HOWS, {"type": "array", "items": _HOWS, "minItems": 1}]}),
]
EVERY: tuple[How, ...] = ("measured", "emulated", "estimated")


def _known(name: str) -> str:
    if name not in formats.names():
        raise ValueError(f"unknown format {name!r}; known: {', '.join(formats.names())}")
    return name


Known = Annotated[str, AfterValidator(_known), WithJsonSchema({"enum": list(formats.names()), "type": "string"})]
"""The name of a format's record."""


class Bound(BaseModel):
    """A limit that says which kinds of figure may pass; without `accept`, those of the budget."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    accept: Kinds | None = None

    @property
    def number(self) -> float:
        return float(next(value for key, value in self if key != "accept"))


class AtMost(Bound):
    """The largest value that passes."""

    at_most: Positive


class AtMostBytes(Bound):
    """The most bytes that pass."""

    at_most: Bytes


class AtLeast(Bound):
    """The smallest value that passes."""

    at_least: Positive


class AtLeastShare(Bound):
    """The smallest share that passes."""

    at_least: Share


class SpeedLimit(BaseModel):
    """So many tokens/s on the phone's chip or on this host; `accept` says which kinds of figure count."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    at_least: Positive
    where: Literal["soc", "host"] = "soc"
    accept: Kinds = ("measured",)


def _form(value: Any) -> str:
    return MAPPING if isinstance(value, dict | BaseModel) else NUMBER


MAPPING, NUMBER = "mapping", "number"  # the two forms of a limit: with and without `accept`
_FORM = Discriminator(_form)
_MAPPING, _NUMBER = Tag(MAPPING), Tag(NUMBER)
Most = Annotated[Annotated[Positive, _NUMBER] | Annotated[AtMost, _MAPPING], _FORM]
MostBytes = Annotated[Annotated[Bytes, _NUMBER] | Annotated[AtMostBytes, _MAPPING], _FORM]
Least = Annotated[Annotated[Positive, _NUMBER] | Annotated[AtLeast, _MAPPING], _FORM]
LeastShare = Annotated[Annotated[Share, _NUMBER] | Annotated[AtLeastShare, _MAPPING], _FORM]


class DomainLimits(BaseModel):
    """Limits on the text of one domain."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    max_perplexity_ratio: Most | None = None
    max_mean_kl: Most | None = None
    min_top1_agreement: LeastShare | None = None
    min_top5_agreement: LeastShare | None = None


class Budget(DomainLimits):
    """Limits; a limit that is not given is not checked. Accuracy limits hold for every artifact judged."""

    confidence: Annotated[float, Field(gt=0.5, lt=1, description="of each bound, on one side")] = 0.95
    accept: Annotated[Kinds, Field(description="kinds of figure that may pass where a limit does not say")] = EVERY
    max_p99_kl: Most | None = None
    max_max_kl: Most | None = None
    min_first_divergence: Least | None = None
    domains: Annotated[dict[str, DomainLimits], Field(description="limits by domain of the text")] = {}
    max_prefill_decode_kl: Most | None = None
    max_runtime_kl: Annotated[
        Most | None, Field(description="to the artifact's own weights; default: what its format may cost")
    ] = None
    min_decode_tokens_per_s: SpeedLimit | None = None
    max_artifact_bytes: MostBytes | None = None
    max_memory_bytes: MostBytes | None = None
    min_npu_node_share: LeastShare | None = None
    min_npu_mac_share: LeastShare | None = None
    min_prefill_coverage: Annotated[LeastShare | None, Field(description="of the context's positions")] = None
    min_decode_coverage: Annotated[LeastShare | None, Field(description="of the context's positions")] = None
    min_task_recovery: Annotated[
        LeastShare | None, Field(description="score of the artifact / score of the float model, in every task")
    ] = None
    two_sided: Annotated[bool, Field(description="better than float, or identical to it, fails")] = True
    structure: Annotated[bool, Field(description="tokenizer, template, weights, versions and size must be right")] = (
        True
    )
    require_runner: Annotated[
        bool,
        Field(
            description="what ships must have been judged in the program that users open it with; with CI=true the "
            "default is true for runtimes that have one"
        ),
    ] = False
    accept_not_known: Annotated[
        tuple[Known, ...] | None,
        Field(description="formats that may pass though their files do not tell all that they hold; default: any"),
    ] = None


class Limit(NamedTuple):
    """What a key of the budget limits: a figure, of one subject (None: of every artifact judged)."""

    figure: str
    unit: str = ""
    subject: str | None = None
    drawn: bool = True  # from a sample of text, so without an error nothing is known


LIMITS: dict[str, Limit] = {
    "max_perplexity_ratio": Limit("perplexity_ratio"),
    "max_mean_kl": Limit("mean_kl", "nats/token"),
    "max_p99_kl": Limit("p99_kl", "nats/token"),
    "max_max_kl": Limit("max_kl", "nats/token"),
    "min_top1_agreement": Limit("top1_agreement"),
    "min_top5_agreement": Limit("top5_agreement"),
    "min_first_divergence": Limit("first_divergence", "tokens"),
    "max_prefill_decode_kl": Limit("prefill_decode_kl", "nats/token", drawn=False),
    "max_runtime_kl": Limit("runtime_kl", "nats/token", drawn=False),
    "min_prefill_coverage": Limit("prefill_coverage", drawn=False),
    "min_decode_coverage": Limit("decode_coverage", drawn=False),
    "max_artifact_bytes": Limit("artifact_bytes", "bytes", "files", drawn=False),
    "max_memory_bytes": Limit("memory_bytes", "bytes", "soc", drawn=False),
    "min_npu_node_share": Limit("npu_node_share", "", "npu", drawn=False),
    "min_npu_mac_share": Limit("npu_mac_share", "", "npu", drawn=False),
}
# figures that no budget sets: (limit, whether every artifact must have it measured)
STRUCTURE: dict[str, tuple[float, bool]] = {
    "tokenizer_mismatches": (0, True),
    "chat_template_mismatches": (0, True),
    "end_token_faults": (0, True),
    "versions_missing": (0, True),
    "files_changed": (0, False),
    "weight_mismatches": (0, False),  # where the quantized checkpoint is not at hand it is not known
    "bits_per_weight_deviation": (0.02, False),
    "block_error_excess": (1, False),
    "runtime_kl_excess": (1, False),
    "position_kl_excess": (1, False),
    "reference_to_guess": (1, False),  # of codes that came with the checkpoint: eval/accuracy/sanity.py
    "compiled_mismatches": (0, False),
    "runner_refusals": (0, False),  # of the program that users open it with: eval/runner/held.py
    "runner_token_mismatches": (0, False),
    "runner_chat_mismatches": (0, False),
    "runner_end_faults": (0, False),
    "runner_kl_excess": (1, False),
    "twin_block_excess": (1, False),
}
BETTER, SAME = "not_better_than_float", "not_identical_to_float"
RUNNER, IN_RUNNER = "require_runner", "runner_refusals"  # the key, and the figure that says that one judged
NOT_KNOWN = "not_known"  # @format: items that an artifact must hold and its files do not tell


def number_of(limit: float | Bound) -> float:
    """A limit's number, in whichever form it was given."""
    return bound(limit, ())[0]


def bound(limit: float | Bound, accept: tuple[How, ...]) -> tuple[float, tuple[How, ...]]:
    """A limit's number, and the kinds of figure that may pass it; `accept`: the budget's own."""
    if isinstance(limit, Bound):
        return limit.number, limit.accept or accept
    return float(limit), accept
