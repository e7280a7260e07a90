"""Readback of graphs that Qualcomm compiled, whose weights only its own runtime can read.

What can be held bit for bit is what the compiler was given: the onnx-npu artifact beside, which artifact.json names by
digests. What the compiled graphs compute is for running them (`eval/accuracy/twin_blocks.py`), and what they tell of
themselves for the vendor's own API (`eval/files/compiled.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bluelm.system.files import sha256
from compress.checkpoint.store import EMBED, QuantizedCheckpoint
from export.artifacts.artifact import Artifact, find_source
from export.formats import function, record
from export.readback import items
from export.readback.held import table_faults

GIVEN = "what the compiler was given"
CLOSED = "in what the compiler was given it is right; what Qualcomm's compiler wrote does not tell it"


def findings(artifact: Artifact, quantized: QuantizedCheckpoint) -> Iterator[items.Finding]:
    """What is wrong in the artifact that was compiled, by its reader; what is right there is not told here."""
    source = find_source(artifact)
    if source is None:
        yield from items.untold(
            "the ONNX artifact that it was compiled from is not beside it", *items.inventory(artifact, quantized)
        )
        return
    yield from items.checked(GIVEN, given_faults(artifact, source))
    reader: items.Reader = function(str(record(source.format).reader))
    for finding in reader(source, quantized):
        if finding.item != EMBED:
            yield replace(finding, state="untold", told=CLOSED) if finding.state == "right" else finding
    yield from items.checked(EMBED, ["codes or scales" for _ in table_faults(artifact, quantized)])


def given_faults(artifact: Artifact, source: Artifact) -> Iterator[str]:
    """Files of either side that are not those of which artifact.json tells how they were compiled."""
    if artifact.given is None:
        yield "artifact.json does not tell it"
        return
    for folder, files in ((source.folder, artifact.given.files), (artifact.folder, artifact.given.made)):
        for path, digest in files.items():
            if not (folder / path).is_file() or sha256(folder / path) != digest:
                yield f"{path} is another file than was there when it was compiled"
