"""Tokenizers of a vocabulary that is made of one text: for what depends on a model's languages."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def write_tokenizer(folder: Path, text: str) -> None:
    """A byte-level tokenizer.json, as GPT-2's, with pieces of this text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)  # pyright: ignore[reportCallIssue]
    made.train_from_iterator([text] * 4, trainer)
    made.save(str(folder / "tokenizer.json"))
