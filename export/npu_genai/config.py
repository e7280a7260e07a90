"""genai_config.json of a `decoder-pipeline`: the stages in their order, what goes into each, and when it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bluelm.config import ModelConfig
from bluelm.errors import InputError, TargetError
from bluelm.text.tokenizer import Message, Tokenizer
from export.lowering.decoder import block_output
from export.lowering.parts import Part
from export.onnx.decoder import part_file

CONFIG, FRONT = "genai_config.json", "front.onnx"
LOG = "onnxruntime-genai"
PROBE = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
"""A chat that shows which marks a template writes."""


def pipeline_config(
    config: ModelConfig,
    parts: Sequence[Part],
    context: int,
    chunk: int,
    pad: int,
    provider: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What onnxruntime-genai reads beside the stages.

    Args:
        pad: the token that fills prompts up.
        provider: options of Qualcomm's plug-in, which runs all stages but the first; None: the CPU runs all.
    """
    ends = list(config.eos_token_ids)
    decoder = {
        "session_options": session(None),
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "num_hidden_layers": config.num_layers,
        "inputs": {
            "input_ids": "input_ids",
            "position_ids": "position_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_keys.%d",
            "past_value_names": "past_values.%d",
        },
        "outputs": {"logits": "logits", "present_key_names": "keys.%d", "present_value_names": "values.%d"},
        "sliding_window": {
            "window_size": chunk,
            "pad_value": 0,
            "alignment": "right",  # of the prompt: what fills it up stands in front
            "slide_key_value_cache": False,  # the graphs do
            "slide_inputs": True,
        },
        "pipeline": [stages(parts, provider)],
    }
    model = {
        "type": "decoder-pipeline",
        **({} if config.bos_token_id is None else {"bos_token_id": config.bos_token_id}),
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": pad,
        "vocab_size": config.vocab_size,
        "context_length": context,
        "decoder": decoder,
    }
    search = {"do_sample": False, "max_length": context, "past_present_share_buffer": True, "num_beams": 1}
    return {"model": model, "search": search}


def session(provider: Mapping[str, str] | None) -> dict[str, Any]:
    """Options of a stage's session: on the NPU with these of Qualcomm's plug-in, or on the CPU."""
    return {"log_id": LOG, "provider_options": [] if provider is None else [{"QNN": dict(provider)}]}


def stages(parts: Sequence[Part], provider: Mapping[str, str] | None) -> dict[str, Any]:
    """By name: the first stage, then for each part of the model prefill, which runs on prompts, and decode."""
    inputs, outputs = ["input_ids", "position_ids", "attention_mask"], ["hidden", "positions", "mask"]
    found: dict[str, Any] = {"front": {"filename": FRONT, "inputs": inputs, "outputs": outputs}}
    for index, part in enumerate(parts):
        for graph, other in (("prefill", "run_on_token_gen"), ("decode", "run_on_prompt")):
            file = part_file(f"{graph}.onnx", index, len(parts))
            takes, gives = _border(part)
            stage: dict[str, Any] = {"filename": file, "inputs": takes, "outputs": gives, other: False}
            if not part.layers:
                stage["is_lm_head"] = True  # only the last window of a prompt asks for logits
            if provider is not None:
                stage["session_options"] = session(provider)
            found[file.removesuffix(".onnx")] = stage
    return found


def _border(part: Part) -> tuple[list[str], list[str]]:
    """Inputs and outputs of a part's graphs."""
    kinds, layers = ("keys", "values"), part.layers
    takes = ["hidden" if part.embeds else block_output(part.first - 1)]
    gives = ["logits" if part.heads else block_output(part.last - 1)]
    if layers:
        takes += ["positions", "mask", *(f"past_{kind}.{layer}" for layer in layers for kind in kinds)]
        gives += [f"{kind}.{layer}" for layer in layers for kind in kinds]
    return takes, gives


def padding(tokenizer: Tokenizer | None, config: ModelConfig) -> int:
    """The token that fills prompts up: genai hides it wherever it stands, so no prompt may need it.

    Args:
        tokenizer: None where there is none; then there is no text that could need a token.

    Raises:
        TargetError: the vocabulary has none to spare.
    """
    needed: set[int | None] = {*config.eos_token_ids, config.bos_token_id}
    spare: list[int | None] = [config.pad_token_id]
    if tokenizer is None:
        spare += range(config.vocab_size)
    else:
        needed |= _written(tokenizer)
        marks = (tokenizer.pieces.id(text) for text in tokenizer.pieces.special())
        spare += [tokenizer.pad, *sorted(token for token in marks if token is not None)]
    for token in spare:
        if token is not None and token not in needed and 0 <= token < config.vocab_size:
            return token
    raise TargetError(
        "onnxruntime-genai fills prompts up with a token that no prompt needs, and every mark of this vocabulary is "
        "needed",
        where=None if tokenizer is None else tokenizer.source,
        fix="use --runtime qnn-context, which fills nothing up",
    )


def _written(tokenizer: Tokenizer) -> set[int | None]:
    """Marks that begin or end a text, and all that the template writes."""
    found: set[int | None] = {tokenizer.bos, tokenizer.eos, *tokenizer.front}
    if tokenizer.template is not None:
        try:
            found |= set(tokenizer.chat(PROBE))
        except InputError:  # a template of one turn
            found |= set(tokenizer.chat(PROBE[:1]))
    return found
