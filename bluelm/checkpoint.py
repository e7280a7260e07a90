"""A checkpoint folder opened lazily: names and shapes are checked, tensors read only when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from bluelm.architectures import ARCHITECTURES
from bluelm.block import block_of
from bluelm.config import GENERATION, ModelConfig
from bluelm.errors import ChangedInputError, InputError
from bluelm.fold import fold_layer_norm, normalise_rows
from bluelm.naming import file_name, half_split, source
from bluelm.system.files import member, sha256
from bluelm.system.reading import read_json
from bluelm.tensorfiles import TensorInfo, list_tensors, load_stored, load_tensor
from bluelm.text.tokenizer import Tokenizer, tokenizer_files

EMBED, EMBED_NORM, FINAL_NORM, HEAD = (
    "model.embed_tokens.weight",
    "model.embed_layer_norm",
    "model.norm.weight",
    "lm_head.weight",
)
ROWS = 4096  # of two tables, compared at a time


@dataclass(frozen=True)
class Checkpoint:
    """The `Weights` of a Hugging Face folder.

    Attributes:
        config: config.json's, with vocab_size replaced by the rows of the embedding.
        tensors: every tensor of the model by its name in the file.
    """

    folder: Path
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]

    @staticmethod
    def open(folder: Path | str) -> Checkpoint:
        """Read config.json and the headers of the tensor files, and check every name and shape.

        Raises:
            InputError: anything missing, left over, wrongly shaped, damaged or outside the folder.
        """
        folder = Path(folder)
        config = ModelConfig.from_folder(folder)
        if read_json(folder / "config.json").get("quantization_config") is not None:
            raise InputError(
                "the checkpoint is quantized already",
                where=folder / "config.json",
                fix="give the float checkpoint it was made from",
            )
        tensors = model_tensors(list_tensors(folder))
        config = with_rows(config, tensors, folder)
        config = untied(config, tensors)
        check_tensors(config, file_shapes(config), tensors, folder)
        return Checkpoint(folder, config, tensors)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What config.json says of these weights that they are not, read as transformers reads it."""
        if self.config.tie_word_embeddings or not ModelConfig.from_folder(self.folder).tie_word_embeddings:
            return ()
        return (
            "config.json says tie_word_embeddings true, but the files hold a head that differs from the embedding: "
            "both are read, as transformers does. Set tie_word_embeddings to false in config.json to say so",
        )

    def tensor(self, name: str) -> Tensor:
        """One tensor as float32, a copy of its own, read through a memory map.

        Raises:
            InputError: there is no such tensor, or it has NaN or infinite values.
        """
        if name not in self.tensors:
            raise InputError(f"there is no tensor {name}", where=self.folder)
        return load_tensor(name, self.tensors[name])

    def block(self, index: int) -> dict[str, Tensor]:
        """Tensors of one block, float32, by their names below `model.layers.<index>.`."""
        return {name: self._read(f"model.layers.{index}.{name}") for name in block_of(self.config).shapes}

    def _read(self, name: str) -> Tensor:
        """A tensor of the decoder by its name there: cut from the file's, rotary pairs half a head apart."""
        found = source(self.config, name, self._shapes)
        whole = self.tensor(found.name)
        part = whole if found.rows == found.of else whole[found.start : found.start + found.rows].clone()
        return half_split(self.config, name, part)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return model_shapes(self.config)

    def embedding(self) -> Tensor:
        """float32 [rows, hidden], the embedding LayerNorm folded in."""
        table = self._read(EMBED)
        if not self.config.embedding_layer_norm:
            return table
        weight, bias = self.tensor(f"{EMBED_NORM}.weight"), self.tensor(f"{EMBED_NORM}.bias")
        return fold_layer_norm(table, weight, bias, self.config.rms_norm_eps)

    def final_norm(self) -> Tensor:
        """float32 [hidden]."""
        return self._read(FINAL_NORM)

    def head(self) -> Tensor:
        """float32 [rows, hidden]; where tied the embedding as stored, before its LayerNorm.

        A head that the model normalises (Baichuan 2) comes normalised.
        """
        if not self.config.tie_word_embeddings:
            head = self._read(HEAD)
            return normalise_rows(head) if ARCHITECTURES[self.config.architecture].normalised_head else head
        return self._read(EMBED)

    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer, checked to fit the embedding's rows."""
        tokenizer = Tokenizer.from_folder(self.folder)
        tokenizer.check_rows(self.config.vocab_size)
        return tokenizer

    def digest(self) -> str:
        """Hex SHA-256 over names and contents of config.json, the tokenizer's and the tensor files."""
        return self._stamped[0]

    @cached_property
    def _stamped(self) -> tuple[str, dict[Path, tuple[int, ...]]]:
        """The digest, and the stamps that the files had before they were read for it."""
        before = self._stamps()
        return self._hash(), before

    def _hash(self) -> str:
        return digest(self.folder, self.tensors, ("config.json", GENERATION, *tokenizer_files(self.folder)))

    def _stamps(self) -> dict[Path, tuple[int, ...]]:
        return {path: stamp(path) for path in sorted({info.file for info in self.tensors.values()})}

    def check_unchanged(self) -> None:
        """See that the tensor files are still those whose digest was taken.

        Raises:
            ChangedInputError: one was replaced or written into since.
        """
        if "_stamped" not in self.__dict__:
            return
        expected, before = self._stamped
        changed = [path for path, now in self._stamps().items() if now != before[path]]
        if changed and self._hash() != expected:
            raise ChangedInputError(
                "the checkpoint changed while it was read",
                where=changed[0],
                fix="start again when nothing writes to the folder any longer, or quantize a copy of it",
            )


def stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written into; empty if it is gone."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def digest(folder: Path, tensors: Mapping[str, TensorInfo], others: Sequence[str]) -> str:
    """Hex SHA-256 over names and contents of the tensor files and of those of `others` that are there."""
    files = {name: member(folder, name) for name in others if (folder / name).exists()}
    files |= {info.file.name: info.file for info in tensors.values()}
    lines = (f"{sha256(files[name])}  {name}\n" for name in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def model_tensors(found: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors that say something: not the rotary frequencies, which follow from config.json."""
    frequencies = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
    return {name: info for name, info in found.items() if not name.endswith(frequencies)}


def with_rows(config: ModelConfig, tensors: Mapping[str, TensorInfo], folder: Path) -> ModelConfig:
    """`config` with vocab_size replaced by the rows of the embedding.

    Raises:
        InputError: there is none; or a token that begins or ends a text lies beyond it.
    """
    table = file_name(config, EMBED)
    if table not in tensors:
        raise InputError(f"{table} is missing", where=folder, fix="the folder must hold the whole language model")
    rows = _rows(table, tensors[table])
    named = {"bos_token_id": (config.bos_token_id,), "eos_token_id": config.eos_token_ids}
    for field, tokens in named.items():
        beyond = [token for token in tokens if token is not None and token >= rows]
        if beyond:
            places = "config.json or generation_config.json"
            fix = f"correct {field} there, or use the configuration that belongs to these weights"
            problem = f"{field} is {beyond[0]}, but the embedding has {rows} rows: the model never writes that token"
            raise InputError(problem, where=f"{folder}, {places}", fix=fix)
    pad = config.pad_token_id  # one beyond the rows pads nothing: some Llamas name their number of rows
    return replace(config, vocab_size=rows, pad_token_id=None if pad is not None and pad >= rows else pad)


def untied(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> ModelConfig:
    """`config` without its tie where the files hold a head of other values than the embedding.

    transformers does the same and warns; where both are there and equal (torch.save writes both) they are tied.
    """
    embed, head = tensors[file_name(config, EMBED)], tensors.get(file_name(config, HEAD))
    if not config.tie_word_embeddings or head is None or head.shape != embed.shape:
        return config  # a head of another shape is refused with the shapes
    tables = (load_stored(file_name(config, name), tensors[file_name(config, name)]) for name in (EMBED, HEAD))
    parts = zip(*(table.split(ROWS) for table in tables), strict=True)
    same = all(torch.equal(one.float(), other.float()) for one, other in parts)
    return config if same else replace(config, tie_word_embeddings=False)


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the decoder, by its name in a Llama checkpoint."""
    rows, hidden = config.vocab_size, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBED: (rows, hidden)}
    if config.embedding_layer_norm:
        shapes |= {f"{EMBED_NORM}.weight": (hidden,), f"{EMBED_NORM}.bias": (hidden,)}
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in block_of(config).shapes.items()}
    shapes[FINAL_NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (rows, hidden)
    return shapes


def file_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a checkpoint of this config holds, by its name in the file."""
    shapes = model_shapes(config)
    found = {name: source(config, name, shapes) for name in shapes}
    return {place.name: (place.of, *shapes[name][1:]) for name, place in found.items()}


def _rows(name: str, embedding: TensorInfo) -> int:
    if len(embedding.shape) != 2 or not embedding.shape[0]:
        raise InputError(f"{name} has shape {list(embedding.shape)}, not [rows, hidden]", where=embedding.file)
    return embedding.shape[0]


def check_tensors(
    config: ModelConfig, shapes: dict[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo], folder: Path
) -> None:
    """Make sure that the files hold the tensors of `shapes`, and no others.

    Raises:
        InputError: one is missing, left over, or of another shape.
    """
    embed, head = file_name(config, EMBED), file_name(config, HEAD)
    missing = [name for name in shapes if name not in tensors]
    if missing:
        tied = "; set tie_word_embeddings to true if the head is the embedding" if missing == [head] else ""
        more = f" (and {len(missing) - 1} more tensors)" if len(missing) > 1 else ""
        raise InputError(f"{missing[0]} is missing{more}", where=folder, fix=f"complete the checkpoint{tied}")
    if config.tie_word_embeddings:
        shapes = shapes | {head: shapes[embed]}  # may be there all the same; then it must be the embedding
    extra = sorted(name for name in tensors if name not in shapes)
    if extra:
        raise InputError(
            f"{extra[0]} does not belong to this model" + (f" (and {len(extra) - 1} more)" if extra[1:] else ""),
            where=tensors[extra[0]].file,
            fix=_extra_fix(extra[0]),
        )
    for name, info in tensors.items():
        if info.shape != shapes[name]:
            raise InputError(
                f"{name} has shape {list(info.shape)}, config.json makes it {list(shapes[name])}",
                where=info.file,
                fix="use the config.json that belongs to these weights",
            )


def _extra_fix(name: str) -> str:
    if name.startswith(EMBED_NORM):
        return "set use_stable_embedding to true in config.json (BlueLMForCausalLM)"
    if name.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx"):
        return "this is a quantized checkpoint; give the float one it was made from"
    return "use the config.json that belongs to these weights, or remove the tensor"
