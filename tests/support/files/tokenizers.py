"""Small byte-level tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from bluelm.system.files import demo_checkpoint
from bluelm.text.tokenizer import Tokenizer

ROWS = 330


# what tokenizer.json of Qwen2 and of Llama-3 cut by, as transformers has them
EXPRESSIONS = {"qwen2": PRETOKENIZE_REGEX, "llama-bpe": PRETOKENIZE_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")}


def write_tokenizer(folder: Path, kind: str) -> None:
    """A small tokenizer of Qwen2's or Llama-3's form, the second with its begin token in front of every text."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Json

    made: Any = Json(models.BPE())
    split = pre_tokenizers.Split(Regex(EXPRESSIONS[kind]), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([
        split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ])  # fmt: skip
    made.decoder = decoders.ByteLevel()
    options: Any = {"vocab_size": 320, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    corpus = [*(demo_checkpoint() / "README.md").read_text().splitlines(), *["123 45"] * 40]
    made.train_from_iterator(corpus, trainers.BpeTrainer(**options))
    made.add_special_tokens(["<|end|>", "<|begin|>"])
    made.add_tokens(["plain-added"])
    names = {"eos_token": "<|end|>"}
    if kind == "llama-bpe":
        begin = ("<|begin|>", made.token_to_id("<|begin|>"))
        made.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])
        names["bos_token"] = "<|begin|>"
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def streamed(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token) for token in tokens), stream.flush()]
