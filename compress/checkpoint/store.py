"""The quantized checkpoint: a folder that every exporter reads.

quantized.json              recipe, calibration, notes, and where each weight lies; written last
block-00000.safetensors …   one block each
embedding.safetensors       the table, its LayerNorm folded in, one scale a row
head.safetensors            last norm and lm_head (which is left out where the table serves both)
config.json, tokenizer.*    of the model
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from bluelm.block import block_of
from bluelm.config import ModelConfig
from bluelm.errors import InputError, TargetError
from bluelm.system.files import member, sha256, write_text
from bluelm.system.reading import read_json
from bluelm.text.tokenizer import Tokenizer, copy_own, tokenizer_files
from compress.checkpoint.pieces import Header, LinearInfo, read_header, read_ordered, read_vector
from compress.checkpoint.quantized import OrderedWeight, QuantizedTensor
from compress.recipe import Recipe

FORMAT = "bluelm-quantized"
VERSION = 1
MANIFEST = "quantized.json"
BESIDE = ("recipe.yaml", "widths.json")  # of `--bits auto`, laid in by the command
EMBEDDING_FILE, HEAD_FILE = "embedding.safetensors", "head.safetensors"
EMBED, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm.weight", "lm_head"


def block_file(index: int) -> str:
    """Name of a block's file."""
    return f"block-{index:05d}.safetensors"


def piece_files(config: ModelConfig) -> list[str]:
    """Names of all pieces, in the order in which they are made."""
    return [EMBEDDING_FILE, *map(block_file, range(config.num_layers)), HEAD_FILE]


