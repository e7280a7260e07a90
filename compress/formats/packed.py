"""A quantized Hugging Face folder, opened lazily: the `Weights` that its codes stand for, and the codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

from torch import Tensor

from bluelm.block import block_of
from bluelm.checkpoint import (
    HEAD,
    Checkpoint,
    check_tensors,
    digest,
    file_shapes,
    model_tensors,
    untied,
    with_rows,
)
from bluelm.config import GENERATION, ModelConfig
from bluelm.errors import InputError
from bluelm.naming import half_split, source
from bluelm.tensorfiles import TensorInfo, list_tensors, load_stored, load_tensor
from bluelm.text.tokenizer import tokenizer_files
from compress.checkpoint.pieces import LinearInfo
from compress.checkpoint.quantized import OrderedWeight, QuantizedTensor
from compress.formats.claims import Claims, read_claims
from compress.formats.detect import MARKERS, SETTINGS_FILES, find_layout, read_settings
from compress.formats.layout import Layout, MatrixShape

# Of codes about their zero points, in standard deviations: one step off is 0.27 to 0.5 at 4 bits, trained weights 0.05.
LARGEST_OFFSET = 0.2
OFFSET_ROWS = 512


@dataclass(frozen=True)
class PackedCheckpoint(Checkpoint):
    """A `Checkpoint` some of whose linears are quantized: float as one reads it, codes by `linear`.

    Attributes:
        layout: how the quantized linears lie in the files.
        packed: names of the quantized linears in the files.
        claims: what the folder's settings say of them, held against the tensors as they are read.
    """

    layout: Layout
    packed: frozenset[str]
    claims: Claims

    @staticmethod
    def open(folder: Path | str) -> PackedCheckpoint:
        """Read the settings and the headers of the tensor files, and check every name and shape.

        Raises:
            InputError: not a quantized checkpoint, one of an unknown method, or anything missing, left over,
                wrongly shaped or damaged.
        """
        folder = Path(folder)
        config = ModelConfig.from_folder(folder)
        tensors = model_tensors(list_tensors(folder, any_name=True))
        layout = find_layout(folder, tensors)
        if layout is None:
            raise InputError("the checkpoint is not quantized", where=folder)
        config = untied(with_rows(config, tensors, folder), tensors)
        names = {name.removesuffix(f".{layout.marker}") for name in tensors if name.endswith(f".{layout.marker}")}
        if not names:
            raise InputError(
                f"config.json says {layout.name}, but no tensor is called …{layout.marker}",
                where=folder,
                fix="fetch the folder again, or give the float checkpoint",
            )
        wanted = file_shapes(config)
        for name in names & {name.removesuffix(".weight") for name in wanted}:
            shape = MatrixShape(*wanted.pop(f"{name}.weight"))
            found = {local: info.shape for local, info in _below(name, tensors).items()}
            with _naming(name, tensors[f"{name}.{layout.marker}"].file):
                wanted |= {f"{name}.{local}": size for local, size in layout.shapes(shape, found).items()}
            if "bias" in found:  # early quantizers wrote one of zeros for every linear
                wanted[f"{name}.bias"] = (shape.rows,)
        check_tensors(config, wanted, tensors, folder)
        return PackedCheckpoint(folder, config, tensors, layout, frozenset(names), read_claims(*read_settings(folder)))

    def linear(self, name: str) -> OrderedWeight | None:
        """A quantized linear, `model.layers.0.self_attn.q_proj` or `lm_head`; None if it is not quantized.

        Raises:
            InputError: what is stored cannot be.
        """
        found = source(self.config, f"{name}.weight", self._shapes)
        stem = found.name.removesuffix(".weight")
        if stem not in self.packed:
            return None
        whole = self._unpack(stem, MatrixShape(found.of, self._shapes[f"{name}.weight"][1]))
        self._check_bias(name, stem)

        def turn(part: Tensor) -> Tensor:
            return half_split(self.config, f"{name}.weight", part[found.start : found.start + found.rows])

        return OrderedWeight(whole.weight.with_rows(turn), whole.order)

    def weight(self, name: str) -> Tensor:
        """float32 [out, in]: a linear, dequantized if it is quantized."""
        return self._read(f"{name}.weight")

    def vector(self, name: str) -> Tensor:
        """float32: a norm's weight or a bias by its full name."""
        return self._read(name)

    def _unpack(self, stem: str, shape: MatrixShape) -> OrderedWeight:
        infos = _below(stem, self.tensors)
        with _naming(stem, infos[self.layout.marker].file):
            parts = {local: load_stored(f"{stem}.{local}", info) for local, info in infos.items() if local != "bias"}
            claim = self.claims.of(stem)
            found = self.layout.read(shape, parts, claim)
            claim.check(found.weight)
            return found

    def _check_bias(self, name: str, stem: str) -> None:
        info = self.tensors.get(f"{stem}.bias")
        if info is not None and f"{name}.bias" not in self._shapes and load_tensor(f"{stem}.bias", info).any():
            fix = "only q, k and v may have biases, of architectures that have them"
            raise InputError(f"{stem}.bias is not zero", where=info.file, fix=fix)

    def _read(self, name: str) -> Tensor:
        linear = name.removesuffix(".weight")
        quantizable = name == HEAD or linear.split(".", 3)[-1] in block_of(self.config).linears
        quantized = self.linear(linear) if quantizable else None
        return super()._read(name) if quantized is None else quantized.dequantize()

    @cached_property
    def survey(self) -> Mapping[str, LinearInfo]:
        """Width, groups and shape of every quantized linear by its name in the decoder; reads them all.

        Raises:
            InputError: what is stored cannot be, or the zero points are not those of the codes.
        """
        linears = block_of(self.config).linears
        blocks = [f"model.layers.{index}.{name}" for index in range(self.config.num_layers) for name in linears]
        found: dict[str, LinearInfo] = {}
        offsets: list[float] = []
        for name in blocks if self.config.shares_table else [*blocks, HEAD.removesuffix(".weight")]:
            weight = self.linear(name)
            if weight is not None:
                found[name] = header_of(weight)
                offsets.append(offset(weight.weight))
        middle = median(offsets) if offsets else 0.0
        if abs(middle) > LARGEST_OFFSET:
            raise InputError(
                f"the codes of its linears lie {abs(middle):.2f} of their spread {'above' if middle > 0 else 'below'} "
                "their zero points (a median); trained weights lie around zero, so that the zero points are misread",
                where=self.folder,
                fix="check checkpoint_format (gptq or gptq_v2) and sym in the settings, or give the float checkpoint",
            )
        return found

    def _hash(self) -> str:
        others = ("config.json", GENERATION, *SETTINGS_FILES, *tokenizer_files(self.folder))
        return digest(self.folder, self.tensors, others)


