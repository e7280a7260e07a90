"""The decoder block as data: its steps in order, and what follows from them.

    input -> attention_norm -> q, k, v -> mixed -> attended; input + attended = attention_residual
    attention_residual -> mlp_norm -> gate, up -> gated -> down; attention_residual + down = output

Calibration, methods, costs, exporters and readers of artifacts go by this. `bluelm/model.py` is written apart, and
tested against transformers: a mistake that is made here shows there. A family whose block differs is another case in
`block_of` and in `bluelm/model.py`; docs/extending/architecture.md says how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property

from bluelm.config import ModelConfig

STREAM = "input"  # the value that a block begins with
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Norm:
    """RMSNorm over the last `size` numbers of a value: the whole of it, or each head by itself.

    `weight` here and below names a tensor of the block without its kind: `self_attn.q_proj`.
    """

    makes: str
    reads: str
    weight: str
    size: int

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.reads,)


@dataclass(frozen=True)
class Linear:
    """W x, W [rows, columns], or W x + b."""

    makes: str
    reads: str
    weight: str
    rows: int
    columns: int
    biased: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.reads,)


@dataclass(frozen=True)
class Attend:
    """Queries and keys, split into heads, are turned by rope; then softmax(scale q kᵀ + mask) v, causal.

    heads: of the queries; `kv_heads` of keys and values each serve heads / kv_heads of them, side by side.
    size: of a head.
    """

    makes: str
    queries: str
    keys: str
    values: str
    heads: int
    kv_heads: int
    size: int

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.queries, self.keys, self.values)

    @property
    def scale(self) -> float:
        """What queries are multiplied by."""
        return self.size**-0.5

    @property
    def channels(self) -> tuple[int, ...]:
        """The channel of the values that each channel of the outcome is a mean of."""
        group = self.heads // self.kv_heads
        return tuple(head // group * self.size + place for head in range(self.heads) for place in range(self.size))


@dataclass(frozen=True)
class Silu:
    """x * sigmoid(x)."""

    makes: str
    reads: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.reads,)


@dataclass(frozen=True)
class Product:
    """left * right, number by number; `right` is a linear's outcome."""

    makes: str
    left: str
    right: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.left, self.right)


@dataclass(frozen=True)
class Add:
    """The stream plus what a branch gives: the stream from then on."""

    makes: str
    stream: str
    branch: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.stream, self.branch)


Step = Norm | Linear | Attend | Silu | Product | Add


@dataclass(frozen=True)
class Stage:
    """Linears that read the same value, by their weights' names; `name` is the value's."""

    name: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Move:
    """Where a scale on the columns of a stage may go, as its inverse: to the rows of what makes its channels.

    Attributes:
        before: the norm or linear that makes them, by its weight's name.
        channels: row of `before` that each column of the stage's linears reads; the heads of a group read the same.
    """

    stage: Stage
    before: str
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Branch:
    """Steps from the stream to the sum that adds their outcome to it.

    Attributes:
        steps: all but the sum; the last is `writer`, the one linear whose outcome is added.
        stages: in the order in which they are read; the last is the writer's.
    """

    steps: tuple[Step, ...]
    writer: Linear
    sum: Add
    stages: tuple[Stage, ...]

    @property
    def mixes(self) -> bool:
        """Whether tokens see each other in it: then computing it twice is expensive."""
        return any(isinstance(step, Attend) for step in self.steps)

    @property
    def begins(self) -> str:
        """The stream that it reads."""
        return self.sum.stream


