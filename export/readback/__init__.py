"""Readback: whether a finished artifact's files hold the quantized checkpoint, complete and unchanged.

What must be held is the inventory (`export/readback/items.py`) and what lies beside (`export/readback/beside.py`);
a module a format says of each item whether it is right, wrong, or not told by the format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.formats import Without, function
from export.readback import beside
from export.readback.beside import config_faults
from export.readback.held import listed, same
from export.readback.items import GRAPH, Finding, Reader, inventory, linear_names, untold, weight_names

__all__ = [
    "Finding", "ReadBack", "config_faults", "differing", "linear_names", "listed", "read_back", "readable",
    "same", "weight_names",
]  # fmt: skip


@dataclass(frozen=True)
class ReadBack:
    """What an artifact's files tell of a checkpoint.

    Attributes:
        wrong: what is not the checkpoint's; also items that a reader said nothing of.
        untold: what the files do not tell.
    """

    wrong: tuple[Finding, ...]
    untold: tuple[Finding, ...] = ()

    @property
    def sentences(self) -> list[str]:
        """What is not told, a sentence a reason."""
        reasons: dict[str, list[str]] = {}
        for finding in self.untold:
            reasons.setdefault(finding.told, []).append(finding.item)
        return [f"{listed(items)}: {reason}" for reason, items in reasons.items()]


def read_back(artifact: Artifact, quantized: QuantizedCheckpoint) -> ReadBack:
    """Hold all that the artifact's files hold against the checkpoint.

    Raises:
        InputError: a file is damaged so that it cannot be read at all.
    """
    found = list(_followed(_reader(artifact), artifact, quantized))
    said = {finding.item for finding in found}
    forgotten = [Finding(item, "wrong", "was not read back") for item in inventory(artifact, quantized)]
    found += [finding for finding in forgotten if finding.item not in said]
    found += _followed(beside.findings, artifact, quantized)
    wrong, not_told = (tuple(dict.fromkeys(f for f in found if f.state == state)) for state in ("wrong", "untold"))
    return ReadBack(wrong, not_told)


def _followed(reader: Reader, artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[Finding]:
    """What the reader finds, as far as it comes: a file may say anything, at any place, and what no reader foresaw is
    wrong."""
    try:
        yield from reader(artifact, quantized)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        yield Finding(GRAPH, "wrong", f"it cannot be followed: {type(error).__name__}: {error}"[:300])


def differing(artifact: Artifact, quantized: QuantizedCheckpoint) -> list[str]:
    """The items that `read_back` finds wrong, each once."""
    return list(dict.fromkeys(finding.item for finding in read_back(artifact, quantized).wrong))


def readable(artifact: Artifact) -> bool:
    """Whether anything of the format's program can be read back."""
    return not isinstance(artifact.record.reader, Without)


def _reader(artifact: Artifact) -> Reader:
    path = artifact.record.reader
    return _closed if isinstance(path, Without) else function(path)


def _closed(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[Finding]:
    """Nothing is told."""
    reader = artifact.record.reader
    assert isinstance(reader, Without)
    why = f"{artifact.format} files cannot be read back: {reader.reason}"
    yield from untold(why, *inventory(artifact, quantized))
