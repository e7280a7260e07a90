"""What a finished artifact would do on the phone, from its own bytes: speed and memory, estimated."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from bluelm.block import Product, block_of
from bluelm.errors import InputError, UnavailableError
from eval.files import size_plan
from eval.measurement import Measurement
from eval.speed import speed_model
from eval.speed.speed_model import SMALLEST, ChipSpeed, TokenCost
from export.artifacts.artifact import MANIFEST, SIMULATOR, Artifact
from export.formats import Without

CACHE_BYTES = {"float32": 4, "float16": 2, "int16": 2, "int8": 1}
READ_ONCE = ("embedding", "tokenizer", "ranges")  # roles that a decoded token reads next to nothing of


def find_artifact(folder: Path) -> tuple[Artifact, str]:
    """The artifact of a folder and its model's name, for `estimate --artifact`.

    Args:
        folder: of an artifact, or of a run (then its compiled artifact, else the one for CPUs).

    Raises:
        InputError: there is no artifact.
    """
    places = [folder, folder / "compiled", folder / "onnx-cpu"]
    found = next((place for place in places if (place / MANIFEST).is_file()), None)
    if found is None:
        raise InputError("there is no artifact", where=folder, fix="name the folder of a run or of an artifact")
    artifact = Artifact.open(found)
    name = found.parent.name if found.name in ("compiled", "onnx-cpu") else found.name
    return artifact, name


def work_of(artifact: Artifact) -> TokenCost:
    """Bytes and operations of one decoded token.

    Graphs have static shapes: every token reads all weights of its graph and the whole cache, filled or not.
    """
    config, block = artifact.model, block_of(artifact.model)
    weights = config.num_layers * block.weights + config.vocab_size * config.hidden_size
    held = sum(
        file.bytes for file in artifact.files if file.role not in READ_ONCE and not file.role.startswith(SIMULATOR)
    )
    weight_bytes = held // size_plan.copies(artifact)
    attended = 4 * config.num_layers * block.attention.heads * block.attention.size * artifact.context
    return TokenCost(weight_bytes, cache_bytes(artifact), 2 * weights + attended, config.num_layers)


def cache_bytes(artifact: Artifact) -> int:
    """Bytes of the whole KV cache."""
    config = artifact.model
    elements = 2 * config.num_layers * config.num_kv_heads * config.head_dim * artifact.context
    return elements * CACHE_BYTES[artifact.cache]


def activation_bytes(artifact: Artifact) -> int:
    """Bytes of the largest values alive together in one prefill step.

    Per token of the step: float32 logits; the stream and what a norm makes of it; what linears make inside the
    branches, and products; scores and weights of attention over the whole context. Elements are as wide as the
    runtime's activations.
    """
    config, block = artifact.model, block_of(artifact.model)
    writers = {branch.writer for branch in block.branches}
    inner = sum(linear.rows for linear in block.linears.values() if linear not in writers)
    products = sum(step.columns for step in writers if isinstance(block.makers[step.reads], Product))
    scores = 2 * block.attention.heads * artifact.context
    values = 2 * config.hidden_size + inner + products + scores
    return artifact.chunk * (4 * config.vocab_size + artifact.record.activation_bytes * values)


def memory(artifact: Artifact) -> Measurement:
    """Memory on the phone: every byte of the files, the KV cache, activations."""
    files, cache, activations = artifact.bytes, cache_bytes(artifact), activation_bytes(artifact)
    parts = f"files {files / 1e6:,.1f} MB + cache {cache / 1e6:,.1f} MB + activations {activations / 1e6:,.1f} MB"
    return Measurement("memory_bytes", files + cache + activations, "bytes", "estimated", note=parts, subject="soc")


def chip(name: str) -> ChipSpeed | None:
    """What the speed estimate knows of a chip; None where it knows nothing."""
    try:
        return speed_model.find_soc(name)
    except InputError:
        return None


def not_known(artifact: Artifact) -> str | None:
    """Why no speed is estimated for an artifact; None where one is."""
    if isinstance(artifact.record.speed, Without):
        return f"the speed on the phone: {artifact.record.speed.reason}"
    if artifact.parameters < SMALLEST:
        few = f"{artifact.parameters / 1e6:,.1f} M"
        return f"the speed on the phone: nothing is published of models below 0.5 B parameters, and this has {few}"
    return None


def speed(artifact: Artifact, soc: ChipSpeed) -> list[Measurement]:
    """Decode and prefill tokens/s on a chip, by the class of the artifact's own runtime.

    A phase that nobody published a figure for is left out; [] where `not_known` says why.
    """
    known = artifact.record.speed
    if isinstance(known, Without) or not_known(artifact) is not None:
        return []
    runtime_class, runtime = known.unit, known.published_as
    load = work_of(artifact)
    gigabytes = (load.weight_bytes + load.cache_bytes) / 1e9
    notes: dict[Literal["decode", "prefill"], str] = {
        "decode": f"{gigabytes:.3g} GB a token at {soc.bandwidth(runtime_class) / 1e9:.1f} GB/s peak",
        "prefill": f"{load.operations / 1e9:.3g} billion operations a token",
    }
    found = []
    for phase, note in notes.items():
        try:
            interval = speed_model.estimate(phase, load, soc, runtime_class, runtime=runtime)
        except UnavailableError:
            continue
        found.append(speed_model.as_measurement(phase, interval, f"{soc.name} ({runtime_class}), {note}"))
    return found