@dataclass(frozen=True)
class Block:
    """Steps in the order in which they are computed; every value is made once, and before it is read.

    Raises:
        ValueError: a value is made twice or read too early, or the branches are not as `Branch` says.
    """

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        known = {STREAM}
        for step in self.steps:
            if step.makes in known or not known.issuperset(step.inputs):
                raise ValueError(f"{step.makes} is made twice, or of values that are not there yet")
            known.add(step.makes)
        if not self.branches or self.branches[-1].sum is not self.steps[-1]:
            raise ValueError("the last step of a block is the sum behind its last branch")

    @cached_property
    def makers(self) -> Mapping[str, Step]:
        """The step that makes each value."""
        return {step.makes: step for step in self.steps}

    @cached_property
    def linears(self) -> Mapping[str, Linear]:
        """By their weights' names."""
        return {step.weight: step for step in self.steps if isinstance(step, Linear)}

    @cached_property
    def norms(self) -> Mapping[str, Norm]:
        """By their weights' names."""
        return {step.weight: step for step in self.steps if isinstance(step, Norm)}

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor by its full name in the block; weights of linears are [out, in]."""
        found: dict[str, Shape] = {f"{name}.bias": (one.rows,) for name, one in self.linears.items() if one.biased}
        for step in self.steps:
            if isinstance(step, Norm):
                found[f"{step.weight}.weight"] = (step.size,)
            elif isinstance(step, Linear):
                found[f"{step.weight}.weight"] = (step.rows, step.columns)
        return found

    @property
    def weights(self) -> int:
        """Numbers in all linears, biases apart."""
        return sum(linear.rows * linear.columns for linear in self.linears.values())

    @property
    def vector_size(self) -> int:
        """Numbers in all norms and biases."""
        return sum(shape[0] for shape in self.shapes.values() if len(shape) == 1)

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        """In order."""
        found: list[Branch] = []
        steps: list[Step] = []
        for step in self.steps:
            if isinstance(step, Add):
                found.append(_branch(tuple(steps), step, found[-1].sum.makes if found else STREAM))
                steps = []
            else:
                steps.append(step)
        return tuple(found)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Of all branches, in order."""
        return tuple(stage for branch in self.branches for stage in branch.stages)

    @property
    def stream(self) -> tuple[str, ...]:
        """Every state of the stream, the first and the last among them."""
        return (STREAM, *(branch.sum.makes for branch in self.branches))

    @property
    def attention(self) -> Attend:
        """The one step in which tokens see each other."""
        (step,) = (step for step in self.steps if isinstance(step, Attend))
        return step

    @cached_property
    def moves(self) -> tuple[Move, ...]:
        """Of every stage whose channels something can take a scale for."""
        found = ((stage, self._before(stage)) for stage in self.stages)
        return tuple(Move(stage, *before) for stage, before in found if before is not None)

    @cached_property
    def turned(self) -> Mapping[str, int]:
        """Heads below one another in each tensor whose rows rope turns: of queries and keys, and of their norms."""
        found: dict[str, int] = {}
        for value in (self.attention.queries, self.attention.keys):
            step = self.makers[value]
            if isinstance(step, Norm):
                found[step.weight] = 1  # one for all heads
                step = self.makers[step.reads]
            assert isinstance(step, Linear)
            found[step.weight] = self.heads[step.makes]
        return found

    @cached_property
    def heads(self) -> Mapping[str, int]:
        """How many heads lie side by side in each value that is heads: those of attention, also before their norms."""
        attend = self.attention
        found: dict[str, int] = {}
        for value, count in zip(attend.inputs, (attend.heads, attend.kv_heads, attend.kv_heads), strict=True):
            found[value] = count
            step = self.makers[value]
            if isinstance(step, Norm):
                found[step.reads] = count
        return found

    def factors(self, weight: str) -> tuple[str, ...]:
        """Linears whose rows may be put in the order that the columns of `weight` are put in: those of a product."""
        made = self.makers[self.linears[weight].reads]
        if not isinstance(made, Product) or len(self.readers(made.makes)) != 1:
            return ()
        values = (self.makers[value] for value in made.inputs)
        linears = [self.makers[step.reads] if isinstance(step, Silu) else step for step in values]
        return tuple(step.weight for step in linears if isinstance(step, Linear))

    def readers(self, value: str) -> list[Step]:
        """Steps that read it."""
        return [step for step in self.steps if value in step.inputs]

    def _before(self, stage: Stage) -> tuple[str, tuple[int, ...]] | None:
        """`Move.before` and `Move.channels`."""
        made = self.makers[stage.name]
        width = self.linears[stage.linears[0]].columns
        if not all(isinstance(step, Linear) for step in self.readers(stage.name)):
            return None
        if isinstance(made, Norm):
            return (made.weight, tuple(range(width))) if made.size == width else None
        if not isinstance(made, Attend | Product):
            return None
        value, channels = (
            (made.values, made.channels) if isinstance(made, Attend) else (made.right, tuple(range(width)))
        )
        step = self.makers[value]
        alone = self.readers(value) == [made] and value not in made.inputs[:-1]
        return (step.weight, channels) if isinstance(step, Linear) and alone else None


def _branch(steps: tuple[Step, ...], total: Add, begins: str) -> Branch:
    """Checked to be one."""
    own = {begins, *(step.makes for step in steps)}
    writer, read = steps[-1] if steps else None, [value for step in steps for value in step.inputs]
    if not isinstance(writer, Linear) or writer.makes != total.branch or total.stream != begins:
        raise ValueError(f"{total.makes} must be the stream {begins} plus the outcome of the linear before it")
    if not own.issuperset(read) or read.count(writer.reads) != 1:
        raise ValueError(f"{writer.weight} alone must read its input, and no step the values of another branch")
    linears = [step for step in steps if isinstance(step, Linear)]
    values = dict.fromkeys(linear.reads for linear in linears)
    stages = (Stage(value, tuple(one.weight for one in linears if one.reads == value)) for value in values)
    return Branch(steps, writer, total, tuple(stages))


@cache
def block_of(config: ModelConfig) -> Block:
    """The block of a model; all of its blocks are alike."""
    return Block(tuple(steps(config)))


def steps(config: ModelConfig) -> list[Step]:
    """What differs between families stands here, as it does in `bluelm/model.py`."""
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    wide, narrow, biased = config.num_heads * size, config.num_kv_heads * size, config.qkv_bias
    queries, keys = ("q_norm", "k_norm") if config.qk_norm else ("q", "k")
    head_norms = (Norm("q_norm", "q", "self_attn.q_norm", size), Norm("k_norm", "k", "self_attn.k_norm", size))
    return [
        Norm("attention_norm", STREAM, "input_layernorm", hidden),
        Linear("q", "attention_norm", "self_attn.q_proj", wide, hidden, biased),
        Linear("k", "attention_norm", "self_attn.k_proj", narrow, hidden, biased),
        Linear("v", "attention_norm", "self_attn.v_proj", narrow, hidden, biased),
        *(head_norms if config.qk_norm else ()),
        Attend("mixed", queries, keys, "v", config.num_heads, config.num_kv_heads, size),
        Linear("attended", "mixed", "self_attn.o_proj", hidden, wide),
        Add("attention_residual", STREAM, "attended"),
        Norm("mlp_norm", "attention_residual", "post_attention_layernorm", hidden),
        Linear("gate", "mlp_norm", "mlp.gate_proj", inner, hidden),
        Silu("gate_silu", "gate"),
        Linear("up", "mlp_norm", "mlp.up_proj", inner, hidden),
        Product("gated", "gate_silu", "up"),
        Linear("down", "gated", "mlp.down_proj", hidden, inner),
        Add("output", "attention_residual", "down"),
    ]
