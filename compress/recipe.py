"""What to do to the weights: a recipe, from a preset by name, a YAML file or options."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from bluelm.errors import InputError
from bluelm.system.yamlfiles import read_yaml
from compress import methods
from compress.methods.protocol import Method, Options, Statistics
from compress.widths.width import Widths

PRESETS = Path(__file__).parent / "presets"

Bits = Literal[3, 4, 8]
TableBits = Literal[4, 8]
GROUP_SIZES = (32, 64, 128, -1)
HEAD = "lm_head"

OptionsT = TypeVar("OptionsT", bound=Options)


class LayerWidth(BaseModel):
    """Bits and group size of one linear, where they are not the recipe's."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    bits: TableBits
    group_size: Literal[32, 64, 128, -1]


class Recipe(BaseModel):
    """How a checkpoint is quantized: all that the codes depend on, but for checkpoint and text.

    Attributes:
        method: one of `compress.methods`, for the linears of the blocks and the head; given: the codes that a
            quantized checkpoint came with.
        bits: width of the blocks' linears; 3 is for comparing quantizers, no target takes it. In a file or on the
            command line it may be `auto`: 4 or 8 bits and the groups of each linear by what it loses.
        auto: the widths are to be chosen yet (`bits: auto`), see `compress/widths/allocate.py`.
        size: bytes that the quantized checkpoint may take, for `auto`.
        max_kl: KL that it may lose, as estimated, for `auto`. With neither: the size that `bits`, `group_size` and
            `head_bits` would come to.
        layers: widths of single linears by name, as `auto` writes them.
        group_size: columns that share a scale; -1 for one scale a row.
        symmetric: zero points all in the middle.
        grid: how scales are chosen. minmax: the group's extremes. mse: the span of least squared error, in the
            weights or in the layer's output, as the method weighs it. rtn is plain minmax unless told otherwise.
        head_bits, head_group_size: lm_head. One scale a row by default: NPUs have no blocks of 8-bit weights.
        embed_bits: the embedding table, one scale a row, symmetric.
        options: of the methods, by the section that they stand under; see the `Options` of each.
        rotate: turn the stream and the values of each head by Hadamard rotations folded into the weights: spreads
            outliers, costs nothing at run time. Embedding and head that are one table part.
        balance: bring loud and quiet channels of what down_proj and o_proj read nearer each other, by powers of two
            in the scales of the linears before them (`compress/methods/balance.py`); costs nothing at run time. Methods
            that read no text, or choose such scales by themselves, leave it.
        refine: steps of learned rounding a block behind a method that reads text, 0 for none; 200 are plenty.
        activations: how those of the calibration set are kept between blocks: float32, or bfloat16 in half the room.
        samples, length, seed: calibration windows, tokens in each, and the seed that picks them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    method: str = "gptq"
    bits: Bits = 4
    group_size: int = 32
    symmetric: bool = True
    grid: Literal["minmax", "mse"] = "mse"
    head_bits: TableBits = 8
    head_group_size: int = -1
    embed_bits: TableBits = 8
    options: dict[str, Options] = Field(default_factory=dict)
    rotate: bool = False
    balance: bool = False
    refine: int = Field(default=0, ge=0, le=10**6)
    activations: Literal["float32", "bfloat16"] = "float32"
    samples: int = Field(default=128, ge=1, le=10**9)
    length: int = Field(default=512, ge=2, le=2**24)
    seed: int = Field(default=0, ge=0, lt=2**63)
    auto: bool = False
    size: int | None = Field(default=None, gt=0)
    max_kl: float | None = Field(default=None, gt=0)
    layers: dict[str, LayerWidth] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _as_the_method_says(cls, values: Any) -> Any:
        """Its own defaults, and the options of all methods by section."""
        if not isinstance(values, dict):
            return values
        values = {key: value for key, value in values.items() if key != "options"}
        name = values.get("method", cls.model_fields["method"].default)
        known = isinstance(name, str) and name in methods.all_names()
        chosen = methods.method(name) if known else None
        options: dict[str, Options] = {}
        for kind in methods.option_types():
            given = _taken(values, kind)
            if given or kind.at_top or (chosen is not None and chosen.options is kind):
                options[kind.section] = kind.model_validate(given)
        return {**(chosen.defaults if chosen is not None else {}), **values, "options": options}

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        try:
            methods.entry(value)
        except InputError as error:
            raise ValueError(f"{error.problem}; {error.fix}") from None
        return value

    @field_validator("group_size", "head_group_size")
    @classmethod
    def _known_group_size(cls, value: int, info: ValidationInfo) -> int:
        if value in GROUP_SIZES or (value > 0 and _any_groups(info)):
            return value
        raise ValueError(f"group sizes are {', '.join(map(str, GROUP_SIZES))}")

    @model_validator(mode="before")
    @classmethod
    def _auto_is_a_width_to_be_chosen(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("bits") == "auto":
            return {"auto": True, **{key: value for key, value in values.items() if key != "bits"}}
        return values

    @field_validator("size", mode="before")
    @classmethod
    def _size_in_words(cls, value: Any) -> Any:
        return parse_size(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _limits_are_for_auto(self) -> Self:
        if not self.auto and (self.size is not None or self.max_kl is not None):
            raise ValueError("a size or a KL to keep within is for `bits: auto`")
        if self.size is not None and self.max_kl is not None:
            raise ValueError("give a size or a KL to keep within, not both")
        return self

    @model_validator(mode="after")
    def _refining_needs_text(self) -> Self:
        if self.refine and not self.reads_text:
            able = [name for name in methods.names() if methods.method(name).reads_text]
            raise ValueError(f"{self.method} reads no text to be refined on; choose {', '.join(able)}")
        return self

    @classmethod
    def make(cls, values: dict[str, Any], where: object = None) -> Self:
        """A recipe from plain values.

        Raises:
            InputError: an unknown key (with the nearest known one) or a value out of range.
        """
        _check_keys(values, cls.keys(), "a recipe", where)
        for kind in methods.option_types():
            if isinstance(values.get(kind.section), dict):
                _check_keys(values[kind.section], kind.model_fields, f"{kind.section} in a recipe", where)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            if not key:  # a rule over several keys
                raise InputError(f"recipe: {first['msg'].removeprefix('Value error, ')}", where=where) from None
            message = f"recipe: {key} = {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"
            raise InputError(message, where=where, fix=f"give {key} a value that it can take") from None

    @classmethod
    def load(cls, name_or_path: str | Path, **overrides: Any) -> Self:
        """A preset by name (`w4-g32`) or a YAML file, with options laid over it.

        Raises:
            InputError: no such preset or file, not YAML, an unknown key or a bad value.
        """
        path = PRESETS / f"{name_or_path}.yaml"
        if not path.is_file():
            path = Path(name_or_path)
        if not path.is_file():
            raise InputError(
                f"no recipe '{name_or_path}'",
                fix=f"presets: {', '.join(presets())}; or give the path of a YAML file",
            )
        values = read_yaml(path, "the recipe") or {}
        if not isinstance(values, dict):
            raise InputError("a recipe is a table of keys and values", where=path, fix="write lines like `bits: 4`")
        recipe = cls.make({**values, **overrides}, where=path)
        if recipe.given:
            raise InputError(
                f"recipe: method {recipe.method} stands for codes that a checkpoint came with, and cannot be asked for",
                where=path,
                fix=f"give one of {', '.join(methods.names())}",
            )
        return recipe

    @classmethod
    def keys(cls) -> list[str]:
        """What may stand in a file: the recipe's own keys, and the sections of methods."""
        kinds = methods.option_types()
        at_top = [key for kind in kinds if kind.at_top for key in kind.model_fields]
        own = [[key] if key != "options" else at_top for key in cls.model_fields]
        return [key for keys in own for key in keys] + [kind.section for kind in kinds]

    @model_serializer(mode="wrap")
    def _as_in_a_file(self, inner: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """Options at the top or in their sections, where `options` stands among the fields."""
        values: dict[str, Any] = {}
        for key, value in inner(self).items():
            if key != "options":
                values[key] = value
                continue
            for section, options in self.options.items():
                mode = "json" if info.mode_is_json() else "python"
                told = options.model_dump(mode=mode, exclude_defaults=info.exclude_defaults)
                values |= told if options.at_top else {section: told} if told else {}
        return values

    def widths(self, name: str) -> Widths:
        """Of a weight by its full name: a linear of a block, or `lm_head`."""
        if name in self.layers:
            chosen = self.layers[name]
            return Widths(chosen.bits, chosen.group_size, self.symmetric)
        if name == HEAD:
            return Widths(self.head_bits, self.head_group_size, self.symmetric)
        return Widths(self.bits, self.group_size, self.symmetric)

    def own_widths(self) -> Self:
        """The recipe without `auto`: its own widths everywhere."""
        return self.model_copy(update={"auto": False, "size": None, "max_kl": None})

    def uniform(self) -> Iterator[tuple[str, Self]]:
        """This recipe once for every width in `layers`, everywhere in the blocks: what a rule for the blocks' widths
        is to be asked about; with the name of a linear that has it."""
        seen: set[tuple[int, int]] = set()
        for name, width in self.layers.items():
            if name != HEAD and (width.bits, width.group_size) not in seen:
                seen.add((width.bits, width.group_size))
                changes = {"bits": width.bits, "group_size": width.group_size, "layers": {}}
                yield name, self.model_copy(update=changes)

    def to_yaml(self) -> str:
        """A file that `load` reads back to the same recipe; defaults are left out."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        layers = values.pop("layers", {})
        text = yaml.safe_dump({"method": self.method, **values}, sort_keys=False)
        if layers:
            lines = [f"  {name}: {{bits: {w['bits']}, group_size: {w['group_size']}}}\n" for name, w in layers.items()]
            text += "layers:\n" + "".join(lines)
        return text

    @property
    def given(self) -> bool:
        """True where it describes codes that a checkpoint came with: none are chosen."""
        return not methods.entry(self.method).chooses

    @property
    def quantizer(self) -> Method[Any]:
        """What chooses the codes."""
        return methods.method(self.method)

    @property
    def quantizer_options(self) -> Any:
        """The recipe's options of `quantizer`, an instance of its `options`."""
        return self.options_of(self.quantizer.options)

    def options_of(self, kind: type[OptionsT]) -> OptionsT:
        """The options of one kind; the defaults where the recipe has none of it."""
        found = self.options.get(kind.section)
        return found if isinstance(found, kind) else kind()

    @property
    def statistics(self) -> Statistics:
        """What calibration has to tell the method."""
        return self.quantizer.statistics(self.quantizer_options)

    @property
    def reads_text(self) -> bool:
        """True when the codes depend on calibration text."""
        return self.statistics.inputs or self.auto

    @property
    def follows_float(self) -> bool:
        """True when the float model's stream is walked beside the quantized one's."""
        return self.reads_text and (self.refine > 0 or self.statistics.float_stream)

    def digest(self) -> str:
        """Hex SHA-256 of every value."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def _check_keys(values: Mapping[str, Any], known: Collection[str], what: str, where: object) -> None:
    """InputError for a key that is not known, with the nearest that is."""
    for key in values:
        if key not in known:
            near, listed = difflib.get_close_matches(str(key), known, n=1), "known keys: " + ", ".join(known)
            fix = f"did you mean '{near[0]}'? {listed}" if near else listed
            raise InputError(f"{what} has no key '{key}'", where=where, fix=fix)


def _any_groups(info: ValidationInfo) -> bool:
    """Whether the codes are there already, in groups of whatever size."""
    return "method" in info.data and not methods.entry(info.data["method"]).chooses


def _taken(values: dict[str, Any], kind: type[Options]) -> dict[str, Any]:
    """What a recipe says of one method's options, taken out of `values`."""
    section = values.pop(kind.section, {})
    if not isinstance(section, dict):
        raise ValueError(f"{kind.section} is a table of keys and values, not {section!r}")
    top = {key: values.pop(key) for key in kind.model_fields if kind.at_top and key in values}
    for key in top.keys() & section.keys():
        raise ValueError(f"{key} stands at the top and under {kind.section}; give it once")
    return {**top, **section}


UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes: `4.2GB`, `700 MiB`, `123456`.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([KMG]?I?B?)\s*", text.upper())
    unit = found.group(2) if found else None
    if found is None or unit not in UNITS:
        raise ValueError("a size is a number with GB, MB, GiB or MiB, e.g. 4.2GB")
    return int(float(found.group(1)) * UNITS[unit])


def presets() -> list[str]:
    """Names of the recipes that ship."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))
