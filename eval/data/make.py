"""Make the bundled evaluation set, eval/data/heldout.jsonl, and what the tests know of the demo's training text.

    python -m eval.data.make CORPUS CLONES

CORPUS holds corpus_train.jsonl.gz (what the demo was trained on: `source`, `text`), corpus_heldout.jsonl.gz and
HumanEval.jsonl.gz. CLONES holds git repositories under the names of CLONED, whose files are read at the commits named
there. Only sources that may be redistributed are taken (see NOTICE).

Every document is short, so that none outweighs the others: an error is told from how documents differ. Documents that
share more than a few sequences of 8 words with the demo's training text or the calibration set are left out; it is an
error if a domain then still shares MOST of its sequences. The same input gives the same bytes.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from eval.overlap import SAMPLED, digests, pack, shared

Record = dict[str, str]
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
HELDOUT = HERE / "heldout.jsonl"
TRAINED_ON = ROOT / "tests" / "data" / "demo_training.8grams"
CALIBRATION = ROOT / "calibration" / "data" / "default.jsonl"
CLONED = {  # folder in CLONES, commit
    "rust_examples_zh": ("rust-by-example-cn", "94ef6ea187d7de79e569ce59e8250090e8be2289"),
    "mmengine_zh": ("mmengine", "254342938d9bde1775c39ea7d5181c5d294026c4"),
    "union": ("datasets-sotu", "3fe128bad40ad366f8696b7ca25f825ca36869ef"),
}
MOST = 0.01  # share of a domain's sequences
MOST_OF_DOCUMENT = 0.02
LONGEST, SHORTEST = 1400, 200  # characters of a document; a poem may be shorter
FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```[ \t]*\n?", re.DOTALL | re.MULTILINE)
COUNTS = {  # (source, domain): documents at most
    ("poetry", "zh"): 110,
    ("mmengine_zh", "zh"): 50,
    ("rust_examples_zh", "zh"): 60,
    ("shakespeare", "en"): 4,
    ("union", "en"): 45,
    ("humaneval", "code"): 45,
    ("rust_examples_zh", "code"): 45,
    ("mmengine_zh", "code"): 25,
    ("gsm8k", "math"): 100,
}


def main(corpus: Path, clones: Path) -> None:
    training = (record["text"] for record in read_gz(corpus / "corpus_train.jsonl.gz"))
    trained_on = {digest for text in training for digest in digests(text)}
    TRAINED_ON.write_bytes(pack(trained_on))
    calibration = map(json.loads, CALIBRATION.read_text(encoding="utf-8").rstrip("\n").split("\n"))
    calibrated = {d for r in calibration for key, text in r.items() if key != "source" for d in digests(text)}
    records = list(chosen(candidates(corpus, clones), trained_on | calibrated))
    for domain in sorted({record["domain"] for record in records}):
        texts = [content(record) for record in records if record["domain"] == domain]
        shares = [shared(texts, seen) for seen in (trained_on, calibrated)]
        size = sum(map(len, texts))
        print(f"{domain}: {len(texts)} documents, {size:,} characters; of their 8-grams {shares[0]:.2%} in the demo's "
              f"training text, {shares[1]:.2%} in the calibration set")  # fmt: skip
        if max(shares) >= MOST:
            sys.exit(f"{domain} shares too much")
    HELDOUT.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    print(f"{len(trained_on):,} sequences of the training text, one in {SAMPLED} kept")


def candidates(corpus: Path, clones: Path) -> Iterator[Record]:
    """All documents that could be taken, cut to size."""
    for record in read_gz(corpus / "corpus_heldout.jsonl.gz"):
        source, text = record["source"], record["text"]
        if source == "poetry":
            yield {"source": source, "domain": "zh", "text": text}
        elif source == "shakespeare":
            yield {"source": source, "domain": "en", "text": beginning(text)}
        elif source == "gsm8k":
            prompt, _, response = text.removeprefix("[|Human|]:").partition("[|AI|]:")
            yield {"source": source, "domain": "math", "prompt": prompt, "response": response}
    for record in read_gz(corpus / "HumanEval.jsonl.gz"):
        yield {"source": "humaneval", "domain": "code", "text": record["prompt"] + record["canonical_solution"]}
    for text in files(clones, "union", r"data/\d+_\w+\.txt"):
        yield {"source": "union", "domain": "en", "text": beginning(text[text.index(". ", len(text) // 2) + 2 :])}
    for source, pattern in (("mmengine_zh", r"docs/zh_cn/\w+/.*\.md"), ("rust_examples_zh", r"src/.+/.*\.md")):
        for text in files(clones, source, pattern):
            prose = beginning(re.sub(r"\n{3,}", "\n\n", FENCE.sub("", text)).strip())
            code = beginning("\n".join(match[1].rstrip() + "\n" for match in FENCE.finditer(text)))
            yield from ({"source": source, "domain": d, "text": t} for d, t in (("zh", prose), ("code", code)))


def chosen(records: Iterable[Record], seen: Collection[int]) -> Iterator[Record]:
    """At most COUNTS of those that are long enough and share little with what was seen, in a fixed random order."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        text = content(record)
        long_enough = len(text) >= SHORTEST or record["source"] == "poetry"
        if long_enough and shared([text], seen) < MOST_OF_DOCUMENT:
            groups.setdefault((record["source"], record["domain"]), []).append(record)
    for key, count in COUNTS.items():
        found = groups[key]
        yield from random.Random(0).sample(found, min(count, len(found)))


def content(record: Record) -> str:
    """The text of a record, of whichever shape."""
    return "\n".join(text for key, text in record.items() if key not in ("source", "domain"))


def beginning(text: str) -> str:
    """At most LONGEST characters, cut at the end of a paragraph or a line."""
    if len(text) <= LONGEST:
        return text
    ends = (text.rfind(end, LONGEST // 2, LONGEST) + len(end.rstrip(" ")) for end in ("\n\n", "\n", ". "))
    return text[: next((end for end in ends if end >= LONGEST // 2), LONGEST)].rstrip()


def files(clones: Path, source: str, pattern: str) -> Iterator[str]:
    """Texts of a repository's files whose paths match, in the order of their names."""
    folder, commit = CLONED[source]
    git = ["git", f"--git-dir={clones / folder}"]
    listed = subprocess.run([*git, "ls-tree", "-r", "--name-only", commit], check=True, capture_output=True, text=True)
    for path in sorted(listed.stdout.split("\n")):
        if re.fullmatch(pattern, path):
            yield subprocess.run([*git, "show", f"{commit}:{path}"], check=True, capture_output=True, text=True).stdout


def read_gz(path: Path) -> Iterator[Record]:
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        yield from map(json.loads, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
