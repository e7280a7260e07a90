"""Whether texts share sequences of 8 words with others: what was trained on is no held-out text.

A word is a run of letters and digits in lower case, or one Chinese character; punctuation and white space count for
nothing, as in the contamination tests of Brown et al., Language Models are Few-Shot Learners, 2020, appendix C.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Collection, Iterable, Iterator

WORDS = 8
SAMPLED = 16  # one sequence in so many is kept for later
WORD = re.compile(r"[㐀-䶿一-鿿豈-﫿]|[^\W_㐀-䶿一-鿿豈-﫿]+")


def digests(text: str) -> Iterator[int]:
    """32 bits for every sequence of WORDS words of a text."""
    words = WORD.findall(text.lower())
    for i in range(len(words) - WORDS + 1):
        joined = " ".join(words[i : i + WORDS])
        yield int.from_bytes(hashlib.blake2b(joined.encode(), digest_size=4).digest(), "big")


def shared(texts: Iterable[str], seen: Collection[int], every: int = 1) -> float:
    """Share of the texts' sequences that are among those seen; 0 where there is none.

    Args:
        every: look only at the one in so many that a sampled set (`unpack`) may hold.
    """
    found = [digest in seen for text in texts for digest in digests(text) if digest % every == 0]
    return sum(found) / len(found) if found else 0.0


def pack(seen: Iterable[int]) -> bytes:
    """One in SAMPLED of the sequences, as compressed distances of 7 bits a byte."""
    packed = bytearray()
    before = 0
    for digest in sorted({d // SAMPLED for d in seen if d % SAMPLED == 0}):
        distance, before = digest - before, digest
        while distance > 127:
            packed.append(128 | distance & 127)
            distance >>= 7
        packed.append(distance)
    return zlib.compress(bytes(packed), 9)


def unpack(data: bytes) -> frozenset[int]:
    """What `pack` kept."""
    found: set[int] = set()
    digest = distance = shift = 0
    for byte in zlib.decompress(data):
        distance |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            digest, distance, shift = digest + distance, 0, 0
            found.add(digest * SAMPLED)
    return frozenset(found)
