"""The interface of a method of choosing codes: its options, the statistics that it needs from calibration, what it
folds into neighbours, how it chooses the codes of linears that read the same inputs, and what that takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from bluelm.config import ModelConfig
from bluelm.model import DecoderBlock
from calibration.walk import Streams
from compress.checkpoint.quantized import QuantizedTensor
from compress.widths.width import Widths

ROWS = 2048  # rows of a weight that a solver is given at a time: bounds the memory of wide layers


class Options(BaseModel):
    """What a recipe may set of one method; a method without any takes this class as it is.

    Attributes:
        section: the recipe's key that they stand under.
        at_top: they may stand at the recipe's top level as well, and are written there whatever its method is: where
            they were before methods had sections, so that digests and the names of runs stay.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    section: ClassVar[str] = ""
    at_top: ClassVar[bool] = False


@dataclass(frozen=True)
class Statistics:
    """What calibration has to tell.

    Attributes:
        inputs: the Hessian of what each stage's linears read, all before them quantized: calibration text is read.
        float_block: each block before any of it is quantized, which `Method.fold` may change: costs one more pass.
        float_stream: the float model's stream beside the quantized one's, and so `Moments.cross`: one more pass.
    """

    inputs: bool = False
    float_block: bool = False
    float_stream: bool = False


@dataclass(frozen=True)
class FloatBlock:
    """A block before any of it is quantized, and the quantized model's stream in front of it.

    Attributes:
        tensors: float32, by local name.
        block: the same as a module.
        widths: of each linear, by local name.
        search: the recipe searches the spans of groups (`grid: mse`).
    """

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    block: DecoderBlock
    streams: Streams
    widths: Mapping[str, Widths]
    search: bool


@dataclass(frozen=True)
class Folded:
    """A block with scales folded in: the same function, up to rounding in float32.

    Attributes:
        tensors: by local name.
        notes: what was found, by the stage's name: plain JSON values.
        unclipped: linears whose groups are to span their extremes.
    """

    tensors: dict[str, Tensor]
    notes: dict[str, Any]
    unclipped: frozenset[str]


class Solver(Protocol):
    """Chooses codes for linears that read the same inputs, some rows at a time."""

    @property
    def note(self) -> Mapping[str, Any]:
        """What is told of each of these linears: plain JSON values."""
        ...

    def target(self, weight: Tensor, cross: Tensor | None) -> Tensor:
        """What the codes are to stand for, float32 [rows, in].

        Args:
            weight: float32 [rows, in].
            cross: these rows of `Moments.cross`, where there are any.
        """
        ...

    def codes(self, target: Tensor, widths: Widths, search: bool) -> QuantizedTensor:
        """Codes and scales of a target, float32 [rows, in].

        Args:
            search: shrink the spans of groups to what loses least; else they span their extremes.
        """
        ...


@dataclass(frozen=True)
class SolvingCost:
    """What choosing the codes of one linear takes, beside its weight, its Hessian and the search of spans.

    Attributes:
        operations: float32 operations of matrix products, over all rows.
        factorization_operations: those of what is done once for all linears of a stage, on one thread.
        loop_seconds: of loops over columns, on one core.
        system_bytes: of what `ROWS` rows are solved with.
    """

    operations: float = 0.0
    factorization_operations: float = 0.0
    loop_seconds: float = 0.0
    system_bytes: float = 0.0


OptionsT = TypeVar("OptionsT", bound=Options)


class Method(ABC, Generic[OptionsT]):
    """One way to choose codes. Its methods are pure: all that they know comes in as arguments.

    Attributes:
        options: what a recipe may set of it.
        defaults: values of the recipe's own keys where this method's are others, e.g. `{"grid": "minmax"}`.
    """

    options: type[OptionsT]
    defaults: Mapping[str, Any] = MappingProxyType({})

    @property
    def reads_text(self) -> bool:
        """With its default options."""
        return self.statistics(self.options()).inputs

    @abstractmethod
    def statistics(self, options: OptionsT) -> Statistics:
        """What calibration has to tell it."""

    def fold(self, block: FloatBlock, options: OptionsT) -> Folded:
        """The block with scales folded into norms and neighbours; asked for by `Statistics.float_block`."""
        return Folded(dict(block.tensors), {}, frozenset())

    @abstractmethod
    def solver(self, hessian: Tensor | None, options: OptionsT) -> Solver:
        """What chooses the codes of one stage.

        Args:
            hessian: float32 [in, in], mean of x xᵀ of what its linears read; None without `Statistics.inputs`.

        Raises:
            InputError: the statistics cannot be used.
        """

    @abstractmethod
    def cost(self, out: int, columns: int, widths: Widths, options: OptionsT) -> SolvingCost:
        """What choosing the codes of a linear [out, columns] takes."""
