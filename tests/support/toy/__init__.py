"""A toy runtime as a package of its own: torch over one safetensors file of codes and scales.

`RECORD` is all that the product is told of it; see `export/formats`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bluelm.config import ModelConfig
from bluelm.system.files import atomic_folder
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import EMBED, QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.mobile import complete
from export.formats import Lowering, Record, Run, Sizes, Speed, Without
from export.readback.items import CONTEXT, Finding, checked, equal, inventory, untold, vector_names, weight_names
from targets.backend import LoweringJob as Job
from targets.backend import Uncompiled
from targets.host.torch_runtime import TorchRuntime
from tests.support.checkpoints.shapes import LINEARS, NORMS

MODEL = "model.safetensors"
RECORD = Record(
    name="toy",
    targets=("generic-arm64",),
    tools=("torch",),
    package="torch",
    backend="tests.support.toy:Backend",
    cache_widths=(32,),
    ranges="never",
    runs={"cpu": Run("tests.support.toy:open_toy", "torch", "torch in place of a toy phone")},
    runs_as_shipped=True,
    one_chip=Without("it is not compiled"),
    runner=Without("nobody has written one yet"),
    reader="tests.support.toy:findings",
    ends=Without("its file holds no tokens"),
    made=Without("the tokenizer's files are the checkpoint's own"),
    arithmetic="float32",
    levels=Without("it has no accuracy levels"),
    encodings=Without("its activations are floats"),
    block_error=1e-5,
    sizes=Sizes(rope=0, structure=20_000),
    lowering=Lowering(0.1, 0.01),
    speed=Speed("cpu"),
    blocks="runtime",
    blocks_in_runs=True,
    inside=Without("it holds weights and no graph"),
    host_cache=True,
    reorders=Without("it has no order of inputs"),
    delegate=Without("it is no program of ExecuTorch's"),
    app=Without("no phone has it"),
    device_program=Without("no phone has it"),
    untold=Without("nothing beside what its reader names as untold"),
)


def packed(weight: QuantizedTensor) -> Tensor:
    """Codes uint8 [rows, columns], two of 4 bits a byte."""
    codes = weight.codes
    return codes[:, ::2] | codes[:, 1::2] << 4 if weight.bits == 4 else codes


class Backend(Uncompiled):
    """Lowers by copying."""

    def lower(self, job: Job) -> Artifact:
        q = job.quantized
        tensors = {name: q.vector(name) for name in vector_names(q)}
        for name in (n for n in weight_names(q) if n in q.linears):
            weight = q.linear(name)
            tensors |= {f"{name}.codes": packed(weight), f"{name}.scales": weight.scales, f"{name}.zeros": weight.zeros}
        with atomic_folder(job.folder) as folder:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / MODEL)
            complete(
                folder, RECORD.name, q, {MODEL: "model"}, context=job.context, chunk=job.chunk, kv_bits=32,
                producers={"torch": version("torch")},
            )  # fmt: skip
        return Artifact.open(job.folder)


@dataclass(frozen=True)
class Held:
    """The file's numbers as a `Weights`."""

    artifact: Artifact

    @property
    def config(self) -> ModelConfig:
        return self.artifact.model

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.artifact.path("model"))

    def weight(self, name: str) -> Tensor:
        codes, scales, zeros = (self.tensors[f"{name}.{part}"] for part in ("codes", "scales", "zeros"))
        if ".layers." in name:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
        groups = codes.float().unflatten(1, (scales.shape[1], -1))
        return ((groups - zeros.float().unsqueeze(-1)) * scales.float().unsqueeze(-1)).flatten(1)

    def block(self, index: int) -> dict[str, Tensor]:
        at = f"model.layers.{index}"
        linears = {f"{name}.weight": self.weight(f"{at}.{name}") for name in LINEARS}
        return linears | {f"{name}.weight": self.tensors[f"{at}.{name}.weight"].float() for name in NORMS}

    def embedding(self) -> Tensor:
        return self.weight(EMBED)

    def final_norm(self) -> Tensor:
        return self.tensors["model.norm.weight"].float()

    def head(self) -> Tensor:
        return self.weight("lm_head")


def open_toy(artifact: Artifact) -> TorchRuntime:
    """In torch."""
    return TorchRuntime(Held(artifact), artifact.context)


def findings(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[Finding]:
    """Codes, scales, zero points and vectors are told, and no graph is there to read."""
    tensors = Held(artifact).tensors
    for name in weight_names(quantized):
        weight = quantized.linear(name)
        wanted = {"codes": packed(weight), "scales": weight.scales, "zeros": weight.zeros}
        yield from checked(name, [p for p, tensor in wanted.items() if not torch.equal(tensors[f"{name}.{p}"], tensor)])
    for name in vector_names(quantized):
        yield from equal(name, torch.equal(tensors[name], quantized.vector(name)), True)
    yield from equal(CONTEXT, artifact.context, artifact.context)
    said = {*weight_names(quantized), *vector_names(quantized), CONTEXT}
    yield from untold("the toy holds no graph", *(item for item in inventory(artifact, quantized) if item not in said))
