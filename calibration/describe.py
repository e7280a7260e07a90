"""Describes a calibration set: its languages and kinds of text, and what is missing for a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bluelm.text.tokenizer import Tokenizer

LEAST_SHARE = 0.05  # a language below this share of the set, or of the vocabulary, counts as missing
PIECES_LOOKED_AT = 4096
MOST_FOREIGN = 0.1  # of a text, in another language

HAN = re.compile(r"[㐀-䶿一-鿿豈-﫿\U00020000-\U0003ffff]")
LATIN = re.compile(r"[A-Za-z]")
FENCE = re.compile(r"^[ \t]*```.*?(?:^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
CODE_LINE = re.compile(
    r"^\s*(?:def |class |import |from \S+ import |#include|return\b.*[;()]|(?:pub )?fn |let |const |var |func )"
    r"|^(?=.*[=(){}<>\[\]]).*[;{}]\s*$"
    r"|^\s*</?[a-zA-Z][^>]*>\s*$"
)


@dataclass(frozen=True)
class Shares:
    """Parts of a text by UTF-8 bytes of letters: Chinese, English (Latin letters) and code; sum at most 1."""

    chinese: float
    english: float
    code: float


def shares(texts: Iterable[str]) -> Shares:
    """Letters inside code count as code; digits, punctuation and white space of prose count for nothing."""
    chinese = english = code = other = 0
    for text in texts:
        prose, code_bytes = _without_code(text)
        code += code_bytes
        han, latin = len(HAN.findall(prose)), len(LATIN.findall(prose))
        chinese += 3 * han
        english += latin
        other += sum(len(c.encode()) for c in prose if c.isalpha()) - 3 * han - latin
    total = max(1, chinese + english + code + other)
    return Shares(chinese / total, english / total, code / total)


def _without_code(text: str) -> tuple[str, int]:
    """(prose, UTF-8 bytes of code): fenced code, and lines that read like code."""
    prose = FENCE.sub("", text)
    lines = prose.split("\n")
    kept = [line for line in lines if not CODE_LINE.search(line)]
    code = len(text.encode()) - len(prose.encode()) + sum(len(x.encode()) for x in lines if CODE_LINE.search(x))
    return "\n".join(kept), code


def model_languages(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Languages that a model was made for, as its vocabulary shows: pieces were spent on them."""
    step = max(1, tokenizer.vocab_size // PIECES_LOOKED_AT)
    pieces = [tokenizer.decode([token]) for token in range(0, tokenizer.vocab_size, step)]
    scripts = (("Chinese", HAN), ("English", LATIN))
    return tuple(
        name for name, script in scripts if sum(map(bool, map(script.search, pieces))) >= LEAST_SHARE * len(pieces)
    )


@dataclass(frozen=True)
class Chosen:
    """What a model takes of a bundled set.

    Attributes:
        kept: indices of its texts. name: what the set is called now. notes: what a user should know of it.
    """

    kept: tuple[int, ...]
    name: str
    notes: tuple[str, ...]


def in_languages(texts: Sequence[str], languages: tuple[str, ...], what: str) -> Chosen:
    """The texts of a bundled set without those of which more than `MOST_FOREIGN` is in another language.

    Args:
        languages: that the model was made for; none known: every text is kept.
        what: the set, as a sentence's subject.
    """
    foreign = {"Chinese", "English"} - set(languages) if languages else set[str]()
    kept, gone = list[int](), set[str]()
    for index, text in enumerate(texts):
        part = shares([text]) if foreign else Shares(0, 0, 0)
        held = {"Chinese": part.chinese, "English": part.english}
        found = {language for language in foreign if held[language] > MOST_FOREIGN}
        gone |= found
        kept += [] if found else [index]
    name = " ".join(["bundled", *(f"without {language}" for language in sorted(gone))])
    notes = tuple(
        f"{what} is the bundled one without its {language} text: the model's vocabulary holds hardly any {language}"
        for language in sorted(gone)
    )
    return Chosen(tuple(kept), name, notes)


def warnings(found: Shares, chat: float, languages: tuple[str, ...]) -> list[str]:
    """What is missing from a set for a model of these languages; chat: share of tokens in conversations."""
    lines = [
        f"the calibration set holds hardly any {language} ({share:.1%}), a language of this model; "
        "quantizing will favour the others: add some"
        for language, share in (("Chinese", found.chinese), ("English", found.english))
        if language in languages and share < LEAST_SHARE
    ]
    if chat == 0:
        lines.append(
            "the calibration set holds no conversation in the model's chat template: add `messages` or "
            "`prompt`/`response` records if the model is used for chat"
        )
    return lines
