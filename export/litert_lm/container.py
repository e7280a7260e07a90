"""The container of LiteRT-LM, `.litertlm`: a header that names sections, and the sections, each on a block of 16 KiB.

    "LITERTLM", version 3 x uint32, 4 bytes of padding, end of the header uint64, header (a flatbuffer); little-endian

Schema: schema/core/litertlm_header_schema.fbs of google-ai-edge/LiteRT-LM, as the litert-lm-builder wheel carries it.
The same sections and entries give the same bytes: what its own builder takes from the clock is an entry like any other.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flatbuffers
from litert_lm_builder import litertlm_header_schema_py_generated

from bluelm.system.files import atomic_file

schema: Any = litertlm_header_schema_py_generated  # generated classes, whose annotations are wrong
MAGIC, VERSION = b"LITERTLM", (1, 7, 0)
PREAMBLE = struct.Struct("<8s3I4xQ")
BLOCK = 16 * 1024
Kind = schema.AnySectionDataType


@dataclass(frozen=True)
class Section:
    """A part of the file.

    Attributes:
        kind: of `Kind`.
        content: its bytes, or a file that holds them.
        items: what the header says of it.
    """

    kind: int
    content: bytes | Path
    items: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def size(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)


def write(path: Path, sections: Sequence[Section], entries: Mapping[str, str]) -> None:
    """Write the file, all or nothing; `entries`: what the header says of the whole."""
    ends = [1] * (2 * len(sections))  # no offset is 0, which a flatbuffer leaves out
    offset = _block(PREAMBLE.size + len(_header(sections, entries, ends)))
    for index, section in enumerate(sections):
        ends[2 * index : 2 * index + 2] = offset, offset + section.size
        offset = _block(offset + section.size)
    header = _header(sections, entries, ends)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(PREAMBLE.pack(MAGIC, *VERSION, PREAMBLE.size + len(header)) + header)
        for section, begin in zip(sections, ends[::2], strict=True):
            file.seek(begin)
            if isinstance(section.content, Path):
                with section.content.open("rb") as source:
                    shutil.copyfileobj(source, file, 2**22)
            else:
                file.write(section.content)


def _header(sections: Sequence[Section], entries: Mapping[str, str], ends: Sequence[int]) -> bytes:
    """`ends`: where each section begins and ends."""
    table, told = schema.LiteRTLMMetaDataT(), schema.SystemMetadataT()
    told.entries = _items(entries)
    held = schema.SectionMetadataT()
    held.objects = []
    for index, section in enumerate(sections):
        one = schema.SectionObjectT()
        one.items, one.dataType = _items(section.items), section.kind
        one.beginOffset, one.endOffset = ends[2 * index : 2 * index + 2]
        held.objects.append(one)
    table.systemMetadata, table.sectionMetadata = told, held
    builder = flatbuffers.Builder(BLOCK)
    builder.Finish(table.Pack(builder))
    return bytes(builder.Output())


def _items(texts: Mapping[str, str]) -> list[Any]:
    found: list[Any] = []
    for key, text in texts.items():
        pair, value = schema.KeyValuePairT(), schema.StringValueT()
        value.value = text
        pair.key, pair.valueType, pair.value = key, schema.VData.StringValue, value
        found.append(pair)
    return found


def _block(offset: int) -> int:
    """The first block's begin at or behind it."""
    return -(-offset // BLOCK) * BLOCK
