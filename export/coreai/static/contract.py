"""What Apple's engine for the Neural Engine asks of a program: names, forms, and what follows from its rules.

Rules: `StaticShapeEngine` (CoreAIStaticShapeEngine.swift) and `ModelStructure.swift` of github.com/apple/coreai-models
86b363d; names of the inputs, and layouts of what a chip and its host share: `BaseForCausalLMForiOS` there.

    load_embeddings()                        -> embedding_table int8 [rows, 1, hidden]
    gather_embeddings_N(in_new_token_ids int32 [1, N], embedding_table) -> gathered_embeddings [1, N, 1, hidden]
    extend_C_N(transformer_input [1, N, 1, hidden], position_ids uint16 [1, N], in_step int32 [1],
               causal_mask [1, C, 1, N]; key_cache, value_cache [layers, 1, channels, 1, C])
                                             -> out_logits [1, 1, N, vocab]
    prompt_opt_C_N(the same)                 -> out_logits: one number that nobody reads

C is the context; numbers are float16 where nothing else is said. The engine takes the smallest N that holds what is
left of a prompt, else the largest, and begins each step at a multiple of its N: tokens before that are computed again.
While more than the largest N are left it calls `prompt_opt`.
"""

from __future__ import annotations

from collections.abc import Sequence

from bluelm.config import ModelConfig
from bluelm.errors import TargetError

LOAD, TABLE = "load_embeddings", "embedding_table"
TOKENS, GATHERED = "in_new_token_ids", "gathered_embeddings"
STREAM, POSITIONS, STEP, MASK = "transformer_input", "position_ids", "in_step", "causal_mask"
KEYS, VALUES, LOGITS = "key_cache", "value_cache", "out_logits"
HIDDEN_SCORE = -40000.0
"""In the mask that the engine makes, where a token is not seen."""
INTERLEAVE = 8
"""Channels of a cache, and rows of the table, that lie side by side in memory."""
MOST_POSITIONS = 2**16


def lengths(chunk: int) -> tuple[int, ...]:
    """The N of the functions: one token, and a chunk of a prompt."""
    return tuple(sorted({1, chunk}))


def gather(tokens: int) -> str:
    """Name of the function that looks up so many tokens."""
    return f"gather_embeddings_{tokens}"


def extend(context: int, tokens: int) -> str:
    """Name of the function that takes so many tokens and gives logits."""
    return f"extend_{context}_{tokens}"


def prompt(context: int, tokens: int) -> str:
    """Name of the function that takes so many tokens of a prompt that goes on."""
    return f"prompt_opt_{context}_{tokens}"


def table_rows(vocab: int) -> int:
    """Rows of the embedding table: those of the vocabulary and, up to a multiple of `INTERLEAVE`, some of zeros."""
    return -(-vocab // INTERLEAVE) * INTERLEAVE


def chosen(context: int, sizes: Sequence[int], left: int, last_alone: bool) -> tuple[str, int]:
    """The function for a step with so many tokens left, and its N.

    Args:
        last_alone: logits of the last token are asked for alone, as the engine asks; else of each.
    """
    tokens = next((size for size in sorted(sizes) if size >= left), max(sizes))
    return (prompt if last_alone and left > max(sizes) else extend)(context, tokens), tokens


def check_lengths(config: ModelConfig, context: int, chunk: int) -> None:
    """TargetError unless the engine opens a program of these lengths."""
    channels = config.num_kv_heads * config.head_dim
    if context % chunk:
        raise TargetError(
            f"a prefill chunk of {chunk} tokens does not divide a context of {context}: Apple's engine begins each "
            "step at a multiple of the chunk",
            fix=f"choose --chunk {_divisor(context, chunk)}, or a context that is a multiple of the chunk",
        )
    if context > MOST_POSITIONS:
        raise TargetError(f"a context of {context} tokens: positions have 16 bits", fix=f"--context {MOST_POSITIONS}")
    if context < (longest := max(channels, config.num_layers)):
        raise TargetError(
            f"a context of {context} tokens beside caches of {channels} channels and {config.num_layers} layers: "
            "Apple's engine takes the longest axis of a cache for the context",
            fix=f"choose --context {-(-longest // chunk) * chunk} or more, or --runtime coreai",
        )
    if channels % INTERLEAVE:
        problem = f"caches of {channels} channels, which are no multiple of {INTERLEAVE}"
        raise TargetError(problem, fix="use --runtime coreai")


def _divisor(context: int, chunk: int) -> int:
    """The largest one of the context that is no longer than the chunk."""
    return next(size for size in range(chunk, 0, -1) if context % size == 0)
