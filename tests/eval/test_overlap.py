"""The bundled evaluation set is held out: what it shares with the demo's training text and the calibration set."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from calibration.sources import BUNDLED, document, read_texts
from eval.heldout import BUNDLED as HELDOUT
from eval.overlap import SAMPLED, WORD, digests, pack, shared, unpack

TRAINED_ON = Path(__file__).parents[1] / "data" / "demo_training.8grams"  # made by eval/data/make.py
LEAST = 1 / 100


def domains() -> Iterator[tuple[str, list[str]]]:
    found = defaultdict(list)
    for line in HELDOUT.read_text(encoding="utf-8").rstrip("\n").split("\n"):
        record = json.loads(line)
        found[record["domain"]].append(document(record, "").content)
    yield from found.items()


def test_words_are_letters_digits_or_one_chinese_character() -> None:
    assert WORD.findall("for i in Range(10): 打印 x_1") == ["for", "i", "in", "Range", "10", "打", "印", "x", "1"]
    text = "one two, three four five six. Seven EIGHT nine"
    assert list(digests(text)) == list(digests("ONE two three four (five) six seven eight\nnine"))
    assert len(list(digests(text))) == 2


def test_sampled_sequences_come_back() -> None:
    texts = [" ".join(str(n * k) for n in range(3000)) for k in (1, 7)]
    seen = {d for text in texts for d in digests(text)}
    kept = unpack(pack(seen))
    assert kept == {d for d in seen if d % SAMPLED == 0}
    assert shared(texts[:1], kept, SAMPLED) == 1
    other = " ".join(str(n * 11) for n in range(3000))
    assert shared([texts[0], other], kept, SAMPLED) == pytest.approx(0.5, abs=0.1)
    assert shared([other], kept, SAMPLED) < 0.01


@pytest.mark.parametrize(("domain", "texts"), domains())
def test_hardly_anything_was_trained_on(domain: str, texts: list[str]) -> None:
    """One in 16 sequences of the training text is known here; at least 400 of each domain are looked for."""
    seen = unpack(TRAINED_ON.read_bytes())
    assert sum(d % SAMPLED == 0 for text in texts for d in digests(text)) > 400
    assert shared(texts, seen, SAMPLED) < LEAST


@pytest.mark.parametrize(("domain", "texts"), domains())
def test_hardly_anything_is_calibrated_on(domain: str, texts: list[str]) -> None:
    seen = {d for found in read_texts(None).documents for d in digests(found.content)}
    assert shared(texts, seen) < LEAST


def test_the_calibration_set_was_trained_on() -> None:
    """So the sequences are those of the training text: what it holds is found."""
    seen = unpack(TRAINED_ON.read_bytes())
    assert shared([found.text for found in read_texts([BUNDLED]).documents if found.text], seen, SAMPLED) > 0.95


def test_no_document_outweighs_the_others() -> None:
    sizes = [len(text) for _, texts in domains() for text in texts]
    assert len(sizes) > 400
    assert max(sizes) < 0.01 * sum(sizes)
