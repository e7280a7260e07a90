"""Core ML: .mlpackage files with exact weights, the cache as states, prefill and decode as two functions.

A model beyond what one program may hold becomes several, each with its own blocks; hidden states go from one
to the next. Weights are read, written and let go one at a time.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bluelm.block import block_of
from bluelm.errors import ExportError
from bluelm.system.files import atomic_folder
from bluelm.system.progress import Progress, Silent
from bluelm.text.tokenizer import copy_files
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact, list_files
from export.artifacts.debug import DEBUG_NOTE
from export.artifacts.package import bits_per_weight, parameter_count
from export.coreml.importing import import_coremltools
from export.coreml.ops import MASKED, Activations, Constants, Quantized, signed_codes
from export.coreml.package import Package
from export.coreml.program import DECODE, PREFILL, ProgramSizes, build, part_bytes
from export.coreml.save import FOLDER, save_package
from export.lowering.parts import Part, split

PROGRAM_BYTES = 1_900_000_000
"""Largest program by default: the Neural Engine refuses them at about 2 GB."""
PACKAGE_FILES = {
    "Manifest.json": "manifest",
    f"Data/{FOLDER}/model.mlmodel": "program",
    f"Data/{FOLDER}/weights/weight.bin": "weights",
}


def export(
    quantized: QuantizedCheckpoint,
    folder: Path,
    *,
    context: int = 512,
    chunk: int = 128,
    activations: Activations = "float16",
    program_bytes: int = PROGRAM_BYTES,
    debug: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Write the artifact `folder`: model.mlpackage (or model_1, model_2, ...), config, tokenizer.

    Args:
        activations: float16, which every compute unit has, or float32, which only CPU and GPU compute.
        program_bytes: largest program, in bytes of weights.
        debug: every block's output is an output of the program.

    Raises:
        TargetError: one block or table alone is larger than `program_bytes`.
        UnavailableError: coremltools is not installed.
    """
    import_coremltools()
    weights = Constants(quantized, activations)
    parts = split(*part_bytes(weights, quantized.config), program_bytes)
    names = ["model.mlpackage"] if len(parts) == 1 else [f"model_{i + 1}.mlpackage" for i in range(len(parts))]
    shape = ProgramSizes(context, chunk, debug)
    metadata = {"quantized": quantized.digest(), "activations": activations}
    with (
        atomic_folder(folder) as temporary,
        (progress or Silent()).task("lower to Core ML", len(parts)) as task,
    ):
        for name, part in zip(names, parts, strict=True):
            task.advance(note=name)
            save_package(build(weights, part, shape), weights.providers, metadata, temporary / name)
            weights.forget()
            check_package(temporary / name, quantized, part)
        _complete(temporary, names, quantized, shape, activations)
    return Artifact.open(folder)


def part_weights(quantized: Quantized, part: Part) -> list[str]:
    """Names of the quantized tensors that a part holds; `embed` is the token table."""
    names = ["embed"] if part.embeds else []
    names += [f"model.layers.{layer}.{name}" for layer in part.layers for name in block_of(quantized.config).linears]
    return [*names, "lm_head"] if part.heads else names


def check_package(path: Path, quantized: Quantized, part: Part) -> None:
    """Read a saved package back: every weight's codes and scales are the checkpoint's, in both functions.

    Raises:
        ExportError: they are not; nothing is handed on then.
    """
    package = Package.open(path)
    stored = {name: dict(package.constants(name)) for name in (PREFILL, DECODE)}
    for name in part_weights(quantized, part):
        tensor = quantized.embed() if name == "embed" else quantized.linear(name)
        for function, constants in stored.items():
            values = _values(constants, name)
            if function != PREFILL and values is not None and values == _values(stored[PREFILL], name):
                continue  # the same record of the same file
            if not holds(package, constants, name, tensor):
                raise ExportError(f"the package holds other codes or scales of {name}", where=path)


def holds(package: Package, constants: dict[str, Any], name: str, tensor: QuantizedTensor) -> bool | None:
    """Whether a function's constants hold a weight's codes, scales and zero points; None: no weight of that name."""
    values = _values(constants, name)
    if values is None:
        return None
    zeros = values.get("offset")
    codes = signed_codes(tensor) if zeros is None else tensor.codes.numpy()
    return (
        np.array_equal(package.value(values["data"]), codes)
        and np.array_equal(package.value(values["scale"]), tensor.scales.numpy())
        and (zeros is None or np.array_equal(package.value(zeros), tensor.zeros.numpy()))
    )


def _values(constants: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Records of a weight's parts; the codes of a table may be gathered, and have names of their own."""
    key = name.replace(".", "_")
    if key in constants:
        return constants[key]
    if f"{key}_codes" not in constants:
        return None
    return {"data": constants[f"{key}_codes"]["val"], "scale": constants[f"{key}_scales"]["val"]}


def packages(artifact: Artifact) -> list[Path]:
    """The artifact's packages, in order of execution."""
    return [artifact.folder / Path(file.path).parent for file in artifact.files if file.role == "manifest"]


def _complete(
    folder: Path, names: list[str], quantized: QuantizedCheckpoint, shape: ProgramSizes, activations: Activations
) -> None:
    """Config, tokenizer and artifact.json beside the packages."""
    roles = {f"{name}/{file}": role for name in names for file, role in PACKAGE_FILES.items()}
    config = json.dumps(quantized.config.to_dict(), indent=1) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    roles["config.json"] = "config"
    roles |= dict.fromkeys(copy_files(quantized.folder, folder), "tokenizer")
    files = list_files(folder, roles)
    parameters = parameter_count(quantized.config)
    Artifact(
        format="coreml",
        model=quantized.config,
        context=shape.context,
        chunk=shape.chunk,
        mask_value=MASKED,
        cache="float16",
        parameters=parameters,
        bits_per_weight=bits_per_weight(files, parameters),
        quantized_digest=quantized.digest(),
        producers={name: version(name) for name in ("bluelm-export", "coremltools")},
        notes=(f"{activations} activations", *([DEBUG_NOTE] if shape.debug else [])),
        files=files,
    ).save(folder)
