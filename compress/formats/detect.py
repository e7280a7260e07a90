"""Which layout a checkpoint folder has: by its quantization_config, or by its tensors where it has none."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bluelm.errors import InputError
from bluelm.system.files import member
from bluelm.system.reading import read_json
from compress.formats.awq import awq_layout
from compress.formats.compressed import compressed_layout
from compress.formats.gptq import Gptq, gptq_layout
from compress.formats.layout import Layout

TOLD_TWICE = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "zero_point", "version")
SETTINGS_FILES = ("quantize_config.json", "quant_config.json")  # AutoGPTQ's and AutoAWQ's, beside config.json


def autoround_layout(settings: Mapping[str, Any], where: object) -> Layout:
    """auto-round's own method names the layout of another one as its packing format.

    Raises:
        InputError: a packing format that cannot be read.
    """
    packing = str(settings.get("packing_format", "auto_round:auto_gptq")).lower().removeprefix("auto_round:")
    kinds: dict[str, Layout] = {
        "auto_gptq": Gptq("auto-round (auto_gptq)", 1, borrows=False),
        "gptqmodel": Gptq("auto-round (gptqmodel)", 2),
    }
    if packing in ("auto_awq", "awq"):
        return awq_layout({"bits": settings.get("bits", 4)}, where)
    if packing not in kinds:
        fix = "export it from auto-round with the format auto_gptq or auto_awq"
        raise InputError(f"auto-round's packing format {packing!r} cannot be read", where=where, fix=fix)
    return kinds[packing]


METHODS: Mapping[str, Callable[[Mapping[str, Any], object], Layout]] = MappingProxyType(
    {
        "gptq": gptq_layout,
        "awq": awq_layout,
        "auto-round": autoround_layout,
        "compressed-tensors": compressed_layout,
    }
)
MARKERS = (".qweight", ".weight_packed")


def find_layout(folder: Path, tensors: Iterable[str]) -> Layout | None:
    """The layout of a folder's quantized linears; None for a float checkpoint.

    A folder without settings whose tensors are GPTQ's is read as GPTQ-for-LLaMa wrote it.

    Raises:
        InputError: an unknown method, or a layout of a known one that cannot be read.
    """
    settings, where = read_settings(folder)
    if settings is None:
        if any(name.endswith(".qweight") for name in tensors):
            return Gptq("GPTQ-for-LLaMa")
        return None
    return METHODS[_method(settings, where)](settings, where)


def read_settings(folder: Path) -> tuple[dict[str, Any] | None, Path]:
    """What says how the folder is quantized, and the file it stands in; None where nothing does."""
    config = member(folder, "config.json")
    settings = read_json(config).get("quantization_config")
    if settings is not None:
        if not isinstance(settings, dict):
            raise InputError("quantization_config must be an object", where=config, fix="fetch config.json again")
        _check_beside(folder, settings, config)
        return settings, config
    for name in SETTINGS_FILES:
        if (folder / name).exists():
            path = member(folder, name)
            found = read_json(path)
            return {"quant_method": "awq" if name == "quant_config.json" else "gptq", **found}, path
    return None, config


def _check_beside(folder: Path, settings: Mapping[str, Any], config: Path) -> None:
    """InputError where a settings file beside config.json says otherwise: loaders differ in which they read."""
    for name in SETTINGS_FILES:
        if not (folder / name).exists():
            continue
        other = read_json(member(folder, name))
        for field in TOLD_TWICE:
            one, two = settings.get(field), other.get(field)
            if one is not None and two is not None and one != two:
                problem = f"{field} is {one!r} in the quantization_config of config.json, {two!r} in {name}"
                fix = "correct one of them, or remove the file that is of another checkpoint"
                raise InputError(problem, where=config, fix=fix)


def _method(settings: Mapping[str, Any], where: Path) -> str:
    method = settings.get("quant_method")
    known = f"known methods: {', '.join(METHODS)}"
    if not isinstance(method, str):
        raise InputError("the checkpoint is quantized, but quant_method is missing", where=where, fix=known)
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=1)
        fix = (f"did you mean '{near[0]}'? " if near else "give the float checkpoint it was made from; ") + known
        raise InputError(f"quant_method {method!r} cannot be read", where=where, fix=fix)
    return method
