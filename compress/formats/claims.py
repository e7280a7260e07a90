"""What a quantized checkpoint's settings claim about each linear, to compare with its tensors.

Tensors are read by their shapes; the settings say which widths, groups, zero points and order of inputs they should
have. Where the two disagree, one of them belongs to another checkpoint, and the loaders in use differ in which they
believe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bluelm.errors import InputError
from bluelm.text.patterns import check_count, matcher
from compress.checkpoint.quantized import QuantizedTensor

FIX = "correct the settings, or fetch settings and tensors of the same checkpoint"


@dataclass(frozen=True)
class Claim:
    """What is said of a linear; None: nothing.

    Attributes:
        group_size: columns that share a scale; -1: all.
        symmetric: every zero point is the middle code.
        ordered: act-order: inputs belong to groups one by one (g_idx).
    """

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    ordered: bool | None = None

    def check(self, weight: QuantizedTensor) -> None:
        """InputError where the tensors have other widths or groups."""
        if self.bits is not None and self.bits != weight.bits:
            raise InputError(f"the settings say {self.bits} bits, its tensors have {weight.bits}", fix=FIX)
        size = weight.columns_per_group if self.group_size not in (None, -1) else weight.group_size
        if self.group_size is not None and self.group_size != size:
            raise InputError(f"the settings say groups of {self.group_size}, its tensors have {size}", fix=FIX)


NOTHING = Claim()


@dataclass(frozen=True)
class Claims:
    """What is said of all linears: `usual`, but for those that a rule fits; the first that does counts."""

    usual: Claim = NOTHING
    rules: tuple[tuple[Callable[[str], bool], Claim], ...] = ()

    def of(self, name: str) -> Claim:
        """Of a linear by its name in the files."""
        return next((claim for fits, claim in self.rules if fits(name)), self.usual)


def read_claims(settings: Mapping[str, Any] | None, where: object) -> Claims:
    """The claims of a quantization_config of any method.

    Raises:
        InputError: a value of another kind.
    """
    if settings is None:
        return Claims()
    if settings.get("quant_method") == "compressed-tensors":
        return Claims(NOTHING, tuple(_schemes(settings, where)))
    usual = _claim(settings, NOTHING, where)
    if settings.get("quant_method") == "awq":
        zeros = _flag(settings, "zero_point", where)
        usual = replace(usual, symmetric=True if zeros is False else None, ordered=None)
    return Claims(usual, tuple(_exceptions(settings, usual, where)))


def _claim(said: Mapping[str, Any], usual: Claim, where: object) -> Claim:
    bits = _number(said, "bits" if "bits" in said else "w_bit", where)
    size = _number(said, "group_size" if "group_size" in said else "q_group_size", where)
    symmetric, ordered = _flag(said, "sym", where), _flag(said, "desc_act", where)
    if ordered and said.get("static_groups") is True:
        ordered = None  # groups lie in place whatever the order of rounding was
    return Claim(
        usual.bits if bits is None else bits,
        usual.group_size if size is None else size,
        usual.symmetric if symmetric is None else symmetric,
        usual.ordered if ordered is None else ordered,
    )


def _exceptions(settings: Mapping[str, Any], usual: Claim, where: object) -> Iterator[Any]:
    """GPTQModel's `dynamic` (an expression, `+:` in front or nothing) and auto-round's `extra_config` (a name)."""
    for field in ("dynamic", "extra_config"):
        said = settings.get(field) or {}
        if not isinstance(said, dict):
            raise InputError(f"{field} must be an object", where=where, fix=FIX)
        check_count(len(said), where)
        for pattern, values in said.items():
            if isinstance(values, dict) and not pattern.startswith("-:"):
                yield matcher(pattern.removeprefix("+:"), where), _claim(values, usual, where)


def _schemes(settings: Mapping[str, Any], where: object) -> Iterator[Any]:
    """compressed-tensors' schemes by their targets: names first, then expressions, then classes of modules."""
    groups = settings.get("config_groups") or {}
    found: list[tuple[int, Callable[[str], bool], Claim]] = []
    for scheme in groups.values() if isinstance(groups, dict) else ():
        weights = scheme.get("weights") if isinstance(scheme, dict) else None
        if not isinstance(weights, dict):
            continue
        size = _number(weights, "group_size", where)
        if weights.get("strategy") == "channel" or (weights.get("strategy") is None and size is None):
            size = -1
        order = weights.get("actorder")
        ordered = True if order in (True, "group") else None  # "static" and "weight" leave groups in place
        claim = Claim(_number(weights, "num_bits", where), size, _flag(weights, "symmetric", where), ordered)
        targets = scheme.get("targets")
        check_count(len(found) + len(targets) if isinstance(targets, list) else 0, where)
        for target in targets if isinstance(targets, list) else ():
            if str(target).startswith("re:"):
                found.append((1, matcher(str(target).removeprefix("re:"), where), claim))
            elif target == "Linear":
                found.append((2, lambda _: True, claim))
            else:
                found.append((0, str(target).__eq__, claim))
    yield from ((fits, claim) for _, fits, claim in sorted(found, key=lambda one: one[0]))


def _number(said: Mapping[str, Any], field: str, where: object) -> int | None:
    value = said.get(field)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise InputError(f"{field} must be a whole number, found {value!r}", where=where, fix=FIX)


def _flag(said: Mapping[str, Any], field: str, where: object) -> bool | None:
    value = said.get(field)
    if value is None or isinstance(value, bool):
        return value
    raise InputError(f"{field} must be true or false, found {value!r}", where=where, fix=FIX)
