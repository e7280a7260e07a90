"""The artifact read back: its graphs as onnx-npu's, and beside them the first stage and what genai is told.

genai_config.json is held field by field against what the files themselves say: which blocks a graph holds, what goes
in and out of it. So a stage that is missing or runs at another time, another window, swapped caches or another token
that fills prompts up are wrong wherever they stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bluelm.errors import ExportError, InputError
from bluelm.system.reading import read_json
from compress.checkpoint.store import EMBED, QuantizedCheckpoint
from export.artifacts.artifact import Artifact, find_source
from export.artifacts.packing import unpack
from export.npu_genai.border import SLIDING
from export.npu_genai.config import FRONT, padding
from export.npu_genai.export import tokenizer_of
from export.npu_genai.front import front
from export.npu_genai.provider import provider_of
from export.onnx.decoder import GRAPHS
from export.onnx.readback import graph_findings
from export.onnx.readback_constants import Constants
from export.onnx.readback_genai import flat
from export.onnx.readback_structure import structure_faults
from export.onnx.reader import HeldWeight, OnnxFile
from export.qnn import readback as readback_qnn
from export.readback import held, items
from export.tokenizer import readback as readback_tokenizer

HEAD = ["logits"]


def findings(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[items.Finding]:
    """What is right and wrong in it."""
    yield from graph_findings(artifact, quantized, SLIDING, _slots)
    yield from items.checked(items.GRAPH, _front_faults(artifact, quantized))
    yield from items.checked(EMBED, _row_faults(artifact, quantized))
    yield from items.checked(items.TELLS, _told_faults(artifact, artifact, quantized))


def compiled_findings(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[items.Finding]:
    """The same of what Qualcomm's compiler made of it, with what stays readable there: all but the compiled stages."""
    for finding in readback_qnn.findings(artifact, quantized):
        if finding.item != items.TELLS:
            yield finding
    source = find_source(artifact)
    if source is None:
        return
    yield from items.checked(items.TELLS, _told_faults(artifact, source, quantized))
    wrong = list(_front_faults(artifact, quantized))
    yield from (items.Finding(items.GRAPH, "wrong", fault) for fault in wrong)
    yield from (items.Finding(EMBED, "wrong", fault) for fault in _row_faults(artifact, quantized))


def _slots(shape: list[int], tokens: int, context: int) -> dict[str, list[int]]:
    """All of them come in, and go out again."""
    whole = [*shape[:2], context, *shape[3:]]
    return dict.fromkeys(("past_keys", "past_values", "keys", "values"), whole)


def _front_faults(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """Of the first stage: its nodes and border, and its constants by their names, which say their values."""
    file = OnnxFile(artifact.path("front"))
    try:
        wanted = front(quantized.embed(), artifact.path("embedding"), artifact.context, artifact.mask_value)
        yield from structure_faults(file, wanted)
    except ExportError as error:
        yield f"{FRONT} cannot be emitted again: {error}"
    for name in file.tensors:
        if name.startswith("embed."):
            continue
        wanted = Constants.said(name)
        found = file.array(name)
        if wanted is None or found.dtype != wanted.dtype or found.tobytes() != wanted.tobytes():
            yield f"{name} of {FRONT} is {found} instead of {wanted}"


def _row_faults(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """The table as the first stage reads it, wherever in the file that is."""
    file, table = OnnxFile(artifact.path("front")), quantized.embed()
    try:
        codes = unpack(file.array("embed.codes"), table.bits, table.shape[1])  # uint8 [rows, hidden]
        yield from held.faults(table, HeldWeight(codes, file.array("embed.scales"), None, table.bits))
    except (InputError, KeyError) as error:
        yield str(error)


def _told_faults(artifact: Artifact, source: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """genai_config.json and the tokenizer; `source` has the graphs whose border can be read."""
    try:
        found = flat(_opened(read_json(artifact.path("genai"))))
    except InputError as error:
        yield str(error)
        return
    except (KeyError, TypeError, ValueError) as error:
        yield f"genai_config.json names no stages: {error!r}"
        return
    wanted = flat(_opened(_wanted(artifact, source, quantized)))
    for key in sorted(found.keys() | wanted.keys()):
        mine, theirs = (repr(side.get(key, "nothing")) for side in (found, wanted))
        if mine != theirs:
            yield f"genai_config.json says {key} {mine} instead of {theirs}"
    yield from readback_tokenizer.faults(artifact, quantized)


def _opened(told: Any) -> dict[str, Any]:
    """The same with each stage under its name, and their order for itself: genai runs them as they stand."""
    decoder = told["model"]["decoder"]
    (by_name,) = decoder["pipeline"]
    opened = decoder | {"pipeline": by_name, "order of the stages": list(by_name)}
    return told | {"model": told["model"] | {"decoder": opened}}


def _wanted(artifact: Artifact, source: Artifact, quantized: QuantizedCheckpoint) -> dict[str, Any]:
    """As genai's sources name the fields: greedy, one beam, the stages that the graphs are, these special tokens."""
    config, ends = quantized.config, list(quantized.config.eos_token_ids)
    caches = {"past_key_names": "past_keys.%d", "past_value_names": "past_values.%d"}
    tokens = {name: name for name in ("input_ids", "position_ids", "attention_mask")}
    return {
        "model": {
            "type": "decoder-pipeline",
            **({} if config.bos_token_id is None else {"bos_token_id": config.bos_token_id}),
            "eos_token_id": ends[0] if len(ends) == 1 else ends,
            "pad_token_id": padding(tokenizer_of(quantized), config),
            "vocab_size": config.vocab_size,
            "context_length": artifact.context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "num_hidden_layers": config.num_layers,
                "inputs": tokens | caches,
                "outputs": {"logits": "logits", "present_key_names": "keys.%d", "present_value_names": "values.%d"},
                "sliding_window": {
                    "window_size": artifact.chunk,
                    "pad_value": 0,
                    "alignment": "right",
                    "slide_key_value_cache": False,
                    "slide_inputs": True,
                },
                "pipeline": [_stages(artifact, source)],
            },
        },
        "search": {
            "do_sample": False,
            "max_length": artifact.context,
            "past_present_share_buffer": True,
            "num_beams": 1,
        },
    }


def _stages(artifact: Artifact, source: Artifact) -> dict[str, Any]:
    """Each graph of the source, in the order of the parts, with its own border; the files are the artifact's."""
    found = {"front": _stage(artifact.path("front"))}
    provider = provider_of(artifact)
    for pair in zip(*(zip(artifact.paths(g), source.paths(g), strict=True) for g in GRAPHS), strict=True):
        for (file, graph), when in zip(pair, ("run_on_token_gen", "run_on_prompt"), strict=True):
            stage = _stage(graph) | {"filename": file.name, when: False}
            if stage["outputs"] == HEAD and len(stage["inputs"]) == 1:
                stage["is_lm_head"] = True
            if provider is not None:
                options = {"log_id": "onnxruntime-genai", "provider_options": [{"QNN": provider}]}
                stage["session_options"] = options
            found[file.stem] = stage
    return found


def _stage(path: Path) -> dict[str, Any]:
    graph = OnnxFile(path).graph
    return {
        "filename": path.name,
        "inputs": [value.name for value in graph.input],
        "outputs": [value.name for value in graph.output],
    }