def read_block(path: Path, prefix: str) -> dict[str, Tensor]:
    """Tensors of a block's file, float32, linears dequantized, by their names below `prefix`."""
    header = read_header(path)
    tensors = {
        f"{name.removeprefix(prefix)}.weight": read_ordered(path, name, info).dequantize()
        for name, info in header.linears.items()
    }
    return tensors | {name.removeprefix(prefix): read_vector(path, name) for name in header.vectors}


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """The `Weights` of a quantized folder, dequantized as they are read; codes by `linear` and `embed`.

    Attributes:
        info: quantized.json as it is: `checkpoint` (digest), `recipe`, `calibration` (report), `layers` (notes
            by the weight's name), `files` (SHA-256 by name), `content` (SHA-256 of all else in it).
    """

    folder: Path
    config: ModelConfig
    recipe: Recipe
    info: Mapping[str, Any]
    headers: Mapping[str, Header]
    manifest: str  # SHA-256 of quantized.json as it was opened

    @staticmethod
    def open(folder: Path | str) -> QuantizedCheckpoint:
        """Read the manifest and the headers of all files, and check that nothing is missing.

        Raises:
            InputError: not a quantized checkpoint, an unfinished or a damaged one.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise InputError(
                f"not a quantized checkpoint, or an unfinished one: it has no {MANIFEST}",
                where=folder,
                fix="make one with `bluelm-export quantize`",
            )
        info = read_json(path)
        if info.get("format") != FORMAT or info.get("version") != VERSION:
            found = f"{info.get('format')} version {info.get('version')}"
            raise InputError(f"expected {FORMAT} version {VERSION}, found {found}", where=path, fix="quantize again")
        for key in ("recipe", "files", "layers"):
            if not isinstance(info.get(key), dict):
                raise InputError(f"the manifest has no {key}", where=path, fix="quantize again")
        recipe = Recipe.make(info["recipe"], where=path)
        config = ModelConfig.from_folder(folder)
        headers = {name: read_header(folder / name) for name in piece_files(config)}
        opened = QuantizedCheckpoint(folder, config, recipe, info, headers, sha256(path))
        opened._check()
        return opened

    def digest(self) -> str:
        """Hex SHA-256 of the manifest, which holds those of all files."""
        return self.manifest

    def verify(self) -> None:
        """Read every byte and compare with the manifest, and the manifest with what it says of itself.

        Raises:
            InputError: a file was changed.
        """
        files = self.info["files"].items()
        changed = [name for name, expected in files if sha256(member(self.folder, name)) != expected]
        changed += [MANIFEST] if self.info.get("content") != _content(self.info) else []
        if changed:
            problem = "the file was changed after it was made"
            raise InputError(problem, where=self.folder / changed[0], fix="quantize again")

    @property
    def linears(self) -> Mapping[str, LinearInfo]:
        """Width, groups and shape of every quantized weight by name, nothing read."""
        return {name: info for header in self.headers.values() for name, info in header.linears.items()}

    def linear(self, name: str) -> QuantizedTensor:
        """A quantized weight: `model.layers.0.self_attn.q_proj`, `lm_head`.

        Raises:
            InputError: there is none of that name.
            TargetError: its columns are not as the inputs are; who can put inputs in order asks `ordered`.
        """
        found = self.ordered(name)
        if found.order is not None:
            raise TargetError(
                "this runtime cannot put the inputs of a linear in another order, as act-order without static "
                "groups needs",
                where=name,
                fix="use --runtime onnx-cpu, or quantize the float checkpoint here: its groups stay in place",
            )
        return found.weight

    def ordered(self, name: str) -> OrderedWeight:
        """The same with the order of its columns.

        Raises:
            InputError: there is none of that name.
        """
        if name == HEAD and self.config.shares_table:
            name = EMBED
        file = self._places.get(name)
        if file is None:
            raise InputError(f"there is no quantized weight {name}", where=self.folder)
        return read_ordered(self.folder / file, name, self.headers[file].linears[name])

    def embed(self) -> QuantizedTensor:
        """The embedding table, its LayerNorm folded in, one scale a row."""
        return self.linear(EMBED)

    def vector(self, name: str) -> Tensor:
        """A norm's weight or a bias, float32: `model.norm` or `model.norm.weight`, `…self_attn.q_proj.bias`.

        Raises:
            InputError: there is none of that name.
        """
        if not name.endswith((".weight", ".bias")):
            name += ".weight"
        for file, header in self.headers.items():
            if name in header.vectors:
                return read_vector(self.folder / file, name)
        raise InputError(f"there is no vector {name}", where=self.folder)

    def block(self, index: int) -> dict[str, Tensor]:
        """Tensors of one block, float32, by their names below `model.layers.<index>.`, dequantized."""
        return read_block(self.folder / block_file(index), f"model.layers.{index}.")

    def embedding(self) -> Tensor:
        """float32 [rows, hidden], dequantized, the embedding LayerNorm folded in."""
        return self.embed().dequantize()

    def final_norm(self) -> Tensor:
        """float32 [hidden]."""
        return self.vector(FINAL_NORM)

    def head(self) -> Tensor:
        """float32 [rows, hidden], dequantized."""
        return self.ordered(HEAD).dequantize()

    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer, checked to fit the embedding's rows."""
        tokenizer = Tokenizer.from_folder(self.folder)
        tokenizer.check_rows(self.config.vocab_size)
        return tokenizer

    @cached_property
    def _places(self) -> dict[str, str]:
        return {name: file for file, header in self.headers.items() for name in header.linears}

    def _check(self) -> None:
        """Every tensor of the model is there, in its shape."""
        hidden, rows = self.config.hidden_size, self.config.vocab_size
        wanted: dict[str, tuple[int, ...]] = {f"{EMBED}.weight": (rows, hidden)}
        if not self.config.shares_table:
            wanted[f"{HEAD}.weight"] = (rows, hidden)
        for index in range(self.config.num_layers):
            linears = block_of(self.config).linears.items()
            wanted |= {f"model.layers.{index}.{name}.weight": (one.rows, one.columns) for name, one in linears}
        found = {f"{name}.weight": info.shape for name, info in self.linears.items()}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise InputError(
                    f"{name}: config.json asks for {wanted.get(name)}, the files hold {found.get(name)}",
                    where=self.folder,
                    fix="quantize again",
                )


def finish(
    folder: Path, config: ModelConfig, recipe: Recipe, tokenizer_folder: Path, described: Mapping[str, Any]
) -> None:
    """Complete a folder that holds all pieces: config.json, the tokenizer's files and, last, the manifest.

    Args:
        described: further entries of the manifest: `checkpoint`, `calibration`.
    """
    write_text(folder / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
    copy_own(tokenizer_folder, folder)
    pieces = piece_files(config)
    layers = {name: note for piece in pieces for name, note in read_header(folder / piece).notes.items()}
    others = ["config.json", *tokenizer_files(folder)]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "recipe": recipe.model_dump(),
        **described,
        "layers": layers,
        "files": {name: sha256(folder / name) for name in sorted([*pieces, *others])},
    }
    manifest["content"] = _content(json.loads(json.dumps(manifest)))  # as it will be read
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def _content(manifest: Mapping[str, Any]) -> str:
    """Hex SHA-256 of all that a manifest says, but for this digest itself."""
    rest = {key: value for key, value in manifest.items() if key != "content"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
