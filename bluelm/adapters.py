"""LoRA adapters (folders that PEFT saved) merged into a checkpoint as its tensors are read.

    W' = W + sum over adapters of  weight * scale * B @ A       (Hu et al., 2021, arXiv 2106.09685)
    scale = alpha / r, or alpha / sqrt(r) with rank stabilisation (Kalajdzievski, 2023, arXiv 2312.03732)

A QLoRA adapter is the same: it was trained over a 4-bit copy of W, and is merged into W itself. The sum is
computed in float64 and rounded to float32 once.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from bluelm.files import member, read_json, sha256
from bluelm.safety import check_folder
from bluelm.tensorfiles import TensorInfo, load_tensor, tensors_of

CONFIG, FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
ROWS = 1024  # rows of W merged at a time: bounds the float64 copies
_UPDATE = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?$")
_WHOLE = re.compile(r"(?P<module>.+?)(\.base_layer|\.modules_to_save(\.default)?)?\.weight$")
# What changes more than W + scale * B @ A: field of adapter_config.json -> what it is.
_REFUSED = {
    "use_dora": "DoRA also rescales the rows of W",
    "lora_bias": "it trained a bias",
    "layer_replication": "it repeats layers",
    "target_parameters": "it changes parameters that are no linear's weight",
    "trainable_token_indices": "it trained single rows of the embedding",
    "use_qalora": "QA-LoRA pools its inputs",
    "arrow_config": "it routes between adapters",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class Update:
    """W += weight * scale * B @ A, of one tensor; A [r, in] and B [out, r] by their names in the adapter's file.

    An embedding's are stored the other way round: A [r, rows], B [hidden, r], and (B @ A).T is added.
    """

    a: str
    b: str
    scale: float
    embedding: bool


@dataclass(frozen=True)
class Adapter:
    """A PEFT folder that fits a checkpoint.

    Attributes:
        weight: how much of it is added, 1 for all.
        updates: by the changed tensor's name in the checkpoint.
        wholes: tensors that it replaces (PEFT's `modules_to_save`) -> their name in the adapter's file.
    """

    folder: Path
    weight: float
    tensors: Mapping[str, TensorInfo]
    updates: Mapping[str, Update]
    wholes: Mapping[str, str]

    @staticmethod
    def open(folder: Path, weight: float, checkpoint: Checkpoint) -> Adapter:
        """Read adapter_config.json and the tensors' headers, and check that every one of them fits.

        Raises:
            InputError: no adapter, another kind than LoRA, one for another model, anything damaged.
        """
        if not folder.is_dir() or not (folder / CONFIG).exists():
            fix = f"name the folder that PEFT saved, with {CONFIG} in it"
            raise InputError("this is no LoRA adapter", where=folder, fix=fix)
        check_folder(folder)
        config = read_json(member(folder, CONFIG))
        _check_kind(config, folder / CONFIG)
        file = next((folder / name for name in FILES if (folder / name).exists()), None)
        if file is None:
            raise InputError(f"the adapter has no {FILES[0]}", where=folder, fix="fetch the folder again")
        tensors = tensors_of(member(folder, file.name))
        updates, wholes = _sorted(tensors, checkpoint, config, file)
        if wholes and weight != 1:
            fix = "give this adapter the weight 1"
            raise InputError(f"the adapter replaces {next(iter(wholes))} as a whole", where=folder, fix=fix)
        return Adapter(folder, weight, tensors, updates, wholes)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` float32, the checkpoint's tensor `name`, with what the adapter adds."""
        if name in self.wholes:
            return self._load(self.wholes[name])
        update = self.updates.get(name)
        if update is None:
            return tensor
        a, b = self._load(update.a).double(), self._load(update.b).double()
        left, right = (a.T, b.T) if update.embedding else (b, a)  # [rows, r], [r, columns]
        factor = self.weight * update.scale
        for start in range(0, tensor.shape[0], ROWS):
            rows = tensor[start : start + ROWS]
            rows.copy_(rows.double() + factor * (left[start : start + ROWS] @ right))
        if not torch.isfinite(tensor).all():
            fix = "give it a smaller weight, or train it again"
            raise InputError(f"{name} is not finite with this adapter", where=self.folder, fix=fix)
        return tensor

    def digest(self) -> str:
        """Hex SHA-256 over configuration, tensors and weight."""
        files = sorted({self.folder / CONFIG, *(info.file for info in self.tensors.values())})
        parts = [f"{self.weight!r}", *(sha256(file) for file in files)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _load(self, name: str) -> Tensor:
        return load_tensor(name, self.tensors[name])


@dataclass(frozen=True)
class AdaptedCheckpoint(Checkpoint):
    """A float checkpoint with adapters merged in, in their order."""

    adapters: tuple[Adapter, ...]

    def tensor(self, name: str) -> Tensor:
        tensor = super().tensor(name)
        for adapter in self.adapters:
            tensor = adapter.apply(name, tensor)
        return tensor

    @cached_property
    def _digest(self) -> str:
        base = Checkpoint(self.folder, self.config, self.tensors).digest()
        return hashlib.sha256("\n".join([base, *(adapter.digest() for adapter in self.adapters)]).encode()).hexdigest()


def adapted(checkpoint: Checkpoint, adapters: Sequence[tuple[Path, float]]) -> Checkpoint:
    """The checkpoint with adapters (folder, weight) merged in; itself where there are none.

    Raises:
        InputError: an adapter that does not fit.
    """
    if not adapters:
        return checkpoint
    opened = tuple(Adapter.open(folder, weight, checkpoint) for folder, weight in adapters)
    return AdaptedCheckpoint(checkpoint.folder, checkpoint.config, checkpoint.tensors, opened)


def parse_adapter(text: str) -> tuple[Path, float]:
    """`DIR` or `DIR:WEIGHT`, as the command line gives it.

    Raises:
        InputError: a weight that is no finite number.
    """
    folder, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"--adapter {text}: {weight!r} is no weight", fix="write DIR or DIR:WEIGHT, e.g. style:0.5")
    return Path(folder), value


def _check_kind(config: Mapping[str, Any], where: Path) -> None:
    """InputError unless the adapter is a plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"a {kind!r} adapter cannot be merged", where=where, fix="only LoRA adapters can")
    for field, why in _REFUSED.items():
        if config.get(field):
            raise InputError(f"the adapter has {field}: {why}", where=where, fix="merge it with PEFT itself first")
    if config.get("bias", "none") != "none":
        raise InputError("the adapter trained biases", where=where, fix="merge it with PEFT itself first")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        fix = "convert it to a plain LoRA with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        raise InputError(f"the adapter belongs to a base that {start} changed", where=where, fix=fix)


def _sorted(
    tensors: Mapping[str, TensorInfo], checkpoint: Checkpoint, config: Mapping[str, Any], file: Path
) -> tuple[dict[str, Update], dict[str, str]]:
    """The adapter's tensors as updates and replacements of the checkpoint's."""
    sides: dict[str, dict[str, str]] = {}
    embeddings: set[str] = set()
    wholes: dict[str, str] = {}
    for name in sorted(tensors):
        update, whole = _UPDATE.match(name), _WHOLE.match(name)
        found = update or whole
        target = None if found is None else _target(found["module"], checkpoint)
        if target is None:
            fix = "use the adapter with the model that it was trained on"
            raise InputError(f"{name} belongs to no tensor of this model", where=file, fix=fix)
        if update:
            sides.setdefault(target, {})[update["side"]] = name
            embeddings |= {target} if update["embedding"] else set()
        else:
            _check_shape(name, tensors[name].shape, checkpoint.tensors[target].shape, file)
            if ".base_layer." not in name:  # PEFT's copy of the base's own, beside an embedding's update
                wholes[target] = name
    if not sides and not wholes:
        raise InputError("the adapter holds no tensors", where=file, fix="fetch the folder again")
    updates = dict(_updates(sides, embeddings, tensors, checkpoint, config, file))
    return updates, wholes


def _updates(
    sides: Mapping[str, Mapping[str, str]],
    embeddings: set[str],
    tensors: Mapping[str, TensorInfo],
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    file: Path,
) -> Iterator[tuple[str, Update]]:
    for target, pair in sides.items():
        if len(pair) != 2:
            missing = "B" if "A" in pair else "A"
            raise InputError(f"{target} has no lora_{missing}", where=file, fix="fetch the adapter again")
        a, b, embedding = tensors[pair["A"]], tensors[pair["B"]], target in embeddings
        out, columns = checkpoint.tensors[target].shape[0], checkpoint.tensors[target].shape[-1]
        rank = a.shape[0] if a.shape else 0
        _check_shape(pair["A"], a.shape, (rank, out if embedding else columns), file)
        _check_shape(pair["B"], b.shape, (columns if embedding else out, rank), file)
        yield target, Update(pair["A"], pair["B"], _scale(config, target, rank, file), embedding)


def _scale(config: Mapping[str, Any], target: str, rank: int, file: Path) -> float:
    """alpha / r, or alpha / sqrt(r), of one module."""
    module = target.removesuffix(".weight")
    wanted = _of_module(config, "rank_pattern", module, config.get("r"))
    alpha = _of_module(config, "alpha_pattern", module, config.get("lora_alpha"))
    where = file.with_name(CONFIG)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise InputError(f"lora_alpha of {module} is {alpha!r}", where=where, fix="fetch the adapter again")
    if wanted != rank or rank < 1:
        fix = "fetch the adapter again: its files do not belong together"
        raise InputError(f"{module} has rank {rank}, {CONFIG} says {wanted!r}", where=where, fix=fix)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(config: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    """A value by module name: PEFT's patterns are endings of names, as regular expressions."""
    patterns = config.get(field) or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            raise InputError(f"{field} holds {pattern!r}, which is no pattern", where=CONFIG) from None
    return default


def _target(module: str, checkpoint: Checkpoint) -> str | None:
    """The checkpoint's weight that a module's name in the adapter stands for."""
    name = module.removeprefix("base_model.model.")
    return next((full for full in (f"{name}.weight", f"model.{name}.weight") if full in checkpoint.tensors), None)


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...], file: Path) -> None:
    if found != wanted:
        fix = "use the adapter with the model that it was trained on"
        raise InputError(f"{name} has shape {list(found)}, this model needs {list(wanted)}", where=file, fix=fix)
