"""What LiteRT-LM is told of a model: `LlmMetadata` (its runtime/proto/llm_metadata.proto), and the header's entries."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from litert_lm_builder.runtime.proto import llm_metadata_pb2

from bluelm.text.tokenizer import Tokenizer
from compress.checkpoint.store import QuantizedCheckpoint
from export.litert_lm.template import runner_template

_pb2: Any = llm_metadata_pb2  # generated at run time
ABOUT = ("name", "license", "version")
CREATED = "1970-01-01T00:00:00+00:00"


def llm_metadata(quantized: QuantizedCheckpoint, tokenizer: Tokenizer, context: int) -> bytes:
    """Begin token, every end token, context, chat template."""
    told = _pb2.LlmMetadata()
    told.llm_model_type.generic_model.SetInParent()
    told.start_token.token_ids.ids.extend(tokenizer.front)
    if not tokenizer.front:
        told.ClearField("start_token")
    for token in end_tokens(quantized, tokenizer):
        told.stop_tokens.add().token_ids.ids.append(token)
    told.max_num_tokens = context
    template = runner_template(tokenizer)
    if template is not None:
        told.jinja_prompt_template = template
    return told.SerializeToString(deterministic=True)


def end_tokens(quantized: QuantizedCheckpoint, tokenizer: Tokenizer) -> list[int]:
    """The model's, and the tokenizer's own."""
    ends = list(quantized.config.eos_token_ids)
    return ends + ([] if tokenizer.eos is None or tokenizer.eos in ends else [tokenizer.eos])


def entries(quantized: QuantizedCheckpoint, about: Mapping[str, str]) -> dict[str, str]:
    """Of the header. Its builder draws a uuid and asks the clock: here both follow from the model."""
    told = {key: about[key] for key in ABOUT if key in about}
    return {"uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, quantized.digest())), "creation_timestamp": CREATED, **told}