def offset(weight: QuantizedTensor) -> float:
    """Mean of codes less their zero points, as a share of their standard deviation; near 0 for trained weights.

    Of about `OFFSET_ROWS` rows, evenly spread.
    """
    step = max(1, weight.shape[0] // OFFSET_ROWS)
    codes, zeros = weight.codes[::step], weight.zeros[::step]
    steps = codes.reshape(*zeros.shape, -1).float() - zeros.unsqueeze(-1)
    spread = steps.std().item()
    return steps.mean().item() / spread if spread > 0 else 0.0


def header_of(ordered: OrderedWeight) -> LinearInfo:
    """What a quantized checkpoint's header says of a weight."""
    weight = ordered.weight
    return LinearInfo(weight.shape, weight.bits, weight.group_size, weight.symmetric, ordered.order is not None)


def open_weights(folder: Path | str) -> Checkpoint:
    """A `PackedCheckpoint` if the folder is quantized, else a float `Checkpoint`.

    Raises:
        InputError: as for the one that it is.
    """
    folder = Path(folder)
    ModelConfig.from_folder(folder)  # its messages first
    settings, _ = read_settings(folder)
    if settings is None and not any(name.endswith(MARKERS) for name in list_tensors(folder, any_name=True)):
        return Checkpoint.open(folder)
    return PackedCheckpoint.open(folder)


def _below(stem: str, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Tensors of one linear by their local names."""
    start = f"{stem}."
    return {name[len(start) :]: info for name, info in tensors.items() if name.startswith(start)}


@contextmanager
def _naming(stem: str, file: Path) -> Iterator[None]:
    """Errors name the linear and the file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{stem}: {error.problem}", where=error.where or file, fix=error.fix) from None
