"""Refuses options that would have no effect in the requested run, before any work.

An option that is silently ignored leaves its user with a wrong idea of the result. Each command has a table of when its
options change nothing; an option in no table always has an effect, or is refused where its value is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import typer

from bluelm.errors import InputError

if TYPE_CHECKING:
    from compress.recipe import Recipe

Facts = TypeVar("Facts")


@dataclass(frozen=True)
class Idle(Generic[Facts]):
    """Options, when they change nothing, why, and what to do about it.

    Attributes:
        refused: else it is a warning: for options about text, which scripts give to whatever they run.
    """

    options: tuple[str, ...]
    when: Callable[[Facts], bool]
    why: str
    fix: str
    refused: bool = True


@dataclass(frozen=True)
class RunFacts:
    """What decides which options of a run change anything.

    Attributes:
        place: where the artifact runs here: cpu, htp ..., or device for nowhere.
        compiled: an NPU artifact is judged beside the CPU's.
        ranges: activation ranges are taken from calibration text.
        given: the codes are the checkpoint's own.
        phone: one is named.
        runs_code: a task among those asked for runs programs.
    """

    recipe: Recipe
    place: str
    ranges: bool
    given: bool
    phone: bool
    runs_code: bool

    @property
    def reads_text(self) -> bool:
        return self.ranges or (self.recipe.reads_text and not self.given)

    @property
    def compiled(self) -> bool:
        return self.place not in ("cpu", "device")


@dataclass(frozen=True)
class QuantizeFacts:
    """The same of `quantize`: `foreign` where the folder is for other tools."""

    recipe: Recipe
    given: bool
    foreign: bool


@dataclass(frozen=True)
class EvaluateFacts:
    """The same of `evaluate`: a float model is compared with; `subjects` are npu, cpu."""

    reference: bool
    subjects: frozenset[str]


_TEXT = ("--calibration", "--samples", "--length", "--seed")
_JUDGING = ("--eval", "--eval-tokens", "--budget", "--history", "--tasks", "--device", "--bundle")
_WIDTHS = ("--group-size", "--head-bits")
_WIDTHS_WHY = "--bits auto chooses widths and groups itself, within --size or --max-kl"
_NO_TEXT = "no calibration text is read: the codes are rounded to nearest, or the checkpoint's own"

RUN: tuple[Idle[RunFacts], ...] = (
    Idle(_JUDGING, lambda f: f.place == "device", "nothing here can run this artifact: it is made, and not judged",
         "omit it"),
    Idle(("--npu-tokens",), lambda f: not f.compiled, "no NPU artifact is made for this target and judged here",
         "omit it; --eval-tokens bounds what the CPU artifact is judged on"),
    Idle(("--allow-other-soc", "--runner-config"), lambda f: not f.phone, "no phone is measured",
         "add --device SERIAL (bluelm-export devices), or omit it"),
    Idle(("--run-code",), lambda f: not f.runs_code, "no task that was named runs code", "add --tasks humaneval"),
    Idle(_WIDTHS, lambda f: _sized(f.recipe), _WIDTHS_WHY, "omit it, or give --bits 4 or 8"),
    Idle(("--quantize-on",), lambda f: f.given, "the codes are the checkpoint's own", "omit it"),
    Idle(("--activations",), lambda f: f.given or not f.recipe.reads_text, _NO_TEXT, "omit it", refused=False),
    Idle(_TEXT, lambda f: not f.reads_text, _NO_TEXT, "omit it", refused=False),
)  # fmt: skip
QUANTIZE: tuple[Idle[QuantizeFacts], ...] = (
    Idle(("--head-bits", "--embed-bits"), lambda f: f.foreign,
         "with --format the embedding and the head are float16", "omit it or --format"),
    Idle(_WIDTHS, lambda f: _sized(f.recipe), _WIDTHS_WHY, "omit it, or give --bits 4 or 8"),
    Idle(("--device", "--max-memory"), lambda f: f.given, "the codes are the checkpoint's own", "omit it"),
    Idle((*_TEXT, "--activations"), lambda f: f.given or not f.recipe.reads_text, _NO_TEXT, "omit it",
         refused=False),
)  # fmt: skip


EVALUATE: tuple[Idle[EvaluateFacts], ...] = (
    Idle(("--eval", "--eval-tokens", "--npu-tokens"), lambda f: not f.reference,
         "without a float model nothing is judged on text", "add --reference CHECKPOINT, or omit it"),
    Idle(("--npu-tokens",), lambda f: "npu" not in f.subjects, "nothing here runs on an NPU's simulator",
         "omit it; --eval-tokens bounds what is judged on a CPU"),
    Idle(("--eval-tokens",), lambda f: "cpu" not in f.subjects, "nothing here runs on a CPU",
         "omit it; --npu-tokens bounds what is judged on an NPU's simulator"),
)  # fmt: skip


def _sized(recipe: Recipe) -> bool:
    return recipe.auto and (recipe.size is not None or recipe.max_kl is not None)


def given_options(context: typer.Context) -> frozenset[str]:
    """Options that stand on the command line of a command, by their first names."""
    sources = {p.opts[0]: context.get_parameter_source(p.name or "") for p in context.command.params}
    return frozenset(
        option for option, source in sources.items() if source is not None and source.name == "COMMANDLINE"
    )


def refuse_idle(
    given: Collection[str], table: Sequence[Idle[Facts]], facts: Facts, *, shared: bool = False
) -> tuple[str, ...]:
    """Warnings of options that change nothing.

    Args:
        given: names of the options that were given.
        shared: the options are those of many runs (`sweep`), so that none is refused for this one.

    Raises:
        InputError: the table refuses one of them.
    """
    warnings: list[str] = []
    for row in table:
        named = [option for option in row.options if option in given]
        if named and row.when(facts):
            problem = f"{', '.join(named)} would change nothing: {row.why}"
            if row.refused and not shared:
                raise InputError(problem, fix=row.fix)
            warnings.append(problem)
    return tuple(warnings)


def refuse_if(idle: bool, context: typer.Context, option: str, why: str, fix: str = "omit it") -> None:
    """The same for a command with one or two such options.

    Raises:
        InputError: it was given, and changes nothing.
    """
    if idle and option in given_options(context):
        raise InputError(f"{option} would change nothing: {why}", fix=fix)
