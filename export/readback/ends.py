"""End tokens that files of some formats name: how they differ from the checkpoint's, or None."""

from __future__ import annotations

from collections.abc import Set

from bluelm.system.reading import read_json
from bluelm.text.tokenizer import Tokenizer
from export.artifacts.artifact import Artifact


def genai(artifact: Artifact, wanted: Set[int]) -> str | None:
    """genai_config.json names all of them."""
    told = read_json(artifact.path("genai"))["model"]["eos_token_id"]
    same = {*(told if isinstance(told, list) else [told])} == wanted
    return None if same else f"genai_config.json says {told}, the checkpoint {sorted(wanted)}"


def xnnpack(artifact: Artifact, wanted: Set[int]) -> str | None:
    """A method of the program gives all of them."""
    from export.executorch.reader import constant, read_program

    told = constant(read_program(artifact.path("model")), "get_eos_ids")
    same = told is not None and set(told) == wanted
    return None if same else f"model.pte says {told}, the checkpoint {sorted(wanted)}"


def gguf(artifact: Artifact, wanted: Set[int]) -> str | None:
    """The file names all of them, and no others but the tokenizer's own."""
    from export.gguf.reader import GgufFile

    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    fields = GgufFile(artifact.path("model")).fields
    told = {int(fields[key].contents()) for key in keys if key in fields}
    own = Tokenizer.from_folder(artifact.folder).eos
    same = wanted <= told <= wanted | {own}
    return None if same else f"model.gguf says {sorted(told)}, the checkpoint {sorted(wanted)}"


def mlx(artifact: Artifact, wanted: Set[int]) -> str | None:
    """generation_config.json, and config.json before it, name all of them."""
    for name in ("config.json", "generation_config.json"):
        told = read_json(artifact.folder / "model" / name).get("eos_token_id")
        if {*(told if isinstance(told, list) else [told])} - {None} != wanted:
            return f"{name} of MLX's folder says {told}, the checkpoint {sorted(wanted)}"
    return None


def litert_lm(artifact: Artifact, wanted: Set[int]) -> str | None:
    """The file's metadata names all of them, and no others but the tokenizer's own."""
    from export.litert_lm.reader import LitertLmFile

    told = [list(token.token_ids.ids) for token in LitertLmFile(artifact.path("model")).metadata().stop_tokens]
    own = Tokenizer.from_folder(artifact.folder).eos
    found = {token for ids in told for token in ids}
    same = all(len(ids) == 1 for ids in told) and wanted <= found <= wanted | {own}
    return None if same else f"model.litertlm says {told}, the checkpoint {sorted(wanted)}"


def coreai(artifact: Artifact, wanted: Set[int]) -> str | None:
    """By the rules of Apple's program, all of them and no others but the tokenizer's own."""
    from export.coreai.stops import stops

    told = stops(artifact.folder / "model" / "tokenizer")
    own = Tokenizer.from_folder(artifact.folder).eos
    same = wanted <= told <= wanted | {own}
    return None if same else f"Core AI's folder says {sorted(told)}, the checkpoint {sorted(wanted)}"
