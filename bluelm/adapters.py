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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bluelm.checkpoint import EMBED, HEAD, Checkpoint, stamp
from bluelm.errors import InputError
from bluelm.system.files import member, sha256
from bluelm.system.reading import read_json
from bluelm.tensorfiles import TensorInfo, load_tensor, tensors_of
from bluelm.text.patterns import check_count, matcher
from bluelm.trust.safety import check_folder

CONFIG, FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
ROWS = 1024  # rows of W merged at a time: bounds the float64 copies
_UPDATE = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?$")
_WHOLE = re.compile(r"(?P<module>.+?)(\.base_layer|\.modules_to_save(\.default)?)?\.weight$")
MERGE = "merge it with PEFT itself first"
PLAIN = "train a plain LoRA: what this one adds depends on the prompt, so that no merged weight repeats it"
# Fields of adapter_config.json that leave it W + scale * B @ A, whatever they say; the first six say it.
_READ = frozenset({
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "ensure_weight_tying",
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "lora_dropout", "megatron_core", "bias", "init_lora_weights",
    "qalora_group_size",  # of use_qalora
    "eva_config", "corda_config", "loftq_config", "lora_ga_config",  # of init_lora_weights
})  # fmt: skip
# The fields known to do more, what they do, and a remedy. Fields that stand in neither table are refused as well.
_REFUSED = {
    "use_dora": ("DoRA also rescales the rows of W", MERGE),
    "lora_bias": ("it trained a bias", MERGE),
    "layer_replication": ("it repeats layers", MERGE),
    "target_parameters": ("it changes parameters that are no linear's weight", MERGE),
    "trainable_token_indices": ("it trained single rows of the embedding", MERGE),
    "fan_in_fan_out": ("its weights are stored the other way round", MERGE),
    "megatron_config": ("its linears are split between devices", MERGE),
    "use_qalora": ("QA-LoRA pools its inputs", MERGE),
    "use_bdlora": ("its matrices are block-diagonal", MERGE),
    "kasa_config": ("KaSA adds its update to a truncated W", MERGE),
    "velora_config": ("VeLoRA's layers are of another kind", MERGE),
    "monteclora_config": ("it draws its update at random", MERGE),
    "arrow_config": ("it routes between adapters", PLAIN),
    "alora_invocation_tokens": ("aLoRA adds its update behind its invocation tokens alone", PLAIN),
}
# Ways to start that leave W as it was; the others of PEFT take from W what A and B begin with.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


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
        ties: what it changes of a tied table it changes as embedding and as head (PEFT's `ensure_weight_tying`).
    """

    folder: Path
    weight: float
    tensors: Mapping[str, TensorInfo]
    updates: Mapping[str, Update]
    wholes: Mapping[str, str]
    ties: bool = False

    @staticmethod
    def open(folder: Path, weight: float, checkpoint: Checkpoint) -> Adapter:
        """Read adapter_config.json and the tensors' headers, and check that every one of them fits.

        Raises:
            InputError: no adapter, another kind than LoRA, one for another model, anything damaged.
        """
        if not folder.is_dir() or not (folder / CONFIG).exists():
            fix = f"name the folder that PEFT saved, with {CONFIG} in it"
            raise InputError("this is not a LoRA adapter", where=folder, fix=fix)
        check_folder(folder)
        config = read_json(member(folder, CONFIG))
        _check_kind(config, folder / CONFIG)
        file = next((folder / name for name in FILES if (folder / name).exists()), None)
        if file is None:
            raise InputError(f"the adapter has no {FILES[0]}", where=folder, fix="fetch the folder again")
        tensors = tensors_of(member(folder, file.name))
        known = _with_head(checkpoint)
        updates, wholes = _sorted(tensors, known, config, file)
        if wholes and weight != 1:
            fix = "give this adapter the weight 1"
            raise InputError(f"the adapter replaces {next(iter(wholes))} as a whole", where=folder, fix=fix)
        ties = config.get("ensure_weight_tying") is True
        if ties and checkpoint.config.tie_word_embeddings:
            for changes in (updates, wholes):
                _mirror(changes)
        return Adapter(folder, weight, tensors, updates, wholes, ties)

    @property
    def keeps_tie(self) -> bool:
        """True where a tied table stays one: neither role of it is changed, or both alike."""
        one, other = self.updates.get(EMBED), self.updates.get(HEAD)
        wholes = [self.wholes.get(name) for name in (EMBED, HEAD)]
        if one is None and other is None and wholes == [None, None]:
            return True
        return self.ties and self._alike(one, other) and (wholes[0] == wholes[1] or torch.equal(*self._both(wholes)))

    def _alike(self, one: Update | None, other: Update | None) -> bool:
        """Whether two updates add the same to a table."""
        if one is None or other is None or one == other:
            return one == other
        (left, right), (other_left, other_right) = (self._factors(update) for update in (one, other))
        return one.scale == other.scale and torch.equal(left, other_left) and torch.equal(right, other_right)

    def _both(self, names: Sequence[str | None]) -> list[Tensor]:
        return [self._load(name) for name in names if name is not None]

    def _factors(self, update: Update) -> tuple[Tensor, Tensor]:
        """float64 [rows, r] and [r, columns], whose product times the scale is added."""
        a, b = self._load(update.a).double(), self._load(update.b).double()
        return (a.T, b.T) if update.embedding else (b, a)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` float32, the checkpoint's tensor `name`, with what the adapter adds."""
        if name in self.wholes:
            return self._load(self.wholes[name])
        update = self.updates.get(name)
        if update is None:
            return tensor
        left, right = self._factors(update)
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

    base: Checkpoint
    adapters: tuple[Adapter, ...]

    def tensor(self, name: str) -> Tensor:
        tensor = self.base.tensor(name if name in self.base.tensors else EMBED)  # a head that was tied
        for adapter in self.adapters:
            tensor = adapter.apply(name, tensor)
        return tensor

    @property
    def warnings(self) -> tuple[str, ...]:
        if self.config.tie_word_embeddings == self.base.config.tie_word_embeddings:
            return self.base.warnings
        return (
            *self.base.warnings,
            "the adapter changes embedding or head of a tied table alone: they become two tables, as the adapter was "
            "trained (PEFT's merge would change both)",
        )

    def _hash(self) -> str:
        parts = [self.base._hash(), *(adapter.digest() for adapter in self.adapters)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _stamps(self) -> dict[Path, tuple[int, ...]]:
        own = {info.file for adapter in self.adapters for info in adapter.tensors.values()}
        return {**self.base._stamps(), **{path: stamp(path) for path in sorted(own)}}


def adapted(checkpoint: Checkpoint, adapters: Sequence[tuple[Path, float]]) -> Checkpoint:
    """The checkpoint with adapters (folder, weight) merged in; itself where there are none.

    A tied table of which an adapter changes one role, embedding or head, becomes two: that is the model which was
    trained, and which PEFT runs before it merges.

    Raises:
        InputError: an adapter that does not fit.
    """
    if not adapters:
        return checkpoint
    opened = tuple(Adapter.open(folder, weight, checkpoint) for folder, weight in adapters)
    config, tensors = checkpoint.config, checkpoint.tensors
    if config.tie_word_embeddings and not all(adapter.keeps_tie for adapter in opened):
        config, tensors = replace(config, tie_word_embeddings=False), _with_head(checkpoint)
    return AdaptedCheckpoint(checkpoint.folder, config, tensors, checkpoint, opened)


def _with_head(checkpoint: Checkpoint) -> Mapping[str, TensorInfo]:
    """The checkpoint's tensors, a tied head among them."""
    tied = checkpoint.config.tie_word_embeddings
    return {HEAD: checkpoint.tensors[EMBED], **checkpoint.tensors} if tied else checkpoint.tensors


def _mirror(changes: dict[str, Any]) -> None:
    """What is known of one role of a tied table, of both."""
    known = changes.get(EMBED, changes.get(HEAD))
    if known is not None:
        changes.setdefault(EMBED, known)
        changes.setdefault(HEAD, known)


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
        raise InputError(f"--adapter {text}: {weight!r} is not a weight", fix="write DIR or DIR:WEIGHT, e.g. style:0.5")
    return Path(folder), value


def _check_kind(config: Mapping[str, Any], where: Path) -> None:
    """InputError unless the adapter is a plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"a {kind!r} adapter cannot be merged", where=where, fix="only LoRA adapters can")
    for field, value in config.items():
        if field in _READ or value is None or value is False or value in ([], {}):
            continue
        if field not in _REFUSED:
            fix = "if it changes nothing remove it; else merge the adapter with the tool that wrote it"
            raise InputError(f"the adapter has {field}, which is not known here", where=where, fix=fix)
        why, fix = _REFUSED[field]
        raise InputError(f"the adapter has {field}: {why}", where=where, fix=fix)
    if config.get("bias", "none") != "none":
        raise InputError("the adapter trained biases", where=where, fix=MERGE)
    start = config.get("init_lora_weights")
    if not any(start is known or (start == known and isinstance(start, str)) for known in _STARTS):
        fix = "convert it to a plain LoRA with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        raise InputError(f"init_lora_weights {start!r} changed the base model with the adapter", where=where,
                         fix=fix)  # fmt: skip


def _sorted(
    tensors: Mapping[str, TensorInfo], known: Mapping[str, TensorInfo], config: Mapping[str, Any], file: Path
) -> tuple[dict[str, Update], dict[str, str]]:
    """The adapter's tensors as updates and replacements of the checkpoint's."""
    sides: dict[str, dict[str, str]] = {}
    embeddings: set[str] = set()
    wholes: dict[str, str] = {}
    for name in sorted(tensors):
        update, whole = _UPDATE.match(name), _WHOLE.match(name)
        found = update or whole
        target = None if found is None else _target(found["module"], known)
        if target is None:
            fix = "use the adapter with the model that it was trained on"
            raise InputError(f"{name} belongs to no tensor of this model", where=file, fix=fix)
        if update:
            sides.setdefault(target, {})[update["side"]] = name
            embeddings |= {target} if update["embedding"] else set()
        else:
            _check_shape(name, tensors[name].shape, known[target].shape, file)
            if ".base_layer." not in name:  # PEFT's copy of the base's own, beside an embedding's update
                wholes[target] = name
    if not sides and not wholes:
        raise InputError("the adapter holds no tensors", where=file, fix="fetch the folder again")
    updates = dict(_updates(sides, embeddings, tensors, known, config, file))
    return updates, wholes


def _updates(
    sides: Mapping[str, Mapping[str, str]],
    embeddings: set[str],
    tensors: Mapping[str, TensorInfo],
    known: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    file: Path,
) -> Iterator[tuple[str, Update]]:
    where = file.with_name(CONFIG)
    ranks = _Patterns(config, "rank_pattern", config.get("r"), where)
    alphas = _Patterns(config, "alpha_pattern", config.get("lora_alpha"), where)
    for target, pair in sides.items():
        if len(pair) != 2:
            missing = "B" if "A" in pair else "A"
            raise InputError(f"{target} has no lora_{missing}", where=file, fix="fetch the adapter again")
        a, b, embedding = tensors[pair["A"]], tensors[pair["B"]], target in embeddings
        out, columns = known[target].shape[0], known[target].shape[-1]
        rank = a.shape[0] if a.shape else 0
        _check_shape(pair["A"], a.shape, (rank, out if embedding else columns), file)
        _check_shape(pair["B"], b.shape, (columns if embedding else out, rank), file)
        module = target.removesuffix(".weight")
        if ranks[module] != rank or rank < 1:
            fix = "fetch the adapter again: its files do not belong together"
            raise InputError(f"{module} has rank {rank}, {CONFIG} says {ranks[module]!r}", where=where, fix=fix)
        scale = _scale(alphas[module], rank, config.get("use_rslora"), module, where)
        yield target, Update(pair["A"], pair["B"], scale, embedding)


def _scale(alpha: Any, rank: int, stabilised: Any, module: str, where: Path) -> float:
    """alpha / r, or alpha / sqrt(r), of one module."""
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise InputError(f"lora_alpha of {module} is {alpha!r}", where=where, fix="fetch the adapter again")
    return alpha / (math.sqrt(rank) if stabilised else rank)


class _Patterns:
    """Values by module name: PEFT's patterns are endings of names, as regular expressions; the first counts."""

    def __init__(self, config: Mapping[str, Any], field: str, default: Any, where: Path) -> None:
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise InputError(f"{field} must be an object", where=where, fix="fetch the adapter again")
        check_count(len(patterns), where)
        self._default, place = default, f"{where}, {field}"
        self._rows = [(matcher(rf"(.*\.)?({pattern})$", place), value) for pattern, value in patterns.items()]

    def __getitem__(self, module: str) -> Any:
        return next((value for fits, value in self._rows if fits(module)), self._default)


def _target(module: str, known: Mapping[str, TensorInfo]) -> str | None:
    """The checkpoint's weight that a module's name in the adapter stands for."""
    name = module.removeprefix("base_model.model.")
    return next((full for full in (f"{name}.weight", f"model.{name}.weight") if full in known), None)


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...], file: Path) -> None:
    if found != wanted:
        fix = "use the adapter with the model that it was trained on"
        raise InputError(f"{name} has shape {list(found)}, this model needs {list(wanted)}", where=file, fix=fix)
