"""A .litertlm read back: the graph as LiteRT's is, and each section against the checkpoint's own files."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bluelm.errors import InputError
from bluelm.text.sentencepieces import SentencePieces
from bluelm.text.tokenizer import Tokenizer
from compress.checkpoint.store import EMBED, HEAD, QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.litert.readback import constant_faults, found_in, graph_faults, graph_inputs
from export.readback import items
from export.tokenizer.readback import begin_faults, table_faults

if TYPE_CHECKING:
    from export.litert.file import LitertModel
    from export.litert_lm.reader import LitertLmFile

VERSION = (1, 7, 0)
SECTIONS: tuple[tuple[str, dict[str, str]], ...] = (
    ("TFLiteModel", {"model_type": "tf_lite_prefill_decode", "prefer_activation_type": "fp32"}),
    ("HF_Tokenizer_Zlib", {}),
    ("LlmMetadataProto", {}),
)
CHATS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "你好"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b\n"}, {"role": "user", "content": "c"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "a b"}],
)
"""Those that a template refuses, it must refuse behind what stands before it as well."""


def findings(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[items.Finding]:
    """Of every item of the inventory.

    Raises:
        InputError: the file cannot be read.
    """
    from export.litert_lm import graph
    from export.litert_lm.reader import LitertLmFile

    file, blocks = LitertLmFile(artifact.path("model")), quantized.config.num_layers
    model, slots = file.model(blocks), artifact.context + artifact.chunk

    def lower(new: LitertModel, held: QuantizedCheckpoint) -> Iterator[str]:
        return graph.lower(new, held, artifact.context, artifact.chunk)

    told = graph_faults(file.model(blocks), quantized, lower)
    told[items.TELLS] += _tell_faults(file, artifact, quantized)
    told |= {items.CONTEXT: [], items.CACHE: []}
    most = file.metadata().max_num_tokens
    if most != artifact.context:
        told[items.CONTEXT].append(f"{most} instead of {artifact.context}")
    for name, tensor in graph_inputs(model):
        if name == "mask" and tensor.shape[-1] != slots:
            told[items.CONTEXT].append(f"{tensor.shape[-1]} slots instead of {slots}")
        if name.startswith("kv_cache_") and tensor.type != 0:  # FLOAT32 of the schema
            told[items.CACHE].append(f"{name} is of type {tensor.type} instead of 0")
    yield from found_in(told, _constants(model, artifact, quantized))
    yield from items.right(items.MASK)  # LiteRT-LM's own, of no file


def _constants(model: Any, artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[tuple[str, str]]:
    """A table that is the head as well is judged for both."""
    for item, fault in constant_faults(model, artifact.context, quantized):
        yield item, fault
        if item == EMBED and HEAD not in quantized.linears:
            yield HEAD, fault


def _tell_faults(file: LitertLmFile, artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[str]:
    """Header, tokenizer, and metadata without the context."""
    tokenizer = Tokenizer.from_folder(quantized.folder)
    if file.version != VERSION:
        yield f"the container is of version {'.'.join(map(str, file.version))}"
    found = tuple((section.kind, dict(section.items)) for section in file.sections)
    if found != SECTIONS:
        yield f"it has the sections {found} instead of {SECTIONS}"
    made = {
        "uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, quantized.digest())),
        "creation_timestamp": "1970-01-01T00:00:00+00:00",
    }
    for key in sorted(file.entries.keys() | made.keys() | artifact.about.keys()):
        mine, theirs = file.entries.get(key), {**artifact.about, **made}.get(key)
        if mine != theirs:
            yield f"the header says {key} {mine!r} instead of {theirs!r}"
    yield from _tokenizer_faults(file, tokenizer)
    yield from _metadata_faults(file.metadata(), quantized, tokenizer)


def _tokenizer_faults(file: LitertLmFile, tokenizer: Tokenizer) -> Iterator[str]:
    """Of a tokenizer.json that is the checkpoint's own, or made of its tokenizer.model."""
    try:
        if not isinstance(tokenizer.pieces, SentencePieces):
            if file.tokenizer() != tokenizer.source.read_bytes():
                yield "the tokenizer is not the checkpoint's"
            return
        table = file.table()
        yield from begin_faults(table, tokenizer)
        yield from table_faults({**table, "post_processor": None}, tokenizer.source, whole=True)
    except InputError as error:
        yield str(error)
    except (KeyError, TypeError, AttributeError) as error:
        yield f"the tokenizer cannot be followed: {error!r}"


def _metadata_faults(told: Any, quantized: QuantizedCheckpoint, tokenizer: Tokenizer) -> Iterator[str]:
    """Every field: what begins a text, every end token, the template, and nothing else."""
    known = {"start_token", "stop_tokens", "max_num_tokens", "llm_model_type", "jinja_prompt_template"}
    more = sorted({field.name for field, _ in told.ListFields()} - known)
    if more:
        yield f"the metadata says {', '.join(more)}"
    if told.llm_model_type.WhichOneof("model_type") != "generic_model":
        yield "the metadata names a model that has rules of its own"
    begin = list(told.start_token.token_ids.ids)
    if begin != list(tokenizer.front) or told.start_token.token_str:
        yield f"a text begins with {begin} instead of {list(tokenizer.front)}"
    ends = {*quantized.config.eos_token_ids, *([] if tokenizer.eos is None else [tokenizer.eos])}
    stops = [list(token.token_ids.ids) for token in told.stop_tokens]
    if sorted(stops) != [[token] for token in sorted(ends)] or any(token.token_str for token in told.stop_tokens):
        yield f"it stops at {stops} instead of {sorted(ends)}"
    yield from _template_faults(told, tokenizer)


def _template_faults(told: Any, tokenizer: Tokenizer) -> Iterator[str]:
    """The checkpoint's template at its end; and chats in it, their contents as text and in parts, without names of
    tokens and without what begins a text, which LiteRT-LM puts there."""
    template, source = tokenizer.template, told.jinja_prompt_template
    if template is None or not source.endswith(template.select()):
        if template is not None or source:
            yield "it has another chat template"
        return
    held = type(template)({"default": source}, template.where)
    begin = "".join(tokenizer.pieces.text(token) or "" for token in tokenizer.front)
    for chat in CHATS:
        wanted = _rendered(template, chat)
        parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in chat]
        for given in (chat, parts):
            found = _rendered(held, given)
            if wanted is None and found is None:
                continue
            if found is None or wanted is None or begin + found != wanted:
                yield f"a chat is {json.dumps(found)[:80]} behind {begin!r} instead of {json.dumps(wanted)[:80]}"


def _rendered(template: Any, chat: list[dict[str, Any]]) -> str | None:
    """None where the template refuses the chat."""
    try:
        return template.render(chat, add_generation_prompt=True)
    except InputError:
        return None
