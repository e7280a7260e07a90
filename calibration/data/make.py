"""Make the bundled calibration set, calibration/data/default.jsonl.

    python calibration/data/make.py FOLDER

FOLDER holds corpus_train.jsonl.gz (`source`, `text`), which the demo was trained on too. Only sources that may be
redistributed are taken (see NOTICE beside the file). The same input gives the same bytes.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

Record = dict[str, str]
HERE = Path(__file__).parent
CALIBRATION = HERE / "default.jsonl"
FENCE = re.compile(r"^[ \t]*```.*?^[ \t]*```[ \t]*\n?", re.DOTALL | re.MULTILINE)
PASSAGE = 4000  # characters of one plain document, cut at a blank line


def main(folder: Path) -> None:
    rng = random.Random(0)
    train = read_corpus(folder / "corpus_train.jsonl.gz")
    calibration = [
        record
        for source, form, budget in calibration_plan()
        for record in take(shuffled(train[source], rng), form, budget, source)
    ]
    write_jsonl(CALIBRATION, calibration)


def calibration_plan() -> list[tuple[str, Callable[[str], Iterator[Record]], int]]:
    """(source, form, UTF-8 bytes): about 600 kB, plain and as conversations."""
    return [
        ("d2l_zh", plain, 110_000),
        ("d2l_zh", explanation, 40_000),
        ("d2l_zh", code_answer, 20_000),
        ("rust_zh", plain, 70_000),
        ("rust_zh", explanation, 25_000),
        ("rust_zh", code_answer, 15_000),
        ("vue_zh", plain, 60_000),
        ("vue_zh", explanation, 15_000),
        ("vue_zh", code_answer, 15_000),
        ("poetry", plain, 40_000),
        ("poetry", recitation, 30_000),
        ("shakespeare", plain, 70_000),
        ("gsm8k", conversation, 110_000),
    ]


def plain(text: str) -> Iterator[Record]:
    """The beginning of a document, at most PASSAGE characters."""
    if len(text) > PASSAGE:
        cut = text.rfind("\n\n", PASSAGE // 2, PASSAGE)
        text = text[: cut if cut > 0 else PASSAGE]
    yield {"text": text}


def conversation(text: str) -> Iterator[Record]:
    """A document that already is one turn, `[|Human|]:…[|AI|]:…`, without the marks."""
    prompt, _, response = text.removeprefix("[|Human|]:").partition("[|AI|]:")
    yield {"prompt": prompt, "response": response}


def recitation(text: str) -> Iterator[Record]:
    """A poem (title, author, lines) as the answer to a request for it."""
    title, _, rest = text.partition("\n")
    author, _, lines = rest.partition("\n")
    if title and author and lines.strip():
        yield {"prompt": f"请背诵{author}的《{title}》。", "response": lines.strip()}


def explanation(text: str) -> Iterator[Record]:
    """The first section under a heading, as the answer to a question about that heading."""
    for heading, body in re.findall(r"^## ([^\n{]+)[^\n]*\n(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE):
        answer = FENCE.sub("", body).strip()
        if 200 <= len(answer) <= 1500:
            yield {"prompt": f"请介绍一下：{heading.strip()}", "response": answer}
            return


def code_answer(text: str) -> Iterator[Record]:
    """A fenced piece of code, as the answer to the paragraph before it."""
    for match in FENCE.finditer(text):
        before = FENCE.sub("", text[: match.start()]).strip().rsplit("\n\n", 1)[-1].strip()
        if 15 <= len(before) <= 300 and len(match[0]) >= 120:
            yield {"prompt": f"{before}\n请写出相应的代码。", "response": match[0].strip()}
            return


def take(texts: Iterable[str], form: Callable[[str], Iterator[Record]], budget: int, source: str) -> list[Record]:
    """Records of one form until their bytes reach the budget."""
    records: list[Record] = []
    size = 0
    for text in texts:
        for record in form(text):
            records.append({"source": source, **record})
            size += sum(len(part.encode()) for part in record.values())
        if size >= budget:
            break
    return records


def shuffled(texts: list[str], rng: random.Random) -> list[str]:
    return rng.sample(texts, len(texts))


def read_corpus(path: Path) -> dict[str, list[str]]:
    """Texts by source, in the file's order."""
    texts: dict[str, list[str]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            texts.setdefault(record["source"], []).append(record["text"])
    return texts


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
